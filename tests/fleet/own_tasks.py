"""A user's own tasks, for the canvas tests: `-I own_tasks` brings them into any worker. What happens stands in Redis.

Stock workers import this, too, and must not import nograd with it: its ``nograd.predict`` would be theirs.
"""

import json
import os
import time

import redis
from celery import shared_task

LOG = "own:log:{}"
#: of a run that may end now
GO_ON = "own:go-on:{}"
KEEP_S = 600


def store():
    return redis.Redis.from_url(os.environ["NOGRAD_REDIS_URL"], decode_responses=True)


def note(run, what):
    with store() as client:
        client.rpush(LOG.format(run), json.dumps(what))
        client.expire(LOG.format(run), KEEP_S)


def times(run):
    """How often this was asked for that run, this time included."""
    with store() as client:
        client.expire(f"own:times:{run}", KEEP_S)
        return client.incr(f"own:times:{run}")


class Busy(Exception):  # noqa: N818 - a state
    """No memory at the moment."""


def triple(value):
    """What the model and the plain task both do."""
    if value == "bad":
        raise ValueError("cannot be tripled")
    if isinstance(value, dict):  # {"busy until": times, "run": …}
        if times(value["run"]) < value["busy until"]:
            raise Busy("no memory left")
        return 3 * value["busy until"]
    return 3 * sum(value) if isinstance(value, list) else 3 * value


@shared_task(name="own.add")
def add(a, b):
    return a + b


@shared_task(name="own.total")
def total(values):
    return sum(values)


@shared_task(name="own.fail")
def fail(*_):
    raise ValueError("own task failed")


@shared_task(name="own.flaky", bind=True, max_retries=3)
def flaky(self, value, run):
    if times(run) < 3:
        raise self.retry(countdown=0.1)
    return value + self.request.retries


@shared_task(name="own.seen")
def seen(value, run):
    note(run, value)
    return value


@shared_task(name="own.told")
def told(*args, run):
    """An errback: the old kind gets the id of what failed, the new kind the request, the error and the traceback."""
    error = args[1] if len(args) > 1 else None
    note(run, ["errback", len(args), type(error).__name__, str(error) if error is not None else ""])


@shared_task(name="own.delegate", bind=True)
def delegate(self, value):
    return self.replace(self.app.signature("nograd.predict", (value,), {"model": "triple"}))


class Triple:
    """The same as a model."""

    def load(self, device):
        pass

    def forward(self, batch):
        from nograd.tasks.errors import Overloaded

        try:
            return [triple(value) for value in batch]  # one bad item, and the forward of the whole batch raises
        except Busy as err:
            raise Overloaded(str(err)) from err


class Lingers:
    """Takes as long as it is told, the first time it is asked, or until `GO_ON`.

    Its input: {"run": …, "seconds": …, "where": "forward", or "prepare"}.
    """

    def load(self, device):
        pass

    def prepare(self, value):
        if value.get("where") == "prepare":
            self.linger(value)
        return value

    def forward(self, batch):
        for value in batch:
            if value.get("where", "forward") == "forward":
                self.linger(value)
        return [value["run"] for value in batch]

    def linger(self, value):
        if times(value["run"]) == 1:
            ends = time.monotonic() + value["seconds"]
            with store() as client:
                while time.monotonic() < ends and not client.exists(GO_ON.format(value["run"])):
                    time.sleep(0.02)
