"""The laws of the scripts, each against the oldest and the newest Redis at hand."""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from contextlib import suppress

import kombu
import pytest
import redis
from kombu.asynchronous import Hub

from nograd.tasks import transport
from waiting import PATIENCE_S

from .support import NOTHING_LEFT, OURS, left, wait_for

#: terms of one whose own lease must not end in a test, and who soon finds that of another that has ended
HEIR = {"lease_seconds": 600, "beat_seconds": 0.25}


def publish(connection, queue="q", count=1, priority=0, **body):
    with connection.Producer() as producer:
        for number in range(count):
            producer.publish({"n": number, **body}, routing_key=queue, exchange="", priority=priority)


class Consumer:
    """A consumer without an event loop that keeps what it gets."""

    def __init__(self, connection, *queues, prefetch=10, no_ack=False):
        self.connection, self.messages = connection, []
        self.channel = connection.channel()
        queues = [kombu.Queue(name, routing_key=name) for name in queues or ("q",)]
        self.consumer = kombu.Consumer(self.channel, queues, on_message=self.messages.append, no_ack=no_ack)
        self.consumer.qos(prefetch_count=prefetch)
        self.consumer.consume()

    def drain(self, count=1, timeout=PATIENCE_S):
        until, want = time.monotonic() + timeout, len(self.messages) + count
        while len(self.messages) < want and time.monotonic() < until:
            with suppress(TimeoutError):
                self.connection.drain_events(timeout=0.3)
        return self.messages[want - count :]

    @property
    def bodies(self):
        return [message.payload["n"] for message in self.messages]


def test_a_message_is_leased_in_the_step_that_takes_it_in_kombus_own_format(each_server, connect):
    publish(connect(each_server))
    raw = each_server.client.lindex("q", 0)
    (message,) = Consumer(connect(each_server)).drain()
    client = each_server.client
    assert client.llen("q") == 0
    assert left(each_server) == {"unacked": 1, "index": 1, "leases": 1}
    kept = client.hget("unacked", message.delivery_tag)
    assert json.loads(kept) == [json.loads(raw), "", "q"]
    assert raw in kept  # byte for byte


def test_a_lease_id_is_a_deliverys_and_not_a_messages(server, connect):
    publish(connect(server))
    consumer = Consumer(connect(server))
    (first,) = consumer.drain()
    first.reject(requeue=True)
    (second,) = consumer.drain()
    assert first.properties["delivery_tag"] == second.properties["delivery_tag"]
    assert first.delivery_tag != second.delivery_tag


class Interrupted:
    """A socket whose reader hears a signal right after it has received something."""

    def __init__(self, socket, handler):
        self._socket, self._handler = socket, handler

    def __getattr__(self, name):
        return getattr(self._socket, name)

    def recv(self, *args):
        data = self._socket.recv(*args)
        handler, self._handler = self._handler, None
        if handler is not None:
            handler()
        return data


def test_a_consumer_cancelled_by_a_signal_in_the_middle_of_a_read_gives_back_what_is_read(server, connect):
    connection, hub = connect(server), Hub()
    consumer = Consumer(connection)
    connection.register_with_event_loop(hub)
    hub.run_once()  # it asks, and waits at the bell
    buffer = consumer.channel.client.connection._parser._buffer
    buffer._sock = Interrupted(buffer._sock, consumer.consumer.cancel)
    publish(connect(server), count=3)
    until = time.monotonic() + PATIENCE_S
    while consumer.channel.active_queues or buffer._sock._handler is not None:
        assert time.monotonic() < until
        hub.run_once()
    transport.flush()
    assert consumer.messages == []
    assert [json.loads(raw)["headers"] for raw in server.client.lrange("q", 0, -1)] == [{}] * 3
    assert left(server) == NOTHING_LEFT
    hub.close()


def test_an_acknowledgement_leaves_nothing_behind(each_server, connect):
    publish(connect(each_server), count=3)
    consumer = Consumer(connect(each_server))
    for message in consumer.drain(3):
        message.ack()
    assert left(each_server) == NOTHING_LEFT
    assert each_server.client.keys("*") == []


def test_messages_are_never_re_encoded(each_server, connect):
    body = {"n": 0, "empty": [], "big": 12345678901234567890123, "float": 0.1, "text": "ü\u0000\U0001f600"}
    publish(connect(each_server), **body)
    raw = each_server.client.lindex("q", 0)
    consumer = Consumer(connect(each_server))
    (message,) = consumer.drain()
    assert message.payload == body
    message.reject(requeue=True)
    assert each_server.client.lindex("q", 0) == raw


def test_an_expired_lease_goes_back_and_the_zombie_touches_nobodys_entry(each_server, connect):
    publish(connect(each_server))
    zombie = Consumer(connect(each_server, lease_seconds=1))
    (stale,) = zombie.drain()
    zombie.channel.keeper.watchdogs.append(lambda: False)  # from now on it is silent
    heir = Consumer(connect(each_server, **HEIR))
    (fresh,) = heir.drain()
    assert fresh.payload == stale.payload
    assert fresh.delivery_info["redelivered"]
    stale.ack()
    assert left(each_server) == {"unacked": 1, "index": 1, "leases": 1}
    zombie.channel.keeper.watchdogs.clear()
    zombie.channel.keeper.beat()
    assert stale.lease.lost or zombie.channel.keeper.held == 0
    assert left(each_server) == {"unacked": 1, "index": 1, "leases": 1}
    fresh.ack()
    assert left(each_server) == NOTHING_LEFT


def test_a_held_message_outlives_many_leases(server, connect):
    publish(connect(server))
    lease_s = 3  # it is renewed every half second: this leaves the machine time to stand still in
    holder = Consumer(connect(server, lease_seconds=lease_s))
    (message,) = holder.drain()
    rival = Consumer(connect(server, **HEIR))
    assert rival.drain(timeout=2.5 * lease_s) == []
    message.ack()
    assert left(server) == NOTHING_LEFT


def test_a_beat_says_what_is_lost_and_never_brings_it_back(each_server, connect):
    publish(connect(each_server))
    holder = Consumer(connect(each_server))
    (message,) = holder.drain()
    each_server.client.delete("_nograd.leases")
    holder.channel.keeper.beat()
    assert message.lease.lost
    assert each_server.client.zcard("_nograd.leases") == 0


def test_only_what_was_on_the_device_counts_a_delivery(each_server, connect):
    publish(connect(each_server), count=3)
    victim = Consumer(connect(each_server, lease_seconds=1))
    messages = victim.drain(3)
    transport.suspect([messages[1]])
    transport.suspect([messages[2]], stage="preparation")
    victim.channel.keeper.watchdogs.append(lambda: False)
    heir = Consumer(connect(each_server, **HEIR))
    again = heir.drain(3)
    assert [(m.payload["n"], transport.delivery_count(m)) for m in again] == [(0, 0), (1, 1), (2, 1)]
    for message in again:
        message.ack()
    assert each_server.client.hlen("_nograd.deliveries") == 0


def test_reject_and_give_back_count_nothing(server, connect):
    publish(connect(server), count=2)
    consumer = Consumer(connect(server))
    messages = consumer.drain(2)
    transport.suspect(messages)
    messages[0].reject(requeue=True)
    transport.give_back(messages[1:])
    assert [transport.delivery_count(m) for m in consumer.drain(2)] == [0, 0]


def test_give_back_returns_to_the_head_in_order(each_server, connect):
    publish(connect(each_server), count=6)
    before = each_server.client.lrange("q", 0, -1)
    consumer = Consumer(connect(each_server), prefetch=4)
    transport.give_back(consumer.drain(4))
    assert each_server.client.lrange("q", 0, -1) == before
    assert left(each_server) == NOTHING_LEFT


def test_what_is_expired_returns_in_order(server, connect):
    publish(connect(server), count=30)
    before = server.client.lrange("q", 0, -1)
    victim = Consumer(connect(server, lease_seconds=1), prefetch=25)
    victim.drain(25)
    victim.channel.keeper.watchdogs.append(lambda: False)
    Consumer(connect(server, **HEIR), "other")
    wait_for(lambda: server.client.llen("q") == 30)
    assert server.client.lrange("q", 0, -1) == before


def test_priorities_are_strict_and_queues_of_one_priority_share(each_server, connect):
    connection = connect(each_server)
    publish(connection, "a", 200)
    publish(connection, "b", 10)
    publish(connection, "a", 1, priority=9, late=True)
    publish(connection, "b", 2, priority=3)
    consumer = Consumer(connect(each_server), "a", "b", prefetch=40)
    taken = consumer.drain(40)
    first = [m.delivery_info["routing_key"] for m in taken]
    assert first.count("b") == 10
    for message in taken:
        message.ack()
    assert not any(m.payload.get("late") for m in taken)


def test_one_at_a_time_still_alternates_between_queues(server, connect):
    connection = connect(server)
    publish(connection, "a", 50)
    publish(connection, "b", 5)
    consumer = Consumer(connect(server), "a", "b", prefetch=1)
    seen = []
    for _ in range(12):
        (message,) = consumer.drain(1)
        seen.append(message.delivery_info["routing_key"])
        message.ack()
    assert seen.count("b") == 5


def test_queue_order_strategy_priority_is_kept(server, connect):
    connection = connect(server)
    publish(connection, "a", 20)
    publish(connection, "b", 5)
    consumer = Consumer(connect(server, queue_order_strategy="priority"), "a", "b", prefetch=15)
    assert {m.delivery_info["routing_key"] for m in consumer.drain(15)} == {"a"}


def test_a_fetch_is_bounded_in_bytes_but_never_starves(server, connect):
    publish(connect(server), count=5, blob="x" * 3000)
    consumer = Consumer(connect(server, fetch_bytes=5000), prefetch=5)
    consumer.drain(1)
    assert server.client.hlen("unacked") == 1
    assert len(consumer.drain(4)) == 4


def test_credit_bounds_what_is_held(server, connect):
    publish(connect(server), count=10)
    consumer = Consumer(connect(server), prefetch=3)
    assert len(consumer.drain(4, timeout=2.5)) <= 3
    assert left(server)["leases"] == 3


def test_a_budget_bounds_one_priority_and_frees_up(server, connect):
    connection = connect(server)
    publish(connection, count=10, priority=9)
    consumer = Consumer(connect(server, budgets={9: 2}), prefetch=8)
    bulk = consumer.drain(3, timeout=2.5)
    assert server.client.hlen("unacked") == 2
    publish(connection, count=3)
    assert len(consumer.drain(3)) == 3  # the others pass
    bulk[-1].ack()
    assert len(consumer.drain(1)) == 1
    transport.started(consumer.messages[:1])
    assert len(consumer.drain(1)) == 1
    assert server.client.llen("q\x06\x169") == 6


def test_a_throttle_bounds_each_priority_and_is_lifted_at_once(server, connect):
    rooms = {0: 2, 9: 0}
    transport.throttle(lambda step: rooms[0 if step < 5 else 9])
    try:
        connection = connect(server)
        publish(connection, count=3, priority=9)
        consumer = Consumer(connect(server), prefetch=8)
        assert not consumer.drain(1, timeout=1.5)
        publish(connection, count=2)
        assert len(consumer.drain(2)) == 2  # the others pass
        rooms[9] = 1
        transport.resume()
        assert len(consumer.drain(1)) == 1
    finally:
        transport.throttle(None)
    assert len(consumer.drain(2)) == 2


def test_no_ack_consumers_are_not_leased(server, connect):
    publish(connect(server), count=2)
    consumer = Consumer(connect(server), no_ack=True)
    consumer.drain(2)
    assert consumer.bodies == [0, 1]
    assert left(server) == NOTHING_LEFT


def test_a_message_nobody_holds_is_not_beaten_for(server, connect, monkeypatch):
    monkeypatch.setattr(transport.Channel, "serves_celery", True)
    publish(connect(server))
    consumer = Consumer(connect(server, lease_seconds=1))
    consumer.drain()
    consumer.messages.clear()
    gc.collect()
    wait_for(lambda: server.client.llen("q") == 1 or consumer.drain(timeout=0.1))


def test_closing_a_channel_restores_nothing_and_the_work_goes_on(server, connect):
    publish(connect(server), count=2)
    consumer = Consumer(connect(server, lease_seconds=1))
    messages = consumer.drain(2)
    consumer.channel.close()
    time.sleep(2.5)
    assert left(server)["leases"] == 2
    for message in messages:
        message.ack()
    wait_for(lambda: left(server) == NOTHING_LEFT)
    assert server.client.llen("q") == 0


def test_a_lost_connection_restores_nothing(server, connect):
    publish(connect(server))
    connection = connect(server)
    (message,) = Consumer(connection).drain()
    connection.collect()
    assert left(server)["leases"] == 1
    message.ack()
    wait_for(lambda: left(server) == NOTHING_LEFT)


def test_what_a_lost_connection_left_running_takes_up_credit(server, connect):
    publish(connect(server), count=5)
    connection = connect(server)
    messages = Consumer(connection, prefetch=2).drain(2)
    connection.collect()
    again = Consumer(connection, prefetch=2)
    assert again.drain(timeout=1.5) == []
    messages[0].ack()
    assert len(again.drain(1)) == 1


def test_closing_gives_back_when_celery_stops(server, connect, monkeypatch):
    from celery.worker import state

    publish(connect(server), count=4)
    before = server.client.lrange("q", 0, -1)
    consumer = Consumer(connect(server))
    consumer.drain(3)
    monkeypatch.setattr(state, "should_stop", 0)
    consumer.channel.close()
    assert server.client.lrange("q", 0, -1) == before
    assert left(server) == NOTHING_LEFT


def test_what_was_fetched_and_not_delivered_goes_back_on_close(server, connect):
    publish(connect(server), count=5)
    before = server.client.lrange("q", 0, -1)
    consumer = Consumer(connect(server))
    consumer.drain(1)
    assert left(server)["leases"] == 5
    consumer.channel.close()
    assert server.client.lrange("q", 0, -1) == before[:-1]


def test_basic_get_leases_too(each_server, connect):
    publish(connect(each_server), priority=6)
    channel = connect(each_server).channel()
    message = channel.basic_get("q")
    assert left(each_server) == {"unacked": 1, "index": 1, "leases": 1}
    message.ack()
    assert left(each_server) == NOTHING_LEFT
    assert channel.basic_get("q") is None


def test_a_bell_wakes_one_by_one_and_is_not_left_ringing(server, connect):
    connection = connect(server)
    consumers = [Consumer(connect(server), prefetch=1) for _ in range(2)]
    for consumer in consumers:
        consumer.drain(timeout=0.5)
    publish(connection, count=2)
    for consumer in consumers:
        assert len(consumer.drain(1)) == 1
    assert server.client.llen("_nograd.bell.q") <= 1
    assert server.client.pttl("_nograd.bell.q") != -1  # gone, or it has an end


def test_a_producer_without_our_transport_is_noticed(server, connect):
    consumer = Consumer(connect(server))
    consumer.drain(timeout=0.5)
    publish(connect(server, transport=None))
    assert len(consumer.drain(1)) == 1


def test_producer_batch_rings(server, connect):
    connection = connect(server)
    consumer = Consumer(connect(server))
    consumer.drain(timeout=0.3)
    with connection.Producer() as producer, producer.batch():
        for number in range(5):
            producer.publish({"n": number}, routing_key="q", exchange="")
    consumer.drain(5)
    assert sorted(consumer.bodies) == list(range(5))


def test_a_full_redis_still_hands_out_and_takes_acknowledgements(each_server, connect):
    publish(connect(each_server), count=20, blob="x" * 10_000)
    consumer = Consumer(connect(each_server, lease_seconds=2), prefetch=20)
    each_server.client.config_set("maxmemory", 1024 * 1024)
    with pytest.raises(redis.ResponseError, match=r"OOM|maxmemory"):
        publish(connect(each_server))
    messages = consumer.drain(20)
    assert len(messages) == 20
    assert consumer.channel.keeper.beat()
    for message in messages:
        message.ack()
    assert left(each_server) == NOTHING_LEFT


def test_a_queue_of_another_type_does_not_stop_the_others(server, connect):
    consumer = Consumer(connect(server), "a", "q")
    server.client.set("a", "not a list")
    publish(connect(server))
    assert len(consumer.drain(1)) == 1


def test_scripts_lost_in_a_restart_are_loaded_again(server, connect):
    connection = connect(server)
    consumer = Consumer(connection)
    publish(connection)
    consumer.drain(1)[0].ack()
    server.client.script_flush()
    publish(connection)
    consumer.drain(1)[0].ack()
    server.client.script_flush()
    consumer.channel.keeper.beat()
    assert left(server) == NOTHING_LEFT


def test_global_keyprefix_covers_every_key(server, connect):
    connection = connect(server, global_keyprefix="app:")
    consumer = Consumer(connection)
    publish(connection, count=3)
    message = consumer.drain(3)[0]
    message.reject(requeue=True)
    transport.suspect(consumer.messages[1:])
    assert all(key.startswith("app:") for key in server.client.keys("*"))
    again = consumer.drain(1)[0]
    for each in [again, *consumer.messages[1:3]]:
        each.ack()
    assert server.client.hlen("app:unacked") == 0


def test_stock_kombu_puts_our_messages_back_where_they_came_from(server, connect):
    """The last safety net: a stock worker's sweep reads our entries."""
    publish(connect(server), priority=6)
    (message,) = Consumer(connect(server)).drain()
    stock = connect(server, transport=None).channel()
    stock.qos.restore_by_tag(message.delivery_tag)
    assert server.client.llen("q\x06\x166") == 1
    assert server.client.hlen("unacked") == 0


def test_many_that_start_are_one_nudge_and_the_second_time_none(server, connect):
    publish(connect(server), count=4, priority=9)
    consumer = Consumer(connect(server, budgets={9: 4}))
    messages = consumer.drain(4)
    nudges = []
    keeper = consumer.channel.keeper
    command = keeper.nudge_command
    keeper.nudge_command = lambda channel: nudges.append(channel) or command(channel)
    for _ in range(2):
        consumer.channel.starved = True
        transport.started(messages)
        assert nudges == [consumer.channel]
    assert keeper.room(9) == 4


def test_channels_may_come_and_go_while_others_are_nudged(server, connect):
    keeper = Consumer(connect(server)).channel.keeper
    channels = [kombu.Connection(server.url, transport=OURS).channel() for _ in range(8)]
    stop, errors = threading.Event(), []

    def nudge():
        try:
            while not stop.is_set():
                transport.resume()
        except RuntimeError as err:
            errors.append(err)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=nudge)
    thread.start()
    try:
        for _ in range(5000):
            for channel in channels:
                keeper.attach(channel)
            for channel in channels:
                keeper.detach(channel)
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert errors == []
