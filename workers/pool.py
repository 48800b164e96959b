"""The batch pool: a Celery pool whose unit of execution is a batch (``worker_pool = "nograd.workers.pool:TaskPool"``).

::

    Celery's event loop          CPU threads        device thread           CPU threads
    on_apply(message) ──────► decode, prepare ──► take ► forward ──► finish, trace late, acknowledge
             └── any other task ─────────────────────────────────► trace on a thread

Laws:

* Messages of ``nograd.predict`` are batched across callers; every other task runs through Celery's tracer on a thread.
* An input that cannot be prepared fails alone; the other items of its message and its batch go on.
* Interactive messages go before bulk ones wherever something waits. What is not on the device is bounded in items
  (`intake`): the rest stays in Redis, for any worker.
* A message is settled exactly once; one that was revoked, or never reached the device before shutdown, is not settled
  at all: Celery has answered it already, or the broker gives it to another worker.
* Models are loaded and warm before the first message is fetched; a model that cannot be loaded stops the start, and one
  that is not within its ``load_timeout_s`` ends the worker, for whoever starts it again.
  What comes and goes later is `hosting`'s business.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from celery import states
from celery.app.task import Context
from celery.concurrency.base import BasePool
from celery.worker import state
from celery.worker.state import revoked
from kombu import Queue

from nograd.tasks import cancelled, registry, transport
from nograd.tasks.backfill.task import CALIBRATE, RUN_CHUNK, Runner, runner
from nograd.tasks.errors import ConfigError, JobError, WorkerDied
from nograd.tasks.keys import CHUNKS, MODELS_RENEW_S, PREDICT_TASK, queue_name
from nograd.tasks.modelfile import ModelFile, load_model_file
from nograd.tasks.settings import Settings

from . import collector, device, last_words
from .backfill.lookout import Lookout
from .backfill.runner import BoundTask, ChunkRunner
from .crew import Crew
from .engine import Engine, Hooks
from .exits import EXIT_CONFIG, EXIT_DEVICE, EXIT_HUNG
from .handle import Handle
from .hosting import Hosting, Queues
from .intake import Intake
from .memory import free
from .message import Message
from .prepare import Preparer
from .resources import Resources
from .safe_sizes import SafeSizes, kind_of
from .settle import Settler
from .store import ResultStore
from .trace import Callbacks, TraceArgs, trace
from .watchdog import Activity, Watchdog

logger = logging.getLogger(__name__)

#: threads for tasks that are not predictions, at most
TASK_THREADS = 32
#: chunks of backfills that run at a time: one reads and writes while the other is on the device
CHUNK_THREADS = 2
#: seconds a warm shutdown waits for Redis to take the last results; without it a worker could not be stopped while
#: Redis is away
STORE_S = 30
#: seconds a warm shutdown waits for a model that is being loaded: a thread that is in torch's code when the interpreter
#: ends would abort the process
LOAD_S = 5
#: seconds it waits for a look at an open backfill
LOOK_S = 5
#: seconds a cold shutdown takes at most, from when the pool hears of it
COLD_S = 15


class Task(Handle):
    """A message of any other task: Celery's tracer on a thread."""

    def __init__(self, celery: Callbacks, args: TraceArgs, kwargs: dict[str, Any], intake: Intake | None) -> None:
        super().__init__(celery, args)
        self._kwargs = kwargs
        self._intake = intake

    def run(self) -> None:
        """Run it, unless it was revoked while it waited for a thread."""
        transport.started([self.delivery])
        if self._intake is not None:
            self._intake.began_task(bulk=self.bulk)
        if self.begin() and self.claim():
            trace(self.celery, self.raw, self._kwargs, self.started)


class BackfillTask(Task):
    """A message of a backfill's tasks: traced like any other, with the worker's runner at hand."""

    def __init__(self, celery: Callbacks, args: TraceArgs, kwargs: dict[str, Any], chunks: ChunkRunner) -> None:
        super().__init__(celery, args, kwargs, None)
        self._chunks = chunks

    def run(self) -> None:
        """Run it where its body finds the runner."""
        token = runner.set(
            Runner(
                run_chunk=lambda task, call: self._chunks.run_chunk(BoundTask(task, self.delivery), call),
                calibrate=lambda task, sample: self._chunks.calibrate(BoundTask(task, self.delivery), sample),
            )
        )
        try:
            super().run()
        finally:
            runner.reset(token)


class TaskPool(BasePool):  # type: ignore[misc]
    """Celery's pool protocol over an `Engine`. ``limit`` (``--concurrency``) is the number of messages in flight."""

    task_join_will_block = True
    signal_safe = False  # stopping waits for threads

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.engine: Engine | None = None
        self.preparer: Preparer | None = None
        self.settler: Settler | None = None
        self.hosting: Hosting | None = None
        self.intake: Intake | None = None
        self._threads: dict[str, int] = {}
        self.watchdog: Watchdog | None = None
        self.sizes: SafeSizes | None = None
        size = min(TASK_THREADS, max(1, self.limit or 1))
        self._tasks: Crew[Task] = Crew("nograd-task", size, _run_each)
        self._withdrawn: Crew[Handle] = Crew("nograd-withdraw", 1, _withdraw_each)
        # A word to Redis: who mostly finds that there is room is the device thread, which would say it between batches.
        self._resumes: Crew[None] = Crew("nograd-resume", 1, lambda _: transport.resume(), most=TASK_THREADS)
        self._backfill: Crew[Task] = Crew("nograd-chunk", CHUNK_THREADS, _run_chunks)
        self.chunks: ChunkRunner | None = None
        self.lookout: Lookout | None = None
        self._stopping = threading.Event()
        self._ends = False

    # -- life --------------------------------------------------------------------------------------------------------

    def on_start(self) -> None:
        """Load the models of the queues this worker consumes, then make them known."""
        try:
            resources = Resources.from_env()
            device.require()
            device.configure(resources)
            file = _model_file()
            books = self._books()
            hooks = Hooks(self._withdrawn.submit, _mark_suspects, self._on_fits, self._on_device_lost)
            self.engine = engine = Engine(file, self._names(file), hooks, memory_budget=resources.memory_budget)
            self.watchdog = Watchdog(engine.activities, engine.limits_s, self._on_tick, self._on_hung)
            self.watchdog.start()  # before the models are loaded, which may hang as well
            engine.start()
        except ConfigError as err:
            # Celery would print a traceback and exit 1; this is the user's to fix, and one line says it all.
            logger.critical("the worker does not start: %s", err.message)
            raise SystemExit(EXIT_CONFIG) from err
        task = self.app.tasks[PREDICT_TASK]
        _, hostname = self.options.get("initargs") or (None, "")
        self.settler = Settler(ResultStore(self.app, task, hostname), task.resultrepr_maxsize, engine.risks)
        waiting = lambda: engine.queue.waiting  # noqa: E731
        self.intake = Intake(self.limit, self._largest(), waiting, self._resume, threads=resources.threads)
        engine.queue.on_taken = self.intake.eased
        transport.throttle(self._room)
        lease_s = Settings.from_env().lease_s
        self.chunks = ChunkRunner(engine, books, hostname, threads=resources.threads, claim_s=lease_s)
        self.lookout = Lookout(self.app, books, lambda: list(engine.models), every_s=lease_s)
        self.preparer = Preparer(
            engine.models,
            engine.queue,
            self.settler,
            self.app.conf.accept_content,
            self._bury,
            self._take_back,
            lambda message: self._give_back([message]),
            intake=self.intake,
            threads=resources.threads,
            risks=engine.risks,
        )
        self.sizes = SafeSizes(books, kind_of(engine.device), engine.queue.cap)
        self._threads = {"prepare": resources.threads, **device.threads()}
        self.hosting = Hosting(engine, _model_file, self._give_back, self._announce)
        crews = (self._tasks, self._withdrawn, self._resumes, self._backfill)
        for crew in (self.settler, self.preparer, *crews, self.hosting):
            crew.start()
        self.sizes.start()
        self.lookout.start()
        transport.watch(self._makes_progress)
        self._warn_of_small_batches()
        threading.Thread(target=self._keep_known, name="nograd-registry", daemon=True).start()
        free(engine.device)
        collector.set_aside()

    def on_close(self) -> None:
        """Begin nothing more. What has not reached the device goes back to the head of its queue, in order."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self.engine is None or self.preparer is None:
            return
        if self.hosting is not None:
            self.hosting.close()
        unread = self.preparer.close()
        items = self.engine.queue.close()
        waiting = list(dict.fromkeys(item.job for item in items if item.job.untouched()))
        if self.chunks is not None:
            self.chunks.closing.set()
        if self.lookout is not None:
            self.lookout.close()
        unstarted = [*waiting, *unread, *self._tasks.close(), *self._backfill.close()]
        for handle in unstarted:
            handle.terminate()  # whatever still holds it: it is no longer ours to end
        transport.give_back([handle.delivery for handle in unstarted])
        if unstarted:
            logger.info("%d messages that had not been started go back to their queues", len(unstarted))

    def on_stop(self) -> None:
        """Finish what is on the device, store and acknowledge it."""
        self.on_close()
        transport.throttle(None)
        if _is_cold():  # it comes here, too, inside a signal handler
            return
        if self.preparer is not None:
            self.preparer.finish()
        if self.engine is not None:
            self.engine.finish()
        self._tasks.finish()
        self._backfill.finish()
        if self.hosting is not None:
            self.hosting.finish(LOAD_S)
        self._withdrawn.finish(STORE_S)
        self._resumes.finish(STORE_S)
        if self.lookout is not None:
            self.lookout.finish(LOOK_S)
        if self.settler is not None and not self.settler.finish(STORE_S):
            logger.error("results could not be stored within %d s; their jobs are delivered again", STORE_S)
        transport.flush()
        if self.sizes is not None:
            self.sizes.finish()
        if self.watchdog is not None:  # last: what hangs in a shutdown ends as well
            self.watchdog.finish()

    def on_terminate(self) -> None:
        """Cold shutdown: wait for nothing. What the threads held is delivered again."""
        self._end_soon()
        self.on_close()

    def _end_soon(self) -> None:
        # An interpreter may never end while threads are in a model's code, or rows of a backfill are being prepared.
        if not self._ends:
            self._ends = True
            signal.alarm(COLD_S)

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Nothing: ``pid`` is this very process. `Handle.terminate` is what ends a job here."""

    # -- work --------------------------------------------------------------------------------------------------------

    def on_apply(  # noqa: PLR0917 - Celery's signature
        self,
        target: Any,
        args: Any = (),
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        error_callback: Any = None,
        **_: Any,
    ) -> Handle:
        """Take a message from Celery's event loop; never blocks."""
        celery = Callbacks(target, accept_callback, callback, error_callback)
        if args and args[0] == PREDICT_TASK and self.preparer is not None:
            message = Message(celery, tuple(args))
            self.preparer.submit(message)
            return message
        if args and args[0] in (RUN_CHUNK, CALIBRATE) and self.chunks is not None:
            chunk = BackfillTask(celery, tuple(args), kwargs or {}, self.chunks)
            # A calibration does not wait for the chunks of other backfills.
            (self._backfill if args[0] == RUN_CHUNK else self._tasks).submit(chunk)
            return chunk
        task = Task(celery, tuple(args), kwargs or {}, self.intake)
        if self.intake is not None:
            self.intake.came(bulk=task.bulk)
        self._tasks.submit(task, bulk=task.bulk)
        return task

    def _room(self, priority: int) -> int:
        """How many more messages of this priority the worker takes."""
        room = 1 if self.intake is None else self.intake.room(priority)
        if priority < CHUNKS:
            return room
        # One chunk ahead of those that run, so that a worker that joins finds some; predictions may come this way, too.
        return max(0, min(room, 1 - len(self._backfill)))

    def _resume(self) -> None:
        self._resumes.submit(None)

    def _bury(self, message: Message, deaths: int) -> JobError:
        """Store the failure of a job that kills workers, and keep its message for whoever wants to know why."""
        words = last_words.read(self.app.backend.client, message.id)
        last = f" (the last one: {words})" if words else ""
        error = WorkerDied(f"{deaths} workers died over this job{last}; it is in the dead letters")
        # Stored first: a worker that dies between the two leaves a job that has its end.
        node = self.settler.node if self.settler is not None else None
        request = Context(message.request_dict, hostname=node, timings=message.timings(node))
        self.app.backend.store_result(message.id, error, states.FAILURE, request=request)
        transport.bury(message.delivery, error.message, task_id=message.id, task=message.raw[0])
        return error

    # -- the end -----------------------------------------------------------------------------------------------------

    def _makes_progress(self) -> bool:
        """Whether what this process holds has a chance here; while not, the transport leaves it to others."""
        if self._stopping.is_set() or self.engine is None or self.watchdog is None:
            return True
        return self.engine.alive and self.watchdog.alive

    def _on_tick(self) -> None:
        if self._stopping.is_set() and _is_cold():
            self._end_soon()  # it may have been a warm shutdown till now, which waits for the device
        if self.engine is None or self.preparer is None:  # its first models are being loaded; `on_start` hears of them
            return
        if not self.engine.alive and not self._stopping.is_set():
            self._die(EXIT_DEVICE, "the device thread has ended, which is a bug", [])
        self.engine.expire()
        self.preparer.expire()

    def _on_fits(self, model: str, group: Any, max_items: int) -> None:
        if self.sizes is not None:
            self.sizes.learn(model, group, max_items)

    def _on_device_lost(self, why: str, jobs: Sequence[Message]) -> None:
        self._die(EXIT_DEVICE, f"the device is lost: {why}", jobs)

    def _on_hung(self, activity: Activity) -> None:
        what = f"{activity.what} of model {activity.model} took longer than {activity.limit} = {activity.limit_s:g} s"
        logger.critical("%s, over %d job(s). Its thread is here:\n%s", what, len(activity.jobs), activity.stack())
        self._die(EXIT_HUNG, what, activity.jobs)

    def _die(self, code: int, why: str, jobs: Sequence[Message]) -> NoReturn:
        def settle(timeout_s: float) -> None:
            if self.settler is not None:
                self.settler.finish(timeout_s)

        last_words.die(code, why, jobs, settle, self.app.backend.client)

    # -- models that come and go -------------------------------------------------------------------------------------

    def load_model(self, name: str, consumer: Any, *, reload: bool = False) -> str:
        """Begin to load a model; its status from now on. On Celery's event loop (see `nograd.tasks.remote`)."""
        return "loading" if self.hosting is None else self.hosting.load(name, self._queues(consumer), reload=reload)

    def unload_model(self, name: str, consumer: Any) -> str:
        """Begin to unload a model; its status from now on. On Celery's event loop (see `nograd.tasks.remote`)."""
        return "loading" if self.hosting is None else self.hosting.unload(name, self._queues(consumer))

    def _queues(self, consumer: Any) -> Queues:
        queues = self.app.amqp.queues

        def consume(name: str, then: Callable[[], None]) -> None:
            queue = queue_name(name)
            if queue not in queues:
                queues.add(Queue(queue, routing_key=queue))
            try:
                if consumer.task_consumer is None:  # just reconnecting; it will consume what is selected
                    queues.select_add(queues[queue])
                else:
                    consumer.add_task_queue(queue)
            finally:
                then()

        def cancel(name: str, then: Callable[[], None]) -> None:
            try:
                if consumer.task_consumer is None:
                    queues.deselect(queue_name(name))
                else:
                    consumer.cancel_task_queue(queue_name(name))
            finally:
                then()

        return Queues(
            lambda name, then: consumer.call_soon(consume, name, then),
            lambda name, then: consumer.call_soon(cancel, name, then),
        )

    def _give_back(self, handles: Iterable[Handle]) -> None:
        """Return messages that nobody has ended to the head of their queues, in order, and forget them."""
        given = [handle for handle in handles if handle.claim()]
        transport.give_back([handle.delivery for handle in given])
        for handle in given:
            if handle.celery.request is not None:
                state.task_ready(handle.celery.request)

    def _take_back(self, message: Message, name: str) -> bool:
        """Give back a message that came for a model after it was unloaded; False if that is no help."""
        if self.hosting is None or not self.hosting.knows(name) or message.delivery is None:
            return False
        if message.delivery.delivery_info.get("routing_key") in self.app.amqp.queues.consume_from:
            return False  # it would come again at once: somebody sent it through the queue of another model
        self._give_back([message])
        return True

    # -- what others may know ----------------------------------------------------------------------------------------

    def register_with_event_loop(self, loop: Any) -> None:
        """Celery's consumer begins with a connection: its first one, or another after that was lost."""
        # Before a message is read from it; and once it listens to remote control, which this very turn begins with.
        # Whoever cancels writes it down first: so it is either read or heard.
        loop.call_soon(self._recall_cancelled)
        loop.call_soon(loop.call_soon, self._recall_cancelled)

    def _recall_cancelled(self) -> None:
        """Read which jobs were cancelled while this worker could not hear it: on its loop, where Celery keeps them."""
        try:
            for task_id in cancelled.recall(self.app.backend.client):
                revoked.add(task_id)
        except Exception as err:  # noqa: BLE001 - any trouble with Redis; jobs do not depend on it
            logger.warning("jobs that were cancelled while this worker had no connection may run: %s", err)

    def _books(self) -> Any:
        """The Redis of the results, where workers also keep what they know of jobs, models and backfills."""
        backend = self.app.backend
        client = getattr(backend, "client", None)
        if not callable(getattr(client, "register_script", None)):
            raise ConfigError(
                f"the app {self.app.main} has {type(backend).__name__} for its results; the pool needs "
                'Redis there (result_backend = "redis://…")'
            )
        return client

    def _names(self, file: ModelFile) -> list[str]:
        """The models whose queues this worker consumes (``-Q`` narrows them)."""
        consumed = self.app.amqp.queues.consume_from
        names = [name for name in file.specs if queue_name(name) in consumed]
        if not names:
            raise ConfigError(
                f"{file.path}: this worker consumes {', '.join(consumed) or 'no queue'}, the queue of none of its "
                f"models; their queues are {', '.join(queue_name(name) for name in file.specs)}"
            )
        return names

    def _largest(self) -> int:
        models = list(self.engine.models.values()) if self.engine is not None else []
        return max((model.spec.batch.max_items for model in models), default=1)

    def _warn_of_small_batches(self) -> None:
        largest = self._largest()
        if self.limit < largest:
            logger.warning(
                "--concurrency %d lets this worker hold %d messages: batches of single inputs never get to %d",
                self.limit, self.limit, largest,
            )  # fmt: skip

    def _announce(self) -> None:
        """There are other models than before."""
        if self.intake is not None:
            self.intake.resize(self._largest())
        self._warn_of_small_batches()
        try:
            self._register()
        except Exception as err:  # noqa: BLE001 - as in `_keep_known`, which tries again
            logger.warning("the models could not be registered in Redis (%s)", err)

    def _register(self) -> None:
        models = list(self.engine.models.values()) if self.engine is not None else []
        cards = [registry.ModelCard.of(model.name, model.spec, version=model.version) for model in models]
        registry.register(self.app.backend.client, cards)

    def _keep_known(self) -> None:
        wait = 0.0
        while not self._stopping.wait(wait):
            try:
                self._register()
                wait = MODELS_RENEW_S
            except Exception as err:  # noqa: BLE001 - any trouble with Redis; jobs do not depend on it
                wait = 5.0
                logger.warning("the models could not be registered in Redis (%s); trying again in %.0f s", err, wait)

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        if self.engine is not None:
            info["device"] = str(self.engine.device)
            info["threads"] = self._threads
            interactive, bulk = self.engine.queue.waiting
            info["waiting_items"], info["waiting_bulk_items"] = interactive + bulk, bulk
            info["settled"] = dict(self.settler.counts) if self.settler is not None else {}
            info["hosting"] = self.hosting.report() if self.hosting is not None else {}
            info["ready"] = self.hosting is not None and self.hosting.ready
            info["memory_budget"] = self.engine.memory.budget
            info["models"] = self.engine.report()
        return info


def _is_cold() -> bool:
    return state.should_terminate not in (None, False)


def _run_each(tasks: list[Task]) -> None:
    for task in tasks:
        task.run()


def _run_chunks(chunks: list[Task]) -> None:
    try:
        transport.resume()  # none waits any more: `TaskPool._room` has some for the next one
    finally:
        _run_each(chunks)


def _withdraw_each(handles: list[Handle]) -> None:
    for handle in handles:
        handle.withdraw()


def _mark_suspects(jobs: Sequence[Message]) -> None:
    """Before a forward: if this process dies now, it was over one of these."""
    deliveries = [job.delivery for job in jobs]
    transport.suspect(deliveries)
    transport.started(deliveries)


def _model_file() -> ModelFile:
    models = Settings.from_env().models
    if models is None:
        raise ConfigError("no model file: set NOGRAD_MODELS, or start the worker with `nograd worker --models FILE`")
    return load_model_file(models)
