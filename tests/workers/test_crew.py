"""The laws of `nograd.workers.crew`."""

import threading

from nograd.workers.crew import Crew
from waiting import PATIENCE_S


def test_bulk_is_done_last_and_everything_is_done():
    done = []
    crew = Crew("test", 1, done.extend)
    for n in range(4):
        crew.submit(("bulk", n), bulk=True)
        crew.submit(("now", n))
    crew.start()
    assert crew.finish(PATIENCE_S)
    assert done == [("now", n) for n in range(4)] + [("bulk", n) for n in range(4)]


def test_what_nobody_has_begun_with_is_given_back_in_order():
    crew = Crew("test", 1, lambda _: None)
    for n in range(3):
        crew.submit(10 + n, bulk=True)
        crew.submit(n)
    assert crew.close() == [0, 1, 2, 10, 11, 12]
    crew.submit(5)
    assert crew.close() == []


def test_in_the_middle_of_bulk_the_others_may_overtake():
    done, begun, waits = [], threading.Event(), threading.Event()

    def work(items):
        if items == ["bulk"]:
            begun.set()
            waits.wait(PATIENCE_S)
            assert crew.overtake()
            assert not crew.overtake()
        done.extend(items)

    crew = Crew("test", 1, work)
    crew.start()
    crew.submit("bulk", bulk=True)
    begun.wait(PATIENCE_S)
    crew.submit("more bulk", bulk=True)
    crew.submit("a")
    crew.submit("b")
    waits.set()
    assert crew.finish(PATIENCE_S)
    assert done == ["a", "b", "bulk", "more bulk"]


def test_many_threads_do_each_item_once():
    done = []
    crew = Crew("test", 4, done.extend, most=3)
    crew.start()
    threads = [
        threading.Thread(target=lambda k=k: [crew.submit((k, n), bulk=n % 3 == 0) for n in range(2000)])
        for k in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert crew.finish(PATIENCE_S)
    assert sorted(done) == sorted((k, n) for k in range(3) for n in range(2000))


def test_what_waits_can_be_withdrawn_and_is_then_done_by_nobody():
    done = []
    crew = Crew("test", 1, done.extend)
    for n in range(4):
        crew.submit(n, bulk=n > 1)
    assert crew.waiting() == [0, 1, 2, 3]
    assert crew.withdraw(1)
    assert crew.withdraw(2)
    assert not crew.withdraw(1)
    crew.start()
    assert crew.finish(PATIENCE_S)
    assert done == [0, 3]
    assert not crew.withdraw(3)
