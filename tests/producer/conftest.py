"""Real servers and real workers: a private Redis, and a stock Celery worker for what needs no model."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis as redis_py

from nograd.producer import Client
from nograd.producer.embedded import EmbeddedRedis
from nograd.tasks import registry

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


@pytest.fixture(scope="session")
def served_url():
    """A Redis with a worker that serves the models of `stand_in`."""
    with EmbeddedRedis() as server, stand_in(server.url):
        yield server.url


@pytest.fixture
def served(served_url):
    with Client(served_url) as client:
        yield client


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
def stand_in(url, timeout=60):
    """A worker process, from its registered models to its end."""
    argv = [sys.executable, "-m", "celery", "-A", "stand_in", "worker", "-P", "threads", "--without-mingle"]
    env = {**os.environ, "NOGRAD_REDIS_URL": url}
    process = subprocess.Popen(argv, env=env, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + timeout
    try:
        with redis_py.Redis.from_url(url) as connection:
            while not registry.known(connection):
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    pytest.fail(f"the worker does not start:\n{process.stdout.read().decode()}")
                time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30)
