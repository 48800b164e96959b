"""``nograd backfill plan | run | resume | status | watch | pause | cancel | errors | retry | verify``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.table import Table

from nograd.tasks.errors import PlanChanged

from .common import FAILED, Run, command, parse_object
from .progress import Display, describe, duration, percent, size, span

if TYPE_CHECKING:
    from nograd.producer.backfill.backfill import Backfill
    from nograd.producer.backfill.planning import Estimate
    from nograd.producer.backfill.status import Status

OK, UNVERIFIED, INTERRUPTED = 0, 5, 130
#: seconds between two looks
INTERVAL_S = 2.0

_FORMATS = click.Choice(["parquet", "csv", "jsonl", "openai", "images"])
_TIMEOUT = click.option(
    "--timeout",
    metavar="S",
    type=click.FloatRange(min=0),
    default=120.0,
    show_default=True,
    help="Seconds a worker has to answer.",
)
_BUDGET = click.option("--error-budget", metavar="N|P%", help="Failed rows, or their share, that may be; more stop it.")
_DETACH = click.option("--detach", is_flag=True, help="Return once it runs.")


def _what_to_score(function: Callable[..., int]) -> Callable[..., int]:
    """Options of the commands that plan."""
    for option in reversed(
        [
            click.option("--id", "id", metavar="COLUMN", help="Names a row; default: path, custom_id or its position."),
            click.option("--columns", metavar="A,B", help="What the model is given; default: all but the id."),
            click.option("--join", metavar="A,B", help="Columns to copy into the output."),
            click.option("--format", "kind", type=_FORMATS, help="Of the source; default: by its files' names."),
            click.option("--delimiter", metavar="X", help="Of CSV."),
            click.option("--no-header", is_flag=True, help="CSV without names: the columns are f0, f1, …"),
            click.option("--content", is_flag=True, help="Know input files by their content, not by size and date."),
            click.option("--allow-null", is_flag=True, help="Give rows with empty values to the model."),
            click.option("--params", metavar="JSON", help="Parameters of the prediction, an object."),
            click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N rows."),
            click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Only N of them, at random."),
            click.option("--seed", type=int, default=0, show_default=True, help="Of the sample."),
            click.option("--output-format", "output", type=click.Choice(["parquet", "jsonl", "openai"])),
            click.option("--duplicates", type=click.Choice(["error", "keep"]), default="error", show_default=True),
            click.option("--chunk-rows", "rows_per_chunk", type=click.IntRange(min=1), metavar="N"),
        ]
    ):
        function = option(function)
    return function


@click.group()
def backfill() -> None:
    """Score millions of rows, exactly once in storage.

    OUT names a backfill in all commands: its output folder. Its id does, too, while Redis remembers it.

    Exit codes: 0 ok, 1 finished with failed rows, 2 usage or configuration, 3 error budget exceeded, 4 cancelled,
    5 verification failed, 130 Ctrl-C (the run goes on).
    """


@command
@click.argument("model")
@click.argument("source")
@click.argument("out", required=False)
@_what_to_score
@_TIMEOUT
@click.option("--dry-run", is_flag=True, help="Write nothing; the same as leaving OUT away.")
def plan(run: Run, *, model: str, source: str, out: str | None, timeout: float, dry_run: bool, **options: Any) -> int:
    """Have a sample scored and say what the backfill will take; write the plan into OUT."""
    from nograd.producer.backfill.planning import prepare

    with run.client() as client:
        if out is None:
            request = client.backfill_request(model, source, **_options(options))
            with _interruptible(run, lambda: "stopped; nothing was written"):
                estimate = prepare(client, request, None, timeout).estimate
        else:
            job = client.backfill(model, source, out, **_options(options))
            with _beginning(run, job):
                estimate = job.plan(save=not dry_run, timeout_s=timeout)
    saved = out is not None and not dry_run
    run.emit({**msgspec.to_builtins(estimate), "saved": saved}, _estimate(estimate))
    return OK


@command
@click.argument("model")
@click.argument("source")
@click.argument("out")
@_what_to_score
@_BUDGET
@_TIMEOUT
@_DETACH
def run_(
    run: Run,
    *,
    model: str,
    source: str,
    out: str,
    error_budget: str | None,
    timeout: float,
    detach: bool,
    **options: Any,
) -> int:
    """Score every row of SOURCE with MODEL into OUT, and stay to the end; an OUT that was begun so is resumed.

    Ctrl-C leaves it running: `nograd backfill watch OUT` shows it, `cancel OUT` ends it.
    """
    with run.client() as client:
        job = client.backfill(model, source, out, error_budget=error_budget, **_options(options))
        with _beginning(run, job):
            job.start(timeout)
        return _stay(run, job, detach=detach)


@command
@click.argument("out")
@_BUDGET
@_TIMEOUT
@_DETACH
def resume(run: Run, *, out: str, error_budget: str | None, timeout: float, detach: bool) -> int:
    """Go on with a backfill, or its retry, that was paused, stopped, cancelled or forgotten; stay to the end.

    Refused if the inputs, the model, its weights or the parameters have changed; it says which.
    """
    with run.client() as client:
        job = client.backfill_at(out, error_budget=error_budget)
        stands = f"stopped; `nograd backfill status {job.out}` says whether it goes on already"
        with _interruptible(run, lambda: stands):
            job.resume(timeout)
        return _stay(run, job, detach=detach)


@command
@click.argument("out")
@click.option("--only", metavar="TYPE[,TYPE]", help="Types of errors, as `errors` shows them; default: all.")
@click.option("--give-up", is_flag=True, help="End an unfinished retry; the rows it has not run stay failed.")
@_TIMEOUT
@_DETACH
def retry(run: Run, *, out: str, only: str | None, give_up: bool, timeout: float, detach: bool) -> int:
    """Run the failed rows of a finished backfill again, and stay to the end.

    Rows that succeed now join OUT/parts; nothing else changes. The model may be a mended one, the inputs are the same.
    A retry that was interrupted is gone on with, unless the model is another one by now: --give-up ends it, and `retry`
    then begins one with that model. Exit code 0 if every row has a prediction in the end.
    """
    from nograd.tasks.backfill.fingerprint import model_changes

    if give_up and (only or detach):
        raise click.UsageError("--give-up ends a retry; it takes neither --only nor --detach")
    with run.client() as client:
        job = client.backfill_at(out)
        if give_up:
            rows = job.give_up_retry()
            now = job.status()
            text = f"{rows:,} rows were not run again; {now.progress.rows_err:,} have no prediction"
            run.emit(now.as_json(), text)
            return OK
        with _interruptible(run, lambda: _retry_stopped(job)):
            plan = job.retry(_names(only or ""), timeout_s=timeout)
        if plan is None:
            now = job.status()
            run.emit(now.as_json(), f"nothing to retry: all {now.progress.rows:,} rows have predictions")
            return OK
        run.complain(f"{plan.rows:,} failed rows are run again")
        for change in model_changes(job.job.plan.model, plan.model):
            run.complain(f"not as in the backfill: {change}")
        return _stay(run, job, detach=detach)


@command
@click.argument("out")
def status(run: Run, *, out: str) -> int:
    """Show how far a backfill is, from what is committed."""
    with run.client() as client:
        now = client.backfill_at(out).status()
    run.emit(now.as_json(), _status(now))
    return OK


@command
@click.argument("out")
def watch(run: Run, *, out: str) -> int:
    """Show a backfill until it ends, as `run` does; with --json a line every two seconds. Changes nothing."""
    with run.client() as client:
        job = client.backfill_at(out)
        if run.json:
            for now in job.watch(INTERVAL_S):
                run.emit(now.as_json(), "")
            return OK
        with Display() as display:
            for now in job.watch(INTERVAL_S):
                display(now)
    return OK


@command
@click.argument("out")
def pause(run: Run, *, out: str) -> int:
    """Have the workers let go of a backfill; what is committed stays, chunks under way are run again later."""
    return _tell(run, out, lambda job: job.pause(), "is paused; `nograd backfill resume` goes on", "pause")


@command
@click.argument("out")
def cancel(run: Run, *, out: str) -> int:
    """End a backfill; what is committed stays."""
    return _tell(run, out, lambda job: job.cancel(), "is cancelled; what is committed stays", "cancel")


@command
@click.argument("out")
def errors(run: Run, *, out: str) -> int:
    """Show the rows that have failed and no retry has mended, by what went wrong."""
    with run.client() as client:
        clusters = client.backfill_at(out).errors()
    table = Table("rows", "stage", "type", "message", "for example")
    for each in clusters:
        example = each.samples[0]
        table.add_row(f"{each.rows:,}", each.stage, each.type, each.message, f"{example.label}: {example.message}")
    document = {"rows": sum(each.rows for each in clusters), "clusters": msgspec.to_builtins(clusters)}
    run.emit(document, table if clusters else "no failed rows")
    return OK


@command
@click.argument("out")
@click.option("--ids/--no-ids", default=True, show_default=True, help="Compare with the ids of the inputs.")
def verify(run: Run, *, out: str, ids: bool) -> int:
    """Recompute every hash, count every row, compare the ids with the inputs; exit code 5 if anything is wrong.

    Exit code 1 if all is right so far, but chunks are missing.
    """
    with run.client() as client:
        try:
            report = client.backfill_at(out).verify(ids=ids)
        except PlanChanged as err:
            raise PlanChanged(f"{err.message}; --no-ids checks the output without the inputs") from err
    whole = report.chunks == report.planned
    document = {**msgspec.to_builtins(report), "ok": whole and not report.problems}
    counted = (
        f"{report.chunks} of {report.planned} chunks, {report.rows_ok:,} predictions, {report.rows_err:,} failed rows"
    )
    run.emit(document, "\n".join([counted, *report.problems]))
    if report.problems:
        run.complain(f"{len(report.problems) + report.unnamed} problems")
        return UNVERIFIED
    return OK if whole else FAILED


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """Options as `Client.backfill` takes them."""
    columns, join = given.pop("columns"), given.pop("join")
    delimiter, no_header = given.pop("delimiter"), given.pop("no_header")
    of_format: dict[str, str | bool] = {**({"delimiter": delimiter} if delimiter else {})}
    if no_header:
        of_format["header"] = False
    return {
        **given,
        "params": parse_object(given["params"], "--params"),
        "columns": _names(columns) if columns else None,
        "join": _names(join or ""),
        "options": of_format,
    }


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@contextlib.contextmanager
def _beginning(run: Run, job: Backfill) -> Iterator[None]:
    """Say at once what takes so long; and after a Ctrl-C, whether there is a backfill now."""
    if not job.planned:
        run.complain("planning: reading the inputs, scoring a sample …")

    def stands() -> str:
        if job.planned:
            return f"stopped, but the backfill is planned: `nograd backfill resume {job.out}` goes on with it"
        return "stopped before the backfill had begun; no row was written"

    with _interruptible(run, stands):
        yield


@contextlib.contextmanager
def _interruptible(run: Run, stands: Callable[[], str]) -> Iterator[None]:
    """After a Ctrl-C say what stands and how to go on, and end."""
    try:
        yield
    except KeyboardInterrupt:
        run.complain(stands())
        raise click.exceptions.Exit(INTERRUPTED) from None


def _retry_stopped(job: Backfill) -> str:
    now = job.status()
    if now.retries and now.state != "done":
        return f"stopped, but the retry is planned: `nograd backfill retry {job.out}` goes on with it"
    return "stopped before the retry had begun; nothing has changed"


def _tell(run: Run, out: str, tell: Callable[[Backfill], None], said: str, verb: str) -> int:
    with run.client() as client:
        job = client.backfill_at(out)
        tell(job)
        now = job.status()
    run.emit(now.as_json(), f"{now.out} {f'is finished already; nothing to {verb}' if now.state == 'done' else said}")
    return OK


def _stay(run: Run, job: Backfill, *, detach: bool) -> int:
    """Follow to the end; the exit code."""
    if detach:
        now = job.status()
        run.emit(now.as_json(), f"{now.id} runs; `nograd backfill watch {now.out}` shows it")
        return OK
    began = time.monotonic()
    try:
        with Display() as display:
            now = job.follow(display, interval_s=INTERVAL_S)
    except KeyboardInterrupt:
        run.complain(
            f"the workers go on: `nograd backfill watch {job.out}` shows it, `resume` stays with it, `cancel` ends it"
        )
        return INTERRUPTED
    failed = now.progress.rows_err
    text = f"{now.progress.rows_ok:,} predictions in {now.out}/parts, {failed:,} failed rows; "
    text += f"watched for {duration(time.monotonic() - began)}"
    if failed:
        mend = (
            "`retry` runs them again" if job.worth_retrying() else "mended inputs need a new run, into another folder"
        )
        text += f"\n`nograd backfill errors {now.out}` shows why, {mend}"
    run.emit(now.as_json(), text)
    return FAILED if failed else OK


def _estimate(estimate: Estimate) -> str:
    """An estimate for people."""
    chunks = f"{estimate.chunks:,} chunks of {estimate.rows_per_chunk:,}" if estimate.chunks > 1 else "1 chunk"
    up = f"{estimate.workers} worker{'s' * (estimate.workers != 1)} of {estimate.model} up"
    lines = [
        f"{estimate.rows:,} rows, {estimate.files:,} file{'s' * (estimate.files != 1)}; {chunks}",
        f"{estimate.rows_per_s:,.0f} rows/s by one worker, measured with {estimate.sampled:,} rows; {up}",
        f"time: {span(estimate.low_s, estimate.high_s)}; output: about {size(estimate.out_bytes)}",
    ]
    if estimate.failed:
        lines += [f"{estimate.failed:,} rows of the sample failed, for example:", *estimate.errors]
    return "\n".join(lines)


def _status(now: Status) -> str:
    """A status for people, on a few lines."""
    budget = "" if now.may_fail is None else f"; {now.may_fail:,} may fail"
    return f"{now.id}: {now.model} into {now.out}{budget}\n{percent(now)} · {describe(now)}" + (
        f"\n{now.trouble}" if now.trouble else ""
    )


run_.name = "run"
for each in (plan, run_, resume, status, watch, pause, cancel, errors, retry, verify):
    backfill.add_command(each)
