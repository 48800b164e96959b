"""Ids that occur twice, found in memory that does not grow with the rows.

Hashes go to files by their first bits, each file is sorted, neighbours that are equal are suspects; a second pass
compares the suspects themselves, so that two ids that merely hash alike are never called the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
else:
    from .extra import np, pa

#: files the hashes are spread over; one of them is in memory at a time. Some systems allow a process 256 open files
_BUCKETS = 128
#: ids named as examples
_EXAMPLES = 5
#: suspects compared in the second pass at most; more of them are duplicates beyond doubt
_SUSPECTS = 1_000_000


def find(arrays: Callable[[], Iterable[pa.Array]]) -> tuple[int, list[Any]]:
    """Count the values that occurred before, and name some.

    Args:
        arrays: gives the values, twice: it is called a second time if there are suspects. Null is no value.
    """
    count, suspects = _suspects(arrays())
    if not count:
        return 0, []
    repeated: dict[Any, int] = {}
    for array in arrays():
        values = array.drop_null()
        for value in values.filter(pa.array(np.isin(_hashes(values), suspects))).to_pylist():
            repeated[value] = repeated.get(value, 0) + 1
    twice = [value for value, times in repeated.items() if times > 1]
    exact = sum(repeated[value] - 1 for value in twice)
    return (exact if len(suspects) < _SUSPECTS else count), twice[:_EXAMPLES]


def _suspects(arrays: Iterable[pa.Array]) -> tuple[int, npt.NDArray[np.int64]]:
    """How many hashes occurred before, and which."""
    count, found, kept = 0, [np.empty(0, np.int64)], 0
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(_BUCKETS)]
        for array in arrays:
            hashes = _hashes(array.drop_null())
            buckets = hashes % _BUCKETS
            order = np.argsort(buckets, kind="stable")
            bounds = np.searchsorted(buckets[order], np.arange(_BUCKETS + 1))
            for bucket, file in enumerate(files):
                file.write(hashes[order[bounds[bucket] : bounds[bucket + 1]]].tobytes())
        for file in files:
            file.seek(0)
            hashes = np.fromfile(file, np.int64)
            hashes.sort()
            again = hashes[1:][hashes[1:] == hashes[:-1]]
            count += len(again)
            if kept < _SUSPECTS:
                found.append(np.unique(again)[: _SUSPECTS - kept])
                kept += len(found[-1])
    return count, np.concatenate(found)


def _hashes(values: pa.Array) -> npt.NDArray[np.int64]:
    """64 bits of each value. Integers are spread by an odd factor: neighbours must not share a file."""
    if pa.types.is_integer(values.type):
        numbers: npt.NDArray[np.int64] = values.cast(pa.int64(), safe=False).to_numpy(zero_copy_only=False)
        return numbers * np.int64(-7046029254386353131)
    return np.fromiter((hash(value) for value in values.to_pylist()), np.int64, len(values))
