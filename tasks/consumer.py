"""Celery's consumer, except that no message stops it, each gets an answer, and events are published many at a time."""

from __future__ import annotations

import logging
from typing import Any

from celery.worker.consumer import Consumer as CeleryConsumer
from vine import promise

from .errors import InvalidInput

logger = logging.getLogger(__name__)

#: seconds task events wait for each other, so that one publish carries many
EVENTS_GATHER_S = 0.1
#: events in one publish, at most
EVENTS_AT_ONCE = 1000


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """Stores a typed failure for a message nobody can run, before Celery drops it.

    Stock Celery logs and drops such a message, and whoever waits for its result waits for ever; some (a body that is a
    number, a time limit that is a text) end the worker, which restores them for the next one to die of.
    """

    #: set by whoever plans a flush, cleared by the loop; a race plans two, which is harmless
    _flush_is_planned = False

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

    def on_send_event_buffered(self) -> None:
        """Plan a flush of the buffered task events. Any thread may call it.

        Stock Celery flushes at every turn of its loop, and after 24 events: at thousands of jobs a second that is a
        third of the loop's time. Worker events (heartbeats, online) are not buffered and go at once, as ever.
        """
        if self._flush_is_planned or self.hub is None:
            return
        self._flush_is_planned = True
        self.hub.call_soon(promise(self.hub.call_later, (EVENTS_GATHER_S, self._flush_planned)))

    def _flush_planned(self) -> None:
        self._flush_is_planned = False
        if self.event_dispatcher is not None:
            self.event_dispatcher.buffer_limit = EVENTS_AT_ONCE
            self._flush_events()

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
