"""What a backfill says of itself: how far, how fast, and whether it goes on."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from nograd.tasks.backfill.progress import Progress, as_json

#: ``waiting``: no worker runs a chunk just now; ``stopped``: paused by what is in ``why``;
#: ``unknown``: Redis does not answer, and what is committed says no more
StateName = Literal["running", "waiting", "stalled", "paused", "stopped", "cancelled", "done", "unknown"]

#: after these nothing more happens by itself
ENDED: frozenset[StateName] = frozenset({"done", "cancelled", "stopped"})


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A backfill at a moment.

    Attributes:
        id: names it, together with its folder.
        out: URL of its output folder.
        model: what scores it.
        state: whether it goes on.
        why: what stopped it.
        error_budget: see `nograd.tasks.backfill.budget`.
        may_fail: rows that may fail before it stops; None for all.
        queued: chunks that wait for a worker; None if Redis does not answer.
        running: chunks that run now.
        trouble: what keeps this observer from seeing or doing more.
        retries: how many times failed rows were run again; the last one may be under way.
        progress: what is committed, by the backfill and its retries.
    """

    id: str
    out: str
    model: str
    state: StateName
    why: str | None = None
    error_budget: float | None = None
    may_fail: int | None = None
    queued: int | None = None
    running: int | None = None
    trouble: str | None = None
    retries: int = 0
    progress: Progress

    @property
    def ended(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.state in ENDED

    @property
    def over_budget(self) -> bool:
        """Whether more rows failed than may."""
        return self.may_fail is not None and self.progress.rows_err > self.may_fail

    def as_json(self) -> dict[str, Any]:
        """For ``--json``, on one level."""
        own: dict[str, Any] = msgspec.to_builtins(self)
        del own["progress"]
        return {**own, **as_json(self.progress), "done": self.state == "done"}
