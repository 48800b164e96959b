"""Harm backfills at random moments: ``make chaos ARGS="backfill --rounds 100 --seed 1"``.

Each round runs the same plan into a new folder, does one thing to a worker or to Redis while a worker is at one moment
of a chunk, goes on, and compares every committed byte with a run that nothing happened to. Exits 1 if one differs, a
row is missing or twice, or a backfill does not end.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TOP = Path(__file__).parents[2]
sys.path[:0] = [str(TOP / "benchmarks"), str(TOP / "tests" / "fleet")]  # what they share with the short matrix

from common.fleet import Worker  # noqa: E402

import backfills  # noqa: E402
from crashes import MOMENTS, Moments, Redis, read_folder  # noqa: E402
from nograd.producer import Client  # noqa: E402
from nograd.tasks.backfill.plan import Job  # noqa: E402
from nograd.tasks.backfill.verify import verify  # noqa: E402

LEASE_S = 3
#: rows of the backfill and of a chunk: neither a multiple of what is cut from it
ROWS, CHUNK = 1003, 52


class Chaos:
    """A Redis, two workers, one plan."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.models = backfills.write_models(folder)
        self.moments = Moments(folder)
        self.redis = Redis(folder)
        self.redis.start()
        self.workers: list[Worker] = []
        self.client: Any = None

    def fill(self) -> None:
        """Start the workers that are missing; wait for them."""
        self.workers = [worker for worker in self.workers if worker.process.poll() is None]
        env = {"NOGRAD_REDIS_URL": self.redis.url, "NOGRAD_MODELS": str(self.models), "NOGRAD_LEASE_S": str(LEASE_S)}
        while len(self.workers) < 2:
            self.workers.append(Worker(self.folder / f"w{time.monotonic_ns()}.log", env=env))
        for worker in self.workers:
            worker.wait_until_ready()

    def plan(self) -> Job:
        """The run that nothing happens to."""
        texts = ["raise" if n % 50 == 7 else "x" * (n % 23) for n in range(ROWS)]
        pq.write_table(pa.table({"n": range(ROWS), "text": texts}), self.folder / "in.parquet")
        self.client = Client(self.redis.url, models=self.models)
        job = backfills.planned(self.client, "scored", self.folder / "in.parquet", self.folder / "plan", CHUNK, id="n")
        backfills.run(self.client, job)
        return job

    def one(self, pid: int) -> Worker:
        """The worker with this process."""
        return next(worker for worker in self.workers if worker.process.pid == pid)

    # -- what is done while a worker is held; each lets go of it -------------------------------------------------------

    def kill(self, pid: int, _job: Job) -> None:
        """The worker that is held."""
        self.one(pid).process.kill()
        self.one(pid).process.wait()
        self.moments.release()

    def kill_both(self, _pid: int, _job: Job) -> None:
        """Every worker."""
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()
        self.moments.release()
        self.fill()

    def freeze(self, pid: int, job: Job) -> None:
        """For as long as the others need for everything."""
        self.one(pid).process.send_signal(signal.SIGSTOP)
        self.moments.release()
        backfills.drive(self.client, job, 120)
        self.one(pid).process.send_signal(signal.SIGCONT)

    def term(self, pid: int, _job: Job) -> None:
        """Tell it to stop."""
        self.one(pid).process.terminate()
        time.sleep(self.chance.uniform(0, 1))
        self.moments.release()

    def flush(self, _pid: int, _job: Job) -> None:
        """Redis forgets everything."""
        self.client.app.backend.client.flushall()
        self.moments.release()

    def restart(self, _pid: int, _job: Job) -> None:
        """Redis dies and comes back."""
        self.redis.kill()
        self.moments.release()
        time.sleep(self.chance.uniform(0, 2))
        self.redis.start()

    def forget(self, _pid: int, job: Job) -> None:
        """The hints are lost, so that another worker runs the same chunk."""
        again = backfills.forget(backfills.window_of(self.client, job))
        backfills.drive(self.client, job, 120, until=again)  # each turn: the one that is held renews its claim
        self.moments.release()

    def unsent(self, _pid: int, job: Job) -> None:
        """Whoever tops up dies before it has sent anything."""
        backfills.window_of(self.client, job).top_up(range(job.plan.chunks), most=job.plan.chunks)
        self.moments.release()

    def round(self, number: int, planned: Job, fault: str, moment: str) -> list[str]:
        """One backfill with one fault; what is wrong in the end."""
        self.fill()
        job = read_folder(planned, self.folder / f"out{number}")
        later = self.chance.randrange(job.plan.chunks // 2)
        self.moments.clear()
        backfills.drive(self.client, job, 120, until=lambda: len(job.store.names("_commits")) >= later)
        self.moments.arm(moment)
        backfills.drive(self.client, job, 120, until=self.moments.reached)
        harm: Callable[[int, Job], None] = getattr(self, fault)
        harm(self.moments.pid(), job)
        backfills.drive(self.client, job, 120)
        wrong = list(verify(job).problems)
        if sorted(backfills.ids(job)) != list(range(ROWS)):
            wrong.append("a row is missing or twice")
        if backfills.committed(job) != backfills.committed(planned):
            wrong.append("a committed byte differs")
        return wrong

    def close(self) -> None:
        """End everything."""
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()
        self.redis.kill()


FAULTS = ("kill", "kill_both", "freeze", "term", "flush", "restart", "forget", "unsent")


def main(arguments: list[str]) -> int:
    """Run the rounds; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        prog="chaos backfill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=len(FAULTS) * len(MOMENTS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    # Every fault at every moment first; then by chance.
    every = [(fault, moment) for moment in MOMENTS for fault in FAULTS]
    done: Counter[str] = Counter()
    wrong: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nograd-chaos-") as name:
        chaos = Chaos(Path(name), options.seed)
        try:
            chaos.fill()
            planned = chaos.plan()
            chaos.chance.shuffle(every)
            for number in range(options.rounds):
                fault, moment = every[number] if number < len(every) else chaos.chance.choice(every)
                try:
                    found = chaos.round(number, planned, fault, moment)
                except (AssertionError, backfills.Paused) as err:
                    found = [f"it did not end: {err}"]
                done[fault] += 1
                wrong += [f"round {number}, {fault} at {moment}: {each}" for each in found]
                print(f"{number + 1}/{options.rounds} {fault} at {moment}: {found or 'identical'}", file=sys.stderr)
        finally:
            chaos.close()
    told = {"rounds": options.rounds, "faults": dict(done), "wrong": wrong, "seconds": round(time.monotonic() - began)}
    print(json.dumps(told) if options.json else "\n".join(f"{key}: {value}" for key, value in told.items()))
    return 1 if wrong else 0
