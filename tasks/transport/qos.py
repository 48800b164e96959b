"""Credit of one channel, and the way from kombu's acknowledgements to the keeper."""

from __future__ import annotations

from typing import Any

from kombu.log import get_logger
from kombu.transport import redis
from redis.exceptions import ResponseError

from .lease import Lease

logger = get_logger(__name__)

#: seconds; a shorter visibility timeout would make this process take back jobs of other Celery apps while they run
LEAST_VISIBILITY_S = 3600


class QoS(redis.QoS):  # type: ignore[misc]
    """Counts what its channel has delivered; the deliveries themselves belong to the keeper."""

    def __init__(self, channel: Any, prefetch_count: int = 0) -> None:
        super().__init__(channel, prefetch_count)
        # kombu gives everything back when this object dies, which is how a lost connection makes jobs run twice.
        self._on_collect.cancel()
        self._leases: dict[str, Lease | None] = {}

    @property
    def used(self) -> int:
        """Messages that take up credit: with the consumer, about to be, or left over from a lost connection."""
        keeper = self.channel.keeper
        return len(self._leases) + len(self.channel.parked) + (keeper.orphans if keeper else 0)

    @property
    def leases(self) -> list[Lease]:
        """What has been delivered and not settled, oldest first."""
        return [lease for lease in list(self._leases.values()) if lease is not None]

    def can_consume(self) -> bool:
        """Whether there is credit (Celery replaces this method for `worker_disable_prefetch`)."""
        return not self.prefetch_count or self.used < self.prefetch_count

    def can_consume_max_estimate(self) -> int | None:
        """How much credit there is; None is no limit."""
        return max(0, self.prefetch_count - self.used) if self.prefetch_count else None

    @property
    def patched(self) -> bool:
        """Celery has put its own `can_consume` in place, which can be asked about one message only."""
        return "can_consume" in self.__dict__

    def append(self, message: Any, delivery_tag: str) -> None:
        """A message goes to its consumer."""
        lease = getattr(message, "lease", None)
        self._leases[delivery_tag] = lease
        if lease is not None:
            lease.qos = self
            lease.keeper.bind(lease, message, weak=self.channel.serves_celery)

    def get(self, delivery_tag: str) -> Any:
        """The lease of a delivery."""
        return self._leases[delivery_tag]

    def forget(self, delivery_tag: str) -> None:
        """The delivery no longer takes up credit."""
        self._leases.pop(delivery_tag, None)

    def ack(self, delivery_tag: str) -> None:
        """Done: the keeper tells Redis, at once if no event loop is there to be held up."""
        lease = self._leases.pop(delivery_tag, None)
        if lease is not None:
            lease.keeper.ack(lease, now=not self.channel.buffers)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Behind what waits in its queue, or away, as kombu does."""
        lease = self._leases.pop(delivery_tag, None)
        if lease is None:
            return
        if requeue:
            lease.keeper.give_back([lease], tail=True, now=not self.channel.buffers)
        else:
            lease.keeper.ack(lease, now=not self.channel.buffers)

    def restore_unacked(self, client: Any = None) -> None:  # noqa: ARG002 - kombu's signature
        """Give everything back to the head of its queue, in order."""
        leases = self.leases
        self._leases.clear()
        if leases:
            self.channel.keeper.give_back(leases, now=True)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Nothing: a closing channel is no reason to run again what is being run (see `Channel.close`)."""

    def restore_visible(self, start: int = 0, num: int | None = 10, interval: int = 10) -> None:
        """Kombu's sweep of what stock workers left behind an hour ago; a Redis that refuses it ends no consumer."""
        try:
            super().restore_visible(start=start, num=num, interval=interval)
        except ResponseError as err:
            logger.debug("kombu's sweep was refused: %s", err)

    @property
    def visibility_timeout(self) -> float:
        """Of kombu's shared index, on which other apps' jobs stand too; never less than kombu's default."""
        return max(LEAST_VISIBILITY_S, float(self.channel.visibility_timeout))
