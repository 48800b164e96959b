"""The Redis keys the transport adds to kombu's, all under ``global_keyprefix``, with their owners and lifetimes."""

from __future__ import annotations

from typing import Final

#: zset, lease id → deadline in ms of Redis time; an entry lives as long as its message is held
LEASES: Final = "_nograd.leases"
#: hash, SHA-1 of a message → how often its worker died over it; removed when the message is acknowledged
DELIVERIES: Final = "_nograd.deliveries"
#: ms `DELIVERIES` is kept after its last change (messages that were purged leave an entry behind)
DELIVERIES_TTL_MS: Final = 7 * 24 * 3600 * 1000
#: string per process, the lease ids on its device or in preparation
SUSPECTS: Final = "_nograd.suspects."
#: ms `SUSPECTS` is kept: until somebody finds the leases of a dead process, which may be its own successor, started
#: long after it. Removed as soon as nothing is on the device
SUSPECTS_TTL_MS: Final = 7 * 24 * 3600 * 1000
#: list per queue and priority, at most one token
BELL: Final = "_nograd.bell."
#: ms an unheard bell is kept; a consumer that was busy for longer looks before it waits anyway
BELL_TTL_MS: Final = 60_000
#: list per process, wakes its own waiting consumer when a budget has room again
NUDGE: Final = "_nograd.nudge."
#: zset, dead message id → ms of Redis time; its owner is whoever replays or drops the dead
DEAD: Final = "_nograd.dead"
#: hash, dead message id → the message as it was published
DEAD_MESSAGES: Final = "_nograd.dead.messages"
#: hash, dead message id → JSON of what is known about it
DEAD_INFO: Final = "_nograd.dead.info"
