"""Which items make the next batch: pure policy, without torch, Celery or a clock of its own.

Laws:

* A batch holds items of one model and one group (bucket and parameters), oldest first, at most ``max_items``.
* A batch is formed *late*: whoever asks gets what is there at that moment, so it grows while the device is busy and
  no timer is needed under load. With ``max_wait_s`` an incomplete batch waits, counted from the arrival of its oldest
  item, for company.
* Among groups that are ready the one with the oldest item goes first, so no group starves.
* An item whose deadline has passed never reaches the device; it is handed out once, as expired.
* Every item put in comes out exactly once: in a batch, as expired, or from `drain`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the batches of one model.

    Attributes:
        max_items: items in one batch.
        max_wait_s: seconds the oldest item may wait for company while the device is idle.
    """

    max_items: int = 64
    max_wait_s: float = 0.0


@dataclass(slots=True, eq=False)
class Item:
    """One prepared input on its way to the device.

    Attributes:
        model: whose input it is.
        group: what must be equal for items of a model to share a batch.
        prepared: what the model's ``prepare`` returned.
        job: the message it came with, and ``index`` its place there.
        arrived: when it was put in, in seconds of the backlog's clock.
        deadline: when it is no use any more, on the same clock; None for never.
        late: makes ``prepared`` on the device thread, for an input that may crash the process; None if it is made.
    """

    model: str
    group: Hashable
    prepared: Any
    job: Any
    index: int = 0
    arrived: float = 0.0
    deadline: float | None = None
    late: Callable[[], Any] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """What the device runs next, and what came too late for it."""

    model: str
    items: list[Item]
    expired: list[Item] = field(default_factory=list)


class Backlog:
    """The items that wait. No locks and no clock: whoever calls says what time it is."""

    def __init__(self, limits: dict[str, Limits]) -> None:
        self._limits = limits
        self._groups: dict[tuple[str, Hashable], deque[Item]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def put(self, item: Item) -> None:
        """Add an item behind the others of its group."""
        self._groups.setdefault((item.model, item.group), deque()).append(item)

    def next_batch(self, now: float) -> Batch | None:
        """Take the next batch out, or None while no group is ready."""
        ready = [(group[0].arrived, key) for key, group in self._groups.items() if self._ready_at(key, group) <= now]
        if not ready:
            return None
        _, key = min(ready, key=lambda entry: entry[0])
        return self._take(key, now)

    def wake_at(self) -> float | None:
        """When the next group is ready by its age, or None if nothing waits."""
        return min((self._ready_at(key, group) for key, group in self._groups.items()), default=None)

    def drain(self) -> list[Item]:
        """Take everything out, oldest first."""
        items = sorted((item for group in self._groups.values() for item in group), key=lambda item: item.arrived)
        self._groups.clear()
        return items

    def _ready_at(self, key: tuple[str, Hashable], group: deque[Item]) -> float:
        limits = self._limits[key[0]]
        return group[0].arrived + (0.0 if len(group) >= limits.max_items else limits.max_wait_s)

    def _take(self, key: tuple[str, Hashable], now: float) -> Batch:
        group = self._groups[key]
        batch = Batch(key[0], [])
        while group and len(batch.items) < self._limits[key[0]].max_items:
            item = group.popleft()
            late = item.deadline is not None and item.deadline <= now
            (batch.expired if late else batch.items).append(item)
        if not group:
            del self._groups[key]  # groups are made of shapes callers choose: an empty one must not stay for ever
        return batch


class BatchQueue:
    """A `Backlog` between threads: any thread puts, the device thread takes.

    Owns its lock and its clock; `take` blocks.
    """

    def __init__(self, limits: dict[str, Limits], clock: Callable[[], float] = time.monotonic) -> None:
        self._backlog = Backlog(limits)
        self._clock = clock
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return len(self._backlog)

    def put(self, items: list[Item], deadline: float | None = None) -> bool:
        """Add items that arrive now, with a deadline on the queue's clock; False if the queue is closed."""
        now = self._clock()
        with self._changed:
            if self._closed:
                return False
            for item in items:
                item.arrived = now
                item.deadline = deadline
                self._backlog.put(item)
            self._changed.notify()
        return True

    def take(self) -> Batch | None:
        """Block until a batch is ready; None once the queue is closed."""
        with self._changed:
            while not self._closed:
                now = self._clock()
                batch = self._backlog.next_batch(now)
                if batch is not None:
                    return batch
                wake_at = self._backlog.wake_at()
                self._changed.wait(None if wake_at is None else max(0.0, wake_at - now))
            return None

    def close(self) -> list[Item]:
        """End `take`, refuse `put`, and return what never reached the device, oldest first."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return self._backlog.drain()
