"""How many messages a worker asks for: so many that its device never runs dry, so few that other workers get theirs.

Laws:

* What counts is what has not reached the device: the items that wait for it or are being prepared, and the messages
  that have not been read yet, each for as many items as the latest ones had. While a lane (interactive, bulk) holds its
  capacity, no more messages of it are fetched; they stay in Redis, where any worker may take them. Nothing blocks and
  nothing is dropped.
* A lane that holds nothing asks for one message at least, however many items it may bring.
* The lanes have capacities of their own, so bulk never keeps an interactive message out.
* Who was refused is told when there is room again.

The capacity is one number for all models, batches of the largest. So beside a model of large batches one of small ones
may be held many batches deep. To count batches instead was tried: with both queues full, the small model's few batches
fill the lane, the large one gets a message for each of its, and both lose half their rate. What would do is room for
each queue, in the script that fetches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from nograd.tasks.keys import BULK_FROM

#: items of a message as long as none has been read, at most: too many rather than too few, the first ones put it right
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
        #: the items each thread has in preparation, by its id, and their sum
        self._preparing: dict[int, int] = {}
        self.in_preparation = 0
        self.refused = False

    @property
    def unread(self) -> int:
        """Messages that came and have not been read."""
        return self.came - self.begun

    def room(self, waiting: int) -> int:
        """Messages that may come while so many items wait."""
        left = self.capacity - waiting - self.in_preparation - self.unread * self.expected
        return max(0, -int(-left // self.expected))

    def read(self, items: int, thread: int) -> None:
        """A thread has read a message, of so many items."""
        known = max(1, items)
        self.expected = known if known > self.expected else self.expected + (known - self.expected) / 4
        self.begun += 1
        self._preparing[thread] = items
        self.in_preparation += items

    def began(self, thread: int) -> None:
        """A thread is done with its message, which it has read or not."""
        items = self._preparing.pop(thread, None)
        if items is None:
            self.begun += 1
        else:
            self.in_preparation -= items


class Intake:
    """Counts what a worker holds; any thread may call it.

    Args:
        in_flight: messages the worker may hold in all (``--concurrency``).
        largest: items in a batch of its largest model; may be changed with `resize`.
        waiting: the items that wait for the device: interactive, bulk.
        on_room: called when a lane that was full has room again. Must be quick.
        threads: how many messages are prepared at a time: so many are asked for while nobody knows how large they are.
    """

    def __init__(
        self,
        in_flight: int,
        largest: int,
        waiting: Callable[[], tuple[int, int]],
        on_room: Callable[[], None],
        *,
        threads: int = 1,
    ) -> None:
        self._in_flight = in_flight
        self._waiting = waiting
        self._on_room = on_room
        self._lanes = (_Lane(), _Lane())
        self._lock = threading.Lock()
        self.resize(largest)
        for lane in self._lanes:
            lane.expected = min(ITEMS_UNKNOWN, max(1, lane.capacity // threads))

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
        """A message that came has this many items: it counts for so many until the calling thread says `began`."""
        with self._lock:
            self._lanes[bulk].read(items, threading.get_ident())
        self.eased()

    def began(self, *, bulk: bool) -> None:
        """The message the calling thread has read, or could not read, has its items at the device or has ended."""
        with self._lock:
            self._lanes[bulk].began(threading.get_ident())
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
