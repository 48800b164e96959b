"""Celery's consumer, except that no message can stop it and every message with an id gets an answer."""

from __future__ import annotations

import logging
from typing import Any

from celery.worker.consumer import Consumer as CeleryConsumer

from .errors import InvalidInput

logger = logging.getLogger(__name__)


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """Stores a typed failure for a message nobody can run, before Celery drops it.

    Stock Celery logs and drops such a message, and whoever waits for its result waits for ever; some (a body that is a
    number, a time limit that is a text) end the worker, which restores them for the next one to die of.
    """

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        """Celery's handler of a message, guarded."""
        handle = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> Any:
            try:
                return handle(message)
            except (*self.connection_errors, *self.channel_errors):
                raise  # the connection's trouble, not the message's
            except Exception as err:
                logger.exception("a message makes no sense to Celery; it fails")
                self._answer(message, err)
                message.reject_log_error(logger, self.connection_errors)

        return on_task_received

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Answer, then do what Celery does (log and acknowledge)."""
        self._answer(message, exc)
        super().on_decode_error(message, exc)

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Answer, then do what Celery does (log and reject)."""
        self._answer(message, exc)
        super().on_invalid_task(body, message, exc)

    def on_unknown_message(self, body: Any, message: Any) -> None:
        """Answer, then do what Celery does (log and reject)."""
        self._answer(message, ValueError("it names no task"))
        super().on_unknown_message(body, message)

    def _answer(self, message: Any, err: Exception) -> None:
        task_id = message.headers.get("id") if isinstance(message.headers, dict) else None
        if not isinstance(task_id, str) or not task_id:
            return  # nobody can ask for it
        try:
            self.app.backend.mark_as_failure(task_id, InvalidInput(f"the message cannot be read: {err}"))
        except Exception:
            logger.exception("the failure of %s could not be stored", task_id)
