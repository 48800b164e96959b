"""What a job leaves behind: ``python benchmarks/memory.py --jobs 1000000``.

One worker gets small jobs whose results nobody wants, in bursts. After each burst, when the queue is empty and all is
acknowledged, the worker's resident memory and the memory Redis uses are read. After a warm-up a line is fitted through
both: its slope is the growth in bytes a job, with its 95 % interval. In the end every key of Redis that has no TTL is
listed with its owner; exits 1 if one has none. Allocators fill up over some 100,000 jobs: judge growth by a million.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import redis
from common import fleet, hosted

from nograd.producer import Client
from nograd.producer.embedded import EmbeddedRedis

#: share of the jobs before memory counts: allocators and caches fill up at first
WARM_UP = 0.3
#: readings of one run, and groups of neighbouring ones. The line goes through the least of each group: buffers that
#: come and go are no growth, and neighbours are alike
READINGS, GROUPS = 100, 10
#: Student's t for GROUPS - 2 degrees of freedom, 95 %, two-sided
T_95 = 2.306
#: growth in bytes a job that is no growth: a page of 4 KB in 40,000 jobs
NOTHING = 0.1
#: beginnings of the keys that may stay without a TTL, and whose they are
OWNERS = {
    "_kombu.binding": "kombu: which queues an exchange feeds; as many as there are queues and workers",
    "_nograd.dead": "the dead letters, until somebody replays or drops them",
}


@dataclass(frozen=True)
class Reading:
    """Bytes after so many jobs."""

    jobs: int
    worker: int
    redis: int


def read(jobs: int, worker: fleet.Worker, server: redis.Redis) -> Reading:
    pages = int(Path(f"/proc/{worker.process.pid}/statm").read_text().split()[1])
    return Reading(jobs, pages * os.sysconf("SC_PAGE_SIZE"), int(server.info("memory")["used_memory"]))


def slope(jobs: Sequence[float], size: Sequence[float]) -> tuple[float, float, float]:
    """Bytes a job, and its 95 % interval, of the line through the least of each of `GROUPS` groups of readings."""
    width = len(jobs) // GROUPS
    xs = [statistics.fmean(jobs[n * width : (n + 1) * width]) for n in range(GROUPS)]
    ys = [min(size[n * width : (n + 1) * width]) for n in range(GROUPS)]
    line = statistics.linear_regression(xs, ys)
    middle = statistics.fmean(xs)
    errors = sum((y - line.slope * x - line.intercept) ** 2 for x, y in zip(xs, ys, strict=True))
    deviation = math.sqrt(errors / (GROUPS - 2) / sum((x - middle) ** 2 for x in xs))
    return line.slope, line.slope - T_95 * deviation, line.slope + T_95 * deviation


def send(client: Client, messages: int, items: int) -> None:
    """Messages of so many rows, in pipelines; no result is stored for them."""
    amqp, name = client.app.amqp, "nograd.predict"
    arguments = ["mlp", hosted.ROW] if items == 1 else ["mlp", [hosted.ROW] * items]
    kwargs = {} if items == 1 else {"many": True}
    with client.app.producer_pool.acquire() as producer, producer.batch(max_size=500):
        for _ in range(messages):
            task = amqp.create_task_message(
                str(uuid4()), name, arguments, kwargs, ignore_result=True, argsrepr="a row", kwargsrepr="{}"
            )
            amqp.send_task_message(producer, name, task, queue="nograd.mlp", retry=False)


def wait_until_done(server: redis.Redis, worker: fleet.Worker) -> None:
    while server.llen("nograd.mlp") or server.hlen("unacked"):
        if worker.process.poll() is not None:
            raise SystemExit(f"the worker ended:\n{worker.log.read_text()[-4000:]}")
        time.sleep(0.02)


def measure(client: Client, worker: fleet.Worker, server: redis.Redis, jobs: int, items: int) -> dict[str, Any]:
    burst = max(1, jobs // items // READINGS)
    readings, began = [], time.monotonic()
    for number in range(READINGS):
        send(client, burst, items)
        wait_until_done(server, worker)
        readings.append(read((number + 1) * burst * items, worker, server))
    counted = readings[int(READINGS * WARM_UP) :]
    found: dict[str, Any] = {
        "items per message": items,
        "jobs": readings[-1].jobs,
        "jobs per second": round(readings[-1].jobs / (time.monotonic() - began)),
    }
    for name in ("worker", "redis"):
        sizes = [getattr(reading, name) for reading in counted]
        growth, low, high = slope([reading.jobs for reading in counted], sizes)
        found[name] = {
            "MB at first": round(getattr(readings[0], name) / 1e6, 2),
            "MB after the warm-up": round(sizes[0] / 1e6, 2),
            "MB in the end": round(sizes[-1] / 1e6, 2),
            "bytes a job": round(growth, 3),
            "interval": [round(low, 3), round(high, 3)],
            "zero": low <= 0 or growth < NOTHING,
            "MB every tenth": [round(getattr(reading, name) / 1e6, 2) for reading in readings[:: READINGS // 10]],
        }
    return found


def keys_without_ttl(server: redis.Redis) -> dict[str, str | None]:
    """Every key that stays, and its owner; None for a key without one."""
    keys = sorted(key for key in server.scan_iter(count=1000) if server.ttl(key) == -1)
    return {key: next((owner for start, owner in OWNERS.items() if key.startswith(start)), None) for key in keys}


def main() -> int:
    parser = argparse.ArgumentParser(prog="memory", description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000, help="of each kind of message")
    parser.add_argument("--items", type=int, nargs="+", default=[1, 64], help="jobs in one message")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nograd-bench-") as name, EmbeddedRedis() as embedded:
        folder = Path(name)
        models = hosted.write_models(folder)
        server = redis.Redis.from_url(embedded.url, decode_responses=True)
        env = {"NOGRAD_REDIS_URL": embedded.url, "NOGRAD_MODELS": str(models)}
        # Without a line for each job: those of a million would fill the disk.
        started = fleet.workers(1, folder, "-Q", "nograd.mlp", "--loglevel", "WARNING", env=env, until_ready=False)
        with Client(embedded.url, models=models) as client, started as [worker]:
            runs = [measure(client, worker, server, options.jobs, items) for items in options.items]
            keys = keys_without_ttl(server)
    flat = all(run[name]["zero"] for run in runs for name in ("worker", "redis"))
    owned = None not in keys.values()
    if options.json:
        print(json.dumps({"runs": runs, "keys without TTL": keys, "flat": flat, "owned": owned}, indent=1))
    else:
        for run in runs:
            print(f"{run['jobs']} jobs, {run['items per message']} in a message, {run['jobs per second']}/s")
            for name in ("worker", "redis"):
                row = run[name]
                sizes = " → ".join(
                    f"{row[key]:.1f}" for key in ("MB at first", "MB after the warm-up", "MB in the end")
                )
                print(f"  {name:7} {row['bytes a job']:>9} bytes a job {row['interval']}   {sizes} MB"
                      f"   {'flat' if row['zero'] else 'GROWS'}")  # fmt: skip
        print("keys without a TTL:")
        for key, owner in keys.items():
            print(f"  {key}   {owner or 'NOBODY OWNS IT'}")
    return 0 if owned else 1


if __name__ == "__main__":
    raise SystemExit(main())
