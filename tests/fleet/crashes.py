"""Workers that wait at a moment of a chunk for somebody to do them harm: a model and a system call, both real.

The moments are in `backfill_models`; this is the side that arms them::

    prepare · forward · finish · before the record · after the record · before the ack
    └─── the model's own code ───┘  └── os.link of the commit record ──┘  └ the listing of what is missing ┘
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import redis

from nograd.producer.embedded import find_server, free_port
from nograd.tasks.backfill import layout
from nograd.tasks.backfill import plan as plans
from nograd.tasks.backfill.plan import Job
from nograd.tasks.backfill.store import open_store
from waiting import until

#: seconds a worker may be silent
LEASE_S = 3


class Redis:
    """A Redis that is killed and started again.

    Args:
        folder: for its data.
        durable: every write is on disk before it is answered; else what it comes back with is what `save` wrote last.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self._folder = folder
        self._durable = durable
        self._port = free_port()
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = {"port": self._port, "bind": "127.0.0.1", "dir": self._folder}
        options |= {"appendonly": "yes" if self._durable else "no", "appendfsync": "always", "save": ""}
        command = [find_server(), *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until(self._answers, "redis-server does not start")

    def _answers(self) -> bool:
        try:
            return bool(redis.Redis.from_url(self.url).ping())
        except redis.RedisError:
            return False

    def save(self) -> None:
        """Write a dump."""
        with redis.Redis.from_url(self.url) as client:
            client.save()

    def kill(self) -> None:
        """As the machine would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


class Fleet:
    """Keeps two workers alive; one that was killed is replaced without waiting for the new one."""

    def __init__(self, start: Any, models: Path) -> None:
        self._start = lambda: start(models, ready=False, env={"NOGRAD_LEASE_S": str(LEASE_S)}.items())
        self.workers = [self._start()]
        self.workers[0].wait_until_ready()

    def replace(self) -> None:
        """Start as many as are missing."""
        self.workers = [worker for worker in self.workers if worker.alive()]
        while len(self.workers) < 2:
            self.workers.append(self._start())

    def both(self) -> list[Any]:
        """Wait for two workers."""
        self.replace()
        for worker in self.workers:
            worker.wait_until_ready()
        return self.workers

    def kill(self) -> None:
        """All of them, as the machine would."""
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()

    def of(self, pid: int) -> Any:
        """The worker with this process."""
        return next(worker for worker in self.workers if worker.process.pid == pid)


#: in the order in which a chunk comes by
MOMENTS = ("prepare", "forward", "finish", "before the record", "after the record", "before the ack")


class Moments:
    """Arms a moment and waits for the worker that comes by.

    Args:
        folder: where the models are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.clear()

    def arm(self, moment: str) -> None:
        """The next worker that comes by this moment stops there."""
        (self._folder / f"armed {moment}").touch()

    def reached(self) -> bool:
        """Whether one has."""
        return (self._folder / "held").exists()

    def pid(self) -> int:
        """Its process."""
        return int((self._folder / "held").read_text().split()[0])

    def chunk(self) -> int:
        """The chunk whose record it was about to write."""
        return int((self._folder / "held").read_text().split()[1])

    def release(self) -> None:
        """Let it go on."""
        (self._folder / "held").unlink()

    def wait_left(self) -> None:
        """Wait until it has."""
        until((self._folder / "left").exists, "the worker does not go on")

    def clear(self) -> None:
        """As if nothing had been armed."""
        for path in [
            *self._folder.glob("armed *"),
            *(self._folder / name for name in ("held", "left", "taken", "new")),
        ]:
            path.unlink(missing_ok=True)


def read_folder(job: Job, out: Path) -> Job:
    """The plan of a backfill in another folder, where nothing is done yet."""
    shutil.copytree(f"{job.store.url}/{layout.PLAN_FOLDER}", out / layout.PLAN_FOLDER)
    shutil.copy(f"{job.store.url}/{layout.PLAN}", out)
    return plans.load(open_store(out))
