"""The failed rows, and running them again.

A retry is a backfill of its own, of the failed rows alone, in the same folder: its plan and its commits stand under
``_retry/1/``, its parts beside the others as ``parts/retry-1-part-….parquet``. What was committed before stays as it
is, and the dataset ``out/parts`` gains the rows that succeed now: every row is in it once at most.

Whatever works on a backfill works on a retry: it is a `plan.Job` on a `RetryStore`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from nograd.tasks.errors import BackfillError, PlanChanged

from . import commit, layout
from .draft import draft
from .plan import Draft, Job, ModelIdentity, find
from .rows import RowFailure
from .sources import survey
from .sources.base import ROW
from .store import Store

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
else:
    from .extra import np

_NUMBERS = re.compile(r"\d+(\.\d+)?")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


class RetryStore:
    """The n-th retry in an output folder, seen as an output folder of its own.

    Attributes:
        url: of the folder, with the retry's number.
    """

    def __init__(self, store: Store, number: int) -> None:
        self._store = store
        self._prefix = f"{layout.RETRY}-{number}-"
        self._folder = f"_{layout.RETRY}/{number}"
        self.url = f"{store.url}#{layout.RETRY}-{number}"

    def probe(self) -> str:
        """Of the folder."""
        return self._store.probe()

    def stage(self, data: bytes, folder: str = layout.STAGING) -> str:
        """Apart from what the backfill itself has staged: closing that one sweeps its own."""
        return self._store.stage(data, self._name(folder)).removeprefix(f"{self._folder}/")

    def create(self, name: str, data: bytes) -> bool:
        """Of the retry."""
        return self._store.create(self._name(name), data)

    def settle(self, staged: str, name: str, size: int) -> None:
        """Of the retry."""
        self._store.settle(self._name(staged), self._name(name), size)

    def replace(self, name: str, data: bytes) -> None:
        """Of the retry."""
        self._store.replace(self._name(name), data)

    def read(self, name: str) -> bytes:
        """Of the retry."""
        return self._store.read(self._name(name))

    def open(self, name: str) -> BinaryIO:
        """Of the retry."""
        return self._store.open(self._name(name))

    def size(self, name: str) -> int | None:
        """Of the retry."""
        return self._store.size(self._name(name))

    def names(self, folder: str) -> list[str]:
        """Of the retry."""
        if folder not in {layout.PARTS, layout.ERRORS}:
            return self._store.names(self._name(folder))
        return [name.removeprefix(self._prefix) for name in self._store.names(folder) if name.startswith(self._prefix)]

    def remove(self, name: str) -> None:
        """Of the retry."""
        self._store.remove(self._name(name))

    def _name(self, name: str) -> str:
        folder, _, rest = name.partition("/")
        if folder in {layout.PARTS, layout.ERRORS}:
            return f"{folder}/{self._prefix}{rest}"
        return f"{self._folder}/{name}"


def retries(store: Store) -> list[Job]:
    """The retries of a backfill, in order."""
    found: list[Job] = []
    while (job := find(RetryStore(store, len(found) + 1))) is not None:
        found.append(job)
    return found


def failures(job: Job) -> Iterator[RowFailure]:
    """The committed failures of a backfill, or of one retry of it, in input order."""
    for record in commit.records(job.store, job.plan):
        if record.errors is not None:
            for line in job.store.read(record.errors.name).splitlines():
                yield _failure(msgspec.json.decode(line))


def _failure(line: Mapping[str, Any]) -> RowFailure:
    if "custom_id" in line:  # in the shape of OpenAI's batch output
        error = line["error"]
        line = {**line, "id": line["custom_id"], "type": error["code"], "message": error["message"]}
    return RowFailure(**{name: line[name] for name in RowFailure.__struct_fields__})


def remaining(job: Job) -> dict[int, RowFailure]:
    """Row → why it failed, for the rows that no retry has mended yet.

    Args:
        job: the backfill itself.
    """
    open_ones = {failure.row: failure for failure in failures(job)}
    for again in retries(job.store):
        for chunk in commit.committed_chunks(again.store):
            for extent in again.extents(chunk):
                for row in range(extent.row, extent.row + extent.count):
                    open_ones.pop(row, None)
        open_ones.update({failure.row: failure for failure in failures(again)})
    return dict(sorted(open_ones.items()))


class Cluster(msgspec.Struct, frozen=True):
    """Failures that look alike.

    Attributes:
        stage: where.
        type: of the error.
        message: of the first; numbers and quoted words differ in the others.
        count: how many.
        examples: rows, three at most.
    """

    stage: str
    type: str
    message: str
    count: int
    examples: list[int]


def clusters(found: Iterable[RowFailure]) -> list[Cluster]:
    """Group failures by stage, type and the words of their message, the largest group first."""
    counts: Counter[tuple[str, str, str]] = Counter()
    firsts: dict[tuple[str, str, str], tuple[str, list[int]]] = {}
    for failure in found:
        words = _NUMBERS.sub("#", _QUOTED.sub("'…'", failure.message))
        key = (failure.stage, failure.type, words)
        counts[key] += 1
        _, rows = firsts.setdefault(key, (failure.message, []))
        if len(rows) < 3:
            rows.append(failure.row)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    found_ones = []
    for alike, count in ordered:
        message, rows = firsts[alike]
        found_ones.append(Cluster(alike[0], alike[1], message, count, rows))
    return found_ones


def draft_retry(
    job: Job,
    *,
    rows_per_chunk: int,
    model: ModelIdentity | None = None,
    parameters: Mapping[str, Any] | None = None,
    which: Callable[[RowFailure], bool] = lambda _: True,
) -> tuple[RetryStore, Draft]:
    """Plan to run failed rows again; ``plan.save(*draft_retry(…))`` writes it down.

    Output and predictions are declared as in the backfill; model and parameters may be others, if that is the cure.

    Args:
        job: the backfill itself.
        rows_per_chunk: of the retry.
        model: as it is now; the backfill's if None.
        parameters: as they are now; the backfill's if None.
        which: of the rows that still fail.

    Raises:
        BackfillError: if there is nothing to run again, or the last retry is not finished.
        PlanChanged: if the inputs are not those of the backfill.
    """
    before = retries(job.store)
    if before and len(commit.committed_chunks(before[-1].store)) < before[-1].plan.chunks:
        raise BackfillError(f"{before[-1].store.url} is not finished: resume it first")
    rows: npt.NDArray[np.int64] = np.array([row for row, why in remaining(job).items() if which(why)], np.int64)
    if not len(rows):
        raise BackfillError(f"{job.store.url}: no failed row to run again")
    plan, spec = job.plan, job.plan.source
    own = spec.kind in {"images", "openai"}
    found = survey(
        spec.urls,
        kind=spec.kind,
        id=None if own or spec.id == ROW else spec.id,
        columns=None if own else spec.columns,
        join=spec.join,
        options=spec.options,
        content=spec.content,
        allow_null=spec.allow_null,
    )
    made = draft(
        found,
        rows_per_chunk=rows_per_chunk,
        batch_rows=plan.batch_rows,
        model=model or plan.model,
        prediction=plan.output.schema.to_arrow().field("prediction").type,
        output=plan.output.format,
        parameters=plan.parameters if parameters is None else parameters,
        duplicates=plan.duplicates,
        rows=rows,
    )
    if made.plan.inputs.sha256 != plan.inputs.sha256 or made.plan.source != spec:
        raise PlanChanged(f"the inputs of {job.store.url} changed since its plan was made")
    return RetryStore(job.store, len(before) + 1), made
