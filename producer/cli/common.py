"""What all commands share: ``--json``, ``--redis``, ``--models``, and how a result is printed."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console

from nograd.producer.client import Client
from nograd.tasks import Settings
from nograd.tasks.errors import ConfigError, JobCancelled, NogradError
from nograd.tasks.settings import check_redis_url

if TYPE_CHECKING:
    from nograd.tasks.timings import Timings

#: columns of a table that no terminal shows
PIPE_COLUMNS = 10_000

OK, FAILED, USAGE, CANCELLED = 0, 1, 2, 4


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a command: where it works and how it speaks.

    Attributes:
        json: whether stdout is for programs.
        redis_url: ``--redis``; None for that of the environment.
        models: ``--models``; None for that of the environment.
    """

    json: bool
    redis_url: str | None
    models: Path | None

    def client(self) -> Client:
        """A client of the Redis and model file asked for."""
        return Client(self.redis_url, models=self.models)

    def model_file(self) -> Path:
        """The model file of a command that needs one.

        Raises:
            ConfigError: if none is given.
        """
        path = self.models or Settings.from_env().models
        if path is None:
            raise ConfigError("no model file: give --models FILE or set NOGRAD_MODELS")
        return path

    def emit(self, document: Any, text: Any) -> None:
        """Print a document for programs or a text (or anything rich prints) for people."""
        if self.json:
            click.echo(msgspec.json.encode(document).decode())
        elif isinstance(text, str):
            click.echo(text)
        else:
            # What reads a pipe wants whole names, however long a line gets.
            Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(text)

    def complain(self, text: str) -> None:
        """One line on stderr."""
        click.echo(f"nograd: {text}", err=True)

    def export(self) -> None:
        """Let child processes see ``--redis`` as ``NOGRAD_REDIS_URL``."""
        if self.redis_url is not None:
            os.environ["NOGRAD_REDIS_URL"] = check_redis_url(self.redis_url, "--redis")


def command(function: Callable[..., int]) -> click.Command:
    """A command whose function gets a `Run` first, and returns the exit code; its docstring is the help."""

    @click.command(name=function.__name__, help=function.__doc__)
    @click.option("--models", type=click.Path(path_type=Path), help="Model file; default: NOGRAD_MODELS.")
    @click.option("--redis", "redis_url", metavar="URL", help="Redis; default: NOGRAD_REDIS_URL.")
    @click.option("--json", "as_json", is_flag=True, help="JSON on stdout, errors included.")
    @functools.wraps(function)
    def run(*args: Any, as_json: bool, redis_url: str | None, models: Path | None, **kwargs: Any) -> int:
        return function(Run(as_json, redis_url, models), *args, **kwargs)

    return run


def show(prediction: Any) -> str:
    """A prediction on one line for people."""
    if isinstance(prediction, dict) and {"label", "score"} <= set(prediction):
        return f"{prediction['label']} ({prediction['score']:.3f})"
    if isinstance(prediction, dict) and set(prediction) == {"text"}:
        prediction = prediction["text"]
    if isinstance(prediction, str):
        return prediction
    return msgspec.json.encode(prediction).decode()


def describe_timings(timings: Timings) -> str:
    """Timings on one line for people."""
    stages = {
        "queue": timings.queue_s,
        "prepare": timings.prepare_s,
        "batch wait": timings.batch_wait_s,
        "device": timings.device_s,
        "settle": timings.settle_s,
    }
    parts = [f"{name} {'unknown' if spent is None else _show_seconds(spent)}" for name, spent in stages.items()]
    if timings.batches:
        several = f" in {timings.batches} batches" if timings.batches > 1 else ""
        parts[3] += f" (batch of {timings.batch_size}{several})"
    parts += [f"{name} {count}" for name, count in (("retries", timings.retries), ("deaths", timings.deaths)) if count]
    where = f"version {timings.model_version or 'unknown'} on {timings.worker or 'unknown'}"
    return " · ".join([*parts, where])


def _show_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def parse_object(text: str | None, option: str) -> dict[str, Any] | None:
    """The JSON object an option was given."""
    if text is None:
        return None
    try:
        parsed = json.loads(text)
    except ValueError as err:
        raise click.BadParameter(f"not JSON: {err}", param_hint=option) from err
    if not isinstance(parsed, dict):
        raise click.BadParameter("not a JSON object", param_hint=option)
    return parsed


def exit_code(errors: list[NogradError]) -> int:
    """The exit code of a command whose jobs ended with these errors."""
    if not errors:
        return OK
    return CANCELLED if all(isinstance(error, JobCancelled) for error in errors) else FAILED
