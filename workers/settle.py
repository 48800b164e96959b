"""Giving messages their end: many at once where Celery would do nothing but store a result, else one by one.

::

    resolved ──► finish ──► plain success? ──► one script for all of them, then each one's callback   (fast path)
                                └── no ──────► Celery's tracer, with the outcome already computed     (complete path)

A model's own ``finish`` may be slow, hang or crash: it runs on threads of its own, and is accounted for (see `risk`).

Laws:

* Both ways leave the same state in the backend and the same events.
* A message is settled once, by whoever claims it; an abandoned one is not settled here (Celery has answered it).
* Late, like batches: a thread that is free takes all that is resolved by then. What it has is stored after `STORE_S`
  at most, however long it takes to finish the rest.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery.app import trace as celery_trace
from celery.utils.saferepr import saferepr

from nograd.tasks.predict import Outcome

from .crew import Crew
from .risk import Risks
from .store import ResultStore
from .trace import as_job_error, end_with_error, trace_outcome

if TYPE_CHECKING:
    from .message import Message

logger = logging.getLogger(__name__)

#: messages the fast path settles at a time. One thread does it: several would only share what there is among more
#: writes, and take the interpreter from the others
MOST_AT_ONCE = 256
#: threads of the complete path, one message at a time; each waits for Redis most of its time
TRACE_THREADS = 3
#: threads for what models finish themselves, one message at a time
FINISH_THREADS = 2
#: seconds a result may wait for others to be stored with it
STORE_S = 0.01


@dataclass(slots=True)
class _Success:
    message: Message
    value: Any
    timings: dict[str, Any]
    stored: tuple[str, str] | None


class Settler:
    """Owns the threads that end messages.

    Args:
        store: the fast path's store.
        resultrepr_maxsize: characters of a result in its event.
        risks: where a thread says what it does.
    """

    def __init__(self, store: ResultStore, resultrepr_maxsize: int, risks: Risks) -> None:
        #: name of this worker
        self.node = store.hostname
        self._store = store
        self._risks = risks
        self._maxsize = resultrepr_maxsize
        self._crew: Crew[tuple[Message, Outcome | None]] = Crew("nograd-settle", 1, self._settle, MOST_AT_ONCE)
        self._finishers: Crew[Message] = Crew("nograd-finish", FINISH_THREADS, self._finish)
        self._tracers: Crew[tuple[Message, Outcome]] = Crew("nograd-trace", TRACE_THREADS, self._trace)
        #: messages settled on each path, for ``inspect stats``
        self.counts = {"fast": 0, "complete": 0}

    def start(self) -> None:
        """Start the threads."""
        for crew in (self._finishers, self._crew, self._tracers):
            crew.start()

    def submit(self, message: Message, outcome: Outcome | None = None) -> None:
        """End a message with ``outcome``, or with those of its items if None. Never blocks."""
        if outcome is None and message.model is not None and message.model.own_finish and not message.alone:
            self._finishers.submit(message, bulk=message.bulk)
        else:
            self._crew.submit((message, outcome))

    def finish(self, timeout_s: float | None = None) -> bool:
        """Settle what was submitted; False if that took longer than ``timeout_s`` seconds."""
        half = None if timeout_s is None else timeout_s / 2  # a model's code may hang: results do not wait for it
        finished = self._finishers.finish(half)
        return self._crew.finish(half) and self._tracers.finish(half) and finished

    def _finish(self, taken: list[Message]) -> None:
        for message in taken:
            self._crew.submit((message, self._outcome(message)))

    def _settle(self, taken: list[tuple[Message, Outcome | None]]) -> None:
        fast: list[_Success] = []
        began = time.monotonic()
        for message, given in taken:
            if fast and time.monotonic() - began > STORE_S:
                self._put(fast)
                fast, began = [], time.monotonic()
            if not message.claim():
                continue
            outcome = self._outcome(message) if given is None else given
            timings = self._take_time(message)
            success = self._encode(message, outcome, timings)
            if success is None:
                self._tracers.submit((message, Outcome(outcome.value, outcome.error, timings)))
            else:
                fast.append(success)
        if fast:
            self._put(fast)

    def _take_time(self, message: Message) -> dict[str, Any]:
        """Its timings: on both paths the result is stored with them, and the last event has them."""
        timings = message.timings(self.node)
        request = message.celery.request
        if request is not None:
            request.timings = timings
        return timings

    def _encode(self, message: Message, outcome: Outcome, timings: dict[str, Any]) -> _Success | None:
        """What to store on the fast path; None if the message must go the complete way."""
        if outcome.error is not None or not self._store.plain(message.request_dict, message.embed):
            return None
        args, kwargs, _ = message.body
        try:
            stored = self._store.encode(message.request_dict, args, kwargs, outcome.value, timings)
            return _Success(message, outcome.value, timings, stored)
        except Exception:  # noqa: BLE001 - whatever a result does to a serializer; the complete path stores a failure
            return None

    def _put(self, fast: list[_Success]) -> None:
        try:
            self._store.put([success.stored for success in fast if success.stored is not None])
        except Exception as err:  # noqa: BLE001 - claimed messages must not be left without their end
            logger.warning("%d results could not be stored at once (%s); storing them one by one", len(fast), err)
            for success in fast:
                self._tracers.submit((success.message, Outcome(success.value, timings=success.timings)))
            return
        for success in fast:
            self._tell(success)

    def _tell(self, success: _Success) -> None:
        """What Celery does after a success is stored: log, acknowledge, tell Flower."""
        message = success.message
        runtime = time.monotonic() - message.started
        represented = saferepr(success.value, self._maxsize)
        try:
            if celery_trace.logger.isEnabledFor(logging.INFO):
                celery_trace.info(celery_trace.LOG_SUCCESS, message.log_context(represented, runtime))
            message.celery.done((False, represented, runtime))
            self.counts["fast"] += 1
        except BaseException as err:  # noqa: BLE001 - the law of trace.py: whatever is raised, the message gets an end
            end_with_error(message.celery, err)

    def _trace(self, taken: list[tuple[Message, Outcome]]) -> None:
        for message, outcome in taken:
            trace_outcome(message.celery, message.args, outcome, message.started)
            self.counts["complete"] += 1

    def _outcome(self, message: Message) -> Outcome:
        model = message.model
        assert model is not None  # or it would have no items
        try:
            with self._risks.stint("finish", model, message, risky=model.own_finish) as stint:
                return message.outcome(stint.item)
        except BaseException as err:
            logger.exception("the outcome of a message could not be put together; it fails")
            return Outcome(error=as_job_error(err))
