"""The hints of a backfill in a real Redis: issued once, claimed by one, gone without harm."""

from __future__ import annotations

import threading
import time

import pytest
import redis

from nograd.tasks.backfill import window as module
from nograd.tasks.backfill.window import Cursor, Traffic, Window


@pytest.fixture
def client(redis_url):
    client = redis.Redis.from_url(redis_url)
    client.flushdb()
    yield client
    client.close()


@pytest.fixture
def window(client):
    return Window(client, "job")


def test_issues_in_order_as_many_as_are_needed(window):
    assert window.top_up(range(100), most=50) == [0, 1]
    assert window.top_up(range(100), most=50) == []
    window.claim(0, "a")
    assert window.traffic() == Traffic(queued=1, running=1)
    assert window.top_up(range(100), most=50) == [2, 3]


def test_the_window_grows_with_the_workers_not_with_the_plan(window):
    done = 0
    for worker in range(5):
        window.top_up(range(10_000), most=1000)
        window.claim(worker, f"w{worker}")
        done = window.traffic().running
    window.top_up(range(10_000), most=1000)
    assert (done, window.traffic().queued) == (5, 5 + module.SPARE)


def test_many_who_top_up_issue_each_chunk_once(client):
    issued: list[int] = []
    lock = threading.Lock()

    def pump():
        mine = Window(client, "job")
        for _ in range(20):
            chunks = mine.top_up(range(200), most=200, spare=200)
            with lock:
                issued.extend(chunks)

    threads = [threading.Thread(target=pump) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(issued) == list(range(200))


def test_a_chunk_has_one_owner(window):
    assert window.claim(7, "a")
    assert not window.claim(7, "b")
    assert window.claim(7, "a")  # renewed
    window.release(7, "b")  # not its own
    assert not window.claim(7, "b")
    window.release(7, "a")
    assert window.claim(7, "b")


def test_the_claim_of_a_silent_owner_ends(client):
    silent, window = Window(client, "job", claim_s=0.05), Window(client, "job")
    assert silent.claim(7, "a")
    time.sleep(0.1)
    assert window.traffic() == Traffic(0, 0)
    assert window.claim(7, "b")
    assert not silent.claim(7, "a")


def test_a_running_chunk_is_not_issued(window):
    window.claim(3, "a")
    assert window.top_up([3, 4], most=5) == [4]


def test_after_a_flush_the_owner_goes_on_and_nobody_else_is_blocked(window, client):
    window.claim(3, "a")
    client.flushdb()
    assert window.claim(3, "a")
    assert window.top_up([3, 4], most=5) == [4]


def test_a_cursor_survives_the_death_of_its_owner_and_ends_with_the_chunk(client):
    silent, window = Window(client, "job", claim_s=0.05), Window(client, "job")
    silent.claim(3, "a")
    silent.note(3, Cursor(first=64, count=32))
    time.sleep(0.1)
    assert window.claim(3, "b")
    assert window.cursor(3) == Cursor(first=64, count=32)
    window.release(3, "b")
    assert window.cursor(3) is None
    client.hset("nograd:backfill:job:cursors", "4", b"\xff")
    assert window.cursor(4) is None


def test_a_message_that_was_not_sent_is_missing_again(window):
    assert window.top_up([3], most=5) == [3]
    window.forget(3)
    assert window.top_up([3], most=5) == [3]


def test_a_chunk_whose_message_comes_back_by_itself_is_not_issued_meanwhile(window):
    assert window.top_up([3], most=5) == [3]
    window.claim(3, "a")
    window.release(3, "a")
    window.expect(3)
    assert window.top_up([3], most=5) == []
    assert window.claim(3, "b")
    assert window.traffic() == Traffic(queued=0, running=1)


def test_troubles_are_counted_anew_after_a_resume(window):
    assert [window.count_troubles(3), window.count_troubles(3), window.count_troubles(4)] == [1, 2, 1]
    window.stop("no room")
    assert window.count_troubles(3) == 3
    window.wish = "run"
    assert window.count_troubles(3) == 1


def test_wishes(window):
    assert window.wish is None
    window.wish = "pause"
    assert window.wish == "pause"
    window.stop("no room")
    assert (window.wish, window.why) == ("pause", "no room")
    window.wish = "run"
    assert (window.wish, window.why) == ("run", None)


def test_a_wish_from_before_a_moment_is_not_heeded_after_it(window):
    before = window.now()
    window.stop("no room")
    assert window.wish_since(before) == "pause"
    assert window.wish_since(window.now()) is None
    window.wish = "cancel"
    assert window.wish_since(before) == "cancel"


def test_counts_what_failed(window):
    assert window.count_failures(1) == 1
    assert window.count_failures(2) == 3


def test_every_key_ends(window, client):
    window.top_up(range(10), most=5)
    window.claim(0, "a")
    window.note(0, Cursor(first=0, count=1))
    window.stop("no room")
    window.count_failures(1)
    window.count_troubles(0)
    window.out = "/out"
    keys = client.keys("nograd:backfill:*")
    assert len(keys) == 9
    assert all(client.ttl(key) > 0 for key in keys)
    window.clear()
    assert client.keys("nograd:backfill:*") == []
