"""Many jobs, some of them bad in twelve ways: each good one succeeds, each bad one ends with an error of its own."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gauntlet
from nograd.producer import Client
from nograd.producer.embedded import EmbeddedRedis
from nograd.tasks import transport
from nograd.tasks.keys import queue_name
from waiting import PATIENCE_S, until
from watching import watch

WORKERS = 3
MODELS = """
[gauntlet]
loader = "python"
class = "gauntlet:Gauntlet"
hard_timeout_s = 3
batch = { max_items = 32 }
"""


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    """A client of workers under the launcher, which starts those again that die; a killed one is missed soon."""
    shutil.copy(gauntlet.__file__, tmp_path)
    models = tmp_path / "models.toml"
    models.write_text(MODELS)
    monkeypatch.setenv("NOGRAD_LEASE_S", "3")
    monkeypatch.setenv("NOGRAD_MODELS", str(models))
    with EmbeddedRedis() as redis, Client(redis.url) as client, (tmp_path / "launcher.log").open("wb") as log:
        # Where torch does not see these GPUs, the workers of `all` use the CPU, which changes nothing here.
        gpus = ",".join(map(str, range(WORKERS)))
        command = [sys.executable, "-m", "nograd.producer.cli", "worker", "--models", models, "--gpus", "all"]
        env = {**os.environ, "NOGRAD_REDIS_URL": redis.url, "CUDA_VISIBLE_DEVICES": gpus}
        launcher = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        watch("the launcher", launcher, Path(log.name).read_text)
        yield client, launcher
        launcher.terminate()
        launcher.wait(PATIENCE_S)


def send(client, inputs):
    """As a client without our checks would: some of these inputs it would refuse."""
    app, queue = client.app, queue_name("gauntlet")
    with app.producer_pool.acquire() as producer:
        return [
            app.send_task("nograd.predict", ("gauntlet", value), queue=queue, producer=producer).id for value in inputs
        ]


def wait_for_all(client, ids, seconds):
    """The outcomes; fails if some job has none in the end."""

    def ended():
        outcomes = [
            outcome for start in range(0, len(ids), 500) for outcome in client.broker.outcomes(ids[start : start + 500])
        ]
        open_ones.append(sum(not outcome.ready for outcome in outcomes))
        return None if open_ones[-1] else outcomes

    open_ones = []
    return until(ended, lambda: f"{open_ones[-1]} of {len(ids)} jobs have no end", seconds)


@pytest.mark.parametrize(
    ("good", "bad_of_each_kind"),
    [
        # Nine deaths and restarts; each loads torch anew, which takes long on a machine that is busy.
        pytest.param(388, 1, marks=pytest.mark.timeout(900)),
        pytest.param(9900, 8, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_every_job_ends_as_it_deserves_and_the_fleet_lives_on(fleet, good, bad_of_each_kind):
    client, launcher = fleet
    jobs = [*range(good), *(kind for kind in gauntlet.BAD for _ in range(bad_of_each_kind))]
    random.Random(7).shuffle(jobs)
    ids = send(client, [gauntlet.BAD.get(job, job) for job in jobs])
    outcomes = wait_for_all(client, ids, 700 if good < 1000 else 1600)
    wrong = []
    for job, outcome in zip(jobs, outcomes, strict=True):
        expected = gauntlet.ERRORS.get(job)
        if expected is not None:
            right = type(outcome.error) is expected
        else:
            right = outcome.error is None and outcome.value == (2 * job + 0.5 if isinstance(job, int) else 0.5)
        if not right:
            wrong.append((job, outcome.value, outcome.error))
    assert wrong == []
    # What killed workers is kept for whoever wants to know why; nothing else is left over.
    lethal = {task_id for task_id, job in zip(ids, jobs, strict=True) if job in {"hangs", "exits", "segfaults"}}
    assert {letter["task_id"] for letter in transport.DeadLetters(client.app.backend.client)} == lethal
    assert launcher.poll() is None
    again = send(client, range(200))
    assert [outcome.value for outcome in wait_for_all(client, again, PATIENCE_S)] == [2 * n + 0.5 for n in range(200)]
    assert client.broker.waiting(["gauntlet"]) == {"gauntlet": 0}
