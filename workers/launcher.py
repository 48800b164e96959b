"""One worker process per GPU, started again when it dies (``nograd worker --gpus …``).

Laws:

* ``CUDA_VISIBLE_DEVICES`` is in a worker's environment before its interpreter starts, so before torch is imported.
* A GPU that was asked for by name is used, or the launch ends with 2: no worker falls back to the CPU unnoticed.
* Every worker has a node name of its own: Celery and Flower merge workers that share one.
* A worker that ends by itself (`exits` has its codes) is started again, after a pause that doubles while it keeps
  dying. One that refuses its configuration (exit code 2) is not: starting it again cannot help, and the whole launch
  ends with 2.
* The workers share the cores of the machine among them (`nograd.workers.resources`).
* SIGTERM and SIGINT reach every worker, which then finishes what is on its device; a killed launcher takes them along.

The launcher itself never imports torch: it must not touch CUDA before its children do.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from nograd.tasks.errors import ConfigError
from nograd.tasks.keys import LOG_JOBS, queue_name
from nograd.tasks.lifeline import end_with_parent
from nograd.tasks.modelfile import load_model_file

from .exits import EXIT_CONFIG, explain
from .resources import GPUS, MEMORY_BUDGET, read_size, share_of_cores

logger = logging.getLogger(__name__)

#: seconds before a dead worker is started again; doubles up to the second while it lives shorter than the third
RESTART_S, RESTART_MAX_S, STEADY_S = 1.0, 30.0, 60.0
#: seconds nvidia-smi may take; it hangs when the driver does
NVIDIA_SMI_TIMEOUT_S = 60.0


def visible_gpus(gpus: str, env: Mapping[str, str] | None = None) -> list[str]:
    """The devices to start workers on: one entry each for ``CUDA_VISIBLE_DEVICES``, ``""`` for a CPU worker.

    Args:
        gpus: ``all`` (a CPU worker if there is none), ``none``, or indices and UUIDs (``0,2``).
        env: the environment; ``CUDA_VISIBLE_DEVICES`` in it limits what ``all`` means.

    Raises:
        ConfigError: for anything else.
    """
    if gpus == "none":
        return [""]
    if gpus == "all":
        limited = (os.environ if env is None else env).get("CUDA_VISIBLE_DEVICES")
        return (_installed_gpus() if limited is None else _listed(limited)) or [""]
    names = [name.strip() for name in gpus.split(",")]
    if not all(name.isdigit() or name.startswith(("GPU-", "MIG-")) for name in names) or len(set(names)) < len(names):
        raise ConfigError(f"--gpus = {gpus!r}: expected all, none, or different indices or UUIDs like 0,2")
    return names


def _listed(limited: str) -> list[str]:
    names = (name.strip() for name in limited.split(","))
    # As CUDA reads it: a -1 hides itself and what follows.
    return [name for name in takewhile(lambda name: name != "-1", names) if name]


def _installed_gpus() -> list[str]:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    command = [smi, "--query-gpu=index", "--format=csv,noheader"]
    try:
        listing = subprocess.run(  # noqa: S603 - a fixed command
            command, capture_output=True, text=True, check=False, timeout=NVIDIA_SMI_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        logger.warning("no GPU is used: %s", err)
        return []
    return listing.stdout.split() if listing.returncode == 0 else []


@dataclass(slots=True)
class _Worker:
    """One place of the fleet: its device, and the process that fills it now."""

    gpu: str
    command: list[str]
    env: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    deaths: int = 0
    restart_at: float = field(default=0.0)

    def start(self) -> None:
        self.started = time.monotonic()
        self.process = subprocess.Popen(self.command, env=self.env, preexec_fn=end_with_parent())  # noqa: S603, PLW1509

    def died(self, now: float) -> float:
        """Plan the restart; seconds until it."""
        self.process = None
        self.deaths = 1 if now - self.started > STEADY_S else self.deaths + 1
        # The exponent is bounded as well: a worker that never gets up dies more often than a float can double.
        pause: float = min(RESTART_S * 2 ** min(self.deaths - 1, 16), RESTART_MAX_S)
        self.restart_at = now + pause
        return pause


def run(
    models: Path,
    gpus: str = "all",
    *,
    concurrency: int | None = None,
    only: Sequence[str] = (),
    memory_budget: str | None = None,
    celery_args: Sequence[str] = (),
) -> int:
    """Run the workers of this machine until told to stop; the exit code for the shell.

    Args:
        models: the model file.
        gpus: see `visible_gpus`.
        concurrency: messages in flight in each worker.
        only: the models these workers load; all of the file if there are none.
        memory_budget: what the models of one worker may hold together, like ``10GB``.
        celery_args: for ``celery worker``.

    Raises:
        ConfigError: if one of them makes no sense.
    """
    devices = visible_gpus(gpus)
    env = {
        **os.environ,
        **share_of_cores(len(devices)),
        "NOGRAD_MODELS": str(models),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # so that indices are those nvidia-smi shows
    }
    env[GPUS] = gpus if gpus not in ("all", "none") else ""
    if memory_budget is not None:
        env[MEMORY_BUDGET] = str(read_size(memory_budget, "--memory-budget"))
    args = list(celery_args)
    if concurrency is not None:
        args += ["--concurrency", str(concurrency)]
    if only:
        args += ["-Q", ",".join(queue_name(name) for name in _known(models, only))]
    workers = [_worker(gpu, env, args) for gpu in devices]
    stopping = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _supervise(workers, stopping)
    finally:
        _stop(workers)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _supervise(workers: list[_Worker], stopping: threading.Event) -> int:
    while not stopping.wait(0.2):
        now = time.monotonic()
        for worker in workers:
            if worker.process is None:
                if now >= worker.restart_at:
                    worker.start()
                continue
            code = worker.process.poll()
            if code is None:
                continue
            if code == EXIT_CONFIG:
                worker.process = None
                return EXIT_CONFIG
            if code == 0:  # somebody asked this worker to stop (remote shutdown); that is not a crash
                worker.process = None
                worker.restart_at = float("inf")
                if all(w.process is None and w.restart_at == float("inf") for w in workers):
                    return 0
                continue
            logger.warning(
                "worker on %s %s; starting again in %.0f s",
                _name(worker.gpu), explain(code), worker.died(now),
            )  # fmt: skip
    return 0


def _stop(workers: list[_Worker]) -> None:
    """End all workers the warm way, and wait: what is on a device is finished and stored."""
    running = [worker.process for worker in workers if worker.process is not None and worker.process.poll() is None]
    for process in running:
        process.terminate()
    for process in running:
        process.wait()


def _known(models: Path, only: Sequence[str]) -> Sequence[str]:
    known = load_model_file(models).specs
    for name in only:
        if name not in known:
            raise ConfigError(f"--only names {name!r}; the models of {models} are {', '.join(known)}")
    return only


def _worker(gpu: str, env: Mapping[str, str], celery_args: Sequence[str]) -> _Worker:
    # Mingle would wait a second for other workers at every start and reconnect, to learn which jobs were revoked before
    # this one came up; a revoke is a request to those that are up.
    command = [sys.executable, "-m", "celery", "-A", "nograd.tasks", "worker", "--without-gossip", "--without-mingle"]
    if not any(arg.startswith(("-l", "--loglevel")) for arg in celery_args):
        # At thousands of jobs a second two lines for each are most of a log and a good part of the work.
        command += ["--loglevel", "INFO"]
        env = {**env, LOG_JOBS: env.get(LOG_JOBS, "0")}
    if not any(arg.startswith(("-n", "--hostname")) for arg in celery_args):
        command += ["--hostname", f"nograd-{_name(gpu)}-{os.getpid()}@%h"]
    return _Worker(gpu, [*command, *celery_args], {**env, "CUDA_VISIBLE_DEVICES": gpu})


def _name(gpu: str) -> str:
    return f"gpu{gpu}" if gpu else "cpu"
