"""What this process knows about one delivery it holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any


class Lease:
    """One delivery of one message, from the fetch to the acknowledgement.

    Attributes:
        id: ``<holder>.<fetch>.<n>.<wrapping>|<list>``; also the delivery tag, which is a delivery's, not a message's.
        name: the list it was taken from (and goes back to), without ``global_keyprefix``.
        queue: the queue of that list.
        step: the number of its priority, 0 is the highest.
        deliveries: how often a worker died over it; -1 if it was never delivered before.
        sha: SHA-1 of the message, if its deliveries are counted.
        since: when it was fetched, `time.monotonic`.
        deadline: until when Redis surely keeps it for us, `time.monotonic`.
        keeper: who beats for it.
        qos: the credit it takes up, while its channel is open.
        started: it no longer counts against the budget of its priority.
        lost: Redis says somebody else may have it by now.
    """

    __slots__ = (
        "_message", "_weak", "deadline", "deliveries", "id", "keeper", "lost", "name", "qos", "queue", "sha", "since",
        "started", "step",
    )  # fmt: skip

    def __init__(
        self,
        lease_id: str,
        name: str,
        queue: str,
        *,
        step: int,
        deliveries: int,
        sha: str,
        since: float,
        deadline: float,
    ) -> None:
        self.id = lease_id
        self.name = name
        self.queue = queue
        self.step = step
        self.deliveries = deliveries
        self.sha = sha
        self.since = since
        self.deadline = deadline
        self.started = False
        self.lost = False
        self.qos: Any = None
        self.keeper: Any = None
        self._message: Any = None
        self._weak: weakref.ref[Any] | None = None

    @property
    def holder(self) -> str:
        """The process that fetched it."""
        return self.id.split(".", 1)[0]

    def bind(self, message: Any, *, forget: Callable[[str], Any] | None) -> None:
        """Remember who can settle this delivery.

        With ``forget``, the lease ends with its message: a message that nobody holds can never be acknowledged, and to
        keep beating for it would keep it from everybody. ``forget`` may be called by the garbage collector in the
        middle of anything, so it must do no more than append to a deque.
        """
        if forget is None:
            self._message = message
        else:
            self._weak = weakref.ref(message, partial(_forgotten, forget, self.id))

    def loosen(self, forget: Callable[[str], Any]) -> None:
        """From now on the lease ends with its message (its channel is closed)."""
        message, self._message = self._message, None
        if message is not None:
            self.bind(message, forget=forget)


def _forgotten(forget: Callable[[str], Any], lease_id: str, _: object) -> None:
    forget(lease_id)
