"""Keeping enough chunks on their way: anybody may do it, at any time, as often as they like.

Law: what is sent follows from the commit records, the hints in Redis and the messages that are there alone. A chunk
whose message, worker or hint was lost is missing, and is sent again by whoever looks next; that somebody does is what
the `watchlist` is for. Nothing is sent while the backfill is paused or cancelled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import commit, layout, state
from .finalize import finalize
from .plan import Job
from .watchlist import Watchlist
from .window import SENDING_S, Window

#: chunks sent in one go
MOST = 256


@dataclass(frozen=True, slots=True)
class Pumped:
    """What a look at the backfill has come to.

    Attributes:
        sent: chunks sent now.
        missing: chunks without a commit.
        wanted: whether it is neither paused nor cancelled; not asked when nothing is missing.
    """

    sent: int
    missing: int
    wanted: bool = True


def pump(job: Job, window: Window, send: Callable[[int], None], sending_s: float = SENDING_S) -> Pumped:
    """Send what the workers need next; close the output if nothing is missing.

    Args:
        job: the backfill.
        window: its hints.
        send: sends one chunk.
        sending_s: see `Window.find_lost`; `task.sending_s` knows it.

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
    if state.wanted(state.read(job.store), window).wish != "run":
        return Pumped(0, len(missing), wanted=False)
    Watchlist(window.client).put(job)  # before anything is issued: who dies over that leaves somebody who looks
    window.find_lost(job.plan.model.name, sending_s)
    chunks = window.top_up(missing, MOST)
    for index, chunk in enumerate(chunks):
        try:
            send(chunk)
        except BaseException:
            for unsent in chunks[index:]:
                window.forget(unsent)
            raise
    return Pumped(len(chunks), len(missing))
