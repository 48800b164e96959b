"""Which models a worker hosts, and how that changes while it runs (``nograd models load | unload``).

::

    load    read the model file ─► load (a thread of its own), warm up (device thread) ─► consume its queue ─► ready
    unload  stop consuming ─► let go (device thread) ─► what waited goes back to the queue ─► free the memory ─► gone

Laws:

* A model is ``ready`` from the moment its queue is consumed, and not before it is warm.
* A name that the model file does not have, or a file that is wrong, is refused at once, and changes nothing.
* One that cannot be loaded, or not within ``load_timeout_s``, is ``failed`` and says why; the worker and its other
  models go on, and answer meanwhile (`loading` has the small print).
* No job is lost by an unload: those that wait here go back to the head of their queue, in order; those on the device
  end as ever. They stay queued until a worker has the model again, and it stays known to clients.
* Changes are made one after the other, on a thread of their own; Celery's event loop never waits for one.

A model's classes are imported once per process: changed code needs another worker.
"""

from __future__ import annotations

import gc
import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from nograd.tasks.errors import ConfigError, ModelFileError
from nograd.tasks.hints import did_you_mean
from nograd.tasks.modelfile import ModelFile

from . import collector
from .crew import Crew
from .engine import Engine
from .memory import free
from .models import HostedModel, open_model

logger = logging.getLogger(__name__)

#: seconds an unload waits for jobs of the model that are being finished, before it gives memory back to the device
LET_GO_S = 10.0

Status = Literal["loading", "ready", "failed", "unloading", "unloaded"]

#: the status of models that are where somebody wanted them
_SETTLED = ("ready", "unloaded")


@dataclass(frozen=True, slots=True)
class State:
    """How a model stands in this worker: its status, and why it failed if it did."""

    status: Status
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Queues:
    """What hosting asks of Celery's consumer. Both return at once; ``then`` is called on its event loop.

    Attributes:
        consume: ``(model, then)``: consume the queue of a model.
        cancel: ``(model, then)``: consume it no more.
    """

    consume: Callable[[str, Callable[[], None]], None]
    cancel: Callable[[str, Callable[[], None]], None]


class Hosting:
    """Owns the thread that changes which models there are.

    Args:
        engine: with its first models loaded.
        read: reads the model file.
        give_back: takes jobs of an unloaded model that waited, oldest first.
        announce: hears that there are other models than before.
    """

    def __init__(
        self,
        engine: Engine,
        read: Callable[[], ModelFile],
        give_back: Callable[[list[Any]], None],
        announce: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._read = read
        self._give_back = give_back
        self._announce = announce
        self._states = {name: State("ready") for name in engine.models}
        #: every model that was opened and is still somewhere in memory
        self._alive = weakref.WeakSet(engine.models.values())
        self._crew: Crew[Callable[[], None]] = Crew("nograd-hosting", 1, self._change)

    def start(self) -> None:
        """Start the thread."""
        self._crew.start()

    def close(self) -> None:
        """Begin no more changes."""
        self._crew.close()

    def finish(self, timeout_s: float) -> None:
        """Wait so long for the change that is under way."""
        self._crew.finish(timeout_s)

    @property
    def ready(self) -> bool:
        """Whether every model stands as it was asked to."""
        return all(state.status in _SETTLED for state in list(self._states.values()))

    def knows(self, name: str) -> bool:
        """Whether a model is here, on its way, or was here."""
        return name in self._states

    def report(self) -> dict[str, dict[str, Any]]:
        """For ``inspect stats``: the status of each model, the bytes it holds, and why it failed."""
        held = self._engine.memory.held
        return {
            name: {"status": state.status, "bytes": held.get(name, 0)} | ({"error": state.error} if state.error else {})
            for name, state in list(self._states.items())
        }

    def load(self, name: str, queues: Queues, *, reload: bool = False) -> Status:
        """Begin to load a model, as the model file now says; its status from now on. On Celery's event loop.

        Args:
            name: as in the model file.
            queues: Celery's consumer.
            reload: also if it is here; then it is unloaded first.

        Raises:
            ModelFileError: if the model file is wrong or has no such model; then nothing has changed.
        """
        status = self._status(name)
        if status in ("loading", "unloading") or (status == "ready" and not reload):
            return status
        self._table(name)  # a slip of the pen: said at once, and nothing is unloaded for it
        self._states[name] = State("loading")
        if status == "ready":
            queues.cancel(name, lambda: self._crew.submit(lambda: self._load(name, queues, first=self._unload)))
        else:
            self._crew.submit(lambda: self._load(name, queues))
        return "loading"

    def unload(self, name: str, queues: Queues) -> Status:
        """Begin to unload a model; its status from now on. On Celery's event loop."""
        status = self._status(name)
        if status == "failed":
            self._states[name] = State("unloaded")
        elif status == "ready":
            self._states[name] = State("unloading")
            queues.cancel(name, lambda: self._crew.submit(lambda: self._unload(name, then=State("unloaded"))))
        return self._status(name)

    def _status(self, name: str) -> Status:
        state = self._states.get(name)
        return "unloaded" if state is None else state.status

    def _table(self, name: str) -> ModelFile:
        """The model file as it is now, which has this model."""
        file = self._read()
        if name not in file.specs:
            known = ", ".join(file.specs)
            raise ModelFileError(f"{file.path}: no model {name!r}.{did_you_mean(name, file.specs)} It has {known}")
        return file

    def _change(self, changes: list[Callable[[], None]]) -> None:
        for change in changes:
            collector.take_back()
            change()
            free(self._engine.device)
            # One that is still on its way out, of a load that was given up or with a job that lasts, may be in cycles.
            if set(self._alive) <= set(self._engine.models.values()):
                collector.set_aside()

    def _open(self, name: str) -> HostedModel:
        model = open_model(self._table(name), name)
        self._alive.add(model)
        return model

    def _load(self, name: str, queues: Queues, first: Callable[[str], None] | None = None) -> None:
        try:
            if first is not None:
                first(name)
            self._engine.add(self._open(name)).result()
            self._announce()
        except BaseException as err:  # noqa: BLE001 - a model's own code; the worker goes on without it
            error = err.message if isinstance(err, ConfigError) else f"{type(err).__name__}: {err}"
        else:
            queues.consume(name, lambda: self._states.update({name: State("ready")}))
            return
        # Outside the except: the error's frames hold what was loaded.
        free(self._engine.device)
        logger.error("model %s is not loaded: %s", name, error)
        self._states[name] = State("failed", error)

    def _unload(self, name: str, then: State | None = None) -> None:
        model = weakref.ref(self._engine.models[name])
        jobs = list(dict.fromkeys(item.job for item in self._engine.remove(name).result()))
        waited = len(jobs)
        self._give_back(jobs)
        jobs.clear()
        self._announce()
        until = time.monotonic() + LET_GO_S
        gc.collect()
        while model() is not None and time.monotonic() < until:
            time.sleep(0.05)  # its last jobs are being finished and stored
            gc.collect()
        free(self._engine.device)
        if model() is not None:
            logger.warning("something still refers to model %s; its memory is not free", name)
        logger.info("model %s is unloaded; %d of its jobs go back to their queue", name, waited)
        if then is not None:
            self._states[name] = then
