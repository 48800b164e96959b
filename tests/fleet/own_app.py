"""A user's own Celery app that has adopted the pool and the transport, as the README says (``celery -A own_app``)."""

import os

from celery import Celery


def make_app(broker, results):
    made = Celery("own", broker=broker, backend=results, amqp="nograd.tasks.transport:AMQP", set_as_current=False)
    made.conf.update(
        worker_pool="nograd.workers.pool:TaskPool",
        broker_connection_retry_on_startup=True,
        broker_transport_options={"lease_seconds": float(os.environ.get("NOGRAD_LEASE_S", "30"))},
        result_expires=600,
    )
    return made


URL = os.environ.get("NOGRAD_REDIS_URL", "redis://")
app = make_app(URL, os.environ.get("OWN_RESULTS", URL))
