"""A small backfill from end to end, without workers: the model adds up, or doubles, or measures."""

import pyarrow as pa

from nograd.tasks.backfill import plan as plans
from nograd.tasks.backfill.commit import commit
from nograd.tasks.backfill.draft import draft
from nograd.tasks.backfill.output import PartWriter
from nograd.tasks.backfill.plan import ModelIdentity
from nograd.tasks.backfill.sources import open_reader, survey
from nograd.tasks.backfill.store import open_store

MODEL = ModelIdentity(name="doubler", parts={"weights": "ab12"}, versions={"torch": "2.15"})


def planned(source, out, prediction=None, rows_per_chunk=100, **options):
    """Survey, draft and save; options are sorted out by name."""
    of_draft = {
        name: options.pop(name) for name in ("selection", "output", "duplicates", "parameters") if name in options
    }
    model = options.pop("model", MODEL)
    found = survey(source, **options)
    made = draft(
        found,
        rows_per_chunk=rows_per_chunk,
        batch_rows=16,
        model=model,
        prediction=pa.float64() if prediction is None else prediction,
        **of_draft,
    )
    return plans.save(open_store(out), made)


def double(batch):
    return [2.0 * value for value in batch.column(1).to_pylist()]


def run(job, score=double, chunks=None, worker="w", rows=16, reader=None):
    """Read, score and commit chunks."""
    reader = reader or open_reader(job)
    for chunk in range(job.plan.chunks) if chunks is None else chunks:
        writer = PartWriter(job.plan, chunk, job.rows_of(chunk))
        for piece in reader.slices(job.extents(chunk), rows):
            writer.add(piece, score(piece.good))
        commit(
            job.store,
            job.plan,
            chunk,
            writer.finish(),
            started_at=10.0 * chunk,
            ended_at=10.0 * chunk + 9,
            worker=worker,
        )
    return job


def read_all(job):
    """Every slice of every chunk: values by column, failures."""
    reader = open_reader(job)
    rows, failures = [], []
    for chunk in range(job.plan.chunks):
        for piece in reader.slices(job.extents(chunk), 7):
            rows.extend(piece.good.to_pylist())
            failures.extend(piece.failures[index] for index in sorted(piece.failures))
    return rows, failures
