"""What must hold before a worker starts: the right kombu, and a Redis that keeps what it is given."""

from __future__ import annotations

from typing import Any

import kombu
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from .errors import TransportError
from .wire import Wire

#: the kombu whose private parts this transport was written against
KOMBU = (5, 7)
#: the first Redis with ZMSCORE, LMOVE and float timeouts that blocks and scripts as we need it
REDIS = (6, 2)

_PRIVATE: dict[Any, tuple[str, ...]] = {
    kombu.Connection: ("_info", "__eqhash__", "Pool"),
    kombu_redis.Channel: (
        "_brpop_start", "_brpop_read", "_in_poll", "_brpop_sent_at", "_connparams", "_get_pool", "_disconnect_pools",
        "_create_client", "_close_clients", "_q_for_pri", "_put", "_get", "_basic_cancel", "_update_queue_cycle",
        "_flush_brpop_reauth", "create_publish_batch", "conn_or_acquire", "ack_emulation", "priority_steps",
        "global_keyprefix",
    ),
    kombu_redis.QoS: ("append", "ack", "reject", "restore_unacked", "restore_unacked_once", "restore_visible"),
    kombu_redis.MultiChannelPoller: (
        "_update_brpop_polling", "_register_BRPOP", "_register_LISTEN", "on_readable", "handle_event", "get", "close",
        "discard",
    ),
    kombu_redis.PublishBatch: ("publish", "add", "flush"),
    virtual.Channel: ("_reset_cycle", "_get_message_priority", "do_restore"),
    virtual.Transport: ("_deliver", "close_connection", "close_channel"),
}  # fmt: skip


def check_kombu(version: tuple[Any, ...] = tuple(kombu.VERSION)) -> None:
    """Refuse a kombu whose inside may look different.

    Raises:
        TransportError: naming the version, or the parts that are missing.
    """
    installed = ".".join(str(part) for part in version[:3])
    wanted = ".".join(str(part) for part in KOMBU)
    if tuple(version[:2]) != KOMBU:
        raise TransportError(
            f"kombu {installed} is installed; this transport relies on the inside of kombu {wanted} "
            "and is tested with no other"
        )
    missing = [
        f"{owner.__name__}.{name}" for owner, parts in _PRIVATE.items() for name in parts if not hasattr(owner, name)
    ]
    if missing:
        raise TransportError(f"kombu {installed} lacks {', '.join(missing)}, which this transport relies on")


def check_server(wire: Wire, *, allow_eviction: bool) -> None:
    """Refuse a Redis that is too old or throws keys away when memory runs short.

    A server that does not answer INFO (managed ones, narrow ACLs) is taken at its word.

    Raises:
        TransportError: naming what was found and what to change.
        ConnectionError: of redis, if it cannot be reached.
    """
    replies = wire.call([("INFO", "server"), ("INFO", "memory")])
    server, memory = (_info(reply) for reply in replies)
    version = server.get("redis_version", "")
    # Valkey calls itself 7.2.4 here for the sake of old clients, and KeyDB 6.3.4: both are right for our purpose.
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers and numbers < REDIS:
        raise TransportError(
            f"Redis {version} is too old for this transport; it needs {'.'.join(map(str, REDIS))} or newer"
        )
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy != "noeviction" and not allow_eviction:
        raise TransportError(
            f"Redis has maxmemory-policy {policy}: when memory runs short it deletes queues, leases or results. "
            "Set maxmemory-policy noeviction, or the transport option allow_eviction if losing jobs is acceptable"
        )


def refused(err: AuthenticationError | NoPermissionError) -> TransportError:
    """What to say when Redis does not let us in."""
    return TransportError(
        f"Redis refuses the connection ({err}); check user name and password in the broker URL and its ACL"
    )


def _info(reply: Any) -> dict[str, str]:
    if isinstance(reply, ResponseError):
        return {}
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else str(reply)
    return dict(line.strip().split(":", 1) for line in text.splitlines() if ":" in line)
