"""Giving memory back, between chunks and now and then within one.

What a thread has freed stays with that thread: without this a worker's memory grows to what decoding, stacking and the
forwards each took at their largest, together.
"""

from __future__ import annotations

import ctypes
import time
from functools import cache
from typing import Any, Final

#: seconds between two trims within a chunk: each takes some milliseconds, and what is used again has to be got again
OFTEN_S: Final = 1.0

_last = float("-inf")


def trim(after_s: float = 0.0) -> None:
    """Return to the system what this process has freed. Nothing where the C library is not glibc.

    Args:
        after_s: only if this was not done for so many seconds.
    """
    global _last  # noqa: PLW0603 - of the process, as its memory is; two threads that both trim do no harm
    now = time.monotonic()
    if now - _last >= after_s and (malloc_trim := _malloc_trim()) is not None:
        _last = now
        malloc_trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
