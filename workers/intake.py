"""How many messages a worker asks for: so many that its device never runs dry, so few that other workers get theirs.

Laws:

* What counts is device work, in batches: an item is the part of a batch that it takes (`batching.Item.share`), so a
  model of small batches is not hoarded beside one of large ones.
* It counts until it reaches the device: the items that wait for it or are being prepared, and the messages that have
  not been read yet, each for as much as the latest ones were. While a lane (interactive, bulk) holds its capacity, a
  few batches of whatever models, no more messages of it are fetched; they stay in Redis, where any worker may take
  them. Nothing blocks and nothing is dropped.
* A lane that holds nothing asks for one message at least, however many items it may bring.
* The lanes have capacities of their own, so bulk never keeps an interactive message out; nor does it take more than
  half of what may be in flight.
* What a backfill has on its way counts for nothing: its chunks are bounded by themselves, and bulk gets in beside them.
* Who was refused is told when there is room again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from nograd.tasks.keys import BULK_FROM

from .batching import WHOLE, share_of

#: batches a worker holds of interactive and of bulk items besides the one on the device
INTERACTIVE_BATCHES: Final = 4
BULK_BATCHES: Final = 2
#: unstarted bulk messages of other tasks a worker holds: nobody knows how long each takes
BULK_TASKS: Final = 4
#: messages over which a heavy one is forgotten: as many as a fetch brings of one model before those of the next
MEMORY: Final = 32


class _Lane:
    """What is held, and how much that may be: shares are parts of a batch, in the unit of `batching.WHOLE`."""

    def __init__(self) -> None:
        #: shares it may hold, and items
        self.capacity = WHOLE
        self.most = 1
        #: messages that came, counted by Celery's event loop alone, and of these no longer unread, counted under a lock
        self.came = self.begun = 0
        #: the shares of the next message: they rise at once, and fall slowly
        self.expected = WHOLE
        #: the items each thread has in preparation, by its id, and their shares; and the sums
        self._preparing: dict[int, tuple[int, int]] = {}
        self.items = self.shares = 0
        self.refused = False

    def room(self, items: int, shares: int) -> int:
        """Messages that may come while so much waits."""
        unread = self.came - self.begun
        left = self.capacity - shares - self.shares - unread * self.expected
        return max(0, min(-(-left // self.expected), self.most - items - self.items - unread))

    def read(self, items: int, share: int, thread: int) -> None:
        """A thread has read a message of so many items, each of this share."""
        known = (items or 1) * share  # one without items is still a message
        if known > self.expected:
            self._expect(known)
        else:
            self.expected += (known - self.expected) // MEMORY
        self.begun += 1
        shares = items * share
        self._preparing[thread] = items, shares
        self.items += items
        self.shares += shares

    def began(self, thread: int, shares: int) -> None:
        """A thread is done with its message, which it has read or not; its items took so much."""
        items, held = self._preparing.pop(thread, (None, 0))
        if items is None:
            self.begun += 1
            return
        self._expect(shares)
        self.items -= items
        self.shares -= held

    def _expect(self, shares: int) -> None:
        """The next message may take so much; more than everything counts for no more."""
        self.expected = max(self.expected, min(shares, self.capacity))


class Intake:
    """Counts what a worker holds; any thread may call it.

    Args:
        in_flight: messages the worker may hold in all (``--concurrency``).
        largest: items in a batch of its largest model; may be changed with `resize`.
        held: what waits for the device of a lane (0 interactive, 1 bulk): items, and their shares.
        on_room: called when a lane that was full has room again. Must be quick.
        threads: how many messages are prepared at a time: so many are asked for while nobody knows how large they are.
    """

    def __init__(
        self,
        in_flight: int,
        largest: int,
        held: Callable[[int], tuple[int, int]],
        on_room: Callable[[], None],
        *,
        threads: int = 1,
    ) -> None:
        self._in_flight = in_flight
        self._held = held
        self._on_room = on_room
        self._lanes = (_Lane(), _Lane())
        self._lock = threading.Lock()
        self.resize(largest)
        for lane in self._lanes:
            lane.expected = -(-lane.capacity // threads)

    def resize(self, largest: int) -> None:
        """The largest batch is another one from now on."""
        interactive, bulk = self._lanes
        self._smallest = share_of(largest)
        interactive.capacity = max(INTERACTIVE_BATCHES * WHOLE, self._in_flight * self._smallest)
        interactive.most = max(1, self._in_flight, INTERACTIVE_BATCHES * largest)
        bulk.capacity = BULK_BATCHES * WHOLE
        # Or it would leave interactive messages no credit.
        bulk.most = max(1, self._in_flight // 2)

    def room(self, priority: int) -> int:
        """How many more messages of this priority the worker takes."""
        side = int(priority >= BULK_FROM)
        lane = self._lanes[side]
        lane.refused = True  # first, so that room made meanwhile is told
        room = lane.room(*self._held(side))
        lane.refused = room == 0
        return room

    def came(self, *, bulk: bool) -> None:
        """A message has been fetched. One thread calls this: a lock shared with others would cost it much."""
        self._lanes[bulk].came += 1

    def read(self, items: int, *, of: int, bulk: bool) -> None:
        """A message that came has this many items, of which a batch takes ``of``.

        It counts for so many until the calling thread says `began`.
        """
        self._read(items, share_of(of), bulk=bulk)

    def began(self, shares: int = 0, *, bulk: bool) -> None:
        """The message the calling thread has read, or could not read, has its items at the device or has ended.

        Args:
            shares: what its items turned out to take.
            bulk: its lane.
        """
        with self._lock:
            self._lanes[bulk].began(threading.get_ident(), shares)
        self.eased()

    def began_task(self, *, bulk: bool) -> None:
        """A message of another task runs."""
        self._read(1, self._lanes[bulk].capacity // BULK_TASKS if bulk else self._smallest, bulk=bulk)
        self.began(bulk=bulk)

    def eased(self) -> None:
        """Less is held than before: tell whoever was refused, if there is room now."""
        for side, lane in enumerate(self._lanes):
            if lane.refused and lane.room(*self._held(side)) > 0:
                lane.refused = False
                self._on_room()

    def _read(self, items: int, share: int, *, bulk: bool) -> None:
        with self._lock:
            self._lanes[bulk].read(items, share, threading.get_ident())
        self.eased()
