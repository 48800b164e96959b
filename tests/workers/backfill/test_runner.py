"""What a worker does with a chunk's message when something is wrong: the runner itself, a real model, a real Redis."""

from __future__ import annotations

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
import torch
from celery.exceptions import Reject, Retry

from nograd.producer.embedded import free_port
from nograd.tasks.backfill import plan as plans
from nograd.tasks.backfill import state
from nograd.tasks.backfill.commit import committed_chunks
from nograd.tasks.backfill.draft import draft
from nograd.tasks.backfill.sources import survey
from nograd.tasks.backfill.state import State
from nograd.tasks.backfill.store import open_store
from nograd.tasks.backfill.task import RUN_CHUNK, ChunkCall, hints_of
from nograd.tasks.backfill.window import Window
from nograd.tasks.celery import create_app
from nograd.tasks.modelfile import load_model_file
from nograd.tasks.settings import Settings
from nograd.workers.backfill.runner import BoundTask, ChunkRunner
from nograd.workers.engine import Engine

MODELS = """
[length]
loader = "python"
class = "runner_models:Length"
input = "text"
batch = { max_items = 4 }
"""
CLASSES = """
class Length:
    def load(self, device):
        pass

    def forward(self, batch):
        if "raise" in batch:
            raise ValueError("I do not like it")
        return [len(text) for text in batch]
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "runner_models.py").write_text(CLASSES)
    (folder / "models.toml").write_text(MODELS)
    engine = Engine(load_model_file(folder / "models.toml"), ["length"], device=torch.device("cpu"))
    engine.start()
    yield engine
    engine.finish()


@pytest.fixture
def connection(redis_url):
    with redis.Redis.from_url(redis_url) as connection:
        connection.flushdb()
        yield connection


@pytest.fixture
def app(redis_url, connection):
    app = create_app(Settings(redis_url=redis_url))
    yield app
    app.close()


@pytest.fixture
def runner(engine, connection):
    return ChunkRunner(engine, connection, "w", threads=1, claim_s=3)


@pytest.fixture
def job(runner, tmp_path):
    """Four chunks of five rows; of the first, three rows fail."""
    texts = ["raise" if n < 3 else "x" * n for n in range(20)]
    pq.write_table(pa.table({"n": range(20), "text": texts}), tmp_path / "in.parquet")
    made = draft(
        survey(tmp_path / "in.parquet", id="n"),
        rows_per_chunk=5,
        batch_rows=4,
        model=runner._identity("length"),
        prediction=pa.int64(),
    )
    return plans.save(open_store(tmp_path / "out"), made)


@pytest.fixture
def window(connection, job):
    return Window(connection, hints_of(job))


def run(runner, app, job, chunk, **more):
    """A chunk's message, as Celery hands it over."""
    task = app.tasks[RUN_CHUNK]
    call = msgspec.convert({"out": job.store.url, "plan": job.plan.sha256, "chunk": chunk, **more}, ChunkCall)
    request = {"id": f"c{chunk}", "kwargs": msgspec.to_builtins(call), "delivery_info": {"priority": 9}}
    task.push_request(called_directly=False, **request)
    try:
        return runner.run_chunk(BoundTask(task, None), call)
    finally:
        task.pop_request()


def test_the_budget_is_the_one_of_the_last_resume_whatever_a_message_says(runner, app, job, window):
    state.write(job.store, State(error_budget=2.0))
    run(runner, app, job, 0, budget=2.0)
    assert (window.wish, window.why) == ("pause", "error budget exceeded: 3 failed rows of 20 planned ones")
    state.write(job.store, State(error_budget=5.0))
    window.wish = "run"
    run(runner, app, job, 1, budget=2.0)
    assert committed_chunks(job.store) == [0, 1]
    assert window.wish == "run"


@pytest.fixture
def away():
    """The URL of a Redis that does not answer."""
    return f"redis://127.0.0.1:{free_port()}/0"


def test_trouble_of_which_redis_cannot_be_told_keeps_the_message(engine, app, job, away):
    """The folder cannot be read, and Redis is away: nobody would ever look at the chunk again."""
    runner = ChunkRunner(engine, redis.Redis.from_url(away), "w", threads=1, claim_s=3)
    (job.store.root / "_plan.json").unlink()
    with pytest.raises(Retry):
        run(runner, app, job, 0)


def test_a_message_stays_when_redis_takes_no_copy_of_it_for_later(engine, job, away):
    app = create_app(Settings(redis_url=away))
    app.conf.task_publish_retry_policy = {"max_retries": 0}
    runner = ChunkRunner(engine, redis.Redis.from_url(away), "w", threads=1, claim_s=3)
    with pytest.raises(Reject) as rejected:
        run(runner, app, job, 0)
    assert rejected.value.requeue
