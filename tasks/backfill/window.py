"""Which chunks of a backfill are on their way: hints in Redis, never the truth.

::

    missing ──top_up──► queued ──claim──► running ──release──► (committed in storage, or missing again)
                          └── its message is nowhere (`find_lost`) ──► missing again

Laws:

* What is done is said by storage alone. Whoever empties Redis makes chunks run again; the first commit wins, and the
  committed bytes are the same.
* Anybody may top up at any time (the driver, the CLI, a worker that has finished a chunk): a chunk is issued to one of
  them only, and no more chunks are on their way than the workers need.
* A chunk whose message is nowhere, because whoever sent it or Redis died over it, is missing again after `SENDING_S`;
  one whose message waits is not issued again, however long it waits; only where there are too many messages to look
  at, or where none would be seen (`task.sending_s`), after `BLIND_S`.
* A chunk is run by one worker at a time, as long as that one renews its claim. A worker that was frozen longer loses
  it; what it commits afterwards loses, too.
* A chunk that killed its worker leaves what it was about to run (its *cursor*), so that the next attempt runs those
  rows apart.
* Every key has a TTL.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final, Literal

import msgspec

from nograd.tasks.keys import LEASE_S, PRIORITY_SUFFIXES, queue_name
from nograd.tasks.structs import decodable

#: seconds from issuing a chunk until its message is in the queue, at most; too short costs a message that ends at its
#: first look
SENDING_S: Final = 5.0
#: the same where there are too many messages to look at, or they are where nobody looks
BLIND_S: Final = 300.0
#: messages to look at for those of queued chunks; looking at more would hold up Redis
LOOKED_AT: Final = 10_000
#: seconds the keys of a backfill are kept after their last use
KEPT_S: Final = 7 * 24 * 3600
#: chunks that wait beyond one for each that runs, so that a worker that joins finds one
SPARE: Final = 2

#: kombu's hash of the messages that workers hold
_UNACKED: Final = "unacked"

#: what an operator wants of a backfill
Wish = Literal["run", "pause", "cancel"]

_SCRIPT = files(__package__).joinpath("window.lua").read_text(encoding="utf-8")
_LOST = files(__package__).joinpath("lost.lua").read_text(encoding="utf-8")


def message_id(job: str, chunk: int | None = None) -> str:
    """What the id of a chunk's message begins with; without a chunk, those of all. `Window.find_lost` knows it by that.

    Args:
        job: the id of the backfill.
        chunk: which.
    """
    return f"{job}-" if chunk is None else f"{job}-{chunk:06d}-"


@decodable
class Cursor(msgspec.Struct, frozen=True):
    """What an attempt at a chunk was about to do, for the next one if it does not come back.

    Rows are counted by their place in the chunk.

    Attributes:
        first: the first row that was being prepared or run.
        count: how many rows from there on.
        deaths: attempts before this one that did not come back over (some of) these rows.
        probe: the row that was run alone, its prediction thrown away, to find out whether it kills; None if none was.
        killers: rows that have killed a worker alone.
        probed: first row and end of those that were run alone last, and did not kill.
    """

    first: int = 0
    count: int = 0
    deaths: int = 0
    probe: int | None = None
    killers: list[int] = []
    probed: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Traffic:
    """How many chunks are on their way."""

    queued: int
    running: int


class Window:
    """The hints of one backfill.

    Any thread and any process may use it.

    Args:
        client: a Redis client.
        job: the backfill's id.
        claim_s: seconds a worker may be silent before its chunk is given to another.

    Raises:
        redis.RedisError: from each method, if Redis fails.
    """

    def __init__(self, client: Any, job: str, claim_s: float = LEASE_S) -> None:
        self.client = client
        self.claim_s = claim_s
        self._script = client.register_script(_SCRIPT)
        self._lost = client.register_script(_LOST)
        self._job = job
        self._prefix = f"nograd:backfill:{job}:"
        self._keys = [self._prefix + name for name in ("queued", "running", "owners", "cursors")]

    def top_up(self, missing: Iterable[int], most: int, spare: int = SPARE) -> list[int]:
        """Choose the chunks to send now.

        Args:
            missing: chunks without a commit, in the order in which to run them; only as many are looked at as there are
                on their way and to be issued.
            most: chunks to issue, at most.
            spare: chunks that wait although no worker runs one.
        """
        # One queued for each running, so that a worker goes on without waiting for this; and the spare ones.
        traffic = self.traffic()
        room = min(most, traffic.running + spare - traffic.queued)
        if room <= 0:
            return []
        looked_at = _first(missing, traffic.queued + traffic.running + room)
        issued = self._call("issue", room, *looked_at)
        return [int(chunk) for chunk in issued]

    def claim(self, chunk: int, owner: str) -> bool:
        """Take a chunk, or renew the claim on it; False if another owner is alive."""
        return bool(self._call("claim", chunk, owner, int(self.claim_s * 1000)))

    def release(self, chunk: int, owner: str) -> None:
        """End the claim and forget the cursor; nothing if another has the chunk by now."""
        self._call("release", chunk, owner)

    def expect(self, chunk: int) -> None:
        """The message of a chunk comes back by itself, later: nobody need issue it meanwhile."""
        self._call("expect", chunk)

    def forget(self, chunk: int) -> None:
        """The message of a chunk could not be sent: it is missing again."""
        self._call("forget", chunk)

    def find_lost(self, model: str, sending_s: float = SENDING_S) -> None:
        """Look for the messages of the queued chunks; those that have none are missing again.

        Args:
            model: in whose queue they are.
            sending_s: seconds a message may take from `top_up` to the queue; more than `LOOKED_AT` of them are not
                looked at, and it is `BLIND_S` at the least.
        """
        keys = [self._keys[0], queue_name(model) + PRIORITY_SUFFIXES[-1], _UNACKED]
        args = [int(sending_s * 1000), message_id(self._job), LOOKED_AT, int(BLIND_S * 1000)]
        self._lost(keys=keys, args=args)

    def traffic(self) -> Traffic:
        """How many chunks are on their way."""
        queued, running = self._call("count")
        return Traffic(int(queued), int(running))

    def note(self, chunk: int, cursor: Cursor) -> None:
        """Say which rows come next: if the process dies now, it was over one of these."""
        pipe = self.client.pipeline(transaction=False)
        pipe.hset(self._keys[3], str(chunk), msgspec.json.encode(cursor))
        pipe.expire(self._keys[3], KEPT_S)
        pipe.execute()

    def cursor(self, chunk: int) -> Cursor | None:
        """What an attempt that has died was about to run; None if there was none."""
        stored = self.client.hget(self._keys[3], str(chunk))
        try:
            return None if stored is None else msgspec.json.decode(stored, type=Cursor)
        except msgspec.MsgspecError:
            return None  # a hint of another version

    def stop(self, why: str) -> None:
        """Pause, because of something that somebody has to look at."""
        said = f"pause {self.now()}"
        pipe = self.client.pipeline(transaction=True)
        pipe.set(self._prefix + "wish", said, ex=KEPT_S)
        pipe.set(self._prefix + "why", why, ex=KEPT_S)
        pipe.execute()

    @property
    def out(self) -> str | None:
        """The URL of the output folder, for those who know the id alone."""
        stored = self.client.get(self._prefix + "out")
        return None if stored is None else _text(stored)

    @out.setter
    def out(self, url: str) -> None:
        self.client.set(self._prefix + "out", url, ex=KEPT_S)

    @property
    def why(self) -> str | None:
        """What `stop` was told; None after the next wish."""
        stored = self.client.get(self._prefix + "why")
        return None if stored is None else _text(stored)

    def count_troubles(self, chunk: int) -> int:
        """How often a chunk has met trouble that is no row's since somebody last resumed, with this time."""
        pipe = self.client.pipeline(transaction=True)
        pipe.hincrby(self._prefix + "troubles", str(chunk), 1)
        pipe.expire(self._prefix + "troubles", KEPT_S)
        times, _ = pipe.execute()
        return int(times)

    def count_failures(self, rows: int) -> int:
        """Add a committed chunk's failed rows to a running count, which a FLUSHALL starts anew; the sum."""
        pipe = self.client.pipeline(transaction=True)
        pipe.hincrby(self._prefix + "sums", "failed", rows)
        pipe.expire(self._prefix + "sums", KEPT_S)
        failed, _ = pipe.execute()
        return int(failed)

    @property
    def wish(self) -> Wish | None:
        """What the operator wants, if Redis remembers."""
        return self.wish_since(0.0)

    @wish.setter
    def wish(self, wish: Wish) -> None:
        said = f"{wish} {self.now()}"
        pipe = self.client.pipeline(transaction=True)  # in one step: else the reason of a stop in between is lost
        pipe.set(self._prefix + "wish", said, ex=KEPT_S)
        pipe.delete(self._prefix + "why", self._prefix + "troubles")
        pipe.execute()

    def wish_since(self, since: float) -> Wish | None:
        """What the operator wants, unless that was said before ``since``: a Redis that restarts may know no later word.

        Args:
            since: seconds since the epoch, by Redis' clock (`now`).
        """
        stored = self.client.get(self._prefix + "wish")
        wish, _, said_at = (_text(stored) if stored is not None else "").partition(" ")
        if wish not in ("run", "pause", "cancel") or float(said_at or "inf") < since:
            return None
        return wish  # type: ignore[return-value]

    def now(self) -> float:
        """Seconds since the epoch, by Redis' clock: the same for all who wish."""
        seconds, microseconds = self.client.time()
        return float(seconds + microseconds / 1e6)

    def clear(self) -> None:
        """Remove all hints: they are of an output that is gone."""
        others = ("wish", "why", "sums", "troubles", "out")
        self.client.delete(*self._keys, *(self._prefix + name for name in others))

    def _call(self, what: str, *args: str | int) -> Any:
        return self._script(keys=self._keys, args=[what, KEPT_S, *args])


def _first(values: Iterable[int], most: int) -> list[int]:
    taken: list[int] = []
    for value in values:
        if len(taken) >= most:
            break
        taken.append(value)
    return taken


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
