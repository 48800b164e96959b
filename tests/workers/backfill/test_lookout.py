"""Looks at open backfills: the real app and transport, a real Redis, real folders. Nobody runs the chunks."""

from __future__ import annotations

import logging
import os
import shutil
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis

from nograd.tasks.backfill import plan as plans
from nograd.tasks.backfill import state
from nograd.tasks.backfill.commit import commit
from nograd.tasks.backfill.draft import draft
from nograd.tasks.backfill.output import PartWriter
from nograd.tasks.backfill.plan import ModelIdentity
from nograd.tasks.backfill.sources import open_reader, survey
from nograd.tasks.backfill.state import State
from nograd.tasks.backfill.store import open_store
from nograd.tasks.backfill.task import hints_of
from nograd.tasks.backfill.watchlist import Watchlist
from nograd.tasks.backfill.window import SENDING_S, SPARE, Window
from nograd.tasks.keys import CHUNKS, PRIORITY_SUFFIXES
from nograd.workers.backfill.lookout import Lookout
from waiting import PATIENCE_S, until

LIST = "nograd.length" + PRIORITY_SUFFIXES[CHUNKS // 3]


def planned(tmp_path, rows, out="out"):
    pq.write_table(pa.table({"n": range(rows), "text": ["x"] * rows}), tmp_path / "in.parquet")
    model = ModelIdentity(name="length", parts={}, versions={})
    made = draft(
        survey(tmp_path / "in.parquet", id="n"), rows_per_chunk=10, batch_rows=4, model=model, prediction=pa.int64()
    )
    return plans.save(open_store(tmp_path / out), made)


@pytest.fixture
def job(tmp_path, connection):
    """Open, and without a message."""
    job = planned(tmp_path, 100)
    Watchlist(connection).put(job)
    return job


def lookout(app, connection, *models, **options):
    return Lookout(app, connection, lambda: models, every_s=0, **options)


def listed(connection):
    return connection.zcard("nograd:backfills:length")


def test_what_has_no_message_is_sent(app, connection, job):
    lookout(app, connection, "length").look()
    assert connection.llen(LIST) == SPARE
    lookout(app, connection, "length").look()
    assert connection.llen(LIST) == SPARE
    assert listed(connection)


def test_messages_it_cannot_see_are_not_sent_at_every_look(app, connection, job, redis_url):
    """The broker of a user's app is another database than its results: a Client of it may have planned the job."""
    broker = redis_url.rpartition("/")[0] + "/1"
    app.conf.update(broker_read_url=broker, broker_write_url=broker)
    with redis.Redis.from_url(broker) as there:
        there.delete(LIST)
        for _ in range(3):
            lookout(app, connection, "length").look()
            assert there.llen(LIST) == SPARE
            (queued,) = connection.keys(f"*{hints_of(job)}*queued")
            for chunk, issued in connection.zrange(queued, 0, -1, withscores=True):  # as if some time had gone by
                connection.zadd(queued, {chunk: issued - 2000 * SENDING_S})
        there.delete(LIST)


def test_nothing_is_looked_at_that_could_not_be_run_here(app, connection, job):
    lookout(app, connection, "another").look()
    lookout(app, connection).look()
    assert not connection.exists(LIST)
    assert listed(connection)


@pytest.mark.parametrize("where", ["Redis", "storage"])
@pytest.mark.parametrize("wish", ["pause", "cancel"])
def test_what_is_not_wanted_is_let_go_of(app, connection, job, where, wish):
    if where == "Redis":
        Window(connection, hints_of(job)).wish = wish
    else:
        state.write(job.store, State(wish=wish))
    lookout(app, connection, "length").look()
    assert not connection.exists(LIST)
    assert not listed(connection)


def test_what_is_done_is_closed_and_let_go_of(app, connection, job):
    for chunk in range(job.plan.chunks):
        writer = PartWriter(job.plan, chunk, job.rows_of(chunk))
        for piece in open_reader(job).slices(job.extents(chunk), 4):
            writer.add(piece, [1] * len(piece), {})
        commit(job.store, job.plan, chunk, writer.finish(), started_at=0.0, ended_at=1.0, worker="w")
    lookout(app, connection, "length").look()
    assert job.store.size("_SUCCESS")
    assert not listed(connection)


def test_a_folder_that_holds_another_plan_by_now_is_let_go_of(app, connection, job, tmp_path):
    shutil.rmtree(tmp_path / "out")
    planned(tmp_path, 50)
    lookout(app, connection, "length").look()
    assert not connection.exists(LIST)
    assert not listed(connection)


def test_who_cannot_see_the_folder_leaves_it_to_another_and_says_so_once(app, connection, job, tmp_path, caplog):
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    blind = lookout(app, connection, "length")
    with caplog.at_level(logging.WARNING):
        blind.look()
        blind.look()
    assert [str(tmp_path / "out") in each.message for each in caplog.records] == [True]
    assert listed(connection)
    (tmp_path / "elsewhere").rename(tmp_path / "out")
    lookout(app, connection, "length").look()
    assert connection.llen(LIST) == SPARE


def test_a_folder_that_hangs_keeps_nobody_from_the_others(app, connection, job, tmp_path, caplog):
    plan = tmp_path / "out" / "_plan.json"
    text = plan.read_bytes()
    plan.unlink()
    os.mkfifo(plan)  # whoever reads it waits until somebody writes it
    Watchlist(connection).put(planned(tmp_path, 50, "other"))
    looking = lookout(app, connection, "length", patience_s=0.5)
    before = set(threading.enumerate())
    with caplog.at_level(logging.WARNING):
        looking.look()
        looking.look()
    until(lambda: connection.llen(LIST) == SPARE, "the other one is not looked after")

    def looks():
        return [each for each in set(threading.enumerate()) - before if each.name == "nograd-look"]

    until(lambda: len(looks()) == 1, looks)  # the other one's has ended, and nobody looks twice at the one that hangs
    assert f"the folder {tmp_path / 'out'} does not answer" in caplog.text
    plan.write_bytes(text)
    until(lambda: connection.llen(LIST) == 2 * SPARE, "it is not looked after when it answers again")


def test_one_that_is_closing_leaves_everything_to_others(app, connection, job):
    closing = lookout(app, connection, "length")
    closing.close()
    closing.look()
    assert not connection.exists(LIST)
    assert listed(connection)


def test_it_looks_again_and_again_until_it_is_finished(app, connection, job):
    running = Lookout(app, connection, lambda: ["length"], every_s=0.01)
    running.start()
    try:
        for _ in range(2):
            until(lambda: connection.llen(LIST) >= SPARE)
            connection.delete(LIST)
            Window(connection, hints_of(job)).find_lost("length", sending_s=0)
    finally:
        running.finish(PATIENCE_S)
    assert not running._thread.is_alive()
