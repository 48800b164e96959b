"""The workers of the chaos run. Each job leaves its traces in the history, a file that no fault touches."""

from __future__ import annotations

import json
import os
import time

from celery import Celery

app = Celery("chaos", broker=os.environ["CHAOS_URL"], backend=os.environ["CHAOS_URL"], set_as_current=False)
app.conf.update(
    task_acks_late=True,
    task_default_queue="chaos",
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_channel_error_retry=True,
    result_backend_always_retry=True,
    result_backend_max_retries=120,
    result_expires=3600,
    worker_redirect_stdouts=False,
    broker_transport_options=json.loads(os.environ.get("CHAOS_OPTIONS", "{}")),
)
if os.environ.get("CHAOS_TRANSPORT"):
    app.conf.broker_transport = os.environ["CHAOS_TRANSPORT"]

_history = os.open(os.environ.get("CHAOS_HISTORY", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(event: str, **fields: object) -> None:
    """One line, in one write: lines of many processes do not mix, and a SIGKILL afterwards cannot take it back."""
    os.write(_history, (json.dumps({"event": event, "at": time.time(), **fields}) + "\n").encode())


@app.task(name="chaos.job")
def job(number: int, seconds: float) -> int:
    """Take a while; say so at both ends."""
    note("start", job=number, pid=os.getppid() if os.environ.get("CHAOS_POOL") == "prefork" else os.getpid())
    time.sleep(seconds)
    note("end", job=number, pid=os.getpid())
    return number
