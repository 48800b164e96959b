"""Celery's request of a prediction, except that its end carries its timings, in the event and in what is stored."""

from __future__ import annotations

from typing import Any

from celery.worker import request

_ENDS = frozenset({"task-succeeded", "task-failed", "task-retried", "task-revoked"})


class Request(request.Request):  # type: ignore[misc]
    """A message of ``nograd.predict`` in a worker.

    Attributes:
        timings: a `nograd.tasks.timings.Timings` as a dict; put here by the pool before it ends the message.
    """

    timings: dict[str, Any] | None = None

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002 - Celery's signature
        """Send a task event."""
        if self.timings is not None and type in _ENDS:
            fields["timings"] = self.timings
        super().send_event(type, **fields)

    def _announce_revoked(self, *args: Any, **kwargs: Any) -> None:
        """Celery's end of a job that was revoked or has expired, here with the stages it got through, if any."""
        handle = self._apply_result() if self._apply_result is not None else None
        take = getattr(handle, "timings", None)  # of another pool's handle there are none
        if take is not None:
            self.timings = self._context.timings = take(self.hostname)
        super()._announce_revoked(*args, **kwargs)
