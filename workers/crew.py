"""A few threads that do one kind of work."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
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
        self._items: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{n}", daemon=True) for n in range(size)]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def submit(self, item: T) -> None:
        """Add an item; dropped once the crew is closed. Never blocks."""
        if not self._closed:
            self._items.put(item)

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
            self._items.put(None)

    def _take(self, limit: int | None) -> list[T]:
        taken: list[T] = []
        while limit is None or len(taken) < limit:
            try:
                item = self._items.get_nowait()
            except queue.Empty:
                break
            if item is None:  # meant for a thread that waits
                self._items.put(None)
                break
            taken.append(item)
        return taken

    def _run(self) -> None:
        while (first := self._items.get()) is not None:
            items = [first, *self._take(self._most - 1)]
            try:
                self._work(items)
            except BaseException:
                logger.critical("%s raised; this is a bug", threading.current_thread().name, exc_info=True)
