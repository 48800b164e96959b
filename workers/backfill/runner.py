"""Running a chunk on a worker: from the claim to the commit, and on to the next.

Laws:

* Nothing is committed but a whole chunk, every row of the plan in it as a prediction or a failure.
* An attempt that is not the owner any more, was paused, or is on a worker that stops, leaves no trace; the chunk is
  missing, and is run again.
* Every row of a chunk was run by the very model that was compared with the plan, also if another one has come under its
  name meanwhile.
* What is wrong with the run and not with a row (a changed input, other weights, a full disk) pauses the backfill and
  says why. Nobody runs into it a thousand times over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import redis
from celery.exceptions import Reject, Retry
from kombu.exceptions import OperationalError

from nograd.tasks.backfill import commit, plan, state
from nograd.tasks.backfill.budget import OVER_BUDGET, allowed_failures
from nograd.tasks.backfill.fingerprint import model_changes, version_changes
from nograd.tasks.backfill.output import PartWriter
from nograd.tasks.backfill.plan import Job, ModelIdentity
from nograd.tasks.backfill.pump import pump
from nograd.tasks.backfill.rows import Slice
from nograd.tasks.backfill.sources import Reader, open_reader, reader_of
from nograd.tasks.backfill.store import open_store
from nograd.tasks.backfill.task import ChunkCall, Sample, hints_at, send_chunk, sending_s
from nograd.tasks.backfill.window import Window
from nograd.tasks.errors import BackfillError, OutputError, PlanChanged, SourceError, UnknownModel
from nograd.workers.engine import Engine
from nograd.workers.memory import trim
from nograd.workers.models import HostedModel
from nograd.workers.risk import Gate
from nograd.workers.trace import Returned

from .attempt import Attempt, GivenUp, hint
from .block import Block
from .measure import Measurement
from .scoring import Device, Scorer, lead_for, scorer_for

logger = logging.getLogger(__name__)

#: times a chunk is tried again, with a growing pause, when inputs or output do not answer, or nobody knows what it is
RETRIES = 3
#: seconds before a chunk is looked at again after Redis was away
AGAIN_S = 2.0
#: libraries whose versions stand in the plan, by the loader that uses them
_LIBRARIES = {"torchvision": "torchvision", "transformers": "transformers", "lightning": "lightning"}


class Hold(Protocol):
    """What scoring asks of whoever holds the rows; see `Attempt`."""

    def check(self) -> None:
        """Raise `GivenUp` if the rows are not wanted from here any more."""

    def note(self, first: int, count: int) -> None:
        """These rows are under way."""


@dataclass(frozen=True, slots=True)
class BoundTask:
    """One message of a backfill's tasks, as the worker runs it.

    Attributes:
        celery: the task, bound to its request.
        delivery: the message, for the transport.
    """

    celery: Any
    delivery: Any

    def again(self, seconds: float) -> Exception:
        """To be raised: the message comes back after so long; at once where Redis does not take a copy for later."""
        later: Exception
        try:
            later = self.celery.retry(countdown=seconds, throw=False)
        except Reject as err:  # Celery would let go of the message
            later = Returned(err.reason)
        return later


class ChunkRunner:
    """What a worker does with the tasks of backfills. Several threads may use it.

    Args:
        engine: the device thread and its models.
        client: Redis, for hints.
        worker: name of this worker, for the commit records.
        threads: CPU threads that prepare rows.
        claim_s: seconds a worker may be silent before its chunk is given to another.
    """

    def __init__(self, engine: Engine, client: Any, worker: str, *, threads: int, claim_s: float) -> None:
        self._engine = engine
        self._client = client
        self._worker = worker
        self._claim_s = claim_s
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="nograd-rows")
        self._mine = threading.local()
        #: a row that is run alone, to find out whether it kills, has no other chunk's rows beside it
        self._gate = Gate()
        #: set when the worker stops: chunks are given up at the next batch
        self.closing = threading.Event()

    # -- nograd.run_chunk --------------------------------------------------------------------------------------------

    def run_chunk(self, task: BoundTask, call: ChunkCall) -> dict[str, Any]:
        """Run a chunk, unless it is done, unwanted or somebody else's; then see to it that the backfill goes on.

        Raises:
            celery.exceptions.Reject: if the worker stops: another one gets the message.
            celery.exceptions.Retry: if it has to be looked at again later.
        """
        # Before anything that may fail: also a worker that cannot see the folder must be able to say so.
        window = Window(self._client, hints_at(call.plan, call.out), self._claim_s)
        try:
            return self._run_chunk(task, call, window)
        except (redis.RedisError, OperationalError) as err:
            # A chunk that was scored is committed; its message comes again to see to the rest. Without it nobody might.
            raise task.again(AGAIN_S) from err
        finally:
            trim()

    def _run_chunk(self, task: BoundTask, call: ChunkCall, window: Window) -> dict[str, Any]:
        try:
            job, _ = self._open(call)
            told = self._attempt(task, call, job, window)
        except GivenUp as err:
            logger.info("chunk %d of %s is given up: %s", call.chunk, call.out, err)
            if err.requeue:
                with hint():
                    window.expect(call.chunk)
                raise Returned(str(err)) from err
            return {"chunk": call.chunk, "given_up": str(err)}
        except (Reject, Retry, redis.RedisError):
            raise
        except UnknownModel as err:  # it was unloaded here; the message is another worker's
            with hint():
                window.expect(call.chunk)
            raise Returned(err.message) from err
        except Exception as err:  # noqa: BLE001 - whatever it is, the backfill neither loops over it nor ends in silence
            return self._trouble(task, call, window, err)
        app = task.celery.app
        try:
            pump(job, window, lambda chunk: send_chunk(app, job, chunk), sending_s(app))
        except BackfillError as err:
            return self._stop(window, call, err)
        return told

    def _trouble(self, task: BoundTask, call: ChunkCall, window: Window, err: Exception) -> dict[str, Any]:
        """What is wrong with the run: once more where that may help, and then it is paused."""
        known = isinstance(err, BackfillError)
        tries = window.count_troubles(call.chunk)
        if tries <= RETRIES and (not known or isinstance(err, SourceError | OutputError)):
            logger.warning("chunk %d of %s is tried again: %s", call.chunk, call.out, err, exc_info=not known)
            with hint():
                window.expect(call.chunk)  # else whoever looks next would send it at once
            raise task.again(2.0**tries) from err
        return self._stop(
            window, call, err if isinstance(err, BackfillError) else BackfillError(f"{type(err).__name__}: {err}")
        )

    def _attempt(self, task: BoundTask, call: ChunkCall, job: Job, window: Window) -> dict[str, Any]:
        since = state.read(job.store).since
        wish = window.wish_since(since)
        if wish in ("pause", "cancel"):
            window.forget(call.chunk)
            raise GivenUp(f"{wish} is wanted")
        if commit.settled(job.store, job.plan, call.chunk) is not None:
            window.forget(call.chunk)
            return {"chunk": call.chunk, "won": False}
        model, deviations = self._model(job)
        attempt = Attempt(window, call.chunk, self.closing, since=since)
        with attempt.held() as ours:
            if not ours:
                # Its owner is alive, or was until a moment ago: whoever was killed holds it for so long.
                raise task.again(self._claim_s / 2)
            split: list[str] = []
            started_at = time.time()
            with self._device(task, model, job.plan.parameters, attempt, split) as device:
                part = self._score(call, job, model, device, attempt)
                device.check()
            self._same(model)  # of all blocks: one that was let go of never comes back
            done = commit.commit(
                job.store, job.plan, call.chunk, part,
                started_at=started_at, ended_at=time.time(), worker=self._worker, deviations=[*deviations, *split],
            )  # fmt: skip
        record = done.record
        if done.won:
            with hint():
                self._mind_the_budget(window, job, record)
        return {"chunk": call.chunk, "won": done.won, "rows_ok": record.rows_ok, "rows_err": record.rows_err}

    def _score(self, call: ChunkCall, job: Job, model: HostedModel, device: Device, attempt: Attempt) -> commit.Part:
        _, reader = self._open(call)
        extents = job.extents(call.chunk)
        scorer = scorer_for(
            model, job.plan.source, job.plan.parameters, device, self._threads,
            batch_rows=job.plan.batch_rows, killers=attempt.suspects.killers,
        )  # fmt: skip
        if attempt.suspects.hopeless is not None:
            first, last = attempt.suspects.hopeless
            raise BackfillError(
                f"workers keep dying over rows {first} to {last} of chunk {call.chunk}, of which none kills alone"
            )
        if attempt.suspects.probe:
            with self._gate.alone():
                for piece in reader.slices(extents, rows=1):
                    if attempt.suspects.is_probed(piece.position, attempt.leave):
                        list(scorer.score([piece]))
                attempt.suspects.cleared()
                attempt.note(0, 0)
        self._gate.enter()
        try:
            return self._write(call, job, scorer, reader.slices(extents, rows=job.plan.batch_rows))
        finally:
            self._gate.leave()

    @staticmethod
    def _write(call: ChunkCall, job: Job, scorer: Scorer, slices: Iterable[Slice]) -> commit.Part:
        writer = PartWriter(job.plan, call.chunk, job.rows_of(call.chunk))
        for scored in scorer.score(slices):
            writer.add(scored.piece, scored.predictions, scored.failures)
        return writer.finish()

    @staticmethod
    def _mind_the_budget(window: Window, job: Job, record: commit.CommitRecord) -> None:
        if not record.rows_err:
            return
        failed = window.count_failures(record.rows_err)
        budget = state.read(job.store).error_budget
        if budget is not None and failed > allowed_failures(budget, job.plan.rows):
            window.stop(f"{OVER_BUDGET}: {failed} failed rows of {job.plan.rows} planned ones")

    def _stop(self, window: Window, call: ChunkCall, err: Exception) -> dict[str, Any]:
        logger.error("the backfill in %s is paused: %s", call.out, err)
        window.forget(call.chunk)
        window.stop(f"worker {self._worker}: {err}")
        return {"chunk": call.chunk, "error": str(err)}

    # -- nograd.calibrate --------------------------------------------------------------------------------------------

    def calibrate(self, task: BoundTask, sample: Sample) -> dict[str, Any]:
        """Score some rows and throw the predictions away: how fast, how large, of which type.

        Raises:
            UnknownModel: if this worker has no such model any more.
            SourceError: if the inputs cannot be read from here.
        """
        model = self._hosted(sample.model)
        reader = reader_of(sample.source, lambda first, count: [sample.files[first + n] for n in range(count)])
        batch_rows = model.spec.batch.max_items
        measurement = Measurement(sample.source)
        try:
            with self._device(task, model, sample.parameters, _Unclaimed(self.closing), []) as device:
                scorer = scorer_for(
                    model, sample.source, sample.parameters, device, self._threads, batch_rows=batch_rows
                )
                for extent in sample.extents:
                    seconds = sample.seconds / len(sample.extents)
                    measurement.watch(scorer, reader.slices([extent], rows=batch_rows), seconds)
        except GivenUp as err:
            raise Returned(str(err)) from err
        self._same(model)
        return measurement.result(batch_rows, self._identity(model))

    # -- what both need ----------------------------------------------------------------------------------------------

    @contextmanager
    def _device(
        self, task: BoundTask, model: HostedModel, params: Mapping[str, Any], hold: Hold, split: list[str]
    ) -> Iterator[Device]:
        settings, task_id = model.settings(params), str(task.celery.request.id)
        chunk = Block(task_id, task.delivery, settings, (), split)  # what is to blame for a row that hangs

        @contextmanager
        def guard(what: str) -> Iterator[None]:
            self._engine.activities.begin(what, model.name, [chunk], model.spec.hard_timeout_s)
            try:
                yield
            finally:
                self._engine.activities.end()

        left = threading.Event()

        def submit(block: Block) -> None:
            self._same(model)
            if not self._engine.queue.put([block.item(model.name)]):
                raise GivenUp("the worker stops", requeue=True)

        try:
            yield Device(
                submit=submit,
                check=hold.check,
                block=lambda rows: Block(task_id, task.delivery, settings, rows, split, left=left),
                note=hold.note,
                guard=guard,
                lead=lead_for(model),
            )
        finally:
            left.set()

    def _open(self, call: ChunkCall) -> tuple[Job, Reader]:
        """The plan and a reader of its inputs; of this thread, from the last chunk if that was of the same backfill."""
        last: tuple[ChunkCall, Job, Reader] | None = getattr(self._mine, "last", None)
        if last is None or (last[0].out, last[0].plan) != (call.out, call.plan):
            job = plan.load(open_store(call.out))
            if job.plan.sha256 != call.plan:
                raise PlanChanged(f"{call.out} holds plan {job.plan.job}, the chunk is of plan {call.plan[:12]}")
            last = (call, job, open_reader(job))
            self._mine.last = last
        return last[1], last[2]

    def _model(self, job: Job) -> tuple[HostedModel, list[str]]:
        """The model of a plan, if it is the one here; and in which versions of libraries it differs."""
        planned = job.plan.model
        model = self._hosted(planned.name)
        mine = self._identity(model)
        changes = model_changes(planned, mine)
        if changes:
            raise PlanChanged(f"worker {self._worker}: {'; '.join(changes)}")
        return model, version_changes(planned.versions, mine.versions)

    def _hosted(self, name: str) -> HostedModel:
        model = self._engine.models.get(name)
        if model is None:
            raise UnknownModel(f"worker {self._worker} has no model {name!r}")
        return model

    def _same(self, model: HostedModel) -> None:
        """Raise `UnknownModel` unless this very model is here; the queue knows it by its name alone."""
        if self._engine.models.get(model.name) is not model:
            raise UnknownModel(f"model {model.name!r} was unloaded, or loaded again")

    @staticmethod
    def _identity(model: HostedModel) -> ModelIdentity:
        libraries = ["torch", *filter(None, [_LIBRARIES.get(model.spec.loader)])]
        return ModelIdentity(
            name=model.name, parts=dict(model.parts), versions={each: version(each) for each in libraries}
        )


@dataclass(frozen=True, slots=True)
class _Unclaimed:
    """The hold on rows that are nobody's: a calibration's."""

    closing: threading.Event

    def check(self) -> None:
        """As of an `Attempt`."""
        if self.closing.is_set():
            raise GivenUp("the worker stops", requeue=True)

    def note(self, first: int, count: int) -> None:
        """Nothing: who dies over a calibration is asked again by nobody."""
