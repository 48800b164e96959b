"""Real workers on a Redis of their own, and how fast they drain a queue that was filled before."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import redis

from nograd.tasks.keys import LOG_JOBS

BENCHMARKS = Path(__file__).parents[1]

#: seconds a worker has to start, and a queue to be drained
START_S = 180
DRAIN_S = 900
#: seconds for the last few results, once the others are there
LAST_S = 10
#: share of the results that must be there before the clock starts: the worker is warm then
WARM = 0.1


class Broken(SystemExit):
    """What was to be measured did not happen; a script that has nothing else to show ends with the text."""


class Worker:
    """A ``celery worker`` process; its log goes to a file.

    It has no lines for each job, as a worker that is started with ``nograd worker``, or with ``celery worker`` without
    ``-l info``, unless the environment of the benchmark says ``NOGRAD_LOG_JOBS=1``.
    """

    def __init__(self, log: Path, *args: str, app: str = "nograd.tasks", env: Mapping[str, str] | None = None) -> None:
        self.log = log
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "--hostname", f"{log.stem}@bench"]
        command += ["--without-gossip", "--without-mingle", "--loglevel", "INFO", *args]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=BENCHMARKS, env={LOG_JOBS: "0", **os.environ, **(env or {})}, stdout=out, stderr=out
            )

    def wait_until_ready(self) -> Worker:
        deadline = time.monotonic() + START_S
        while b" ready." not in self.log.read_bytes():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Broken(f"the worker does not get ready:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.02)
        return self

    def cpu_s(self) -> float:
        """Seconds of CPU it has used, all threads."""
        ticks = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def workers(
    count: int, folder: Path, *args: str, until_ready: bool = True, **options: object
) -> Iterator[list[Worker]]:
    """That many workers, ready unless their log does not tell; stopped at the end."""
    stamp = time.monotonic_ns()
    started: list[Worker] = []
    try:
        for number in range(count):  # one by one, so that those before a failure are stopped, too
            worker = Worker(folder / f"w{stamp}-{number}.log", *args, **options)  # type: ignore[arg-type]
            started.append(worker)
        for worker in started if until_ready else ():
            worker.wait_until_ready()
        yield started
    finally:
        for worker in started:
            worker.process.terminate()
        for worker in started:
            worker.stop()


def results(client: redis.Redis) -> int:
    """How many results are stored, give or take a handful: few other keys have an end in Redis."""
    return int(client.info("keyspace").get("db0", {}).get("expires", 0))


@dataclass(frozen=True)
class Drained:
    """How a worker drained a full queue.

    Attributes:
        rate: messages per second.
        cpu_ms: milliseconds of the worker's CPU time a message; hardly depends on what else the machine does.
    """

    rate: float
    cpu_ms: float


def drain(client: redis.Redis, count: int, worker: Worker) -> Drained:
    """Watch a worker that was just started, from the first tenth of the results to the last one."""
    deadline = time.monotonic() + DRAIN_S
    first = last = (0, 0.0, 0.0)
    while last[0] < count:
        if worker.process.poll() is not None or time.monotonic() > deadline:
            raise Broken(f"{last[0]} of {count} results:\n{worker.log.read_text()[-4000:]}")
        time.sleep(0.005)
        stored, now = results(client), time.perf_counter()
        if stored != last[0]:
            last = (stored, now, worker.cpu_s())  # right after a batch, so that batches are counted whole
            if not first[0] and stored >= count * WARM:
                first = last
    done, seconds, cpu_s = (new - old for new, old in zip(last, first, strict=True))
    return Drained(done / seconds, 1000 * cpu_s / done)


def assert_all_succeeded(client: redis.Redis, ids: Sequence[str]) -> None:
    """A rate of failures is no rate. The last results may still be on their way: `results` counts a few other keys."""
    deadline = time.monotonic() + LAST_S
    for start in range(0, len(ids), 1000):
        names = [f"celery-task-meta-{task_id}" for task_id in ids[start : start + 1000]]
        while None in (stored := client.mget(names)) and time.monotonic() < deadline:
            time.sleep(0.02)
        bad = [meta for meta in stored if not meta or b'"status": "SUCCESS"' not in meta or b'"error":' in meta]
        if bad:
            raise Broken(f"{len(bad)} jobs did not succeed; the first: {(bad[0] or b'no result')[:500]!r}")
