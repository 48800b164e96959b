"""Backfills on real workers: their models, the command line, and what plans, drives and compares without a client.

For tests and for the chaos runs.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
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
from waiting import PATIENCE_S

#: the command
NOGRAD = Path(sys.executable).with_name("nograd")
#: seconds between two times at which `forget` does
FORGET_S = 2.0
#: of `backfill_models`
MODELS = """
[linear]
loader = "module"
class = "backfill_models:Linear"
weights = "linear.pth"
input = "rows"
shape = [4]
batch = { max_items = 32 }

[area]
loader = "python"
class = "backfill_models:Area"
input = "image"
batch = { max_items = 8 }

[scored]
loader = "python"
class = "backfill_models:Scored"
input = "text"
batch = { max_items = 8 }

[slow]
loader = "python"
class = "backfill_models:Slow"
input = "text"
batch = { max_items = 8 }

[rude]
loader = "python"
class = "backfill_models:Rude"
input = "text"
batch = { max_items = 8 }
hard_timeout_s = 2
"""


def write_models(folder: Path) -> Path:
    """The models of a run; their model file."""
    shutil.copy(Path(__file__).with_name("backfill_models.py"), folder)
    (folder / "models.toml").write_text(MODELS)
    write_weights(folder, [1.0, 2.0, 3.0, 4.0])
    return folder / "models.toml"


def write_weights(folder: Path, weights: Sequence[float]) -> None:
    """Those of ``linear``: its prediction is the sum of four numbers, so weighted."""
    import torch  # the chaos runs' driver and most tests do without

    torch.save({"layer.weight": torch.tensor([weights]), "layer.bias": torch.zeros(1)}, folder / "linear.pth")


def score(text: str) -> dict[str, Any]:
    """What ``scored``, ``slow`` and ``rude`` make of a text they like."""
    return {"length": len(text), "score": len(text) / 7}


def nograd(url: str, *words: object) -> tuple[int, dict[str, Any]]:
    """Run ``nograd backfill … --json``; its exit code, and the last document it prints."""
    command = [NOGRAD, "backfill", *map(str, words), "--json"]
    env = {**os.environ, "NOGRAD_REDIS_URL": url}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


class Paused(Exception):  # noqa: N818 - what a test expects is no error
    """A worker has paused the backfill."""


def calibrated(client: Any, model: str, found: Survey, rows: int) -> Calibration:
    """What a worker finds out over some rows."""
    extents = [*head(found, rows), *head(found, rows, found.rows // 2)]
    of_images = found.spec.kind == "images"
    files = {
        n: found.files[n] for each in extents for n in range(each.file, each.file + (each.count if of_images else 1))
    }
    told = send_sample(client.app, Sample(model, found.spec, files, extents, {}, seconds=1)).get(timeout=PATIENCE_S)
    return msgspec.convert(told, Calibration)


def planned(
    client: Any, model: str, source: Any, out: Any, rows_per_chunk: int, *, sampled: int = 64, **options: Any
) -> Job:
    """A backfill, planned with the help of a worker over some rows; ``options`` are those of the survey."""
    found = survey(source, **options)
    calibration = calibrated(client, model, found, sampled)
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


def drive(client: Any, job: Job, seconds: float = PATIENCE_S, until: Callable[[], object] = lambda: False) -> Window:
    """Keep a backfill going until it is done, or something is the case; its hints.

    Raises:
        Paused: if it pauses, with the reason.
        AssertionError: if it takes longer.
    """
    window, end = window_of(client, job), time.monotonic() + seconds
    while pump(job, window, lambda chunk: send_chunk(client.app, job, chunk)).missing and not until():
        if window.wish == "pause":
            raise Paused(window.why)
        assert time.monotonic() < end, progress(job)
        time.sleep(0.1)
    return window


def send_first(client: Any, job: Job) -> Window:
    """Have the first chunk of a backfill run and no other, until `let_go_on`; its hints."""
    window = window_of(client, job)
    others = Window(client.app.backend.client, hints_of(job), claim_s=3600)
    for chunk in range(1, job.plan.chunks):
        assert others.claim(chunk, "a test")
    assert window.top_up(range(job.plan.chunks), most=1) == [0]
    send_chunk(client.app, job, 0)
    return window


def let_go_on(window: Window, job: Job) -> None:
    """Its other chunks may be sent."""
    for chunk in range(1, job.plan.chunks):
        window.release(chunk, "a test")


def forget(window: Window) -> Callable[[], None]:
    """To be called again and again: the hints are lost, every `FORGET_S`, since a worker that is held renews its claim.

    Not each time: what is missing would be sent each time, and a slow machine would not get through all the messages.
    """
    due = time.monotonic()

    def again() -> None:
        nonlocal due
        if time.monotonic() >= due:
            window.clear()
            due = time.monotonic() + FORGET_S

    return again


def run(client: Any, job: Job, seconds: float = PATIENCE_S) -> Any:
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
