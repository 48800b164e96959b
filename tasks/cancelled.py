"""Which jobs were cancelled, for workers that could not hear it then: a zset in Redis, bounded in time and number."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from .keys import CANCELLED, CANCELLED_MOST, CANCELLED_TTL_S


def remember(redis: Any, task_ids: Iterable[str]) -> None:
    """Write down that jobs were cancelled, and forget those that were long ago.

    Raises:
        redis.RedisError: if Redis does not take it.
    """
    now = time.time()
    pipe = redis.pipeline()
    pipe.zadd(CANCELLED, dict.fromkeys(task_ids, now))
    pipe.zremrangebyscore(CANCELLED, "-inf", now - CANCELLED_TTL_S)
    pipe.zremrangebyrank(CANCELLED, 0, -CANCELLED_MOST - 1)
    pipe.expire(CANCELLED, CANCELLED_TTL_S)
    pipe.execute()


def recall(redis: Any) -> list[str]:
    """The ids of the jobs that were cancelled.

    Raises:
        redis.RedisError: if Redis does not answer.
    """
    since = time.time() - CANCELLED_TTL_S
    return [task_id.decode() for task_id in redis.zrangebyscore(CANCELLED, since, "+inf")]
