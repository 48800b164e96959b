"""Parts and errors files: what a chunk's rows look like in the output.

Laws:

* The same rows and predictions make the same bytes, however they were sliced and whoever wrote them: rows are in input
  order, row groups have a fixed size, and no time and no name of a worker is in a part.
* A prediction that does not fit the declared type is an error row, never a crash and never silently cut.
* Every row of the chunk is in the part or in the errors file, and in one of them only; `PartWriter.finish` counts.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from nograd.tasks.errors import BackfillError

from .commit import Part
from .plan import Plan
from .rows import MISFIT, RowFailure, Slice, fits

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    import pyarrow.parquet as pq
else:
    from .extra import np, pa, pq


def infer_type(predictions: Sequence[Any] | pa.Array | np.ndarray[Any, Any]) -> pa.DataType:
    """The type to declare for predictions like these.

    Arrays keep their own type; of plain values: numbers of which one is a float are floats, keys that some lack may be
    missing, null goes with everything.

    Raises:
        BackfillError: if the values have no type in common.
    """
    try:
        kind = as_array(predictions).type
    except MISFIT as err:
        raise BackfillError(f"the predictions have no type in common: {err}") from err
    return pa.string() if pa.types.is_null(kind) else _without_null(kind)


def _without_null(kind: pa.DataType) -> pa.DataType:
    """Empty lists and keys that were always null have no type yet; text takes the least."""
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _without_null(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(_without_null(kind.value_type))
    return kind


def as_array(predictions: Sequence[Any] | pa.Array | np.ndarray[Any, Any], kind: pa.DataType | None = None) -> pa.Array:
    """Predictions as a column: an Arrow array as it is, an array of numbers without an object per row.

    An array of ``n`` rows and more dimensions becomes lists of lists.
    """
    if isinstance(predictions, pa.Array | pa.ChunkedArray):
        column = predictions.combine_chunks() if isinstance(predictions, pa.ChunkedArray) else predictions
        return column if kind is None else column.cast(kind)
    if not hasattr(predictions, "dtype"):
        return pa.array(predictions, kind)
    array = np.ascontiguousarray(predictions)
    column = pa.array(array.reshape(-1))
    for axis in reversed(range(1, array.ndim)):
        offsets = np.arange(math.prod(array.shape[:axis]) + 1) * array.shape[axis]
        column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), column)
    return column if kind is None else column.cast(kind)


class PartWriter:
    """Collects the rows of one chunk, in order.

    Args:
        plan: what they are rows of.
        chunk: which.
        rows: how many there must be in the end.
    """

    def __init__(self, plan: Plan, chunk: int, rows: int) -> None:
        self._plan = plan
        self._chunk = chunk
        self._rows = rows
        self._schema = plan.output.schema.to_arrow()
        self._kind = self._schema.field("prediction").type
        self._rows_ok = 0
        self._batches: list[pa.RecordBatch] = []
        self._numbers: list[pa.Array] = []  # of OpenAI's lines only
        self._failures: list[RowFailure] = []
        self._groups = _Groups(plan, chunk, self._schema) if plan.output.format == "parquet" else None

    def add(
        self,
        piece: Slice,
        predictions: Sequence[Any] | pa.Array | np.ndarray[Any, Any],
        failures: Mapping[int, RowFailure] | None = None,
    ) -> None:
        """Add the rows of a slice: those that could not be read, those that failed, those with a prediction.

        Args:
            piece: the slice.
            predictions: one for each of its good rows, in order; what stands at a failed one is ignored.
            failures: position among the good rows → why it failed.

        Raises:
            BackfillError: if the numbers do not match: nobody knows whose prediction is whose.
        """
        good = piece.good_indices
        if len(predictions) != len(good):
            raise BackfillError(f"{len(predictions)} predictions for {len(good)} rows")
        bad = {int(good[index]): failure for index, failure in (failures or {}).items()}
        if failures:
            usable = np.delete(np.arange(len(good)), list(failures))
            good, predictions = good[usable], _take(predictions, usable)
        column, misfits = self._fit(predictions)
        ids = piece.batch.column(self._plan.source.id)
        for index, message in misfits.items():
            at = int(good[index])
            bad[at] = RowFailure(
                row=piece.rows[at].as_py(), id=ids[at].as_py(), stage="output", type="output_type", message=message
            )
        rows = np.delete(good, list(misfits)) if misfits else good
        everything = len(rows) == len(piece)
        kept = piece.batch if everything else piece.batch.take(rows)
        arrays = [column if field.name == "prediction" else kept.column(field.name) for field in self._schema]
        done = pa.RecordBatch.from_arrays(arrays, schema=self._schema)
        self._rows_ok += len(rows)
        if self._groups is not None:
            self._groups.add(done)
        else:
            self._batches.append(done)
            self._numbers.append(piece.rows if everything else piece.rows.take(rows))
        self._failures.extend(failure for _, failure in sorted({**bad, **piece.failures}.items()))

    def finish(self) -> Part:
        """The bytes of the chunk.

        Raises:
            BackfillError: if rows are missing or too many.
        """
        if self._rows_ok + len(self._failures) != self._rows:
            raise BackfillError(
                f"chunk {self._plan.chunk_id(self._chunk)}: {self._rows_ok} predictions and {len(self._failures)} "
                f"failed rows are not the {self._rows} rows of the plan"
            )
        data: bytes | memoryview
        if self._groups is not None:
            data = self._groups.finish()
        else:
            table = pa.Table.from_batches(self._batches, self._schema)
            data = self._openai(table) if self._plan.output.format == "openai" else _lines(table.to_pylist())
        failed = self._openai_errors() if self._plan.output.format == "openai" else _lines(self._failures)
        return Part(data=data, errors=failed, rows_ok=self._rows_ok, rows_err=len(self._failures))

    def _fit(self, predictions: Any) -> tuple[pa.Array, dict[int, str]]:
        """The predictions in the declared type, and which do not fit."""
        try:
            if hasattr(predictions, "dtype") or isinstance(predictions, pa.Array | pa.ChunkedArray):
                own = as_array(predictions)
                if _lossless(own.type, self._kind):
                    return own.cast(self._kind), {}
                predictions = own.to_pylist()
            elif all(fits(value, self._kind) for value in predictions):
                return pa.array(predictions, self._kind), {}
        except MISFIT:
            predictions = predictions.tolist() if hasattr(predictions, "tolist") else list(predictions)
        fitting, misfits = [], {}
        for index, value in enumerate(predictions):
            try:
                if not fits(value, self._kind):
                    raise TypeError
                fitting.append(pa.array([value], self._kind))
            except MISFIT:
                misfits[index] = f"the prediction {_shown(value)} is no {self._kind}"
        return (pa.concat_arrays(fitting) if fitting else pa.array([], self._kind)), misfits

    def _openai(self, table: pa.Table) -> bytes:
        rows = table.to_pylist()
        numbers = [number for array in self._numbers for number in array.to_pylist()]
        return _lines(
            [
                self._line(
                    number,
                    row["custom_id"],
                    {
                        "status_code": 200,
                        "request_id": self._request(number),
                        "body": {"model": self._plan.model.name, "prediction": row["prediction"]},
                    },
                    None,
                )
                for number, row in zip(numbers, rows, strict=True)
            ]
        )

    def _openai_errors(self) -> bytes:
        return _lines(
            [
                {
                    **self._line(failure.row, failure.id, None, {"code": failure.type, "message": failure.message}),
                    "row": failure.row,
                    "stage": failure.stage,
                }
                for failure in self._failures
            ]
        )

    def _line(self, number: int, custom_id: Any, response: Any, error: Any) -> dict[str, Any]:
        return {"id": self._request(number), "custom_id": custom_id, "response": response, "error": error}

    def _request(self, number: int) -> str:
        return f"batch_req_{self._plan.job}_{number}"


class _Groups:
    """A Parquet file, written row group by row group: what is held is one group, not a chunk.

    Holding predictions for longer would cost many times their size: they lie among what the forwards of a model take
    and give back, and the heap cannot use what is between them.
    """

    def __init__(self, plan: Plan, chunk: int, schema: pa.Schema) -> None:
        metadata = {
            "nograd.plan": plan.sha256,
            "nograd.chunk": str(chunk),
            "nograd.model": plan.model.name,
            "nograd.model_sha256": plan.model.sha256,
            "nograd.versions": msgspec.json.encode(
                {**plan.versions, **plan.model.versions}, order="deterministic"
            ).decode(),
        }
        self._schema = schema.with_metadata(metadata)
        # Not Arrow's own stream: that one doubles and copies as it grows, and Arrow's pool keeps what it has left.
        self._sink = io.BytesIO()
        self._file = pq.ParquetWriter(
            self._sink, self._schema, compression="zstd", version="2.6", write_statistics=True
        )
        self._group_rows = plan.output.row_group_rows
        self._held: list[pa.RecordBatch] = []
        self._rows = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Write the groups that are full now."""
        self._held.append(batch)
        self._rows += batch.num_rows
        while self._rows >= self._group_rows:
            self._write(self._group_rows)

    def finish(self) -> memoryview:
        """The file; no copy of it."""
        self._write(self._rows)
        self._file.close()
        return self._sink.getbuffer().toreadonly()

    def _write(self, rows: int) -> None:
        table = pa.Table.from_batches(self._held, self._held[0].schema if self._held else self._schema)
        if rows:
            group = table.slice(0, rows).combine_chunks()
            self._file.write_table(group.replace_schema_metadata(self._schema.metadata), rows)
        pa.default_memory_pool().release_unused()  # what reading and encoding have freed; Arrow's pool would keep it
        self._rows -= rows
        self._held = table.slice(rows).to_batches()


def _take(predictions: Any, indices: npt.NDArray[np.int64]) -> Any:
    if isinstance(predictions, pa.Array | pa.ChunkedArray):
        return predictions.take(pa.array(indices))
    return predictions[indices] if hasattr(predictions, "dtype") else [predictions[index] for index in indices]


def _lossless(own: pa.DataType, declared: pa.DataType) -> bool:
    """Whether a cast cannot turn one value into another."""
    if own.equals(declared):
        return True
    if pa.types.is_list(own) and pa.types.is_list(declared):
        return _lossless(own.value_type, declared.value_type)
    if pa.types.is_integer(own):  # a safe cast: what does not fit raises
        return bool(pa.types.is_integer(declared) or pa.types.is_floating(declared))
    return bool(pa.types.is_floating(own) and pa.types.is_floating(declared) and own.bit_width <= declared.bit_width)


def _lines(rows: Sequence[Any]) -> bytes:
    encoder = msgspec.json.Encoder()
    return b"".join(encoder.encode(row) + b"\n" for row in rows)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"
