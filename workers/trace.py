"""The complete path: Celery's own tracer ends a message.

For a prediction it runs after the forward, around a task body that returns the outcome already computed
(`nograd.tasks.predict`). So results, acks, events, retries, link, chain, group, chord, signals and ``result_extended``
are Celery's own doing. This costs about a millisecond a message.

Law: whatever the tracer or Celery's callbacks raise, the message gets an end. In Celery's threads pool a task that
raises ``MemoryError`` or ``SystemExit`` is never acknowledged and its slot is gone for ever.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.app import trace as celery_trace
from celery.exceptions import Ignore, Reject, Retry

from nograd.tasks.errors import JobError, NogradError
from nograd.tasks.predict import Outcome, traced_outcome

logger = logging.getLogger(__name__)

#: what Celery's tracer takes: (task name, id, request, body, content type, content encoding)
TraceArgs = tuple[Any, ...]


class Returned(Reject):  # type: ignore[misc]
    """The message goes back to its queue, and nothing is wrong: the log has Celery's line of it, without a traceback.

    Args:
        why: for that line.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why, requeue=True)


def _spare_traceback(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], Returned):
        record.exc_info = None
    return True


celery_trace.logger.addFilter(_spare_traceback)


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Celery's side of one message, as ``BasePool.apply_async`` receives it."""

    target: Callable[..., Any]
    accepted: Callable[..., Any] | None
    done: Callable[..., Any]
    failed: Callable[..., Any] | None

    def accept(self) -> None:
        """Tell Celery that work on the message begins (``task-started``)."""
        if self.accepted is not None:
            self.accepted(os.getpid(), time.monotonic())

    @property
    def request(self) -> Any:
        """Celery's Request, of which the callbacks are methods; None if they are somebody else's."""
        return getattr(self.done, "__self__", None)


def trace_outcome(celery: Callbacks, args: TraceArgs, outcome: Outcome, started: float) -> None:
    """Run Celery's tracer around an outcome that is already there."""
    token = traced_outcome.set(outcome)
    try:
        trace(celery, args, {}, started)
    finally:
        traced_outcome.reset(token)


def trace(celery: Callbacks, args: TraceArgs, kwargs: dict[str, Any], started: float) -> None:
    """Run Celery's tracer on this thread and end the message, whatever happens.

    Args:
        celery: the message's callbacks.
        args: of the tracer.
        kwargs: of the tracer.
        started: monotonic time at which work on the message began; the runtime in its events counts from there.
    """
    try:
        failed, result, runtime = celery.target(*args, **kwargs)
        if runtime is not None:  # the tracer saw only the last step of it
            runtime = time.monotonic() - started
        if failed:
            result = _survivable(result)
        celery.done((failed, result, runtime))
    except BaseException as err:  # noqa: BLE001 - see the law above
        end_with_error(celery, err)


def _survivable(einfo: ExceptionInfo) -> ExceptionInfo:
    """Celery re-raises these three instead of acknowledging; their outcome is stored already."""
    cause = getattr(einfo.exception, "exc", einfo.exception)  # ExceptionWithTraceback wraps it
    if isinstance(cause, MemoryError | SystemExit | KeyboardInterrupt):
        einfo.exception = JobError(f"{type(cause).__name__}: {cause}")
    return einfo


def as_job_error(err: BaseException) -> NogradError:
    """The outcome of a message that met an error nobody foresaw: ours as it is, any other by its name."""
    return err if isinstance(err, NogradError) else JobError(f"{type(err).__name__}: {err}")


def end_with_error(celery: Callbacks, err: BaseException) -> None:
    """End a message whose trace raised: store a failure and acknowledge."""
    if isinstance(err, Reject | Ignore | Retry):
        cause: BaseException = err  # Celery's own words to a request; it knows what to do
    else:
        logger.error("a task ended with %s: %s; it is stored as failed", type(err).__name__, err, exc_info=err)
        cause = JobError(f"{type(err).__name__}: {err}")
    if celery.failed is None:
        return
    try:
        raise cause
    except BaseException:  # noqa: BLE001 - ExceptionInfo is made of the exception being handled
        einfo = ExceptionInfo()
    try:
        celery.failed(einfo)
    except BaseException:
        logger.exception("a task's failure could not be stored; the broker will deliver it again")
