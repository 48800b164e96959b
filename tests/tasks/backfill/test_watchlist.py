"""Who looks at which open backfill, and when: a real Redis, by its own clock."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nograd.tasks.backfill.watchlist import MOST, Run, Watchlist
from nograd.tasks.backfill.window import KEPT_S
from scoring import MODEL, planned

MODELS = [MODEL.name]
KEY = f"nograd:backfills:{MODEL.name}"


@pytest.fixture
def watchlist(connection):
    return Watchlist(connection)


@pytest.fixture
def jobs(tmp_path):
    (tmp_path / "in.csv").write_text("k,x\n" + "".join(f"{n},{n}\n" for n in range(10)))
    return [planned(tmp_path / "in.csv", tmp_path / out, id="k", columns=["x"]) for out in ("a", "b")]


def age(connection, seconds):
    """As if all had been looked at so much earlier."""
    for member, score in connection.zrange(KEY, 0, -1, withscores=True):
        connection.zadd(KEY, {member: score - 1000 * seconds})


def outs(turns):
    return sorted(turn.run.out for turn in turns)


def test_what_was_just_looked_at_is_nobodys_to_look_at(watchlist, jobs, connection):
    watchlist.put(jobs[0])
    assert not watchlist.take(MODELS, 600)
    age(connection, 601)
    watchlist.put(jobs[1])
    (turn,) = watchlist.take(MODELS, 600)
    assert turn.run == Run(jobs[0].store.url, jobs[0].plan.sha256)
    watchlist.put(jobs[0])
    assert not watchlist.take(MODELS, 600)


def test_of_many_who_ask_each_backfill_is_given_to_one(watchlist, jobs, connection):
    for job in jobs:
        watchlist.put(job)
    age(connection, 601)
    with ThreadPoolExecutor(8) as pool:
        taken = [turn for turns in pool.map(lambda _: watchlist.take(MODELS, 600), range(40)) for turn in turns]
    assert outs(taken) == [job.store.url for job in jobs]


def test_only_models_that_are_asked_for_are_looked_after(watchlist, jobs, connection):
    watchlist.put(jobs[0])
    age(connection, 601)
    assert not watchlist.take(["another", "third"], 600)
    (turn,) = watchlist.take(["another", *MODELS], 600)
    assert turn.key == KEY


def test_who_cannot_look_leaves_it_to_the_next_and_what_nobody_can_see_is_forgotten(watchlist, jobs, connection):
    watchlist.put(jobs[0])
    age(connection, 601)
    for _ in range(3):
        (turn,) = watchlist.take(MODELS, 600)
        watchlist.give_back(turn)
    age(connection, KEPT_S)
    assert not watchlist.take(MODELS, 600)
    assert not connection.exists(KEY)


def test_what_is_dropped_is_gone(watchlist, jobs, connection):
    for job in jobs:
        watchlist.put(job)
    for turn in watchlist.take(MODELS, 0):
        if turn.run.out == jobs[0].store.url:
            watchlist.drop(turn)
    assert outs(watchlist.take(MODELS, 0)) == [jobs[1].store.url]


def test_what_somebody_has_found_open_meanwhile_stays_and_was_just_looked_at(watchlist, jobs, connection):
    watchlist.put(jobs[0])
    age(connection, 601)
    (turn,) = watchlist.take(MODELS, 600)
    time.sleep(0.01)  # the clock counts milliseconds
    watchlist.put(jobs[0])
    watchlist.drop(turn)
    watchlist.give_back(turn)
    assert not watchlist.take(MODELS, 600)
    assert watchlist.take(MODELS, 0)


def test_asking_is_one_command_and_everything_has_an_end(watchlist, jobs, connection):
    watchlist.take(MODELS, 600)
    connection.config_resetstat()
    assert watchlist.take(MODELS, 600) == []
    calls = {name: told["calls"] for name, told in connection.info("commandstats").items()}
    assert calls.pop("cmdstat_evalsha") == 1
    assert not {"cmdstat_hgetall", "cmdstat_keys", "cmdstat_scan", "cmdstat_get"} & set(calls)
    watchlist.put(jobs[0])
    assert 0 < connection.ttl(KEY) <= KEPT_S


@pytest.mark.parametrize("entry", [b"\xff", b"[]", b'{"folder": "of a later version"}'], ids=repr)
def test_an_entry_nobody_can_read_goes_and_keeps_nobody_from_the_others(watchlist, jobs, connection, caplog, entry):
    watchlist.put(jobs[0])
    connection.zadd(KEY, {entry: time.time() * 1000})
    age(connection, 601)
    assert outs(watchlist.take(MODELS, 600)) == [jobs[0].store.url]
    assert [KEY in each.message for each in caplog.records] == [True]
    assert connection.zcard(KEY) == 1


def test_a_look_takes_no_more_than_it_can_do(watchlist, jobs, connection):
    watchlist.put(jobs[0])
    age(connection, 601)
    ((member, score),) = connection.zrange(KEY, 0, 0, withscores=True)
    connection.zadd(KEY, {member.replace(b"/a", b"/%d" % n): score for n in range(MOST)})
    assert len(watchlist.take(MODELS, 600)) == MOST
    assert len(watchlist.take(MODELS, 600)) == 1
