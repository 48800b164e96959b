"""The laws of `nograd.workers.batching`, with a clock of the tests' own."""

import math
from threading import Thread

import pytest

from nograd.tasks.errors import UnknownModel
from nograd.tasks.keys import BULK, INTERACTIVE
from nograd.workers.batching import CAPS, Backlog, BatchQueue, Item, Limits


def item(model="m", group=None, arrived=0.0, deadline=None, prepared=None, priority=INTERACTIVE, cost=1):
    return Item(model, group, prepared, job=None, arrived=arrived, deadline=deadline, priority=priority, cost=cost)


def bulk(**options):
    return item(priority=BULK, **options)


def backlog(*items, **limits):
    made = Backlog({"m": Limits(**limits), "n": Limits(**limits)})
    for one in items:
        made.put(one)
    return made


def test_an_empty_backlog_has_no_batch_and_no_time_to_wake():
    assert backlog().next_batch(now=0) is None
    assert backlog().wake_at() is None


def test_without_a_window_a_batch_is_whatever_waits():
    batch = backlog(item(), item(), max_items=8).next_batch(now=0)
    assert len(batch.items) == 2


def test_a_batch_has_at_most_max_items_oldest_first():
    items = [item(arrived=t, prepared=t) for t in range(10)]
    waiting = backlog(*items, max_items=4)
    taken = [[i.prepared for i in waiting.next_batch(now=20).items] for _ in range(3)]
    assert taken == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert waiting.next_batch(now=20) is None


def test_with_a_window_an_incomplete_batch_waits_from_the_arrival_of_its_oldest():
    waiting = backlog(item(arrived=1.0), item(arrived=1.4), max_items=4, max_wait_s=0.5)
    assert waiting.next_batch(now=1.49) is None
    assert waiting.wake_at() == 1.5
    assert len(waiting.next_batch(now=1.5).items) == 2


def test_a_full_batch_does_not_wait():
    assert backlog(item(), item(), max_items=2, max_wait_s=60).next_batch(now=0) is not None


def test_items_of_different_groups_and_models_never_share_a_batch():
    waiting = backlog(item(group=(3,)), item(group=(4,)), item("n", group=(3,)), item(group=(3,)), max_items=8)
    batches = [waiting.next_batch(now=0) for _ in range(3)]
    assert [(b.model, {i.group for i in b.items}, len(b.items)) for b in batches] == [
        ("m", {(3,)}, 2),
        ("m", {(4,)}, 1),
        ("n", {(3,)}, 1),
    ]


def test_the_group_with_the_oldest_item_goes_first():
    waiting = backlog(*[item(group="busy", arrived=1 + t / 100) for t in range(50)], item(group="old", arrived=0.5))
    assert waiting.next_batch(now=2).items[0].group == "old"


def test_an_expired_item_is_handed_out_but_not_to_run():
    batch = backlog(item(deadline=5), item(deadline=None), item(deadline=9)).next_batch(now=5)
    assert [i.deadline for i in batch.expired] == [5]
    assert [i.deadline for i in batch.items] == [9, None]


def test_what_is_too_late_can_be_taken_out_before_its_turn():
    items = [item(group=n % 2, arrived=n, deadline=deadline) for n, deadline in enumerate([5, None, 9, 7, 5])]
    waiting = backlog(*items)
    assert waiting.expire(now=4.9) == []
    assert {id(one) for one in waiting.expire(now=5)} == {id(items[0]), id(items[4])}
    assert waiting.expire(now=5) == []
    assert {id(one) for one in waiting.expire(now=100)} == {id(items[2]), id(items[3])}
    assert waiting.waiting == (1, 0)
    assert waiting.drain() == [items[1]]
    waiting.put(item(deadline=3))
    assert len(waiting.expire(now=100)) == 1
    assert not waiting._groups
    assert waiting.next_batch(now=100) is None
    assert waiting.wake_at() is None


def test_what_is_left_after_something_has_expired_keeps_its_window_and_its_order():
    items = [item(arrived=n, deadline=deadline) for n, deadline in enumerate([3, None, 50])]
    waiting = backlog(*items, max_items=3, max_wait_s=10)
    assert waiting.wake_at() == -math.inf  # complete
    assert waiting.expire(now=3) == [items[0]]
    assert waiting.wake_at() == 11
    assert waiting.next_batch(now=11).items == items[1:]


def test_an_empty_group_is_forgotten():
    waiting = backlog(*[item(group=n) for n in range(100)])
    while waiting.next_batch(now=0):
        pass
    assert not waiting._groups


def test_an_item_with_a_near_deadline_goes_before_older_ones_and_a_far_one_does_not():
    waiting = backlog(item(prepared="old"), item(deadline=8, arrived=3, prepared="near"), max_items=1)
    waiting.put(item(arrived=4, deadline=1000, prepared="far"))
    assert [waiting.next_batch(now=5).items[0].prepared for _ in range(3)] == ["near", "old", "far"]


def test_models_take_turns_by_deadline_and_age():
    waiting = backlog(*[item("m", arrived=t / 100) for t in range(100)], item("n", arrived=0.5), max_items=20)
    assert [waiting.next_batch(now=2).model for _ in range(6)] == ["m", "m", "m", "n", "m", "m"]
    waiting = backlog(item("m"), item("n", arrived=1, deadline=3))
    assert waiting.next_batch(now=2).model == "n"


def test_interactive_goes_before_older_bulk():
    waiting = backlog(bulk(group=1), bulk(group=2), item(group=3, arrived=5))
    assert [waiting.next_batch(now=6).items[0].group for _ in range(3)] == [3, 1, 2]


def test_bulk_of_the_same_group_fills_what_an_interactive_batch_leaves_free():
    waiting = backlog(
        *[bulk(group=1, prepared=f"bulk {n}") for n in range(4)],
        bulk(group=2),
        bulk(model="n", group=1),
        *[item(group=1, arrived=3, prepared=f"now {n}") for n in range(2)],
        max_items=4,
    )
    assert [i.prepared for i in waiting.next_batch(now=4).items] == ["now 0", "now 1", "bulk 0", "bulk 1"]


def test_bulk_waits_while_interactive_fills_the_batches():
    waiting = backlog(bulk(), *[item() for _ in range(4)], max_items=2)
    assert [[i.priority for i in waiting.next_batch(now=1).items] for _ in range(3)] == [[0, 0], [0, 0], [BULK]]


def test_bulk_makes_an_interactive_batch_complete_and_is_not_waited_for():
    limits = {"max_items": 3, "max_wait_s": 5.0}
    assert len(backlog(item(), bulk(), bulk(), **limits).next_batch(now=0).items) == 3
    waiting = backlog(bulk(arrived=4), item(arrived=0), **limits)
    assert waiting.next_batch(now=4.9) is None
    assert [i.priority for i in waiting.next_batch(now=5).items] == [0, BULK]  # its own window ends it, not bulk's


def test_a_window_of_bulk_does_not_hold_an_interactive_item_that_is_ready():
    waiting = backlog(item(arrived=0), max_wait_s=5.0)
    waiting.put(bulk(arrived=4.9))
    assert len(waiting.next_batch(now=5).items) == 2


def test_after_its_patience_bulk_leads_one_batch():
    waiting = backlog(bulk(group="b"), max_items=1)
    led = []
    for second in range(40):
        waiting.put(bulk(group="b", arrived=second))
        waiting.put(item(group="i", arrived=second))
        led.append(waiting.next_batch(now=second + 0.5).items[0].priority)
    assert [second for second, priority in enumerate(led) if priority == BULK] == [10, 20, 30]


def test_bulk_that_fills_spare_slots_of_one_group_does_not_count_for_another():
    waiting = backlog(bulk(group="lonely"), max_items=2)
    for second in range(12):
        waiting.put(item(group="busy", arrived=second))
        waiting.put(bulk(group="busy", arrived=second))
        led = waiting.next_batch(now=second + 0.5).items[0].group
        assert led == ("lonely" if second == 10 else "busy")


def test_a_batch_led_by_bulk_takes_interactive_along():
    waiting = backlog(bulk(), item(group="other", arrived=10), item(arrived=11), max_items=4)
    assert [i.priority for i in waiting.next_batch(now=12).items] == [BULK, INTERACTIVE]


def test_an_item_with_a_deadline_waits_for_company_for_half_of_its_time_at_most():
    waiting = backlog(item(arrived=1, deadline=3), max_wait_s=60)
    assert waiting.next_batch(now=1.9) is None
    assert waiting.wake_at() == 2
    assert len(waiting.next_batch(now=2).items) == 1


def test_a_batch_closes_before_its_padded_cost_is_over_the_limit():
    costs = [10, 10, 30, 10, 40, 200, 10]
    waiting = backlog(*[item(arrived=t / 10, cost=cost) for t, cost in enumerate(costs)], max_cost=100)
    batches = [[i.cost for i in waiting.next_batch(now=1).items] for _ in range(4)]
    assert batches == [[10, 10, 30], [10, 40], [200], [10]]  # 3 x 30 fits and 4 x 30 does not; 200 runs alone


def test_a_batch_that_is_full_by_cost_does_not_wait():
    waiting = backlog(item(cost=40), item(cost=50), max_cost=100, max_wait_s=60)
    assert len(waiting.next_batch(now=0).items) == 2
    waiting = backlog(item(cost=90), item(cost=20, arrived=1), max_cost=100, max_wait_s=60)
    assert len(waiting.next_batch(now=1).items) == 1
    assert waiting.next_batch(now=1) is None  # what is left has room for company again


def test_a_cap_bounds_one_group_from_the_next_batch_on_and_can_be_lifted():
    waiting = backlog(*[item(group=g) for g in (1, 2) for _ in range(8)], max_items=4, max_wait_s=60)
    waiting.cap("m", 1, 2)
    assert [len(waiting.next_batch(now=0).items) for _ in range(6)] == [2, 2, 2, 2, 4, 4]
    waiting.cap("m", 1, None)
    for _ in range(3):
        waiting.put(item(group=1))
    assert waiting.next_batch(now=0) is None
    waiting.cap("m", 1, 3)  # what waits is a whole batch now
    assert len(waiting.next_batch(now=0).items) == 3


def test_the_caps_of_long_forgotten_groups_do_not_pile_up():
    waiting = backlog(max_items=4)
    for group in range(CAPS + 10):
        waiting.cap("m", group, 1)
    assert len(waiting._caps) == CAPS


def test_a_model_that_is_removed_gives_back_what_waits_and_one_that_is_added_is_served():
    waiting = backlog(item("m", prepared=1), item("n"), bulk(model="m", prepared=2, arrived=1), max_items=4)
    assert [i.prepared for i in waiting.remove_model("m")] == [1, 2]
    assert len(waiting) == 1
    assert waiting.waiting == (1, 0)
    with pytest.raises(UnknownModel):
        waiting.put(item("m"))
    waiting.add_model("m", Limits(max_items=1))
    waiting.put(item("m"))
    waiting.put(item("m"))
    assert sorted((b.model, len(b.items)) for b in (waiting.next_batch(now=0) for _ in range(3))) == [
        ("m", 1),
        ("m", 1),
        ("n", 1),
    ]


def test_limits_that_change_hold_for_what_waits():
    waiting = backlog(*[item() for _ in range(4)], max_items=8, max_wait_s=60)
    assert waiting.next_batch(now=0) is None
    waiting.add_model("m", Limits(max_items=3, max_wait_s=60))
    assert len(waiting.next_batch(now=0).items) == 3
    assert waiting.next_batch(now=0) is None
    waiting.add_model("m", Limits())
    assert len(waiting.next_batch(now=0).items) == 1


def test_many_groups_cost_no_more_than_one():
    """A count of work, not of time: how often groups are looked at."""
    looked = 0

    class Counting(dict):
        def __iter__(self):
            nonlocal looked
            looked += len(self)
            return super().__iter__()

        def items(self):
            nonlocal looked
            looked += len(self)
            return super().items()

        values = keys = items

    waiting = backlog(max_wait_s=0.5)
    waiting._groups = Counting()
    for group in range(1000):
        waiting.put(item(group=group, arrived=group / 1000))
    taken = 0
    while waiting.next_batch(now=5) is not None:
        taken += 1
    assert (taken, looked) == (1000, 0)
    assert not any(agenda._ready or agenda._later for agenda in waiting._agendas)


def test_take_blocks_until_an_item_is_put_and_ends_when_the_queue_is_closed():
    queue = BatchQueue({"m": Limits()})
    taken = []
    thread = Thread(target=lambda: taken.extend([queue.take(), queue.take()]))
    thread.start()
    assert queue.put([item()])
    while len(queue):
        pass
    assert queue.close() == []
    thread.join(10)
    assert [batch and len(batch.items) for batch in taken] == [1, None]


def test_a_closed_queue_takes_nothing_and_gives_back_what_waited():
    queue = BatchQueue({"m": Limits(max_items=8, max_wait_s=60)})
    first, second = item(), item()
    queue.put([first])
    queue.put([second])
    assert queue.close() == [first, second]
    assert not queue.put([item()])


def test_put_stamps_arrival_and_deadline():
    queue = BatchQueue({"m": Limits(max_wait_s=60)}, clock=lambda: 7.0)
    one = item()
    queue.put([one], deadline=9.0)
    assert (one.arrived, one.deadline) == (7.0, 9.0)


def test_a_removed_model_is_refused_by_the_queue_and_others_are_told_of_room():
    told = []
    queue = BatchQueue({"m": Limits()})
    queue.on_taken = lambda: told.append(len(queue))
    queue.put([item(), item()])
    assert len(queue.take().items) == 2
    queue.put([item()])
    assert len(queue.remove_model("m")) == 1
    assert told == [0, 0]
    with pytest.raises(UnknownModel):
        queue.put([item()])


def test_an_errand_goes_before_the_batches_then_they_take_turns_and_never_after_the_close():
    queue, done = BatchQueue({"m": Limits(max_items=2)}), []
    queue.put([item(), item(), item()])
    for n in range(4):
        assert queue.call(lambda n=n: done.append(n))
    queue.take()()
    assert len(queue.take().items) == 2
    queue.take()()
    assert len(queue.take().items) == 1
    for _ in range(2):
        queue.take()()
    assert done == [0, 1, 2, 3]
    queue.put([item()])
    assert len(queue.take().items) == 1
    queue.close()
    assert not queue.call(lambda: done.append(3))
    assert queue.take() is None


def test_an_errand_wakes_whoever_waits_for_a_batch():
    queue, taken = BatchQueue({}), []
    thread = Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    errand = taken.clear
    queue.call(errand)
    thread.join(10)
    assert taken == [errand]


def test_the_caps_of_a_model_outlast_its_reload():
    waiting = backlog(max_items=8)
    waiting.cap("m", None, 2)
    waiting.remove_model("m")
    waiting.add_model("m", Limits(max_items=8))
    for _ in range(8):
        waiting.put(item())
    assert len(waiting.next_batch(now=0).items) == 2


def test_who_raises_when_told_costs_nobody_a_batch(caplog):
    def fail():
        raise RuntimeError("Set changed size during iteration")

    queue = BatchQueue({"m": Limits(max_items=1)})
    queue.on_taken = queue.on_idle = fail
    queue.put([item(), item()])
    assert [len(queue.take().items) for _ in range(2)] == [1, 1]
    assert caplog.text.count("Set changed size") == 2 * 2  # the message and its traceback's end


def test_who_takes_says_so_before_it_waits_and_not_while_there_is_more():
    told = []
    queue = BatchQueue({"m": Limits(max_items=1)})
    queue.on_idle = lambda: (told.append(len(queue)), queue.put([item()]))
    queue.put([item(), item()])
    for _ in range(2):
        queue.take()
    assert told == []
    queue.take()
    assert told == [0]
