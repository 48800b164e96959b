"""The laws of `nograd.workers.batching` for any order of events: a device that is driven by random steps."""

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from nograd.tasks.keys import BULK_FROM
from nograd.workers.batching import BULK_PATIENCE_S, PATIENCE_S, Backlog, Item, Limits

_limits = st.builds(
    Limits,
    max_items=st.integers(1, 5),
    max_wait_s=st.sampled_from([0.0, 0.0, 0.3, 4.0]),
    max_cost=st.none() | st.integers(1, 30),
)
_arrival = st.tuples(
    st.just("put"),
    st.sampled_from("mn"),
    st.integers(0, 2),  # group
    st.sampled_from([0, 3, 6, 9]),
    st.integers(1, 12),  # cost
    st.none() | st.floats(0, 20),  # time left
)
_steps = st.lists(
    st.one_of(
        _arrival,
        _arrival,
        st.tuples(st.just("pass"), st.floats(0, 6)),
        st.just(("take",)),
        st.just(("take",)),
        st.just(("expire",)),
        st.tuples(st.just("cap"), st.sampled_from("mn"), st.integers(0, 2), st.none() | st.integers(1, 3)),
        st.tuples(st.just("limit"), st.sampled_from("mn"), _limits),
    ),
    max_size=80,
)


class Device:
    """Applies steps to a backlog, beside the plainest possible record of what waits."""

    def __init__(self, limits):
        self.limits = dict.fromkeys("mn", limits)
        self.caps = {}
        self.backlog = Backlog(self.limits)
        self.waiting = []
        self.now = 100.0
        self.bulk_turn = -math.inf

    def put(self, model, group, priority, cost, left=None):
        deadline = None if left is None else self.now + left
        made = Item(model, group, None, None, priority=priority, cost=cost, arrived=self.now, deadline=deadline)
        if made.priority >= BULK_FROM and not any(bulk(one) for one in self.waiting):
            self.bulk_turn = self.now
        self.backlog.put(made)
        self.waiting.append(made)

    def cap(self, model, group, most):
        self.backlog.cap(model, group, most)
        self.caps[model, group] = most

    def limit(self, model, limits):
        self.backlog.add_model(model, limits)
        self.limits[model] = limits

    def expire(self):
        late = self.backlog.expire(self.now)
        assert set(map(id, late)) == {id(one) for one in self.waiting if expired(one, self.now)}
        for one in late:
            self.waiting.remove(one)

    def take(self):
        before = list(self.waiting)
        batch = self.backlog.next_batch(self.now)
        for one in batch.items + batch.expired if batch else ():
            self.waiting.remove(one)  # raises for one that has come out before
        return before, batch

    def most(self, group):
        return min(self.limits[group[0]].max_items, self.caps.get(group) or math.inf)

    def fits(self, group, items):
        most = self.limits[group[0]].max_cost
        padded = len(items) * max((one.cost for one in items), default=0)
        return len(items) <= 1 or (len(items) <= self.most(group) and (most is None or padded <= most))

    def ready(self, items):
        """The items of those that need not wait for company, by the definition."""
        ready = []
        for group in {key(one) for one in items}:
            members = [one for one in items if key(one) == group]
            for lane in ([m for m in members if not bulk(m)], [m for m in members if bulk(m)]):
                if any(self.window_end(one) <= self.now for one in lane) or self.full(group, members):
                    ready += lane
        return ready

    def full(self, group, members):
        company = Item(*group, None, None, cost=1)
        return not self.fits(group, [*members, company])

    def window_end(self, one):
        wait = self.limits[one.model].max_wait_s
        return one.arrived + (wait if one.deadline is None else min(wait, (one.deadline - one.arrived) / 2))


def key(one):
    return one.model, one.group


def bulk(one):
    return one.priority >= BULK_FROM


def urgency(one):
    return min(one.arrived + PATIENCE_S, math.inf if one.deadline is None else one.deadline)


def expired(one, now):
    return one.deadline is not None and one.deadline <= now


@given(_limits, _steps)
@settings(max_examples=300)
def test_any_order_of_events_keeps_the_laws(limits, steps):
    device = Device(limits)
    for name, *args in [*steps, ("pass", 100.0), *[("take",)] * len(steps)]:
        if name == "pass":
            device.now += args[0]
        elif name == "take":
            check(device, *device.take())
        else:
            getattr(device, name)(*args)
    assert not device.waiting  # after all windows, a take for each put is enough
    assert len(device.backlog) == 0
    assert device.backlog.waiting == (0, 0)
    assert not device.backlog._groups


def check(device, before, batch):
    ready = device.ready(before)
    if batch is None:
        assert not ready
        ends = [device.window_end(one) for one in before]
        assert device.backlog.wake_at() == (min(ends) if ends else None)
        return
    assert ready
    out = batch.items + batch.expired
    assert len({key(one) for one in out}) == 1
    group = key(out[0])
    assert device.fits(group, batch.items)
    assert not any(expired(one, device.now) for one in batch.items)
    assert all(expired(one, device.now) for one in batch.expired)
    check_lead(device, ready, before, group, out)
    check_nothing_passed_over(device, before, group, batch, out)
    assert Counter(map(bulk, device.waiting)) == +Counter(dict(zip((False, True), device.backlog.waiting, strict=True)))


def check_lead(device, ready, before, group, out):
    """The batch is that of the most urgent item of the lane whose turn it is."""
    interactive, of_bulk = [one for one in ready if not bulk(one)], [one for one in ready if bulk(one)]
    bulk_first = of_bulk and (not interactive or device.now - device.bulk_turn >= BULK_PATIENCE_S)
    lane = of_bulk if bulk_first else interactive
    first = min(map(urgency, lane))
    assert any(urgency(one) == first and key(one) == group for one in lane)
    assert bulk(out[0]) == bool(bulk_first) or any(expired(one, device.now) for one in out)
    tops = {key(one) for one in of_bulk if urgency(one) == min(map(urgency, of_bulk))}
    if group in tops and any(map(bulk, out)):
        if len(tops) == 1:
            device.bulk_turn = device.now
        else:
            device.bulk_turn = device.backlog._bulk_turn  # two groups are equally urgent; either may have had its turn


def check_nothing_passed_over(device, before, group, batch, out):
    """Within a lane the most urgent go first, and a batch ends only where the next one does not fit."""
    rest = [one for one in device.waiting if key(one) == group]
    for side in (False, True):
        left = [urgency(one) for one in rest if bulk(one) is side]
        taken = [urgency(one) for one in out if bulk(one) is side]
        assert not left or not taken or max(taken) <= min(left)
    if rest and batch.items:
        first_lane = bulk(batch.items[0])
        if any(bulk(one) is not first_lane for one in batch.items):
            assert all(bulk(one) is not first_lane for one in rest)
        follows = min(rest, key=lambda one: (bulk(one) is not first_lane, urgency(one)))
        assert not device.fits(group, [*batch.items, follows]) or any(
            urgency(one) == urgency(follows) for one in rest if one is not follows
        )


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 9]), st.none() | st.floats(5, 60)), max_size=6),
    st.integers(1, 4),
    st.floats(0.5, 2.0),
    st.integers(1, 3),
    st.none() | st.floats(1, 30),
)
@settings(max_examples=60, deadline=None)
def test_nobody_waits_for_ever_under_endless_load(early, max_items, forward_s, busy, hurry):
    """More interactive items, with deadlines or without, arrive all the time than can be run; others get their turn."""
    device = Device(Limits(max_items=max_items))
    for group, priority, left in early:
        device.put("m", group, priority, 1, left)
    watched = set(device.waiting)
    backlog = device.backlog
    while watched:
        for group in range(busy):
            for _ in range(max_items + 1):
                deadline = hurry and device.now + hurry
                backlog.put(Item("n", group, None, None, arrived=device.now, deadline=deadline))
        batch = backlog.next_batch(device.now)
        watched.difference_update(batch.items + batch.expired)
        device.now += forward_s
        waited = device.now - 100.0
        turns = len(early) + 2
        if any(not bulk(one) for one in watched):
            assert waited <= PATIENCE_S + 2 * turns * forward_s
        assert waited <= PATIENCE_S + turns * (BULK_PATIENCE_S + 2 * forward_s)
