"""What CSV and JSON lines have in common: one scan finds the records, afterwards any run of them can be read alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from nograd.tasks.backfill.plan import Extent, InputFile, SourceSpec
from nograd.tasks.backfill.rows import MISFIT, fits
from nograd.tasks.errors import SourceError

from .base import INDEX_ROWS, Files, Piece, Reader, open_file, own_columns
from .listing import Found
from .records import Block, Quoting, blocks

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
else:
    from nograd.tasks.backfill.extra import np, pa

#: endings of files that cannot be read from the middle
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4", ".br")
_MARK = b"\xef\xbb\xbf"  # how some programs begin a UTF-8 file


def as_input(found: Found) -> InputFile:
    """A listed file, before its rows are known."""
    return InputFile(found.url, found.name, found.size, found.stamp, "", 0, 0)


def start_of(file: InputFile) -> int:
    """The first byte behind the byte order mark, if there is one."""
    with open_file(file) as source:
        return len(_MARK) if source.read(len(_MARK)) == _MARK else 0


def scan(
    file: InputFile, start: int, quoting: Quoting | None, visit: Callable[[Block], None]
) -> tuple[int, npt.NDArray[np.int64]]:
    """Find the records of a file: how many there are, and the byte of every `INDEX_ROWS`-th.

    Args:
        file: which.
        start: the first byte of the first record.
        quoting: of CSV.
        visit: is shown every block, to learn the types of the columns.

    Raises:
        SourceError: if it is compressed or cannot be read.
    """
    if file.name.lower().endswith(COMPRESSED):
        raise SourceError(f"{file.name} is compressed and cannot be read from the middle: decompress it first")
    rows, known = 0, [np.empty(0, np.int64)]
    with open_file(file) as source:
        for block in blocks(source, start, file.size, quoting, name=file.name):
            known.append(block.offset + block.starts[-rows % INDEX_ROWS :: INDEX_ROWS])
            rows += len(block)
            visit(block)
    return rows, np.concatenate(known)


class TextReader(Reader):
    """Reads the bytes of an extent, splits them into records and has them parsed.

    Attributes:
        quoting: of CSV, None for lines.
    """

    quoting: Quoting | None = None

    def __init__(self, spec: SourceSpec, files: Files) -> None:
        super().__init__(spec, files)
        self.own = pa.schema([self.schema.field(name) for name in own_columns(spec)])

    @abstractmethod
    def parse(self, file: InputFile, block: Block) -> Piece:
        """Turn records into columns; a record that cannot be is a failure of its row."""

    def read(self, file: InputFile, extent: Extent) -> Iterator[Piece]:
        """Read from a byte that is known, pass over the records before the first."""
        skip, left = extent.skip, extent.count
        with open_file(file) as source:
            for block in blocks(source, extent.offset, extent.end, self.quoting, name=file.name):
                wanted = block.cut(skip, left)
                skip, left = max(0, skip - len(block)), left - len(wanted)
                if len(wanted):
                    yield self.parse(file, wanted)
                if left == 0:
                    return


def rows_to_batch(schema: pa.Schema, file: InputFile, block: Block, rows: list[dict[str, object] | str]) -> Piece:
    """Columns from values, row by row: the way for blocks in which some row does not fit.

    Args:
        schema: of the columns.
        file: where the records stand.
        block: the records.
        rows: values by column, or why there are none.
    """
    bad = {index: f"{row}{block.place(index, file.name)}" for index, row in enumerate(rows) if isinstance(row, str)}
    arrays = []
    for field in schema:
        values = [None if isinstance(row, str) else row.get(field.name) for row in rows]
        array, misfits = _column(values, field.type)
        arrays.append(array)
        for index in misfits:
            bad.setdefault(index, misfit(field, values[index]))
    return Piece(pa.RecordBatch.from_arrays(arrays, schema=schema), bad)


def misfit(field: pa.Field, value: object) -> str:
    """That a value is not of its column's type, for people."""
    kind = field.type
    if pa.types.is_floating(kind):
        wanted = "a number"
    elif pa.types.is_integer(kind):
        wanted = "a whole number"
    else:
        wanted = "true or false" if pa.types.is_boolean(kind) else f"of type {kind}"
    return f"column {field.name!r}: {short(value)} is not {wanted}"


def _column(values: list[object], kind: pa.DataType) -> tuple[pa.Array, list[int]]:
    """Values in a type, and where they do not fit it: by a look at each, and one by one only if that is not enough."""
    try:
        return pa.array(values, kind), []
    except MISFIT:
        misfits = {index for index, value in enumerate(values) if not fits(value, kind)}
    try:
        return pa.array([None if index in misfits else value for index, value in enumerate(values)], kind), [*misfits]
    except MISFIT:
        misfits = {index for index, value in enumerate(values) if not _is_a(value, kind)}
        return pa.array([None if index in misfits else value for index, value in enumerate(values)], kind), [*misfits]


def _is_a(value: object, kind: pa.DataType) -> bool:
    try:
        pa.array([value], kind)
    except MISFIT:
        return False
    return True


def short(value: object) -> str:
    """A value in an error message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
