"""Workers die, Redis goes away: no job is lost, no innocent pays for a neighbour, nothing hangs."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import fleet_of_tests
from nograd.producer import Client
from nograd.tasks import transport
from nograd.tasks.errors import WorkerDied
from waiting import PATIENCE_S, until
from watching import watch

MODELS = """
[killer]
loader = "python"
class = "fleet_of_tests:Killer"
batch = { max_items = 16 }
hard_timeout_s = 5

[waits]
loader = "python"
class = "fleet_of_tests:Waits"
batch = { max_items = 1 }
"""


@pytest.fixture
def models(tmp_path):
    shutil.copy(fleet_of_tests.__file__, tmp_path)
    (tmp_path / "models.toml").write_text(MODELS)
    return tmp_path / "models.toml"


@pytest.fixture
def redis(start_worker):
    with start_worker.redis() as server:
        yield server


@pytest.fixture
def short_lease(monkeypatch):
    monkeypatch.setenv("NOGRAD_LEASE_S", "3")


@pytest.fixture
def launch(redis, models, tmp_path):
    """A worker under the launcher, which starts it again when it dies."""
    processes = []

    def launch():
        log = tmp_path / f"launcher{len(processes)}.log"
        command = [sys.executable, "-m", "nograd.producer.cli", "worker", "--models", models, "--gpus", "none"]
        env = {**os.environ, "NOGRAD_REDIS_URL": redis.url}
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
        watch("a launcher", process, log.read_text)
        processes.append(process)
        return process

    yield launch
    for process in processes:
        process.terminate()
        process.wait(PATIENCE_S)


_slow = pytest.mark.slow


def nograd(*args, redis):
    command = [sys.executable, "-m", "nograd.producer.cli", *args, "--json", "--redis", redis.url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout


@pytest.mark.parametrize(
    ("how", "says"),
    [
        pytest.param("exit", "", marks=_slow),
        ("segfault", ""),
        pytest.param("crash in prepare", "", marks=_slow),
        pytest.param(
            "hang", r" \(the last one: the forward of model killer took longer than hard_timeout_s = 5 s\)", marks=_slow
        ),
    ],
)
def test_a_job_that_kills_workers_ends_in_the_dead_list_and_its_neighbours_succeed(
    redis, models, launch, short_lease, how, says
):
    with Client(redis.url, models=models) as client:
        jobs = client.submit_many("killer", [*range(20), how, *range(20, 40)])
        launch()
        with pytest.raises(WorkerDied, match=f"3 workers died over this job{says};"):
            jobs[20].result(PATIENCE_S)
        assert jobs[20].timings().deaths == 3
        assert [job.result(PATIENCE_S) for n, job in enumerate(jobs) if n != 20] == list(range(40))
        (letter,) = transport.DeadLetters(client.app.backend.client)
        assert letter["task_id"] == jobs[20].id
        assert letter["deliveries"] == 3
        assert json.loads(nograd("dead", "list", redis=redis)) == {"dead": [letter]}
        assert (
            how
            in base64.b64decode(
                json.loads(json.loads(nograd("dead", "show", letter["id"], redis=redis))["message"])["body"]
            ).decode()
        )
        nograd("dead", "replay", letter["id"], redis=redis)
        assert len(transport.DeadLetters(client.app.backend.client)) == 0
        assert not jobs[20].done()  # it has another chance, and its old failure is forgotten


def test_a_killed_worker_loses_nothing(redis, models, start_worker, short_lease):
    with Client(redis.url, models=models) as client:
        jobs = client.submit_many("killer", list(range(600)))

        def done():
            return sum(outcome.ready for outcome in client.broker.outcomes([job.id for job in jobs]))

        for _ in range(3):
            before = done()
            worker = start_worker(models, redis_url=redis.url)
            # Past those that were on the device before: three deaths over one job would be its own fault.
            until(lambda before=before: done() >= before + 100)
            worker.process.send_signal(signal.SIGKILL)
            worker.process.wait()
        start_worker(models, redis_url=redis.url)
        assert [job.result(PATIENCE_S) for job in jobs] == list(range(600))


def test_a_worker_can_be_stopped_while_redis_is_away(redis, models, start_worker, gate):
    worker = start_worker(models, redis_url=redis.url)
    with Client(redis.url, models=models) as client:
        client.submit("waits", str(gate))
        until(lambda: gate.reached)
        os.kill(redis.process.pid, signal.SIGKILL)
        worker.process.terminate()
        gate.open()
        worker.process.wait(PATIENCE_S)


def test_a_cold_shutdown_waits_for_nothing(redis, models, start_worker, gate):
    worker = start_worker(models, redis_url=redis.url)
    with Client(redis.url, models=models) as client:
        job = client.submit("waits", str(gate))
        until(lambda: gate.reached)
        worker.process.send_signal(signal.SIGQUIT)
        worker.process.wait(PATIENCE_S)  # the gate is closed
        assert job.state != "FAILURE"


def test_a_model_that_takes_long_to_load_can_be_interrupted(redis, models, start_worker, tmp_path):
    (tmp_path / "lazy.py").write_text(
        "import time\n"
        "class Lazy:\n"
        "    def load(self, device): time.sleep(1000)\n"
        "    def forward(self, batch): return batch\n"
    )
    models.write_text('[lazy]\nloader = "python"\nclass = "lazy:Lazy"\n')
    worker = start_worker(models, ready=False, redis_url=redis.url)
    until(lambda: "nograd.lazy" in worker.text())
    time.sleep(1)
    assert worker.stop() == 0
