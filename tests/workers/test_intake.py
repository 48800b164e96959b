"""The laws of `nograd.workers.intake`."""

import threading

import pytest

from nograd.tasks.keys import BULK, INTERACTIVE
from nograd.workers.batching import WHOLE, share_of
from nograd.workers.intake import BULK_BATCHES, BULK_TASKS, INTERACTIVE_BATCHES, MEMORY, Intake

LARGEST = 64


class Held:
    """What waits for the device, as the batch queue tells it; grows by `add`."""

    def __init__(self):
        self.lanes = [(0, 0), (0, 0)]

    def __call__(self, lane):
        return self.lanes[lane]

    def add(self, items, *, of=LARGEST, bulk=False):
        before = self.lanes[bulk]
        self.lanes[bulk] = before[0] + items, before[1] + items * share_of(of)


@pytest.fixture
def held():
    return Held()


@pytest.fixture
def told():
    return []


@pytest.fixture
def intake(held, told):
    return Intake(in_flight=256, largest=LARGEST, held=held, on_room=lambda: told.append(1))


def one_read(intake, items=1, *, of=LARGEST, bulk=False):
    intake.came(bulk=bulk)
    intake.read(items, of=of, bulk=bulk)
    intake.began(items * share_of(of), bulk=bulk)


def all_read(intake, items=1, *, of=LARGEST, bulk=False):
    """So many messages that none before them is remembered."""
    for _ in range(40 * MEMORY):
        one_read(intake, items, of=of, bulk=bulk)


def ask_all(intake, priority):
    """Fetch as long as there is room; how many messages came."""
    came = 0
    while intake.room(priority):
        intake.came(bulk=priority == BULK)
        came += 1
    return came


@pytest.mark.parametrize("threads", [1, 8])
def test_as_long_as_nobody_knows_how_large_messages_are_each_thread_gets_one(threads):
    intake = Intake(in_flight=256, largest=LARGEST, held=Held(), on_room=lambda: None, threads=threads)
    assert ask_all(intake, INTERACTIVE) == threads
    assert ask_all(intake, BULK) == threads


def test_messages_of_one_item_come_in_numbers_and_large_ones_singly(intake):
    all_read(intake, 1, bulk=True)
    assert intake.room(BULK) == BULK_BATCHES * LARGEST
    one_read(intake, 64, bulk=True)
    assert intake.room(BULK) == BULK_BATCHES
    all_read(intake, 1)
    assert intake.room(INTERACTIVE) == INTERACTIVE_BATCHES * LARGEST


@pytest.mark.parametrize("of", [1, 7, 64, 100, 4096])
def test_each_model_alone_fills_as_many_batches_and_not_an_item_more(of):
    """Beside one of batches of 4,096, too."""
    held = Held()
    intake = Intake(in_flight=4 * 4096, largest=4096, held=held, on_room=lambda: None)
    all_read(intake, of=of)
    all_read(intake, of=of, bulk=True)
    assert intake.room(INTERACTIVE) == INTERACTIVE_BATCHES * of
    assert intake.room(BULK) == BULK_BATCHES * of
    held.add(INTERACTIVE_BATCHES * of - 1, of=of)
    assert intake.room(INTERACTIVE) == 1
    held.add(1, of=of)
    assert intake.room(INTERACTIVE) == 0


def test_batches_of_all_models_share_a_lane(held, intake):
    all_read(intake, of=4)
    held.add(3 * 64)
    assert intake.room(INTERACTIVE) == 4
    held.add(2, of=4)
    assert intake.room(INTERACTIVE) == 2
    held.add(2, of=4)
    assert intake.room(INTERACTIVE) == 0


def test_what_waits_and_what_is_unread_takes_up_room(intake, held):
    all_read(intake, 64, bulk=True)
    held.add(64, bulk=True)
    assert intake.room(BULK) == 1
    intake.came(bulk=True)
    assert intake.room(BULK) == 0


def test_bulk_does_not_close_interactive(intake, held):
    held.add(100_000, bulk=True)
    assert intake.room(BULK) == 0
    assert intake.room(INTERACTIVE) > 0


def test_who_holds_nothing_may_have_one_message_however_large(intake):
    one_read(intake, 10_000, bulk=True)
    assert intake.room(BULK) == 1
    intake.came(bulk=True)
    assert intake.room(BULK) == 0


def test_a_large_message_is_forgotten_but_not_at_once(intake):
    """Those of one model come one behind the other; then again the large ones of another."""
    all_read(intake, 1)
    one_read(intake, 64)
    for _ in range(MEMORY):
        one_read(intake, 1)
    assert intake.room(INTERACTIVE) <= 4 * INTERACTIVE_BATCHES
    all_read(intake, 1)
    assert intake.room(INTERACTIVE) == INTERACTIVE_BATCHES * LARGEST


def test_a_huge_message_is_forgotten_as_soon_as_one_that_fills_the_lane(held):
    def room_after(items):
        intake = Intake(in_flight=256, largest=LARGEST, held=held, on_room=lambda: None)
        one_read(intake, items)
        for _ in range(MEMORY):
            one_read(intake, 1)
        return intake.room(INTERACTIVE)

    assert room_after(1_000_000) == room_after(INTERACTIVE_BATCHES * LARGEST)


def test_room_is_told_once_and_only_to_who_was_refused(intake, held, told):
    held.add(128, bulk=True)
    intake.eased()
    assert not told
    assert intake.room(BULK) == 0
    intake.eased()
    assert not told  # nothing has become less
    held.add(-28, bulk=True)
    intake.eased()
    intake.eased()
    assert told == [1]


def test_room_that_is_made_while_it_is_being_asked_for_is_told(told):
    answers = [(128, 2 * WHOLE), (0, 0)]

    def held(lane):
        now = answers.pop(0)
        if answers:
            intake.eased()  # the device thread, in the middle
        return now

    intake = Intake(256, 64, held, lambda: told.append(1))
    assert intake.room(BULK) == 0
    assert told == [1]


def test_bulk_leaves_interactive_messages_half_of_the_credit(held):
    intake = Intake(in_flight=16, largest=64, held=held, on_room=lambda: None)
    all_read(intake, 1, bulk=True)
    assert intake.room(BULK) == 8
    held.add(3, bulk=True)
    intake.came(bulk=True)
    intake.came(bulk=True)
    intake.read(2, of=64, bulk=True)
    assert intake.room(BULK) == 2
    held.add(100, bulk=True)
    assert intake.room(BULK) == 0


def test_as_much_is_held_as_is_asked_for():
    intake = Intake(in_flight=1000, largest=64, held=Held(), on_room=lambda: None)
    all_read(intake, 1)
    assert intake.room(INTERACTIVE) == 1000


def test_few_bulk_tasks_of_other_kinds_wait_for_a_thread(intake):
    intake.came(bulk=True)
    intake.began_task(bulk=True)
    assert 1 <= ask_all(intake, BULK) <= BULK_TASKS


def test_interactive_tasks_of_other_kinds_come_as_many_as_may_be_in_flight(intake):
    all_read(intake, 1)
    intake.came(bulk=False)
    intake.began_task(bulk=False)
    assert ask_all(intake, INTERACTIVE) == 256


def test_a_model_of_other_batches_changes_what_its_items_take(intake):
    """Loaded again, or beside the others."""
    all_read(intake, 1)
    intake.resize(640)
    all_read(intake, 1, of=640)
    assert intake.room(INTERACTIVE) == INTERACTIVE_BATCHES * 640
    intake.resize(8)
    one_read(intake, 1, of=8)
    assert intake.room(INTERACTIVE) == 256  # of batches of 8, and so many may be in flight


def test_a_message_that_is_being_prepared_counts_for_the_items_it_has(intake):
    all_read(intake, 64, bulk=True)
    intake.came(bulk=True)
    intake.came(bulk=True)
    assert intake.room(BULK) == 0  # two unread ones may be as large as the last
    intake.read(1, of=64, bulk=True)
    assert intake.room(BULK) == 2  # one unread one, and of two batches a small part
    intake.began(bulk=True)
    other = threading.Thread(target=lambda: intake.read(10_000, of=64, bulk=True))
    other.start()
    other.join()
    assert intake.room(BULK) == 0


def test_a_message_that_is_being_prepared_counts_as_its_model_takes_it(intake):
    all_read(intake, 1)
    free = intake.room(INTERACTIVE)
    intake.came(bulk=False)
    intake.read(1, of=2, bulk=False)
    assert intake.room(INTERACTIVE) == INTERACTIVE_BATCHES * 2 - 1
    intake.began(bulk=False)
    all_read(intake, 1)
    assert intake.room(INTERACTIVE) == free


def test_items_that_turn_out_to_take_more_of_a_batch_make_the_next_message_count_for_more(intake):
    """They are long, and limited by ``max_cost``; or only few of them fit into memory."""
    all_read(intake, 1)
    intake.came(bulk=False)
    intake.read(1, of=64, bulk=False)
    intake.began(share_of(8), bulk=False)
    assert intake.room(INTERACTIVE) == INTERACTIVE_BATCHES * 8


def test_a_message_that_cannot_be_read_or_has_no_items_is_one_less_and_teaches_nothing(intake):
    all_read(intake, 64)
    before = intake.room(INTERACTIVE)
    intake.came(bulk=False)
    intake.came(bulk=False)
    assert intake.room(INTERACTIVE) == before - 2
    intake.began(bulk=False)
    assert intake.room(INTERACTIVE) == before - 1
    intake.began(bulk=False)
    assert intake.room(INTERACTIVE) == before
    all_read(intake, 0)
    assert before < intake.room(INTERACTIVE) <= INTERACTIVE_BATCHES * LARGEST


def test_an_interactive_message_prepared_in_the_middle_of_a_bulk_one_is_counted_by_itself(intake):
    all_read(intake, 1, bulk=True)
    all_read(intake, 1)
    free = intake.room(INTERACTIVE), intake.room(BULK)
    intake.came(bulk=True)
    intake.read(20, of=64, bulk=True)
    one_read(intake, 1)
    assert intake.room(BULK) < free[1]
    assert intake.room(INTERACTIVE) == free[0]
    intake.began(bulk=True)
    all_read(intake, 1, bulk=True)
    assert intake.room(BULK) == free[1]


def test_who_was_refused_is_told_as_soon_as_messages_turn_out_to_be_small(intake, told):
    while intake.room(BULK):
        intake.came(bulk=True)
    intake.read(1, of=64, bulk=True)
    assert told == [1]
