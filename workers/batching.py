"""Which items make the next batch: pure policy, without torch, Celery or a clock of its own.

Laws of a batch:

* It holds items of one model and one group (bucket and parameters), at most ``max_items`` of them, and closes before
  its padded cost, the number of items times the dearest one, would exceed ``max_cost``. A single item always fits. How
  unequal the items of a group may be is bounded by the model's buckets, so within a group none is passed over.
* It is formed *late*: whoever asks gets what is there at that moment, so a batch grows while the device is busy and no
  timer is needed under load. With ``max_wait_s`` an incomplete one waits, counted from the arrival of its oldest item,
  for company; but an item that has a deadline waits for half of its time at most.
* Interactive items enter it before bulk ones (`tasks.keys.BULK_FROM`). Bulk ones of the same group fill what is free.

Laws of the order between batches:

* An item is urgent by ``min(arrived + PATIENCE_S, deadline)``: the oldest first, except that a deadline that is near
  goes before items without one. Whatever arrives ``PATIENCE_S`` after an item can no longer go before it in its lane,
  so no item, group or model waits for ever.
* Interactive before bulk: while an interactive group is ready, a batch is led by the most urgent interactive item. An
  interactive item never waits for bulk company, only for the batch on the device; bulk that happens to be there makes
  its batch complete.
* Bulk is not starved: where ``BULK_PATIENCE_S`` have gone by without the most urgent bulk item that is ready having got
  its turn, the next batch is led by it.
* An item whose deadline has passed never reaches the device; it is handed out once, as expired, or by `expire`.
* Every item put in comes out exactly once: in a batch, as expired, from `expire`, `remove_model` or `drain`.

Putting an item in and taking it out costs the logarithm of what waits in its group; a batch costs nothing for groups it
does not take from, however many there are.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from nograd.tasks.errors import UnknownModel
from nograd.tasks.keys import BULK_FROM

logger = logging.getLogger(__name__)

#: seconds within which an item without a deadline counts as wanted
PATIENCE_S: Final = 10.0
#: seconds without its turn after which bulk goes once before interactive
BULK_PATIENCE_S: Final = 10.0
#: groups whose `Backlog.cap` is remembered, the latest: groups are made of shapes callers choose
CAPS: Final = 1024

_INTERACTIVE, _BULK = 0, 1


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the batches of one model.

    Attributes:
        max_items: items in one batch.
        max_wait_s: seconds the oldest item may wait for company while the device is idle.
        max_cost: items times the cost of the dearest one, in the model's own units; None for no limit.
    """

    max_items: int = 64
    max_wait_s: float = 0.0
    max_cost: int | None = None


@dataclass(slots=True, eq=False)
class Item:
    """One prepared input on its way to the device.

    Attributes:
        model: whose input it is.
        group: what must be equal for items of a model to share a batch.
        prepared: what the model's ``prepare`` returned.
        job: the message it came with, and ``index`` its place there.
        priority: Celery's on Redis, 0 is the highest; bulk from `tasks.keys.BULK_FROM` on.
        cost: what it adds to a batch, in units of its model (tokens, elements).
        arrived: when it was put in, in seconds of the backlog's clock.
        deadline: when it is no use any more, on the same clock; None for never.
        late: makes ``prepared`` on the device thread, for an input that may crash the process; None if it is made.
        block: ``prepared`` is a whole batch, alone in its group.
    """

    model: str
    group: Hashable
    prepared: Any
    job: Any
    index: int = 0
    priority: int = 0
    cost: int = 1
    arrived: float = 0.0
    deadline: float | None = None
    late: Callable[[], Any] | None = None
    block: bool = False

    @property
    def urgency(self) -> float:
        """When it is wanted, on the backlog's clock; the smallest first."""
        patient = self.arrived + PATIENCE_S
        return patient if self.deadline is None else min(patient, self.deadline)


@dataclass(frozen=True, slots=True)
class Batch:
    """What the device runs next, and what came too late for it."""

    model: str
    items: list[Item]
    expired: list[Item] = field(default_factory=list)


#: when (the urgency of a lane's first item, or the end of its window), a number that decides between equals, whose
_Entry: TypeAlias = "tuple[float, int, _Group]"


class _Lane:
    """The items of one group that are interactive, or those that are bulk, the most urgent first.

    Attributes:
        heap: urgency, number, item.
        window_end: when the first of their windows ends; infinite without items.
        dearest: the highest cost among them.
        ripe: a window has ended.
        entry: what of the agenda is valid for them, and ``ready`` in which of its heaps.
    """

    __slots__ = ("dearest", "entry", "heap", "ready", "ripe", "window_end")

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, Item]] = []
        self.entry: _Entry | None = None
        self.ready = False
        self.forget()

    def forget(self) -> None:
        """What was noted holds no longer."""
        self.window_end, self.dearest, self.ripe = math.inf, 0, False

    def note(self, item: Item, max_wait_s: float) -> None:
        """Take an item of the heap into account."""
        wait_s = max_wait_s if item.deadline is None else min(max_wait_s, max(0.0, item.deadline - item.arrived) / 2)
        self.window_end = min(self.window_end, item.arrived + wait_s)
        self.dearest = max(self.dearest, item.cost)


class _Group:
    """The items of one model that may share a batch."""

    __slots__ = ("key", "lanes", "limits", "max_items")

    def __init__(self, key: tuple[str, Hashable]) -> None:
        self.key = key
        self.lanes = (_Lane(), _Lane())
        self.limits = Limits()
        self.max_items = 1

    def __len__(self) -> int:
        return sum(len(lane.heap) for lane in self.lanes)

    def fits(self, count: int, dearest: int) -> bool:
        """Whether a batch of so many items is within the limits."""
        most = self.limits.max_cost
        return count <= 1 or (count <= self.max_items and (most is None or count * dearest <= most))

    def full(self) -> bool:
        """Whether no company could make the next batch larger."""
        return not self.fits(len(self) + 1, max(1, *(lane.dearest for lane in self.lanes)))

    def recount(self) -> None:
        """After items have left or the limits have changed."""
        for lane in self.lanes:
            lane.forget()
            # Without a window nothing of this matters, and as long as a whole batch is left it does not either.
            if self.limits.max_wait_s > 0 and len(self) < self.max_items:
                for _, _, item in lane.heap:
                    lane.note(item, self.limits.max_wait_s)


class _Agenda:
    """The groups that have items in one lane: those that are ready by urgency, the others by the end of their window.

    An entry that a later one has replaced stays in its heap until it gets to the top.
    """

    def __init__(self, lane: int) -> None:
        self._lane = lane
        self._ready: list[_Entry] = []
        self._later: list[_Entry] = []
        self._numbers = itertools.count()

    def update(self, group: _Group) -> None:
        """Something about the lane of this group has changed."""
        lane = group.lanes[self._lane]
        if not lane.heap:
            lane.entry = None
            return
        ready = lane.ripe or group.limits.max_wait_s <= 0 or group.full()
        when = lane.heap[0][0] if ready else lane.window_end
        if lane.entry is not None and lane.ready == ready and lane.entry[0] == when:
            return
        lane.ready = ready
        lane.entry = (when, next(self._numbers), group)
        heapq.heappush(self._ready if ready else self._later, lane.entry)

    def first(self, now: float) -> _Group | None:
        """The ready group whose first item is the most urgent."""
        while (entry := self._top(self._later)) is not None and entry[0] <= now:
            entry[2].lanes[self._lane].ripe = True
            self.update(entry[2])  # with an entry among the ready ones; this one is outdated
        top = self._top(self._ready)
        return None if top is None else top[2]

    def wake_at(self) -> float:
        """When a group is ready: at once (minus infinity), at some time, or never (infinity)."""
        if self._top(self._ready) is not None:
            return -math.inf
        top = self._top(self._later)
        return math.inf if top is None else top[0]

    def _top(self, heap: list[_Entry]) -> _Entry | None:
        while heap and heap[0][2].lanes[self._lane].entry is not heap[0]:
            heapq.heappop(heap)
        return heap[0] if heap else None


class Backlog:
    """The items that wait. No locks and no clock: whoever calls says what time it is."""

    def __init__(self, limits: Mapping[str, Limits]) -> None:
        self._limits = dict(limits)
        self._caps: dict[tuple[str, Hashable], int] = {}
        self._groups: dict[tuple[str, Hashable], _Group] = {}
        self._agendas = (_Agenda(_INTERACTIVE), _Agenda(_BULK))
        self._counts = [0, 0]
        self._numbers = itertools.count()
        #: when bulk has had its turn, or has begun to wait for it
        self._bulk_turn = -math.inf
        #: no deadline of an item that waits is before this
        self._soonest = math.inf

    def __len__(self) -> int:
        return sum(self._counts)

    @property
    def waiting(self) -> tuple[int, int]:
        """Items that wait: interactive, bulk."""
        return self._counts[_INTERACTIVE], self._counts[_BULK]

    def put(self, item: Item) -> None:
        """Add an item that arrives now.

        Raises:
            UnknownModel: if its model is not, or no longer, here.
        """
        if item.model not in self._limits:
            raise UnknownModel(f"this worker has no model {item.model!r} any more")
        key = (item.model, item.group)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = self._limited(_Group(key))
        side = _BULK if item.priority >= BULK_FROM else _INTERACTIVE
        if side == _BULK and not self._counts[_BULK]:
            self._bulk_turn = item.arrived
        if item.deadline is not None:
            self._soonest = min(self._soonest, item.deadline)
        lane = group.lanes[side]
        heapq.heappush(lane.heap, (item.urgency, next(self._numbers), item))
        lane.note(item, group.limits.max_wait_s)
        self._counts[side] += 1
        self._update(group)

    def next_batch(self, now: float) -> Batch | None:
        """Take the next batch out, or None while no group is ready."""
        interactive, bulk = (agenda.first(now) for agenda in self._agendas)
        bulk_first = bulk is not None and (interactive is None or now - self._bulk_turn >= BULK_PATIENCE_S)
        group = bulk if bulk_first else interactive
        if group is None:
            return None
        before = self._counts[_BULK]
        batch = self._take(group, (_BULK, _INTERACTIVE) if bulk_first else (_INTERACTIVE, _BULK), now)
        if group is bulk and self._counts[_BULK] < before:
            self._bulk_turn = now
        return batch

    def expire(self, now: float) -> list[Item]:
        """Take out what has come too late by now. Looks at every item then; costs nothing while there can be none."""
        if now < self._soonest:
            return []
        expired: list[Item] = []
        for group in list(self._groups.values()):
            for side, lane in enumerate(group.lanes):
                late = [item for _, _, item in lane.heap if _is_late(item, now)]
                if late:
                    lane.heap = [entry for entry in lane.heap if not _is_late(entry[2], now)]
                    heapq.heapify(lane.heap)
                    self._counts[side] -= len(late)
                    expired += late
            self._refresh(group)
        left = (item for group in self._groups.values() for lane in group.lanes for _, _, item in lane.heap)
        self._soonest = min((item.deadline for item in left if item.deadline is not None), default=math.inf)
        return expired

    def wake_at(self) -> float | None:
        """When the next group is ready (minus infinity: one is), or None if nothing waits."""
        wake_at = min(agenda.wake_at() for agenda in self._agendas)
        return None if wake_at == math.inf else wake_at

    def cap(self, model: str, group: Hashable, max_items: int | None) -> None:
        """Bound the batches of one group more tightly than its model's; None lifts that.

        Remembered, also while the group is empty, for the last `CAPS` groups that were capped.
        """
        key = (model, group)
        self._caps.pop(key, None)
        if max_items is not None:
            self._caps[key] = max(1, max_items)
            while len(self._caps) > CAPS:
                self._relimit(next(iter(self._caps)), forget=True)
        self._relimit(key)

    def add_model(self, name: str, limits: Limits) -> None:
        """Take items of a model from now on, or change its limits."""
        self._limits[name] = limits
        for key in [key for key in self._groups if key[0] == name]:
            self._relimit(key)

    def remove_model(self, name: str) -> list[Item]:
        """Take no more items of a model; what waits of it, oldest first. It finds its caps when it comes again."""
        self._limits.pop(name, None)
        return self._remove([group for group in self._groups.values() if group.key[0] == name])

    def drain(self) -> list[Item]:
        """Take everything out, oldest first."""
        return self._remove(list(self._groups.values()))

    def _limited(self, group: _Group) -> _Group:
        group.limits = self._limits[group.key[0]]
        group.max_items = min(group.limits.max_items, self._caps.get(group.key, group.limits.max_items))
        return group

    def _relimit(self, key: tuple[str, Hashable], *, forget: bool = False) -> None:
        if forget:
            del self._caps[key]
        group = self._groups.get(key)
        if group is not None:
            self._limited(group).recount()
            self._update(group)

    def _update(self, group: _Group) -> None:
        for agenda in self._agendas:
            agenda.update(group)

    def _take(self, group: _Group, order: tuple[int, int], now: float) -> Batch:
        batch = Batch(group.key[0], [])
        dearest = 0
        for side in order:
            heap = group.lanes[side].heap
            while heap:
                item = heap[0][2]
                if _is_late(item, now):
                    batch.expired.append(item)
                else:
                    dearest = max(dearest, item.cost)
                    if not group.fits(len(batch.items) + 1, dearest):
                        break
                    batch.items.append(item)
                heapq.heappop(heap)
                self._counts[side] -= 1
            if heap:
                break  # closed: nothing is passed over
        self._refresh(group)
        return batch

    def _refresh(self, group: _Group) -> None:
        """After items have left."""
        group.recount()
        self._update(group)
        if not len(group):
            del self._groups[group.key]  # groups are made of shapes callers choose: an empty one must not stay for ever

    def _remove(self, groups: list[_Group]) -> list[Item]:
        found: list[tuple[float, int, Item]] = []
        for group in groups:
            for side, lane in enumerate(group.lanes):
                found += [(item.arrived, number, item) for _, number, item in lane.heap]
                self._counts[side] -= len(lane.heap)
                lane.heap = []
            self._update(group)
            del self._groups[group.key]
        return [item for _, _, item in sorted(found)]


def _is_late(item: Item, now: float) -> bool:
    return item.deadline is not None and item.deadline <= now


class BatchQueue:
    """A `Backlog` between threads: any thread puts, the device thread takes.

    Owns its lock and its clock; `take` blocks, nothing else does. It has no capacity of its own, since whoever puts
    cannot wait: see `intake`.

    Attributes:
        on_taken: called, without the lock, by whoever has taken items out.
        on_idle: called, without the lock, by whoever takes and finds nothing yet, before it waits.

    What these two raise is logged and costs nobody a batch.
    """

    def __init__(self, limits: Mapping[str, Limits], clock: Callable[[], float] = time.monotonic) -> None:
        self.on_taken: Callable[[], None] = lambda: None
        self.on_idle: Callable[[], None] = lambda: None
        self._backlog = Backlog(limits)
        self._clock = clock
        self._changed = threading.Condition()
        self._errands: deque[Callable[[], None]] = deque()
        self._had_errand = False
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return len(self._backlog)

    @property
    def waiting(self) -> tuple[int, int]:
        """Items that wait: interactive, bulk."""
        with self._changed:
            return self._backlog.waiting

    def put(self, items: Sequence[Item], deadline: float | None = None) -> bool:
        """Add items that arrive now, with a deadline on the queue's clock; False if the queue is closed.

        Raises:
            UnknownModel: if the model of one is not here.
        """
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

    def call(self, errand: Callable[[], None]) -> bool:
        """Have the thread that takes run something between two batches; False if the queue is closed."""
        with self._changed:
            if self._closed:
                return False
            self._errands.append(errand)
            self._changed.notify()
        return True

    def take(self) -> Batch | Callable[[], None] | None:
        """Block until there is an errand or a batch is ready, which take turns; None once the queue is closed."""
        with self._changed:
            taken = self._next(self._clock())
        if taken is None:
            _tell(self.on_idle)
            with self._changed:
                taken = self._wait()
        if isinstance(taken, Batch):
            _tell(self.on_taken)
        return taken

    def _next(self, now: float) -> Batch | Callable[[], None] | None:
        if self._closed:
            return None
        batch = None if self._errands and not self._had_errand else self._backlog.next_batch(now)
        self._had_errand = batch is None and bool(self._errands)
        return self._errands.popleft() if self._had_errand else batch

    def _wait(self) -> Batch | Callable[[], None] | None:
        while not self._closed:
            now = self._clock()
            taken = self._next(now)
            if taken is not None:
                return taken
            wake_at = self._backlog.wake_at()
            self._changed.wait(None if wake_at is None else max(0.0, wake_at - now))
        return None

    def expire(self) -> list[Item]:
        """Take out what has come too late by now."""
        with self._changed:
            expired = self._backlog.expire(self._clock())
        if expired:
            _tell(self.on_taken)
        return expired

    def cap(self, model: str, group: Hashable, max_items: int | None) -> None:
        """See `Backlog.cap`."""
        with self._changed:
            self._backlog.cap(model, group, max_items)
            self._changed.notify()

    def add_model(self, name: str, limits: Limits) -> None:
        """See `Backlog.add_model`."""
        with self._changed:
            self._backlog.add_model(name, limits)
            self._changed.notify()

    def remove_model(self, name: str) -> list[Item]:
        """See `Backlog.remove_model`."""
        with self._changed:
            items = self._backlog.remove_model(name)
        _tell(self.on_taken)
        return items

    def close(self) -> list[Item]:
        """End `take`, refuse `put`, and return what never reached the device, oldest first."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return self._backlog.drain()


def _tell(hook: Callable[[], None]) -> None:
    try:
        hook()
    except Exception:
        logger.critical("whoever was told of a change of the queue raised; this is a bug", exc_info=True)
