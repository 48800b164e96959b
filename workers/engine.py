"""The device thread of a worker: load, then *take → run → hand over*, for ever.

Laws:

* Model load, warm-up and every forward happen on one thread, inside ``torch.no_grad()``: grad mode and CUDA graphs
  belong to a thread, and a model that was loaded is warm before a job can reach it.
* A model returns exactly one output for each input, or its whole batch fails loudly.
* A forward that raises is split and run again until the culprit stands alone: one bad item never costs its neighbours.
* Whatever is raised, also what is no `Exception`, becomes the outcome of an item. The thread lives on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from traceback import clear_frames
from typing import Any, Protocol

import torch
from celery.worker.state import maybe_shutdown

from nograd.tasks.errors import (
    DeadlinePassed,
    InvalidInput,
    JobError,
    ModelFailed,
    NogradError,
    OutputMismatch,
    Overloaded,
)
from nograd.tasks.modelfile import ModelFile
from nograd.tasks.predict import Outcome

from .batching import Batch, BatchQueue, Item, Limits
from .device import default_device
from .models import HostedModel, open_model
from .models.version import fingerprint
from .models.warmup import warm_up
from .stopwatch import Forward

logger = logging.getLogger(__name__)


class Job(Protocol):
    """What the engine needs of a message."""

    params: Mapping[str, Any]

    def abandoned(self) -> bool:
        """Whether nobody wants the outcome any more; asked right before device time is spent, so it must be quick."""

    def resolve(self, index: int, outcome: Outcome, forward: Forward | None = None) -> None:
        """Take the outcome of one item, and the forward it was in."""


@dataclass(slots=True)
class ModelStats:
    """Counters of one model; written by the device thread only."""

    batches: int = 0
    items: int = 0
    largest: int = 0
    failed: int = 0
    device_s: float = 0.0

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


@dataclass(slots=True)
class _Start:
    """How loading ended; handed from the device thread to whoever started it."""

    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class Engine:
    """Owns the loaded models and the thread that runs them.

    Attributes:
        models: the hosted models, by name; loaded once `start` has returned.
        queue: prepared items for the device thread.
        stats: counters per model.
    """

    def __init__(
        self,
        file: ModelFile,
        names: Sequence[str],
        on_abandoned: Callable[[Any], None] = lambda _: None,
        on_forward: Callable[[Sequence[Any]], None] = lambda _: None,
        device: torch.device | None = None,
    ) -> None:
        self.models: dict[str, HostedModel] = {name: open_model(file, name) for name in names}
        self.queue = BatchQueue({name: _limits(model) for name, model in self.models.items()})
        self.stats = {name: ModelStats() for name in self.models}
        self.device = device or default_device()
        self._on_abandoned = on_abandoned
        self._on_forward = on_forward
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Load and warm up every model on the device thread, and wait for it.

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

    def finish(self) -> None:
        """Let the batch on the device finish, run no other. Items that wait are dropped, unresolved."""
        self.queue.close()
        if self._thread is not None:
            self._thread.join()

    def _main(self, start: _Start) -> None:
        with torch.no_grad():
            try:
                for model in self.models.values():
                    self._load(model)
            except BaseException as err:  # noqa: BLE001 - whatever it is, the waiting thread raises it
                start.error = err
                return
            finally:
                start.done.set()
            while (batch := self.queue.take()) is not None:
                try:
                    self.step(batch)
                except BaseException as err:
                    # Not a model's error (those are outcomes) but one of ours. A thread that ended here would leave a
                    # worker that takes jobs and answers none.
                    logger.critical("a batch of %s could not be handed over; this is a bug", batch.model, exc_info=True)
                    _fail(batch, err)

    def _load(self, model: HostedModel) -> None:
        began = time.monotonic()
        model.load(self.device)
        model.version = fingerprint(model)
        warm_up(model)
        logger.info("model %s is loaded on %s and warm after %.1f s", model.name, self.device, time.monotonic() - began)

    def step(self, batch: Batch) -> None:
        """Run one batch and resolve each of its items."""
        for item in batch.expired:
            item.job.resolve(item.index, Outcome(error=DeadlinePassed("the job waited longer than its timeout_s")))
        items = []
        for item in batch.items:
            if item.job.abandoned():
                self._on_abandoned(item.job)
            elif self._prepared(item):
                items.append(item)
        if not items:
            return
        stats = self.stats[batch.model]
        began = time.monotonic()
        outcomes = run_isolated(self.models[batch.model], items, self._on_forward)
        self._on_forward([])
        ended = time.monotonic()
        forward = Forward(ended, ended - began, len(items))
        stats.device_s += forward.device_s
        stats.batches += 1
        stats.items += len(items)
        stats.largest = max(stats.largest, len(items))
        stats.failed += sum(outcome.error is not None for outcome in outcomes)
        for item, outcome in zip(items, outcomes, strict=True):
            item.job.resolve(item.index, outcome, forward)

    def _prepared(self, item: Item) -> bool:
        """Prepare what was left for here, where nothing else runs that could be blamed for a crash."""
        if item.late is None:
            return True
        self._on_forward([item.job])
        try:
            item.prepared = item.late()
        except BaseException as err:  # noqa: BLE001 - a model's own code; its item fails
            item.job.resolve(item.index, Outcome(error=as_invalid(err)))
            self._on_forward([])
            return False
        return True


def as_invalid(err: BaseException) -> NogradError:
    """What a failed preparation tells the caller."""
    return err if isinstance(err, NogradError) else InvalidInput(f"prepare raised {type(err).__name__}: {err}")


def run_isolated(
    model: HostedModel, items: Sequence[Item], on_forward: Callable[[Sequence[Any]], None] = lambda _: None
) -> list[Outcome]:
    """One outcome for each item; a forward that raises is halved until the culprit stands alone.

    Args:
        model: whose items these are.
        items: of one group.
        on_forward: called with the jobs of each forward before it runs.
    """
    on_forward([item.job for item in items])
    try:
        outputs = model.forward([item.prepared for item in items], items[0].job.params)
        if len(outputs) != len(items):
            raise OutputMismatch(f"model {model.name!r} returned {len(outputs)} outputs for {len(items)} inputs")
    except OutputMismatch as err:
        # Nobody knows whose output is whose, also not in a smaller batch. An error of its own for each: whoever raises
        # one adds to its traceback.
        return [Outcome(error=OutputMismatch(err.message)) for _ in items]
    except JobError as err:
        error: JobError = err
    except torch.OutOfMemoryError as err:
        error = Overloaded(f"out of memory on one input: {err}")
        clear_frames(err.__traceback__)
    except BaseException as err:  # noqa: BLE001 - a model may raise SystemExit; its job must end all the same
        error = ModelFailed(f"{type(err).__name__}: {err}")
        error.__cause__ = err.with_traceback(None)  # frames hold tensors, and the retry below needs their memory
    else:
        return [Outcome(value=output) for output in outputs]
    # Outside the except blocks, so that the failed forward's tensors are freed before the halves run.
    if isinstance(error, Overloaded) and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(items) == 1:
        logger.warning("model %s failed on one input: %s", model.name, error.message)
        return [Outcome(error=error)]
    middle = len(items) // 2
    return run_isolated(model, items[:middle], on_forward) + run_isolated(model, items[middle:], on_forward)


def _fail(batch: Batch, err: BaseException) -> None:
    for item in batch.items:
        try:
            item.job.resolve(item.index, Outcome(error=JobError(f"{type(err).__name__}: {err}")))
        except BaseException:
            logger.critical("an item could not even fail", exc_info=True)


def _limits(model: HostedModel) -> Limits:
    batch = model.spec.batch
    return Limits(batch.max_items, batch.max_wait_ms / 1000, batch.max_cost)
