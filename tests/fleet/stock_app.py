"""A stock Celery app on stock kombu's transport (``celery -A stock_app``); it has only what ``-I`` brings."""

import os

from celery import Celery
from kombu import Queue

URL = os.environ.get("NOGRAD_REDIS_URL", "redis://")


def make_app(url):
    made = Celery("stock", broker=url, backend=url, set_as_current=False)
    made.conf.update(
        task_queues=[Queue("own", routing_key="own"), Queue("nograd.triple", routing_key="nograd.triple")],
        task_default_queue="own",
        result_expires=600,
        broker_connection_retry_on_startup=True,
        task_routes={"nograd.predict": {"queue": "nograd.triple"}},
    )
    return made


app = make_app(URL)
