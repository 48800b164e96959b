"""How many rows may fail before a backfill stops.

A budget below 1 is a share of the planned rows, any other a number of rows. The run stops as soon as more rows have
failed than the whole run may have, whatever is still to come.
"""

from __future__ import annotations

from nograd.tasks.errors import ConfigError

#: how the reason of such a stop begins
OVER_BUDGET = "error budget exceeded"


def allowed_failures(budget: float, rows: int) -> int:
    """Rows that may fail of so many planned ones."""
    return int(round(budget * rows, 6)) if budget < 1 else int(budget)


def parse_budget(given: str | float | None) -> float | None:
    """A budget as people write it: ``"1%"``, ``"0.01"``, ``0.01``, ``"100"``, ``100``; None for none, as for 100 %.

    Raises:
        ConfigError: if it is neither a share nor a number of rows.
    """
    if given is None:
        return None
    text = str(given).strip()
    try:
        share = text.endswith("%")
        number = float(text.removesuffix("%")) / (100 if share else 1)
    except ValueError:
        number, share = -1.0, False
    if not 0 <= number < float("inf") or (share and number > 1) or (number >= 1 and not share and number % 1):
        raise ConfigError(f"error budget {text!r}: expected a share like 1% or 0.01, or a number of rows like 100")
    return None if share and number == 1 else number
