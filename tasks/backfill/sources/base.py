"""What all sources have in common: what a survey finds, and how rows are handed out.

Laws: every row of an extent is handed out once, in order, as a good row or as a failure; the numbers of rows are those
of the plan, or the chunk is refused (`PlanChanged`): a file that changed or went away never passes for bad rows.
"""

from __future__ import annotations

import datetime as dt
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

import msgspec

from nograd.tasks.backfill.plan import Extent, InputFile, SourceSpec
from nograd.tasks.backfill.rows import RowFailure, Slice
from nograd.tasks.errors import PlanChanged, SourceError

from .listing import Found, is_remote, readable, stat

if TYPE_CHECKING:
    import fsspec
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    import pyarrow.compute as pc
else:
    from nograd.tasks.backfill.extra import fsspec, np, pa, pc

#: the id of a row whose source has none of its own: its position in the input
ROW = "row"

#: rows of a slice if the caller does not say
SLICE_ROWS = 4096

#: records between two places of a text file whose byte is known
INDEX_ROWS = 256


class Request(NamedTuple):
    """What the user asked of a source.

    Attributes:
        urls: absolute.
        id: column, None for the source's own.
        columns: for the model, None for all.
        join: for the output.
        options: of the format.
        content: whether the fingerprint holds hashes of the contents.
        allow_null: whether empty values reach the model.
    """

    urls: list[str]
    id: str | None
    columns: list[str] | None
    join: list[str]
    options: dict[str, str | bool]
    content: bool
    allow_null: bool


class Survey(NamedTuple):
    """What was found in the inputs.

    Attributes:
        spec: how to read them.
        files: all of them.
        edges: rows behind which a cut is cheap, ascending: ends of files and row groups.
        offsets: position of a text file → the byte of every `INDEX_ROWS`-th of its records.
        skipped: files of another kind.
    """

    spec: SourceSpec
    files: list[InputFile]
    edges: npt.NDArray[np.int64]
    offsets: Mapping[int, npt.NDArray[np.int64]]
    skipped: int

    @property
    def rows(self) -> int:
        """In all files."""
        return self.files[-1].start + self.files[-1].rows if self.files else 0


class Piece(NamedTuple):
    """Rows as a format reads them.

    Attributes:
        batch: the columns of the schema, without a `ROW` id.
        bad: index → message, for rows that could not be read.
    """

    batch: pa.RecordBatch
    bad: dict[int, str]


Files = Callable[[int, int], Sequence[InputFile]]


class Reader(ABC):
    """Reads the rows of extents. One thread at a time.

    Attributes:
        spec: what is read, and how.
    """

    def __init__(self, spec: SourceSpec, files: Files) -> None:
        self.spec = spec
        self.schema = spec.schema.to_arrow()
        self._files = files

    def slices(self, extents: Iterable[Extent], rows: int = SLICE_ROWS) -> Iterator[Slice]:
        """The rows of a chunk in order, ``rows`` at a time, the last slice shorter.

        Raises:
            PlanChanged: if a file is not the one the plan was made for.
            SourceError: if it cannot be read.
        """
        position = 0
        for piece, numbers in _repack(self._numbered(extents), rows):
            yield self._slice(position, piece, numbers)
            position += piece.batch.num_rows

    @abstractmethod
    def read(self, file: InputFile, extent: Extent) -> Iterator[Piece]:
        """The rows of one extent, in pieces of any size."""

    def _numbered(self, extents: Iterable[Extent]) -> Iterator[tuple[Piece, pa.Array]]:
        for extent in extents:
            row = extent.row
            (file,) = self._files(extent.file, 1)
            for piece in self.read(file, extent):
                count = piece.batch.num_rows
                yield piece, pa.array(np.arange(row, row + count), pa.int64())
                row += count
            if row != extent.row + extent.count:
                raise PlanChanged(
                    f"{file.name}: {row - extent.row} rows instead of {extent.count} from row {extent.first} on"
                )

    def _slice(self, position: int, piece: Piece, numbers: pa.Array) -> Slice:
        columns = {
            field.name: numbers if self.spec.id == ROW and field.name == ROW else piece.batch.column(field.name)
            for field in self.schema
        }
        batch = pa.RecordBatch.from_arrays(list(columns.values()), schema=self.schema)
        bad = {**self._nulls(batch), **piece.bad}
        ids = batch.column(self.spec.id)
        failures = {
            index: RowFailure(
                row=numbers[index].as_py(),
                id=ids[index].as_py(),
                stage="read",
                type="invalid_input",
                message=bad[index],
            )
            for index in sorted(bad)
        }
        return Slice(position, batch, numbers, failures)

    def _nulls(self, batch: pa.RecordBatch) -> dict[int, str]:
        """Rows without a value they need, the id above all."""
        needed = [self.spec.id] if self.spec.allow_null else [*self.spec.columns, self.spec.id]
        found: dict[int, str] = {}
        for name in needed:
            column = batch.column(name)
            if column.null_count:
                for index in np.flatnonzero(pc.is_null(column).to_numpy(zero_copy_only=False)).tolist():
                    found[index] = f"column {name!r} has no value"
        return found


def _repack(pieces: Iterable[tuple[Piece, pa.Array]], rows: int) -> Iterator[tuple[Piece, pa.Array]]:
    """Pieces of exactly so many rows, the last one shorter."""
    held: list[tuple[Piece, pa.Array]] = []
    count = 0
    for piece, numbers in pieces:
        at, size = 0, piece.batch.num_rows
        while at < size:
            take = min(rows - count, size - at)
            bad = {i - at: text for i, text in piece.bad.items() if at <= i < at + take} if piece.bad else {}
            held.append((Piece(piece.batch.slice(at, take), bad), numbers.slice(at, take)))
            at, count = at + take, count + take
            if count == rows:
                yield _joined(held)
                held, count = [], 0
    if held:
        yield _joined(held)


def _joined(held: list[tuple[Piece, pa.Array]]) -> tuple[Piece, pa.Array]:
    if len(held) == 1:
        return held[0]
    bad: dict[int, str] = {}
    before = 0
    for piece, _ in held:
        bad.update({before + index: text for index, text in piece.bad.items()})
        before += piece.batch.num_rows
    batch = pa.concat_batches([piece.batch for piece, _ in held])
    return Piece(batch, bad), pa.concat_arrays([numbers for _, numbers in held])


def open_file(file: InputFile) -> BinaryIO:
    """Open an input, if it still is the one of the plan.

    Raises:
        PlanChanged: if it is gone or another.
        SourceError: if it cannot be opened.
    """
    with readable(file.name):
        check_unchanged(file, stat(file.url))
        if not is_remote(file.url):
            return open(file.url, "rb")  # noqa: PTH123 - the caller closes it
        return cast("BinaryIO", fsspec.open(file.url, "rb").open())


def check_unchanged(file: InputFile, now: Found | None) -> None:
    """Compare a file with what the plan says of it.

    Raises:
        PlanChanged: if they differ, saying in what.
    """
    difference = file_change(file, now)
    if difference:
        raise PlanChanged(difference)


def file_change(file: InputFile, now: Found | None) -> str:
    """In what a file differs from the plan, empty if in nothing."""
    if now is None:
        return f"{file.name} is gone since the plan was made"
    if now.size != file.size:
        return f"{file.name} had {file.size} bytes when the plan was made, has {now.size}"
    if now.stamp != file.stamp and not file.sha256:
        was, became = (stamp if is_remote(file.url) else _date(stamp) for stamp in (file.stamp, now.stamp))
        return f"{file.name} was written after the plan was made (same size; dated {was}, now {became})"
    return ""


def _date(stamp: str) -> str:
    """Nanoseconds since 1970 in local time; so fine that two that differ look different."""
    seconds, rest = divmod(int(stamp), 10**9)
    fine = f".{rest:09d}".rstrip("0").rstrip(".")
    return f"{dt.datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S}{fine}"


def choose_columns(
    request: Request, available: Sequence[str], own_id: str, where: str
) -> tuple[str, list[str], list[str]]:
    """Id, columns of the model and columns of the output, checked against what there is.

    Raises:
        SourceError: for a column that is not there, or named twice; if there are none at all.
    """
    if not available:
        raise SourceError(f"{', '.join(request.urls)}: there are no rows to score: no file has a column")
    key = request.id or own_id
    columns = [name for name in available if name != key] if request.columns is None else request.columns
    for name in [*([key] if request.id else []), *columns, *request.join]:
        if name not in available:
            raise SourceError(f"{where} has no column {name!r}; there are: {', '.join(map(repr, available))}")
    for names in (columns, request.join):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SourceError(f"column {twice[0]!r} is named twice")
    if not columns:
        raise SourceError(f"{where} has no column for the model besides the id {key!r}")
    if "prediction" in {key, *request.join}:
        raise SourceError("an output column named 'prediction' would collide with the predictions")
    if key == ROW and not request.id and ROW in available:
        raise SourceError(f"{where} has a column {ROW!r}: name it as the id, or name another")
    return key, columns, [name for name in request.join if name != key]


def schema_of(key: str, columns: Sequence[str], join: Sequence[str], types: Mapping[str, Any]) -> pa.Schema:
    """The columns to read, each once: id, columns, join."""
    names = list(dict.fromkeys([key, *columns, *join]))
    return pa.schema({name: pa.int64() if name == ROW and name not in types else types[name] for name in names})


def number_files(found: Sequence[Found], rows: Sequence[int], hashes: Sequence[str]) -> list[InputFile]:
    """Files with their rows and those before them."""
    files, start = [], 0
    for file, count, sha in zip(found, rows, hashes, strict=True):
        files.append(InputFile(file.url, file.name, file.size, file.stamp, sha, count, start))
        start += count
    return files


def own_columns(spec: SourceSpec) -> list[str]:
    """The columns that stand in the files."""
    return [name for name, _ in spec.schema.fields if not (name == ROW and spec.id == ROW)]


def only_id(spec: SourceSpec) -> SourceSpec:
    """The same source with nothing but its id."""
    from nograd.tasks.backfill.plan import TableSchema

    schema = TableSchema.of(pa.schema([spec.schema.to_arrow().field(spec.id)]))
    return msgspec.structs.replace(spec, columns=[], join=[], schema=schema)
