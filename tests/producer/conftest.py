"""Real servers and real workers: a private Redis for each session, and a stock Celery worker for what needs no model."""

import os
import subprocess
import sys
import time
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
    """An empty Redis."""
    with redis_py.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def client(redis_url):
    with Client(redis_url) as client:
        yield client


@pytest.fixture(scope="module")
def served():
    """A client of a Redis with a worker that serves the models of `stand_in`."""
    with EmbeddedRedis() as server, stand_in(server.url), Client(server.url) as client:
        yield client


def stand_in(url):
    return Worker([sys.executable, "-m", "celery", "-A", "stand_in", "worker", "-P", "threads"], url, "echo")


class Worker:
    """A worker process, from its first registered model to its end."""

    def __init__(self, argv, url, model, timeout=60, **env):
        self.argv, self.url, self.model, self.timeout = argv, url, model, timeout
        self.env = {**os.environ, "NOGRAD_REDIS_URL": url, **env}

    def __enter__(self):
        self.process = subprocess.Popen(
            self.argv, env=self.env, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + self.timeout
        with redis_py.Redis.from_url(self.url) as client:
            while self.model not in registry.known(client):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.process.kill()
                    pytest.fail(f"the worker does not start:\n{self.process.stdout.read().decode()}")
                time.sleep(0.05)
        return self.process

    def __exit__(self, *_):
        self.process.terminate()
        self.process.communicate(timeout=30)
