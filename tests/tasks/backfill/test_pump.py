"""What is sent, and sent again: the real transport, a real Redis, real commit records. Nobody runs the chunks."""

from __future__ import annotations

import time

import pytest
from celery import Celery

from nograd.tasks.backfill import state
from nograd.tasks.backfill import window as windows
from nograd.tasks.backfill.pump import pump
from nograd.tasks.backfill.state import State
from nograd.tasks.backfill.task import RUN_CHUNK, hints_of, send_chunk, sending_s
from nograd.tasks.backfill.watchlist import Watchlist
from nograd.tasks.backfill.window import BLIND_S, SENDING_S, SPARE, Window, message_id
from nograd.tasks.keys import CHUNKS, PRIORITY_SUFFIXES
from scoring import planned, run

QUEUE = "nograd.doubler"
LIST = QUEUE + PRIORITY_SUFFIXES[-1]


@pytest.fixture
def job(tmp_path):
    """Ten chunks."""
    (tmp_path / "in.csv").write_text("k,x\n" + "".join(f"{n},{n}\n" for n in range(100)))
    return planned(tmp_path / "in.csv", tmp_path / "out", id="k", columns=["x"], rows_per_chunk=10)


@pytest.fixture
def window(connection, job):
    return Window(connection, hints_of(job))


@pytest.fixture
def sent(app, job):
    """Sends; the chunks that were sent."""
    chunks = []

    def send(chunk):
        send_chunk(app, job, chunk)
        chunks.append(chunk)

    send.chunks = chunks
    return send


def test_who_died_between_issuing_and_sending_leaves_chunks_that_are_sent_again(job, window, sent):
    assert window.top_up(range(10), most=10) == [0, 1]
    assert pump(job, window, sent, sending_s=600).sent == 0  # the one who sends them may be at it
    assert pump(job, window, sent, sending_s=0).sent == SPARE
    assert sent.chunks == [0, 1]


def test_somebody_looks_after_a_backfill_from_before_anything_of_it_is_sent(job, window, connection):
    listed = []
    pump(job, window, lambda _: listed.append(bool(Watchlist(connection).take(["doubler"], 0))))
    assert listed[0]


def test_nobody_looks_after_what_is_not_wanted_or_done(job, window, sent, connection):
    window.wish = "pause"
    assert not pump(job, window, sent).wanted
    window.wish = "run"
    state.write(job.store, State(wish="cancel"))
    assert not pump(job, window, sent).wanted
    state.write(job.store, State())
    run(job)
    pump(job, window, sent)
    assert not Watchlist(connection).take(["doubler"], 0)


def test_a_message_that_waits_however_long_is_not_sent_again(job, window, sent, connection):
    assert pump(job, window, sent).sent == SPARE
    time.sleep(0.05)
    for _ in range(3):
        assert pump(job, window, sent, sending_s=0).sent == 0
    assert connection.llen(LIST) == SPARE


def test_a_message_that_a_worker_holds_is_not_sent_again_and_one_it_let_go_of_is(job, window, sent, app, connection):
    pump(job, window, sent)
    with app.connection_for_read() as connected, connected.channel() as channel:
        held = channel.basic_get(QUEUE)
        assert held.headers["task"] == RUN_CHUNK
        assert connection.llen(LIST) == SPARE - 1
        assert pump(job, window, sent, sending_s=0).sent == 0
        held.ack()
        channel.keeper.flush()
        assert pump(job, window, sent, sending_s=0).sent == 1
    assert sent.chunks == [0, 1, 0]


def test_a_message_of_another_chunk_folder_or_model_is_no_message(job, window, sent, app, tmp_path):
    other = planned(tmp_path / "in.csv", tmp_path / "other", id="k", columns=["x"], rows_per_chunk=10)
    assert other.plan == job.plan
    send_chunk(app, other, 0)
    send_chunk(app, job, 1)
    window.top_up(range(10), most=10)
    window.find_lost("doubler", sending_s=0)
    assert window.top_up(range(10), most=10) == [0]
    window.find_lost("other", sending_s=0)
    assert window.top_up(range(10), most=10) == [0, 1]


def test_who_sends_a_message_is_not_taken_for_the_message(job, window, app, connection):
    window.top_up(range(10), most=10)
    sender = message_id(hints_of(job), 0) + "abc"
    app.send_task(
        RUN_CHUNK, queue=QUEUE, priority=CHUNKS, root_id=sender, parent_id=sender, kwargsrepr=f'"id": "{sender}"'
    )
    assert sender in connection.lindex(LIST, 0).decode()
    window.find_lost("doubler", sending_s=0)
    assert window.top_up(range(10), most=10) == [0, 1]


def test_a_message_is_seen_wherever_in_the_queue_it_stands(job, window, sent, app, connection):
    window.top_up(range(10), most=10)
    send_chunk(app, job, 0)
    connection.rpush(LIST, *["{}"] * 1200)
    send_chunk(app, job, 1)
    connection.rpush(LIST, "{}")
    window.find_lost("doubler", sending_s=0)
    assert window.top_up(range(10), most=10) == []


def test_among_too_many_messages_nobody_looks_and_nothing_is_lost_for_long(job, window, sent, connection, monkeypatch):
    pump(job, window, sent)
    connection.delete(LIST)
    connection.rpush(LIST, "{}", "{}")
    connection.hset("unacked", f"lease|{LIST}", "{}")
    monkeypatch.setattr(windows, "LOOKED_AT", 2)
    assert not pump(job, window, sent, sending_s=0).sent
    monkeypatch.setattr(windows, "BLIND_S", 0)
    assert pump(job, window, sent, sending_s=0).sent == SPARE


def test_messages_that_cannot_be_seen_are_not_sent_again_and_again(job, window, sent, app, redis_url, connection):
    assert (sending_s(app), sending_s(app, 0)) == (SENDING_S, 0)
    broker = redis_url.rpartition("/")[0] + "/1"
    app.conf.update(broker_read_url=broker, broker_write_url=broker)
    for _ in range(3):
        pump(job, window, sent, sending_s(app, 0))
    assert sent.chunks == [0, 1]
    assert not connection.exists(LIST)


@pytest.mark.parametrize("renamed", [{"global_keyprefix": "x:"}, {"unacked_key": "x"}, {"sep": ":"}], ids=str)
def test_messages_under_other_names_cannot_be_seen(app, renamed):
    app.conf.broker_transport_options = {**app.conf.broker_transport_options, **renamed}
    assert sending_s(app, 0) == BLIND_S


@pytest.mark.parametrize("named", ["", "nograd.tasks.backend:RedisBackend+"])
@pytest.mark.parametrize(("database", "seconds"), [(0, SENDING_S), (1, BLIND_S)])
def test_a_users_app_has_its_messages_where_its_results_are_or_they_cannot_be_seen(named, database, seconds):
    server = "redis://localhost:6379"
    with Celery("own", broker=f"{server}/0", backend=f"{named}{server}/{database}", set_as_current=False) as own:
        assert sending_s(own) == seconds


def test_who_resumes_sends_what_was_lost_and_not_what_runs(job, window, sent, connection):
    pump(job, window, sent)
    window.claim(0, "a")
    connection.delete(LIST)
    pump(job, window, sent, sending_s=0)
    assert sorted(sent.chunks[SPARE:]) == [1, 2, 3]


def test_the_output_is_closed_by_whoever_finds_nothing_missing(job, window, sent):
    run(job)
    assert pump(job, window, sent).missing == 0
    assert sent.chunks == []
    assert job.store.size("_SUCCESS")


def test_chunks_travel_below_every_prediction(job, window, sent, connection):
    pump(job, window, sent)
    assert connection.llen(QUEUE + PRIORITY_SUFFIXES[CHUNKS // 3]) == SPARE
