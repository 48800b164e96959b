"""From what somebody asks for to a plan: look at the inputs, have a worker score a sample, choose the chunks.

Laws: the sample is scored by a real worker, from the beginning and the middle of the real inputs; an estimate of time
is a range; what cannot be scored at all is refused before anything is written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

import msgspec

from nograd.tasks.backfill import draft as drafts
from nograd.tasks.backfill import sources
from nograd.tasks.backfill.plan import Draft, Extent, OutputFormat, Plan, Selection, SourceKind, check_apart
from nograd.tasks.backfill.sources import Survey
from nograd.tasks.backfill.task import Calibration, Sample, send_sample
from nograd.tasks.errors import BackfillError, BrokerUnavailable, ResultTimeout, SourceError
from nograd.tasks.keys import queue_name

if TYPE_CHECKING:
    from nograd.producer.client import Client

Source: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

#: seconds a chunk should take, at the pace of the sample: long against what it costs to send and commit one, short
#: against what is lost with a worker. The last tenth of the rows is cut into quarters of it
CHUNK_S: Final = 20.0
#: bytes of a part at most: a worker holds those of the chunks it runs
PART_BYTES: Final = 64 << 20
#: chunks a small input is cut into, so that several workers share it …
FEW_CHUNKS: Final = 8
#: … unless they would take less than so many seconds
SHORTEST_S: Final = 1.0
#: seconds to spend on the sample
SAMPLE_S: Final = 6.0
#: rows of one of its two places at most, and files and runs of rows, which travel in the message
SAMPLE_ROWS: Final = 100_000
SAMPLE_FILES: Final = 256
#: by what the time a backfill takes may differ from what the sample says
FASTER, SLOWER = 0.8, 1.5
#: seconds to wait for a worker's answer
TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What somebody wants scored; all that a plan is made of but the measurement.

    Attributes:
        model: a known model.
        source: a file, folder, glob or URL, ``@file`` for a list of those, or several of them.
        id: the column that names a row; the source's own if None.
        columns: what the model is given; all but the id if None.
        join: columns copied into the output.
        kind: the format; found by the files' names if None.
        options: of the format.
        content: whether the files' contents are hashed, so that a copy with a new date passes for the same.
        allow_null: whether rows with empty values reach the model.
        params: override the model's default parameters.
        selection: which rows.
        output: format of the parts; Parquet if None, or OpenAI's lines for those.
        duplicates: refuse ids that occur twice, or keep them, counted.
        rows_per_chunk: chosen from the measurement if None.
    """

    model: str
    source: Source
    id: str | None = None
    columns: Sequence[str] | None = None
    join: Sequence[str] = ()
    kind: SourceKind | None = None
    options: Mapping[str, str | bool] = field(default_factory=dict)
    content: bool = False
    allow_null: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)
    selection: Selection = field(default_factory=Selection)
    output: OutputFormat | None = None
    duplicates: Literal["error", "keep"] = "error"
    rows_per_chunk: int | None = None

    def survey(self) -> Survey:
        """Look at the inputs.

        Raises:
            SourceError: naming the file and what is wrong with it; also if there are no rows.
        """
        found = sources.survey(
            self.source,
            kind=self.kind,
            id=self.id,
            columns=self.columns,
            join=self.join,
            options=self.options,
            content=self.content,
            allow_null=self.allow_null,
        )
        if not found.rows:
            raise SourceError(f"{', '.join(found.spec.urls)}: there are no rows to score")
        return found


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a backfill will take, from a sample that was really scored.

    Attributes:
        model: its name.
        files: input files.
        rows: selected ones.
        chunks: pieces of work.
        rows_per_chunk: of a full one.
        rows_per_s: of one worker.
        workers: how many serve the model now.
        low_s: seconds it will take them if all goes well; not counting what else they have to do.
        high_s: if it does not.
        out_bytes: about, of all parts.
        sampled: rows of the sample that were timed.
        failed: rows of the sample without a prediction.
        errors: some of their errors.
    """

    model: str
    files: int
    rows: int
    chunks: int
    rows_per_chunk: int
    rows_per_s: float
    workers: int
    low_s: float
    high_s: float
    out_bytes: int
    sampled: int
    failed: int
    errors: list[str]


class Prepared(NamedTuple):
    """A plan that is not written yet, and what it will take."""

    draft: Draft
    estimate: Estimate


def prepare(client: Client, request: Request, out: str | None, timeout_s: float = TIMEOUT_S) -> Prepared:
    """Survey, measure, cut.

    Args:
        client: knows the model and sends the sample.
        request: what is wanted.
        out: URL of the output folder, if it is known; must not lie within the inputs.
        timeout_s: to wait for a worker's answer.

    Raises:
        UnknownModel: if no such model is known.
        SourceError: if the inputs cannot be read.
        BackfillError: if no worker answers, no row of the sample could be scored, or the output lies in the inputs.
        BrokerUnavailable: if Redis does not answer.
    """
    client.card(request.model)  # known, before everything is read
    survey = request.survey()
    if out is not None:
        check_apart(out, survey.spec.urls)
    measured = measure(client, sample_of(request, survey), timeout_s)
    if measured.prediction is None:
        raise BackfillError(
            f"model {request.model}: none of the {measured.failed} sampled rows got a prediction: "
            + "; ".join(measured.errors)
        )
    rows = selected_rows(survey, request.selection)
    made = drafts.draft(
        survey,
        rows_per_chunk=request.rows_per_chunk or chunk_rows(rows, measured),
        batch_rows=measured.batch_rows,
        model=measured.model,
        prediction=measured.prediction.to_arrow().field(0).type,
        output=request.output,
        parameters=request.params,
        selection=request.selection,
        duplicates=request.duplicates,
    )
    return Prepared(made, estimate(made.plan, measured, serving(client, request.model)))


def measure(client: Client, sample: Sample, timeout_s: float) -> Calibration:
    """Have a worker of the model score a sample.

    Raises:
        UnknownModel: if no such model is known.
        BackfillError: if no worker answers in time; it says which queue the sample waits in, and who is up.
        BrokerUnavailable: if Redis does not answer.
    """
    client.card(sample.model)
    with client.broker.errors():
        sent = send_sample(client.app, sample)
    job = client.job(sent.id, sample.model)
    try:
        answer = job.wait(timeout_s).unwrap()
    except ResultTimeout:
        raise BackfillError(_silence(client, sample.model, timeout_s)) from None
    finally:
        with contextlib.suppress(BrokerUnavailable):
            if not job.done():
                client.broker.revoke([sent.id])  # whoever comes upon it later need not score it
            job.forget()
    return msgspec.convert(answer, Calibration)


def identity_sample(plan: Plan, files: Sequence[Any], extents: Sequence[Extent]) -> Sample:
    """A sample of one row, to hear from a worker which model it has."""
    first = msgspec.structs.replace(extents[0], count=1)
    parameters = dict(plan.parameters)
    return Sample(plan.model.name, plan.source, {first.file: files[0]}, [first], parameters, seconds=1.0)


def sample_of(request: Request, survey: Survey) -> Sample:
    """Rows from the beginning and from the middle of the inputs."""
    rows = survey.rows if request.selection.limit is None else max(1, min(request.selection.limit, survey.rows))
    images = survey.spec.kind == "images"
    most = SAMPLE_FILES if images else SAMPLE_ROWS
    middle = rows // 2
    places = [(0, min(middle, most)), (middle, min(rows - middle, most))]
    extents = [
        extent
        for start, count in places
        if count
        for extent in drafts.head(survey, count, start)[: 1 if images else SAMPLE_FILES]
    ]
    named = {file for extent in extents for file in range(extent.file, extent.file + (extent.count if images else 1))}
    return Sample(
        model=request.model,
        source=survey.spec,
        files={file: survey.files[file] for file in sorted(named)},
        extents=extents,
        parameters=dict(request.params),
        seconds=SAMPLE_S,
    )


def chunk_rows(rows: int, measured: Calibration) -> int:
    """Rows of a chunk, from the pace and the size a sample has shown: whole batches, at least one."""
    pace = measured.rows_per_s
    wanted = pace * CHUNK_S
    if rows < wanted * FEW_CHUNKS:
        wanted = max(rows / FEW_CHUNKS, pace * SHORTEST_S)
    if measured.rows and measured.out_bytes:
        wanted = min(wanted, PART_BYTES * measured.rows / measured.out_bytes)
    return max(1, int(wanted // measured.batch_rows)) * measured.batch_rows


def estimate(plan: Plan, measured: Calibration, workers: int) -> Estimate:
    """What a plan will take."""
    seconds = plan.rows / measured.rows_per_s / max(1, min(workers, plan.chunks))
    return Estimate(
        model=plan.model.name,
        files=plan.inputs.files,
        rows=plan.rows,
        chunks=plan.chunks,
        rows_per_chunk=plan.rows_per_chunk,
        rows_per_s=measured.rows_per_s,
        workers=workers,
        low_s=seconds * FASTER,
        high_s=seconds * SLOWER,
        out_bytes=round(measured.out_bytes * plan.rows / max(1, measured.rows)),
        sampled=measured.rows,
        failed=measured.failed,
        errors=measured.errors,
    )


def selected_rows(survey: Survey, selection: Selection) -> int:
    """How many rows are selected."""
    rows = survey.rows if selection.limit is None else min(selection.limit, survey.rows)
    return rows if selection.sample is None else min(selection.sample, rows)


def serving(client: Client, model: str) -> int:
    """How many workers that answer serve a model."""
    return sum(model in pool.get("models", ()) for pool in client.broker.workers().values())


def _silence(client: Client, model: str, timeout_s: float) -> str:
    queue = queue_name(model)
    with contextlib.suppress(BrokerUnavailable):
        workers = serving(client, model)
        waiting = client.broker.waiting([model])[model]
        if not workers:
            return (
                f"no worker serves {model}: nobody answered from queue {queue} in {timeout_s:g} s "
                f"({waiting} messages wait there); start one with `nograd worker --models FILE`"
            )
        return (
            f"no answer from queue {queue} in {timeout_s:g} s: {workers} worker{'s' * (workers != 1)} of {model} "
            f"have other work ({waiting} messages wait); wait longer with --timeout"
        )
    return f"no answer from queue {queue} in {timeout_s:g} s"
