"""The transports: kombu's, with channels that lease and a poller that always reads."""

from __future__ import annotations

from typing import Any

from kombu.log import get_logger
from kombu.transport import redis as kombu_redis

from . import channel
from .poller import Poller

logger = get_logger(__name__)


class Transport(kombu_redis.Transport):  # type: ignore[misc]
    """The lossless transport; kombu's class of the same name in every other respect."""

    Channel = channel.Channel

    #: the event loop, in a worker
    hub: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()
        self._ticks: set[Any] = set()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Let the loop read; remember what was added to it, to take it away again."""
        self.hub = loop
        before = set(loop.on_tick)
        super().register_with_event_loop(connection, loop)
        self._ticks = set(loop.on_tick) - before

    def close_connection(self, connection: Any) -> None:
        """Close every channel in good order."""
        self._leave_loop()
        super().close_connection(connection)

    def _collect(self, connection: Any) -> None:
        """Called by kombu when the connection is lost: drop everything here, touch nothing in Redis."""
        del connection
        self._leave_loop()
        self.cycle.close()
        for channels in (self._avail_channels, self.channels):
            while channels:
                try:
                    channels.pop().abandon()
                except Exception:
                    logger.debug("while dropping a channel", exc_info=True)

    def _leave_loop(self) -> None:
        if self.hub is not None:
            self.hub.on_tick.difference_update(self._ticks)
        self._ticks = set()


class SentinelTransport(Transport, kombu_redis.SentinelTransport):  # type: ignore[misc]
    """The lossless transport behind Redis Sentinel."""

    Channel = channel.SentinelChannel
