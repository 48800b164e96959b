"""Real Redis servers and real worker processes, each test with its own."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import kombu
import pytest

from nograd.tasks.transport.keeper import keepers

from .support import OURS, SERVERS, Server, Worker


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(*options: str, executable: str = "") -> Server:
        folder = tmp_path / f"redis{len(made)}"
        folder.mkdir()
        made.append(Server(executable or SERVERS.get("redis-server") or next(iter(SERVERS.values())), folder, *options))
        return made[-1]

    yield make
    for server in made:
        server.signal(signal.SIGCONT)
        server.kill()


@pytest.fixture
def server(make_server) -> Server:
    return make_server()


@pytest.fixture(params=sorted(SERVERS))
def each_server(request, make_server) -> Server:
    return make_server(executable=SERVERS[request.param])


@pytest.fixture
def make_worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(server: Server, **kwargs) -> Worker:
        made.append(Worker(server, tmp_path, **kwargs))
        return made[-1]

    yield make
    for worker in made:
        with suppress(ProcessLookupError):
            worker.signal(signal.SIGCONT)
        worker.kill()


@pytest.fixture
def connect() -> Iterator[Callable[..., kombu.Connection]]:
    made: list[kombu.Connection] = []

    def make(server: Server | str, transport: str | None = OURS, **options) -> kombu.Connection:
        url = server if isinstance(server, str) else server.url
        made.append(kombu.Connection(url, transport=transport, transport_options=options))
        return made[-1]

    yield make
    for connection in made:
        connection.collect()
    for keeper in keepers():
        keeper.abandon()
