"""``nograd models | models load | models unload``."""

from __future__ import annotations

import time
from typing import Any

import click
import msgspec
from rich.table import Column, Table

from nograd.producer.client import Client
from nograd.tasks.errors import ConfigError, ModelFileError

from .common import FAILED, OK, Run, command

#: seconds workers have to say that they heard, where nobody knows how many there are
ANSWER_S = 2.0
#: the same of those that are asked by their names: the wait ends with their answers, and one may be busy
NAMED_ANSWER_S = 15.0
#: seconds between two looks at how far they are
POLL_S = 0.3

_WORKER = click.option("--worker", "worker", metavar="NODE", help="Only this worker; default: all that are up.")
_TIMEOUT = click.option(
    "--timeout", metavar="S", type=float, default=600.0, show_default=True, help="Seconds to wait for the end."
)


@command
def _list(run: Run) -> int:
    """List the models that are known: those of the model file and those workers have registered."""
    with run.client() as client:
        cards = client.models()
    name, queue = (Column(heading, overflow="fold") for heading in ("model", "queue"))
    table = Table(name, "loader", "input", queue, "batch", "version", "seen")
    for card in cards.values():
        seen = f"{time.time() - card.seen_at:.0f} s ago" if card.seen_at else "in the file only"
        table.add_row(card.name, card.loader, card.input, card.queue, str(card.max_items), card.version, seen)
    empty = "no model is known: give --models FILE, or start a worker"
    run.emit({"models": [msgspec.to_builtins(card) for card in cards.values()]}, table if cards else empty)
    return 0


@command
@click.argument("name")
@_WORKER
@_TIMEOUT
@click.option("--reload", is_flag=True, help="Also where it is loaded: take what the model file says now.")
def load(run: Run, *, name: str, worker: str | None, timeout: float, reload: bool) -> int:
    """Load a model into workers that run.

    They read their model file again. Their other models go on, and wait for one size of its warm-up at a time.
    """
    return _change(run, name, worker, timeout, "nograd_load", {"model": name, "reload": reload}, "ready")


@command
@click.argument("name")
@_WORKER
@_TIMEOUT
def unload(run: Run, *, name: str, worker: str | None, timeout: float) -> int:
    """Unload a model from workers that run.

    Its jobs stay in its queue for whoever has the model; it stays known.
    """
    return _change(run, name, worker, timeout, "nograd_unload", {"model": name}, "unloaded")


class _Models(click.Group):
    """``nograd models`` alone lists, with the options of the list."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the name of the list where no command is named."""
        names = [arg for arg in args if not arg.startswith("-")]
        if not ({"-h", "--help"} & set(args)) and not (names and args[0] in self.commands):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Models)
def models() -> None:
    """List the known models, or load and unload models in workers that run."""


for _name, _command in {"list": _list, "load": load, "unload": unload}.items():
    models.add_command(_command, _name)


def _change(  # noqa: PLR0917 - one caller for each command
    run: Run, name: str, worker: str | None, timeout: float, remote: str, arguments: dict[str, Any], wanted: str
) -> int:
    with run.client() as client:
        nodes, seconds = (None, ANSWER_S) if worker is None else ([worker], NAMED_ANSWER_S)
        replies = client.broker.command(remote, arguments, nodes, seconds)
        if not replies:
            raise ConfigError(f"no worker answers{f' to {worker}' if worker else ''}; nograd status shows who is up")
        for node, reply in replies.items():
            if "ok" not in reply:
                kind = ModelFileError if reply.get("code") == ModelFileError.code else ConfigError
                raise kind(f"{node}: {reply.get('error', reply)}")
        states = _wait(client, name, list(replies), timeout)
    failed = {node: state for node, state in states.items() if state["status"] == "failed"}
    for node, state in failed.items():
        raise ModelFileError(f"{node}: {state['error']}")
    late = [node for node, state in states.items() if state["status"] != wanted]
    text = "\n".join(f"{node}: {name} is {state['status']}" for node, state in states.items())
    run.emit({"model": name, "workers": states}, text)
    if late:
        run.complain(f"not {wanted} after {timeout:g} s on {', '.join(late)}; nograd status shows how it goes on")
    return FAILED if late else OK


def _wait(client: Client, name: str, nodes: list[str], timeout: float) -> dict[str, dict[str, Any]]:
    """How the model stands in each worker, as soon as none is on its way any more."""
    states: dict[str, dict[str, Any]] = {node: {"status": "unknown"} for node in nodes}
    until = time.monotonic() + timeout
    while True:
        for node, pool in client.broker.workers(NAMED_ANSWER_S, nodes).items():
            states[node] = pool.get("hosting", {}).get(name, {"status": "unloaded"})
        moving = [node for node, state in states.items() if state["status"] in ("unknown", "loading", "unloading")]
        if not moving or time.monotonic() > until:
            return states
        time.sleep(POLL_S)
