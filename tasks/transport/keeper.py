"""The lease keeper: what this process holds, kept alive from a thread and a connection of its own.

Channels come and go with connections; what a worker runs does not. So deliveries belong to the process: the keeper
beats for them, acknowledges them, gives them back and buries them, whatever has become of their channel.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from kombu.log import get_logger
from redis import ConnectionPool
from redis.exceptions import RedisError

from . import names
from .lease import Lease
from .scripts import ACK, BEAT, BURY, GIVE_BACK
from .wire import Command, Wire

logger = get_logger(__name__)

_Item = TypeVar("_Item")

#: each must say True, or this process is considered stuck and no keeper of it beats; also one that is made later
WATCHDOGS: Final[list[Callable[[], bool]]] = []

#: seconds the acknowledgements of a burst wait for each other, so that they share one write
GATHER_S: Final = 0.003
#: seconds until a flush that failed is tried again
RETRY_S: Final = 0.5
#: seconds between two complaints about a Redis that is away
COMPLAIN_S: Final = 10.0
#: acknowledgements, beats and returns per script call (Lua's unpack and Redis' patience have limits)
PER_CALL: Final = 500


@dataclass(frozen=True, slots=True)
class Terms:
    """How long this process may hold what it has taken, in seconds.

    Attributes:
        lease_s: a worker that is silent for this long has lost what it holds.
        beat_s: between two renewals.
        max_hold_s: longer than this nothing is held, however lively the worker.
    """

    lease_s: float = 30.0
    beat_s: float = 5.0
    max_hold_s: float = 24 * 3600.0

    @property
    def lease_ms(self) -> int:
        """The lease, as the scripts take it."""
        return int(self.lease_s * 1000)

    @property
    def tolerance_s(self) -> float:
        """A command that runs later than this after it was sent was stuck on its way."""
        return min(2.0, max(0.5, self.beat_s))


@dataclass(frozen=True, slots=True)
class Keys:
    """The full names of the keys (``global_keyprefix`` included)."""

    prefix: str
    unacked: str
    unacked_index: str

    def of_lists(self) -> list[str]:
        """What every script that settles leases begins with."""
        return [self.unacked, self.unacked_index, self.prefix + names.LEASES, self.prefix + names.DELIVERIES]


@dataclass(frozen=True, slots=True)
class _Return:
    lease: Lease
    tail: bool
    remember: bool


@dataclass(frozen=True, slots=True)
class _Burial:
    lease: Lease
    dead_id: str
    info: str


class Keeper:
    """Owner of all deliveries this process holds from one Redis.

    Every method may be called from any thread. None but `flush` and `beat` waits for Redis (and those that are
    told to, ``now=True``). What fails is kept and tried again: an acknowledgement is never an exception in a task.
    """

    def __init__(self, pool: Callable[[], ConnectionPool], keys: Keys, terms: Terms) -> None:
        self.keys = keys
        self.terms = terms
        #: the first part of every lease id of this process
        self.holder = uuid.uuid4().hex[:12]
        #: most unstarted messages per priority step; absent is unlimited
        self.budgets: dict[int, int] = {}
        #: as `WATCHDOGS`, for this keeper alone
        self.watchdogs: list[Callable[[], bool]] = []
        self._wire = Wire(pool)
        self._marks = Wire(pool)
        self._held: dict[str, Lease] = {}
        self._unstarted: dict[int, set[str]] = {}
        self._orphans: set[str] = set()
        self._acks: deque[Lease] = deque()
        self._others: deque[_Return | _Burial] = deque()
        self._forgotten: deque[str] = deque()
        self._stages: dict[str, tuple[str, ...]] = {}
        #: by id: unlike a WeakSet, its `valuerefs` may be taken while another thread changes it
        self._channels: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._clock: tuple[float, float] | None = None
        self._sweep_after = 0.0
        self._stuck = False
        self._relinquished = False
        self._complained_at = -COMPLAIN_S
        self._fetches = itertools.count(1)
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._thread_lock = threading.Lock()
        self._flush_lock = threading.Lock()
        self._beat_lock = threading.Lock()
        self._stages_lock = threading.Lock()

    # -- what is held ------------------------------------------------------------------------------------------------

    def next_prefix(self) -> str:
        """Prefix of the lease ids of one fetch; no two fetches share one."""
        return f"{self.holder}.{next(self._fetches)}."

    def hold(self, leases: Iterable[Lease]) -> None:
        """Begin to beat for what a fetch has brought."""
        for lease in leases:
            lease.keeper = self
            self._held[lease.id] = lease
            self._unstarted.setdefault(lease.step, set()).add(lease.id)
        self._ensure_thread()

    def bind(self, lease: Lease, message: Any, *, weak: bool) -> None:
        """The message of a lease has been made: it may be acknowledged from now on."""
        lease.bind(message, forget=self._forgotten.append if weak else None)

    def room(self, step: int) -> int | None:
        """How many more messages of this priority the process may take; None is no limit."""
        budget = self.budgets.get(step)
        room = None if budget is None else max(0, budget - len(self._unstarted.get(step, ())))
        if _throttle is None:
            return room
        return _throttle(step) if room is None else min(room, _throttle(step))

    def started(self, leases: Iterable[Lease]) -> None:
        """These messages no longer count against the budgets of their priorities."""
        first = [lease for lease in leases if not lease.started]
        for lease in first:
            lease.started = True
            self._unstarted.get(lease.step, set()).discard(lease.id)
        if first and self.budgets:
            self.nudge_starved()

    @property
    def held(self) -> int:
        """Deliveries this process beats for."""
        return len(self._held)

    @property
    def orphans(self) -> int:
        """Deliveries of closed channels that are still being worked on; they take up the credit of the next channel."""
        return len(self._orphans)

    def adopt(self, leases: Iterable[Lease]) -> None:
        """Their channel has closed, but whoever works on them goes on."""
        for lease in leases:
            if lease.id in self._held:
                self._orphans.add(lease.id)
                lease.qos = None
                lease.loosen(self._forgotten.append)

    # -- settling ----------------------------------------------------------------------------------------------------

    def ack(self, lease: Lease, *, now: bool = False) -> None:
        """The message is done with."""
        if self._release(lease):
            self._acks.append(lease)
            self._settle(now=now)

    def give_back(
        self, leases: Iterable[Lease], *, tail: bool = False, remember: bool = True, now: bool = False
    ) -> None:
        """Put messages back where they came from, in the order given (the first is the next to be taken).

        Args:
            leases: a lease that is settled or lost is skipped.
            tail: behind everything that waits, instead of before it.
            remember: stamp them as redelivered. False for what has certainly not been started.
            now: wait until Redis has them.
        """
        mine = [lease for lease in leases if self._release(lease)]
        self._others.extend(_Return(lease, tail, remember) for lease in mine)
        if mine:
            self._settle(now=now)

    def bury(self, lease: Lease, reason: str, *, now: bool = False, **known: Any) -> None:
        """Move the message to the dead list, with the reason and whatever else is known."""
        if self._release(lease):
            dead_id = ".".join(lease.id.split(".", 3)[:3])
            info = {"id": dead_id, "reason": reason, "queue": lease.queue, "list": lease.name, "at": time.time(),
                    "deliveries": max(0, lease.deliveries), **known}  # fmt: skip
            self._others.append(_Burial(lease, dead_id, json.dumps(info, default=str)))
            self._settle(now=now)

    def flush(self) -> bool:
        """Tell Redis what has been settled; False if that has to wait."""
        with self._flush_lock:
            acks, others = _drain(self._acks), _drain(self._others)
            if not acks and not others:
                return True
            try:
                replies = self._wire.call([*self._ack_commands(acks), *self._other_commands(others)])
                failed = next((reply for reply in replies if isinstance(reply, Exception)), None)
            except (RedisError, OSError) as err:
                failed = err
            if failed is None:
                return True
            # Each of these scripts does nothing the second time, so all of them can be repeated.
            self._acks.extendleft(reversed(acks))
            self._others.extendleft(reversed(others))
        self._complain("Redis did not take %d settled messages, trying again: %s", len(acks) + len(others), failed)
        return False

    # -- poison ------------------------------------------------------------------------------------------------------

    def suspect(self, stage: str, leases: Iterable[Lease]) -> None:
        """If this process dies now, count a delivery for exactly these (and those of the other stages).

        Written before it returns, without waiting for the reply; failing to write counts nothing.
        """
        with self._stages_lock:
            ids = tuple(lease.id for lease in leases)
            if self._relinquished:
                return
            if self._stages.get(stage, ()) == ids:
                return
            self._stages[stage] = ids
            try:
                self._marks.send([self._suspects_command([i for each in self._stages.values() for i in each])])
            except (RedisError, OSError) as err:
                logger.debug("suspects were not written: %s", err)

    def relinquish(self, suspects: Iterable[Lease]) -> None:
        """Let everything expire that is still held, and renew nothing any more; exactly the suspects count a delivery.

        Raises:
            RedisError, OSError: if Redis does not answer; everything expires in its time then.
        """
        self.flush()
        with self._beat_lock, self._stages_lock:  # a beat that is on its way may still renew; none comes after it
            self._relinquished = True
            ids = list(self._held)
            commands = [self._suspects_command([lease.id for lease in suspects])]
            for k in range(0, len(ids), PER_CALL):
                chunk = ids[k : k + PER_CALL]
                scores = [part for lease_id in chunk for part in (0, lease_id)]
                commands.append(("ZADD", self.keys.prefix + names.LEASES, "XX", *scores))
            self._wire.call(commands)

    def _suspects_command(self, ids: list[str]) -> Command:
        key = self._suspects_key(self.holder)
        return ("SET", key, "\n" + "\n".join(ids) + "\n", "PX", names.SUSPECTS_TTL_MS) if ids else ("DEL", key)

    # -- beating -----------------------------------------------------------------------------------------------------

    def beat(self) -> bool:
        """Renew every lease, hear which are lost, reclaim what others let expire; False if Redis did not answer."""
        with self._beat_lock:
            if self._relinquished:
                return True
            self._bury_forgotten()
            leases = self._beating()
            sent = time.monotonic()
            by = self._redis_ms(sent) if sent >= self._sweep_after else 0
            chunks = [leases[k : k + PER_CALL] for k in range(0, len(leases), PER_CALL)] or [[]]
            keys = [self.keys.prefix + names.LEASES, self.keys.unacked_index]
            commands = [
                BEAT.call(keys, [self.terms.lease_ms, by if k == 0 else 0, PER_CALL, *(lease.id for lease in chunk)])
                for k, chunk in enumerate(chunks)
            ]
            try:
                replies = self._wire.call(commands)
                for reply in replies:
                    if isinstance(reply, Exception):
                        raise reply
            except (RedisError, OSError) as err:
                self._hold_off()
                self._complain("%d leases could not be renewed, trying again: %s", len(leases), err)
                return False
            expired = self._heard(leases, replies, sent, by)
        if expired:
            self._reclaim(expired)
        return True

    def _beating(self) -> list[Lease]:
        if not all(watchdog() for watchdog in (*WATCHDOGS, *self.watchdogs)):
            if not self._stuck:
                logger.critical("no progress: %d leases are left to expire", len(self._held))
            self._stuck = True
            return []
        self._stuck = False
        leases, oldest = [], time.monotonic() - self.terms.max_hold_s
        for lease in list(self._held.values()):
            if lease.since < oldest and self._release(lease):
                logger.error("held for more than %s s and given up: %s", self.terms.max_hold_s, lease.id)
            else:
                leases.append(lease)
        return leases

    def _heard(self, leases: list[Lease], replies: list[Any], sent: float, by: int) -> list[str]:
        now = time.monotonic()
        self._clock = (float(replies[0][0]), now)
        lost: set[str] = set()
        for _, _, count, *rest in replies:
            lost.update(_text(each) for each in rest[:count])
        expired = [_text(each) for each in replies[0][3 + replies[0][2] :]]
        if (by and not replies[0][1]) or now - sent > self.terms.tolerance_s:
            self._hold_off()
            expired = []
        for lease in leases:
            if lease.id not in lost:
                lease.deadline = sent + self.terms.lease_s
            elif self._release(lease):
                # Not there, although nobody here has settled it since the command was written.
                lease.lost = True
                logger.warning("lost to another worker: %s", lease.id)
        return expired

    def _reclaim(self, expired: list[str]) -> None:
        """Give back what its holder has let expire; the script looks again whether it has."""
        expired.sort(key=_age, reverse=True)
        done = 0
        for k in range(0, len(expired), PER_CALL):
            leases = expired[k : k + PER_CALL]
            try:
                (reply,) = self._wire.call([self._give_back_command(leases, by=self._redis_ms(time.monotonic()))])
            except (RedisError, OSError):
                self._hold_off()
                return
            if isinstance(reply, Exception):
                logger.error("expired leases cannot be given back: %s", reply)
                return
            done += len(reply)
        if done:
            logger.warning("%d messages of workers that fell silent are back in their queues", done)

    def _hold_off(self) -> None:
        """After an outage or a freeze the living beat first, then the dead are looked for."""
        self._clock = None
        self._sweep_after = time.monotonic() + 2 * self.terms.beat_s

    def _redis_ms(self, now: float) -> int:
        """By when, in Redis' time, a command that is sent now should run; 0 if its clock is not known."""
        if self._clock is None:
            return 0
        redis_ms, at = self._clock
        return int(redis_ms + (now - at + self.terms.tolerance_s) * 1000)

    def _bury_forgotten(self) -> None:
        while self._forgotten:
            lease = self._held.get(self._forgotten.popleft())
            if lease is not None:
                qos = lease.qos
                if self._release(lease):
                    if qos is not None:
                        qos.forget(lease.id)
                    logger.warning("nobody can acknowledge it any more, its lease will expire: %s", lease.id)

    # -- commands ----------------------------------------------------------------------------------------------------

    def _ack_commands(self, leases: list[Lease]) -> list[Command]:
        keys = self.keys.of_lists()
        return [
            ACK.call(keys, [part for lease in leases[k : k + PER_CALL] for part in (lease.id, lease.sha)])
            for k in range(0, len(leases), PER_CALL)
        ]

    def _other_commands(self, others: list[_Return | _Burial]) -> list[Command]:
        commands: list[Command] = []
        returns = [other for other in others if isinstance(other, _Return)]
        for tail in (False, True):
            for remember in (False, True):
                ids = [each.lease.id for each in returns if (each.tail, each.remember) == (tail, remember)]
                if not tail:
                    ids.reverse()
                commands.extend(
                    self._give_back_command(ids[k : k + PER_CALL], tail=tail, remember=remember)
                    for k in range(0, len(ids), PER_CALL)
                )
        prefix = self.keys.prefix
        keys = [*self.keys.of_lists(), prefix + names.DEAD, prefix + names.DEAD_MESSAGES, prefix + names.DEAD_INFO]
        commands.extend(
            BURY.call(keys, [other.lease.id, other.dead_id, other.info])
            for other in others
            if isinstance(other, _Burial)
        )
        return commands

    def _give_back_command(self, ids: list[str], *, by: int = 0, tail: bool = False, remember: bool = True) -> Command:
        keys = self.keys.of_lists()
        for lease_id in ids:
            name = lease_id.split("|", 1)[1]
            holder = lease_id.split(".", 1)[0]
            keys += [self.keys.prefix + name, self.keys.prefix + names.BELL + name, self._suspects_key(holder)]
        flags = [int(by > 0), by, int(tail), int(remember), names.DELIVERIES_TTL_MS, names.BELL_TTL_MS]
        return GIVE_BACK.call(keys, [*flags, *ids])

    def _suspects_key(self, holder: str) -> str:
        return self.keys.prefix + names.SUSPECTS + holder

    def nudge_command(self, channel: Any) -> list[Command]:
        """Wake this channel's own consumer, and no other."""
        return [("LPUSH", channel.nudge_key, "1"), ("PEXPIRE", channel.nudge_key, names.BELL_TTL_MS)]

    def nudge(self, channel: Any) -> bool:
        """Wake this channel's own consumer now; False if Redis cannot be reached."""
        try:
            self._wire.call(self.nudge_command(channel))
        except (RedisError, OSError):
            return False
        return True

    # -- the thread --------------------------------------------------------------------------------------------------

    def attach(self, channel: Any) -> None:
        """A channel consumes; while one does, this process also looks for expired leases of others."""
        self._channels[id(channel)] = channel
        self._ensure_thread()

    def detach(self, channel: Any) -> None:
        """The channel has stopped consuming."""
        self._channels.pop(id(channel), None)
        self._wake.set()

    @property
    def wire(self) -> Wire:
        """The keeper's connection."""
        return self._wire

    def abandon(self) -> None:
        """Forget everything and stop; what was held expires."""
        self.forget()
        _keepers_without(self)
        self._wake.set()

    def forget(self) -> None:
        """Hold nothing any more (in a forked child: no lock is taken, a thread that is not here may have it)."""
        for held in (self._held, self._acks, self._others, self._forgotten, self._orphans):
            held.clear()
        self._channels.clear()

    def _complain(self, text: str, *args: Any) -> None:
        if time.monotonic() - self._complained_at > COMPLAIN_S:
            self._complained_at = time.monotonic()
            logger.warning(text, *args)

    def _release(self, lease: Lease) -> bool:
        """Stop beating for it; False if that had happened before. The one place where a delivery ends."""
        if self._held.pop(lease.id, None) is None:
            return False
        self._orphans.discard(lease.id)
        self._unstarted.get(lease.step, set()).discard(lease.id)
        if self.budgets:
            self.nudge_starved()
        return True

    def _settle(self, *, now: bool) -> None:
        if not now or not self.flush():
            if not self._wake.is_set():
                self._wake.set()
            self._ensure_thread()

    def nudge_starved(self) -> None:
        """A priority that had no room may have some now: wake the consumers that do not listen for it."""
        for ref in self._channels.valuerefs():
            channel = ref()
            if channel is not None and channel.starved:
                channel.starved = False
                with suppress(RedisError, OSError):  # it looks by itself within a second
                    self._marks.send(self.nudge_command(channel))

    def _ensure_thread(self) -> None:
        if self._thread is None:
            with self._thread_lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="nograd-lease-keeper", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        next_beat = time.monotonic()
        while True:
            try:
                if self._wake.wait(max(0.0, next_beat - time.monotonic())):
                    time.sleep(GATHER_S)
                    self._wake.clear()
                    if not self.flush():
                        time.sleep(RETRY_S)
                        self._wake.set()
                if time.monotonic() >= next_beat:
                    answered = self.beat()
                    next_beat = time.monotonic() + (self.terms.beat_s if answered else min(1.0, self.terms.beat_s))
            except Exception:
                # The thread that keeps the leases alive must outlive every mistake made in it.
                logger.exception("lease keeper")
                time.sleep(RETRY_S)
                next_beat = time.monotonic()
            if self._idle():
                return

    def _idle(self) -> bool:
        """End the thread when there is nothing to keep; the next `attach` or `hold` starts another."""
        if self._channels or self._held or self._acks or self._others:
            return False
        with self._thread_lock:
            self._wire.close()
            self._marks.close()
            self._thread = None
            # Whoever comes now starts another thread; whoever came while this one seemed to be there is seen here.
            if self._channels or self._held or self._acks or self._others:
                self._thread = threading.current_thread()
                return False
            return True


def _drain(queue: deque[_Item]) -> list[_Item]:
    items = []
    while queue:
        items.append(queue.popleft())
    return items


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _age(lease_id: str) -> tuple[str, int, int]:
    """Sorts the leases of one holder in the order it took them."""
    holder, fetch, n, _ = lease_id.split(".", 3)
    return holder, int(fetch), int(n)


#: how many more messages of a priority step this process takes; None if nobody has a say
_throttle: Callable[[int], int] | None = None


def set_throttle(room: Callable[[int], int] | None) -> None:
    """Let ``room`` bound every fetch of this process."""
    global _throttle  # noqa: PLW0603 - of the process, like the keepers, which come later than a pool
    _throttle = room


_keepers: dict[Any, Keeper] = {}
_keepers_lock = threading.Lock()


def keeper_of(key: Any, make: Callable[[], Keeper]) -> Keeper:
    """The keeper of this process for one Redis."""
    with _keepers_lock:
        keeper = _keepers.get(key)
        if keeper is None:
            keeper = _keepers[key] = make()
        return keeper


def keepers() -> list[Keeper]:
    """All keepers of this process."""
    with _keepers_lock:
        return list(_keepers.values())


def _keepers_without(keeper: Keeper) -> None:
    for key in [key for key, each in _keepers.items() if each is keeper]:
        del _keepers[key]


@atexit.register
def _flush_all() -> None:
    for keeper in keepers():
        keeper.flush()


def _forget_all() -> None:
    """A forked child holds nothing: its parent does."""
    global _keepers_lock  # noqa: PLW0603 - the lock may be held by a thread that does not exist here
    _keepers_lock = threading.Lock()
    for keeper in _keepers.values():
        keeper.forget()
    _keepers.clear()


os.register_at_fork(after_in_child=_forget_all)
