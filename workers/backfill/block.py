"""Rows of a chunk on their way over the device: one item of the batch queue, a batch by itself.

Laws:

* The rows of a block meet no others in a forward. A batch of a backfill is the same in every attempt, also beside
  online jobs, so its predictions are the same to the last bit.
* A block that has to be halved takes a turn on the device for each forward: an online job waits for one of them.
* A block of a chunk that was given up takes no turn any more.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nograd.tasks.errors import JobError, NogradError
from nograd.tasks.keys import BULK
from nograd.tasks.predict import Outcome
from nograd.workers.batching import Item

_numbers = itertools.count()


class Block:
    """A batch, and what becomes of it; the engine's `Job`.

    Attributes:
        id: of the chunk's message, for logs.
        delivery: the chunk's message: what is suspected if the process dies over these rows.
        params: of the model.
        rows: prepared inputs: a tensor ``(n, …)``, or a sequence.
        segments: ``(start, stop, outputs or error)``, once `wait` has returned: together they cover the rows.
        dropped: the model was unloaded before all rows had been on the device.
        forwards: of the device thread: what is left to do.
        split: where to say that it did not fit into one forward.
        left: set when nobody waits for the outcome any more.
    """

    __slots__ = ("_done", "delivery", "dropped", "forwards", "id", "left", "params", "rows", "segments", "split")

    def __init__(
        self,
        task_id: str,
        delivery: Any,
        params: Mapping[str, Any],
        rows: Sequence[Any],
        split: list[str],
        *,
        left: threading.Event | None = None,
    ) -> None:
        self.id = task_id
        self.delivery = delivery
        self.params = params
        self.rows = rows
        self.segments: list[tuple[int, int, Sequence[Any] | NogradError]] = []
        self.split = split
        self.left = left or threading.Event()
        self.dropped = False
        self.forwards: Iterator[bool] | None = None
        self._done = threading.Event()

    def item(self, model: str) -> Item:
        """What is put into the batch queue."""
        return Item(model, ("block", next(_numbers)), self.rows, self, priority=BULK, block=True)

    def wait(self, timeout_s: float) -> bool:
        """Whether all rows have their outcome, after so many seconds at most."""
        return self._done.wait(timeout_s)

    def settle(self, start: int, stop: int, outputs: Sequence[Any] | NogradError) -> None:
        """Take the outputs of some rows, or the error they share. For the device thread."""
        self.segments.append((start, stop, outputs))

    def finish(self, fits: int | None) -> None:
        """All rows have their outcome. For the device thread.

        Args:
            fits: rows that fitted into one forward, if all of them did not.
        """
        if fits is not None and fits < len(self.rows):
            told = f"batches of more than {fits} rows did not fit into memory and were run in parts"
            if told not in self.split:
                self.split.append(told)
        covered = sum(stop - start for start, stop, _ in self.segments)
        if covered != len(self.rows):
            lost = JobError(f"{len(self.rows) - covered} rows of a batch have no outcome; this is a bug")
            self.segments = [(0, len(self.rows), lost)]
        self.segments.sort(key=lambda segment: segment[0])
        self._done.set()

    def resolve(self, index: int, outcome: Outcome, *_: Any) -> None:  # noqa: ARG002 - the engine's protocol
        """The whole block fails."""
        error = outcome.error if isinstance(outcome.error, NogradError) else JobError(str(outcome.error))
        self.segments = [(0, len(self.rows), error)]
        self._done.set()

    def abandoned(self) -> bool:
        """Whether nobody waits for the outcome any more."""
        return self.left.is_set()

    def withdraw(self) -> None:
        """Nothing: its message is the runner's, who has left."""

    def untouched(self) -> bool:
        """No: its message is not given back by itself; the runner lets go of the whole chunk."""
        return False

    def claim(self) -> bool:
        """Whether whoever gives back the jobs of an unloaded model may do so with this one: no, the runner does."""
        self.dropped, self.forwards = True, None
        self._done.set()
        return False
