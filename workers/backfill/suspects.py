"""Finding the row that kills workers.

::

    attempt 1 dies over rows 64…191      it may have been anything: the machine, an operator
    attempt 2 dies over rows 64…191      runs the same batches; now it is one of these rows
    attempt 3 runs each of them alone    its *probe*, predictions thrown away; dies over row 130
    attempt 4                            130 is a failed row; probes the rest, then runs the chunk without it

Laws:

* A row fails for that only after a worker has died over it alone, and two over its neighbourhood.
* A worker that was killed for another reason costs nothing: the next attempt runs the same batches, and so commits the
  same bytes.
* Rows that kill only together stop the backfill, with their numbers: it does not take workers along for ever.
* What is known stands in Redis (`Cursor`); where that is lost, it is found out again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nograd.tasks.backfill.window import Cursor

#: attempts that may die over the same rows before each of them is run alone
MOST_DEATHS = 2


@dataclass(slots=True)
class Suspects:
    """What is known of the rows of a chunk when an attempt at it begins.

    Attributes:
        killers: positions of rows to be left out.
        probe: positions to run alone before anything else.
        before: the rows over which the last attempt died, if it did not finish and they are not being probed.
    """

    killers: list[int] = field(default_factory=list)
    probe: range = field(default_factory=lambda: range(0))
    before: Cursor | None = None
    #: first row and end of those that were run alone last, and did not kill
    probed: tuple[int, int] = (0, 0)
    #: first row and end of the suspects
    area: tuple[int, int] = (0, 0)
    #: the first and the last of rows that kill together, and not alone: nobody can tell which to leave out
    hopeless: tuple[int, int] | None = None

    @classmethod
    def after(cls, cursor: Cursor | None) -> Suspects:
        """What the cursor of an attempt that did not come back says."""
        if cursor is None:
            return cls()
        end = cursor.first + cursor.count
        if cursor.probe is not None:
            # The suspects before the killer were alone already; the next ones are, if the probe of these ends well.
            return cls([*cursor.killers, cursor.probe], range(cursor.probe + 1, end), area=(cursor.probed[0], end))
        if cursor.deaths + 1 >= MOST_DEATHS and cursor.probed[0] <= cursor.first < end <= cursor.probed[1]:
            return cls(list(cursor.killers), hopeless=(cursor.first, end - 1))
        if cursor.deaths + 1 >= MOST_DEATHS:
            return cls(list(cursor.killers), range(cursor.first, end), area=(cursor.first, end))
        return cls(list(cursor.killers), before=cursor, probed=cursor.probed)

    def cleared(self) -> None:
        """Every suspect has been run alone."""
        self.probed, self.probe = (self.area[0], self.area[1]), range(0)

    def cursor(self, first: int, count: int) -> Cursor:
        """What to leave behind while these rows are under way."""
        deaths = 0
        if self.before is not None:
            apart = first >= self.before.first + self.before.count or self.before.first >= first + count
            deaths = 0 if apart else self.before.deaths + 1
        return Cursor(first, count, deaths, killers=self.killers, probed=self.probed)

    def is_probed(self, row: int, leave: Callable[[Cursor], None]) -> bool:
        """Whether a row is to be run alone now, its prediction thrown away.

        Args:
            row: its position in the chunk; to be asked in order.
            leave: leaves a cursor behind.
        """
        if row not in self.probe:
            return False
        leave(Cursor(row, self.probe.stop - row, probe=row, killers=self.killers, probed=self.area))
        return True
