"""How many messages a worker asks for: so many that its device never runs dry, so few that other workers get theirs.

Laws:

* What counts is what has not reached the device: the items that wait for it, and the messages that have not been read
  yet, each for as many items as the latest ones had. While a lane (interactive, bulk) holds its capacity, no more
  messages of it are fetched; they stay in Redis, where any worker may take them. Nothing blocks and nothing is dropped.
* A lane that holds nothing asks for one message at least, however many items it may bring.
* The lanes have capacities of their own, so bulk never keeps an interactive message out.
* Who was refused is told when there is room again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from nograd.tasks.keys import BULK_FROM

#: items of a message as long as none has been read: too many rather than too few, the first one read puts it right
ITEMS_UNKNOWN: Final = 64
#: batches of its largest model a worker holds of interactive and of bulk items besides the one on the device
INTERACTIVE_BATCHES: Final = 4
BULK_BATCHES: Final = 2
#: unstarted bulk messages of other tasks a worker holds: nobody knows how long each takes
BULK_TASKS: Final = 4


class _Lane:
    def __init__(self) -> None:
        self.capacity = 1
        #: messages that came, counted by Celery's event loop alone, and of these no longer unread, counted under a lock
        self.came = self.begun = 0
        #: items of the next message: rises at once, falls slowly
        self.expected: float = ITEMS_UNKNOWN
        self.refused = False

    @property
    def unread(self) -> int:
        """Messages that came and have not begun."""
        return self.came - self.begun

    def room(self, waiting: int) -> int:
        """Messages that may come while so many items wait."""
        left = self.capacity - waiting - self.unread * self.expected
        return max(0, -int(-left // self.expected))

    def learn(self, items: int) -> None:
        """A message had so many items."""
        items = max(1, items)
        self.expected = items if items > self.expected else self.expected + (items - self.expected) / 4


class Intake:
    """Counts what a worker holds; any thread may call it.

    Args:
        in_flight: messages the worker may hold in all (``--concurrency``).
        largest: items in a batch of its largest model; may be changed with `resize`.
        waiting: the items that wait for the device: interactive, bulk.
        on_room: called when a lane that was full has room again. Must be quick.
    """

    def __init__(
        self, in_flight: int, largest: int, waiting: Callable[[], tuple[int, int]], on_room: Callable[[], None]
    ) -> None:
        self._in_flight = in_flight
        self._waiting = waiting
        self._on_room = on_room
        self._lanes = (_Lane(), _Lane())
        self._lock = threading.Lock()
        self.resize(largest)

    def resize(self, largest: int) -> None:
        """The largest batch is another one from now on."""
        interactive, bulk = self._lanes
        interactive.capacity = max(1, self._in_flight, INTERACTIVE_BATCHES * largest)
        # Half of what may be in flight at most, or bulk would leave interactive messages no credit.
        bulk.capacity = max(1, min(BULK_BATCHES * largest, self._in_flight // 2))

    def room(self, priority: int) -> int:
        """How many more messages of this priority the worker takes."""
        side = int(priority >= BULK_FROM)
        lane = self._lanes[side]
        lane.refused = True  # first, so that room made meanwhile is told
        room = lane.room(self._waiting()[side])
        lane.refused = room == 0
        return room

    def came(self, *, bulk: bool) -> None:
        """A message has been fetched. One thread calls this: a lock shared with others would cost it much."""
        self._lanes[bulk].came += 1

    def read(self, items: int, *, bulk: bool) -> None:
        """A message that came has this many items; until `began` it still counts as unread."""
        with self._lock:
            self._lanes[bulk].learn(items)

    def began(self, *, bulk: bool) -> None:
        """A message is no longer unread: its items wait for the device, or it has ended."""
        with self._lock:
            self._lanes[bulk].begun += 1
        self.eased()

    def began_task(self, *, bulk: bool) -> None:
        """A message of another task runs."""
        self.read(max(1, self._lanes[bulk].capacity // BULK_TASKS) if bulk else 1, bulk=bulk)
        self.began(bulk=bulk)

    def eased(self) -> None:
        """Less is held than before: tell whoever was refused, if there is room now."""
        for side, lane in enumerate(self._lanes):
            if lane.refused and lane.room(self._waiting()[side]) > 0:
                lane.refused = False
                self._on_room()
