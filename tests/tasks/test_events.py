"""Laws: receivers read what Celery would have sent; the clock goes forward."""

from __future__ import annotations

import datetime as dt
import threading

from hypothesis import given
from hypothesis import strategies as st
from kombu import Connection
from kombu.utils import json as kombu_json

from nograd.tasks.events import Clock, EventProducer

FIELDS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
EVENTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["task-received", "task-succeeded", "worker-online", "task-mine"])},
    optional={"args": FIELDS, "eta": FIELDS, "timings": st.dictionaries(st.text(), FIELDS)},
)


def sent(events):
    """The body of a message, decoded as whoever receives it does."""
    with Connection("memory://") as connection:
        body, content_type, encoding = EventProducer(connection.channel())._prepare(events, "json", headers={})
    assert (content_type, encoding) == ("application/json", "utf-8")
    return kombu_json.loads(body)


@given(st.lists(EVENTS, max_size=5))
def test_events_are_read_as_celery_would_have_sent_them(events):
    assert sent(events) == kombu_json.loads(kombu_json.dumps(events))


def test_a_user_s_event_keeps_its_types():
    when = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
    assert sent([{"type": "task-mine", "when": when}]) == [{"type": "task-mine", "when": when}]


def test_one_event_alone_goes_celery_s_way():
    assert sent({"type": "worker-online"}) == {"type": "worker-online"}


def test_the_clock_goes_forward_in_each_thread_without_a_number_twice():
    clock, seen = Clock(), []

    def tick():
        seen.append([clock.forward() for _ in range(20_000)])

    threads = [threading.Thread(target=tick) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(numbers == sorted(numbers) for numbers in seen)
    assert len({number for numbers in seen for number in numbers}) == 80_000


def test_the_clock_goes_past_what_was_received_and_never_back():
    clock = Clock()
    assert clock.adjust(100) == 101
    assert clock.forward() == 102
    assert clock.adjust(7) == 103
    assert clock.value == 103
