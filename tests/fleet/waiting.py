"""Waiting for what must come true. How long that takes says nothing of whether it is right; only failures wait long."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

#: seconds until something is taken never to come true, also on a machine that is ten times slower and busy
PATIENCE_S = 180


def until(condition: Callable[[], T], what: object = "it does not come true", seconds: float = PATIENCE_S) -> T:
    """The first value of ``condition`` that is true.

    Args:
        condition: asked again and again.
        what: to say if it stays false; a callable is called then.
        seconds: how long to wait.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.02)
    return value


def stand_at(path: str) -> None:
    """Wait, in the process of a worker, until a gate is opened."""
    with Path(f"{path}.reached").open("a") as note:
        note.write(".")
    while not Path(path).exists():
        time.sleep(0.01)


class Gate:
    """Where inputs of a model ``waits`` stand until somebody opens it; its text is such an input."""

    def __init__(self, path: Path):
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    @property
    def reached(self) -> int:
        """How many inputs have come to it."""
        note = Path(f"{self}.reached")
        return len(note.read_bytes()) if note.exists() else 0

    def open(self) -> None:
        """Let them go on."""
        self._path.touch()
