"""Backfills on real workers without the client: plan, drive, compare. For tests and for the chaos runs."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from nograd.tasks.backfill import layout
from nograd.tasks.backfill import plan as plans
from nograd.tasks.backfill.draft import draft, head
from nograd.tasks.backfill.plan import Job
from nograd.tasks.backfill.progress import progress
from nograd.tasks.backfill.pump import pump
from nograd.tasks.backfill.sources import Survey, survey
from nograd.tasks.backfill.store import open_store
from nograd.tasks.backfill.task import Calibration, Sample, hints_of, send_chunk, send_sample
from nograd.tasks.backfill.verify import verify
from nograd.tasks.backfill.window import Window


class Paused(Exception):  # noqa: N818 - what a test expects is no error
    """A worker has paused the backfill."""


def calibrated(client: Any, model: str, found: Survey, rows: int = 64) -> Calibration:
    """What a worker finds out over some rows."""
    extents = [*head(found, rows), *head(found, rows, found.rows // 2)]
    of_images = found.spec.kind == "images"
    files = {
        n: found.files[n] for each in extents for n in range(each.file, each.file + (each.count if of_images else 1))
    }
    told = send_sample(client.app, Sample(model, found.spec, files, extents, {}, seconds=1)).get(timeout=60)
    return msgspec.convert(told, Calibration)


def planned(client: Any, model: str, source: Any, out: Any, rows_per_chunk: int, **options: Any) -> Job:
    """A backfill, planned with the help of a worker; ``options`` are those of the survey."""
    found = survey(source, **options)
    calibration = calibrated(client, model, found)
    made = draft(
        found,
        rows_per_chunk=rows_per_chunk,
        batch_rows=calibration.batch_rows,
        model=calibration.model,
        prediction=calibration.prediction.to_arrow().field("prediction").type,
    )
    return plans.save(open_store(out), made)


def window_of(client: Any, job: Job) -> Window:
    """The hints of a backfill."""
    return Window(client.app.backend.client, hints_of(job))


def drive(client: Any, job: Job, seconds: float = 60, until: Callable[[], object] = lambda: False) -> Window:
    """Keep a backfill going until it is done, or something is the case; its hints.

    Raises:
        Paused: if it pauses, with the reason.
        AssertionError: if it takes longer.
    """
    window, end = window_of(client, job), time.monotonic() + seconds
    while pump(job, window, lambda chunk: send_chunk(client.app, job, chunk, None)).missing and not until():
        if window.wish == "pause":
            raise Paused(window.why)
        assert time.monotonic() < end, progress(job)
        time.sleep(0.1)
    return window


def run(client: Any, job: Job, seconds: float = 60) -> Any:
    """Run a backfill to its end and verify it; its predictions, in order."""
    drive(client, job, seconds)
    verify(job).check()
    return ds.dataset(f"{job.store.url}/{layout.PARTS}").to_table()


def errors(job: Job) -> list[dict[str, Any]]:
    """The failed rows."""
    lines = [line for name in job.store.names(layout.ERRORS) for line in read_lines(job, f"{layout.ERRORS}/{name}")]
    return [json.loads(line) for line in lines]


def read_lines(job: Job, name: str) -> list[bytes]:
    """Of a file of the output."""
    return io.BytesIO(job.store.read(name)).readlines()


def committed(job: Job) -> dict[str, bytes]:
    """Every byte that a crash must not change: parts, errors, manifest and its name in ``_SUCCESS``."""
    names = [f"{folder}/{name}" for folder in (layout.PARTS, layout.ERRORS) for name in job.store.names(folder)]
    return {name: job.store.read(name) for name in [*names, layout.MANIFEST, layout.SUCCESS]}


def ids(job: Job) -> list[Any]:
    """The ids of the parts and errors files, as they stand there, chunk by chunk."""
    found: list[Any] = []
    for name in job.store.names(layout.PARTS):
        found += pq.read_table(job.store.open(f"{layout.PARTS}/{name}"))[job.plan.source.id].to_pylist()
    return found + [each["id"] for each in errors(job)]
