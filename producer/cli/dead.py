"""``nograd dead list | show | replay | drop``: messages nobody could run, kept until somebody decides."""

from __future__ import annotations

import time
from typing import Any

import click
import msgspec
from rich.table import Table

from nograd.tasks.errors import ConfigError
from nograd.tasks.transport import DeadLetters

from .common import Run, command


@click.group()
def dead() -> None:
    """Look after jobs that killed their workers and messages nobody could read."""


@command
def _list(run: Run) -> int:
    """List the dead letters, oldest first."""
    with run.client() as client, client.broker.errors():
        letters = list(DeadLetters(client.app.backend.client))
    table = Table("id", "queue", "job", "deaths", "age", "reason")
    for letter in letters:
        age = f"{time.time() - letter['at']:.0f} s"
        row = (letter["id"], letter["queue"], letter.get("task_id") or "?", str(letter["deliveries"]), age)
        table.add_row(*row, letter["reason"])
    run.emit({"dead": letters}, table if letters else "no dead letters")
    return 0


@command
@click.argument("dead_id", metavar="ID")
def show(run: Run, *, dead_id: str) -> int:
    """Show what is known of a dead letter, and its message as it was published."""
    with run.client() as client, client.broker.errors():
        letters = DeadLetters(client.app.backend.client)
        raw = letters.message(dead_id)
        known = next((letter for letter in letters if letter["id"] == dead_id), None)
    if raw is None or known is None:
        raise _unknown(dead_id)
    document = {**known, "message": raw.decode(errors="replace")}
    run.emit(document, msgspec.json.format(msgspec.json.encode(document)).decode())
    return 0


@command
@click.argument("dead_ids", metavar="ID…", nargs=-1, required=True)
def replay(run: Run, *, dead_ids: tuple[str, ...]) -> int:
    """Put messages at the end of the queues they came from, and forget the failures stored for their jobs."""
    with run.client() as client, client.broker.errors():
        letters = DeadLetters(client.app.backend.client)
        jobs = {letter["id"]: letter.get("task_id") for letter in letters}
        _check_known(dead_ids, jobs)
        # First: the first terminal state of a job wins, so its failure would outlive the success of the replay.
        client.broker.forget([job for dead_id in dead_ids if (job := jobs[dead_id])])
        for dead_id in dead_ids:
            letters.replay(dead_id)
    run.emit({"replayed": list(dead_ids)}, f"replayed {len(dead_ids)}")
    return 0


@command
@click.argument("dead_ids", metavar="ID…", nargs=-1, required=True)
def drop(run: Run, *, dead_ids: tuple[str, ...]) -> int:
    """Remove dead letters for good."""
    with run.client() as client, client.broker.errors():
        letters = DeadLetters(client.app.backend.client)
        _check_known(dead_ids, {letter["id"]: None for letter in letters})
        for dead_id in dead_ids:
            letters.drop(dead_id)
    run.emit({"dropped": list(dead_ids)}, f"dropped {len(dead_ids)}")
    return 0


def _check_known(dead_ids: tuple[str, ...], known: dict[str, Any]) -> None:
    for dead_id in dead_ids:
        if dead_id not in known:
            raise _unknown(dead_id)


def _unknown(dead_id: str) -> ConfigError:
    return ConfigError(f"no dead letter {dead_id!r}; `nograd dead list` shows them")


dead.add_command(_list, "list")
for each in (show, replay, drop):
    dead.add_command(each)
