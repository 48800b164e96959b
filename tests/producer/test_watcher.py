"""One thread asks for everybody: how often, for how many, and what it does about trouble."""

import os
import threading
import time
from concurrent.futures import Future, wait
from types import SimpleNamespace

import pytest

from nograd.producer import watcher
from nograd.producer.outcomes import PENDING, Outcome
from nograd.producer.watcher import Watcher
from nograd.tasks import BrokerUnavailable, ResultTimeout
from waiting import PATIENCE_S, until

DONE = Outcome("SUCCESS", 1)


class Store:
    """Outcomes that are there, or appear when a test says so; remembers for what it was asked."""

    def __init__(self, *, ready=True):
        self.ready = ready
        self.asked = []
        self.trouble = None

    def fetch(self, job_ids):
        self.asked.append(list(job_ids))
        if self.trouble is not None:
            raise self.trouble
        return [DONE if self.ready else PENDING for _ in job_ids]


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
    assert future.result(PATIENCE_S) == DONE


def test_it_is_asked_for_until_it_is_there(watch):
    store = Store(ready=False)
    future = watch(store).watch("a")
    until(lambda: len(store.asked) > 5)
    assert not future.done()
    store.ready = True
    assert future.result(PATIENCE_S) == DONE


@pytest.mark.parametrize(
    ("waited", "jobs", "pause"),
    [(0, 1, 0.002), (0.008, 1, 0.002), (0.16, 1, 0.02), (9, 1, 0.05), (9, 5000, 0.5), (1, 5000, 0.125)],
)
def test_the_longer_it_takes_and_the_more_there_are_the_less_often_it_is_asked_for(monkeypatch, waited, jobs, pause):
    monkeypatch.setattr(watcher, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    one = Watcher(lambda _: [])  # its thread does not run
    for n in range(jobs):
        one._watched[str(n)] = watcher._Watched(str(n), 1000.0 - waited, [Future()])
    one._on_outcomes([("0", PENDING)])
    ((when, _, job_id),) = one._due
    assert (when - 1000.0, job_id) == (pytest.approx(pause), "0")


def test_one_question_serves_many_waits(watch):
    store = Store(ready=False)
    one = watch(store)
    before = threading.active_count()
    futures = [one.watch(str(number)) for number in range(500)]
    twice = one.watch("0")
    until(lambda: max(map(len, store.asked), default=0) > 100)
    assert threading.active_count() <= before + 1
    store.ready = True
    _done, waiting = wait([*futures, twice], PATIENCE_S)
    assert not waiting


def test_a_question_is_never_larger_than_its_limit(watch):
    store = Store(ready=False)
    one = watch(store)
    futures = [one.watch(str(number)) for number in range(3000)]
    until(lambda: max(map(len, store.asked), default=0) == watcher.MAX_KEYS)
    store.ready = True
    assert not wait(futures, PATIENCE_S).not_done
    assert max(map(len, store.asked)) == watcher.MAX_KEYS


def test_nobody_waiting_means_nobody_asking(watch):
    store = Store(ready=False)
    one = watch(store)
    future = one.watch("a")
    until(lambda: store.asked)
    future.cancel()
    until(lambda: not one._watched)

    def is_over():  # after one more question, which may have been on its way
        asked = len(store.asked)
        time.sleep(0.2)
        return len(store.asked) == asked

    until(is_over)


def test_the_thread_ends_when_idle_and_comes_back(watch, monkeypatch):
    monkeypatch.setattr(watcher, "IDLE_S", 0.05)
    one = watch(Store())
    one.watch("a").result(PATIENCE_S)
    until(lambda: one._thread is None)
    assert one.watch("b").result(PATIENCE_S) == DONE


def test_an_address_that_never_answered_is_told_at_once(watch):
    store = Store()
    store.trouble = BrokerUnavailable("no")
    with pytest.raises(BrokerUnavailable):
        watch(store).watch("a").result(PATIENCE_S)


def test_an_error_nobody_foresaw_reaches_who_waits_and_the_thread_goes_on(watch):
    store = Store()
    store.trouble = ValueError("surprise")
    one = watch(store)
    with pytest.raises(ValueError, match="surprise"):
        one.watch("a").result(PATIENCE_S)
    store.trouble = None
    assert one.watch("b").result(PATIENCE_S) == DONE


def test_closing_while_redis_is_away_troubles_nobody(watch, monkeypatch):
    died = []
    monkeypatch.setattr(threading, "excepthook", lambda args: died.append(args.exc_value))
    answers = iter([[PENDING]])
    hanging, go_on = threading.Event(), threading.Event()

    def fetch(_job_ids):
        for answer in answers:  # the first question only
            return answer
        hanging.set()
        go_on.wait(PATIENCE_S)
        raise BrokerUnavailable("away")

    one = watch(fetch)
    future = one.watch("a")
    assert hanging.wait(PATIENCE_S)
    thread = one._thread
    one.close()
    assert thread.is_alive()  # it has not been waited for: a silent Redis may take 30 s
    with pytest.raises(ResultTimeout, match="closed"):
        future.result(0)
    go_on.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert died == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process_waits_with_a_thread_of_its_own(watch):
    one = watch(Store())
    one.watch("a").result(PATIENCE_S)
    child = os.fork()
    if child == 0:
        os._exit(0 if one.watch("b").result(PATIENCE_S) == DONE else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
