"""The batch pool: a Celery pool whose unit of execution is a batch (``worker_pool = "nograd.workers.pool:TaskPool"``).

::

    Celery's event loop          CPU threads        device thread           CPU threads
    on_apply(message) ──────► decode, prepare ──► take ► forward ──► finish, trace late, acknowledge
             └── any other task ─────────────────────────────────► trace on a thread

Laws:

* Messages of ``nograd.predict`` are batched across callers; every other task runs through Celery's tracer on a thread.
* An input that cannot be prepared fails alone; the other items of its message and its batch go on.
* A message is settled exactly once; one that was revoked, or never reached the device before shutdown, is not settled
  at all: Celery has answered it already, or the broker gives it to another worker.
* Models are loaded and warm before the first message is fetched; a model that cannot be loaded stops the start.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from celery.concurrency.base import BasePool
from celery.worker.state import revoked as revoked_tasks
from kombu.serialization import loads, prepare_accept_content

from nograd.tasks import registry
from nograd.tasks.errors import ConfigError, InvalidInput, JobError, ModelFailed, NogradError, UnknownModel
from nograd.tasks.keys import MODELS_RENEW_S, PREDICT_TASK, queue_name
from nograd.tasks.modelfile import ModelFile, load_model_file
from nograd.tasks.payloads import decode_input
from nograd.tasks.predict import Outcome
from nograd.tasks.settings import Settings

from .batching import Item
from .engine import Engine
from .models import HostedModel
from .settle import Callbacks, TraceArgs, trace, trace_outcome

logger = logging.getLogger(__name__)

#: threads that run Celery's tracer; each waits for Redis most of its time
SETTLE_THREADS = 4
#: threads for tasks that are not predictions, at most
TASK_THREADS = 32


class Message:
    """One message of ``nograd.predict`` in this process, from fetch to acknowledgement.

    It is the handle Celery gets back from the pool. Celery holds it by weak reference and calls `terminate` on it.
    Items are resolved by the device thread and by the thread that prepares; whoever resolves the last one settles.
    """

    def __init__(self, celery: Callbacks, args: TraceArgs) -> None:
        self.celery = celery
        self.args = args
        self.model: HostedModel | None = None
        self.params: Mapping[str, Any] = {}
        self.many = False
        self.started = time.monotonic()
        # The callback is a method of Celery's Request, which alone knows whether the job was revoked or has expired.
        self.request = getattr(celery.done, "__self__", None)
        self._terminated = False
        self._settled = False
        self._lock = threading.Lock()
        self._outcomes: list[Outcome | None] = []
        self._waiting = 0
        self._on_complete: Any = None

    def expect(self, count: int, on_complete: Any) -> None:
        """Say how many items the message has and whom to call when all have their outcome."""
        self._outcomes = [None] * count
        self._waiting = count
        self._on_complete = on_complete

    def resolve(self, index: int, outcome: Outcome) -> None:
        """Take the outcome of one item (see `engine.Job`)."""
        with self._lock:
            if self._outcomes[index] is not None:
                return
            self._outcomes[index] = outcome
            self._waiting -= 1
            complete = self._waiting == 0
        if complete:
            self._on_complete(self)

    def abandoned(self) -> bool:
        """Whether the message was terminated, revoked or has expired. Only looks; `withdraw` answers."""
        if self._terminated:
            return True
        if self.request is None:
            return False
        return self.request.id in revoked_tasks or bool(self.request.maybe_expire())

    def withdraw(self) -> None:
        """Let Celery answer an abandoned message: REVOKED is stored, the message acknowledged."""
        if self.claim() and self.request is not None and not self._terminated:
            self.request.revoked()

    def terminate(self, signal: Any = None) -> None:  # noqa: ARG002 - Celery's signature
        """Give the message up: Celery has revoked it, stored that and acknowledged."""
        self._terminated = True

    def claim(self) -> bool:
        """True for the one caller that may end the message."""
        with self._lock:
            if self._settled:
                return False
            self._settled = True
            return not self._terminated

    def outcome(self) -> Outcome:
        """The outcome of the whole message, predictions finished."""
        outcomes = [self._finish(outcome) for outcome in self._outcomes if outcome is not None]
        if not self.many:
            return outcomes[0]
        return Outcome(value=[_wire(outcome) for outcome in outcomes])

    def _finish(self, outcome: Outcome) -> Outcome:
        if outcome.error is not None or self.model is None:
            return outcome
        try:
            return Outcome(value=self.model.finish(outcome.value, self.params))
        except NogradError as err:
            return Outcome(error=err)
        except BaseException as err:  # noqa: BLE001 - a model's own code; its item fails
            return Outcome(error=ModelFailed(f"finish raised {type(err).__name__}: {err}"))


def _wire(outcome: Outcome) -> dict[str, Any]:
    """One item's outcome in the result of a message with many."""
    if outcome.error is None:
        return {"prediction": outcome.value}
    error = outcome.error
    code = getattr(error, "code", JobError.code)
    return {"error": {"type": type(error).__name__, "code": code, "message": str(error)}}


class TaskPool(BasePool):  # type: ignore[misc]
    """Celery's pool protocol over an `Engine`. ``limit`` (``--concurrency``) is the number of messages in flight."""

    task_join_will_block = True
    signal_safe = False  # stopping joins threads, which a signal handler must not

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.engine: Engine | None = None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._prepare = ThreadPoolExecutor(cores, thread_name_prefix="nograd-prepare")
        self._settle = ThreadPoolExecutor(SETTLE_THREADS, thread_name_prefix="nograd-settle")
        self._tasks = ThreadPoolExecutor(min(TASK_THREADS, max(1, self.limit or 1)), thread_name_prefix="nograd-task")
        self._accept = prepare_accept_content(self.app.conf.accept_content)
        self._stopping = threading.Event()

    # -- life --------------------------------------------------------------------------------------------------------

    def on_start(self) -> None:
        """Load the models of the queues this worker consumes, then make them known."""
        try:
            file = _model_file()
            self.engine = Engine(file, self._names(file), on_abandoned=self._withdraw)
            self.engine.start()
        except ConfigError as err:
            # Celery would print a traceback and exit 1; this is the user's to fix, and one line says it all.
            logger.critical("the worker does not start: %s", err.message)
            raise SystemExit(2) from err
        threading.Thread(target=self._keep_known, args=(file,), name="nograd-registry", daemon=True).start()

    def on_close(self) -> None:
        """Stop taking batches. What waits is dropped unacknowledged, so the broker takes it back."""
        self._stopping.set()
        if self.engine is not None:
            waiting = self.engine.queue.close()
            if waiting:
                logger.info("%d items that had not reached the device go back to their queues", len(waiting))

    def on_stop(self) -> None:
        """Finish what is on the device, store and acknowledge it."""
        self.on_close()
        self._prepare.shutdown(cancel_futures=True)
        if self.engine is not None:
            self.engine.stop()
        self._tasks.shutdown(cancel_futures=True)
        self._settle.shutdown()

    def on_terminate(self) -> None:
        """Cold shutdown: wait for nothing."""
        self.on_close()
        for executor in (self._prepare, self._tasks, self._settle):
            executor.shutdown(wait=False, cancel_futures=True)

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Nothing: ``pid`` is this very process. `Message.terminate` is what ends a job here."""

    # -- work --------------------------------------------------------------------------------------------------------

    def on_apply(  # noqa: PLR0917 - Celery's signature
        self,
        target: Any,
        args: Any = (),
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        error_callback: Any = None,
        **_: Any,
    ) -> Message | Callbacks:
        """Take a message from Celery's event loop; never blocks."""
        celery = Callbacks(target, accept_callback, callback, error_callback)
        if args and args[0] == PREDICT_TASK:
            message = Message(celery, tuple(args))
            self._prepare.submit(self._guard, message, self._prepare_message)
            return message
        self._tasks.submit(self._run_task, celery, tuple(args), kwargs or {})
        return celery

    def _run_task(self, celery: Callbacks, args: TraceArgs, kwargs: dict[str, Any]) -> None:
        celery.accept()
        trace(celery, args, kwargs, time.monotonic())

    def _guard(self, message: Message, step: Any) -> None:
        """Run one step of a message; an error nobody foresaw becomes the message's outcome."""
        try:
            step(message)
        except BaseException as err:
            logger.exception("a message could not be handled; it fails")
            error = err if isinstance(err, NogradError) else JobError(f"{type(err).__name__}: {err}")
            self._trace(message, Outcome(error=error))

    def _prepare_message(self, message: Message) -> None:
        """Decode a message and prepare its inputs; hand to the device what can be predicted."""
        message.started = time.monotonic()
        message.celery.accept()
        if message.abandoned():
            message.withdraw()
            return
        try:
            inputs = self._read(message)
        except NogradError as err:
            self._trace(message, Outcome(error=err))
            return
        if not inputs:
            self._trace(message, Outcome(value=[]))
            return
        message.expect(len(inputs), self._complete)
        items = [item for index, wire in enumerate(inputs) if (item := _prepare_item(message, index, wire))]
        model = message.model
        if items and model is not None and self.engine is not None:
            self.engine.queue.put(items, model.spec.timeout_s)  # closed only at shutdown, when dropping it is right

    def _read(self, message: Message) -> list[Any]:
        """Decode the body; the message's model, params and inputs.

        Raises:
            InvalidInput: for a message that is not as `nograd.tasks.predict` says.
            UnknownModel: if this worker has no such model.
        """
        name, task_id, request, body, content_type, encoding = message.args
        # Until its body is known to be sound the tracer gets a stand-in, so that the error is ours and not a TypeError.
        message.args = (name, task_id, request, ((None, None), {}, {}), None, None)
        args, kwargs, embed = _decode(body, content_type, encoding, self._accept)
        call = _read_call(args, kwargs)
        # Decoded once, for the tracer as well; it holds what chains and retries need.
        message.args = (name, task_id, request, (args, kwargs, embed), None, None)
        models = self.engine.models if self.engine is not None else {}
        message.model = models.get(call.model)
        if message.model is None:
            raise UnknownModel(f"this worker has no model {call.model!r}; it serves {', '.join(sorted(models))}")
        message.params = {**message.model.spec.params, **(call.params or {})}
        message.many = call.many
        return call.input if call.many else [call.input]

    def _withdraw(self, message: Any) -> None:
        # Not on the device thread: storing REVOKED waits for Redis.
        self._settle.submit(message.withdraw)

    def _complete(self, message: Message) -> None:
        self._settle.submit(self._guard, message, lambda m: self._trace(m, m.outcome()))

    def _trace(self, message: Message, outcome: Outcome) -> None:
        if message.claim():
            trace_outcome(message.celery, message.args, outcome, message.started)

    # -- what others may know ----------------------------------------------------------------------------------------

    def _names(self, file: ModelFile) -> list[str]:
        """The models whose queues this worker consumes (``-Q`` narrows them)."""
        consumed = self.app.amqp.queues.consume_from
        names = [name for name in file.specs if queue_name(name) in consumed]
        if not names:
            raise ConfigError(
                f"{file.path}: this worker consumes {', '.join(consumed) or 'no queue'}, the queue of none of its "
                f"models; their queues are {', '.join(queue_name(name) for name in file.specs)}"
            )
        return names

    def _keep_known(self, file: ModelFile) -> None:
        cards = [registry.ModelCard.of(name, file.specs[name]) for name in self.engine.models] if self.engine else []
        wait = 0.0
        while not self._stopping.wait(wait):
            try:
                registry.register(self.app.backend.client, cards)
                wait = MODELS_RENEW_S
            except AttributeError:  # another app's result backend; its clients name their models themselves
                logger.warning(
                    "the result backend is not Redis; clients need a model file to know this worker's models"
                )
                return
            except Exception as err:  # noqa: BLE001 - any trouble with Redis; jobs do not depend on it
                wait = 5.0
                logger.warning("the models could not be registered in Redis (%s); trying again in %.0f s", err, wait)

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        if self.engine is not None:
            info["device"] = str(self.engine.device)
            info["waiting_items"] = len(self.engine.queue)
            info["models"] = {name: stats.as_dict() for name, stats in self.engine.stats.items()}
        return info


class _Call(msgspec.Struct, frozen=True):
    """The arguments of ``nograd.predict``."""

    model: str
    input: Any
    params: dict[str, Any] | None = None
    many: bool = False

    def __post_init__(self) -> None:
        if self.many and not isinstance(self.input, list):
            raise ValueError("with `many` the input is a list of inputs")


def _read_call(args: Any, kwargs: Any) -> _Call:
    fields = _Call.__struct_fields__
    try:
        if len(args) > len(fields):
            raise ValueError(f"takes {', '.join(fields)}; {len(args)} arguments given")
        given = dict(zip(fields, args, strict=False))
        wrong = [key for key in kwargs if key not in fields or key in given]
        if wrong:
            raise ValueError(f"unknown or repeated argument {wrong[0]!r}")
        return msgspec.convert(given | kwargs, _Call)
    except (TypeError, ValueError) as err:  # msgspec's ValidationError is a ValueError
        raise InvalidInput(f"{PREDICT_TASK}: {err}") from err


def _decode(body: Any, content_type: Any, encoding: Any, accept: Any) -> tuple[Any, Any, Any]:
    try:
        args, kwargs, embed = loads(body, content_type, encoding, accept=accept) if content_type else body
    except Exception as err:
        raise InvalidInput(f"the message cannot be decoded: {err}") from err
    return args, kwargs, embed


def _prepare_item(message: Message, index: int, wire: Any) -> Item | None:
    """Prepare one input, or resolve it with its own error."""
    model = message.model
    assert model is not None
    try:
        prepared = model.prepare(decode_input(wire), message.params)
        group = (model.bucket(prepared), _freeze(message.params))
        hash(group)
        return Item(model.name, group, prepared, message, index)
    except NogradError as err:
        message.resolve(index, Outcome(error=err))
    except BaseException as err:  # noqa: BLE001 - user code; its item fails
        message.resolve(index, Outcome(error=InvalidInput(f"prepare raised {type(err).__name__}: {err}")))
    return None


def _freeze(params: Mapping[str, Any]) -> bytes:
    """Parameters as something that can be compared: jobs batch together if theirs are equal."""
    return msgspec.json.encode(params, order="deterministic")


def _model_file() -> ModelFile:
    models = Settings.from_env().models
    if models is None:
        raise ConfigError("no model file: set NOGRAD_MODELS, or start the worker with `nograd worker --models FILE`")
    return load_model_file(models)
