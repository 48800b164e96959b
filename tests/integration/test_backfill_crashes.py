"""Whatever happens to workers and Redis: the committed bytes are those of a run that nothing happened to.

Each test plans the same backfill into a folder of its own, does some harm at one moment, goes on, and compares every
byte of parts, errors files and manifest with an undisturbed run by one worker. The moments are real: the model, or the
system call it watches in its process, holds the worker there until the test has done what it wants to do.
"""

from __future__ import annotations

import gc
import os
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis

import backfills
from crashes import LEASE_S, MOMENTS, Fleet, Moments, Redis, read_folder
from nograd.producer import Client
from nograd.tasks.backfill import plan as plans
from nograd.tasks.backfill.commit import find_record
from nograd.tasks.backfill.draft import draft
from nograd.tasks.backfill.fingerprint import check
from nograd.tasks.backfill.pump import pump
from nograd.tasks.backfill.sources import survey
from nograd.tasks.backfill.store import open_store
from nograd.tasks.backfill.task import send_chunk
from nograd.tasks.backfill.verify import verify
from nograd.tasks.backfill.window import Traffic
from nograd.tasks.errors import PlanChanged
from nograd.tasks.keys import PRIORITY_SUFFIXES, queue_name
from waiting import PATIENCE_S, until

#: workers are killed and started again in most of them, on a machine that may have other things to do
pytestmark = pytest.mark.timeout(600)

#: rows of the backfill, none a multiple of the chunk, and of a chunk, none a multiple of the batch
ROWS, CHUNK, BATCH = 187, 36, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crashes")
    backfills.write_models(folder)
    texts = ["raise" if n % 50 == 7 else "x" * (n % 23) for n in range(ROWS)]
    pq.write_table(pa.table({"n": range(ROWS), "text": texts}), folder / "in.parquet")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Redis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def fleet(folder, start_worker):
    return Fleet(start_worker, folder / "models.toml")


@pytest.fixture(scope="module")
def redis_url(server):
    yield server.url
    gc.collect()  # Celery's results unsubscribe when they are collected


@pytest.fixture(scope="module")
def client(redis_url, folder, fleet):
    with Client(redis_url, models=folder / "models.toml") as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(client, folder, fleet, tmp_path_factory):
    """What one worker makes of it when nothing happens."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    job = backfills.planned(client, "scored", folder / "in.parquet", out, CHUNK, id="n")
    backfills.run(client, job)
    fleet.replace()
    return job


@pytest.fixture
def job(undisturbed, tmp_path):
    """The same backfill, not yet begun."""
    return read_folder(undisturbed, tmp_path / "out")


@pytest.fixture
def moments(folder):
    moments = Moments(folder)
    yield moments
    moments.clear()


def check_same(job, undisturbed):
    """Every row once, every byte the same."""
    report = verify(job)
    report.check()
    assert report.rows_ok + report.rows_err == ROWS
    assert sorted(backfills.ids(job)) == list(range(ROWS))
    assert len(backfills.errors(job)) == len(range(7, ROWS, 50))
    assert backfills.committed(job) == backfills.committed(undisturbed)
    until(lambda: not job.store.names("_staging"), "the removal of what lost")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_killed_at_any_moment_changes_no_byte(client, fleet, job, undisturbed, moments, moment):
    fleet.replace()
    moments.arm(moment)
    backfills.drive(client, job, until=moments.reached)
    victim = fleet.of(moments.pid())
    victim.process.kill()
    victim.process.wait()
    moments.clear()
    fleet.replace()
    backfills.drive(client, job)
    check_same(job, undisturbed)


def let_lose(moments, job, winner):
    """The worker that is held goes on, with a chunk that another has committed."""
    moments.release()
    moments.wait_left()
    until(lambda: not job.store.names("_staging"), "the removal of what lost")
    assert find_record(job.store, job.plan, winner.chunk) == winner


def test_a_worker_frozen_for_longer_than_its_lease_loses_its_late_commit(client, fleet, job, undisturbed, moments):
    fleet.both()
    moments.arm("before the record")
    backfills.drive(client, job, until=moments.reached)
    frozen = fleet.of(moments.pid())
    chunk = moments.chunk()
    frozen.process.send_signal(signal.SIGSTOP)
    try:
        backfills.drive(client, job)
        winner = find_record(job.store, job.plan, chunk)
        assert winner.worker != frozen.name
    finally:
        frozen.process.send_signal(signal.SIGCONT)
    let_lose(moments, job, winner)
    check_same(job, undisturbed)
    assert frozen.alive()


def test_two_workers_on_one_chunk_commit_it_once(client, fleet, job, undisturbed, moments):
    fleet.both()
    moments.arm("before the record")
    window = backfills.drive(client, job, until=moments.reached)
    chunk, first = moments.chunk(), fleet.of(moments.pid())
    # Nobody remembers that it is being run; again and again, for the worker that is held renews its claim.
    backfills.drive(client, job, until=backfills.forget(window))
    winner = find_record(job.store, job.plan, chunk)
    let_lose(moments, job, winner)
    assert first.alive()
    check_same(job, undisturbed)


@pytest.mark.parametrize("moment", ["forward", "before the record"])
def test_redis_may_forget_everything(client, fleet, job, undisturbed, moments, moment):
    fleet.replace()
    moments.arm(moment)
    backfills.drive(client, job, until=moments.reached)
    client.app.backend.client.flushall()
    moments.release()
    backfills.drive(client, job)
    check_same(job, undisturbed)


def test_redis_is_killed_and_started_again(client, fleet, server, job, undisturbed, moments):
    fleet.replace()
    moments.arm("finish")
    backfills.drive(client, job, until=moments.reached)
    server.kill()
    moments.release()
    moments.wait_left()
    server.start()
    backfills.drive(client, job)
    check_same(job, undisturbed)


def test_chunks_whose_sender_died_before_it_sent_them_are_run_though_nobody_drives(client, fleet, job, undisturbed):
    fleet.replace()
    first, _ = backfills.window_of(client, job).top_up(range(job.plan.chunks), most=2)
    send_chunk(client.app, job, first)  # and here whoever sends dies
    until(lambda: job.store.size("_SUCCESS"), "the end")
    check_same(job, undisturbed)


def test_redis_is_killed_over_the_last_message_of_a_backfill_that_nobody_drives(
    client, fleet, server, job, undisturbed, moments
):
    fleet.replace()
    moments.arm("before the ack")  # and before the next chunks are issued
    (first,) = backfills.window_of(client, job).top_up(range(job.plan.chunks), most=1)
    send_chunk(client.app, job, first)
    until(moments.reached, "the commit")
    server.kill()
    moments.release()
    moments.wait_left()
    server.start()
    until(lambda: job.store.size("_SUCCESS"), "the end")
    check_same(job, undisturbed)


def test_redis_and_the_sender_die_between_issuing_chunks_and_sending_them(client, fleet, server, job, undisturbed):
    """No message, no driver, and workers that have nothing to do."""
    fleet.both()

    def die(_):
        server.kill()
        raise ConnectionError("the sender dies, too")

    with pytest.raises((ConnectionError, redis.ConnectionError)):
        pump(job, backfills.window_of(client, job), die)
    server.start()
    until(lambda: job.store.size("_SUCCESS"), "the end")
    check_same(job, undisturbed)


def test_redis_comes_back_with_an_older_dump_that_holds_no_message(folder, job, undisturbed, start_worker, tmp_path):
    """The driver was told that all is well, and has left."""
    (tmp_path / "redis").mkdir()
    server = Redis(tmp_path / "redis", durable=False)
    server.start()
    try:
        with Client(server.url, models=folder / "models.toml") as client:
            window, saved = backfills.window_of(client, job), []

            def send(chunk):
                saved or saved.append(server.save())
                send_chunk(client.app, job, chunk)

            assert pump(job, window, send).sent == 2
            waiting = queue_name("scored") + PRIORITY_SUFFIXES[-1]
            assert window.client.llen(waiting) == 2
            server.kill()
            server.start()
            assert window.traffic() == Traffic(queued=2, running=0)
            assert not window.client.exists(waiting)
        start_worker(
            folder / "models.toml", ready=False, redis_url=server.url, env={"NOGRAD_LEASE_S": str(LEASE_S)}.items()
        )
        until(lambda: job.store.size("_SUCCESS"), "the end")
    finally:
        start_worker.stop(server.url)
        server.kill()
    check_same(job, undisturbed)


def test_a_worker_told_to_stop_gives_its_chunk_up_and_another_runs_it(client, fleet, job, undisturbed, moments):
    fleet.both()
    moments.arm("forward")
    backfills.drive(client, job, until=moments.reached)
    leaving = fleet.of(moments.pid())
    leaving.process.terminate()
    until(lambda: "Warm shutdown" in leaving.text(), "its warm shutdown")
    moments.release()
    backfills.drive(client, job)
    assert leaving.process.wait(PATIENCE_S) == 0
    check_same(job, undisturbed)
    assert "Traceback" not in leaving.text().partition("Warm shutdown")[2]  # nothing is wrong


def test_a_cold_shutdown_ends_a_worker_that_is_preparing_a_row(client, fleet, job, undisturbed, moments):
    fleet.both()
    moments.arm("prepare")
    backfills.drive(client, job, until=moments.reached)
    leaving = fleet.of(moments.pid())
    leaving.process.send_signal(signal.SIGQUIT)
    leaving.process.wait(PATIENCE_S)
    moments.clear()
    fleet.replace()
    backfills.drive(client, job)
    check_same(job, undisturbed)


def test_other_numbers_of_workers_make_the_same_manifest(client, fleet, job, undisturbed):
    fleet.both()
    backfills.run(client, job)
    assert job.store.read("_SUCCESS") == undisturbed.store.read("_SUCCESS")
    workers = {find_record(job.store, job.plan, chunk).worker for chunk in range(job.plan.chunks)}
    assert len(workers) <= 2
    check_same(job, undisturbed)


@pytest.fixture
def numbers(tmp_path):
    pq.write_table(pa.table({name: range(200) for name in "abcd"}), tmp_path / "numbers.parquet")
    return tmp_path / "numbers.parquet"


def test_changed_weights_are_refused_by_name_until_they_are_put_back(client, fleet, folder, numbers, tmp_path):
    workers = [worker.name for worker in fleet.both()]
    job = backfills.planned(client, "linear", numbers, tmp_path / "out", 20)
    window = backfills.send_first(client, job)
    until(lambda: job.store.names("_commits"))
    backfills.write_weights(folder, [4.0, 3.0, 2.0, 1.0])
    try:
        reload(client, "linear", workers)
        backfills.let_go_on(window, job)
        with pytest.raises(backfills.Paused, match=r"model linear: weights was .*, is "):
            backfills.drive(client, job)
        assert len(job.store.names("_commits")) == 1
    finally:
        backfills.write_weights(folder, [1.0, 2.0, 3.0, 4.0])
        reload(client, "linear", workers)
    window.wish = "run"
    table = backfills.run(client, job)
    assert table["prediction"].to_pylist() == [10.0 * n for n in range(200)]


def reload(client, model, workers):
    told = client.broker.command("nograd_load", {"model": model, "reload": True}, workers, PATIENCE_S)
    assert set(told) == set(workers)

    def ready():
        pools = client.broker.workers(PATIENCE_S, workers).values()
        return len(pools) == len(workers) and all(each["hosting"][model]["status"] == "ready" for each in pools)

    until(ready, "the loading")


def test_a_changed_input_is_refused_by_name_until_it_is_put_back(client, fleet, numbers, tmp_path):
    fleet.replace()
    job = backfills.planned(client, "linear", numbers, tmp_path / "out", 20)
    told = numbers.stat()
    numbers.touch()
    with pytest.raises(backfills.Paused, match=r"numbers\.parquet was written after the plan was made"):
        backfills.drive(client, job)
    with pytest.raises(PlanChanged, match=r"numbers\.parquet was written after the plan was made"):
        check(job)
    os.utime(numbers, ns=(told.st_atime_ns, told.st_mtime_ns))
    check(job)
    backfills.window_of(client, job).wish = "run"
    assert backfills.run(client, job)["prediction"].to_pylist() == [10.0 * n for n in range(200)]


def test_no_rows_are_an_empty_part_with_its_schema(client, fleet, undisturbed, tmp_path):
    fleet.replace()
    pq.write_table(
        pa.table({"n": pa.array([], pa.int64()), "text": pa.array([], pa.string())}), tmp_path / "in.parquet"
    )
    identity, kind = undisturbed.plan.model, undisturbed.plan.output.schema.to_arrow().field("prediction").type
    found = survey(tmp_path / "in.parquet", id="n")
    made = draft(found, rows_per_chunk=CHUNK, batch_rows=BATCH, model=identity, prediction=kind)
    job = plans.save(open_store(tmp_path / "out"), made)
    table = backfills.run(client, job)
    assert table.num_rows == 0
    assert table.schema.field("prediction").type == kind


def test_rows_that_kill_or_hang_their_worker_are_found_and_cost_no_other_row(client, fleet, tmp_path):
    """Each takes three workers along: twice with its neighbours, once alone."""
    texts = {20: "exit", 70: "hang"}
    pq.write_table(
        pa.table({"n": range(96), "text": [texts.get(n, "y" * (n % 19)) for n in range(96)]}), tmp_path / "in.parquet"
    )
    job = backfills.planned(client, "rude", tmp_path / "in.parquet", tmp_path / "out", 48, id="n", sampled=8)
    backfills.drive(client, job, 400, until=fleet.replace)
    table = backfills.run(client, job)
    assert table["n"].to_pylist() == [n for n in range(96) if n not in texts]
    assert table["prediction"].to_pylist() == [backfills.score("y" * (n % 19)) for n in range(96) if n not in texts]
    assert [(each["id"], each["stage"], each["type"]) for each in backfills.errors(job)] == [
        (20, "crash", "worker_died"),
        (70, "crash", "worker_died"),
    ]
