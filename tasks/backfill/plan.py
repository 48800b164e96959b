"""The plan: what will be scored, by what, into what; decided once, before the first row is scored.

Laws:

* The same inputs, model, parameters and options make the same plan, byte by byte, on any machine at any time: it holds
  no time, no name of a host, no output folder.
* A plan is written once. A folder that has one takes no other (`PlanChanged` says in what they differ).
* Whoever reads a plan reads it whole: its sha256 covers the tables of inputs and of extents, too.

An *extent* is a run of neighbouring rows of one file (for images: a run of neighbouring files). A chunk is one or more
extents, in order, and the unit of work and of commit.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from nograd.tasks.errors import BackfillError, OutputError, PlanChanged
from nograd.tasks.structs import decodable

from . import layout
from .store import Store

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
else:
    from .extra import pa, pc, pq

#: written into every plan; a plan of another version is refused
VERSION = 1

SourceKind = Literal["parquet", "csv", "jsonl", "openai", "images"]
OutputFormat = Literal["parquet", "jsonl", "openai"]

#: what may stand in a folder without a plan: a planning was interrupted there
_LEFT_BY_PLANNING = frozenset({layout.PLAN_FOLDER, layout.STAGING})
#: other names that are told
_SHOWN = 5

#: rows of `_plan/*.parquet` that are read together to find a few
_GROUP_ROWS = 16_384


class _Frozen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all parts of a plan are."""


class TableSchema(_Frozen, frozen=True, kw_only=True):
    """Names and types of columns.

    Attributes:
        fields: for people: ``[["age", "int64"], …]``.
        arrow: for programs: the Arrow schema, serialised, base64.
    """

    fields: list[tuple[str, str]]
    arrow: str

    @classmethod
    def of(cls, schema: pa.Schema) -> TableSchema:
        """Write down an Arrow schema, without its metadata."""
        bare = schema.remove_metadata()
        return cls(
            fields=[(field.name, str(field.type)) for field in bare],
            arrow=base64.b64encode(bare.serialize().to_pybytes()).decode(),
        )

    def to_arrow(self) -> pa.Schema:
        """The Arrow schema."""
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(self.arrow)))


class SourceSpec(_Frozen, frozen=True, kw_only=True):
    """What is read, and how.

    Attributes:
        kind: the format.
        urls: folders, globs and files as they were given, made absolute; listed again when the backfill is resumed.
        id: the column that names a row in the output; ``row`` (its position in the input), ``path`` or ``custom_id``
            if the user named none.
        columns: what the model is given.
        join: what is copied into the output.
        schema: the columns that are read: id, columns and join.
        options: how the text is written: ``delimiter``, ``header``.
        content: whether the fingerprint holds the sha256 of each file, or its size and time alone.
        allow_null: whether a row with an empty value among ``columns`` reaches the model, or is an error row.
    """

    kind: SourceKind
    urls: list[str]
    id: str
    columns: list[str]
    join: list[str]
    schema: TableSchema
    options: dict[str, str | bool] = {}
    content: bool = False
    allow_null: bool = False


class ModelIdentity(_Frozen, frozen=True, kw_only=True):
    """Which model, exactly.

    Attributes:
        name: as in the model file.
        parts: key of its table in the model file → value, or digest of what that names.
        versions: the libraries that run it; they stand in the parts' metadata. A difference is a deviation, no change.
    """

    name: str
    parts: dict[str, str] = {}
    versions: dict[str, str] = {}

    @property
    def sha256(self) -> str:
        """Over name and parts."""
        return digest([self.name, self.parts])


class Selection(_Frozen, frozen=True, kw_only=True):
    """Which rows of the inputs.

    Attributes:
        limit: the first so many, None for all.
        sample: so many at random out of those, in input order, None for all.
        seed: of the sample.
    """

    limit: int | None = None
    sample: int | None = None
    seed: int = 0


class OutputSpec(_Frozen, frozen=True, kw_only=True):
    """What is written.

    Attributes:
        format: of the parts; ``openai``: lines in the shape of OpenAI's batch output.
        schema: of the parts: id, joined columns, ``prediction``.
        row_group_rows: rows in one Parquet row group.
    """

    format: OutputFormat
    schema: TableSchema
    row_group_rows: int = 8192

    @property
    def extension(self) -> str:
        """Of the parts' names."""
        return "parquet" if self.format == "parquet" else "jsonl"


class InputDigest(_Frozen, frozen=True, kw_only=True):
    """The inputs, in short.

    Attributes:
        files: how many.
        bytes: their size.
        rows: in all of them.
        skipped: files in the folders that are of another kind.
        duplicates: rows whose id another row before them has.
        sha256: of the table of inputs.
    """

    files: int
    bytes: int
    rows: int
    skipped: int
    duplicates: int
    sha256: str


@decodable
class Plan(_Frozen, frozen=True, kw_only=True):
    """Everything that decides the bytes of the output.

    Attributes:
        source: what is read.
        inputs: its files.
        selection: which of its rows.
        rows: how many those are.
        chunks: how many pieces of work.
        rows_per_chunk: of a full chunk.
        batch_rows: rows of one forward: batches are cut at multiples of it, counted from the chunk's first row.
        ranges: sha256 of the table of extents.
        model: what scores it.
        parameters: of the run, as far as they may change predictions.
        output: what is written.
        duplicates: whether two rows may have one id.
        versions: of what wrote the plan and of the libraries that write the parts.
        version: of this format.
    """

    source: SourceSpec
    inputs: InputDigest
    selection: Selection
    rows: int
    chunks: int
    rows_per_chunk: int
    batch_rows: int
    ranges: str
    model: ModelIdentity
    parameters: dict[str, Any] = {}
    output: OutputSpec
    duplicates: Literal["error", "keep"] = "error"
    versions: dict[str, str] = {}
    version: int = VERSION

    @property
    def sha256(self) -> str:
        """Names the plan; stands in every record, part and manifest."""
        return digest(self)

    @property
    def job(self) -> str:
        """Short name of the plan. Two folders may hold the same plan: a key needs the folder as well."""
        return self.sha256[:12]

    def chunk_id(self, chunk: int) -> str:
        """Name of a piece of work, for people and logs."""
        return f"{self.job}-{chunk:06d}"


class InputFile(msgspec.Struct, frozen=True):
    """One input file.

    Attributes:
        url: absolute path or URL.
        name: as it appears in ids and errors.
        size: in bytes.
        stamp: what changes with the content: time of the last change, or the store's ETag.
        sha256: of the content, empty if not asked for.
        rows: records in it.
        start: records before it, in the files before.
    """

    url: str
    name: str
    size: int
    stamp: str
    sha256: str
    rows: int
    start: int


class Extent(msgspec.Struct, frozen=True):
    """A run of rows.

    Attributes:
        chunk: which it belongs to.
        file: position in the table of inputs; of images: of the first file.
        first: the first row, counted in its file (images: 0).
        count: rows (images: files).
        row: the first row, counted over all inputs.
        offset: text: the byte from which to read; the start of a record, at or before the first row.
        skip: text: records between there and the first row.
        end: text: the byte by which all rows are read; the start of a record, or the file's end.
    """

    chunk: int
    file: int
    first: int
    count: int
    row: int
    offset: int = 0
    skip: int = 0
    end: int = 0


def encode(value: Any) -> bytes:
    """Canonical JSON: one value, one text."""
    return msgspec.json.encode(value, order="deterministic")


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of a value, in hex."""
    return hashlib.sha256(encode(value)).hexdigest()


class Job:
    """A plan and its tables, as they stand in an output folder; tables are read in pieces, when asked.

    Attributes:
        plan: the plan.
        store: where it stands.
    """

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan = plan
        self.store = store

    def extents(self, chunk: int) -> list[Extent]:
        """The rows of a chunk."""
        if not 0 <= chunk < self.plan.chunks:
            raise BackfillError(f"{self.plan.job} has {self.plan.chunks} chunks, there is no chunk {chunk}")
        return [Extent(**row) for row in self._ranges.where("chunk", chunk)]

    def rows_of(self, chunk: int) -> int:
        """How many rows a chunk has."""
        return sum(extent.count for extent in self.extents(chunk))

    def chunk_rows(self) -> Iterator[tuple[int, int]]:
        """Chunk and its number of rows, in order, for all chunks."""
        current, rows = 0, 0
        for row in self._ranges.rows("chunk", "count"):
            if row["chunk"] != current:
                yield current, rows
                current, rows = row["chunk"], 0
            rows += row["count"]
        yield current, rows

    def files(self, first: int, count: int = 1) -> list[InputFile]:
        """Input files by position."""
        return [InputFile(**row) for row in self._inputs.slice(first, count)]

    def all_files(self) -> Iterator[InputFile]:
        """All input files, in order."""
        return (InputFile(**row) for row in self._inputs.rows())

    @cached_property
    def _ranges(self) -> _Table:
        return _Table(self.store, f"{layout.PLAN_FOLDER}/ranges-{self.plan.ranges[:16]}.parquet")

    @cached_property
    def _inputs(self) -> _Table:
        return _Table(self.store, f"{layout.PLAN_FOLDER}/inputs-{self.plan.inputs.sha256[:16]}.parquet")


class _Table:
    """A table of the plan, read group by group; the last group stays."""

    def __init__(self, store: Store, name: str) -> None:
        self._file = pq.ParquetFile(store.open(name))
        self._last: tuple[int, pa.Table] | None = None

    def _group(self, index: int) -> pa.Table:
        if self._last is None or self._last[0] != index:
            self._last = (index, self._file.read_row_group(index))
        return self._last[1]

    def slice(self, first: int, count: int) -> list[dict[str, Any]]:
        """Rows by position."""
        found: list[dict[str, Any]] = []
        while len(found) < count:
            group, inside = divmod(first + len(found), _GROUP_ROWS)
            if group >= self._file.num_row_groups:
                break
            found.extend(self._group(group).slice(inside, count - len(found)).to_pylist())
        return found

    def rows(self, *columns: str) -> Iterator[dict[str, Any]]:
        """All rows, in order."""
        for batch in self._file.iter_batches(columns=list(columns) or None):
            yield from batch.to_pylist()

    def where(self, column: str, value: int) -> list[dict[str, Any]]:
        """The rows with that value in a sorted column."""
        position = self._file.schema_arrow.get_field_index(column)
        found: list[dict[str, Any]] = []
        for index in range(self._file.num_row_groups):
            bounds = self._file.metadata.row_group(index).column(position).statistics
            if bounds is not None and bounds.min <= value <= bounds.max:
                group = self._group(index)
                found.extend(group.filter(pc.equal(group[column], value)).to_pylist())
        return found


class Draft(msgspec.Struct, frozen=True):
    """A plan that is made but not yet written.

    Attributes:
        plan: the plan.
        inputs: table of `InputFile`.
        ranges: table of `Extent`.
    """

    plan: Plan
    inputs: pa.Table
    ranges: pa.Table


def save(store: Store, draft: Draft) -> Job:
    """Write a plan and its tables, the plan last.

    The folder is probed first. If it already has the same plan, nothing is written.

    Raises:
        PlanChanged: if it has another one.
        OutputError: if the folder cannot hold a backfill, holds something else, or stands among the inputs.
    """
    planned = find(store)
    if planned is None:
        check_apart(store.url, draft.plan.source.urls)
        check_vacant(store)
        store.probe()
        for kind, table, sha in (
            ("inputs", draft.inputs, draft.plan.inputs.sha256),
            ("ranges", draft.ranges, draft.plan.ranges),
        ):
            store.create(f"{layout.PLAN_FOLDER}/{kind}-{sha[:16]}.parquet", _parquet(table))
        body = {"job": draft.plan.job, "sha256": draft.plan.sha256, "plan": draft.plan}
        if store.create(layout.PLAN, msgspec.json.format(encode(body))):
            return Job(draft.plan, store)
        planned = load(store)
    differences = changes(planned.plan, draft.plan)
    if differences:
        raise PlanChanged(f"{store.url} holds another backfill: " + "; ".join(differences))
    return planned


def check_apart(out: str, inputs: Sequence[str]) -> None:
    """Refuse an output whose files would be inputs of the next listing.

    Inputs elsewhere below the output are no harm: what is written stands in folders of its own.

    Raises:
        OutputError: naming both.
    """
    for url in inputs:
        folder = f"{url.rstrip('/')}/"
        if f"{out}/".startswith(folder) or folder.startswith((f"{out}/{layout.PARTS}/", f"{out}/{layout.ERRORS}/")):
            raise OutputError(f"{out} is among the inputs ({url}): what is written there would be read as input")


def check_vacant(store: Store) -> None:
    """Refuse to begin a backfill among other files.

    What a planning that was interrupted has left is no hindrance, nor are names that begin with a dot.

    Raises:
        OutputError: naming some of what stands there.
    """
    others = [name for name in store.entries() if name not in _LEFT_BY_PLANNING and not name.startswith(".")]
    if others and store.size(layout.PLAN) is None:  # else somebody else has planned one this moment
        shown = ", ".join(others[:_SHOWN]) + (f" and {len(others) - _SHOWN:,} more" if len(others) > _SHOWN else "")
        raise OutputError(f"{store.url} is not empty and holds no backfill (there: {shown}); name a folder of its own")


def find(store: Store) -> Job | None:
    """The plan of a folder, None if there is none.

    Raises:
        BackfillError: if it cannot be read, or was edited.
    """
    try:
        raw = store.read(layout.PLAN)
    except FileNotFoundError:
        return None
    try:
        body = msgspec.json.decode(raw)
        plan = msgspec.convert(body["plan"], Plan)
    except (msgspec.MsgspecError, KeyError, TypeError, UnicodeDecodeError) as err:
        raise BackfillError(f"{store.url}/{layout.PLAN} is not a plan of this version: {err}") from err
    if plan.sha256 != body.get("sha256") or plan.version != VERSION:
        raise BackfillError(f"{store.url}/{layout.PLAN} is not what was written: its sha256 does not fit it")
    return Job(plan, store)


def load(store: Store) -> Job:
    """The plan of a folder.

    Raises:
        BackfillError: if there is none, or it cannot be read.
    """
    job = find(store)
    if job is None:
        raise BackfillError(f"{store.url} holds no backfill: there is no {layout.PLAN}")
    return job


def changes(planned: Plan, now: Plan) -> list[str]:
    """In what two plans differ, for people; empty if they are the same."""
    if planned.sha256 == now.sha256:
        return []
    found: list[str] = []
    _compare("", msgspec.to_builtins(planned), msgspec.to_builtins(now), found)
    return found


def _compare(where: str, old: Any, new: Any, found: list[str]) -> None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            if key != "arrow":  # the same is said, legibly, by ``fields``
                _compare(f"{where}.{key}" if where else key, old.get(key), new.get(key), found)
    elif old != new:
        found.append(f"{where} was {_short(old)}, is {_short(new)}")


def _short(value: Any) -> str:
    text = encode(value).decode()
    return text if len(text) <= 200 else f"{text[:200]}…"


def input_table(files: Sequence[InputFile]) -> pa.Table:
    """The table of inputs, as it is stored."""
    names = InputFile.__struct_fields__
    types = [pa.string(), pa.string(), pa.int64(), pa.string(), pa.string(), pa.int64(), pa.int64()]
    return _columns(files, names, types)


def range_table(extents: Sequence[Extent]) -> pa.Table:
    """The table of extents, as it is stored."""
    names = Extent.__struct_fields__
    return _columns(extents, names, [pa.int64()] * len(names))


def _columns(rows: Sequence[Any], names: Sequence[str], types: Sequence[Any]) -> pa.Table:
    columns = {
        name: pa.array([getattr(row, name) for row in rows], kind) for name, kind in zip(names, types, strict=True)
    }
    return pa.table(columns)


def table_sha256(table: pa.Table) -> str:
    """Over the values, whatever version of Parquet writes them down."""
    sha = hashlib.sha256()
    for batch in table.to_batches(max_chunksize=_GROUP_ROWS):
        sha.update(encode(batch.to_pydict()))
    return sha.hexdigest()


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=_GROUP_ROWS, compression="zstd")
    return bytes(sink.getvalue())
