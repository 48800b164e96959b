"""A Redis transport for kombu and Celery that loses no message and drains several times faster.

Any Celery app adopts it with one line::

    app = Celery("app", broker="redis://…", amqp="nograd.tasks.transport:AMQP")

or with the setting ``broker_transport = "nograd.tasks.transport:Transport"`` (see `connection` for what a setting
cannot do), or for all apps of a process by calling `register_aliases` before they connect.

What a pool may ask of it; each function takes kombu messages (a Celery request has one as ``request.message``) and
does nothing for a message of another transport:

- `suspect` before a forward: if the process dies now, exactly these messages count a delivery;
- `delivery_count`: how often that has happened to a message (also its header ``x-delivery-count``);
- `started`: messages that no longer count against the budget of their priority;
- `give_back` at shutdown: unstarted messages return to the head of their queues, in order, at once;
- `bury`: to the dead list, with a reason (`DeadLetters` reads it);
- `set_budgets`: most unstarted messages of a priority this process holds;
- `throttle` and `resume`: how many more messages of a priority this process takes just now;
- `watch`: a watchdog; while it says False this process stops beating and others get its work;
- `relinquish` right before the process ends: others get everything it holds at their next beat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .channel import Channel, SentinelChannel
from .connection import AMQP, Connection
from .dead import DeadLetters
from .errors import TransportError
from .keeper import WATCHDOGS, Keeper, keepers, set_throttle
from .lease import Lease
from .message import DELIVERY_COUNT
from .transport import SentinelTransport, Transport

__all__ = [
    "AMQP",
    "DELIVERY_COUNT",
    "Channel",
    "Connection",
    "DeadLetters",
    "SentinelChannel",
    "SentinelTransport",
    "Transport",
    "TransportError",
    "bury",
    "delivery_count",
    "flush",
    "give_back",
    "register_aliases",
    "relinquish",
    "resume",
    "set_budgets",
    "started",
    "suspect",
    "throttle",
    "watch",
]


def register_aliases() -> None:
    """Let ``redis://``, ``rediss://``, ``redis+socket://`` and ``sentinel://`` mean this transport in this process."""
    from kombu.transport import TRANSPORT_ALIASES, _transport_cache

    plain, sentinel = f"{__name__}:Transport", f"{__name__}:SentinelTransport"
    for scheme, target in {"redis": plain, "rediss": plain, "sentinel": sentinel}.items():
        TRANSPORT_ALIASES[scheme] = target
        _transport_cache.pop(scheme, None)


def suspect(messages: Iterable[Any], stage: str = "device") -> None:
    """These are on the device (or in another ``stage``) from now on; they replace those of the call before.

    One small write whose reply nobody waits for. Call it with an empty list when nothing is there any more.
    """
    held = _by_keeper(messages)
    for keeper in keepers():
        keeper.suspect(stage, held.get(keeper, ()))


def delivery_count(message: Any) -> int:
    """How often a worker died with this message on its device or in preparation."""
    return int((message.headers or {}).get(DELIVERY_COUNT) or 0)


def started(messages: Iterable[Any]) -> None:
    """The messages no longer count as waiting in this process. Costs next to nothing the second time."""
    for keeper, leases in _by_keeper(messages).items():
        keeper.started(leases)


def give_back(messages: Iterable[Any]) -> None:
    """Return unstarted messages to the head of their queues, in the order given, and wait until Redis has them.

    Their requests must not be acknowledged afterwards; if they are, nothing happens.
    """
    for keeper, leases in _by_keeper(messages).items():
        for lease in leases:
            if lease.qos is not None:
                lease.qos.forget(lease.id)
        keeper.give_back(leases, remember=False, now=True)


def bury(message: Any, reason: str, **known: Any) -> bool:
    """Move the message, as it was published, to the dead list; False if it is not of this transport.

    Takes the place of acknowledging it.
    """
    buried = False
    for keeper, lease in _held([message]):
        if lease.qos is not None:
            lease.qos.forget(lease.id)
        keeper.bury(lease, reason, now=True, **known)
        buried = True
    return buried


def flush() -> bool:
    """Tell Redis at once what has been acknowledged; False if it cannot be reached."""
    flushed = [keeper.flush() for keeper in keepers()]  # every one, also after one that could not
    return all(flushed)


def set_budgets(channel: Any, budgets: dict[int, int]) -> None:
    """Most unstarted messages per priority that the process of this channel holds (also the option ``budgets``)."""
    keeper: Keeper | None = getattr(channel, "keeper", None)
    if keeper is not None:
        for priority, most in budgets.items():
            keeper.budgets[channel.priority(priority)] = most


def throttle(room: Callable[[int], int] | None) -> None:
    """Ask ``room`` before each fetch how many more messages of a priority this process takes; None asks nobody.

    It is asked on the event loop, so it must be quick; whoever said 0 calls `resume` when that has changed.
    """
    set_throttle(room)


def resume() -> None:
    """The throttle has room again: look for messages now. Any thread may call it."""
    for keeper in keepers():
        keeper.nudge_starved()


def watch(healthy: Callable[[], bool]) -> None:
    """Ask ``healthy`` before each beat; while it says False, nothing this process holds is renewed."""
    WATCHDOGS.append(healthy)


def relinquish(culprits: Iterable[Any]) -> None:
    """Let everything this process holds expire now, for good: the process must end right after.

    What has been acknowledged is told to Redis first. Only ``culprits`` count a delivery.
    """
    suspects = _by_keeper(culprits)
    for keeper in keepers():
        keeper.relinquish(suspects.get(keeper, ()))


def _held(messages: Iterable[Any]) -> Iterable[tuple[Keeper, Lease]]:
    for message in messages:
        lease = getattr(message, "lease", None)
        if isinstance(lease, Lease) and isinstance(lease.keeper, Keeper):
            yield lease.keeper, lease


def _by_keeper(messages: Iterable[Any]) -> dict[Keeper, list[Lease]]:
    """Leases in the order of their messages."""
    found: dict[Keeper, list[Lease]] = {}
    for keeper, lease in _held(messages):
        found.setdefault(keeper, []).append(lease)
    return found
