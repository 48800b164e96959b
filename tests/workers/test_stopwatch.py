"""The stages of a message follow each other without a gap, and each forward counts once."""

import time

import pytest

from nograd.tasks.timings import Timings, read_timings
from nograd.workers.stopwatch import Forward, Stopwatch


def read(watch, **request):
    return read_timings(watch.read(request, model_version="v", worker="w@here", deaths=0))


def test_the_stages_add_up_to_the_time_in_the_worker():
    received = time.monotonic() - 10
    watch = Stopwatch(received)
    watch.prepared = received + 1
    first, second = Forward(received + 4, 2, 8), Forward(received + 7, 1.5, 3)
    for forward in (first, first, first, second, second):  # one call for each item
        watch.ran(forward)
    timings = read(watch)
    assert (timings.prepare_s, timings.device_s, timings.batch_wait_s) == (1, 3.5, 2.5)
    assert (timings.batches, timings.batch_size) == (2, 8)
    assert timings.settle_s >= 3
    assert 9.999 <= timings.total_s <= time.monotonic() - received + 0.001


def test_what_never_got_to_the_device_has_only_been_prepared():
    timings = read(Stopwatch(time.monotonic() - 2))
    assert timings.prepare_s >= 2
    assert (timings.batch_wait_s, timings.device_s, timings.settle_s, timings.batches) == (0, 0, 0, 0)


def test_what_expired_before_a_forward_has_waited():
    watch = Stopwatch(time.monotonic() - 3)
    watch.prepared = watch.received + 1
    timings = read(watch)
    assert timings.batch_wait_s >= 2
    assert timings.settle_s == 0


@pytest.mark.parametrize("sent", [None, "now", [], {}, float("nan"), float("inf"), True, 10**400])
def test_a_sent_time_that_is_none_makes_no_timing_and_no_trouble(sent):
    assert read(Stopwatch(time.monotonic()), properties={"timestamp": sent}).queue_s is None
    assert read(Stopwatch(time.monotonic()), properties=sent).queue_s is None


def test_a_sender_whose_clock_is_ahead_waited_no_time():
    assert read(Stopwatch(time.monotonic()), properties={"timestamp": time.time() + 100}).queue_s == 0
    assert read(Stopwatch(time.monotonic()), properties={"timestamp": time.time() - 100}).queue_s >= 99


@pytest.mark.parametrize("stored", [None, 3, [], {"device_s": "long"}, {"batches": None}])
def test_stored_timings_of_another_version_are_none(stored):
    assert read_timings(stored) is None


def test_fields_a_later_version_adds_are_skipped():
    assert read_timings({"device_s": 1.5, "colour": "red"}) == Timings(device_s=1.5)


@pytest.mark.parametrize("retries", [None, "two", [], {}])
def test_retries_that_are_no_number_make_no_trouble(retries):
    assert read(Stopwatch(time.monotonic()), retries=retries).retries == 0
