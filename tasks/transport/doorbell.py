"""Waiting for a message without popping one.

Publishers ring a bell per list; an idle consumer waits at the bells of the lists it may take from and then takes, by a
script, what is there. A bell holds at most one token, and whoever hears it and leaves messages behind rings again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from . import names

#: seconds an idle consumer waits at the bells before it looks by itself: publishers without our transport do not ring
WAIT_S: Final = 1.0
#: the same, once a message has come that had not rung, and of who waits for replies
WAIT_UNRUNG_S: Final = 0.1
#: seconds that lasts
UNRUNG_FOR_S: Final = 60.0


class Waiting:
    """How long to wait at the bells."""

    def __init__(self) -> None:
        self._unrung_until = 0.0

    @property
    def timeout_s(self) -> float:
        """For the next wait."""
        return WAIT_UNRUNG_S if time.monotonic() < self._unrung_until else WAIT_S

    def found(self, *, rung: bool, messages: int) -> None:
        """What a wait has ended in."""
        if messages and not rung:
            self._unrung_until = time.monotonic() + UNRUNG_FOR_S


def bell(prefix: str, name: str) -> str:
    """The key of the bell of a list."""
    return f"{prefix}{names.BELL}{name}"


def pack(*parts: str | bytes | float) -> bytes:
    """The parts of a command as Redis reads them, without the count in front (so that they can be kept and joined)."""
    out = []
    for part in parts:
        raw = part if isinstance(part, bytes) else str(part).encode()
        out.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
    return b"".join(out)


class Fetch:
    """The commands of one consumer, packed once for its lists; a fetch fills in the few numbers that change."""

    def __init__(
        self, keys: Sequence[str], nudge: str, bells: Sequence[str], lists: Sequence[tuple[str, str, bool]], steps: int
    ) -> None:
        """Pack.

        Args:
            keys: of the script.
            nudge: the consumer's own bell.
            bells: of the lists.
            lists: name, tail of the wrapping, leased; by priority.
            steps: number of priorities.
        """
        self.width = len(lists) // steps
        self._bells, self._nudge = bells, nudge
        self._keys = pack(len(keys), *keys)
        self._lists = pack(*(part for name, tail, leased in lists for part in (name, tail, int(leased))))
        self._fixed = 3 + len(keys) + 3 * len(lists)

    def wait(self, timeout_s: float, open_steps: Sequence[bool]) -> bytes:
        """Wait at the bells of the open priorities, and at our own."""
        bells = [each for k, each in enumerate(self._bells) if open_steps[k // self.width]]
        return b"*%d\r\n" % (3 + len(bells)) + pack("BLPOP", self._nudge, *bells, timeout_s)

    def take(self, script: tuple[str, str], numbers: Sequence[Any]) -> bytes:
        """Take; ``numbers`` are the arguments of the script up to those about each list."""
        return b"*%d\r\n" % (self._fixed + len(numbers)) + pack(*script) + self._keys + pack(*numbers) + self._lists
