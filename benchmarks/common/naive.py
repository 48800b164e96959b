"""The Celery app most people would write: one task, one forward (``celery -A common.naive``)."""

from __future__ import annotations

import logging
import os

import torch
from celery import Celery
from kombu import Queue

from common.hosted import MLP

app = Celery(
    "naive", broker=os.environ["NOGRAD_REDIS_URL"], backend=os.environ["NOGRAD_REDIS_URL"], set_as_current=False
)
app.conf.update(
    task_acks_late=True,
    worker_send_task_events=True,
    broker_connection_retry_on_startup=True,
    task_queues=[Queue("nograd.mlp", routing_key="nograd.mlp")],
)
model = MLP().eval()
# By its name: nothing of nograd is imported here, or its tasks would be this app's as well.
if os.environ.get("NOGRAD_LOG_JOBS") == "0":
    for name in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)


@app.task(name="nograd.predict")
def predict(_model: str, row: list[float]) -> list[float]:
    """One task, one forward."""
    with torch.no_grad():
        return model(torch.tensor([row]))[0].tolist()
