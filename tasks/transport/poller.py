"""When to ask for messages, and when to read."""

from __future__ import annotations

from typing import Any

from kombu.log import get_logger
from kombu.transport import redis as kombu_redis

logger = get_logger(__name__)


class Poller(kombu_redis.MultiChannelPoller):  # type: ignore[misc]
    """The poller of kombu, except that a reply that is on its way is always read: its messages are leased already."""

    _in_protected_read: bool  # of kombu: cancelling a consumer waits

    def _update_brpop_polling(self) -> None:
        """Nothing: kombu stops reading while there is no credit; a reply left unread is leases nobody beats for."""

    def on_poll_start(self) -> None:
        """Ask for messages where there is credit."""
        for channel in list(self._channels):
            if channel.active_queues and channel.wants():
                self._register_BRPOP(channel)
            if channel.active_fanout_queues:
                self._register_LISTEN(channel)

    def on_readable(self, fileno: int) -> Any:
        """Read, whatever the credit.

        A consumer that is cancelled meanwhile is so once the read is done, as in `get`: Celery cancels in the handler
        of the signal for a cold shutdown, and a reply cannot be read by two at a time.
        """
        if self._in_protected_read:
            return self._read(fileno)
        self._in_protected_read = True
        try:
            return self._read(fileno)
        finally:
            self._in_protected_read = False
            while self.after_read:
                self.after_read.pop()()

    def _read(self, fileno: int) -> Any:
        found = self._fd_to_chan.get(fileno)
        if found is None:
            logger.debug("on_readable: fd %r not mapped, ignoring", fileno)
            return None
        channel, kind = found
        if kind == "BRPOP" and not channel._in_poll:  # noqa: SLF001 - kombu's own business with its channels
            # Nothing was asked for: the server has closed the idle connection. Connect again when there is credit.
            channel.client.connection.disconnect()
            return None
        return channel.handlers[kind]()

    def get(self, callback: Any, timeout: float | None = None) -> Any:
        """One message for `drain_events`, first of those that are here already."""
        for channel in list(self._channels):
            if channel.parked and channel.deliver(most=1):
                return None
        return super().get(callback, timeout=timeout)
