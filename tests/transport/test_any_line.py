"""A worker that dies at any line of the transport loses nothing; stock kombu does, at one line."""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path

import kombu
import pytest
from kombu.transport import redis as stock

from nograd.tasks.transport import channel, keeper
from waiting import PATIENCE_S

from .support import OURS, wait_for

PACKAGE = str(Path(channel.__file__).parent)
MESSAGES = 5


def consume(url: str, transport: str | None, done: int) -> None:
    """Take every message, note it, acknowledge it or give it back once."""
    connection = kombu.Connection(url, transport=transport)
    queue = kombu.Queue("q", routing_key="q")
    seen = []

    def work(message):
        seen.append(message.payload["n"])
        if message.payload["n"] == 2 and seen.count(2) == 1:
            message.reject(requeue=True)
        else:
            os.write(done, b"%d\n" % message.payload["n"])
            message.ack()

    with connection.channel() as opened:
        consumer = kombu.Consumer(opened, [queue], on_message=work)
        consumer.qos(prefetch_count=3)
        consumer.consume()
        while len(seen) < MESSAGES + 1:
            connection.drain_events(timeout=PATIENCE_S)
        if opened.__class__ is channel.Channel:
            opened.keeper.beat()


def die_at(line: int, body) -> int:
    """Run `body` in a child that is gone, without a word, when the transport has run so many lines; its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            count += 1
            if count >= line:
                os._exit(9)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)
    try:
        body()
        os._exit(0)
    except BaseException:  # noqa: BLE001 - a forked child must not return into pytest
        sys.settrace(None)
        traceback.print_exc()
        os._exit(1)


def accounted(server, folder: Path) -> tuple[set[int], set[str]]:
    """Numbers of the messages that wait, are leased or are done; and leases without entries, entries without leases."""
    client, found = server.client, set()
    raw = client.lrange("q", 0, -1) + [json.dumps(json.loads(each)[0]) for each in client.hvals("unacked")]
    for each in raw:
        found.add(json.loads(base64.b64decode(json.loads(each)["body"]))["n"])
    for number in (folder / "done").read_text().split():
        found.add(int(number))
    return found, set(client.hkeys("unacked")) ^ set(client.zrange("_nograd.leases", 0, -1))


def connections(server) -> set[str]:
    return {client["id"] for client in server.client.client_list()}


def refill(server, connection, folder: Path) -> int:
    server.client.flushdb()
    with connection.Producer() as producer:
        for n in range(MESSAGES):
            producer.publish({"n": n}, routing_key="q", exchange="")
    path = folder / "done"
    with suppress(FileNotFoundError):
        path.unlink()
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


@pytest.mark.parametrize("stride", [401, pytest.param(11, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_dying_at_any_line_loses_nothing(server, tmp_path, stride):
    publisher = kombu.Connection(server.url)  # stock: no thread of ours is there when we fork
    assert not keeper.keepers()
    line, deaths = 1, 0
    while True:
        done = refill(server, publisher, tmp_path)
        before = connections(server)
        status = die_at(line, lambda: consume(server.url, OURS, done))  # noqa: B023 - called at once
        os.close(done)
        wait_for(lambda: connections(server) <= before, "Redis has not seen the end of what the dead had written")  # noqa: B023
        found, torn = accounted(server, tmp_path)
        assert found == set(range(MESSAGES)), f"lost at line event {line}"
        assert not torn, f"torn at line event {line}"
        if status != 9:
            assert status == 0
            break
        deaths += 1
        line += stride
    assert deaths >= 6  # it has been through all of it


def test_stock_kombu_loses_a_message_at_one_line(server, tmp_path):
    """The negative control: dying after BRPOP and before the message is written down."""
    publisher = kombu.Connection(server.url)
    done = refill(server, publisher, tmp_path)
    child = os.fork()
    if not child:
        stock.QoS.append = lambda *_: os._exit(9)
        consume(server.url, None, done)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    os.close(done)
    found, _ = accounted(server, tmp_path)
    assert found == set(range(1, MESSAGES))
