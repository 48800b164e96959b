"""The failed rows, and running them again.

A retry is a backfill of its own, of the failed rows alone, in the same folder: its plan and its commits stand under
``_retry/1/``, its parts beside the others as ``parts/retry-1-part-….parquet``. What was committed before stays as it
is, and the dataset ``out/parts`` gains the rows that succeed now: every row is in it once at most.

Whatever works on a backfill works on a retry: it is a `plan.Job` on a `RetryStore`.

A retry that cannot go on, because the model is another one by now, is given up (`give_up`): the rows it has not run
failed as they had before, by a commit like any other, so that a worker that still runs them loses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from nograd.tasks.errors import BackfillError, NotFinished, PlanChanged

from . import commit, layout
from .draft import draft
from .failures import failures
from .finalize import finalize
from .output import PartWriter
from .plan import Draft, Job, ModelIdentity, find
from .rows import RowFailure, Slice
from .sources import survey
from .sources.base import ROW
from .store import Store
from .store_retry import RetryStore

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
else:
    from .extra import np, pa


def retries(store: Store, known: int = 0) -> list[Job]:
    """The retries of a backfill, in order, without the first ones that are known."""
    found: list[Job] = []
    while (job := find(RetryStore(store, known + len(found) + 1))) is not None:
        found.append(job)
    return found


def remaining(job: Job, retry: int | None = None) -> dict[int, RowFailure]:
    """Row → why it failed, for the rows that no retry has mended yet.

    Args:
        job: the backfill itself.
        retry: look at so many retries only, the first ones.
    """
    open_ones = {failure.row: failure for failure in failures(job)}
    for again in retries(job.store)[:retry]:
        for row in mended(again):
            open_ones.pop(row, None)
        open_ones.update({failure.row: failure for failure in failures(again)})
    return dict(sorted(open_ones.items()))


def mended(again: Job) -> set[int]:
    """The rows that have a committed prediction of a retry."""
    done = commit.committed_chunks(again.store)
    return rows_of(again, done) - {failure.row for failure in failures(again)}


def rows_of(job: Job, chunks: Iterable[int]) -> set[int]:
    """The rows of some chunks."""
    extents = (extent for chunk in chunks for extent in job.extents(chunk))
    return {row for extent in extents for row in range(extent.row, extent.row + extent.count)}


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
        NotFinished: if the backfill, or the last retry of it, is not finished.
        BackfillError: if there is nothing to run again.
        PlanChanged: if the inputs are not those of the backfill.
    """
    before = retries(job.store)
    last = [job, *before][-1]
    if len(commit.committed_chunks(last.store)) < last.plan.chunks:
        raise NotFinished(f"{last.store.url} is not finished: resume it first")
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


def give_up(job: Job) -> int:
    """End the retry that is not finished as it stands; what it has committed stays.

    Args:
        job: the backfill itself.

    Returns:
        Rows it has not run.

    Raises:
        BackfillError: if there is no such retry.
        OutputError: if the folder cannot be written; what is not given up then can be later.
    """
    every = retries(job.store)
    again = every[-1] if every else job
    if not every or again.store.size(layout.SUCCESS) is not None:
        raise BackfillError(f"{job.store.url}: no retry is under way")
    failed, rows = remaining(job, len(every) - 1), 0
    done = set(commit.committed_chunks(again.store))
    for chunk in range(again.plan.chunks):
        if chunk not in done:
            given_up = [failed[row] for row in sorted(rows_of(again, [chunk]))]
            rows += len(given_up) if _commit_failed(again, chunk, given_up) else 0
    finalize(again)
    return rows


def _commit_failed(again: Job, chunk: int, rows: list[RowFailure]) -> bool:
    """Commit a chunk without a prediction; False if somebody has committed it with some."""
    schema = again.plan.source.schema.to_arrow()
    nothing = pa.RecordBatch.from_arrays([pa.nulls(len(rows), field.type) for field in schema], schema=schema)
    numbers = pa.array([failure.row for failure in rows], pa.int64())
    writer = PartWriter(again.plan, chunk, len(rows))
    writer.add(Slice(0, nothing, numbers, dict(enumerate(rows))), [])
    now = time.time()
    return commit.commit(
        again.store, again.plan, chunk, writer.finish(),
        started_at=now, ended_at=now, worker="none", deviations=["given up before it was run"],
    ).won  # fmt: skip
