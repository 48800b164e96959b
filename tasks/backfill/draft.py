"""From a survey to a plan: which rows are which chunk.

Laws: every selected row is in exactly one chunk, in input order; the cut depends on nothing but the inputs' rows and
the numbers given; the last tenth of the rows is cut into quarter chunks, so that no worker is left alone with a whole
one at the end; a chunk ends at the end of a file or row group if that is within a quarter of its size.
No rows at all are one chunk: its part is empty, and has the declared schema.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from nograd.tasks.errors import BackfillError, SourceError

from . import duplicates as ids
from .plan import (
    Draft,
    Extent,
    InputDigest,
    ModelIdentity,
    OutputFormat,
    OutputSpec,
    Plan,
    Selection,
    TableSchema,
    input_table,
    range_table,
    table_sha256,
)
from .sources import Survey, reader_of
from .sources.base import INDEX_ROWS, only_id
from .sources.images import PATH

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
else:
    from .extra import np, pa

#: the last so many of the rows are cut smaller …
_TAIL = 10
#: … by so much; and an edge so near, in parts of a chunk, is where it is cut
_QUARTER = 4


def draft(
    survey: Survey,
    *,
    rows_per_chunk: int,
    batch_rows: int,
    model: ModelIdentity,
    prediction: pa.DataType,
    output: OutputFormat | None = None,
    parameters: Mapping[str, Any] | None = None,
    selection: Selection | None = None,
    duplicates: Literal["error", "keep"] = "error",
    rows: npt.NDArray[np.int64] | None = None,
) -> Draft:
    """Make a plan; `plan.save` writes it down.

    Args:
        survey: of the inputs.
        rows_per_chunk: so that a chunk takes 5 to 60 seconds.
        batch_rows: of one forward.
        model: which.
        prediction: type of the predictions (`output.infer_type` finds it from some); whatever does not fit it later is
            an error row.
        output: format of the parts; ``openai`` for OpenAI's lines, else ``parquet``.
        parameters: of the run that may change predictions.
        selection: which rows, all by default.
        duplicates: refuse ids that occur twice, or let them pass, counted.
        rows: these rows, ascending, instead of a selection.

    Raises:
        SourceError: if ids occur twice and may not; the message names some.
        BackfillError: for a number that makes no sense.
    """
    chosen = selection or Selection()
    for name, value in (
        ("rows_per_chunk", rows_per_chunk),
        ("batch_rows", batch_rows),
        ("limit", 1 if chosen.limit is None else chosen.limit),
        ("sample", 1 if chosen.sample is None else chosen.sample),
    ):
        if value < 1:
            raise BackfillError(f"{name} is {value}; it must be at least 1")
    repeated = _duplicates(survey, duplicates)
    most = survey.rows if chosen.limit is None else min(chosen.limit, survey.rows)
    picked = _sample(most, chosen) if rows is None else rows
    extents = list(_extents(survey, most, picked, rows_per_chunk))
    inputs, ranges = input_table(survey.files), range_table(extents)
    written = output or ("openai" if survey.spec.kind == "openai" else "parquet")
    if written == "openai" and survey.spec.kind != "openai":
        raise BackfillError("the output format 'openai' is for inputs of that format")
    schema = survey.spec.schema.to_arrow()
    columns = [schema.field(name) for name in [survey.spec.id, *survey.spec.join]]
    plan = Plan(
        source=survey.spec,
        inputs=InputDigest(
            files=len(survey.files),
            bytes=sum(file.size for file in survey.files),
            rows=survey.rows,
            skipped=survey.skipped,
            duplicates=repeated,
            sha256=table_sha256(inputs),
        ),
        selection=chosen,
        rows=most if picked is None else len(picked),
        chunks=extents[-1].chunk + 1 if extents else 1,
        rows_per_chunk=rows_per_chunk,
        batch_rows=batch_rows,
        ranges=table_sha256(ranges),
        model=model,
        parameters=dict(parameters or {}),
        output=OutputSpec(
            format=written, schema=TableSchema.of(pa.schema([*columns, pa.field("prediction", prediction)]))
        ),
        duplicates=duplicates,
        versions={name: importlib.metadata.version(name) for name in ("nograd", "pyarrow")},
    )
    return Draft(plan, inputs, ranges)


def head(survey: Survey, rows: int, start: int = 0) -> list[Extent]:
    """Some neighbouring rows of the inputs, before there is a plan: for a calibration."""
    stop = min(start + rows, survey.rows)
    return list(_by_file(survey, _starts(survey), 0, start, stop)) if start < stop else []


def _duplicates(survey: Survey, policy: Literal["error", "keep"]) -> int:
    spec = survey.spec
    if spec.id not in {name for name, _ in spec.schema.fields} or spec.id == "row":
        return 0  # positions are what they are
    everything = head(survey, survey.rows)

    def arrays() -> Iterator[pa.Array]:
        if spec.id == PATH and spec.kind == "images":
            for first in range(0, len(survey.files), 65_536):
                yield pa.array([file.name for file in survey.files[first : first + 65_536]])
            return
        reader = reader_of(only_id(spec), lambda first, count: survey.files[first : first + count])
        for piece in reader.slices(everything, 65_536):
            yield piece.batch.column(spec.id)

    count, examples = ids.find(arrays)
    if count and policy == "error":
        shown = ", ".join(map(repr, examples))
        raise SourceError(
            f"column {spec.id!r} names {count} rows by an id another row before them has ({shown}); "
            "choose another id, or allow duplicates"
        )
    return count


def _sample(rows: int, selection: Selection) -> npt.NDArray[np.int64] | None:
    """The sampled rows, ascending; None for all."""
    if selection.sample is None or selection.sample >= rows:
        return None
    # Of raw bits, whose order numpy promises to keep; a sample of more than half is drawn by what it leaves out.
    bits = np.random.PCG64(selection.seed)
    left_out = selection.sample > rows // 2
    size = rows - selection.sample if left_out else selection.sample
    drawn: npt.NDArray[np.int64] = np.empty(0, np.int64)
    while len(drawn) < size:
        # Draw, drop what was drawn before, draw again: memory of the sample's size, not of the inputs'.
        more = (bits.random_raw(size - len(drawn)) % np.uint64(rows)).astype(np.int64)
        drawn = np.unique(np.concatenate([drawn, more]))
    return np.setdiff1d(np.arange(rows), drawn, assume_unique=True) if left_out else drawn


def cuts(rows: int, rows_per_chunk: int, edges: Sequence[int] | npt.NDArray[np.int64] = ()) -> list[int]:
    """Where chunks end, the last at ``rows``."""
    marks = np.append(np.asarray(edges, np.int64), rows)
    marks = np.unique(marks[marks <= rows])
    small = max(1, rows_per_chunk // _QUARTER)
    tail = rows // _TAIL if rows > rows_per_chunk else 0
    ends: list[int] = []
    at = 0
    while at < rows:
        size = rows_per_chunk if rows - at > tail else small
        end = min(at + size, rows)
        slack = size // _QUARTER
        first, last = np.searchsorted(marks, [max(end - slack, at + 1), end + slack + 1])
        near = marks[first:last]
        if len(near):
            end = int(near[np.argmin(np.abs(near - end))])
        ends.append(end)
        at = end
    return ends


def _extents(survey: Survey, rows: int, picked: npt.NDArray[np.int64] | None, rows_per_chunk: int) -> Iterator[Extent]:
    ends = cuts(rows, rows_per_chunk, survey.edges) if picked is None else cuts(len(picked), rows_per_chunk)
    starts = _starts(survey)
    for chunk, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        for first, last in [(start, end)] if picked is None else _runs(picked[start:end]):
            yield from _by_file(survey, starts, chunk, first, last)


def _runs(rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of neighbours."""
    breaks = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
    for first, last in zip([0, *breaks], [*breaks, len(rows)], strict=True):
        yield int(rows[first]), int(rows[last - 1]) + 1


def _by_file(survey: Survey, starts: npt.NDArray[np.int64], chunk: int, row: int, stop: int) -> Iterator[Extent]:
    if survey.spec.kind == "images":
        yield Extent(chunk=chunk, file=row, first=0, count=stop - row, row=row)
        return
    while row < stop:
        file = int(np.searchsorted(starts, row, "right")) - 1
        count = min(stop, survey.files[file].start + survey.files[file].rows) - row
        yield _extent(survey, chunk, file, row, count)
        row += count


def _starts(survey: Survey) -> npt.NDArray[np.int64]:
    return np.array([file.start for file in survey.files], np.int64)


def _extent(survey: Survey, chunk: int, file: int, row: int, count: int) -> Extent:
    first = row - survey.files[file].start
    if file not in survey.offsets:
        return Extent(chunk=chunk, file=file, first=first, count=count, row=row)
    known = survey.offsets[file]
    mark, skip = divmod(first, INDEX_ROWS)
    behind = -(-(first + count) // INDEX_ROWS)
    return Extent(
        chunk=chunk,
        file=file,
        first=first,
        count=count,
        row=row,
        offset=int(known[mark]),
        skip=skip,
        end=int(known[behind]) if behind < len(known) else survey.files[file].size,
    )
