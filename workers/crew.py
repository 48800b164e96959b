"""A few threads that do one kind of work, what is bulk of it last."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Crew(Generic[T]):
    """Threads that take items off a queue of their own, as many at a time as are there, up to ``most``.

    They are daemons: a process that must end at once does not wait for them. Whatever ``work`` raises is logged and the
    thread goes on; ``work`` is expected to settle its own failures.

    Args:
        name: of the threads.
        size: how many threads.
        work: called with a non-empty list of items.
        most: items in one call.
    """

    def __init__(self, name: str, size: int, work: Callable[[list[T]], None], most: int = 1) -> None:
        self._work = work
        self._most = most
        self._lanes: tuple[deque[T], deque[T]] = (deque(), deque())
        #: True for each item in a lane, False for each thread that is to end
        self._tickets: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{n}", daemon=True) for n in range(size)]

    def __len__(self) -> int:
        """Items nobody has begun with."""
        return sum(map(len, self._lanes))

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def submit(self, item: T, *, bulk: bool = False) -> None:
        """Add an item, bulk behind all others; dropped once the crew is closed. Never blocks."""
        if not self._closed:
            self._lanes[bulk].append(item)
            self._tickets.put(True)

    @property
    def urgent(self) -> bool:
        """Whether `overtake` would find something to do."""
        return bool(self._lanes[0])

    def waiting(self) -> list[T]:
        """Items nobody has begun with, as far as one can tell."""
        return [item for lane in self._lanes for item in lane.copy()]

    def withdraw(self, item: T) -> bool:
        """Take out an item that waits; False if a thread has taken it, or is about to."""
        try:
            ticket = self._tickets.get_nowait()
        except queue.Empty:
            return False
        if ticket:
            for lane in self._lanes:
                with suppress(ValueError, IndexError):  # IndexError: others were at it meanwhile
                    lane.remove(item)
                    return True
        self._tickets.put(ticket)
        return False

    def overtake(self) -> bool:
        """Do what waits and is not bulk, on the calling thread, in the middle of other work; whether there was any."""
        done = False
        while self._lanes[0]:
            try:
                ticket = self._tickets.get_nowait()
            except queue.Empty:  # another thread is about to take it
                break
            try:
                item = self._lanes[0].popleft() if ticket else None
            except IndexError:
                item = None
            if item is None:
                self._tickets.put(ticket)
                break
            self._do([item])
            done = True
        return done

    def close(self) -> list[T]:
        """Begin nothing more; what nobody has begun with, in order."""
        self._closed = True
        waiting = self._take(limit=None)
        self._dismiss()
        return waiting

    def finish(self, timeout_s: float | None = None) -> bool:
        """Do what was submitted, then end; False if that took longer than ``timeout_s`` seconds."""
        self._closed = True
        self._dismiss()
        until = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.is_alive():
                thread.join(None if until is None else max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _dismiss(self) -> None:
        for _ in self._threads:
            self._tickets.put(False)

    def _take(self, limit: int | None) -> list[T]:
        taken: list[T] = []
        while limit is None or len(taken) < limit:
            try:
                ticket = self._tickets.get_nowait()
            except queue.Empty:
                break
            if not ticket:  # meant for a thread that waits
                self._tickets.put(False)
                break
            taken.append(self._next())
        return taken

    def _next(self) -> T:
        """The item of a ticket. There is one for each, but others may be at the same deques."""
        while True:
            for lane in self._lanes:
                with suppress(IndexError):
                    return lane.popleft()

    def _run(self) -> None:
        while self._tickets.get():
            self._do([self._next(), *self._take(self._most - 1)])

    def _do(self, items: list[T]) -> None:
        try:
            self._work(items)
        except BaseException:
            logger.critical("%s raised; this is a bug", threading.current_thread().name, exc_info=True)
