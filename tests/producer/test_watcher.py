"""One thread asks for everybody: how often, for how many, and what it does about trouble."""

import os
import threading
import time
from concurrent.futures import wait

import pytest

from nograd.producer import watcher
from nograd.producer.outcomes import PENDING, Outcome
from nograd.producer.watcher import Watcher
from nograd.tasks import BrokerUnavailable, ResultTimeout

DONE = Outcome("SUCCESS", 1)


class Store:
    """Outcomes that appear at a given time; remembers what was asked, and when."""

    def __init__(self, ready_after=0.0):
        self.ready_at = time.monotonic() + ready_after
        self.asked = []
        self.trouble = None

    def fetch(self, job_ids):
        self.asked.append((time.monotonic(), list(job_ids)))
        if self.trouble is not None:
            raise self.trouble
        return [DONE if time.monotonic() >= self.ready_at else PENDING for _ in job_ids]


@pytest.fixture
def watch():
    made = []

    def make(store):
        made.append(Watcher(getattr(store, "fetch", store)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_ready_result_is_found_at_once(watch):
    future = watch(Store()).watch("a")
    assert future.result(1) == DONE


def test_the_longer_it_takes_the_less_often_it_is_asked_for(watch):
    store = Store(ready_after=0.6)
    started = time.monotonic()
    watch(store).watch("a").result(5)
    late = time.monotonic() - started - 0.6
    gaps = [b[0] - a[0] for a, b in zip(store.asked, store.asked[1:], strict=False)]
    assert late < 0.15  # an eighth of the wait, and the machine's own delays
    assert len(gaps) < 60
    assert max(gaps[-3:-1]) > 5 * min(gaps[:3])


def test_one_question_serves_many_waits(watch):
    store = Store(ready_after=0.3)
    one = watch(store)
    futures = [one.watch(str(number)) for number in range(500)]
    twice = one.watch("0")
    _done, waiting = wait([*futures, twice], 5)
    assert not waiting
    assert max(len(ids) for _, ids in store.asked) > 100
    assert sum(thread.name == "nograd-watcher" for thread in threading.enumerate()) == 1


def test_a_question_is_never_larger_than_its_limit(watch):
    store = Store(ready_after=0.2)
    one = watch(store)
    wait([one.watch(str(number)) for number in range(3000)], 10)
    assert max(len(ids) for _, ids in store.asked) <= watcher.MAX_KEYS


def test_nobody_waiting_means_nobody_asking(watch):
    store = Store(ready_after=60)
    one = watch(store)
    future = one.watch("a")
    time.sleep(0.1)
    future.cancel()
    time.sleep(0.1)
    asked = len(store.asked)
    time.sleep(0.2)
    assert len(store.asked) == asked
    assert not one._watched


def test_the_thread_ends_when_idle_and_comes_back(watch, monkeypatch):
    monkeypatch.setattr(watcher, "IDLE_S", 0.05)
    one = watch(Store())
    one.watch("a").result(1)
    time.sleep(0.3)
    assert one._thread is None
    assert one.watch("b").result(1) == DONE


def test_an_address_that_never_answered_is_told_at_once(watch):
    store = Store()
    store.trouble = BrokerUnavailable("no")
    with pytest.raises(BrokerUnavailable):
        watch(store).watch("a").result(1)


def test_an_error_nobody_foresaw_reaches_who_waits_and_the_thread_goes_on(watch):
    store = Store()
    store.trouble = ValueError("surprise")
    one = watch(store)
    with pytest.raises(ValueError, match="surprise"):
        one.watch("a").result(1)
    store.trouble = None
    assert one.watch("b").result(1) == DONE


def test_closing_while_redis_is_away_troubles_nobody(watch, monkeypatch):
    died = []
    monkeypatch.setattr(threading, "excepthook", lambda args: died.append(args.exc_value))
    answers = iter([[PENDING]])
    hanging, go_on = threading.Event(), threading.Event()

    def fetch(_job_ids):
        for answer in answers:  # the first question only
            return answer
        hanging.set()
        go_on.wait(10)
        raise BrokerUnavailable("away")

    one = watch(fetch)
    future = one.watch("a")
    assert hanging.wait(5)
    thread = one._thread
    started = time.monotonic()
    one.close()
    assert time.monotonic() - started < 3  # not the 30 s a silent Redis may take
    with pytest.raises(ResultTimeout, match="closed"):
        future.result(0)
    go_on.set()
    thread.join(5)
    assert not thread.is_alive()
    assert died == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process_waits_with_a_thread_of_its_own(watch):
    one = watch(Store())
    one.watch("a").result(1)
    child = os.fork()
    if child == 0:
        os._exit(0 if one.watch("b").result(5) == DONE else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
