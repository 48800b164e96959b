"""How many inputs fit: what workers of one kind of device tell each other, on a real Redis."""

import json
import time

import pytest
import redis as redis_py

from nograd.tasks.keys import SAFE_SIZE_TTL_S, SAFE_SIZES
from nograd.workers import safe_sizes
from nograd.workers.safe_sizes import SafeSizes
from waiting import until

GROUP = ((3, 224, 224), b"\x81\xa1x\x01")


@pytest.fixture
def redis(redis_url):
    with redis_py.Redis.from_url(redis_url) as connection:
        connection.flushall()
        yield connection


class Worker:
    """The batch limits of a worker, and what it knows of sizes."""

    def __init__(self, redis, kind="gpu"):
        self.caps = {}
        self.sizes = SafeSizes(redis, kind, self.cap)
        self.sizes.start()

    def cap(self, model, group, most):
        self.caps[model, group] = most
        if most is None:
            del self.caps[model, group]


@pytest.fixture
def worker(redis, monkeypatch):
    monkeypatch.setattr(safe_sizes, "SYNC_S", 0.05)
    made = []

    def make(connection=redis, **options):
        made.append(Worker(connection, **options))
        return made[-1]

    yield make
    for one in made:
        one.sizes.finish()


def test_who_learns_keeps_to_it_at_once_and_the_others_soon(worker, redis):
    one, other = worker(), worker()
    one.sizes.learn("m", GROUP, 16)
    assert one.caps == {("m", GROUP): 16}
    until(lambda: other.caps == one.caps)
    assert worker().caps == one.caps  # who starts now begins with it
    other.sizes.learn("m", GROUP, 8)
    until(lambda: one.caps == {("m", GROUP): 8})
    assert 0 < redis.ttl(SAFE_SIZES + "gpu") <= SAFE_SIZE_TTL_S


def test_another_kind_of_device_learns_nothing(worker):
    one, other, smaller = worker(), worker(), worker(kind="small gpu")
    one.sizes.learn("m", GROUP, 16)
    one.sizes.learn("n", None, 4)
    until(lambda: other.caps == {("m", GROUP): 16, ("n", None): 4})
    assert smaller.caps == {}


def test_a_size_is_forgotten_after_its_time(worker, redis, monkeypatch):
    monkeypatch.setattr(safe_sizes, "SAFE_SIZE_TTL_S", 4)
    one, other = worker(), worker()
    one.sizes.learn("m", GROUP, 16)
    until(lambda: other.caps)
    until(lambda: not one.caps and not other.caps)
    until(lambda: not redis.exists(SAFE_SIZES + "gpu"))


def test_nonsense_in_redis_is_removed_and_costs_nothing_else(worker, redis):
    good = json.dumps({"max_items": 3, "until": time.time() + 100})
    redis.hset(
        SAFE_SIZES + "gpu",
        mapping={
            repr(("m", GROUP)): good,
            "no group": good,
            "('m', ": good,
            "('m', [1])": good,
            "3": good,
            b"\xff\xfe": good,
            repr(("m", 1)): "no size",
            repr(("m", 2)): json.dumps({"max_items": 3, "until": 0}),
        },
    )
    assert worker().caps == {("m", GROUP): 3}
    until(lambda: redis.hkeys(SAFE_SIZES + "gpu") == [repr(("m", GROUP)).encode()])


def test_a_group_that_cannot_be_written_down_is_kept_to_here_and_told_nobody(worker, redis):
    one, group = worker(), (object(), b"")
    one.sizes.learn("m", group, 2)
    one.sizes.learn("m", GROUP, 2)
    until(lambda: redis.exists(SAFE_SIZES + "gpu"))
    assert redis.hlen(SAFE_SIZES + "gpu") == 1
    assert one.caps == {("m", group): 2, ("m", GROUP): 2}


def test_redis_away_costs_only_the_sharing(worker):
    nowhere = redis_py.Redis(port=1, socket_connect_timeout=0.2)
    one = worker(nowhere)
    one.sizes.learn("m", GROUP, 16)
    time.sleep(0.3)
    assert one.caps == {("m", GROUP): 16}
