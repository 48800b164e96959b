"""How far a backfill is: from its commit records, and from nothing else.

Laws: whoever looks, with Redis or without, on any machine, is told the same; no row is counted that is not committed;
an estimate is a range, and there is none before three chunks are done.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from . import commit
from .plan import Job

#: chunks that must be done before anything is estimated
_ENOUGH = 3
#: chunks, the last ones, whose pace counts
_RECENT = 32
#: no commit for so many times the usual time of a chunk is a stall …
_STALL_FACTOR = 5.0
#: … but not before so many seconds: a worker that died is found out only when its lease is over, twice in a bad case
_STALL_S = 60.0


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """A backfill at a moment.

    Attributes:
        job: its plan.
        rows: selected.
        rows_ok: with a committed prediction.
        rows_err: with a committed error, and not planned to be run again.
        chunks: planned.
        chunks_done: committed.
        bytes: of the parts and errors files.
        rows_per_s: of the last chunks, None before three are done.
        eta_low_s: seconds left, at the pace of the fastest times; None if not known, 0 if done.
        eta_high_s: at the pace of the slowest.
        last_commit_at: seconds since the epoch, None before the first.
        stalled: no commit for much longer than chunks take.
        workers: committed chunks by who ran them.
        deviations: chunks that were not run as planned.
    """

    job: str
    rows: int
    rows_ok: int
    rows_err: int
    chunks: int
    chunks_done: int
    bytes: int
    rows_per_s: float | None
    eta_low_s: float | None
    eta_high_s: float | None
    last_commit_at: float | None
    stalled: bool
    workers: dict[str, int]
    deviations: int

    @property
    def done(self) -> bool:
        """Whether every chunk is committed."""
        return self.chunks_done == self.chunks


class Observer:
    """Looks at one backfill again and again; reads each commit record once.

    Attributes:
        done: the chunks whose records it has read.
    """

    def __init__(self, job: Job, clock: Callable[[], float] = time.time) -> None:
        self._job = job
        self._clock = clock
        self.done: set[int] = set()
        self._sums = {"rows_ok": 0, "rows_err": 0, "bytes": 0, "deviations": 0}
        self._workers: dict[str, int] = {}
        self._recent: list[tuple[float, float, int]] = []  # (ended, seconds, rows), the last ones

    def look(self, since: float = 0.0) -> Progress:
        """Read the records that are new.

        Args:
            since: when it was last resumed, seconds since the epoch: before that no commit was to be expected.

        Raises:
            BackfillError: if one is of another plan.
        """
        for record in commit.records(self._job.store, self._job.plan, self.done):
            self._add(record)
        plan, last = self._job.plan, self._recent[-1][0] if self._recent else None
        finished = len(self.done) >= plan.chunks
        low, high, pace = self._pace()
        left = plan.rows - self._sums["rows_ok"] - self._sums["rows_err"]
        return Progress(
            job=plan.job,
            rows=plan.rows,
            chunks=plan.chunks,
            chunks_done=len(self.done),
            rows_per_s=pace,
            eta_low_s=0.0 if finished else high and left / high,
            eta_high_s=0.0 if finished else low and left / low,
            last_commit_at=last,
            stalled=not finished and self._is_stalled(last, since),
            workers=dict(sorted(self._workers.items())),
            **self._sums,
        )

    def missing(self) -> list[int]:
        """The chunks that are not done, as of the last look."""
        return [chunk for chunk in range(self._job.plan.chunks) if chunk not in self.done]

    def _add(self, record: commit.CommitRecord) -> None:
        self.done.add(record.chunk)
        self._sums["rows_ok"] += record.rows_ok
        self._sums["rows_err"] += record.rows_err
        self._sums["bytes"] += record.part.bytes + (record.errors.bytes if record.errors else 0)
        self._sums["deviations"] += bool(record.deviations)
        self._workers[record.worker] = self._workers.get(record.worker, 0) + 1
        seconds = max(record.ended_at - record.started_at, 0.0)
        self._recent.append((record.ended_at, seconds, record.rows_ok + record.rows_err))
        self._recent = sorted(self._recent)[-_RECENT:]

    def _pace(self) -> tuple[float | None, float | None, float | None]:
        """Rows a second over the last chunks: the slower half of them, the faster half, all."""
        if len(self._recent) < _ENOUGH:
            return None, None, None
        middle = len(self._recent) // 2
        paces = [_rate(self._recent[: middle + 1]), _rate(self._recent[middle:]), _rate(self._recent)]
        known = [pace for pace in paces if pace]
        return (min(known), max(known), paces[2]) if known else (None, None, None)

    def _is_stalled(self, last: float | None, since: float) -> bool:
        if last is None:
            return False
        usual = statistics.median(seconds for _, seconds, _ in self._recent)
        return self._clock() - max(last, since) > max(_STALL_FACTOR * usual, _STALL_S)


def _rate(recent: list[tuple[float, float, int]]) -> float | None:
    """Rows a second between the first and the last of some commits, whoever ran them side by side."""
    span = recent[-1][0] - recent[0][0]
    return sum(rows for _, _, rows in recent[1:]) / span if span > 0 else None


def progress(job: Job, clock: Callable[[], float] = time.time) -> Progress:
    """How far a backfill is."""
    return Observer(job, clock).look()


def together(whole: Progress, again: Sequence[Progress]) -> Progress:
    """A backfill and its retries as one: a failed row counts as failed until it is to be run again.

    Args:
        whole: the backfill itself.
        again: its retries, in order; only the last may be under way, and says how fast it goes on.
    """
    if not again:
        return whole
    every, last = [whole, *again], again[-1]
    workers: dict[str, int] = {}
    for each in every:
        for name, chunks in each.workers.items():
            workers[name] = workers.get(name, 0) + chunks
    return msgspec.structs.replace(
        last,
        job=whole.job,
        rows=whole.rows,
        rows_ok=sum(each.rows_ok for each in every),
        rows_err=whole.rows_err + sum(each.rows_err - each.rows for each in again),
        chunks=sum(each.chunks for each in every),
        chunks_done=sum(each.chunks_done for each in every),
        bytes=sum(each.bytes for each in every),
        last_commit_at=max((each.last_commit_at for each in every if each.last_commit_at), default=None),
        workers=dict(sorted(workers.items())),
        deviations=sum(each.deviations for each in every),
    )


def as_json(now: Progress) -> dict[str, Any]:
    """For ``--json``."""
    return {**msgspec.to_builtins(now), "done": now.done}
