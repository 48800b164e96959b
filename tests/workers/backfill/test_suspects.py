"""Laws: the row that kills is found by dying over it alone; whoever was only near is not blamed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nograd.workers.backfill.suspects import Suspects


def attempt(left, rows, batch, killers):
    """One attempt at a chunk by a worker that dies over certain rows; what it leaves behind, or what it scored."""
    suspects = Suspects.after(left)
    cursor = left

    def leave(new):
        nonlocal cursor
        cursor = new

    for row in range(rows):
        if suspects.is_probed(row, leave) and row in killers:
            return cursor, None
    if suspects.probe:
        suspects.cleared()
    for first in range(0, rows, batch):
        batch_rows = range(first, min(first + batch, rows))
        leave(suspects.cursor(first, len(batch_rows)))
        if any(row in killers and row not in suspects.killers for row in batch_rows):
            return cursor, None
    return None, [row for row in range(rows) if row not in suspects.killers]


@given(
    rows=st.integers(1, 60),
    batch=st.integers(1, 16),
    killers=st.sets(st.integers(0, 59), max_size=4),
)
def test_every_killer_is_found_and_nobody_else(rows, batch, killers):
    killers = {row for row in killers if row < rows}
    left = scored = None
    for _ in range(3 * len(killers) + 1):
        left, scored = attempt(left, rows, batch, killers)
        if scored is not None:
            break
    assert scored == [row for row in range(rows) if row not in killers]


@pytest.mark.parametrize("deaths", [0, 1])
def test_who_was_killed_for_another_reason_is_run_as_planned(deaths):
    left = Suspects().cursor(8, 8)
    for _ in range(deaths):
        left = Suspects.after(left).cursor(40, 8)  # died elsewhere in the chunk
    again = Suspects.after(left)
    assert not again.probe
    assert not again.killers


def test_two_deaths_over_the_same_rows_make_them_suspects():
    once = Suspects().cursor(8, 8)
    twice = Suspects.after(once).cursor(0, 16)
    assert list(Suspects.after(twice).probe) == list(range(16))


def test_rows_that_kill_only_together_stop_the_backfill():
    left = None
    for _ in range(5):
        suspects = Suspects.after(left)
        if suspects.hopeless:
            break
        if suspects.probe:
            suspects.cleared()
        left = suspects.cursor(8, 16)
    assert suspects.hopeless == (8, 23)
