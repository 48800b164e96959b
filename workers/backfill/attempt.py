"""One worker's hold on one chunk: claimed, renewed, given up."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from nograd.tasks.backfill.window import Cursor, Window

from .suspects import Suspects

logger = logging.getLogger(__name__)

#: seconds between two looks at what the operator wants
WISH_S = 1.0


class GivenUp(Exception):  # noqa: N818 - no error: nobody wants the chunk from here any more
    """The chunk is not run to its end here.

    Attributes:
        requeue: whether another worker should have it at once.
    """

    def __init__(self, why: str, *, requeue: bool = False) -> None:
        super().__init__(why)
        self.requeue = requeue


class Attempt:
    """The hold. Hints may fail: a chunk that is already computed is committed without Redis.

    Args:
        window: the hints of the backfill.
        chunk: which.
        closing: set when the worker stops.
        since: wishes from before that are not heeded; see `state.wanted`.
    """

    def __init__(self, window: Window, chunk: int, closing: threading.Event, *, since: float = 0.0) -> None:
        self._window = window
        self._chunk = chunk
        self._closing = closing
        self._since = since
        self._owner = uuid.uuid4().hex
        self._lost = threading.Event()
        self._ended = threading.Event()
        self._wish_at = time.monotonic() + WISH_S
        self.suspects = Suspects()

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Whether the chunk is ours, until the end of the block.

        Raises:
            redis.RedisError: if Redis cannot say.
        """
        if not self._window.claim(self._chunk, self._owner):
            yield False
            return
        beat = threading.Thread(target=self._renew, name=f"nograd-chunk-{self._chunk}", daemon=True)
        beat.start()
        try:
            self.suspects = Suspects.after(self._window.cursor(self._chunk))
            yield True
        finally:
            self._ended.set()
            beat.join()
            with hint():
                self._window.release(self._chunk, self._owner)

    def check(self) -> None:
        """Look whether the chunk is still wanted from here.

        Raises:
            GivenUp: if not.
        """
        if self._closing.is_set():
            raise GivenUp("the worker stops", requeue=True)
        if self._lost.is_set():
            raise GivenUp("another worker has the chunk by now")
        if time.monotonic() >= self._wish_at:
            self._wish_at = time.monotonic() + WISH_S
            with hint():
                wish = self._window.wish_since(self._since)
                if wish in ("pause", "cancel"):
                    raise GivenUp(f"{wish} is wanted")

    def note(self, first: int, count: int) -> None:
        """These rows are under way."""
        if not self.suspects.probe:  # a probe has left its own cursor
            self.leave(self.suspects.cursor(first, count))

    def leave(self, cursor: Cursor) -> None:
        """What the next attempt finds if this one does not come back."""
        with hint():
            self._window.note(self._chunk, cursor)

    def _renew(self) -> None:
        while not self._ended.wait(self._window.claim_s / 4):
            with hint():
                if not self._window.claim(self._chunk, self._owner):
                    self._lost.set()
                    return


@contextmanager
def hint() -> Iterator[None]:
    """Go on without Redis, where nothing but a hint is lost."""
    try:
        yield
    except redis.RedisError as err:
        logger.warning("a hint of a backfill is lost: %s", err)
