"""What a worker does with a chunk's message when something is wrong: the runner itself, a real model, a real Redis."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

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
from nograd.tasks.backfill.window import Traffic, Window
from nograd.tasks.celery import create_app
from nograd.tasks.modelfile import load_model_file
from nograd.tasks.settings import Settings
from nograd.workers.backfill.runner import BoundTask, ChunkRunner
from nograd.workers.engine import Engine, Hooks
from nograd.workers.models import open_model
from waiting import PATIENCE_S as TIMEOUT

MODELS = """
[length]
loader = "python"
class = "runner_models:Length"
input = "text"
batch = { max_items = 4 }
"""
CLASSES = """
import threading

forwards = []
#: of whoever prepares the row, or runs the batch, that says so
arrived, gate = threading.Event(), threading.Event()


def wait(text):
    arrived.set()
    assert gate.wait(180)
    return text


class Length:
    def load(self, device):
        pass

    def prepare(self, text):
        return wait(text) if text == "wait before" else text

    def forward(self, batch):
        forwards.append(list(batch))
        if "wait on it" in batch:
            wait("")
        if "raise" in batch:
            raise ValueError("I do not like it")
        return [len(text) for text in batch]
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "runner_models.py").write_text(CLASSES)
    (folder / "models.toml").write_text(MODELS)
    hooks = Hooks(on_abandoned=lambda job: job.withdraw())
    engine = Engine(load_model_file(folder / "models.toml"), ["length"], hooks, device=torch.device("cpu"))
    engine.start()
    yield engine
    engine.finish()


@pytest.fixture
def code(engine):
    """The model's module."""
    code = sys.modules["runner_models"]
    code.forwards.clear()
    code.arrived.clear()
    code.gate.clear()
    yield code
    code.gate.set()


@pytest.fixture
def reload(engine):
    """Does what ``nograd models load --reload`` does."""

    def reload():
        file = load_model_file(engine.models["length"].file)
        engine.remove("length").result(TIMEOUT)
        engine.add(open_model(file, "length")).result(TIMEOUT)

    return reload


@pytest.fixture
def runner(engine, connection):
    return ChunkRunner(engine, connection, "w", threads=1, claim_s=3)


@pytest.fixture
def job(runner, tmp_path):
    """Four chunks of five rows; of the first, three rows fail."""
    texts = ["raise" if n < 3 else "x" * n for n in range(20)]
    texts[19], texts[10:14] = "wait before", ["wait on it", "raise", "raise", "raise"]
    pq.write_table(pa.table({"n": range(20), "text": texts}), tmp_path / "in.parquet")
    made = draft(
        survey(tmp_path / "in.parquet", id="n"),
        rows_per_chunk=5,
        batch_rows=4,
        model=runner._identity(runner._hosted("length")),
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


def test_a_chunk_is_run_although_redis_knows_a_pause_from_before_the_last_resume(runner, app, job, window):
    window.wish = "pause"
    assert "given_up" in run(runner, app, job, 1)
    state.write(job.store, State(since=window.now()))
    run(runner, app, job, 1)
    assert 1 in committed_chunks(job.store)


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


def check_left_to_others(job, window, chunk, outcome):
    """The message goes to another worker, nobody issues it meanwhile, and nothing of the chunk is there."""
    assert isinstance(outcome, Reject)
    assert outcome.requeue
    assert chunk not in committed_chunks(job.store)
    assert window.traffic() == Traffic(queued=1, running=0)


def test_no_chunk_is_run_by_two_models_of_one_name(runner, app, job, window, code, reload):
    """The first rows were run, none is on the device: there is nothing that an unload would have to wait for."""
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(run, runner, app, job, 3)
        assert code.arrived.wait(TIMEOUT)
        reload()
        code.gate.set()
        check_left_to_others(job, window, 3, running.exception(TIMEOUT))
    assert not any("wait before" in batch for batch in code.forwards)


def test_no_chunk_is_committed_if_another_model_came_in_the_last_moment(
    runner, app, job, window, code, reload, engine, monkeypatch
):
    code.gate.set()
    put, blocks = engine.queue.put, []

    def late(items):
        """A model that comes between the look at who is there and the queue."""
        blocks.append(items)
        if len(blocks) == 2:  # the last one
            assert blocks[0][0].job.wait(TIMEOUT)  # the other one was the old model's
            reload()
        return put(items)

    monkeypatch.setattr(engine.queue, "put", late)
    with pytest.raises(Reject) as rejected:
        run(runner, app, job, 3)
    check_left_to_others(job, window, 3, rejected.value)
    monkeypatch.undo()
    run(runner, app, job, 3)
    assert committed_chunks(job.store) == [3]


def test_what_is_left_of_a_chunk_that_was_given_up_takes_no_turn_on_the_device(runner, app, job, code, engine, caplog):
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(run, runner, app, job, 2)
        assert code.arrived.wait(TIMEOUT)  # all of these rows would have to be run alone
        runner.closing.set()
        assert isinstance(running.exception(TIMEOUT), Reject)
    code.gate.set()
    before = len(code.forwards)
    while len(engine.queue):
        idle = threading.Event()
        assert engine.queue.call(idle.set)
        assert idle.wait(TIMEOUT)
    assert len(code.forwards) == before == 1
    assert not [each for each in caplog.records if each.levelname == "CRITICAL"]
