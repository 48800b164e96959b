"""Real worker processes: killed, frozen, cut off, and asked to stop."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import redis

from waiting import PATIENCE_S

from .support import NOTHING_LEFT, OURS, left, open_gate, producer, ran, started, wait_for

#: of workers that are killed
LEASE_S = 2
#: of workers that must keep what they hold, however long the machine stands still
KEPT_S = 3


def done(server, count):
    wait_for(lambda: len(set(ran(server))) >= count, f"{count} jobs are not done")


def kill_under_load(make_server, make_worker, *, transport, jobs, kills, seed):
    """Kill a worker again and again while it drains; the numbers of the jobs that were never run to their end."""
    server = make_server()
    app = producer(server, transport)
    with app.producer_pool.acquire() as sender:
        for job in range(jobs):
            app.send_task("jobs.record", (job,), ignore_result=True, producer=sender)
    options = (
        {"lease_seconds": LEASE_S}
        if transport
        else {"visibility_timeout": LEASE_S, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
    )
    chance = random.Random(seed)
    conf = {"worker_prefetch_multiplier": 1}
    pending = [make_worker(server, transport=transport, options=options, concurrency=8, conf=conf) for _ in range(2)]
    for _ in range(kills):
        wait_for(lambda: " ready." in pending[0].log())
        time.sleep(chance.uniform(0.05, 0.3))
        pending.pop(0).kill()
        pending.append(make_worker(server, transport=transport, options=options, concurrency=8, conf=conf))
    wait_for(lambda: server.client.llen("jobs") == 0)
    wait_for(lambda: server.client.hlen("unacked") == 0)
    time.sleep(1)
    return sorted(set(range(jobs)) - set(ran(server)))


def test_a_killed_workers_jobs_are_not_lost(make_server, make_worker):
    assert kill_under_load(make_server, make_worker, transport=OURS, jobs=6000, kills=3, seed=1) == []


@pytest.mark.slow
def test_stock_celery_loses_jobs_in_the_same_run(make_server, make_worker):
    """The negative control: a checker that never fails proves nothing."""
    lost = []
    for seed in range(6):
        lost += kill_under_load(make_server, make_worker, transport=None, jobs=12_000, kills=8, seed=seed)
        if lost:
            return
    pytest.fail("stock lost nothing in 48 kills: the kill test has lost its edge")


def test_a_job_longer_than_three_leases_runs_once_and_again_after_its_worker_is_killed(server, make_worker):
    workers = [make_worker(server, options={"lease_seconds": KEPT_S}, concurrency=1) for _ in range(2)]
    for worker in workers:
        worker.ready()
    app = producer(server)
    app.send_task("jobs.long", (1, 3.2 * KEPT_S))
    done(server, 1)
    assert len(started(server)) == 1
    app.send_task("jobs.gated", (2,))
    wait_for(lambda: len(started(server)) == 2)
    (owner,) = (worker for worker in workers if worker.process.pid == started(server)[1][1])
    owner.kill()
    ((_, ends),) = server.client.zrange("_nograd.leases", 0, -1, withscores=True)
    seconds, microseconds = server.client.time()
    assert ends <= 1000 * (seconds + KEPT_S) + microseconds // 1000
    wait_for(lambda: len(started(server)) == 3)
    open_gate(server)
    done(server, 2)


@pytest.mark.slow
def test_a_stock_app_on_the_same_database_is_left_alone_and_leaves_us_alone(server, make_worker):
    ours = make_worker(server, options={"lease_seconds": KEPT_S}, concurrency=1, queues="jobs").ready()
    stock = make_worker(server, transport=None, concurrency=1, queues="theirs").ready()
    producer(server).send_task("jobs.long", (1, 8))
    producer(server, None).send_task("jobs.long", (2, 8), queue="theirs")
    done(server, 2)
    assert Counter(job for job, *_ in started(server)) == {1: 1, 2: 1}
    assert ours.stop() == 0
    assert stock.stop() == 0
    assert left(server) == NOTHING_LEFT


def test_a_worker_frozen_past_its_lease_does_no_harm_when_it_thaws(server, make_worker):
    options = {"lease_seconds": 2}
    frozen = make_worker(server, options=options, concurrency=2).ready()
    app = producer(server)
    results = [app.send_task("jobs.gated", (job,)) for job in range(2)]
    wait_for(lambda: len(started(server)) == 2)
    frozen.signal(signal.SIGSTOP)
    other = make_worker(server, concurrency=2, options={"beat_seconds": 0.5}).ready()
    wait_for(lambda: len(started(server)) == 4)
    frozen.signal(signal.SIGCONT)
    open_gate(server)
    assert [result.get(timeout=PATIENCE_S) for result in results] == [0, 1]
    wait_for(lambda: left(server) == NOTHING_LEFT)
    app.send_task("jobs.long", (7, 0))
    wait_for(lambda: 7 in ran(server))
    assert frozen.alive
    assert other.alive
    assert frozen.stop() == 0


SLOW = pytest.mark.slow


@pytest.mark.parametrize("pool", ["threads", pytest.param("prefork", marks=SLOW), pytest.param("solo", marks=SLOW)])
def test_cutting_every_connection_under_load_runs_each_job_once(server, make_server, make_worker, pool):
    log = make_server()
    worker = make_worker(server, pool=pool, log=log, concurrency=2, conf={"worker_prefetch_multiplier": 1}).ready()
    app = producer(server)
    for job in range(8):
        app.send_task("jobs.long", (job, 1.0))
    wait_for(lambda: started(log))
    for _ in range(3):
        time.sleep(0.4)
        for kind in ("normal", "pubsub"):
            with suppress(redis.ConnectionError):
                server.client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
    done(log, 8)
    runs = Counter(job for job, *_ in started(log))
    assert {runs[job] for job in range(8)} == {1}, runs
    assert worker.alive
    assert worker.stop() == 0


@pytest.mark.parametrize("down", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pool", ["threads", pytest.param("prefork", marks=pytest.mark.slow)])
def test_redis_killed_and_restarted_with_work_in_flight(make_server, make_worker, down, pool):
    server, log = make_server("--appendonly", "yes", "--appendfsync", "always"), make_server()
    options = {"lease_seconds": 10}
    workers = [make_worker(server, pool=pool, log=log, concurrency=3, options=options).ready() for _ in range(2)]
    app = producer(server)
    for job in range(4):
        app.send_task("jobs.long", (job, 2.0))
    wait_for(lambda: len(started(log)) == 4)
    server.kill()
    time.sleep(down)
    server.start()
    app.send_task("jobs.long", (99, 0))
    done(log, 5)
    runs = Counter(job for job, *_ in started(log))
    assert set(runs.values()) == {1}, runs
    wait_for(lambda: left(server) == NOTHING_LEFT)
    assert all(worker.alive for worker in workers)
    assert all(worker.stop() == 0 for worker in workers)


def test_a_worker_waits_for_redis_without_spinning(server, make_server, make_worker):
    log = make_server()
    worker = make_worker(server, log=log, conf={"worker_send_task_events": False}).ready()
    server.kill()

    def cpu():
        fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / 100

    time.sleep(1)
    before, began = cpu(), time.monotonic()
    time.sleep(2.5)
    assert cpu() - before < 0.6 * (time.monotonic() - began)
    assert worker.alive
    server.start()
    producer(server).send_task("jobs.long", (1, 0))
    wait_for(lambda: ran(log) == [1])


@pytest.mark.parametrize("pool", ["threads", "solo", pytest.param("prefork", marks=SLOW)])
def test_a_warm_shutdown_finishes_what_runs_and_returns_the_rest(server, make_worker, pool):
    worker = make_worker(server, pool=pool, concurrency=1, conf={"worker_prefetch_multiplier": 4}).ready()
    app = producer(server)
    for job in range(10):
        app.send_task("jobs.gated", (job,))
    wait_for(lambda: started(server))
    worker.signal(signal.SIGTERM)
    wait_for(lambda: "Warm shutdown" in worker.log())
    open_gate(server)
    assert worker.process.wait(PATIENCE_S) == 0
    finished = ran(server)
    assert finished == list(range(len(finished)))
    assert 1 <= len(finished) <= 5
    assert len(finished) == len(started(server))
    assert left(server) == NOTHING_LEFT
    waiting = [json.loads(raw)["headers"]["argsrepr"] for raw in reversed(server.client.lrange("jobs", 0, -1))]
    assert waiting == [f"({job},)" for job in range(len(finished), 10)]


def test_a_cold_shutdown_returns_what_was_running(server, make_worker):
    worker = make_worker(server, pool="prefork", concurrency=2, conf={"worker_prefetch_multiplier": 1}).ready()
    for job in range(2):
        producer(server).send_task("jobs.gated", (job,))
    wait_for(lambda: len(started(server)) == 2)
    worker.signal(signal.SIGTERM)
    wait_for(lambda: "Warm shutdown" in worker.log())
    worker.signal(signal.SIGQUIT)
    worker.process.wait(PATIENCE_S)
    assert server.client.llen("jobs") == 2
    assert left(server) == NOTHING_LEFT


def test_the_remote_shutdown_returns_what_was_not_started(server, make_worker):
    worker = make_worker(server, concurrency=1, conf={"worker_prefetch_multiplier": 3}).ready()
    app = producer(server)
    for job in range(6):
        app.send_task("jobs.long", (job, 1.0))
    wait_for(lambda: started(server))
    app.control.shutdown()
    worker.process.wait(PATIENCE_S)
    assert len(ran(server)) + server.client.llen("jobs") == 6
    assert left(server) == NOTHING_LEFT


@pytest.mark.slow
def test_redis_frozen_for_longer_than_the_lease(server, make_server, make_worker):
    log = make_server()
    workers = [
        make_worker(server, log=log, concurrency=2, options={"lease_seconds": 3, "socket_timeout": 10}).ready()
        for _ in range(2)
    ]
    app = producer(server)
    for job in range(2):
        app.send_task("jobs.long", (job, 12))
    wait_for(lambda: len(started(log)) == 2)
    server.signal(signal.SIGSTOP)
    time.sleep(6)
    server.signal(signal.SIGCONT)
    done(log, 2)
    assert len(started(log)) == 2
    assert all(worker.alive for worker in workers)
    wait_for(lambda: left(server) == NOTHING_LEFT)


@pytest.mark.slow
def test_read_only_and_back(server, make_server, make_worker):
    log = make_server()
    worker = make_worker(server, log=log).ready()
    other = make_server()
    server.client.replicaof("127.0.0.1", other.port)
    time.sleep(3)
    assert worker.alive
    server.client.replicaof("no", "one")
    producer(server).send_task("jobs.long", (1, 0))
    wait_for(lambda: ran(log) == [1])
    assert worker.alive
