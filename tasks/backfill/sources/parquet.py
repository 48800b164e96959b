"""Parquet: a chunk reads the row groups it touches, and each column it needs of them.

A row group is the smallest thing that can be decoded, so chunks end at groups where that is near; where groups are
larger than chunks, the last decoded one is kept for the next chunk of the same worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from nograd.tasks.backfill.plan import Extent, InputFile, SourceSpec, TableSchema
from nograd.tasks.errors import SourceError

from .base import (
    ROW,
    SLICE_ROWS,
    Files,
    Piece,
    Reader,
    Request,
    Survey,
    check_unchanged,
    choose_columns,
    number_files,
    open_file,
    own_columns,
    schema_of,
)
from .listing import Found, stat

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
else:
    from nograd.tasks.backfill.extra import np, pa, pq

#: bytes of a decoded row group a reader keeps; a larger one is decoded in passing, again for each chunk in it
CACHE_BYTES = 256 << 20


def survey(found: Sequence[Found], hashes: Sequence[str], request: Request, skipped: int) -> Survey:
    """Read the footers: columns, rows, row groups.

    Raises:
        SourceError: naming the file that is no Parquet, or lacks a column, or has it in a type of its own.
    """
    rows: list[int] = []
    edges: list[int] = []
    schemas, total = [], 0
    for file in found:
        footer = _open(InputFile(file.url, file.name, file.size, file.stamp, "", 0, 0))
        groups = [footer.metadata.row_group(index).num_rows for index in range(footer.num_row_groups)]
        edges.extend(total + end for end in accumulate(groups))
        schemas.append(footer.schema_arrow.remove_metadata())
        rows.append(footer.metadata.num_rows)
        total += rows[-1]
    key, columns, join = choose_columns(request, schemas[0].names, ROW, found[0].name)
    needed = [name for name in dict.fromkeys([key, *columns, *join]) if not (name == ROW and not request.id)]
    unified = _unify(found, schemas, needed)
    spec = SourceSpec(
        kind="parquet",
        urls=request.urls,
        id=key,
        columns=columns,
        join=join,
        schema=TableSchema.of(schema_of(key, columns, join, {name: unified.field(name).type for name in needed})),
        content=request.content,
        allow_null=request.allow_null,
    )
    return Survey(spec, number_files(found, rows, hashes), np.array(edges, np.int64), {}, skipped)


def _unify(found: Sequence[Found], schemas: Sequence[pa.Schema], needed: Sequence[str]) -> pa.Schema:
    """The columns in types that hold those of every file."""
    unified: pa.Schema = None
    for file, schema in zip(found, schemas, strict=True):
        missing = [name for name in needed if name not in schema.names]
        if missing:
            raise SourceError(f"{file.name} has no column {missing[0]!r}, which {found[0].name} has")
        own = pa.schema([pa.field(name, _plain(schema.field(name).type)) for name in needed])
        try:
            unified = own if unified is None else pa.unify_schemas([unified, own], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as err:
            raise SourceError(f"{file.name}: its columns do not go with those of {found[0].name}: {err}") from err
    return unified


def _plain(kind: pa.DataType) -> pa.DataType:
    """Dictionaries are a matter of storage; the values count."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _open(file: InputFile) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(open_file(file), pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as err:
        raise SourceError(f"{file.name} is no readable Parquet file: {err}") from err


class ParquetReader(Reader):
    """Reads row groups; keeps the last file open, and the group decoded last."""

    def __init__(self, spec: SourceSpec, files: Files) -> None:
        super().__init__(spec, files)
        self._columns = own_columns(spec)
        self._own = pa.schema([self.schema.field(name) for name in self._columns])
        self._last: tuple[str, pq.ParquetFile] | None = None
        self._group: tuple[tuple[str, int], pa.Table] | None = None

    def read(self, file: InputFile, extent: Extent) -> Iterator[Piece]:
        """Decode what the extent touches."""
        source = self._file(file)
        begin = 0
        for group in range(source.num_row_groups):
            rows = source.metadata.row_group(group).num_rows
            first, last = max(extent.first, begin), min(extent.first + extent.count, begin + rows)
            if first < last:
                try:
                    yield from self._part(file, source, group, first - begin, last - first)
                except (pa.ArrowInvalid, OSError) as err:
                    raise SourceError(f"{file.name}: row group {group} cannot be read: {err}") from err
            begin += rows

    def _file(self, file: InputFile) -> pq.ParquetFile:
        if self._last is None or self._last[0] != file.url:
            self._last = (file.url, _open(file))
        else:
            check_unchanged(file, stat(file.url))  # it was opened for an earlier chunk
        return self._last[1]

    def _part(self, file: InputFile, source: pq.ParquetFile, group: int, first: int, count: int) -> Iterator[Piece]:
        """Rows of one group, from the cache or in passing."""
        if not self._columns:  # nothing but row numbers is asked for
            yield Piece(pa.RecordBatch.from_arrays([pa.nulls(count)], ["nothing"]), {})
            return
        if self._size(source, group) <= CACHE_BYTES:
            table = self._cached(file, source, group).slice(first, count)
            yield from self._pieces(table.to_batches(max_chunksize=SLICE_ROWS * 16))
            return
        for batch in source.iter_batches(SLICE_ROWS * 4, row_groups=[group], columns=self._columns):
            skipped = min(first, batch.num_rows)
            wanted = batch.slice(skipped, count)
            first, count = first - skipped, count - wanted.num_rows
            if wanted.num_rows:
                yield from self._pieces([wanted])
            if count == 0:
                return

    def _cached(self, file: InputFile, source: pq.ParquetFile, group: int) -> pa.Table:
        key = (file.url, group)
        if self._group is None or self._group[0] != key:
            self._group = None  # never two of them in memory
            self._group = (key, source.read_row_group(group, columns=self._columns, use_threads=False))
        return self._group[1]

    def _size(self, source: pq.ParquetFile, group: int) -> int:
        """Bytes of the columns of a group, encoded but not compressed."""
        about = source.metadata.row_group(group)
        return sum(
            about.column(index).total_uncompressed_size
            for index in range(about.num_columns)
            if about.column(index).path_in_schema.split(".")[0] in self._columns
        )

    def _pieces(self, batches: Sequence[pa.RecordBatch]) -> Iterator[Piece]:
        for batch in batches:
            arrays = [batch.column(field.name).cast(field.type) for field in self._own]
            yield Piece(pa.RecordBatch.from_arrays(arrays, schema=self._own), {})
