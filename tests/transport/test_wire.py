"""Suspects are written without waiting for Redis: its replies are held back here, so whoever waits for one fails."""

from __future__ import annotations

import itertools
import socket
import threading
from contextlib import suppress

import pytest
import redis

from nograd.tasks.transport import wire
from nograd.tasks.transport.keeper import Keeper, Keys, Terms
from nograd.tasks.transport.lease import Lease

from .support import wait_for


class SlowReplies:
    """Forwards to a Redis at once, and back only while it is open."""

    def __init__(self, port: int) -> None:
        self.connections = 0
        self.open = threading.Event()
        self.open.set()
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.open.set()
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                self.connections += 1
                upstream = socket.create_connection(("127.0.0.1", self._target))
                for source, target, gate in ((client, upstream, None), (upstream, client, self.open)):
                    threading.Thread(target=_pump, args=(source, target, gate), daemon=True).start()


def _pump(source, target, gate) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            if gate is not None:
                gate.wait()
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy(server):
    made = SlowReplies(server.port)
    yield made
    made.close()


@pytest.fixture
def keeper(proxy):
    made = Keeper(
        lambda: redis.ConnectionPool(host="127.0.0.1", port=proxy.port, socket_timeout=600),
        Keys("", "u", "ui"),
        Terms(),
    )
    made.suspect("device", [lease(0)])  # connects
    yield made
    proxy.open.set()
    made._marks.close()


def lease(n: int) -> Lease:
    return Lease(f"h.1.{n}.9|q", "q", "q", step=0, deliveries=0, sha="", since=0, deadline=0)


def sets(server) -> int:
    return server.client.info("commandstats").get("cmdstat_set", {"calls": 0})["calls"]


def written(server, keeper) -> list[str]:
    return server.client.get(f"_nograd.suspects.{keeper.holder}").split()


def test_no_thread_waits_for_the_reply_to_its_suspects(server, proxy, keeper):
    proxy.open.clear()
    for n in range(200):
        keeper.suspect("device", [lease(n)])
    threads = [
        threading.Thread(target=lambda k=k: [keeper.suspect(f"prepare-{k}", [lease(n)]) for n in range(100)])
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Not one reply has come, and nobody has given up a connection for want of one.
    assert keeper._marks._unread >= 4 * 100 + 199
    assert proxy.connections == 1
    wait_for(lambda: written(server, keeper) == [lease(199).id] + [lease(99).id] * 4)
    proxy.open.set()
    numbers = itertools.count()

    def caught_up():
        keeper.suspect("device", [lease(next(numbers))])
        return keeper._marks._unread < 10

    wait_for(caught_up)
    assert proxy.connections == 1


def test_replies_that_stay_away_are_waited_for_in_the_end(server, proxy, keeper, monkeypatch):
    monkeypatch.setattr(wire, "MOST_UNREAD", 10)
    before = sets(server)
    proxy.open.clear()
    thread = threading.Thread(target=lambda: [keeper.suspect("device", [lease(n)]) for n in range(1, 51)])
    thread.start()
    wait_for(lambda: sets(server) - before >= 10)
    assert keeper._marks._unread <= 11
    assert sets(server) - before <= 12
    proxy.open.set()
    thread.join()
    wait_for(lambda: written(server, keeper) == [lease(50).id])
    assert sets(server) - before >= 50  # every one was sent; a beat meanwhile sends the last one again
    assert proxy.connections == 1
