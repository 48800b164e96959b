"""How many inputs fit into a device's memory: learnt by running out of it, shared by the fleet through Redis.

Laws:

* Where a batch of a group ran out of memory, this worker caps the group's batches at once, every worker on a device of
  the same kind does within `SYNC_S`, and one that starts, or loads the model only then, begins with the cap.
* A cap is forgotten `keys.SAFE_SIZE_TTL_S` after it was learnt. The next full batch then shows whether it still holds,
  at the price of one forward: one bad moment cripples nobody for ever.
* The device thread never waits for Redis, and Redis away costs nothing but the sharing.
"""

from __future__ import annotations

import ast
import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import msgspec
import torch

from nograd.tasks.keys import SAFE_SIZE_TTL_S, SAFE_SIZES
from nograd.tasks.structs import decodable

logger = logging.getLogger(__name__)

#: seconds between two looks at what others have learnt
SYNC_S: Final = 30.0
#: groups of one kind of device that are remembered; groups are made of shapes callers choose
MOST: Final = 512

#: a model and the group of a batch
_Place: TypeAlias = tuple[str, Hashable]


@decodable
class SafeSize(msgspec.Struct, frozen=True):
    """What is known of one group, as Redis keeps it.

    Attributes:
        max_items: how many fit.
        until: when that is forgotten, seconds since the epoch.
    """

    max_items: int
    until: float


@dataclass(frozen=True, slots=True)
class _Learnt:
    model: str
    group: Hashable
    max_items: int


class SafeSizes:
    """Owns the thread that talks to Redis.

    Args:
        redis: the connection of the result backend.
        kind: of the device; only devices of one kind learn from each other (`kind_of`).
        cap: bounds the batches of a group, also of a model that is not here; None lifts that (`BatchQueue.cap`).
    """

    def __init__(self, redis: Any, kind: str, cap: Callable[[str, Hashable, int | None], None]) -> None:
        self._redis = redis
        self._key = SAFE_SIZES + kind
        self._cap = cap
        self._known: dict[_Place, SafeSize] = {}
        self._capped: dict[_Place, int] = {}
        self._learnt: queue.SimpleQueue[_Learnt | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="nograd-safe-sizes", daemon=True)

    def start(self) -> None:
        """Take over what is known, if Redis answers, and go on in a thread."""
        self._sync([])
        self._thread.start()

    def learn(self, model: str, group: Hashable, max_items: int) -> None:
        """So many items of a group fit, and more did not. Never blocks."""
        self._cap(model, group, max_items)
        self._learnt.put(_Learnt(model, group, max_items))

    def finish(self) -> None:
        """End the thread; what was learnt in its last moments may not get to Redis."""
        self._learnt.put(None)

    def _run(self) -> None:
        while True:
            learnt: list[_Learnt] = []
            with suppress(queue.Empty):
                first = self._learnt.get(timeout=SYNC_S)
                if first is None:
                    return
                learnt.append(first)
            try:
                self._sync(learnt)
            except Exception:
                logger.exception("the safe batch sizes could not be brought up to date; trying again")

    def _sync(self, learnt: list[_Learnt]) -> None:
        now = time.time()
        for each in learnt:
            place, size = (each.model, each.group), SafeSize(each.max_items, now + SAFE_SIZE_TTL_S)
            self._known[place] = size
            self._capped.pop(place, None)  # so that it is applied in any case
            logger.warning(
                "model %s: %d inputs of group %s fit into memory, more do not; batches are smaller for %d min",
                each.model, each.max_items, each.group, SAFE_SIZE_TTL_S // 60,
            )  # fmt: skip
        try:
            self._exchange(learnt, now)
        except Exception as err:  # noqa: BLE001 - any trouble with Redis; this worker knows what it knows
            logger.warning("safe batch sizes are not shared just now: %s", err)
        self._known = {place: size for place, size in self._known.items() if size.until > now}
        self._apply()

    def _exchange(self, learnt: list[_Learnt], now: float) -> None:
        """Tell Redis what is new, and take over what it has."""
        stored: dict[_Place, SafeSize] = {}
        stale: list[bytes] = []
        for field, value in self._redis.hgetall(self._key).items():
            place, size = _read(field, value)
            if place is None or size is None or not now < size.until < now + 2 * SAFE_SIZE_TTL_S:  # clocks may differ
                stale.append(field)
            else:
                stored[place] = size
        news: dict[str, bytes] = {}
        for each in learnt:
            place = (each.model, each.group)
            text = _text(place)
            if text is not None and (len(stored) < MOST or place in stored):
                news[text] = msgspec.json.encode(self._known[place])
        if news or stale:
            pipe = self._redis.pipeline()
            if stale:
                pipe.hdel(self._key, *stale)
            if news:
                pipe.hset(self._key, mapping=news)
                pipe.expire(self._key, SAFE_SIZE_TTL_S)
            pipe.execute()
        for place, size in stored.items():
            own = self._known.get(place)
            if own is None or size.until > own.until:
                self._known[place] = size

    def _apply(self) -> None:
        wanted = {place: size.max_items for place, size in self._known.items()}
        for place in self._capped.keys() - wanted.keys():
            self._cap(*place, None)
        for place, most in wanted.items():
            if self._capped.get(place) != most:
                self._cap(*place, most)
        self._capped = wanted


def kind_of(device: torch.device) -> str:
    """What devices must have in common to hold equally large batches: their name and their memory."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {properties.total_memory >> 20} MiB"


def _text(place: _Place) -> str | None:
    """A place as a field of a hash; None if it cannot be read back (a group of a user's own objects)."""
    text = repr(place)
    try:
        return text if ast.literal_eval(text) == place else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _read(field: bytes, value: bytes) -> tuple[_Place | None, SafeSize | None]:
    """An entry of the hash, whoever wrote it; None for what makes no sense."""
    try:
        model, group = ast.literal_eval(field.decode())
        hash(group)
        size = msgspec.json.decode(value, type=SafeSize)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, msgspec.DecodeError):
        return None, None
    return (str(model), group), size
