"""A stock Celery worker that runs backfills without torch: real files, real commits, real messages.

Started by `test_backfill.workers`. The model ``doubler`` doubles the column it is given and fails at negative numbers;
``broken`` fails at everything. ``GATE`` names a file: while it is there, no chunk is begun. ``WEIGHTS`` is the digest
of the model.
"""

import os
import time
from pathlib import Path

import msgspec
import pyarrow as pa
from celery.concurrency.thread import TaskPool
from celery.signals import worker_ready
from kombu import Queue

from nograd.tasks import Settings, create_app, registry
from nograd.tasks.backfill import plan as plans
from nograd.tasks.backfill import state
from nograd.tasks.backfill.commit import commit, settled
from nograd.tasks.backfill.output import PartWriter
from nograd.tasks.backfill.plan import ModelIdentity, TableSchema
from nograd.tasks.backfill.pump import pump
from nograd.tasks.backfill.rows import RowFailure
from nograd.tasks.backfill.sources import open_reader, reader_of
from nograd.tasks.backfill.store import open_store
from nograd.tasks.backfill.task import Calibration, ChunkCall, Sample, hints_of, send_chunk
from nograd.tasks.backfill.window import Window

app = create_app(Settings.from_env())
app.conf.worker_consumer = "celery.worker.consumer:Consumer"
app.conf.worker_concurrency = 8
app.finalize()
MODELS = ("doubler", "broken")
app.conf.task_queues = [Queue(f"nograd.{name}", routing_key=f"nograd.{name}") for name in MODELS]
for task in ("nograd.run_chunk", "nograd.calibrate"):
    app.tasks.unregister(task) if task in app.tasks else None


class Pool(TaskPool):
    """Says which models it serves, as nograd's own does."""

    def _get_info(self):
        return {**super()._get_info(), "models": dict.fromkeys(MODELS)}


app.conf.worker_pool = Pool
GATE = Path(os.environ["GATE"])
OWNER = f"pid{os.getpid()}"


def identity(name):
    return ModelIdentity(name=name, parts={"weights": os.environ["WEIGHTS"]}, versions={"torch": "2.15"})


def score(name, piece, blame):
    """Predictions of the good rows, and which of them failed."""
    values = piece.good.column(blame["column"]).to_pylist()
    bad = {
        index: RowFailure(
            row=piece.rows[int(piece.good_indices[index])].as_py(),
            id=piece.batch.column(blame["id"])[int(piece.good_indices[index])].as_py(),
            stage="predict",
            type="model_failed",
            message=f"{value} is negative",
        )
        for index, value in enumerate(values)
        if value < 0 or name == "broken"
    }
    return [2.0 * value for value in values], bad


@app.task(name="nograd.calibrate")
def calibrate(**kwargs):
    sample = msgspec.convert(kwargs, Sample, str_keys=True)
    reader = reader_of(sample.source, lambda first, count: [sample.files[first + n] for n in range(count)])
    began, rows, errors = time.perf_counter(), 0, []
    for extent in sample.extents:
        for piece in reader.slices([extent], rows=16):
            _, bad = score(sample.model, piece, {"id": sample.source.id, "column": sample.source.columns[0]})
            rows += len(piece)
            errors += [f"{each.id}: {each.message}" for each in [*piece.failures.values(), *bad.values()]]
    every = len(errors) == rows
    return msgspec.to_builtins(
        Calibration(
            rows=rows,
            failed=len(errors),
            seconds=time.perf_counter() - began,
            out_bytes=20 * rows,
            batch_rows=16,
            prediction=None if every else TableSchema.of(pa.schema({"prediction": pa.float64()})),
            errors=errors[:5],
            model=identity(sample.model),
        )
    )


@app.task(name="nograd.run_chunk", acks_late=True, ignore_result=True)
def run_chunk(**kwargs):
    call = msgspec.convert(kwargs, ChunkCall)
    job = plans.load(open_store(call.out))
    window = Window(app.backend.client, hints_of(job))
    while GATE.exists():
        time.sleep(0.02)
    if window.wish_since(state.read(job.store).since) in ("pause", "cancel"):
        window.forget(call.chunk)
        return
    if settled(job.store, job.plan, call.chunk) is not None:
        window.forget(call.chunk)
    elif window.claim(call.chunk, OWNER):
        began = time.time()
        time.sleep(float(os.environ.get("CHUNK_S", "0")))
        writer = PartWriter(job.plan, call.chunk, job.rows_of(call.chunk))
        spec = job.plan.source
        for piece in open_reader(job).slices(job.extents(call.chunk), 16):
            writer.add(piece, *score(job.plan.model.name, piece, {"id": spec.id, "column": spec.columns[0]}))
        commit(
            job.store, job.plan, call.chunk, writer.finish(),
            started_at=began, ended_at=time.time(), worker=OWNER,
        )  # fmt: skip
        window.release(call.chunk, OWNER)
    pump(job, window, lambda chunk: send_chunk(app, job, chunk))


@worker_ready.connect
def register(**_):
    cards = [
        registry.ModelCard(name=name, loader="python", input="rows", queue=f"nograd.{name}", max_items=16)
        for name in MODELS
    ]
    registry.register(app.backend.client, cards)
