"""The end of a process that cannot go on, without losing a job.

Laws:

* What is resolved is stored and acknowledged first, if Redis takes it within `SETTLE_S`.
* Everything else is free for other workers at their next beat, and only the jobs it ended over count a death: they run
  alone from then on. If Redis is away, all of that happens when the leases expire.
* The process ends within `MOST_S` whatever hangs, by ``os._exit``: an interpreter with a stuck thread may never finish.
* Why it ended is kept for the jobs it ended over: whoever gives one up can say so.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NoReturn

from nograd.tasks import transport
from nograd.tasks.keys import LAST_WORDS, LAST_WORDS_TTL_S

from .handle import Handle

logger = logging.getLogger(__name__)

#: seconds for results to be stored
SETTLE_S: Final = 5.0
#: seconds for everything
MOST_S: Final = 15.0

_dying = threading.Lock()


def die(code: int, why: str, culprits: Sequence[Handle], settle: Callable[[float], object], redis: Any) -> NoReturn:
    """End this process now.

    Args:
        code: its exit code.
        why: what happened, for the log and for those who wait for the culprits.
        culprits: the messages it ends over.
        settle: stores and acknowledges what is resolved, within so many seconds.
        redis: where the last words are kept.
    """
    if not _dying.acquire(blocking=False):
        while True:  # another thread is at it
            time.sleep(MOST_S)
    ids = [message.id for message in culprits]
    logger.critical("this worker ends (%d): %s. The jobs it ends over: %s", code, why, ", ".join(ids) or "none")

    def hand_over() -> None:
        steps: tuple[Callable[[], object], ...] = (
            lambda: settle(SETTLE_S),
            lambda: _leave(redis, ids, why),
            lambda: transport.relinquish([message.delivery for message in culprits]),
        )
        for step in steps:
            try:
                step()
            except Exception:
                logger.exception("not everything could be handed over; leases expire by themselves")

    helper = threading.Thread(target=hand_over, name="nograd-last-words", daemon=True)
    helper.start()
    helper.join(MOST_S)
    os._exit(code)


def read(redis: Any, task_id: str) -> str | None:
    """Why the last worker that ran a job ended, if it could tell."""
    with suppress(Exception):  # it is only an explanation
        words = redis.get(LAST_WORDS + task_id)
        return words.decode(errors="replace") if words else None
    return None


def _leave(redis: Any, ids: Sequence[str], why: str) -> None:
    pipe = redis.pipeline(transaction=False)
    for task_id in ids:
        pipe.set(LAST_WORDS + task_id, why, ex=LAST_WORDS_TTL_S)
    pipe.execute()
