"""What kombu and Celery promise on Redis holds here too."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import time

import kombu
import pytest
from celery import Celery

from nograd.tasks import transport
from nograd.tasks.transport import SentinelTransport, Transport
from nograd.tasks.transport.checks import check_kombu
from waiting import PATIENCE_S

from .support import NOTHING_LEFT, OURS, SERVERS, free_port, left, open_gate, producer, ran, started, wait_for
from .test_laws import HEIR, Consumer, publish


@pytest.mark.parametrize("pool", ["threads", "prefork", pytest.param("solo", marks=pytest.mark.slow)])
def test_every_pool_runs_tasks_and_answers_remote_control(server, make_worker, pool):
    worker = make_worker(server, pool=pool, concurrency=2, options={"global_keyprefix": "x:"}).ready()
    app = producer(server, global_keyprefix="x:")
    assert app.send_task("jobs.long", (3, 0)).get(timeout=PATIENCE_S) == 3
    assert app.control.inspect(timeout=PATIENCE_S, limit=1).ping() == {worker.name: {"ok": "pong"}}
    assert worker.stop() == 0


def test_stock_producers_and_workers_share_the_queue(server, make_worker):
    ours = make_worker(server, concurrency=2).ready()
    stock = make_worker(server, transport=None, concurrency=2).ready()
    pids = {ours.process.pid, stock.process.pid}
    for first, name in ((1000, None), (2000, OURS)):
        app, jobs = producer(server, name), itertools.count(first)

        def both_ran_one(app=app, jobs=jobs, first=first):
            app.send_task("jobs.long", (next(jobs), 0.05), ignore_result=True)
            return {pid for job, pid in started(server) if job >= first} == pids

        wait_for(both_ran_one)
    wait_for(lambda: len(ran(server)) == len(started(server)) and not server.client.llen("jobs"))
    assert ours.stop() == 0
    assert stock.stop() == 0
    wait_for(lambda: left(server) == NOTHING_LEFT)


@pytest.mark.slow
def test_an_eta_longer_than_the_lease_runs_once(server, make_worker):
    workers = [make_worker(server, options={"lease_seconds": 2}).ready() for _ in range(2)]
    producer(server).send_task("jobs.long", (1, 0), countdown=4.5)
    wait_for(lambda: ran(server) == [1])
    time.sleep(1)
    assert len(started(server)) == 1
    assert all(worker.alive for worker in workers)


def test_worker_disable_prefetch_takes_no_more_than_it_runs(server, make_worker):
    conf = {"worker_disable_prefetch": True, "worker_prefetch_multiplier": 8}
    make_worker(server, concurrency=2, conf=conf).ready()
    app = producer(server)
    for job in range(6):
        app.send_task("jobs.gated", (job,), ignore_result=True)
    wait_for(lambda: len(started(server)) == 2)
    time.sleep(0.5)
    assert server.client.llen("jobs") == 4
    open_gate(server)
    wait_for(lambda: len(ran(server)) == 6)


def test_a_second_worker_gets_bulk_work_at_once_under_a_budget(server, make_worker):
    options, conf = {"budgets": {"9": 2}}, {"worker_prefetch_multiplier": 8}
    first = make_worker(server, concurrency=1, options=options, conf=conf).ready()
    app = producer(server)
    for job in range(8):
        app.send_task("jobs.gated", (job,), priority=9, ignore_result=True)
    wait_for(lambda: started(server))
    second = make_worker(server, concurrency=1, options=options, conf=conf).ready()
    wait_for(lambda: {pid for _, pid in started(server)} == {first.process.pid, second.process.pid})
    wait_for(lambda: server.client.hlen("unacked") == 4)
    time.sleep(0.5)
    assert server.client.hlen("unacked") == 4
    open_gate(server)
    wait_for(lambda: len(ran(server)) == 8)


def test_interactive_overtakes_bulk_and_one_model_the_backlog_of_another(server, make_worker):
    app = producer(server)
    with app.producer_pool.acquire() as sender:
        for job in range(800):
            app.send_task("jobs.record", (job,), queue="a", priority=9, ignore_result=True, producer=sender)
            app.send_task("jobs.record", (job,), queue="a", ignore_result=True, producer=sender)
        for job in range(10):
            app.send_task("jobs.record", (10_000 + job,), queue="b", ignore_result=True, producer=sender)
            app.send_task("jobs.record", (20_000 + job,), queue="b", priority=6, ignore_result=True, producer=sender)
    make_worker(server, pool="solo", queues="a,b", conf={"worker_prefetch_multiplier": 8}).ready()
    wait_for(lambda: len(ran(server)) == 1620)
    order = ran(server)
    assert max(order.index(10_000 + job) for job in range(10)) < 200
    assert max(order.index(20_000 + job) for job in range(10)) < 800 + 10 + 10 + 20
    assert order[-1] == 799


def test_redelivery_is_seen_by_the_task(server, make_worker):
    victim = make_worker(server, options={"lease_seconds": 2}, concurrency=1).ready()
    producer(server).send_task("jobs.gated", (0,), ignore_result=True)
    wait_for(lambda: started(server))
    result = producer(server).send_task("jobs.headers")
    wait_for(lambda: left(server)["leases"] == 2)
    victim.kill()
    make_worker(server).ready()
    assert result.get(timeout=PATIENCE_S) == {"count": 0, "redelivered": True}


def test_an_unacknowledged_prefetch_of_a_killed_worker_counts_nothing(server, connect, make_worker):
    worker = make_worker(server, concurrency=1, options={"lease_seconds": 2}).ready()
    for job in range(3):
        producer(server).send_task("jobs.gated", (job,), ignore_result=True)
    wait_for(lambda: left(server)["leases"] == 3)
    worker.kill()
    heir = Consumer(connect(server, **HEIR), "jobs")
    messages = heir.drain(3)
    assert [transport.delivery_count(each) for each in messages] == [0, 0, 0]


@pytest.mark.slow
def test_sentinel_failover(make_server, make_worker, tmp_path):
    master, replica, log = make_server(), make_server(), make_server()
    replica.client.replicaof("127.0.0.1", master.port)
    wait_for(lambda: replica.client.info("replication")["master_link_status"] == "up")
    port = free_port()
    conf = tmp_path / "sentinel.conf"
    conf.write_text(
        f"port {port}\nbind 127.0.0.1\nsentinel monitor mine 127.0.0.1 {master.port} 1\n"
        "sentinel down-after-milliseconds mine 1500\nsentinel failover-timeout mine 5000\n"
    )
    watcher = subprocess.Popen([SERVERS["redis-server"], str(conf), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        time.sleep(2)
        url, options = f"sentinel://127.0.0.1:{port}/0", {"master_name": "mine", "lease_seconds": 10}
        name = "nograd.tasks.transport:SentinelTransport"
        worker = make_worker(master, url=url, transport=name, options=options, log=log, concurrency=2).ready()
        app = producer(url, name, master_name="mine")
        app.send_task("jobs.long", (1, 6), ignore_result=True)
        wait_for(lambda: started(log))
        time.sleep(1)
        master.kill()
        wait_for(lambda: replica.client.info("replication")["role"] == "master")
        late = time.monotonic() + 60
        while time.monotonic() < late:
            try:
                app.send_task("jobs.long", (2, 0), ignore_result=True, retry=False)
                break
            except (kombu.exceptions.OperationalError, OSError):
                time.sleep(0.5)
        wait_for(lambda: sorted(ran(log)) == [1, 2])
        assert worker.alive
        assert len(started(log)) == 2
        wait_for(lambda: left(replica) == NOTHING_LEFT)
    finally:
        watcher.kill()
        watcher.wait()


def test_an_acl_user_needs_no_more_than_documented(server, make_worker):
    rules = ["on", ">secret", "~*", "&*", "+@all", "-@dangerous", "+info", "-keys"]
    server.client.execute_command("ACL", "SETUSER", "worker", *rules)
    url = f"redis://worker:secret@127.0.0.1:{server.port}/0"
    make_worker(server, url=url).ready()
    producer(url).send_task("jobs.long", (1, 0), ignore_result=True)
    wait_for(lambda: ran(server) == [1])


def test_a_unix_socket(make_server, make_worker, tmp_path):
    path = tmp_path / "s"
    server = make_server("--unixsocket", str(path))
    url = f"redis+socket://{path}"
    make_worker(server, url=url, transport=None, aliases=True).ready()
    wait_for(path.exists)
    producer(url, None).send_task("jobs.long", (1, 0), ignore_result=True)
    wait_for(lambda: ran(server) == [1])
    wait_for(lambda: not server.client.exists("_nograd.leases"))  # it is acknowledged a moment after it has run


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_tls(make_server, connect, tmp_path):
    key, cert, port = tmp_path / "key.pem", tmp_path / "cert.pem", free_port()
    request = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*request.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    try:
        make_server(
            "--tls-port",
            str(port),
            "--tls-cert-file",
            str(cert),
            "--tls-key-file",
            str(key),
            "--tls-auth-clients",
            "no",
        )
    except AssertionError:
        pytest.skip("this Redis was built without TLS")
    connection = kombu.Connection(f"rediss://127.0.0.1:{port}/0", transport=OURS, ssl={"ssl_ca_certs": str(cert)})
    publish(connection)
    consumer = Consumer(connection)
    consumer.drain(1)[0].ack()
    assert consumer.channel.keeper.beat()
    connection.release()


def test_aliases_keep_the_scheme_of_the_url(server):
    code = (
        "from nograd.tasks.transport import register_aliases, Transport; register_aliases();"
        "from celery import Celery; c = Celery(broker='redis://localhost:6379/0').connection();"
        "print(c.as_uri(), isinstance(c.transport, Transport))"
    )
    import sys

    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    uri, ours = out.split()
    assert uri.startswith("redis://")
    assert ours == "True"


def test_a_wrong_password_stops_the_start_with_a_clear_error(make_server, make_worker):
    server = make_server("--requirepass", "right")
    worker = make_worker(server, url=f"redis://:wrong@127.0.0.1:{server.port}/0")
    assert worker.process.wait(PATIENCE_S) != 0
    assert "Redis refuses the connection" in worker.log()


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_redis_that_evicts_stops_the_start_with_a_clear_error(make_server, make_worker, policy):
    server = make_server("--maxmemory", "100mb", "--maxmemory-policy", policy)
    worker = make_worker(server)
    assert worker.process.wait(PATIENCE_S) != 0
    assert f"maxmemory-policy {policy}" in worker.log()
    make_worker(server, options={"allow_eviction": True}).ready()


def test_a_redis_that_is_too_old_is_named(monkeypatch):
    from nograd.tasks.transport.checks import check_server

    class Old:
        def call(self, commands):
            return [b"redis_version:5.0.14\r\n", b"maxmemory_policy:noeviction\r\n"]

    with pytest.raises(transport.TransportError, match=r"5\.0\.14"):
        check_server(Old(), allow_eviction=False)


def test_an_unknown_kombu_is_refused():
    check_kombu()
    with pytest.raises(transport.TransportError, match=r"kombu 6\.0\.0"):
        check_kombu((6, 0, 0))


def test_an_idle_worker_on_eight_queues_is_quiet(server, make_worker):
    make_worker(server, queues=",".join(f"q{n}" for n in range(8))).ready()

    def is_quiet():
        server.client.config_resetstat()
        began = time.monotonic()
        time.sleep(4)
        stats = server.client.info("commandstats")
        calls = sum(each["calls"] for name, each in stats.items() if "resetstat" not in name)
        return calls <= 5 * (time.monotonic() - began)

    wait_for(is_quiet)  # as soon as it has begun its work


def test_queue_lengths_are_what_flower_counts(server, connect):
    publish(connect(server), "q", 3)
    publish(connect(server), "q", 2, priority=9)
    channel = connect(server).channel()
    assert channel.queue_declare("q", passive=True).message_count == 5


def test_revoked_and_expired_jobs_do_not_run(server, make_worker):
    app = producer(server)
    app.send_task("jobs.long", (1, 0), expires=0.01)
    time.sleep(0.1)
    make_worker(server).ready()
    app.send_task("jobs.long", (2, 0))
    wait_for(lambda: ran(server) == [2])
    wait_for(lambda: left(server) == NOTHING_LEFT)


def test_purge_and_delete(server, connect):
    connection = connect(server)
    publish(connection, count=3)
    channel = connection.channel()
    assert channel.queue_purge("q") == 3
    publish(connection)
    consumer = Consumer(connect(server))
    assert len(consumer.drain(1)) == 1


def test_queues_that_expire(server, connect):
    connection = connect(server)
    queue = kombu.Queue("tmp", routing_key="tmp", expires=60)
    with connection.Producer() as sender:
        sender.publish({"n": 1}, routing_key="tmp", exchange="", declare=[queue])
        assert 0 < server.client.pttl("tmp") <= 60_000
    message = queue(connection.channel()).get()
    message.ack()
    assert left(server) == NOTHING_LEFT


def test_sigint_is_a_warm_shutdown_too(server, make_worker):
    worker = make_worker(server, concurrency=1).ready()
    for job in range(3):
        producer(server).send_task("jobs.long", (job, 1.0))
    wait_for(lambda: started(server))
    worker.signal(signal.SIGINT)
    worker.process.wait(PATIENCE_S)
    assert len(ran(server)) + server.client.llen("jobs") == 3
    assert json.dumps(left(server)) == json.dumps(NOTHING_LEFT)


def test_children_forked_while_the_keeper_runs(server, make_worker):
    worker = make_worker(server, pool="prefork", concurrency=2, conf={"worker_max_tasks_per_child": 1}).ready()
    app = producer(server)
    for job in range(12):
        app.send_task("jobs.long", (job, 0.05), ignore_result=True)
    wait_for(lambda: sorted(ran(server)) == list(range(12)))
    wait_for(lambda: left(server) == NOTHING_LEFT)
    assert len(started(server)) == 12
    assert worker.stop() == 0


def test_a_channel_that_outlives_its_transport_can_still_be_acknowledged_through(server, connect):
    publish(connect(server), count=2)
    connection = connect(server)
    consumer = Consumer(connection)
    messages = consumer.drain(2)
    connection.release()
    for message in messages:
        message.ack()
    wait_for(lambda: left(server) == NOTHING_LEFT)


@pytest.mark.parametrize(
    ("url", "shown", "ssl", "transport"),
    [
        ("redis://:pw@h:1/2", "redis://:**@h:1/2", False, Transport),
        ("rediss://h:1/0", "rediss://:**@h:1/0", True, Transport),
        ("redis+socket:///tmp/x.sock", "redis+socket:///tmp/x.sock", False, Transport),
        ("sentinel://a:1/0", "sentinel://:**@a:1/0", False, SentinelTransport),
        ("memory://", "memory://:**@localhost//", False, None),
    ],
)
def test_an_app_s_connection_keeps_what_its_url_says(url, shown, ssl, transport):
    app = Celery("app", broker=url, amqp="nograd.tasks.transport:AMQP", set_as_current=False)
    connection = app.connection_for_write()
    assert connection.as_uri() == shown
    assert bool(connection.ssl) is ssl
    assert transport is None or connection.get_transport_cls() is transport
    assert type(connection.clone()) is type(connection)


def test_what_an_app_publishes_rings_and_a_stock_app_of_the_same_url_keeps_its_own_pool(server):
    bell = "_nograd.bell.jobs"
    stock = producer(server, None)
    ours = Celery("ours", broker=server.url, amqp="nograd.tasks.transport:AMQP", set_as_current=False)
    ours.conf.task_default_queue = "jobs"
    stock.send_task("jobs.long", (1, 0))
    assert not server.client.exists(bell)
    ours.send_task("jobs.long", (2, 0))
    assert server.client.llen(bell) == 1
    server.client.delete(bell)
    with ours.producer_pool.acquire(block=True) as one, one.batch():
        ours.send_task("jobs.long", (3, 0), producer=one)
        ours.send_task("jobs.long", (4, 0), producer=one)
    assert server.client.llen(bell) == 1
    assert server.client.llen("jobs") == 4
    with ours.pool.acquire(block=True) as connection:
        assert isinstance(connection, transport.Connection)
        assert type(connection.clone()) is transport.Connection
    with stock.pool.acquire(block=True) as connection:
        assert not isinstance(connection, transport.Connection)


def test_replies_of_stock_workers_are_seen_as_soon_as_stock_clients_see_them(server, make_worker):
    """Each look lasts a tenth of a second at most: a stock worker's answer does not ring."""
    stock = make_worker(server, transport=None, concurrency=1).ready()
    ours = Celery("ours", broker=server.url, amqp="nograd.tasks.transport:AMQP", set_as_current=False)
    with server.client.monitor() as monitor:
        assert ours.control.inspect(timeout=PATIENCE_S, limit=1).ping() == {stock.name: {"ok": "pong"}}
        ours.control.ping(timeout=0.3)
        server.client.echo("end")
        said = itertools.takewhile(lambda each: each["command"] != "ECHO end", monitor.listen())
        waits = [float(each["command"].split()[-1]) for each in said if each["command"].startswith("BLPOP _nograd")]
    assert waits
    assert max(waits) <= 0.1
