"""JSON lines: one object a line, each of its keys a column; and the lines of OpenAI's batch format.

The scan reads everything once, for the types: a column that holds numbers in most lines is of numbers, and a line that
holds text there is a failure of its row. Text that looks like a date stays text.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from nograd.tasks.backfill.plan import InputFile, SourceSpec, TableSchema
from nograd.tasks.errors import SourceError
from nograd.tasks.structs import decodable

from .base import ROW, Piece, Request, Survey, choose_columns, number_files, open_file, schema_of
from .listing import Found
from .records import Block, blocks
from .text import TextReader, as_input, rows_to_batch, scan, start_of

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.json as pa_json
else:
    from nograd.tasks.backfill.extra import np, pa, pa_json

#: the id of a line of OpenAI's batch format, and what the model is given: the request's body, as JSON
CUSTOM_ID, BODY = "custom_id", "body"


@decodable
class _Line(msgspec.Struct):
    """A line of OpenAI's batch format; ``method`` and ``url`` say nothing here."""

    custom_id: str
    body: msgspec.Raw


class _Types:
    """The types the columns have had, and in how many rows."""

    def __init__(self) -> None:
        self.seen: dict[str, Counter[Any]] = {}

    def visit(self, block: Block) -> None:
        """Learn from whole blocks, and line by line from those in which Arrow finds fault."""
        table = _parse_at_once(block, None)
        if table is not None:
            for field in table.schema:
                self._add(field.name, field.type, len(block) - table[field.name].null_count)
            return
        values: dict[tuple[str, type], list[Any]] = {}
        for index in range(len(block)):
            line = _line(block.record(index))
            for name, value in line.items() if isinstance(line, dict) else ():
                values.setdefault((name, type(value)), []).append(value)
        for (name, _), alike in values.items():
            try:
                self._add(name, pa.infer_type(alike), len(alike))
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
                self._add(name, pa.null(), 0)

    def _add(self, name: str, kind: pa.DataType, rows: int) -> None:
        self.seen.setdefault(name, Counter())[_without_dates(kind)] += rows

    def type_of(self, name: str) -> pa.DataType:
        """The type of most rows, widened by all that go with it."""
        ordered = sorted(self.seen[name].items(), key=lambda item: (-item[1], str(item[0])))
        kind = next((kind for kind, _ in ordered if not pa.types.is_null(kind)), pa.string())
        for other, _ in ordered:
            try:
                fields = [pa.schema({name: kind}), pa.schema({name: other})]
                kind = pa.unify_schemas(fields, promote_options="permissive").field(name).type
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                continue
        return kind


def _without_dates(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_time(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _without_dates(field.type)) for field in kind])
    return pa.list_(_without_dates(kind.value_type)) if pa.types.is_list(kind) else kind


def survey(found: Sequence[Found], hashes: Sequence[str], request: Request, skipped: int) -> Survey:
    """Read everything once.

    Raises:
        SourceError: if a column that was asked for is in no line.
    """
    _no_options(request)
    types = _Types()
    rows, index = _scan_all(found, types.visit)
    key, columns, join = choose_columns(request, list(types.seen), ROW, found[0].name)
    needed = [name for name in dict.fromkeys([key, *columns, *join]) if not (name == ROW and not request.id)]
    spec = SourceSpec(
        kind="jsonl",
        urls=request.urls,
        id=key,
        columns=columns,
        join=join,
        schema=TableSchema.of(schema_of(key, columns, join, {name: types.type_of(name) for name in needed})),
        content=request.content,
        allow_null=request.allow_null,
    )
    return Survey(spec, number_files(found, rows, hashes), np.cumsum(rows), index, skipped)


def survey_openai(found: Sequence[Found], hashes: Sequence[str], request: Request, skipped: int) -> Survey:
    """Find the lines.

    Raises:
        SourceError: for an id or columns of the user's, which such lines do not have.
    """
    _no_options(request)
    if request.id not in {None, CUSTOM_ID} or request.columns not in (None, [BODY]) or request.join:
        raise SourceError(f"lines of OpenAI's batch format have the id {CUSTOM_ID!r} and the column {BODY!r}")
    rows, index = _scan_all(found, lambda _: None)
    spec = SourceSpec(
        kind="openai",
        urls=request.urls,
        id=CUSTOM_ID,
        columns=[BODY],
        join=[],
        schema=TableSchema.of(pa.schema({CUSTOM_ID: pa.string(), BODY: pa.string()})),
        content=request.content,
    )
    return Survey(spec, number_files(found, rows, hashes), np.cumsum(rows), index, skipped)


def _no_options(request: Request) -> None:
    if request.options:
        raise SourceError(f"JSON lines: unknown option {next(iter(request.options))!r}")


def _scan_all(found: Sequence[Found], visit: Any) -> tuple[list[int], dict[int, Any]]:
    rows, index = [], {}
    for position, file in enumerate(map(as_input, found)):
        count, index[position] = scan(file, start_of(file), None, visit)
        rows.append(count)
    return rows, index


def is_openai(found: Sequence[Found]) -> bool:
    """Whether the first line of all is one of OpenAI's batch format."""
    for file in map(as_input, found):
        with open_file(file) as source:
            for block in blocks(source, start_of(file), file.size, None, name=file.name, block_bytes=1 << 16):
                if len(block):
                    line = _line(block.record(0))
                    return isinstance(line, dict) and {CUSTOM_ID, BODY} <= set(line)
    return False


def _line(record: bytes) -> dict[str, Any] | str:
    """The object of a line, or why there is none."""
    try:
        value = msgspec.json.decode(record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        return f"the line is no JSON: {err}"
    return value if isinstance(value, dict) else f"the line is no JSON object but a {type(value).__name__}"


def _parse_at_once(block: Block, schema: pa.Schema | None) -> pa.Table | None:
    """By Arrow; None if a line does not fit."""
    data = block.text()
    if not data:
        return pa.table({})
    try:
        table = pa_json.read_json(
            io.BytesIO(data),
            read_options=pa_json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            parse_options=pa_json.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior="infer" if schema is None else "ignore"
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError):
        return None
    return table if table.num_rows == len(block) else None


class JsonlReader(TextReader):
    """Parses lines by the types of the plan."""

    def parse(self, file: InputFile, block: Block) -> Piece:
        """At once; line by line where that fails."""
        table = _parse_at_once(block, self.own) if len(self.own) else None
        if table is not None:
            batches = table.combine_chunks().to_batches()
            if len(batches) == 1:
                return Piece(batches[0].select(self.own.names).cast(self.own), {})
        return rows_to_batch(self.own, file, block, [_line(block.record(index)) for index in range(len(block))])


class OpenAIReader(TextReader):
    """Takes lines apart; bodies stay JSON, for the model to read."""

    def parse(self, file: InputFile, block: Block) -> Piece:
        """Line by line: each body is a text of its own."""
        decoder = msgspec.json.Decoder(_Line)
        rows: list[dict[str, object] | str] = []
        for index in range(len(block)):
            try:
                line = decoder.decode(block.record(index))
                rows.append({CUSTOM_ID: line.custom_id, BODY: bytes(line.body).decode("utf-8")})
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as err:
                rows.append(f"the line is none of OpenAI's batch format: {err}")
        return rows_to_batch(self.own, file, block, rows)
