"""Stock Celery and the lossless transport side by side: ``python benchmarks/transport.py``.

Interleaved rounds on one machine, each with a Redis of its own, task events on for both sides; prints medians, and the
median of the ratios of neighbouring runs. Also the Celery app of the workers it starts (``celery -A transport``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import redis
from celery import Celery
from kombu import Queue

from nograd.producer.embedded import find_server

HERE = Path(__file__).parent
#: what an app with the lossless transport is made with, its pool of connections for publishing too
OURS: dict[str, str] = {"amqp": "nograd.tasks.transport:AMQP"}


def make_app(url: str | None, *, ours: bool) -> Celery:
    """An app of one side."""
    return Celery("bench", broker=url, backend=url, set_as_current=False, **(OURS if ours else {}))


app = make_app(os.environ.get("BENCH_URL"), ours=bool(os.environ.get("BENCH_OURS")))
app.conf.update(
    task_acks_late=True,
    task_default_queue="q0",
    worker_send_task_events=True,
    worker_prefetch_multiplier=int(os.environ.get("BENCH_PREFETCH", "4")),
    broker_connection_retry_on_startup=True,
    task_queues=[Queue(f"q{n}", routing_key=f"q{n}") for n in range(int(os.environ.get("BENCH_QUEUES", "1")))],
)


@app.task(name="bench.noop", ignore_result=True)
def noop() -> None:
    """Cost nothing but the transport."""


@app.task(name="bench.echo")
def echo(value: int) -> int:
    """Come back."""
    return value


class Side:
    """One run of one side."""

    def __init__(self, *, ours: bool, queues: int, prefetch: int, executable: str) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        command = [executable, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self.server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.client = redis.Redis(port=self.port)
        self.queues = queues
        self.names = [f"q{n}" for n in range(queues)]
        url = f"redis://127.0.0.1:{self.port}/0"
        self.env = os.environ | {
            "BENCH_URL": url,
            "BENCH_OURS": "1" if ours else "",
            "BENCH_QUEUES": str(queues),
            "BENCH_PREFETCH": str(prefetch),
            "PYTHONWARNINGS": "ignore",
        }
        self.app = make_app(url, ours=ours)
        for _ in range(200):
            with contextlib.suppress(redis.RedisError):
                self.client.ping()
                break
            time.sleep(0.05)

    def publish(self, count: int) -> float:
        """Messages per second of one producer."""
        self.app.send_task("bench.noop", queue="q0", ignore_result=True)
        began = time.perf_counter()
        for n in range(count):
            self.app.send_task("bench.noop", queue=f"q{n % self.queues}", ignore_result=True)
        return count / (time.perf_counter() - began)

    def start(self, pool: str, concurrency: int, app: str = "transport:app") -> None:
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "-E", "-l", "error"]
        command += ["--without-gossip", "--without-mingle"]
        command += ["-P", pool, "-c", str(concurrency)] if pool else []
        out = subprocess.DEVNULL
        self.worker = subprocess.Popen(command, cwd=HERE, env=self.env, stdout=out, stderr=out)

    def waiting(self) -> int:
        return sum(self.client.llen(name) for name in self.names)

    def drain(self) -> tuple[float, float, float]:
        """Messages per second, commands per message, round trips (reads from clients) per message."""
        full, until = self.waiting(), time.monotonic() + 120
        while self.waiting() > full * 0.95:
            if time.monotonic() > until or self.worker.poll() is not None:
                raise SystemExit("the worker does not begin; run it by hand to see why")
            time.sleep(0.002)
        self.client.config_resetstat()
        count, began = self.waiting(), time.perf_counter()
        polls = 1
        while self.waiting():
            polls += 1
            time.sleep(0.01)
        rate = count / (time.perf_counter() - began)
        own = polls * self.queues  # this loop's own commands
        return rate, (self.commands() - own) / count, (self.reads() - own) / count

    def commands(self) -> int:
        stats = self.client.info("commandstats")
        return sum(
            each["calls"] for name, each in stats.items() if not name.startswith(("cmdstat_config", "cmdstat_info"))
        )

    def reads(self) -> int:
        return int(self.client.info("stats")["total_reads_processed"])

    def latency(self, count: int) -> tuple[float, float]:
        """Submit → result of an idle worker: p50 and p99 in ms."""
        taken = []
        for n in range(count):
            began = time.perf_counter()
            self.app.send_task("bench.echo", (n,), queue=f"q{n % self.queues}").get(timeout=30)
            taken.append((time.perf_counter() - began) * 1000)
            time.sleep(0.005)
        taken.sort()
        return statistics.median(taken), taken[int(len(taken) * 0.99)]

    def idle(self, seconds: float) -> tuple[float, float]:
        """Commands and round trips per second of a worker with nothing to do."""
        time.sleep(1)
        self.client.config_resetstat()
        time.sleep(seconds)
        return self.commands() / seconds, self.reads() / seconds

    def close(self) -> None:
        self.worker.send_signal(signal.SIGTERM)
        try:
            self.worker.wait(30)
        except subprocess.TimeoutExpired:
            self.worker.kill()
        self.server.kill()
        self.server.wait()


def measure(*, ours: bool, options: argparse.Namespace, queues: int) -> dict[str, float]:
    side = Side(ours=ours, queues=queues, prefetch=options.prefetch, executable=options.redis)
    result = {"publish /s": side.publish(options.messages)}
    side.start(options.pool, options.concurrency)
    try:
        result["drain /s"], result["commands per message"], result["round trips per message"] = side.drain()
        result["latency p50 ms"], result["latency p99 ms"] = side.latency(options.latency)
        result["idle commands /s"], result["idle round trips /s"] = side.idle(options.idle)
    finally:
        side.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="transport", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=4000)
    parser.add_argument("--latency", type=int, default=200, help="jobs for the latency")
    parser.add_argument("--idle", type=float, default=5, help="seconds to count an idle worker's commands")
    parser.add_argument("--queues", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--pool", default="solo")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--prefetch", type=int, default=4, help="worker_prefetch_multiplier (4 is Celery's default)")
    parser.add_argument("--redis", help="a server to run instead of the one that is found")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.redis = options.redis or find_server()
    report = {}
    for queues in options.queues:
        stock, ours = [], []
        for number in range(options.rounds):
            # The order changes, so that neither side always finds the machine warm.
            for mine in (False, True) if number % 2 else (True, False):
                (ours if mine else stock).append(measure(ours=mine, options=options, queues=queues))
        report[f"{queues} queues"] = {
            name: {
                "stock": round(statistics.median(each[name] for each in stock), 2),
                "ours": round(statistics.median(each[name] for each in ours), 2),
                "ratio": round(statistics.median(o[name] / s[name] for o, s in zip(ours, stock, strict=True)), 2),
            }
            for name in stock[0]
        }
    if options.json:
        print(json.dumps(report))
        return
    for title, rows in report.items():
        print(f"{title}, {options.pool} pool, {options.rounds} rounds (median; median of the ratios)")
        for name, row in rows.items():
            print(f"  {name:26} stock {row['stock']:>9}   ours {row['ours']:>9}   ratio {row['ratio']}")


if __name__ == "__main__":
    main()
