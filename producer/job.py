"""A job, as the one who sent it sees it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from celery import states

from nograd.tasks.errors import NogradError, ResultTimeout
from nograd.tasks.keys import queue_name

from .outcomes import Outcome

if TYPE_CHECKING:
    from collections.abc import Generator

    from nograd.tasks.timings import Timings

    from .broker import Broker
    from .watcher import Watcher


class Job:
    """One job, by its id. It holds nothing open: make as many as you like, in any process.

    ``await job`` gives what `result` gives, without a thread of its own and without blocking the loop.

    Attributes:
        id: the Celery task id.
        model: its model; None if only the id is known.
    """

    __slots__ = ("_broker", "_watcher", "id", "model")

    def __init__(self, job_id: str, model: str | None, broker: Broker, watcher: Watcher) -> None:
        self.id = job_id
        self.model = model
        self._broker = broker
        self._watcher = watcher

    @property
    def state(self) -> str:
        """Celery's state now: PENDING (also for an unknown or expired id), STARTED, RETRY, SUCCESS, FAILURE, REVOKED.

        Raises:
            BrokerUnavailable: if Redis does not answer.
        """
        return self.look().state

    def done(self) -> bool:
        """Whether it has an outcome.

        Raises:
            BrokerUnavailable: if Redis does not answer.
        """
        return self.look().ready

    def look(self) -> Outcome:
        """How far it is now, in one round trip.

        Raises:
            BrokerUnavailable: if Redis does not answer.
        """
        return self._broker.outcomes([self.id])[0]

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the prediction, at most ``timeout`` seconds; 0 only looks.

        Raises:
            JobError: the error of this job, by its type; `JobCancelled` if it was revoked or had expired.
            ResultTimeout: if it has no outcome yet; it goes on.
            BrokerUnavailable: if Redis does not answer.
        """
        return self.wait(timeout).unwrap()

    def exception(self, timeout: float | None = None) -> NogradError | None:
        """Wait as `result` does; the error of the job, or None if it succeeded.

        Raises:
            ResultTimeout: if it has no outcome yet; it goes on.
            BrokerUnavailable: if Redis does not answer.
        """
        return self.wait(timeout).error

    def timings(self, timeout: float | None = None) -> Timings | None:
        """Wait as `result` does; what the job spent its time on, whether it succeeded or not.

        None if it never came to a worker's pool (it was revoked or had expired before), or if the worker's result
        backend is not nograd's.

        Raises:
            ResultTimeout: if it has no outcome yet; it goes on.
            BrokerUnavailable: if Redis does not answer.
        """
        return self.wait(timeout).timings

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for the outcome without raising the error of the job.

        Raises:
            ResultTimeout: if there is none after ``timeout`` seconds.
            BrokerUnavailable: if Redis does not answer.
        """
        if timeout is not None and timeout <= 0:
            return self._last_look(timeout)
        future = self._watcher.watch(self.id)
        try:
            return future.result(timeout)
        except ResultTimeout:  # the client was closed
            raise
        except TimeoutError:
            return self._last_look(timeout or 0)
        finally:
            future.cancel()  # also on Ctrl-C: nobody waits any more

    def cancel(self) -> None:
        """Ask the workers not to run it. What is on a device already ends as it would.

        Raises:
            BrokerUnavailable: if Redis does not answer.
        """
        self._broker.revoke([self.id])

    def forget(self) -> None:
        """Remove its result from Redis before its time.

        Raises:
            BrokerUnavailable: if Redis does not answer.
        """
        self._broker.forget([self.id])

    def __await__(self) -> Generator[Any, None, Any]:
        outcome: Outcome = yield from asyncio.wrap_future(self._watcher.watch(self.id)).__await__()
        return outcome.unwrap()

    def __repr__(self) -> str:
        return f"<Job {self.id} of {self.model or 'an unnamed model'}>"

    def _last_look(self, timeout: float) -> Outcome:
        outcome = self.look()
        if outcome.ready:
            return outcome
        after = f"after {round(timeout, 2):g} s" if timeout > 0 else "yet"
        text = f"no result {after}: job {self.id} is {outcome.state}"
        if outcome.state != states.PENDING:
            raise ResultTimeout(text)
        if self.model is None:
            raise ResultTimeout(f"{text} (unknown or expired id, or no worker is serving its queue)")
        queue, waiting = queue_name(self.model), self._broker.waiting([self.model])[self.model]
        raise ResultTimeout(f"{text} (unknown id, or no worker is serving the queue {queue}, {waiting} jobs waiting)")
