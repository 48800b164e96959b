"""Messages nobody can read: none takes a neighbour along, and all of them end in the dead list with a reason."""

from __future__ import annotations

import base64
import json

import pytest

from nograd.tasks.transport import DeadLetters, bury

from .support import NOTHING_LEFT, left, producer, ran, wait_for
from .test_laws import Consumer, publish


def message(**changes):
    good = {
        "body": base64.b64encode(b"[[], {}, {}]").decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"task": "jobs.noop", "id": "x"},
        "properties": {
            "delivery_tag": "t",
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "q"},
            "priority": 0,
        },
    }
    return json.dumps(good | changes).encode()


PROPERTIES = json.loads(message())["properties"]

MALFORMED = {
    "no delivery tag": message(properties={key: value for key, value in PROPERTIES.items() if key != "delivery_tag"}),
    "a header named like it": message(properties={"body_encoding": "base64"}, headers={"delivery_tag": "t"}),
    "no properties": message(properties=None),
    "properties that are none": message(properties=[1]),
    "headers that are none": message(headers="x"),
    "broken JSON": b'{"body": "e30=", "properties": {"delivery_tag": "t"',
    "not an object": b"[1, 2]",
    "nothing": b"",
    "wrong encoding": message(body="ü").decode().encode("utf-16"),
    "latin-1": b'{"body": "\xfc", "properties": {"delivery_tag": "t"}}',
    "a body that is no base64": message(body="abcde"),
    "an unknown body encoding": message(properties=PROPERTIES | {"body_encoding": "rot13"}),
    "an unknown content encoding": message(**{"content-encoding": "utf-99"}),
    "nested without end": b'{"a":' * 100_000,
    "a type that kombu does not know": message(headers={"x": {"__type__": "x", "__value__": 1}}),
    "20 MB": b'{"body": "' + b"A" * 20_000_000 + b'", "properties": {"delivery_tag": "t"}}',
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_message_is_buried_with_a_reason_and_its_neighbours_arrive(server, connect, kind):
    connection = connect(server)
    publish(connection, body_before=True)
    server.client.connection_pool.connection_kwargs["decode_responses"] = False
    server.client.lpush("q", MALFORMED[kind])
    publish(connection, count=2)
    consumer = Consumer(connect(server))
    for each in consumer.drain(3):
        each.ack()
    assert consumer.bodies == [0, 0, 1]
    dead = DeadLetters(server.client)
    wait_for(lambda: len(dead) == 1)
    (letter,) = dead
    assert letter["reason"]
    assert letter["queue"] == "q"
    server.client.connection_pool.disconnect()
    assert left(server) == NOTHING_LEFT


def test_the_dead_keep_their_bytes_and_can_be_replayed_or_dropped(server, connect):
    publish(connect(server), count=2)
    raw = server.client.lrange("q", 0, -1)
    consumer = Consumer(connect(server))
    for each in consumer.drain(2):
        assert bury(each, "poison", task_id="x")
    dead = DeadLetters(server.client)
    letters = list(dead)
    assert [letter["reason"] for letter in letters] == ["poison", "poison"]
    assert [dead.message(letter["id"]) for letter in letters] == raw[::-1]
    assert dead.replay(letters[0]["id"])
    assert server.client.lrange("q", 0, -1) == [raw[1]]
    assert dead.drop(letters[1]["id"])
    assert not dead.drop(letters[1]["id"])
    assert len(dead) == 0
    assert left(server) == NOTHING_LEFT


def test_a_worker_survives_all_of_them_at_once(server, make_worker):
    app = producer(server)
    app.send_task("jobs.record", (0,), ignore_result=True)
    for raw in MALFORMED.values():
        server.client.lpush("jobs", raw)
    app.send_task("jobs.record", (1,), ignore_result=True)
    worker = make_worker(server).ready()
    wait_for(lambda: sorted(ran(server)) == [0, 1])
    wait_for(lambda: len(DeadLetters(server.client)) == len(MALFORMED))
    assert worker.stop() == 0
    assert left(server) == NOTHING_LEFT
