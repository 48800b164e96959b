"""Celery's consumer, except that a message nobody can decode gets an answer."""

from __future__ import annotations

from typing import Any

from celery.worker.consumer import Consumer as CeleryConsumer

from .errors import InvalidInput


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """Stores a typed failure for an undecodable message before it is dropped.

    Stock Celery logs and acknowledges such a message, and whoever waits for its result waits for ever.
    """

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Answer, then do what Celery does (log and acknowledge)."""
        task_id = (message.headers or {}).get("id")
        if task_id:
            self.app.backend.mark_as_failure(task_id, InvalidInput(f"the message cannot be decoded: {exc}"))
        super().on_decode_error(message, exc)
