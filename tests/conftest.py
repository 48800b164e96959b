"""What all tests share: a real Redis, and real worker processes on it."""

import contextlib
import gc
import os
import signal
import subprocess
from pathlib import Path

import hypothesis
import pytest
import redis

import nursery
import watching
from waiting import PATIENCE_S, Gate, until

# Before anything of transformers is imported: no test may ask a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("NOGRAD_MODELS", None)
os.environ.pop("NOGRAD_REDIS_URL", None)

# A shell that runs the tests in the background has them, and so all they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes is the machine's business, and a run that fails must fail again.
hypothesis.settings.register_profile(
    "suite", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")


HERE = Path(__file__).parent
#: folders whose files start many processes, each of which takes seconds to import torch
LONG = ("integration", "workers", "producer", "transport", "examples")


def pytest_collection_modifyitems(items):
    """Long files first: `make test` hands out whole files in this order, and nobody shall wait for a long one alone."""

    def place(item):
        folder = item.path.relative_to(HERE).parts[0]
        return LONG.index(folder) if folder in LONG else len(LONG)

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    watching.forget_those_that_ended()
    with watching.on_guard():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with watching.on_guard():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        report.sections += watching.reports()
    return report


class WorkerProcess:
    """A real ``celery worker`` of nograd, its log in a file; one that ``lasts`` ends before `stop` by mistake only."""

    def __init__(
        self,
        log: Path,
        redis_url: str,
        models: Path | None,
        args=(),
        app="nograd.tasks",
        cwd=None,
        env=(),
        lasts=False,
    ):
        self.log = log
        environment = {**os.environ, "NOGRAD_REDIS_URL": redis_url, **dict(env)}
        if models is not None:
            environment["NOGRAD_MODELS"] = str(models)
        self.name = f"test-{log.stem}@here"
        if app == "nograd.tasks":  # as the launcher starts it; the workers of other apps are started as by their users
            args = ("--without-gossip", "--without-mingle", *args)
        words = ["celery", "-A", app, "worker", "-n", self.name, "--loglevel", "INFO", *args]
        with log.open("wb") as out:
            self.process = nursery.start(words, out, environment, cwd)
        self.watched = watching.watch(self.name, self.process, self.text, lasts=lasts)

    def wait_until_ready(self):
        until(lambda: " ready." in self.text() or not self.alive(), lambda: f"it does not get ready:\n{self.text()}")
        assert " ready." in self.text(), f"the worker ended before it was ready:\n{self.text()}"
        return self

    def text(self):
        return self.log.read_text(errors="replace")

    def alive(self):
        return self.process.poll() is None

    def stop(self, timeout=PATIENCE_S):
        """Warm shutdown; the exit code."""
        self.watched.let_go()
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@pytest.fixture
def gates(tmp_path):
    """Make gates; what waits at one goes on when the test ends."""
    made = []

    def make():
        made.append(Gate(tmp_path / f"gate{len(made)}"))
        return made[-1]

    yield make
    for one in made:
        one.open()


@pytest.fixture
def gate(gates):
    return gates()


@pytest.fixture(scope="module")
def redis_url():
    """A server for each module: what one leaves behind is not there for the next."""
    from nograd.producer.embedded import EmbeddedRedis

    with EmbeddedRedis() as server:
        yield server.url
        gc.collect()  # Celery's results unsubscribe when they are collected, and wait long for a server that is gone


class Workers:
    """Starts workers, on the Redis of the module if no other is given."""

    def __init__(self, folder: Path, redis_url: str):
        self._folder, self._redis_url, self._started = folder, redis_url, []

    def __call__(self, models, *args, ready=True, redis_url=None, **options):
        log = self._folder / f"w{len(self._started)}-{self._folder.name}.log"
        url = redis_url or self._redis_url
        worker = WorkerProcess(log, url, models, args, **options)
        self._started.append((url, worker))
        return worker.wait_until_ready() if ready else worker

    @contextlib.contextmanager
    def redis(self):
        """Another Redis. Its workers end before it does: one whose Redis is away takes long to stop."""
        from nograd.producer.embedded import EmbeddedRedis

        with EmbeddedRedis() as server:
            try:
                yield server
            finally:
                self.stop(server.url)
                gc.collect()  # as below

    def stop(self, redis_url):
        """End the workers of a Redis, all at once."""
        mine = [worker for url, worker in self._started if url == redis_url]
        for worker in mine:
            worker.watched.let_go()
        mine = [worker for worker in mine if worker.alive()]
        for worker in mine:
            worker.process.terminate()
        for worker in mine:
            worker.stop()


@pytest.fixture(scope="module")
def start_worker(redis_url, tmp_path_factory):
    """Start workers; they end with the module."""
    made = Workers(tmp_path_factory.mktemp("workers"), redis_url)
    yield made
    made.stop(redis_url)


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


@pytest.fixture(scope="module")
def object_store(tmp_path_factory):
    """An S3 server behind ``s3://``."""
    import object_store

    with object_store.running(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def connection(redis_url):
    """A client of the shared Redis, empty."""
    with redis.Redis.from_url(redis_url) as connection:
        connection.flushdb()
        yield connection


@pytest.fixture
def app(redis_url, connection):
    """Our app on the shared Redis, empty."""
    from nograd.tasks.celery import create_app  # not before the environment is set, above
    from nograd.tasks.settings import Settings

    app = create_app(Settings(redis_url=redis_url))
    yield app
    app.close()
