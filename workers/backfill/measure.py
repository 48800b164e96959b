"""What scoring a sample shows: the pace, the type of the predictions, the size of the output."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from nograd.tasks.backfill.failures import normalised
from nograd.tasks.backfill.output import as_array, infer_type
from nograd.tasks.backfill.plan import ModelIdentity, SourceSpec, TableSchema
from nograd.tasks.backfill.rows import RowFailure, Slice
from nograd.tasks.backfill.task import Calibration

from .scoring import Scored, Scorer

#: predictions that are kept, to find their type and size
KEPT = 50_000
#: reasons that are told, each with a row as its example
ERRORS = 5


class Measurement:
    """Counts and keeps; one sample."""

    def __init__(self, source: SourceSpec) -> None:
        self._source = source
        self._rows = self._failed = self._timed = 0
        self._seconds = 0.0
        self._kept: list[Scored] = []
        self._reasons: dict[str, list[Any]] = {}

    def watch(self, scorer: Scorer, slices: Iterable[Slice], seconds: float) -> None:
        """Score slices until they end or the time is over, the first one to the end in any case."""
        began = time.perf_counter()
        until = began + seconds
        last: float | None = None
        for scored in scorer.score(_until(slices, until)):
            now = time.perf_counter()
            self._add(scored)
            if last is not None:  # the first one paid for opening files and filling the pipeline
                self._timed += len(scored.piece)
                self._seconds += now - last
            last = now
        if not self._timed and last is not None:
            self._timed, self._seconds = self._rows, last - began

    def result(self, batch_rows: int, model: ModelIdentity) -> dict[str, Any]:
        """A `Calibration`, as JSON holds it."""
        good = [_good(scored) for scored in self._kept]
        prediction = _type_of(good)
        calibration = Calibration(
            rows=self._timed,
            failed=self._failed,
            seconds=self._seconds,
            out_bytes=0 if prediction is None else self._out_bytes(good, prediction),
            batch_rows=batch_rows,
            prediction=None if prediction is None else TableSchema.of(pa.schema({"prediction": prediction})),
            errors=[_told(*each) for each in self._reasons.values()],
            model=model,
        )
        told: dict[str, Any] = msgspec.to_builtins(calibration)
        return told

    def _add(self, scored: Scored) -> None:
        self._rows += len(scored.piece)
        failures = [*scored.piece.failures.values(), *scored.failures.values()]
        self._failed += len(failures)
        for each in failures:
            reason = normalised(each.message)
            if reason in self._reasons:
                self._reasons[reason][1] += 1
            elif len(self._reasons) < ERRORS:
                self._reasons[reason] = [each, 0]
        if self._rows <= KEPT or not self._kept:
            self._kept.append(scored)

    def _out_bytes(self, good: list[Any], prediction: pa.DataType) -> int:
        """Bytes of a part with all rows that were timed, from a real part of those that were kept."""
        names = [self._source.id, *self._source.join]
        arrays = [as_array(values, prediction) for values in good if len(values)]
        kept = sum(map(len, arrays))
        inputs = pa.Table.from_batches([scored.piece.batch for scored in self._kept]).select(names).slice(0, kept)
        table = inputs.append_column("prediction", pa.chunked_array(arrays, prediction).slice(0, inputs.num_rows))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        size: int = sink.getvalue().size
        return round(size / max(1, kept) * self._timed)


def _until(slices: Iterable[Slice], until: float) -> Iterator[Slice]:
    for number, piece in enumerate(slices):
        if number and time.perf_counter() > until:
            return
        yield piece


def _told(failure: RowFailure, others: int) -> str:
    also = f" and {others:,} other{'s' * (others != 1)}" if others else ""
    return f"{failure.label}{also}: {failure.message}"


def _good(scored: Scored) -> Any:
    """The predictions of the rows that have one."""
    if not scored.failures:
        return scored.predictions
    return [value for index, value in enumerate(scored.predictions) if index not in scored.failures]


def _type_of(good: list[Any]) -> pa.DataType | None:
    arrays = [values for values in good if hasattr(values, "dtype")]
    if arrays:
        return infer_type(arrays[0])
    values = [value for part in good for value in part]
    return infer_type(values) if values else None
