"""How many rows may fail before a backfill stops.

A budget below 1 is a share of the planned rows, any other a number of rows. The run stops as soon as more rows have
failed than the whole run may have, whatever is still to come.
"""

from __future__ import annotations

#: how the reason of such a stop begins
OVER_BUDGET = "error budget exceeded"


def allowed_failures(budget: float, rows: int) -> int:
    """Rows that may fail of so many planned ones."""
    return int(budget * rows) if budget < 1 else int(budget)
