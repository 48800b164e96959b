"""Where the records of a text file begin and end: lines, or for CSV what quotes hold together.

Laws: cutting a file at record boundaries and splitting each piece gives the same records as splitting it whole; that is
what lets a worker read chunk k without the bytes before it. Empty lines are no records. A quote opens only at the start
of a field, as the readers of CSV have it: a stray one inside a field is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from nograd.tasks.errors import SourceError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
else:
    from nograd.tasks.backfill.extra import np

#: bytes read at once
BLOCK_BYTES = 4 << 20
#: bytes of one record at most; a quote that is never closed makes the rest of the file one record
MAX_RECORD_BYTES = 64 << 20

_NEWLINE, _RETURN, _QUOTE = 10, 13, 34
_QUOTED = re.compile(rb'"(?:[^"]+|"")*+"')  # possessive: a doubled quote never closes


class Quoting(NamedTuple):
    """How CSV is written.

    Attributes:
        delimiter: between fields, one byte.
    """

    delimiter: bytes


class Block(NamedTuple):
    """Whole records of a file.

    Attributes:
        offset: of the data in the file.
        data: the bytes.
        starts: of each record, in the data.
        ends: of each record, with its line end.
    """

    offset: int
    data: bytes
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def cut(self, first: int, count: int) -> Block:
        """Some of the records."""
        return Block(self.offset, self.data, self.starts[first : first + count], self.ends[first : first + count])

    def record(self, index: int) -> bytes:
        """One record."""
        return self.data[self.starts[index] : self.ends[index]]

    def place(self, index: int, name: str) -> str:
        """Where a record stands, to follow what is wrong with it. Its line is not known: nobody reads from the top."""
        return f"; it begins at byte {self.offset + int(self.starts[index])} of {name!r}"

    def text(self) -> bytes:
        """The bytes from the first record to the last."""
        return self.data[self.starts[0] : self.ends[-1]] if len(self) else b""


def blocks(
    file: BinaryIO,
    start: int,
    end: int,
    quoting: Quoting | None,
    *,
    name: str,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[Block]:
    """Split the bytes of a file between two record boundaries.

    Args:
        file: open, for reading bytes.
        start: where the first record begins.
        end: the start of a record, or the file's end.
        quoting: of CSV; None for lines.
        name: of the file, for the error.
        block_bytes: read at once.

    Raises:
        SourceError: for a record longer than `MAX_RECORD_BYTES`.
    """
    file.seek(start)
    rest, offset, left = b"", start, end - start
    while left > 0 or rest:
        fresh = file.read(min(block_bytes, left))
        left = left - len(fresh) if fresh else 0
        data = rest + fresh
        ends = _ends(data, quoting, final=left == 0)
        done = int(ends[-1]) if len(ends) else 0
        if len(ends):
            starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
            kept = ~_empty(data, starts, ends)
            yield Block(offset, data, starts[kept], ends[kept])
        elif len(data) > MAX_RECORD_BYTES:
            raise SourceError(
                f"{name}: the record at byte {offset} is longer than {MAX_RECORD_BYTES >> 20} MiB; "
                "is there a quote that is never closed?"
            )
        rest, offset = data[done:], offset + done
        if left == 0:
            break


def _empty(data: bytes, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which records are empty lines."""
    array = np.frombuffer(data, np.uint8)
    first = array[starts]
    length = ends - starts
    line_end = (first == _NEWLINE) | (first == _RETURN)
    both = (first == _RETURN) & (length == 2) & (array[ends - 1] == _NEWLINE)
    empty: npt.NDArray[np.bool_] = line_end & (length <= 1) | both
    return empty


def _ends(data: bytes, quoting: Quoting | None, *, final: bool) -> npt.NDArray[np.int64]:
    """Behind each record; one without its line end counts only at the end of the file."""
    array = np.frombuffer(data, np.uint8)
    ends: npt.NDArray[np.int64] = np.flatnonzero(array == _NEWLINE) + 1
    if quoting is not None:
        quotes = np.flatnonzero(array == _QUOTE)
        if len(quotes):
            if _all_open_at_a_field(array, quotes, quoting.delimiter[0]):
                ends = ends[np.searchsorted(quotes, ends) % 2 == 0]
            else:
                ends = _ends_one_by_one(data, quoting.delimiter)
    if final and len(data) and (not len(ends) or ends[-1] != len(data)):
        ends = np.append(ends, len(data))
    return ends


def _all_open_at_a_field(array: npt.NDArray[np.uint8], quotes: npt.NDArray[np.int64], delimiter: int) -> bool:
    """Whether every other quote opens, and follows the start of a field or, doubled, a quote."""
    opening = quotes[::2]
    before = array[opening[opening > 0] - 1]
    return bool(np.isin(before, (delimiter, _NEWLINE, _QUOTE)).all())


def _ends_one_by_one(data: bytes, delimiter: bytes) -> npt.NDArray[np.int64]:
    """Field by field, for text with stray quotes."""
    plain = re.compile(rb"[^" + re.escape(delimiter) + rb"\n]*")
    ends, position = [], 0
    while position < len(data):
        if data[position] == _QUOTE:
            quoted = _QUOTED.match(data, position)
            if quoted is None:
                break
            position = quoted.end()
        position = plain.match(data, position).end()  # type: ignore[union-attr] # it matches nothing, too
        if position < len(data) and data[position] == _NEWLINE:
            ends.append(position + 1)
        position += 1
    return np.array(ends, np.int64)
