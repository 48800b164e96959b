"""What all tests share: a real Redis, and real worker processes on it."""

import contextlib
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Before anything of transformers is imported: no test may ask a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("NOGRAD_MODELS", None)
os.environ.pop("NOGRAD_REDIS_URL", None)

#: seconds a worker has to load its models, on a machine that is busy with other things
START_S = 120


class WorkerProcess:
    """A real ``celery worker`` of nograd, its log in a file."""

    def __init__(self, log: Path, redis_url: str, models: Path | None, args=(), app="nograd.tasks", cwd=None, env=()):
        self.log = log
        environment = {**os.environ, "NOGRAD_REDIS_URL": redis_url, **dict(env)}
        if models is not None:
            environment["NOGRAD_MODELS"] = str(models)
        self.name = f"test-{log.stem}@here"
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "-n", self.name, "--loglevel", "INFO", *args]
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=cwd)

    def wait_until_ready(self):
        deadline = time.monotonic() + START_S
        while " ready." not in self.text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the worker did not get ready:\n{self.text()}")
            time.sleep(0.05)
        return self

    def text(self):
        return self.log.read_text(errors="replace")

    def alive(self):
        return self.process.poll() is None

    def stop(self, timeout=60):
        """Warm shutdown; the exit code."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@pytest.fixture(scope="module")
def redis_url():
    """A server for each module: what one leaves behind is not there for the next."""
    from nograd.producer.embedded import EmbeddedRedis

    with EmbeddedRedis() as server:
        yield server.url
        gc.collect()  # Celery's results unsubscribe when they are collected, and wait long for a server that is gone


@pytest.fixture(scope="module")
def start_worker(redis_url, tmp_path_factory):
    """Start workers; they end with the module."""
    folder = tmp_path_factory.mktemp("workers")
    started = []

    def start(models, *args, ready=True, **options):
        log = folder / f"w{len(started)}-{folder.name}.log"
        worker = WorkerProcess(log, options.pop("redis_url", redis_url), models, args, **options)
        started.append(worker)
        return worker.wait_until_ready() if ready else worker

    yield start
    for worker in started:
        if worker.alive():
            worker.stop()


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for 256 KB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # a worker keeps the last plan open
