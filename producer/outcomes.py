"""What Redis holds about a job: Celery's state and result, with the errors of nograd rebuilt.

Nothing is imported and no constructor but ours runs because of what a result says: a class is looked up among
`nograd.tasks.errors` by name, and everything else becomes a `JobError` that names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery import states

from nograd.tasks import errors
from nograd.tasks.errors import JobCancelled, JobError, NogradError
from nograd.tasks.timings import Timings, read_timings

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far a job is.

    Attributes:
        state: Celery's state: PENDING, STARTED, RETRY, SUCCESS, FAILURE or REVOKED. PENDING also stands for an
            unknown or expired job: Redis holds nothing about either.
        value: what the task returned, if it succeeded.
        error: why it did not.
        timings: what it spent its time on; None before its end, and if it never came to a worker's pool.
    """

    state: str
    value: Any = None
    error: NogradError | None = None
    timings: Timings | None = None

    @property
    def ready(self) -> bool:
        """Whether this is the end of the job."""
        return self.state in states.READY_STATES

    def unwrap(self) -> Any:
        """The value.

        Raises:
            NogradError: the error of the job, a new object each time, since tracebacks grow on the raised one.
        """
        if self.error is not None:
            raise type(self.error)(*self.error.args)
        return self.value


PENDING = Outcome(states.PENDING)


def read_outcome(meta: Mapping[str, Any]) -> Outcome:
    """Read a result as Celery stores it, decoded."""
    state, result = meta["status"], meta.get("result")
    timings = read_timings(meta.get("timings"))
    if state == states.REVOKED:
        why = JobCancelled(f"the job was cancelled or had expired: {_message(result) or 'revoked'}")
        return Outcome(state, error=why, timings=timings)
    if state == states.FAILURE:
        return Outcome(state, error=_error_of_result(result), timings=timings)
    return Outcome(state, value=result if state == states.SUCCESS else None, timings=timings)


def error_of_item(item: Mapping[str, Any]) -> NogradError:
    """Rebuild the error of one item of a message with many (``{"type", "code", "message"}``)."""
    return _rebuild(str(item.get("type")), str(item.get("message")), ours=True)


def error_to_dict(error: BaseException) -> dict[str, str]:
    """An error as programs read it; the same three keys as on the wire."""
    if isinstance(error, NogradError):
        return {"type": type(error).__name__, "code": error.code, "message": error.message}
    return {"type": type(error).__name__, "code": JobError.code, "message": str(error)}


def _error_of_result(result: Any) -> NogradError:
    if not isinstance(result, dict):
        return JobError(f"the job failed: {result}")
    ours = result.get("exc_module") == errors.__name__
    return _rebuild(str(result.get("exc_type")), _message(result), ours=ours)


def _rebuild(name: str, message: str, *, ours: bool) -> NogradError:
    cls = getattr(errors, name, None) if ours else None
    if isinstance(cls, type) and issubclass(cls, NogradError):
        return cls(message)
    return JobError(f"{name}: {message}")


def _message(result: Any) -> str:
    message = result.get("exc_message") if isinstance(result, dict) else result
    if isinstance(message, list | tuple):  # the args of the exception
        return ", ".join(map(str, message))
    return "" if message is None else str(message)
