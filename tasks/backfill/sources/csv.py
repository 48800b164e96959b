"""CSV: quoted newlines, a header, and rows of text among numbers.

The scan reads everything once: it finds the records and the types. A column the model is given is of numbers if at
least half of its values are; the others are failures of their rows. The id and the columns of the output are of numbers
only if every value is one that reads back the same (``007`` is text), so that nothing is lost by giving them a type.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nograd.tasks.backfill.plan import InputFile, SourceSpec, TableSchema
from nograd.tasks.errors import SourceError

from .base import ROW, Files, Piece, Request, Survey, choose_columns, number_files, open_file, schema_of
from .listing import Found
from .records import Block, Quoting, blocks
from .text import TextReader, as_input, misfit, scan, start_of

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv as pa_csv
else:
    from nograd.tasks.backfill.extra import np, pa, pa_csv, pc

_INT = r"^[ \t]*[+-]?[0-9]{1,18}[ \t]*$"
_SAME_INT = r"^(0|-?[1-9][0-9]{0,17})$"
_LONG_INT = r"^[ \t]*[+-]?[0-9]{16,}[ \t]*$"
_FLOAT = r"^[ \t]*[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?[ \t]*$|(?i)^[ \t]*[+-]?(nan|inf|infinity)[ \t]*$"
_BOOL = r"^(?i)(true|false)$"
#: what stands for no value in a column of numbers
_BLANK = r"^[ \t]*$"


@dataclass(slots=True)
class _Votes:
    """What the values of a column look like, counted."""

    values: int = 0
    ints: int = 0
    same_ints: int = 0
    long_ints: int = 0
    floats: int = 0
    bools: int = 0

    def count(self, column: pa.Array) -> None:
        self.values += len(column) - column.null_count - _count(column, _BLANK)
        self.ints += _count(column, _INT)
        self.same_ints += _count(column, _SAME_INT)
        self.long_ints += _count(column, _LONG_INT)
        self.floats += _count(column, _FLOAT)
        self.bools += _count(column, _BOOL)

    def exact(self) -> pa.DataType:
        """The type every value has."""
        if self.values and self.values == self.same_ints:
            return pa.int64()
        if self.values and self.values == self.floats and self.ints == self.same_ints and not self.long_ints:
            return pa.float64()  # which holds whole numbers of 15 digits, and no more
        return pa.bool_() if self.values and self.values == self.bools else pa.string()

    def majority(self) -> pa.DataType:
        """The type that suits at least half of the values; an integer only if no other number is among them."""
        if self.values and 2 * self.floats >= self.values:
            return pa.int64() if self.ints == self.floats else pa.float64()
        return self.exact()


def _count(column: pa.Array, pattern: str) -> int:
    return int(pc.sum(pc.match_substring_regex(column, pattern)).as_py() or 0)


def survey(found: Sequence[Found], hashes: Sequence[str], request: Request, skipped: int) -> Survey:
    """Read everything once.

    Options: ``delimiter`` (one character; a tab for ``.tsv``), ``header`` (False: columns are ``f0``, ``f1`` …).

    Raises:
        SourceError: naming the file and what is wrong with its header.
    """
    options = {"delimiter": "\t" if found[0].name.lower().endswith(".tsv") else ",", "header": True, **request.options}
    unknown = sorted(set(options) - {"delimiter", "header"})
    if unknown or not isinstance(options["delimiter"], str) or len(options["delimiter"].encode()) != 1:
        raise SourceError(f"CSV: unknown option {unknown[0]!r}" if unknown else "CSV: the delimiter is one character")
    quoting = Quoting(options["delimiter"].encode())
    inputs = [as_input(file) for file in found]
    headers = [_header(file, quoting, header=bool(options["header"])) for file in inputs]
    first = next((names for names, _ in headers if names), [])
    key, columns, join = choose_columns(request, first, ROW, found[0].name)
    needed = [name for name in dict.fromkeys([key, *columns, *join]) if not (name == ROW and not request.id)]
    votes = {name: _Votes() for name in needed}
    rows: list[int] = []
    edges: list[int] = []
    index = {}
    for position, (file, (names, start)) in enumerate(zip(inputs, headers, strict=True)):
        missing = [name for name in needed if name not in names] if names else []
        if missing:
            raise SourceError(f"{file.name} has no column {missing[0]!r}; its header: {', '.join(names)}")

        def visit(block: Block, names: list[str] = names) -> None:
            for name, column in _parsed(names, needed, quoting, block)[0].items():
                votes[name].count(column)

        count, index[position] = scan(file, start, quoting, visit)
        rows.append(count)
        edges.append(count + (edges[-1] if edges else 0))
    types = {
        name: votes[name].majority() if name in columns and name != key else votes[name].exact() for name in needed
    }
    spec = SourceSpec(
        kind="csv",
        urls=request.urls,
        id=key,
        columns=columns,
        join=join,
        schema=TableSchema.of(schema_of(key, columns, join, types)),
        options=options,
        content=request.content,
        allow_null=request.allow_null,
    )
    return Survey(spec, number_files(found, rows, hashes), np.array(edges, np.int64), index, skipped)


def _header(file: InputFile, quoting: Quoting, *, header: bool) -> tuple[list[str], int]:
    """The names of the columns, and the byte of the first record; no names for an empty file.

    Raises:
        SourceError: if two columns have one name, or it is no UTF-8.
    """
    start = start_of(file)
    with open_file(file) as source:
        for block in blocks(source, start, file.size, quoting, name=file.name, block_bytes=1 << 16):
            if not len(block):
                continue
            try:
                names = _fields(block.record(0), quoting)
            except (UnicodeDecodeError, csv.Error) as err:
                raise SourceError(f"{file.name}: the first line is no CSV in UTF-8: {err}") from err
            if not header:
                return [f"f{index}" for index in range(len(names))], block.offset + int(block.starts[0])
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise SourceError(f"{file.name}: two columns are named {twice[0]!r}")
            return names, block.offset + int(block.ends[0])
    return [], start


def _fields(record: bytes, quoting: Quoting) -> list[str]:
    """The fields of one record.

    Raises:
        UnicodeDecodeError: if it is no UTF-8.
        csv.Error: if it is no CSV.
    """
    text = record.decode("utf-8").removesuffix("\n").removesuffix("\r")
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=quoting.delimiter.decode()))
    return [field for row in rows[:1] for field in row]


def _parsed(
    names: list[str], needed: Iterable[str], quoting: Quoting, block: Block
) -> tuple[dict[str, pa.Array], dict[int, str]]:
    """The needed columns of a block as text; and which records have none, where the text is null, and why."""
    wanted = list(needed)
    columns = _parse_at_once(names, wanted, quoting, block)
    if columns is not None:
        return columns, {}
    bad: dict[int, str] = {}
    values: list[list[str | None]] = [[] for _ in wanted]
    places = [names.index(name) for name in wanted]
    for index in range(len(block)):
        row = _record(block.record(index), quoting, len(names))
        if isinstance(row, str):
            bad[index] = row
        for into, place in zip(values, places, strict=True):
            into.append(None if isinstance(row, str) else row[place])
    return {name: pa.array(column, pa.string()) for name, column in zip(wanted, values, strict=True)}, bad


def _record(record: bytes, quoting: Quoting, count: int) -> list[str] | str:
    """The fields of a record, or why it has none."""
    try:
        row = _fields(record, quoting)
    except UnicodeDecodeError as err:
        return f"the record is no UTF-8: {err.reason} at byte {err.start}"
    except csv.Error as err:
        return f"the record is no CSV: {err}"
    return row if len(row) == count else f"the record has {len(row)} fields, the header {count}"


def _parse_at_once(names: list[str], wanted: list[str], quoting: Quoting, block: Block) -> dict[str, pa.Array] | None:
    """By Arrow; None if it does not find exactly the records that are there."""
    data = block.text()
    if not wanted:
        return {}
    try:
        table = pa_csv.read_csv(
            io.BytesIO(data),
            read_options=pa_csv.ReadOptions(column_names=names, use_threads=False, block_size=len(data) + 1),
            parse_options=pa_csv.ParseOptions(delimiter=quoting.delimiter.decode(), newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted, strings_can_be_null=False
            ),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return None
    if table.num_rows != len(block):
        return None
    return {name: table[name].combine_chunks() for name in wanted}


class CsvReader(TextReader):
    """Parses records by the header of their file and the types of the plan."""

    def __init__(self, spec: SourceSpec, files: Files) -> None:
        super().__init__(spec, files)
        self.quoting: Quoting = Quoting(str(spec.options["delimiter"]).encode())
        self._names: tuple[str, list[str]] = ("", [])

    def parse(self, file: InputFile, block: Block) -> Piece:
        """Text first, record by record only where Arrow finds fault; then each column its type."""
        if self._names[0] != file.url:
            names, _ = _header(file, self.quoting, header=bool(self.spec.options["header"]))
            self._names = (file.url, names)
        if not len(self.own):
            return Piece(pa.RecordBatch.from_arrays([pa.nulls(len(block))], ["nothing"]), {})
        columns, unread = _parsed(self._names[1], self.own.names, self.quoting, block)
        bad = {index: f"{why}{block.place(index, file.name)}" for index, why in unread.items()}
        arrays = []
        for field in self.own:
            array, misfits = _typed(columns[field.name], field.type)
            arrays.append(array)
            for index in misfits:
                bad.setdefault(index, misfit(field, columns[field.name][index].as_py()))
        return Piece(pa.RecordBatch.from_arrays(arrays, schema=self.own), bad)


def _typed(column: pa.Array, kind: pa.DataType) -> tuple[pa.Array, list[int]]:
    """Text in its type, and where it has none; blank is null."""
    if pa.types.is_string(kind):
        return column, []
    text = pc.replace_substring_regex(pc.utf8_trim_whitespace(column), r"^\+", "")
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
    try:
        return text.cast(kind), []
    except pa.ArrowInvalid:
        pattern = _BOOL if pa.types.is_boolean(kind) else _INT if pa.types.is_integer(kind) else _FLOAT
        fits = pc.match_substring_regex(text, pattern)
        misfits = np.flatnonzero(pc.invert(fits).fill_null(False).to_numpy(zero_copy_only=False)).tolist()
        return pc.if_else(fits, text, pa.scalar(None, pa.string())).cast(kind), misfits
