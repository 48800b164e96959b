"""Giving memory back between chunks, so that a worker's does not grow to what the largest ones of all took together."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def trim() -> None:
    """Return to the system what this process has freed; some milliseconds. Nothing where the C library is not glibc."""
    if (malloc_trim := _malloc_trim()) is not None:
        malloc_trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
