"""The launcher with real workers: one per GPU, started again when it dies, ended with it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import fleet_of_tests
from nograd.producer import Client
from nograd.tasks.errors import ConfigError
from nograd.workers import launcher
from nograd.workers.launcher import visible_gpus
from nograd.workers.resources import usable_cores
from waiting import PATIENCE_S, until
from watching import watch

TINY = """
import torch

class Doubler:
    def load(self, device): pass
    def forward(self, batch): return [2 * n for n in batch]

class Threads(Doubler):
    def forward(self, batch): return [torch.get_num_threads() for _ in batch]
"""
#: what makes ``--gpus all`` start two workers; without these GPUs they use the CPU
TWO = {"CUDA_VISIBLE_DEVICES": "0,1"}
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's help is Linux only")


# -- which devices ----------------------------------------------------------------------------------------------------


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put an `nvidia-smi` of this script on the path, alone; None for none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    def install(script):
        program = tmp_path / "nvidia-smi"
        program.write_text(script)
        program.chmod(0o755)

    return install


def test_all_means_the_installed_gpus(nvidia_smi):
    nvidia_smi("#!/bin/sh\necho 0\necho 1\necho 2\n")
    assert visible_gpus("all") == ["0", "1", "2"]


@pytest.mark.parametrize("script", [None, "#!/bin/sh\necho no driver\nexit 9\n", "#!/bin/sh\n", "#!/no/such/shell\n"])
def test_without_a_gpu_all_means_a_cpu_worker(nvidia_smi, script):
    if script is not None:
        nvidia_smi(script)
    assert visible_gpus("all") == [""]


def test_an_nvidia_smi_that_hangs_means_a_cpu_worker_and_a_warning(nvidia_smi, monkeypatch, caplog):
    nvidia_smi("#!/bin/sh\nexec /bin/sleep 600\n")
    monkeypatch.setattr(launcher, "NVIDIA_SMI_TIMEOUT_S", 0.3)
    assert visible_gpus("all") == [""]
    assert "no GPU is used" in caplog.text
    assert "timed out" in caplog.text


@pytest.mark.parametrize(
    ("limit", "gpus"),
    [
        ("1,3", ["1", "3"]),
        (" 1 , 3 ,", ["1", "3"]),
        ("GPU-1234, MIG-5678", ["GPU-1234", "MIG-5678"]),
        ("", [""]),
        (" ", [""]),
        ("-1", [""]),
        ("0,-1,2", ["0"]),
    ],
)
def test_the_environment_limits_what_all_means(nvidia_smi, limit, gpus):
    nvidia_smi("#!/bin/sh\necho 0\n")
    assert visible_gpus("all", {"CUDA_VISIBLE_DEVICES": limit}) == gpus


@pytest.mark.parametrize(
    ("asked", "gpus"), [("none", [""]), ("0", ["0"]), ("2, 0", ["2", "0"]), ("GPU-12,MIG-3", ["GPU-12", "MIG-3"])]
)
def test_devices_may_be_named(asked, gpus):
    assert visible_gpus(asked, {"CUDA_VISIBLE_DEVICES": "7"}) == gpus


@pytest.mark.parametrize("asked", ["", "some", "0,0", "0,,1", "-1", "1.5"])
def test_anything_else_is_refused(asked):
    with pytest.raises(ConfigError, match=re.escape(f"--gpus = {asked!r}")):
        visible_gpus(asked)


def test_the_pause_before_a_restart_doubles_up_to_its_limit_however_often_a_worker_dies():
    worker = launcher._Worker("", [], {}, started=0.0)
    pauses = [worker.died(now=1.0) for _ in range(3000)]
    assert pauses[:6] == [1, 2, 4, 8, 16, 30]
    assert set(pauses[6:]) == {30}
    assert worker.died(now=launcher.STEADY_S + 1) == 1  # it had lived for long


# -- real workers -----------------------------------------------------------------------------------------------------


class Launched:
    """A launcher in a process of its own, and its log."""

    def __init__(self, models, redis_url, gpus, log, args=(), env=None):
        self.log = log
        words = ["worker", "--models", str(models), "--gpus", gpus, *args]
        environment = {**os.environ, "NOGRAD_REDIS_URL": redis_url, **(env or {})}
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nograd.producer.cli", *words], env=environment, stdout=out, stderr=out
            )
        watch("a launcher", self.process, self.text)

    def text(self):
        return self.log.read_text(errors="replace")

    def workers(self):
        """The process ids of its workers."""
        listing = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 2) for line in listing.splitlines()]
        return [int(pid) for pid, parent, args in rows if int(parent) == self.process.pid and " celery " in args]

    def until_ready(self, workers=1):
        until(lambda: self.text().count(" ready.") >= workers, self.text)
        return self

    def another_worker(self, than):
        return until(lambda: [pid for pid in self.workers() if pid not in than], self.text)[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "doubling_of_launcher.py").write_text(TINY)
    file = folder / "models.toml"
    file.write_text('[double]\nloader = "python"\nclass = "doubling_of_launcher:Doubler"\n')
    more = '[threads]\nloader = "python"\nclass = "doubling_of_launcher:Threads"\n'
    (folder / "two.toml").write_text(file.read_text() + more)
    return file


@pytest.fixture(scope="module")
def launch(models, redis_url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("launcher")

    @contextmanager
    def launch(gpus="none", *args, models=models, env=None):
        log = folder / f"{time.monotonic_ns()}.log"
        launched = Launched(models, redis_url, gpus, log, args, env)
        try:
            yield launched
        finally:
            if launched.process.poll() is None:
                launched.process.terminate()
            launched.process.wait(PATIENCE_S)

    return launch


@pytest.fixture(scope="module")
def pair(launch):
    """Two workers; on a machine without these GPUs they use the CPU, which changes nothing here."""
    with launch("all", env=TWO) as launched:
        yield launched.until_ready(2)


def alive(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


@linux
def test_a_worker_is_born_with_its_device_and_model_file_in_its_environment(pair, models):
    # /proc shows what the kernel was given before the interpreter started.
    born_with = [
        dict(entry.partition("=")[::2] for entry in Path(f"/proc/{pid}/environ").read_text().split("\0"))
        for pid in pair.workers()
    ]
    assert sorted(env["CUDA_VISIBLE_DEVICES"] for env in born_with) == ["0", "1"]
    assert {(env["CUDA_DEVICE_ORDER"], env["NOGRAD_MODELS"]) for env in born_with} == {("PCI_BUS_ID", str(models))}
    half = str(max(1, usable_cores() // 2))
    assert {(env["NOGRAD_THREADS"], env["OMP_NUM_THREADS"]) for env in born_with} == {(half, half)}


def test_a_worker_keeps_to_its_share_of_the_cores_and_to_the_models_it_is_given(launch, models, redis_url):
    args = ("--only", "threads", "--", "--hostname", "frugal@here")
    file = models.with_name("two.toml")
    with launch("none", *args, models=file, env={"NOGRAD_THREADS": "7"}) as launched, Client(redis_url) as client:
        launched.until_ready()
        assert client.submit("threads", 0).result(PATIENCE_S) == 7  # as the device thread sees it
        stats = client.broker.workers(PATIENCE_S, ["frugal@here"])["frugal@here"]
        assert stats["threads"] == {"prepare": 7, "torch": 7, "torch_interop": 7}
        assert list(stats["models"]) == ["threads"]
    assert "succeeded" not in launched.text()  # a worker's log tells of the worker, not of each job


def test_who_asks_for_a_log_level_reads_of_each_job(launch, models, redis_url):
    file = models.with_name("two.toml")
    with launch("none", "--only", "threads", "--", "-l", "INFO", models=file) as launched, Client(redis_url) as client:
        launched.until_ready()
        job = client.submit("threads", 0)
        job.result(PATIENCE_S)
        until(lambda: f"{job.id}] succeeded" in launched.text(), launched.text)


def test_only_a_model_of_the_file_can_be_asked_for(launch):
    with launch("none", "--only", "double,tripple") as launched:
        assert launched.process.wait(PATIENCE_S) == launcher.EXIT_CONFIG
        assert "--only names 'tripple'; the models of" in launched.text()


def test_every_worker_has_a_name_of_its_own_also_beside_those_of_another_launcher(pair, launch, redis_url):
    with launch("all", env={"CUDA_VISIBLE_DEVICES": "0"}) as other, Client(redis_url) as client:
        other.until_ready()
        until(lambda: len(client.broker.workers(timeout_s=1)) == 3)


def test_a_killed_worker_is_started_again_after_a_pause_that_grows(launch, redis_url):
    with launch() as launched, Client(redis_url) as client:
        first = launched.another_worker(than=[])
        os.kill(first, signal.SIGKILL)
        second = launched.another_worker(than=[first])
        died = time.monotonic()
        os.kill(second, signal.SIGKILL)
        launched.another_worker(than=[first, second])
        assert time.monotonic() - died > 1.5
        said = re.findall(r"cpu was killed by SIGKILL \(out of memory\?\); starting again in (\d+) s", launched.text())
        assert said == ["1", "2"]
        launched.until_ready()
        assert client.submit("double", 21).result(PATIENCE_S) == 42


def test_a_worker_whose_device_is_lost_is_started_again_and_the_job_it_ended_over_runs_alone(
    launch, redis_url, tmp_path, monkeypatch
):
    monkeypatch.setenv("NOGRAD_LEASE_S", "3")
    shutil.copy(fleet_of_tests.__file__, tmp_path)
    models = tmp_path / "models.toml"
    models.write_text('[deadly]\nloader = "python"\nclass = "fleet_of_tests:Deadly"\n')
    with Client(redis_url, models=models) as client:
        jobs = client.submit_many("deadly", [*range(20), ["accelerator error", str(tmp_path / "happened")]])
        with launch(models=models) as launched:
            results = [job.result(PATIENCE_S) for job in jobs]
            assert "the device is lost: AcceleratorError: CUDA error: device-side assert triggered" in launched.text()
            assert "ended with 70 (its device is lost); starting again in 1 s" in launched.text()
        assert results == [*range(20), "in a batch of 1"]


def test_a_worker_that_refuses_its_models_is_not_started_again_and_ends_the_launch(launch, tmp_path):
    broken = tmp_path / "models.toml"
    broken.write_text('[double]\nloader = "python"\nclass = "nowhere:Model"\n')
    with launch(models=broken) as launched:
        assert launched.process.wait(PATIENCE_S) == launcher.EXIT_CONFIG, launched.text()
        assert launched.text().count("nowhere:Model") == 1
        assert "starting again" not in launched.text()


def test_a_gpu_that_was_asked_for_and_is_not_there_ends_the_launch(launch):
    with launch("7777") as launched:  # also where there are GPUs, not so many
        assert launched.process.wait(PATIENCE_S) == launcher.EXIT_CONFIG, launched.text()
        assert "the worker does not start: --gpus 7777: torch sees no CUDA device here" in launched.text()
        assert "--gpus none runs on the CPU" in launched.text()
        assert "starting again" not in launched.text()


def test_sigterm_ends_every_worker_and_gives_0(launch):
    with launch("all", env=TWO) as launched:
        launched.until_ready(2)
        workers = launched.workers()
        assert len(workers) == 2
        launched.process.terminate()
        assert launched.process.wait(PATIENCE_S) == 0, launched.text()
        assert not any(alive(pid) for pid in workers)
        assert "starting again" not in launched.text()


@linux
def test_a_killed_launcher_takes_its_worker_along(launch):
    with launch() as launched:
        launched.until_ready()
        [worker] = launched.workers()
        launched.process.kill()
        until(lambda: not alive(worker))
