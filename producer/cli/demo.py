"""``nograd demo``."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nograd.producer.client import Client
from nograd.producer.demo import Answer, Examples, ask, jobs_in_flower
from nograd.producer.embedded import free_port, port_is_free
from nograd.producer.fleet import FLOWER_PORT, Fleet
from nograd.producer.processes import stopping_on_sigterm

from .common import FAILED, OK, Run, command, show

#: seconds the six models may take to load
READY_TIMEOUT_S = 300.0
#: characters of an input or prediction in the table, at most
CELL = 60


@command
@click.option("--examples", type=click.Path(path_type=Path), help="The examples folder; default: that of the checkout.")
@click.option("--port", type=click.IntRange(1, 65535), help="Of Flower; default: 5555, or a free one if that is taken.")
@click.option("--keep", is_flag=True, help="Stay up afterwards, until Ctrl-C.")
def demo(run: Run, *, examples: Path | None, port: int | None, keep: bool) -> int:
    """Start a private Redis, a worker and Flower, send real inputs to six example models, and check every answer.

    Everything that was started is stopped at the end. Exit code 1 if an answer is not what plain PyTorch gives.
    """
    found = Examples(examples)
    console = Console(stderr=run.json)  # stdout is for JSON then
    port = port or (FLOWER_PORT if port_is_free(FLOWER_PORT) else free_port())
    with stopping_on_sigterm(), tempfile.TemporaryDirectory(prefix="nograd-demo-") as folder:
        fleet = Fleet(
            run.models or found.models,
            redis_url=run.redis_url,
            flower_port=port,
            logs=Path(folder),
            env={"HF_HUB_OFFLINE": "1"},  # all weights are in the folder; nothing may wait for a network
        )
        with fleet:
            with console.status("Starting Redis, a worker with six models, and Flower …"):
                started = time.perf_counter()
                fleet.wait_ready(READY_TIMEOUT_S)
            console.print(f"Redis, worker and Flower are up after {time.perf_counter() - started:.1f} s.")
            with Client(fleet.url, models=fleet.models) as client:
                code = _show_answers(run, console, client, found)
                code = _classify_digits(run, console, client, found, Path(folder)) or code
            code = _show_flower(console, fleet, port, keep=keep) or code
            if keep:
                _stay(console, fleet, found)
    console.print("Everything that was started is stopped.")
    return code


def _show_answers(run: Run, console: Console, client: Client, examples: Examples) -> int:
    table = _table()
    wrong = 0
    for model, inputs, expected in examples.questions():
        for answer in ask(client, model, inputs, expected):
            wrong += not answer.right
            table.add_row(*_row(answer))
            if run.json:
                run.emit(_document(answer), "")
        table.add_section()
    console.print(table)
    console.print(
        f"{wrong} answers are not what plain PyTorch gives" if wrong else "Every answer is what plain PyTorch gives."
    )
    return FAILED if wrong else OK


def _classify_digits(run: Run, console: Console, client: Client, examples: Examples, folder: Path) -> int:
    files, labels = examples.digits(folder)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    started = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("Handwritten digits", total=len(files))
        predictions: list[Any] = []
        for prediction in client.map("digits", files):
            predictions.append(prediction)
            progress.advance(bar)
    seconds = time.perf_counter() - started
    right = sum(prediction == label for prediction, label in zip(predictions, labels, strict=True))
    accuracy = right / len(labels)
    console.print(
        f"{len(labels):,} digit images in {seconds:.1f} s ({len(labels) / seconds:,.0f} a second): "
        f"{right:,} right, accuracy {accuracy:.1%}"
    )
    if run.json:
        run.emit({"digits": len(labels), "right": right, "accuracy": accuracy, "seconds": seconds}, "")
    return OK if accuracy > 0.9 else FAILED  # the model's own accuracy is far above


def _show_flower(console: Console, fleet: Fleet, port: int, *, keep: bool) -> int:
    jobs = jobs_in_flower(port)
    if not jobs:
        console.print("Flower has seen none of these jobs")
        return FAILED
    hint = "" if keep else " (while the demo runs; --keep leaves it up)"
    console.print(f"Flower has seen {jobs:,} messages succeed: {fleet.flower_url}{hint}")
    return OK


def _table() -> Table:
    table = Table(title="Real inputs, through Redis and back", expand=True)
    table.add_column("model", width=10)
    for heading in ("input", "prediction", "expected"):
        table.add_column(heading, ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("ms", width=5, justify="right")
    table.add_column("", width=1)
    return table


def _row(answer: Answer) -> list[str]:
    shown = show(_rounded(answer.prediction)) if answer.error is None else answer.error["message"]
    cells = [_cell(text) for text in (_name(answer.input), shown, show(_rounded(answer.expected)))]
    mark = "[green]✓[/]" if answer.right else "[red]✗[/]"
    return [answer.model, *cells, f"{answer.seconds * 1e3:.0f}", mark]


def _document(answer: Answer) -> dict[str, Any]:
    outcome = {"prediction": answer.prediction} if answer.error is None else {"error": answer.error}
    return {
        "model": answer.model,
        "input": _name(answer.input),
        **outcome,
        "expected": answer.expected,
        "right": answer.right,
        "ms": round(answer.seconds * 1e3, 1),
    }


def _name(value: Any) -> str:
    return value.name if isinstance(value, Path) else show(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return _rounded(value[0]) if len(value) == 1 else [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _cell(text: str) -> str:
    line = " ".join(text.split())
    return escape(line if len(line) <= CELL else line[: CELL - 1] + "…")


def _stay(console: Console, fleet: Fleet, examples: Examples) -> None:
    activate = Path(sys.executable).with_name("activate")
    lines = [
        "It stays up until Ctrl-C. In another terminal:",
        *([f"  . {shlex.quote(str(activate))}"] if shutil.which("nograd") is None and activate.exists() else []),
        f"  export NOGRAD_REDIS_URL='{fleet.url}'",
        f"  nograd submit photos {shlex.quote(str(examples.folder / 'inputs' / 'flower.jpg'))} --wait",
    ]
    console.print(escape("\n".join(lines)), soft_wrap=True)
    try:
        while fleet.dead() is None:
            time.sleep(0.5)
    except KeyboardInterrupt:
        console.print()
