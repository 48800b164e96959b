"""The device thread of a worker: load, then *take → run → hand over*, for ever.

Laws:

* Warm-up and every forward happen on one thread, inside ``torch.no_grad()``: grad mode and CUDA graphs belong to a
  thread, and a model that was loaded is warm before a job can reach it. The first models are loaded there as well.
* Models come and go between two batches; what comes later is loaded beside them (`loading`). One that cannot be loaded,
  or is over the memory budget, leaves nothing behind and the others as they were. One of the first that takes longer
  than its ``load_timeout_s`` is the watchdog's: nobody can take the device thread back from it.
* How a batch is run, and what its failures cost, is `forward`'s business. Whatever is raised, also what is no
  `Exception`, becomes the outcome of an item and the thread lives on; except when the device is lost.
* An item whose deadline passes, waiting or on the device, is resolved by `expire` at that moment; what the forward says
  of it later is dropped.
* A job over which a worker has died is prepared, run and finished here, while nothing else runs that may crash.
* Between two batches the device waits, so what can wait does not happen there. Outcomes are told once the next batch is
  about to begin (whoever hears of one wants the interpreter), at once if none follows; batches that have run are freed
  by another thread, since torch lets go of the interpreter whenever it frees a tensor (``THPVariable_clear``, 2.15).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from celery.worker.state import maybe_shutdown

from nograd.tasks.errors import ConfigError, InvalidInput, JobError, ModelFileError, NogradError
from nograd.tasks.keys import SAFE_SIZE_TTL_S
from nograd.tasks.modelfile import ModelFile
from nograd.tasks.predict import Outcome

from .batching import Batch, BatchQueue, Item, Limits
from .crew import Crew
from .device import default_device
from .faults import DeviceLost, is_device_lost
from .forward import run_isolated, run_pieces
from .loading import Loading
from .memory import MemoryBudget
from .models import HostedModel, open_model
from .models.version import fingerprint, identify
from .models.warmup import steps
from .outputs import finish, too_late
from .resources import show_size
from .risk import Risks
from .stopwatch import Forward
from .trace import as_job_error
from .watchdog import Activities

logger = logging.getLogger(__name__)

#: seconds its thread waits, in the end, for batches to be freed: one that is in torch's code when the interpreter ends
#: would abort the process
FREE_S = 5

T = TypeVar("T")


class Job(Protocol):
    """What the engine needs of a message."""

    params: Mapping[str, Any]

    def abandoned(self) -> bool:
        """Whether nobody wants the outcome any more; asked right before device time is spent, so it must be quick."""

    def resolve(self, index: int, outcome: Outcome, forward: Forward | None = None) -> None:
        """Take the outcome of one item, and the forward it was in."""


class RowsJob(Job, Protocol):
    """What the engine needs of a batch that came as one item (see `nograd.workers.backfill.block`)."""

    rows: Sequence[Any]
    #: what is left to do, a forward at a step; None before the first
    forwards: Iterator[bool] | None

    def settle(self, start: int, stop: int, outputs: Sequence[Any] | NogradError) -> None:
        """Take the outputs of some rows, or the error they share."""

    def finish(self, fits: int | None) -> None:
        """All rows have their outcome; ``fits`` of them fitted into one forward, None if all did."""


@dataclass(slots=True)
class ModelStats:
    """Counters of one model; written by the device thread only."""

    batches: int = 0
    items: int = 0
    largest: int = 0
    failed: int = 0
    device_s: float = 0.0

    def count(self, items: int, failed: int, device_s: float) -> None:
        """Add a batch."""
        self.batches += 1
        self.items += items
        self.largest = max(self.largest, items)
        self.failed += failed
        self.device_s += device_s

    def as_dict(self) -> dict[str, float]:
        """For ``inspect stats``."""
        mean = self.items / self.batches if self.batches else 0.0
        return {
            "batches": self.batches,
            "items": self.items,
            "failed": self.failed,
            "largest_batch": self.largest,
            "mean_batch": round(mean, 2),
            "device_s": round(self.device_s, 3),
        }


def _nothing(*_: Any) -> None:
    """The hook of whoever does not care."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the device thread tells; each is called on it and must be quick.

    Attributes:
        on_abandoned: a job nobody wants any more was left out of its batch.
        on_forward: before a forward: its jobs; none once no other follows directly.
        on_fits: a model, the group of a batch, and how many items of it fit, since more ran out of memory.
        on_lost: the device answers no more; why, and the jobs it happened over. Expected to end the process.
    """

    on_abandoned: Callable[[Any], None] = _nothing
    on_forward: Callable[[Sequence[Any]], None] = _nothing
    on_fits: Callable[[str, Any, int], None] = _nothing
    on_lost: Callable[[str, Sequence[Any]], None] = _nothing


@dataclass(slots=True)
class _Start:
    """How loading ended; handed from the device thread to whoever started it."""

    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class Engine:
    """Owns the loaded models and the thread that runs them.

    Attributes:
        models: the loaded models, by name.
        queue: prepared items for the device thread.
        stats: counters per model.
        activities: what runs a model's code just now, on this thread and others.
        risks: which of it may crash the process.
        memory: what the models hold.
    """

    def __init__(
        self,
        file: ModelFile,
        names: Sequence[str],
        hooks: Hooks | None = None,
        device: torch.device | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self._first = [open_model(file, name) for name in names]
        self.models: dict[str, HostedModel] = {}
        self.queue = BatchQueue({})
        self.queue.on_idle = self._clear
        self.stats: dict[str, ModelStats] = {}
        self.device = device or default_device()
        self.memory = MemoryBudget(self.device, memory_budget)
        self.activities = Activities()
        self.risks = Risks(self.activities)
        self._hooks = hooks or Hooks()
        #: rows of a backfill's batch that fit into one forward, where not all did, and when that was found out
        self._block_fits: WeakKeyDictionary[HostedModel, tuple[int, float]] = WeakKeyDictionary()
        #: the time limit of each load on a thread of its own, until that thread ends
        self._loads: dict[object, float] = {}
        self.risks.unclear = self._loads
        #: what waits for the device thread, and is told if that ends first
        self._calls: set[Future[Any]] = set()
        self._on_device: Sequence[Item] = ()
        #: the jobs of the last forward
        self._last_forward: Sequence[Any] = ()
        #: outcomes their jobs have not heard of yet
        self._untold: list[tuple[Job, int, Outcome, Forward]] = []
        #: batches that have run
        self._spent: Crew[Batch] = Crew("nograd-free", 1, _free)
        self._thread: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        """Whether the device thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Load and warm up every model given at first on the device thread, and wait for it.

        Raises:
            ModelFileError: what a loader refused.
        """
        start = _Start()
        self._thread = threading.Thread(target=self._main, args=(start,), name="nograd-device", daemon=True)
        self._thread.start()
        while not start.done.wait(0.2):
            maybe_shutdown()  # models may take minutes; Celery's signal handlers only leave a mark
        if start.error is not None:
            raise start.error

    def add(self, model: HostedModel) -> Loading:
        """Load and warm up one more model while the others work. Fails as `start` does, without harm to them.

        One at a time: what a GPU holds is measured from before to after.
        """
        token = object()
        self._loads[token] = model.spec.load_timeout_s

        def on_device(errand: Callable[[], None], what: str | None) -> None:
            self._call(errand if what is None else partial(self._load_alone, model, errand, what)).result()

        def load(model: HostedModel, wanted: Callable[[], bool]) -> None:
            try:
                self._load(model, on_device, wanted)
            finally:
                del self._loads[token]

        return Loading(model, load, self._on_load_failed)

    def remove(self, name: str) -> Future[list[Item]]:
        """Let go of a model between two batches; its items that wait, which are the caller's from then on."""
        return self._call(lambda: self._unload(name))

    def finish(self) -> None:
        """Let the batch on the device finish, run no other. Items that wait are dropped, unresolved."""
        self.queue.close()
        if self._thread is not None:
            self._thread.join()

    def report(self) -> dict[str, dict[str, Any]]:
        """What each model has done, for ``inspect stats``. Any thread may ask."""
        models = self.models.copy()
        return {
            name: {**stats.as_dict(), "version": models[name].version}
            for name, stats in self.stats.copy().items()
            if name in models
        }

    def limits_s(self) -> list[float]:
        """Seconds for which a model's code may hold the interpreter, for each model here or on its way."""
        return [*(model.spec.hard_timeout_s for model in list(self.models.values())), *list(self._loads.values())]

    def expire(self) -> None:
        """Resolve every item whose deadline has passed, also those on the device. For the watchdog's thread."""
        now = time.monotonic()
        for item in (*self.queue.expire(), *self._on_device):
            if item.deadline is not None and item.deadline <= now:
                _pass_deadline(item)

    def _main(self, start: _Start) -> None:
        with torch.no_grad():
            try:
                while self._first:
                    self._load_first(self._first.pop(0))
            except BaseException as err:  # noqa: BLE001 - whatever it is, the waiting thread raises it
                start.error = err
                return
            finally:
                start.done.set()
            self._spent.start()
            try:
                while self._turn():
                    pass
            finally:
                self._spent.finish(FREE_S)
                for call in list(self._calls):
                    call.set_exception(ConfigError("the worker is shutting down"))

    def _turn(self) -> bool:
        """One batch, or one change of models; False if that was the last."""
        # A method of its own: a variable of the loop would keep what it last had alive, models and tensors included.
        batch = self.queue.take()
        if not isinstance(batch, Batch):
            self._clear()
        if batch is None:
            return False
        try:
            if isinstance(batch, Batch):
                self._step(batch)
            else:
                batch()
        except DeviceLost as err:
            self._tell()  # what was done before counts as well
            self._hooks.on_lost(str(err), self._last_forward)
            return False
        except BaseException as err:
            # Not a model's error (those are outcomes) but one of ours. A thread that ended here would leave a worker
            # that takes jobs and answers none.
            self._tell()  # of what has run, the first outcome counts
            logger.critical("a batch could not be handed over; this is a bug", exc_info=True)
            if isinstance(batch, Batch):
                for item in batch.items:
                    _fail(item.job, item.index, err)
        if isinstance(batch, Batch):
            self._spent.submit(batch)
        return True

    def _load_first(self, model: HostedModel) -> None:
        """Load a model where nothing else runs yet, all of it within its limit."""
        token = object()
        self._loads[token] = model.spec.load_timeout_s
        self._begin_load("the load", model)
        try:
            self._load(model, lambda errand, _: errand(), lambda: True)
        finally:
            self.activities.end()
            del self._loads[token]

    def _load(
        self,
        model: HostedModel,
        on_device: Callable[[Callable[[], None], str | None], None],
        wanted: Callable[[], bool],
    ) -> None:
        """Load a model and enter it, if it is then ``wanted``.

        Args:
            model: the model.
            on_device: runs an errand on the device thread, and what that does if it runs the model's code.
            wanted: asked at the very end.
        """
        began = time.monotonic()
        try:
            on_device(self.memory.open, None)
            if model.loads_alone:
                on_device(lambda: model.load(self.device), "the load")
            else:
                model.load(self.device)
            model.parts = identify(model)
            model.version = fingerprint(model.parts)
            for step in steps(model):
                on_device(step, "the warm-up")
        except torch.OutOfMemoryError as err:
            why = str(err).partition(". ")[0]
            raise ModelFileError(f"{model.file}: [{model.name}]: does not fit on {self.device}: {why}") from err
        on_device(lambda: self._enter(model, wanted, began), None)

    def _load_alone(self, model: HostedModel, errand: Callable[[], None], what: str) -> None:
        """Run what loads a model on the device thread, between the batches of others."""
        self._begin_load(what, model)
        try:
            with self.risks.gate.alone():
                errand()
        finally:
            self.activities.end()

    def _begin_load(self, what: str, model: HostedModel) -> None:
        self.activities.begin(what, model.name, [], model.spec.load_timeout_s, "load_timeout_s")

    def _enter(self, model: HostedModel, wanted: Callable[[], bool], began: float) -> None:
        if not wanted():
            return
        self.memory.close(model)
        self.stats[model.name] = ModelStats()
        self.models[model.name] = model
        self.queue.add_model(model.name, _limits(model))
        size = show_size(self.memory.held[model.name])
        took = time.monotonic() - began
        logger.info("model %s is loaded on %s (%s) and warm after %.1f s", model.name, self.device, size, took)

    def _on_load_failed(self, err: BaseException) -> None:
        """On the thread of a load: a device that was lost there ends the device thread."""
        if is_device_lost(err, self.device):
            self._call(lambda: _raise(err))

    def _unload(self, name: str) -> list[Item]:
        items = self.queue.remove_model(name)
        del self.models[name], self.stats[name]
        self.memory.forget(name)
        return items

    def _call(self, errand: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            self._calls.discard(future)
            try:
                future.set_result(errand())
            except BaseException as err:  # whatever it is, whoever waits for it raises it
                lost = is_device_lost(err, self.device)
                future.set_exception(err)
                if lost:  # over none of the jobs: `_turn` has cleared them
                    raise DeviceLost(f"{type(err).__name__}: {err}") from err

        self._calls.add(future)
        if not self.queue.call(run):
            self._calls.discard(future)
            future.set_exception(ConfigError("the worker is shutting down"))
        return future

    def _step(self, batch: Batch) -> None:
        """Run one batch.

        Raises:
            DeviceLost: what was on the device has no outcome then.
        """
        for item in batch.expired:
            _pass_deadline(item)
        model = self.models[batch.model]
        self._on_device = batch.items
        try:
            if any(item.late is not None for item in batch.items):
                self._clear()  # nobody who has run waits, or is named, while those inside the gate come out
                with self.risks.gate.alone():
                    self._run_items(model, batch.items)
                    self._clear()  # before anybody else is let in, over whom the process might die as well
            else:
                self._run_items(model, batch.items)
        finally:
            self._on_device = ()
            self.activities.end()

    def _run_items(self, model: HostedModel, batch: Sequence[Item]) -> None:
        items = [item for item in batch if self._wanted(item) and self._prepared(item, model)]
        if items and items[0].block:
            self._run_block(model, items[0])
        elif items:
            self._run(model, items)
        else:
            self._tell()

    def _run(self, model: HostedModel, items: list[Item]) -> None:
        stats = self.stats[model.name]
        began = time.monotonic()
        outcomes: list[tuple[Item, Outcome]] = []

        def on_outcome(item: Item, outcome: Outcome) -> None:
            if item.late is not None and outcome.error is None:
                self._begin("finish", model, [item])
                outcome = finish(model, outcome.value, item.job.params)
            outcomes.append((item, outcome))

        try:
            fits = run_isolated(
                model,
                items,
                self.device,
                lambda piece: self._begin("the forward", model, piece),
                on_outcome,
            )
            self.activities.end()
        finally:
            ended = time.monotonic()
            forward = Forward(ended, ended - began, len(items))
            stats.count(len(items), sum(outcome.error is not None for _, outcome in outcomes), forward.device_s)
            self._untold += [(item.job, item.index, outcome, forward) for item, outcome in outcomes]
        if fits is not None and not self._loads:  # what a load takes beside it is nobody's safe size
            self._hooks.on_fits(model.name, items[0].group, fits)

    def _run_block(self, model: HostedModel, item: Item) -> None:
        """Run one forward of a batch of a backfill's rows; what is left of it waits behind whoever is interactive."""
        block: RowsJob = item.job
        if block.forwards is None:
            block.forwards = self._forwards(model, item)
        if next(block.forwards, False):
            self.queue.put([item])

    def _forwards(self, model: HostedModel, item: Item) -> Iterator[bool]:
        """The forwards of a batch of a backfill's rows, which are no items of their own; True while there are more."""
        block: RowsJob = item.job
        spent, failed = 0.0, 0

        def on_done(piece: Sequence[int], result: Sequence[Any] | JobError) -> None:
            nonlocal failed
            failed += len(piece) if isinstance(result, JobError) else 0
            block.settle(piece[0], piece[-1] + 1, result)

        pieces = run_pieces(
            model,
            range(len(block.rows)),
            lambda piece: block.rows[piece[0] : piece[-1] + 1],
            block.params,
            self.device,
            lambda _: self._begin("the forward", model, [item]),
            on_done,
            self._known_fits(model),
        )
        while True:
            began = time.monotonic()
            try:
                next(pieces)
            except StopIteration as end:
                fits: int | None = end.value
                break
            finally:
                spent += time.monotonic() - began
            yield True
        if fits is not None and not self._loads and fits < (self._known_fits(model) or fits + 1):
            self._block_fits[model] = (fits, time.monotonic())
        self.activities.end()
        self.stats[model.name].count(len(block.rows), failed, spent)
        block.finish(fits)

    def _known_fits(self, model: HostedModel) -> int | None:
        """Rows that fit into one forward, if not long ago more did not."""
        rows, since = self._block_fits.get(model, (None, 0.0))
        return None if time.monotonic() - since > SAFE_SIZE_TTL_S else rows

    def _begin(self, what: str, model: HostedModel, items: Sequence[Item]) -> None:
        """From here on the process may die, or hang, over these."""
        self._last_forward = jobs = _jobs(items)
        self._hooks.on_forward([] if self.risks.unclear else jobs)
        self._tell()
        self.activities.begin(what, model.name, jobs, model.spec.hard_timeout_s)

    def _clear(self) -> None:
        """The process dies over nothing of the queue from here on. Told only when no other batch follows at once."""
        self._last_forward = ()
        self._tell()
        self._hooks.on_forward([])

    def _tell(self) -> None:
        """Resolve the items that have run."""
        untold, self._untold = self._untold, []
        for job, index, outcome, forward in untold:
            try:
                job.resolve(index, outcome, forward)
            except BaseException as err:
                logger.critical("an outcome could not be handed over; this is a bug", exc_info=True)
                _fail(job, index, err)

    def _wanted(self, item: Item) -> bool:
        if not item.job.abandoned():
            return True
        self._hooks.on_abandoned(item.job)
        return False

    def _prepared(self, item: Item, model: HostedModel) -> bool:
        """Prepare what was left for here, where nothing else runs that could be blamed for a crash."""
        if item.late is None:
            return True
        self._begin("the preparation", model, [item])
        try:
            item.prepared = item.late()
        except BaseException as err:  # a model's own code; its item fails
            if is_device_lost(err, self.device):
                raise DeviceLost(f"{type(err).__name__}: {err}") from err
            item.job.resolve(item.index, Outcome(error=as_invalid(err)))
            self.activities.end()
            return False
        return True


def _jobs(items: Sequence[Item]) -> list[Any]:
    """The jobs of items, each once."""
    return list(dict.fromkeys(item.job for item in items))


def _free(batches: list[Batch]) -> None:
    for batch in batches:
        batch.items.clear()  # here, whoever still has the batch


def _raise(err: BaseException) -> None:
    raise err


def _pass_deadline(item: Item) -> None:
    item.job.resolve(item.index, too_late())


def as_invalid(err: BaseException) -> NogradError:
    """What a failed preparation tells the caller."""
    return err if isinstance(err, NogradError) else InvalidInput(f"prepare raised {type(err).__name__}: {err}")


def _fail(job: Job, index: int, err: BaseException) -> None:
    try:
        job.resolve(index, Outcome(error=as_job_error(err)))
    except BaseException:
        logger.critical("an item could not even fail", exc_info=True)


def _limits(model: HostedModel) -> Limits:
    batch = model.spec.batch
    return Limits(batch.max_items, batch.max_wait_ms / 1000, batch.max_cost)
