"""The laws of `nograd.workers.batching`, with a clock of the tests' own."""

from collections import Counter
from threading import Thread

from hypothesis import given
from hypothesis import strategies as st

from nograd.workers.batching import Backlog, BatchQueue, Item, Limits


def item(model="m", group=None, arrived=0.0, deadline=None, prepared=None):
    return Item(model, group, prepared, job=None, arrived=arrived, deadline=deadline)


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
    assert [i.deadline for i in batch.items] == [None, 9]


def test_an_empty_group_is_forgotten():
    waiting = backlog(*[item(group=n) for n in range(100)])
    while waiting.next_batch(now=0):
        pass
    assert not waiting._groups


_items = st.builds(
    item,
    model=st.sampled_from("mn"),
    group=st.integers(0, 2),
    arrived=st.floats(0, 10),
    deadline=st.none() | st.floats(0, 20),
)


@given(st.lists(_items, max_size=60), st.integers(1, 5), st.floats(0, 5), st.lists(st.floats(0, 30), max_size=20))
def test_every_item_comes_out_exactly_once(items, max_items, max_wait_s, times):
    waiting = backlog(*items, max_items=max_items, max_wait_s=max_wait_s)
    out = []
    for now in times:
        if (batch := waiting.next_batch(now)) is not None:
            assert len(batch.items) + len(batch.expired) >= 1
            assert len(batch.items) <= max_items
            assert all(i.deadline is None or i.deadline > now for i in batch.items)
            out += batch.items + batch.expired
    out += waiting.drain()
    assert Counter(map(id, out)) == Counter(map(id, items))
    assert len(waiting) == 0


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
