"""``nograd submit | result | cancel``."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from celery import states

from nograd.producer.client import PRIORITIES
from nograd.producer.outcomes import Outcome, error_to_dict
from nograd.tasks.errors import InvalidInput, NogradError, ResultTimeout

from .common import Run, command, describe_timings, exit_code, parse_object, show

if TYPE_CHECKING:
    from nograd.producer.client import Priority
    from nograd.producer.job import Job
    from nograd.tasks.modelfile import InputKind


@command
@click.argument("model")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("--params", metavar="JSON", help="Parameters of the prediction, an object.")
@click.option("--expires", type=float, metavar="S", help="Seconds after which no worker starts the job.")
@click.option(
    "--priority", type=click.Choice(list(PRIORITIES)), default="interactive", help="bulk waits for the others."
)
@click.option("--wait", is_flag=True, help="Print the predictions, in order, instead of the ids.")
@click.option("--timeout", type=float, metavar="S", help="Seconds to wait for all of them; default: for ever.")
@click.option("--timings", is_flag=True, help="With --wait: also what each job spent its time on.")
def submit(
    run: Run,
    *,
    model: str,
    inputs: tuple[str, ...],
    params: str | None,
    expires: float | None,
    priority: Priority,
    wait: bool,
    timeout: float | None,
    timings: bool,
) -> int:
    """Send one job for each INPUT and print its id.

    What INPUT is depends on the model: the path of an image, a text, or JSON (a row, a tensor, anything); @FILE reads
    JSON from a file. - reads inputs from stdin, one on a line. Put -- before inputs that begin with a dash.
    """
    with run.client() as client:
        kind = client.card(model).input
        words = list(_words(inputs))
        try:
            values = [_parse(index, word, kind) for index, word in enumerate(words)]
            options: dict[str, Any] = {
                "params": parse_object(params, "--params"),
                "expires_s": expires,
                "priority": priority,
            }
            jobs = client.submit_many(model, values, **options)
        except InvalidInput as err:
            raise click.UsageError(err.message) from err  # nothing was sent
        if not wait:
            for job in jobs:
                run.emit({"id": job.id, "model": model}, job.id)
            return 0
        return _print_results(run, jobs, timeout, words if len(words) > 1 else (), timings=timings)


@command
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@click.option("--wait", is_flag=True, help="Wait for jobs that have no outcome yet.")
@click.option("--timeout", type=float, metavar="S", help="Seconds to wait for all of them; implies --wait.")
@click.option("--timings", is_flag=True, help="Also what each job spent its time on.")
def result(run: Run, *, ids: tuple[str, ...], wait: bool, timeout: float | None, timings: bool) -> int:
    """Print the prediction of each job, or why it has none.

    Without --wait a job that has no outcome yet is an error (exit code 1). JSON always holds the timings.
    """
    with run.client() as client:
        jobs = [client.job(job_id) for job_id in ids]
        names = ids if len(ids) > 1 else ()
        return _print_results(run, jobs, timeout if wait or timeout else 0, names, timings=timings)


@command
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
def cancel(run: Run, *, ids: tuple[str, ...]) -> int:
    """Ask the workers not to run these jobs; what is on a device already ends as it would."""
    with run.client() as client:
        client.broker.revoke(ids)
    for job_id in ids:
        run.emit({"id": job_id, "requested": True}, f"{job_id}: cancel requested of the workers that are up")
    return 0


def _print_results(run: Run, jobs: Iterable[Job], timeout: float | None, names: Iterable[str], *, timings: bool) -> int:
    """Print outcomes in order as they come; the exit code."""
    deadline = None if timeout is None else time.monotonic() + timeout
    errors: list[NogradError] = []
    for job, name in itertools.zip_longest(jobs, names):
        document = {"id": job.id, **({"model": job.model} if job.model else {}), **({"input": name} if name else {})}
        prefix = f"{name}: " if name else ""
        try:
            outcome = job.wait(None if deadline is None else max(0, deadline - time.monotonic()))
        except ResultTimeout as err:
            hint = "; --wait waits for it" if timeout == 0 else ""
            outcome = Outcome(states.PENDING, error=ResultTimeout(err.message + hint))
        spent = outcome.timings
        if spent is not None:
            document["timings"] = msgspec.to_builtins(spent)
        error = outcome.error
        if error is None:
            run.emit({**document, "prediction": outcome.value}, f"{prefix}{show(outcome.value)}")
        else:
            errors.append(error)
            run.complain(f"{prefix}{error.message}")
            if run.json:
                run.emit({**document, "error": error_to_dict(error)}, "")
        if timings and spent is not None and not run.json:
            run.emit({}, f"  {describe_timings(spent)}")
    return exit_code(errors)


def _words(inputs: tuple[str, ...]) -> Iterator[str]:
    for word in inputs:
        if word == "-":
            yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        else:
            yield word


def _parse(index: int, word: str, kind: InputKind) -> Any:
    if kind == "image":
        return Path(word)
    if kind == "text":
        return word
    try:
        return json.loads(Path(word[1:]).read_text(encoding="utf-8") if word.startswith("@") else word)
    except OSError as err:
        raise InvalidInput(f"input {index}: {word[1:]}: cannot read the file: {err.strerror or err}") from err
    except ValueError as err:
        raise InvalidInput(
            f"input {index}: the model takes {kind}; {word[:40]!r} is not JSON: {err}; "
            "e.g. '[32.1, 101.0]', quoted for the shell"
        ) from err
