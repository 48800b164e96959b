"""The batch pool beside naive Celery and plain loops: ``python benchmarks/pool.py --only mlp,resnet --rounds 5``.

Interleaved rounds on one machine, each measured worker started anew on a queue that is full, task events on unless a
section says otherwise, and no line in the log for each job on either side (``NOGRAD_LOG_JOBS=1`` for some). Every
figure is the median of the rounds; ratios are of neighbouring runs.

========== ============================================================================================================
mlp        16 → 128 → 1, one row a message: naive Celery (``-P solo``, one task = one forward), the pool, plain loops
packed     the same, 64 rows a message
resnet     ResNet18 on the CPU, JPEGs decoded in the worker: the pool against decode + transform + forward in a loop
accelerator a SIMULATED device (a forward sleeps 5 ms + 0.5 ms an item), batches of 64, 16 rows a message: how busy
latency    the same device under a saturating backfill: submit → result of single interactive jobs, loaded and idle
events     the drain rate of ``mlp`` with task events and timings of jobs on and off
========== ============================================================================================================
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from celery import Celery
from common import fleet, hosted, stats
from common.fleet import Broken
from common.raw import ResNet
from common.raw import mlp as raw_mlp

from nograd.producer import Client
from nograd.producer.broker import Message
from nograd.producer.embedded import EmbeddedRedis
from nograd.tasks.keys import BULK
from nograd.tasks.payloads import encode_input

#: seconds of one round with the simulated device
WINDOW_S = 8.0
#: seconds between two interactive jobs, at most
GAP_S = 0.06

Section = Callable[["Bench"], None]


@dataclass
class Bench:
    """One run: its options, its files and what it found.

    Attributes:
        rows: section, what, figure, the rounds it is made of, and the target it is held to with whether it is met.
    """

    rounds: int
    scale: float
    folder: Path
    models: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def note(
        self, section: str, what: str, figure: float, unit: str, target: tuple[str, float] | None = None, **more: Any
    ) -> None:
        """Add a figure; ``target`` is ``(">=" or "<=", value)``."""
        row = {"section": section, "what": what, "figure": round(figure, 3), "unit": unit, **more}
        if target is not None:
            sign, value = target
            row |= {"target": f"{sign} {value:g}", "met": figure >= value if sign == ">=" else figure <= value}
        self.rows.append(row)

    def rates(
        self,
        section: str,
        what: str,
        drained: list[fleet.Drained],
        items: int = 1,
        target: tuple[str, float] | None = None,
    ) -> list[float]:
        """Add the rates of the rounds, for messages of ``items`` items; the rates."""
        rates = [items * each.rate for each in drained]
        cpu_ms = statistics.median(each.cpu_ms for each in drained) / items
        rounds = [round(rate, 1) for rate in rates]
        self.note(section, what, statistics.median(rates), "/s", target, rounds=rounds, cpu_ms=round(cpu_ms, 4))
        return rates

    def ratio(self, section: str, what: str, ours: list[float], theirs: list[float], **more: Any) -> None:
        """Add the ratio of the rounds with its interval; a target is one of the median, or of ``bound``."""
        found = stats.paired_ratio(ours, theirs)
        target, bound = more.pop("target", None), more.pop("bound", "median")
        interval = [round(found["low"], 3), round(found["high"], 3)]
        self.note(section, what, found[bound], "x", target, median=round(found["median"], 3), interval=interval)

    def messages(self, count: int) -> int:
        """A number of messages, made smaller by ``--scale``."""
        return max(64, int(count * self.scale))


@dataclass
class Side:
    """One Redis with one kind of worker to come."""

    bench: Bench
    server: EmbeddedRedis
    client: Client
    redis: redis.Redis
    env: dict[str, str]

    def workers(self, count: int, model: str, **options: Any) -> Any:
        """Our workers for one model."""
        return fleet.workers(count, self.bench.folder, "-Q", f"nograd.{model}", env=self.env, **options)

    def drain(self, messages: Iterable[Message], model: str, **options: Any) -> fleet.Drained:
        """Send everything, then start a worker."""
        sent = list(messages)
        self.client.broker.publish_many(sent)
        with self.workers(1, model, **options) as [worker]:
            drained = fleet.drain(self.redis, len(sent), worker)
        fleet.assert_all_succeeded(self.redis, [message.id for message in sent])
        return drained


@contextmanager
def side(bench: Bench, **env: str) -> Iterator[Side]:
    """A fresh Redis, and a client on it."""
    with EmbeddedRedis() as server, Client(server.url, models=bench.models) as client:
        environment = {"NOGRAD_REDIS_URL": server.url, "NOGRAD_MODELS": str(bench.models), **env}
        yield Side(bench, server, client, redis.Redis.from_url(server.url), environment)


def rows(count: int) -> Iterator[Message]:
    """Single rows."""
    return (Message.of("mlp", hosted.ROW, hosted.ROW) for _ in range(count))


def packs(model: str, count: int, items: int, **options: Any) -> Iterator[Message]:
    """Messages of many rows."""
    wire = [hosted.ROW] * items
    return (Message(model, wire, f"{model} {items} inputs", many=True, **options) for _ in range(count))


# -- the sections ------------------------------------------------------------------------------------------------------


def naive(bench: Bench) -> fleet.Drained:
    """One task = one forward on stock Celery."""
    with side(bench) as one:
        count = bench.messages(4000)
        sender = Celery("sender", broker=one.server.url, backend=one.server.url, set_as_current=False)
        with sender.producer_pool.acquire() as producer:
            ids = [
                sender.send_task("nograd.predict", ("mlp", hosted.ROW), queue="nograd.mlp", producer=producer).id
                for _ in range(count)
            ]
        arguments = ("-P", "solo", "-E")
        with fleet.workers(1, bench.folder, *arguments, app="common.naive", env=one.env) as [worker]:
            drained = fleet.drain(one.redis, count, worker)
        fleet.assert_all_succeeded(one.redis, ids)
        sender.close()
        return drained


def pooled(bench: Bench, **options: Any) -> fleet.Drained:
    """The pool, one row a message."""
    with side(bench) as one:
        return one.drain(rows(bench.messages(15_000)), "mlp", **options)


def mlp(bench: Bench) -> None:
    measures = {"naive Celery": naive, "the pool": pooled}
    drained: dict[str, list[fleet.Drained]] = {name: [] for name in measures}
    loops: dict[int, list[float]] = {1: [], 64: []}
    for number in range(bench.rounds):
        # The order changes, so that no side always finds the machine warm.
        for name in sorted(measures, reverse=bool(number % 2)):
            drained[name].append(measures[name](bench))
        for batch, found in loops.items():
            found.append(raw_mlp(bench.folder / "mlp.pth", batch))
    rates = {name: bench.rates("mlp", f"{name}: rows", found) for name, found in drained.items()}
    for batch, found in loops.items():
        bench.note("mlp", f"loop, {batch} rows a forward: rows", statistics.median(found), "/s")
    bench.ratio("mlp", "the pool / naive Celery", rates["the pool"], rates["naive Celery"], target=(">=", 5))
    bench.ratio("mlp", "the pool / loop, 1 row a forward", rates["the pool"], loops[1])


def packed(bench: Bench) -> None:
    drained = []
    for _ in range(bench.rounds):
        with side(bench) as one:
            drained.append(one.drain(packs("mlp", bench.messages(3000), 64), "mlp"))
    bench.rates("packed", "the pool, 64 rows a message: rows", drained, 64, (">=", 13_700))


def resnet(bench: Bench) -> None:
    files = hosted.jpegs(max(6, int(12 * bench.scale)) * hosted.IMAGE_BATCH)
    raw = ResNet(bench.folder / "resnet18.pth")
    cores = len(os.sched_getaffinity(0))
    drained: list[fleet.Drained] = []
    loops: dict[str, list[float]] = {"loop": [], "loop, preparing on threads": []}

    def of_pool() -> None:
        with side(bench) as one:
            sent = (Message("resnet18", encode_input(file, "image"), "resnet18 photo.jpg") for file in files)
            drained.append(one.drain(sent, "resnet18"))

    measures = [
        of_pool,
        lambda: loops["loop"].append(raw.loop(files, hosted.IMAGE_BATCH)),
        lambda: loops["loop, preparing on threads"].append(raw.overlapped(files, hosted.IMAGE_BATCH, cores)),
    ]
    raw.loop(files[:64], hosted.IMAGE_BATCH)  # warm
    for number in range(bench.rounds):
        for measure in reversed(measures) if number % 2 else measures:
            measure()
    rates = bench.rates("resnet", "the pool: images", drained)
    for name, found in loops.items():
        bench.note(
            "resnet", f"{name}: images", statistics.median(found), "/s", rounds=[round(rate, 1) for rate in found]
        )
    bench.ratio("resnet", "the pool / loop, lower bound", rates, loops["loop"], bound="low", target=(">=", 0.9))
    bench.ratio("resnet", "the pool / loop, preparing on threads", rates, loops["loop, preparing on threads"])


def accelerator(bench: Bench) -> None:
    for count, target in ((1, 95), (8, 90)):
        found = [busy(bench, count) for _ in range(bench.rounds)]
        name = f"SIMULATED device, {count} worker{'s' if count > 1 else ''}"
        shares = [each["busy"] for each in found]
        bench.note(
            "accelerator", f"{name}: busy", statistics.median(shares), "%", (">=", target),
            rounds=[round(share, 1) for share in shares],
        )  # fmt: skip
        ideal = count * hosted.SIMULATED_BATCH / device_s(hosted.SIMULATED_BATCH)
        rate, cpu_ms = (statistics.median(each[key] for each in found) for key in ("rate", "cpu_ms"))
        bench.note("accelerator", f"{name}: rows", rate, "/s", ideal=round(ideal), cpu_ms=round(cpu_ms, 4))
        bench.note("accelerator", f"{name}: rows a forward", statistics.median(each["batch"] for each in found), "")


def device_s(items: int) -> float:
    """Seconds of one forward of the simulated device."""
    return hosted.SIMULATED_S + items * hosted.SIMULATED_ITEM_S


def busy(bench: Bench, count: int) -> dict[str, float]:
    """The mean share of a window in which a device ran, rows per second, CPU time of a row, and rows per forward."""
    window = max(2.0, WINDOW_S * bench.scale)
    with traced(bench) as (one, trace), one.workers(count, "accelerator") as running:
        control, queue = one.client.app.control, "nograd.accelerator"
        # Filled while nobody consumes it, so that all of them begin at once and no producer takes their CPU.
        if len(control.cancel_consumer(queue, reply=True, timeout=10, limit=count)) < count:
            raise Broken("not every worker stops consuming")
        full_rate = count * hosted.SIMULATED_BATCH / device_s(hosted.SIMULATED_BATCH)
        held = 4 * hosted.SIMULATED_BATCH * count  # messages in flight at the end
        one.client.broker.publish_many(packs("accelerator", int(full_rate * (window + 3) / 16) + held, 16))
        control.add_consumer(queue)
        time.sleep(2)
        began, cpu_s = time.monotonic(), -sum(worker.cpu_s() for worker in running)
        time.sleep(window)
        ended, cpu_s = time.monotonic(), cpu_s + sum(worker.cpu_s() for worker in running)
        if not one.client.broker.waiting(["accelerator"])["accelerator"]:
            raise Broken("the queue ran empty within the window")
        of_window = [
            (min(end, ended) - max(begin, began), end - begin, items)
            for each in hosted.forwards(trace).values()
            for begin, end, items in each
            if end > began and begin < ended
        ]
    ran = sum(inside for inside, _, _ in of_window)
    done = sum(items * inside / whole for inside, whole, items in of_window)
    return {
        "busy": 100 * ran / (window * count),
        "rate": done / window,
        "cpu_ms": 1000 * cpu_s / done,
        "batch": statistics.fmean(items for _, _, items in of_window),
    }


@contextmanager
def traced(bench: Bench) -> Iterator[tuple[Side, Path]]:
    """A side whose simulated devices note what they do."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as name, side(bench, BENCH_TRACE=name) as one:
        yield one, Path(name)


def latency(bench: Bench) -> None:
    idle, loaded = [], []
    batch_ms = 1000 * device_s(hosted.SIMULATED_BATCH)
    jobs = max(50, int(300 * bench.scale))
    for _ in range(bench.rounds):
        with traced(bench) as (one, _), one.workers(1, "accelerator"):
            idle.append(latencies(one.client, jobs))
            full_rate = hosted.SIMULATED_BATCH / device_s(hosted.SIMULATED_BATCH)
            backfill = int(full_rate * jobs * (0.12 + GAP_S) / 16)
            one.client.broker.publish_many(packs("accelerator", backfill, 16, priority=BULK))
            time.sleep(1)
            loaded.append(latencies(one.client, jobs))
            if not one.client.broker.waiting(["accelerator"])["accelerator"]:
                raise Broken("the backfill ended before the interactive jobs did")
    for name, found in (("idle", idle), ("under a backfill", loaded)):
        for share in (0.5, 0.99):
            bench.note(
                "latency", f"SIMULATED device, {name}: p{share * 100:.0f}",
                statistics.median(stats.percentile(each, share) for each in found), "ms",
            )  # fmt: skip
    above = [
        (stats.percentile(full, 0.99) - stats.percentile(free, 0.99)) / batch_ms
        for full, free in zip(loaded, idle, strict=True)
    ]
    bench.note(
        "latency", f"p99 under a backfill above idle, in batches of {batch_ms:g} ms", statistics.median(above), "",
        ("<=", 2), rounds=[round(each, 2) for each in above],
    )  # fmt: skip


def latencies(client: Client, count: int) -> list[float]:
    """Milliseconds from submit to result of jobs that come one by one, at random moments."""
    chance, taken = random.Random(0), []
    for _ in range(count):
        began = time.perf_counter()
        client.submit("accelerator", hosted.ROW).result(60)
        taken.append((time.perf_counter() - began) * 1000)
        time.sleep(chance.uniform(0, GAP_S))
    return taken


def events(bench: Bench) -> None:
    apps = {"on": "nograd.tasks", "off": "common.quiet"}
    drained: dict[str, list[fleet.Drained]] = {name: [] for name in apps}
    for number in range(bench.rounds):
        for name in sorted(apps, reverse=bool(number % 2)):
            drained[name].append(pooled(bench, app=apps[name]))
    rates = {
        name: bench.rates("events", f"the pool, task events and timings {name}: rows", found)
        for name, found in drained.items()
    }
    bench.ratio("events", "on / off", rates["on"], rates["off"], target=(">=", 0.8))


SECTIONS: dict[str, Section] = {
    "mlp": mlp, "packed": packed, "resnet": resnet, "accelerator": accelerator, "latency": latency, "events": events
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="pool", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the amount of work in a round; 0.2 for a look")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"--only {unknown[0]!r}: the sections are {', '.join(SECTIONS)}")
    with tempfile.TemporaryDirectory(prefix="nograd-bench-") as name:
        folder = Path(name)
        bench = Bench(options.rounds, options.scale, folder, hosted.write_models(folder))
        broken = {}
        for section in chosen:
            seen = len(bench.rows)
            try:
                SECTIONS[section](bench)
            except Broken as problem:  # what the other sections took minutes to find is not thrown away
                broken[section] = str(problem)
                print(f"{section}: {problem}", file=sys.stderr)
            for row in bench.rows[seen:]:
                print(line(row), file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        print(json.dumps({"rows": bench.rows, "broken": broken}, indent=1))
    sys.exit(bool(broken))


def line(row: dict[str, Any]) -> str:
    """A figure for people."""
    interval = f"[{row['interval'][0]:g}, {row['interval'][1]:g}]" if "interval" in row else ""
    verdict = f"{row['target']:>10}  {'met' if row['met'] else 'MISSED'}" if "target" in row else ""
    cpu = f"{row['cpu_ms']:.3g} ms of CPU each" if "cpu_ms" in row else ""
    return f"{row['what']:64} {row['figure']:>10g} {row['unit']:2} {interval or cpu:24} {verdict}"


if __name__ == "__main__":
    main()
