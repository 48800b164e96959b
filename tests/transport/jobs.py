"""The Celery app of the worker processes that the tests start; everything it needs comes from the environment."""

from __future__ import annotations

import json
import os
import time

import redis
from celery import Celery
from kombu import Queue

URL = os.environ.get("JOBS_URL", "redis://localhost:6379/0")
LOG_URL = os.environ.get("JOBS_LOG_URL", URL)

app = Celery("jobs", broker=URL, backend=os.environ.get("JOBS_BACKEND", LOG_URL), set_as_current=False)
app.conf.update(
    task_acks_late=True,
    task_default_queue="jobs",
    worker_prefetch_multiplier=4,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    worker_redirect_stdouts=False,
    result_backend_always_retry=True,
    result_backend_max_retries=30,
    broker_transport_options=json.loads(os.environ.get("JOBS_OPTIONS", "{}")),
)
app.conf.update(json.loads(os.environ.get("JOBS_CONF", "{}")))
if os.environ.get("JOBS_ALIASES"):
    from nograd.tasks.transport import register_aliases

    register_aliases()
elif os.environ.get("JOBS_TRANSPORT"):
    app.conf.broker_transport = os.environ["JOBS_TRANSPORT"]
if os.environ.get("JOBS_QUEUES"):
    app.conf.task_queues = [Queue(name, routing_key=name) for name in os.environ["JOBS_QUEUES"].split(",")]

log = redis.Redis.from_url(LOG_URL, socket_timeout=30, retry=redis.retry.Retry(redis.backoff.ConstantBackoff(0.2), 150))


@app.task(name="jobs.noop", ignore_result=True)
def noop() -> None:
    """Do nothing."""


@app.task(name="jobs.record", ignore_result=True)
def record(job: int) -> None:
    """Leave a trace."""
    log.rpush("ran", job)


@app.task(name="jobs.long", bind=True)
def long(self, job: int, seconds: float) -> int:
    """Leave a trace at the start and at the end."""
    log.rpush("started", json.dumps([job, os.getpid()]))
    time.sleep(seconds)
    log.rpush("ran", job)
    return job


@app.task(name="jobs.gated")
def gated(job: int) -> int:
    """The same, and in between wait until somebody opens the gate."""
    log.rpush("started", json.dumps([job, os.getpid()]))
    while not log.exists("open"):
        time.sleep(0.02)
    log.rpush("ran", job)
    return job


@app.task(name="jobs.exit", bind=True)
def kill_worker(self, job: int) -> None:
    """Take the whole process along."""
    log.rpush("started", json.dumps([job, os.getpid()]))
    os._exit(9)


@app.task(name="jobs.headers", bind=True)
def headers(self) -> dict:
    """What arrived with the message."""
    return {"count": self.request.get("x-delivery-count"), "redelivered": self.request.delivery_info.get("redelivered")}
