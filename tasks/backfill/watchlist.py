"""Which backfills are open, and when somebody last looked at each: so that none is forgotten with its last message.

A Redis that restarts with data some seconds old, or a sender that dies before it sends, leaves an open backfill without
a message, and so without anybody who would come by. Workers of its model look at it then (`nograd.workers.backfill`),
as long as Redis has kept this list.

Laws:

* A backfill is on the list of its model from the first `pump` on, before anything of it is sent, until somebody finds
  it finished or no longer wanted.
* However many ask, each one gets what nobody has looked at for so long, and no other gets it for as long again. Asking
  is one command, also when nothing is open.
* An entry that cannot be read is dropped with a line in the log, and keeps nobody from the others. Its backfill is put
  on the list again by whoever pumps it.
* Who cannot look (the folder is not to be seen from there) leaves it to whoever asks next.
* It is a hint like any other. What nobody could look at for `KEPT_S` is forgotten; every key has a TTL.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import msgspec

from nograd.tasks.structs import decodable

from .plan import Job
from .window import KEPT_S

logger = logging.getLogger(__name__)

#: backfills of one model to look at in one go
MOST: Final = 100

_SCRIPT = files(__package__).joinpath("watchlist.lua").read_text(encoding="utf-8")


@decodable
class Run(msgspec.Struct, frozen=True):
    """An open backfill.

    Attributes:
        out: URL of its output folder.
        plan: sha256 of its plan.
    """

    out: str
    plan: str


@dataclass(frozen=True, slots=True)
class Turn:
    """A backfill that is the asker's to look at.

    Attributes:
        run: which.
        key: of its list.
        member: of the list.
        taken: when, in ms by Redis' clock.
        before: when somebody had looked at it before.
    """

    run: Run
    key: str
    member: bytes
    taken: int
    before: int


class Watchlist:
    """The open backfills behind one Redis.

    Args:
        client: a Redis client.

    Raises:
        redis.RedisError: from each method, if Redis fails.
    """

    def __init__(self, client: Any) -> None:
        self._script = client.register_script(_SCRIPT)

    def put(self, job: Job) -> None:
        """Somebody has just looked at a backfill, and it is open."""
        run = msgspec.json.encode(Run(job.store.url, job.plan.sha256))
        self._script(keys=[_key(job.plan.model.name)], args=["put", KEPT_S, run])

    def take(self, models: Sequence[str], after_s: float) -> list[Turn]:
        """The open backfills of some models that nobody has looked at for so many seconds."""
        keys = [_key(name) for name in models]
        taken, *found = self._script(keys=keys, args=["take", KEPT_S, int(after_s * 1000), MOST])
        turns = []
        for index, member, before in found:
            try:
                run = msgspec.json.decode(member, type=Run)
            except msgspec.MsgspecError as err:
                logger.warning("an entry of %s is dropped, it cannot be read: %r: %s", keys[index], member, err)
                self._settle(keys[index], member, int(taken))
            else:
                turns.append(Turn(run, keys[index], member, int(taken), int(before)))
        return turns

    def drop(self, turn: Turn) -> None:
        """It is not open any more; nothing if somebody else has found otherwise meanwhile."""
        self._settle(turn.key, turn.member, turn.taken)

    def give_back(self, turn: Turn) -> None:
        """Let another one look; nothing if somebody has meanwhile."""
        self._settle(turn.key, turn.member, turn.taken, turn.before)

    def _settle(self, key: str, member: bytes, taken: int, *before: int) -> None:
        """Forget an entry, or set it back to when it was looked at before, unless it was looked at since ``taken``."""
        self._script(keys=[key], args=["settle", KEPT_S, member, taken, *before])


def _key(model: str) -> str:
    return f"nograd:backfills:{model}"
