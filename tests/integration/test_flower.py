"""Flower shows jobs, workers and how much waits, through our transport."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

import fleet_of_tests
from nograd.producer import Client
from nograd.producer.embedded import free_port


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    shutil.copy(fleet_of_tests.__file__, folder)
    path = folder / "models.toml"
    path.write_text('[slow]\nloader = "python"\nclass = "fleet_of_tests:Slow"\nbatch = { max_items = 1 }\n')
    return path


@pytest.fixture(scope="module")
def client(redis_url, models, start_worker):
    start_worker(models, "--concurrency", "1")
    with Client(redis_url, models=models) as made:
        yield made


@pytest.fixture(scope="module")
def flower(redis_url, client, tmp_path_factory):
    port = free_port()
    env = {**os.environ, "NOGRAD_REDIS_URL": redis_url, "FLOWER_UNAUTHENTICATED_API": "true"}
    log = (tmp_path_factory.mktemp("flower") / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "nograd.producer.cli", "flower", "--port", str(port)],
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
    )

    def get(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=data)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode()

    deadline = time.monotonic() + 60
    while True:
        try:
            get("/healthcheck")
            break
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    yield get
    process.terminate()
    process.wait(30)


def until(look, wanted):
    deadline = time.monotonic() + 60
    while not wanted(seen := look()):
        assert time.monotonic() < deadline, seen
        time.sleep(0.2)
    return seen


def test_queue_lengths_and_the_broker_page(client, flower):
    jobs = [client.submit("slow", 1.0) for _ in range(8)]

    def lengths():
        return {queue["name"]: queue["messages"] for queue in json.loads(flower("/api/queues/length"))["active_queues"]}

    seen = until(lengths, lambda lengths: 0 < lengths.get("nograd.slow", 0) < 8)
    assert set(seen) == {"nograd.slow"}
    page = flower("/broker")
    assert "nograd.slow" in page
    assert "redis://" in page
    for job in jobs:
        job.cancel()


def test_a_job_is_shown_by_what_it_is_about_and_never_by_its_contents(client, flower):
    job = client.submit("slow", 0)
    assert job.result(60) == 0

    def shown():
        return json.loads(flower(f"/api/task/info/{job.id}"))

    def known():
        try:
            return shown()
        except urllib.error.HTTPError:
            return {}

    task = until(known, lambda task: task.get("state") == "SUCCESS")
    assert task["name"] == "nograd.predict"
    assert task["args"] == "slow int"
    assert task["worker"].startswith("test-")
    assert task["timings"]["batches"] == 1
    assert task["timings"]["worker"] == task["worker"]
    assert task["runtime"] > 0
    assert "model_version" in flower(f"/task/{job.id}")


def test_flower_s_api_submits_predictions(client, flower):
    body = {"args": ["slow", 0.25], "queue": "nograd.slow"}
    task_id = json.loads(flower("/api/task/send-task/nograd.predict", body))["task-id"]
    assert client.result(task_id, timeout=60) == 0.25
