"""The Celery app: ``celery -A nograd.tasks worker`` and ``celery -A nograd.tasks flower`` find it here.

`create_app` makes one for any Redis; `app` is the one of this process's environment (``NOGRAD_REDIS_URL``).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from typing import Any

from celery import Celery
from celery.signals import celeryd_init, import_modules
from kombu import Queue

from .errors import ConfigError, InvalidInput
from .events import Clock
from .keys import LOG_JOBS, PREDICT_TASK, queue_name
from .modelfile import load_model_file
from .settings import Settings

#: where the batch pool is; by name, since the contract does not import the workers
POOL = "nograd.workers.pool:TaskPool"
#: scheme of the URL → result backend, by name: importing one costs a web server that only submits
BACKENDS = {
    "redis": "nograd.tasks.backend:RedisBackend",
    "rediss": "nograd.tasks.backend:RedisBackend",
    "sentinel": "nograd.tasks.backend:SentinelBackend",
}
#: what a worker holds, in batches of its largest model: one on the device, one in preparation, two on their way
BATCHES_IN_FLIGHT = 4
#: messages in flight at the least, so that tasks other than predictions are not starved beside a model of batch 1
MIN_IN_FLIGHT = 16


def create_app(settings: Settings) -> Celery:
    """A Celery app on the Redis of ``settings``.

    It does not become the current app: a web server that imports nograd keeps its own.
    """
    app = Celery(
        "nograd",
        set_as_current=False,
        broker=settings.redis_url,
        backend=settings.redis_url,
        amqp="nograd.tasks.transport:AMQP",  # the transport that loses no job
        events="nograd.tasks.events:Events",
    )
    app.clock = Clock()
    # The environment of a host program often names its own Celery's Redis: CELERY_BROKER_URL and CELERY_RESULT_BACKEND
    # come before what an app was made with, but not before these three.
    app.backend_cls = settings.redis_url
    app.loader.override_backends = BACKENDS
    app.conf.update(
        broker_read_url=settings.redis_url,
        broker_write_url=settings.redis_url,
        # The pool that batches; also with -P prefork, which Celery cannot tell from no -P.
        worker_pool=POOL,
        worker_consumer="nograd.tasks.consumer:Consumer",
        # JSON and msgpack on every path: whoever can write to Redis must not be able to run code in a worker.
        task_serializer="json",
        result_serializer="json",
        event_serializer="json",
        accept_content=["json", "msgpack"],
        result_accept_content=["json", "msgpack"],
        # A message is acknowledged when its result is stored, so that a killed worker's jobs are run by another.
        task_acks_late=True,
        # Failures are outcomes like any other: stored, then acknowledged.
        task_acks_on_failure=True,
        task_acks_on_timeout=True,
        # `--concurrency` is the number of messages in flight here; more would only be taken from idle workers.
        worker_prefetch_multiplier=1,
        # The pool holds many messages of one task name; Celery's token buckets would add a timer to each.
        worker_disable_rate_limits=True,
        # Threads of the pool finish what they run after a lost connection; Celery cannot cancel them.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # A job of an unknown queue name is a job for a model: queues are made on demand.
        task_create_missing_queues=True,
        task_routes=(route,),
        # Flower shows jobs from the moment they are sent.
        task_send_sent_event=True,
        worker_send_task_events=True,
        task_track_started=False,  # one more round trip per job; the started event tells Flower the same
        # Every result has an end.
        result_expires=settings.result_ttl_s,
        # A result is not lost because Redis was away when it was ready.
        result_backend_always_retry=True,
        result_backend_max_retries=60,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # READONLY and OOM replies must not end the worker.
        broker_channel_error_retry=True,
        # A publish that fails says so within seconds instead of holding a web request.
        task_publish_retry_policy={"max_retries": 3, "interval_start": 0, "interval_step": 0.2, "interval_max": 1},
        broker_transport_options={
            "lease_seconds": settings.lease_s,
            "socket_connect_timeout": 3,
            "socket_timeout": 30,  # longer than a blocking pop; without one a silent Redis holds a publisher for ever
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
        redis_socket_connect_timeout=3,
        redis_socket_timeout=30,
        # Not a keyword of a unix socket's connection.
        redis_socket_keepalive=None if settings.redis_url.startswith("redis+socket:") else True,
        redis_backend_health_check_interval=15,
        # The worker's log stays its own; prints of models are not Celery's business.
        worker_redirect_stdouts=False,
    )
    return app


def route(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **_: Any) -> dict[str, str] | None:  # noqa: ARG001
    """Send a prediction to the queue of its model (Celery's router protocol)."""
    if name != PREDICT_TASK:
        return None
    model = (kwargs or {}).get("model") or next(iter(args or ()), None)
    if not isinstance(model, str):
        if (options or {}).get("queue"):
            return None  # the sender knows where; the worker answers
        # A chain whose next prediction does not name its model would wait in a queue nobody reads.
        raise InvalidInput(
            f"{PREDICT_TASK}: {type(model).__name__} is no model; in a chain, name it: predict.s(model=…)"
        )
    return {"queue": queue_name(model)}


def configure_worker(
    app: Celery, settings: Settings, *, concurrency: int | None = None, queues: Iterable[str] | str | None = None
) -> None:
    """Let a worker of ``app`` consume the queues of the models of its model file.

    Args:
        app: the app the worker runs.
        settings: name the model file; without one there is nothing to consume.
        concurrency: messages in flight, if whoever starts the worker chose.
        queues: what ``-Q`` narrows its queues to. A large batch of a model that it does not host must not make it
            hoard the messages of those it does.

    Raises:
        ModelFileError: if the file is wrong.
    """
    if settings.models is None:
        return
    specs = load_model_file(settings.models).specs
    app.conf.task_queues = [Queue(queue_name(name), routing_key=queue_name(name)) for name in specs]
    if not concurrency and not app.conf.worker_concurrency:
        named = queues.split(",") if isinstance(queues, str) else queues or map(queue_name, specs)
        chosen = {name.strip() for name in named}
        largest = max((spec.batch.max_items for name, spec in specs.items() if queue_name(name) in chosen), default=1)
        app.conf.worker_concurrency = max(MIN_IN_FLIGHT, BATCHES_IN_FLIGHT * largest)


def _check_pool(pool: Any) -> None:
    name = pool if isinstance(pool, str | None) else f"{pool.__module__}:{pool.__qualname__}"
    if name not in (None, POOL, "prefork"):  # prefork is what Celery passes without -P, and means the setting
        raise ConfigError(f"-P {name}: predictions run in nograd's own pool only; leave -P away")


app = create_app(Settings.from_env())


@celeryd_init.connect  # type: ignore[untyped-decorator]
def _configure_own_worker(instance: Any = None, options: dict[str, Any] | None = None, **_: Any) -> None:
    # Celery logs and swallows an Exception of a signal handler; SystemExit is the way to refuse the start.
    if instance is None or instance.app is not app:
        return
    options = options or {}
    settings = Settings.from_env()
    try:
        _check_pool(options.get("pool_cls") or options.get("pool"))  # from Python, or from the command line
        configure_worker(app, settings, concurrency=options.get("concurrency"), queues=options.get("queues"))
    except ConfigError as err:
        sys.stderr.write(f"nograd: the worker does not start: {err.message}\n")
        raise SystemExit(2) from err
    if os.environ.get(LOG_JOBS) == "0":
        for name in ("celery.worker.strategy", "celery.app.trace"):
            logging.getLogger(name).setLevel(logging.WARNING)
    other = os.environ.get("CELERY_BROKER_URL")  # also where `celery -b` puts its argument
    if other and other != settings.redis_url:
        sys.stderr.write("nograd: CELERY_BROKER_URL and `celery -b` are not read here; set NOGRAD_REDIS_URL\n")


@import_modules.connect  # type: ignore[untyped-decorator]
def _let_flower_show_timings(sender: Any = None, **_: Any) -> None:
    # Of an event Flower shows the fields that `celery.events` lists, on the task's page and in its API.
    if sender is not app or "flower.app" not in sys.modules:
        return
    from celery.events.state import Task

    if "timings" not in Task._fields:
        Task.timings = None
        Task._fields = (*Task._fields, "timings")
