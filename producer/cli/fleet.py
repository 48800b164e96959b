"""``nograd worker | up | flower | status``."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import click
from celery.utils.nodenames import gethostname
from rich.console import Group
from rich.markup import escape
from rich.table import Column, Table

from nograd.producer.client import Client
from nograd.producer.fleet import FLOWER_PORT, Fleet, flower_command, require_flower, require_worker
from nograd.producer.processes import stopping_on_sigterm
from nograd.tasks.hints import did_you_mean
from nograd.tasks.modelfile import load_model_file

from .common import FAILED, OK, Run, command

_GPUS = click.option("--gpus", default="all", show_default=True, help="all, none, or indices like 0,2.")
_CONCURRENCY = click.option("--concurrency", type=click.IntRange(min=1), help="Messages in flight in each worker.")
_PORT = click.option("--port", type=click.IntRange(1, 65535), default=FLOWER_PORT, show_default=True, help="Of Flower.")


@command
@_GPUS
@_CONCURRENCY
@click.option("--only", metavar="A,B", help="The models to load; default: all of the file.")
@click.option("--memory-budget", metavar="SIZE", help="What the models of one worker may hold together, like 10GB.")
@click.argument("celery_args", nargs=-1, type=click.UNPROCESSED)
def worker(
    run: Run,
    *,
    gpus: str,
    concurrency: int | None,
    only: str | None,
    memory_budget: str | None,
    celery_args: tuple[str, ...],
) -> int:
    """Run the workers of this machine: one process for each GPU, started again if it dies.

    What stands behind -- goes to `celery worker`.
    """
    models = run.model_file()
    run.export()
    require_worker()
    from nograd.workers.launcher import run as launch  # on demand: the client is installed without it

    return launch(
        models=models,
        gpus=gpus,
        concurrency=concurrency,
        only=[name.strip() for name in only.split(",")] if only else (),
        memory_budget=memory_budget,
        celery_args=celery_args,
    )


@command
@_GPUS
@_CONCURRENCY
@_PORT
@click.option("--flower/--no-flower", default=True, show_default=True, help="Run Flower as well.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the private Redis; default: a temporary one.")
def up(run: Run, *, gpus: str, concurrency: int | None, port: int, flower: bool, data: Path | None) -> int:
    """Run Redis, workers and Flower here, in the foreground, until Ctrl-C."""
    fleet = Fleet(
        run.model_file(),
        redis_url=run.redis_url,
        folder=data,
        gpus=gpus,
        concurrency=concurrency,
        flower_port=port if flower else None,
    )
    with stopping_on_sigterm(), fleet:
        with contextlib.suppress(KeyboardInterrupt):
            fleet.wait_ready()
            run.emit({"redis_url": fleet.url, "flower": fleet.flower_url}, _invitation(fleet))
            return _stay(run, fleet)
        return 0


@command
@_PORT
@click.argument("flower_args", nargs=-1, type=click.UNPROCESSED)
def flower(run: Run, *, port: int, flower_args: tuple[str, ...]) -> int:
    """Run Flower on loopback.

    What stands behind -- goes to Flower.
    """
    require_flower()
    run.export()
    run.emit({"flower": f"http://127.0.0.1:{port}"}, f"Flower: http://127.0.0.1:{port}")
    argv = flower_command(port, *flower_args)
    os.execv(argv[0], argv)  # noqa: S606 - our own interpreter, no shell


@command
@click.option(
    "--timeout", metavar="S", type=float, default=1.0, show_default=True, help="Seconds workers have to answer."
)
@click.option("--ready", is_flag=True, help="Say only whether they are ready: exit code 0, or 1.")
@click.option("--model", metavar="NAME", help="With --ready: whether this model can be used.")
@click.option("--here", is_flag=True, help="Only workers of this host; in a container, its own.")
def status(run: Run, *, timeout: float, ready: bool, model: str | None, here: bool) -> int:
    """Show the workers that are up and how many messages wait for each model.

    A worker is ready when all its models are loaded and warm and it takes their jobs.
    """
    if ready:
        return _ready(run, timeout, model, here=here)
    with run.client() as client:
        names = dict.fromkeys([*client.models(), *client.broker.queued()])
        waiting = client.broker.waiting(names)
        workers = _workers(client, timeout, here=here)
        address = client.broker.address
    document = {
        "redis": address,
        "workers": [
            {"name": name, "device": pool.get("device"), "ready": pool.get("ready"), "models": pool.get("hosting", {})}
            for name, pool in workers.items()
        ],
        "models": {name: {"waiting": count} for name, count in waiting.items()},
    }
    queues = Table(Column("model", overflow="fold"), "messages waiting")
    for name, count in waiting.items():
        queues.add_row(name, f"{count:,}")
    up = Table(Column("worker", overflow="fold"), "device", "inputs in its pool", "models")
    for name, pool in workers.items():
        hosted = ", ".join(
            model if state["status"] == "ready" else f"{model} ({state['status']})"
            for model, state in pool.get("hosting", {}).items()
        )
        up.add_row(name, *(str(pool.get(key, "?")) for key in ("device", "waiting_items")), hosted)
    running = f"{len(workers)} worker{'s' * (len(workers) != 1)} up"
    failed = [escape(trouble) for trouble in _troubles(workers, "failed")]
    run.emit(document, Group(f"Redis at {address}, {running}", queues, up, *failed))
    return 0


def _ready(run: Run, timeout: float, model: str | None, *, here: bool) -> int:
    """For probes: whether there is a worker, and all of them are ready, or one has the model."""
    with run.client() as client:
        workers = _workers(client, timeout, here=here)
    reason = _why_not(workers, model, here=here)
    document = {"ready": reason is None, "workers": sorted(workers), **({"reason": reason} if reason else {})}
    run.emit(document, "ready" if reason is None else f"not ready: {reason}")
    return OK if reason is None else FAILED


def _why_not(workers: dict[str, dict[str, Any]], model: str | None, *, here: bool) -> str | None:
    """Why they are not ready, or none of them has the model ready; None if it is well."""
    if not workers:
        return "no worker of this host answers" if here else "no worker answers"
    if model is None:
        if all(pool.get("ready") for pool in workers.values()):
            return None
        silent = [f"{node} does not tell of any model" for node, pool in workers.items() if "ready" not in pool]
        return "; ".join([*_troubles(workers, "failed", "loading", "unloading"), *silent])
    hosted = {name: pool["hosting"][model] for name, pool in workers.items() if model in pool.get("hosting", {})}
    if any(state["status"] == "ready" for state in hosted.values()):
        return None
    if not hosted:
        known = {name for pool in workers.values() for name in pool.get("hosting", {})}
        return f"no worker has {model!r}.{did_you_mean(model, known)} They have {', '.join(sorted(known)) or 'none'}"
    return "; ".join(_describe(model, node, state) for node, state in hosted.items())


def _troubles(workers: dict[str, dict[str, Any]], *statuses: str) -> list[str]:
    """A line for each model that stands like this in a worker."""
    return [
        _describe(model, node, state)
        for node, pool in workers.items()
        for model, state in pool.get("hosting", {}).items()
        if state["status"] in statuses
    ]


def _describe(model: str, node: str, state: dict[str, Any]) -> str:
    if state["status"] == "failed":
        return f"{model} failed on {node}: {state.get('error')}"
    return f"{model} is {state['status']} on {node}"


def _workers(client: Client, timeout: float, *, here: bool) -> dict[str, dict[str, Any]]:
    suffix = f"@{gethostname()}" if here else ""  # Celery's own, as in %h
    return {name: pool for name, pool in client.broker.workers(timeout).items() if name.endswith(suffix)}


def _invitation(fleet: Fleet) -> str:
    """How other terminals get at the fleet: lines of a shell."""
    name, spec = next(iter(load_model_file(fleet.models).specs.items()))
    value = {"image": "IMAGE.jpg", "text": "'A TEXT'"}.get(spec.kind, "JSON")
    lines = [
        *(["# Flower: " + fleet.flower_url] if fleet.flower_url else []),
        "# Ready. In another terminal:",
        f"export NOGRAD_REDIS_URL='{fleet.url}'",
        f"nograd submit {name} {value} --wait",
    ]
    return "\n".join(lines)


def _stay(run: Run, fleet: Fleet) -> int:
    """Stay until interrupted, or until a process ends by itself."""
    while (dead := fleet.dead()) is None:
        time.sleep(0.5)
    run.complain(f"{dead.name} ended with {dead.exit_code}; stopping the others")
    return FAILED
