"""Structs that several threads decode.

Law: what any thread decodes into was known to msgspec when its module had been imported (`tests/tasks/test_structs.py`
holds all of nograd to it).
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

T = TypeVar("T")


def decodable(struct: type[T]) -> type[T]:
    """Have msgspec look at the fields of a struct now; a class decorator.

    By itself it does so when the first value is decoded, and shows other threads what it has found before that is
    whole: a second thread that decodes its first value meanwhile ends the process with a segmentation fault (msgspec
    0.22). That is how a worker starts whose queue is full.
    """
    msgspec.json.Decoder(struct)
    return struct
