"""Celery's request of a prediction, except that the event of its end carries its timings."""

from __future__ import annotations

from typing import Any

from celery.worker import request

_ENDS = frozenset({"task-succeeded", "task-failed", "task-retried"})


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
