"""Flower shows jobs, workers and how much waits, through our transport."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

import fleet_of_tests
from nograd.producer import Client
from nograd.producer.embedded import free_port
from waiting import PATIENCE_S, until


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    shutil.copy(fleet_of_tests.__file__, folder)
    path = folder / "models.toml"
    path.write_text('[waits]\nloader = "python"\nclass = "fleet_of_tests:Waits"\nbatch = { max_items = 1 }\n')
    return path


@pytest.fixture(scope="module")
def client(redis_url, models, start_worker):
    start_worker(models, "--concurrency", "1", lasts=True)
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
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.read().decode()

    def answers():
        assert process.poll() is None
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return get("/healthcheck")

    until(answers, "Flower does not start")
    yield get
    process.terminate()
    process.wait(PATIENCE_S)


def test_queue_lengths_and_the_broker_page(client, flower, gate):
    jobs = [client.submit("waits", str(gate)) for _ in range(8)]  # the worker takes one

    def lengths():
        return {queue["name"]: queue["messages"] for queue in json.loads(flower("/api/queues/length"))["active_queues"]}

    until(lambda: lengths() == {"nograd.waits": 7})
    page = flower("/broker")
    assert "nograd.waits" in page
    assert "redis://" in page
    gate.open()
    assert [job.result(PATIENCE_S) for job in jobs] == [str(gate)] * 8


def test_a_job_is_shown_by_what_it_is_about_and_never_by_its_contents(client, flower):
    job = client.submit("waits", None)
    assert job.result(PATIENCE_S) is None

    def succeeded():
        with contextlib.suppress(urllib.error.HTTPError):
            task = json.loads(flower(f"/api/task/info/{job.id}"))
            return task if task["state"] == "SUCCESS" else None

    task = until(succeeded)
    assert task["name"] == "nograd.predict"
    assert task["args"] == "waits NoneType"
    assert task["worker"].startswith("test-")
    assert task["timings"]["batches"] == 1
    assert task["timings"]["worker"] == task["worker"]
    assert task["runtime"] > 0
    assert "model_version" in flower(f"/task/{job.id}")


def test_flower_s_api_submits_predictions(client, flower):
    body = {"args": ["waits", None], "queue": "nograd.waits"}
    task_id = json.loads(flower("/api/task/send-task/nograd.predict", body))["task-id"]
    assert client.result(task_id, timeout=PATIENCE_S) is None
