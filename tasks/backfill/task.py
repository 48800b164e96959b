"""The tasks of a backfill on the wire: ``nograd.run_chunk`` and ``nograd.calibrate``.

=================== ===========================================================================================
``nograd.run_chunk``  ``out``: URL of the output folder · ``plan``: sha256 of its plan · ``chunk``: number
result                none is stored: the commit record in the output folder is
``nograd.calibrate``  see `Sample`; the result is a `Calibration`
=================== ===========================================================================================

They travel in the queue of their model, below every prediction. What runs them is the batch pool
(`nograd.workers.backfill.runner`); their bodies here only hand over.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final

import msgspec
from celery import shared_task

from nograd.tasks.errors import ConfigError
from nograd.tasks.keys import BULK, CHUNKS, queue_name
from nograd.tasks.structs import decodable

from .plan import Extent, InputFile, Job, ModelIdentity, SourceSpec, TableSchema
from .window import BLIND_S, SENDING_S, message_id

RUN_CHUNK: Final = "nograd.run_chunk"
CALIBRATE: Final = "nograd.calibrate"


@decodable
class ChunkCall(msgspec.Struct, frozen=True):
    """The arguments of ``nograd.run_chunk``, see above."""

    out: str
    plan: str
    chunk: int


@decodable
class Sample(msgspec.Struct, frozen=True):
    """Some rows to score for a measurement; the argument of ``nograd.calibrate``.

    Attributes:
        model: name of the model.
        source: how to read the rows.
        files: the input files they are in, by their position in the inputs.
        extents: the runs of rows; each is scored until it ends or its share of the time is over.
        parameters: of the run.
        seconds: to spend on all of them.
    """

    model: str
    source: SourceSpec
    files: dict[int, InputFile]
    extents: list[Extent]
    parameters: dict[str, Any] = {}
    seconds: float = 10.0


@decodable
class Calibration(msgspec.Struct, frozen=True):
    """What scoring a sample has shown.

    Attributes:
        rows: scored.
        failed: of them.
        seconds: it took, without the first batch.
        out_bytes: of a part with these rows.
        batch_rows: rows of one forward.
        prediction: a schema with one field: the type of the predictions; None if no row got one.
        errors: some of the errors.
        model: which model it was, exactly.
    """

    rows: int
    failed: int
    seconds: float
    out_bytes: int
    batch_rows: int
    prediction: TableSchema | None
    errors: list[str]
    model: ModelIdentity

    @property
    def rows_per_s(self) -> float:
        """Of one worker."""
        return self.rows / max(self.seconds, 1e-6)


class Runner(msgspec.Struct, frozen=True):
    """What the worker does with the calls; the task is Celery's, bound."""

    run_chunk: Callable[[Any, ChunkCall], Any]
    calibrate: Callable[[Any, Sample], Any]


#: set by the batch pool around Celery's tracer
runner: ContextVar[Runner | None] = ContextVar("runner", default=None)


@shared_task(name=RUN_CHUNK, bind=True, acks_late=True, ignore_result=True, max_retries=None, typing=False)  # type: ignore[untyped-decorator]
def run_chunk(self: Any, **kwargs: Any) -> Any:
    """Score one chunk and commit it."""
    return _runner(RUN_CHUNK).run_chunk(self, msgspec.convert(kwargs, ChunkCall))


@shared_task(name=CALIBRATE, bind=True, acks_late=True, max_retries=0, typing=False)  # type: ignore[untyped-decorator]
def calibrate(self: Any, **kwargs: Any) -> Any:
    """Score a sample and say how it went."""
    return _runner(CALIBRATE).calibrate(self, msgspec.convert(kwargs, Sample, str_keys=True))


def send_chunk(app: Any, job: Job, chunk: int) -> None:
    """Send a chunk to the workers of its model.

    Raises:
        kombu.exceptions.OperationalError: if Redis does not take it.
    """
    plan = job.plan
    call = ChunkCall(job.store.url, plan.sha256, chunk)
    app.send_task(
        RUN_CHUNK,
        kwargs=msgspec.to_builtins(call),
        task_id=message_id(hints_of(job), chunk) + uuid.uuid4().hex[:8],
        queue=queue_name(plan.model.name),
        priority=CHUNKS,
        ignore_result=True,
        argsrepr=f"backfill={plan.job} chunk={chunk + 1}/{plan.chunks}",
        kwargsrepr=f"{{out: {job.store.url}}}",
    )


def sending_s(app: Any, least: float = SENDING_S) -> float:
    """Seconds until a chunk whose message `Window.find_lost` does not see has none; ``least`` where it would see it.

    It looks in the Redis database of the result backend, under kombu's own names. An app with another broker, also one
    with another database of the same server, or with other names, has its messages elsewhere, and none would ever be
    seen.
    """
    conf = app.conf
    renamed = {"global_keyprefix", "unacked_key", "priority_steps", "sep"} & set(conf.broker_transport_options)
    together = conf.broker_write_url == _without_class(app.backend_cls or conf.result_backend)
    return least if together and not renamed else max(least, BLIND_S)


def _without_class(backend: Any) -> Any:
    """The URL of a result backend that may name its class: ``package.module:Class+redis://…``."""
    before, plus, url = str(backend).partition("+")
    return url if plus and ":" in before else backend


def send_sample(app: Any, sample: Sample) -> Any:
    """Send a sample to the workers of its model; Celery's handle of the result.

    Raises:
        kombu.exceptions.OperationalError: if Redis does not take it.
    """
    return app.send_task(
        CALIBRATE,
        kwargs=msgspec.to_builtins(sample, str_keys=True),
        queue=queue_name(sample.model),
        priority=BULK,  # above the chunks of other backfills: somebody waits for it
        expires=3600,
        argsrepr=f"calibrate {sample.model}",
        kwargsrepr="{}",
    )


def hints_of(job: Job) -> str:
    """The name of a backfill's hints in Redis: one plan may be run into several folders."""
    return hints_at(job.plan.sha256, job.store.url)


def hints_at(plan: str, out: str) -> str:
    """The name of the hints of the plan with this sha256 in this folder."""
    return f"{plan[:12]}-{hashlib.sha256(out.encode()).hexdigest()[:8]}"


def _runner(name: str) -> Runner:
    found = runner.get()
    if found is None:
        raise ConfigError(
            f"{name} runs in nograd's batch pool only: start the worker with worker_pool='nograd.workers.pool:TaskPool'"
        )
    return found
