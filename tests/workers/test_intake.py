"""The laws of `nograd.workers.intake`."""

import threading

import pytest

from nograd.tasks.keys import BULK, INTERACTIVE
from nograd.workers.intake import BULK_BATCHES, BULK_TASKS, INTERACTIVE_BATCHES, ITEMS_UNKNOWN, Intake


@pytest.fixture
def waiting():
    return [0, 0]


@pytest.fixture
def told():
    return []


@pytest.fixture
def intake(waiting, told):
    return Intake(in_flight=256, largest=64, waiting=lambda: tuple(waiting), on_room=lambda: told.append(1))


def one_read(intake, items, bulk=False):
    intake.came(bulk=bulk)
    intake.read(items, bulk=bulk)
    intake.began(bulk=bulk)


def test_as_long_as_nobody_knows_how_large_messages_are_few_are_asked_for(intake):
    assert intake.room(INTERACTIVE) == INTERACTIVE_BATCHES * 64 / ITEMS_UNKNOWN
    assert intake.room(BULK) == BULK_BATCHES * 64 / ITEMS_UNKNOWN


def test_messages_of_one_item_come_in_numbers_and_large_ones_singly(intake):
    for _ in range(40):
        one_read(intake, 1, bulk=True)
    assert intake.room(BULK) == pytest.approx(128, abs=2)
    one_read(intake, 64, bulk=True)
    assert intake.room(BULK) == 2


def test_what_waits_and_what_is_unread_takes_up_room(intake, waiting):
    one_read(intake, 64, bulk=True)
    waiting[1] = 64
    assert intake.room(BULK) == 1
    intake.came(bulk=True)
    assert intake.room(BULK) == 0


def test_bulk_does_not_close_interactive(intake, waiting):
    waiting[1] = 100_000
    assert intake.room(BULK) == 0
    assert intake.room(INTERACTIVE) > 0


def test_who_holds_nothing_may_have_one_message_however_large(intake):
    one_read(intake, 10_000, bulk=True)
    assert intake.room(BULK) == 1
    intake.came(bulk=True)
    assert intake.room(BULK) == 0


def test_room_is_told_once_and_only_to_who_was_refused(intake, waiting, told):
    waiting[1] = 128
    intake.eased()
    assert not told
    assert intake.room(BULK) == 0
    intake.eased()
    assert not told  # nothing has become less
    waiting[1] = 100
    intake.eased()
    intake.eased()
    assert told == [1]


def test_room_that_is_made_while_it_is_being_asked_for_is_told(told):
    waits = [[0, 128], [0, 0]]

    def waiting():
        now = waits.pop(0)
        if waits:
            intake.eased()  # the device thread, in the middle
        return now

    intake = Intake(256, 64, waiting, lambda: told.append(1))
    assert intake.room(BULK) == 0
    assert told == [1]


def test_bulk_leaves_interactive_messages_half_of_the_credit():
    intake = Intake(in_flight=16, largest=64, waiting=lambda: (0, 0), on_room=lambda: None)
    for _ in range(40):
        one_read(intake, 1, bulk=True)
    assert intake.room(BULK) == 8


def test_few_bulk_tasks_of_other_kinds_wait_for_a_thread(intake):
    intake.came(bulk=True)
    intake.began_task(bulk=True)
    held = 0
    while intake.room(BULK):
        intake.came(bulk=True)
        held += 1
    assert held <= BULK_TASKS


def test_a_model_that_is_added_may_make_the_batches_larger(intake):
    before = intake.room(INTERACTIVE)
    intake.resize(640)
    assert intake.room(INTERACTIVE) == 10 * before


def test_each_thread_gets_a_message_while_nobody_knows_how_large_they_are():
    intake = Intake(in_flight=64, largest=16, waiting=lambda: (0, 0), on_room=lambda: None, threads=8)
    for _ in range(8):
        assert intake.room(INTERACTIVE) > 0
        intake.came(bulk=False)
    assert intake.room(INTERACTIVE) == 0


def test_a_message_that_is_being_prepared_counts_for_the_items_it_has(intake, waiting):
    one_read(intake, 64, bulk=True)
    intake.came(bulk=True)
    intake.came(bulk=True)
    assert intake.room(BULK) == 0  # two unread ones may be as large as the last
    intake.read(1, bulk=True)
    assert intake.room(BULK) == 2  # of 128 items 1 + 48.25
    intake.began(bulk=True)
    other = threading.Thread(target=lambda: intake.read(10_000, bulk=True))
    other.start()
    other.join()
    assert intake.room(BULK) == 0


def test_an_interactive_message_prepared_in_the_middle_of_a_bulk_one_is_counted_by_itself(intake):
    for _ in range(40):
        one_read(intake, 1, bulk=True)
        one_read(intake, 1)
    free = intake.room(INTERACTIVE), intake.room(BULK)
    intake.came(bulk=True)
    intake.read(20, bulk=True)
    one_read(intake, 1)
    assert intake.room(BULK) < free[1]
    assert intake.room(INTERACTIVE) == free[0]
    intake.began(bulk=True)
    for _ in range(40):
        one_read(intake, 1, bulk=True)
    assert intake.room(BULK) == free[1]


def test_who_was_refused_is_told_as_soon_as_messages_turn_out_to_be_small(intake, told):
    while intake.room(BULK):
        intake.came(bulk=True)
    intake.read(1, bulk=True)
    assert told == [1]
