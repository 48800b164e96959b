"""Real servers and real workers: a private Redis, and a stock Celery worker for what needs no model."""

import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis as redis_py

from nograd.producer import Client
from nograd.producer.embedded import EmbeddedRedis
from nograd.tasks import registry
from waiting import PATIENCE_S, until
from watching import watch

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def redis_server():
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def redis_url(redis_server):
    """An empty Redis without a worker."""
    with redis_py.Redis.from_url(redis_server.url) as connection:
        connection.flushall()
    return redis_server.url


@pytest.fixture
def redis(redis_url):
    with redis_py.Redis.from_url(redis_url, decode_responses=True) as connection:
        yield connection


@pytest.fixture
def client(redis_url, register):
    """A client that knows the models of `stand_in`, with nobody to serve them."""
    with Client(redis_url) as client:
        register(client, echo="json", total="rows", image="image")
        yield client


@pytest.fixture(scope="module")
def served_url():
    """A Redis with a worker that serves the models of `stand_in`."""
    with EmbeddedRedis() as server, stand_in(server.url):
        yield server.url


@pytest.fixture
def served(served_url):
    with Client(served_url) as client:
        yield client


@pytest.fixture
def busy(served, gates):
    """Jobs that keep all threads of the worker busy, each at its gate; `busy()` opens them all."""
    stand = [gates() for _ in range(8)]
    jobs = [served.submit("waits", str(gate)) for gate in stand]
    until(lambda: all(gate.reached for gate in stand))

    def end():
        for gate in stand:
            gate.open()
        return [job.result(PATIENCE_S) for job in jobs] == [str(gate) for gate in stand]

    return end


@pytest.fixture
def revoked(served):
    """The ids of the jobs of which the worker has heard that they are cancelled: `revoked()`."""

    def ask():
        ((_, ids),) = served.app.control.inspect(timeout=PATIENCE_S, limit=1).revoked().items()
        return ids

    return ask


@pytest.fixture
def register():
    """Make models known, as a worker does: `register(client, name=kind, …)`."""

    def register(client, **kinds):
        cards = [
            registry.ModelCard(name=name, loader="python", input=kind, queue=f"nograd.{name}", max_items=16)
            for name, kind in kinds.items()
        ]
        registry.register(client.app.backend.client, cards)

    return register


@contextmanager
def stand_in(url, app="stand_in", pool=("-P", "threads"), **extra):
    """A worker process, from its registered models to its end; a test ends if it ends before."""
    argv = [sys.executable, "-m", "celery", "-A", app, "worker", *pool, "--without-mingle"]
    shared = HERE.with_name("fleet")
    env = {**os.environ, "NOGRAD_REDIS_URL": url, "PYTHONPATH": str(shared), **extra}
    log = tempfile.TemporaryFile()  # noqa: SIM115 - not a pipe: nobody reads it while the worker runs
    process = subprocess.Popen(argv, env=env, cwd=HERE, stdout=log, stderr=subprocess.STDOUT)

    def said():
        return os.pread(log.fileno(), 1 << 20, 0).decode()  # and where the worker writes stays as it is

    watched = watch(app, process, said, lasts=True)
    try:
        with redis_py.Redis.from_url(url) as connection:
            until(lambda: registry.known(connection) or process.poll() is not None, said)
            assert process.poll() is None, said()
            yield
    finally:
        watched.let_go()
        process.terminate()
        process.wait(PATIENCE_S)


class Backfills:
    """A Redis, a client, and the worker of `backfill_worker`, with a gate that holds its chunks back."""

    def __init__(self, url, folder):
        self.url = url
        self.gate = folder / "gate"
        self.client = Client(url)
        self.redis = redis_py.Redis.from_url(url)

    def worker(self, weights="aa", chunk_s=0.0):
        env = {"GATE": str(self.gate), "WEIGHTS": weights, "CHUNK_S": str(chunk_s)}
        return stand_in(self.url, app="backfill_worker", pool=(), **env)


@pytest.fixture(scope="module")
def _backfills(tmp_path_factory):
    with EmbeddedRedis() as server:
        yield Backfills(server.url, tmp_path_factory.mktemp("gate"))


@pytest.fixture
def empty(_backfills):
    """A Redis on which nobody works."""
    _backfills.redis.flushall()
    _backfills.gate.unlink(missing_ok=True)
    return _backfills


@pytest.fixture(scope="module")
def _with_worker(tmp_path_factory):
    with EmbeddedRedis() as server:
        made = Backfills(server.url, tmp_path_factory.mktemp("gate"))
        with made.worker(chunk_s=0.02):
            yield made


@pytest.fixture
def backfills(_with_worker):
    """A Redis with a worker that runs backfills."""
    _with_worker.gate.unlink(missing_ok=True)
    return _with_worker


@pytest.fixture
def csv(tmp_path):
    """A thousand rows, eleven of them bad."""
    (tmp_path / "in").mkdir()
    rows = [f"id{i},{-i if i % 100 == 7 else i}" for i in range(1000)]
    rows[500] = "id500,oops"
    path = tmp_path / "in" / "rows.csv"
    path.write_text("k,x\n" + "\n".join(rows) + "\n")
    return path
