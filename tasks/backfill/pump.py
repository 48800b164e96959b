"""Keeping enough chunks on their way: anybody may do it, at any time, as often as they like.

Law: what is sent follows from the commit records and the hints in Redis alone. A chunk whose message, worker or hint
was lost is missing, and is sent again by whoever looks next. Nothing is sent while the backfill is paused or cancelled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import commit, layout, state
from .finalize import finalize
from .plan import Job
from .window import Window

#: chunks sent in one go
MOST = 256


@dataclass(frozen=True, slots=True)
class Pumped:
    """What a look at the backfill has come to.

    Attributes:
        sent: chunks sent now.
        missing: chunks without a commit.
    """

    sent: int
    missing: int


def pump(job: Job, window: Window, send: Callable[[int], None]) -> Pumped:
    """Send what the workers need next; close the output if nothing is missing.

    Args:
        job: the backfill.
        window: its hints.
        send: sends one chunk.

    Raises:
        BackfillError: if the output cannot be read or written.
        redis.RedisError: if Redis fails.
    """
    done = set(commit.committed_chunks(job.store))
    missing = [chunk for chunk in range(job.plan.chunks) if chunk not in done]
    if not missing:
        if job.store.size(layout.SUCCESS) is None:
            finalize(job)
        return Pumped(0, 0)
    if window.wish in ("pause", "cancel") or state.read(job.store).wish != "run":
        return Pumped(0, len(missing))
    chunks = window.top_up(missing, MOST)
    for index, chunk in enumerate(chunks):
        try:
            send(chunk)
        except BaseException:
            for unsent in chunks[index:]:
                window.forget(unsent)
            raise
    return Pumped(len(chunks), len(missing))
