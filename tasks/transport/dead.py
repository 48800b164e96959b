"""The dead list: messages nobody can run, kept whole until an operator replays or drops them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import redis

from . import names
from .doorbell import bell
from .scripts import PUSH


class DeadLetters:
    """The dead of one Redis database.

    Nothing here expires by itself: a dead letter is removed by `replay` or `drop`.
    """

    def __init__(self, client: redis.Redis, prefix: str = "") -> None:
        self._redis: Any = client
        self._prefix = prefix

    def __len__(self) -> int:
        return int(self._redis.zcard(self._prefix + names.DEAD))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """What is known of each, oldest first: id, reason, queue, list, at, deliveries, and what its worker added."""
        for dead_id in self._redis.zrange(self._prefix + names.DEAD, 0, -1):
            info = self._redis.hget(self._prefix + names.DEAD_INFO, dead_id)
            if info is not None:
                yield json.loads(info)

    def message(self, dead_id: str) -> bytes | None:
        """The message as it was published."""
        raw: bytes | None = self._redis.hget(self._prefix + names.DEAD_MESSAGES, dead_id)
        return raw

    def replay(self, dead_id: str) -> bool:
        """Put the message at the end of the queue it came from; False if there is no such dead letter.

        The message is in the queue before it leaves the dead list: it may then run twice, but is never in neither.
        """
        raw, info = self.message(dead_id), self._redis.hget(self._prefix + names.DEAD_INFO, dead_id)
        if raw is None or info is None:
            return False
        name = json.loads(info)["list"]
        self._redis.eval(PUSH.source, 2, self._prefix + name, bell(self._prefix, name), raw, names.BELL_TTL_MS)
        self.drop(dead_id)
        return True

    def drop(self, dead_id: str) -> bool:
        """Forget the message; False if there is no such dead letter."""
        with self._redis.pipeline() as pipe:
            pipe.zrem(self._prefix + names.DEAD, dead_id)
            pipe.hdel(self._prefix + names.DEAD_INFO, dead_id)
            pipe.hdel(self._prefix + names.DEAD_MESSAGES, dead_id)
            return bool(pipe.execute()[0])
