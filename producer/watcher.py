"""One thread that asks Redis for the outcomes everybody in this process waits for.

Why asking instead of Celery's subscriptions: those cost a round trip and a channel per job from the moment it is
sent, hold up a publisher for 19 s when Redis is away, and have no asyncio side. Here any number of threads and
coroutines wait on futures, and one ``MGET`` asks for all that are due.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nograd.tasks.errors import BrokerUnavailable, ResultTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .outcomes import Outcome

#: seconds between two questions about one job: an eighth of the time waited so far, within these limits
MIN_INTERVAL_S = 0.002
MAX_INTERVAL_S = 0.05
#: keys asked for in one second at most, however many jobs are waited for
MAX_KEYS_PER_S = 10_000
#: keys in one MGET; Redis does nothing else meanwhile
MAX_KEYS = 500
#: seconds Redis may be away before those who wait are told; a restart takes less
OUTAGE_S = 10.0
#: seconds between two questions while it is away
OUTAGE_INTERVAL_S = 0.5
#: seconds the thread stays when nobody waits
IDLE_S = 5.0
#: seconds `Watcher.close` waits for the thread; one that waits for a silent Redis ends by itself, up to 30 s later
CLOSE_S = 1.0


@dataclass(slots=True)
class _Watched:
    """One job that is waited for, and by whom."""

    job_id: str
    since: float
    futures: list[Future[Outcome]] = field(default_factory=list)


class Watcher:
    """Owns the thread that asks, and the list of who waits for what.

    Thread-safe. The thread starts with the first wait and ends when nobody has waited for a while; a process that was
    forked starts its own.

    Args:
        fetch: job ids → their outcomes, in order; raises `BrokerUnavailable`.
    """

    def __init__(self, fetch: Callable[[Sequence[str]], list[Outcome]]) -> None:
        self._fetch = fetch
        self._reset()

    def watch(self, job_id: str) -> Future[Outcome]:
        """A future of the outcome of a job; cancel it to stop waiting.

        Its exception is `BrokerUnavailable` if Redis stays away.

        Raises:
            RuntimeError: after `close`.
        """
        future: Future[Outcome] = Future()
        if self._pid != os.getpid():
            self._reset()  # after a fork neither the thread nor the state of its lock came along
        with self._changed:
            if self._closed:
                raise RuntimeError("the client is closed")
            watched = self._watched.get(job_id)
            if watched is None:
                watched = self._watched[job_id] = _Watched(job_id, time.monotonic())
                self._schedule(watched, watched.since)
            watched.futures.append(future)
            self._ensure_thread()
            self._changed.notify()
        return future

    def close(self) -> None:
        """End the thread; who still waits gets `ResultTimeout`: the jobs go on."""
        with self._changed:
            self._closed = True
            waiting = list(self._watched)
            self._changed.notify()
            thread = self._thread
        self._fail(waiting, ResultTimeout("the client was closed while the job was waited for; the job goes on"))
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_S)

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._watched: dict[str, _Watched] = {}
        self._due: list[tuple[float, int, str]] = []  # when, tie-breaker, job id
        self._ties = itertools.count()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._reached_at: float | None = None  # when Redis last answered; None if it never has

    def _ensure_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="nograd-watcher", daemon=True)
            self._thread.start()

    def _schedule(self, watched: _Watched, when: float) -> None:
        heapq.heappush(self._due, (when, next(self._ties), watched.job_id))

    def _run(self) -> None:
        while (job_ids := self._next_due()) is not None:
            try:
                outcomes = self._fetch(job_ids)
            except BrokerUnavailable as err:
                self._on_outage(job_ids, err)
            except Exception as err:  # noqa: BLE001 - whoever waits hears of it; a dead thread would leave them waiting
                self._fail(job_ids, err)
            else:
                self._reached_at = time.monotonic()
                self._on_outcomes(zip(job_ids, outcomes, strict=True))

    def _next_due(self) -> list[str] | None:
        """Wait until there is something to ask; None to end the thread. A new job is asked for at once."""
        with self._changed:
            while not self._closed:
                self._drop_abandoned()
                if not self._due:
                    if not self._changed.wait(IDLE_S) and not self._due:
                        break
                    continue
                wait = self._due[0][0] - time.monotonic()
                if wait <= 0:
                    return self._pop_due()
                self._changed.wait(wait)
            self._thread = None  # under the lock, so that the next `watch` starts another
            return None

    def _drop_abandoned(self) -> None:
        while self._due and self._due[0][2] in self._watched:
            watched = self._watched[self._due[0][2]]
            if not all(future.cancelled() for future in watched.futures):
                return
            del self._watched[watched.job_id]
            heapq.heappop(self._due)
        while self._due and self._due[0][2] not in self._watched:
            heapq.heappop(self._due)

    def _pop_due(self) -> list[str]:
        # What is due within the shortest interval goes along: one question instead of two.
        until = time.monotonic() + MIN_INTERVAL_S
        job_ids: list[str] = []
        while self._due and self._due[0][0] <= until and len(job_ids) < MAX_KEYS:
            job_id = heapq.heappop(self._due)[2]
            watched = self._watched.get(job_id)
            if watched is None or all(future.cancelled() for future in watched.futures):
                self._watched.pop(job_id, None)
            else:
                job_ids.append(job_id)
        return job_ids

    def _on_outcomes(self, outcomes: Iterable[tuple[str, Outcome]]) -> None:
        now = time.monotonic()
        settled: list[tuple[_Watched, Outcome]] = []
        with self._changed:
            slowest = max(MAX_INTERVAL_S, len(self._watched) / MAX_KEYS_PER_S)
            for job_id, outcome in outcomes:
                watched = self._watched.get(job_id)
                if watched is None:
                    continue
                if outcome.ready:
                    settled.append((self._watched.pop(job_id), outcome))
                else:
                    self._schedule(watched, now + min(slowest, max(MIN_INTERVAL_S, (now - watched.since) / 8)))
        for watched, outcome in settled:
            for future in watched.futures:
                with suppress(InvalidStateError):  # whoever waited has gone
                    future.set_result(outcome)

    def _on_outage(self, job_ids: list[str], err: BrokerUnavailable) -> None:
        # A Redis that has never answered is a wrong address; one that has is probably coming back.
        now = time.monotonic()
        with self._changed:
            if self._reached_at is not None and now - self._reached_at <= OUTAGE_S:
                for job_id in job_ids:
                    watched = self._watched.get(job_id)
                    if watched is not None:  # else the client was closed meanwhile
                        self._schedule(watched, now + OUTAGE_INTERVAL_S)
                return
            everybody = list(self._watched)
        self._fail(everybody, err)

    def _fail(self, job_ids: Iterable[str], err: Exception) -> None:
        with self._changed:
            failed = [self._watched.pop(job_id) for job_id in job_ids if job_id in self._watched]
            self._due = [entry for entry in self._due if entry[2] in self._watched]
            heapq.heapify(self._due)
        for watched in failed:
            for future in watched.futures:
                with suppress(InvalidStateError):
                    future.set_exception(type(err)(*err.args))  # each its own: a traceback grows on what is raised
