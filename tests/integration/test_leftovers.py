"""What a mixed workload leaves in Redis: nothing without an end, but what kombu keeps of its queues."""

import uuid
from pathlib import Path

import pytest
import redis as redis_client

import own_tasks
from nograd.producer import Client
from nograd.tasks.errors import ModelFailed
from waiting import PATIENCE_S as TIMEOUT
from waiting import until

FLEET = Path(own_tasks.__file__).parent


@pytest.fixture(scope="module")
def redis(redis_url):
    return redis_client.Redis.from_url(redis_url, decode_responses=True)


@pytest.fixture(scope="module")
def worker(start_worker, tmp_path_factory):
    models = tmp_path_factory.mktemp("leftovers") / "models.toml"
    models.write_text('[triple]\nloader = "python"\nclass = "own_tasks:Triple"\n')
    return start_worker(models, "-I", "own_tasks", cwd=FLEET, lasts=True)


def without_ttl(redis):
    return {key for key in redis.scan_iter(count=1000) if redis.ttl(key) == -1}


def test_every_key_has_an_end_or_is_kombu_s_of_a_queue(redis_url, redis, worker):
    with Client(redis_url) as client:
        app = client.app
        jobs = client.submit_many("triple", [*range(300), *["bad"] * 5], priority="bulk")
        jobs += [client.submit("triple", 1, expires_s=60) for _ in range(5)]
        assert list(client.map("triple", range(500), timeout=TIMEOUT)) == [3 * n for n in range(500)]
        (error,) = client.map("triple", ["bad"], return_exceptions=True, timeout=TIMEOUT)
        assert isinstance(error, ModelFailed)
        retried = client.submit("triple", {"run": uuid.uuid4().hex, "busy until": 2})
        predict = app.signature("nograd.predict", (), {"model": "triple"}, queue="nograd.triple")
        add = app.signature("own.add", (1,), queue="nograd.triple")
        canvas = (predict.clone((2,)) | add | predict).apply_async()
        app.send_task("nograd.predict", ("triple", 1), queue="nograd.triple", ignore_result=True)
        cancelled = client.submit("triple", 1)
        cancelled.cancel()
        app.send_task("nograd.predict", ("triple", 1), queue="nograd.triple", countdown=1)
        for job in [*jobs, retried]:
            job.wait(TIMEOUT)
        assert canvas.get(timeout=TIMEOUT) == 21
    # The worker is still up: also what it renews must have an end.
    until(lambda: all(key.startswith("_kombu.binding") for key in without_ttl(redis)), lambda: without_ttl(redis))
