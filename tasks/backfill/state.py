"""What is wanted of a backfill, where a FLUSHALL does not reach: ``_state.json`` in the output folder.

Law: a backfill that somebody has paused or cancelled, or that a budget has stopped, goes on only when somebody resumes
it. `Window.wish` tells the workers the same at once, and may vanish, or come back in an older dump of Redis: what was
said there before the last resume is nobody's wish any more. This is what holds.
"""

from __future__ import annotations

import msgspec

from nograd.tasks.errors import BackfillError
from nograd.tasks.structs import decodable

from . import layout
from .plan import encode
from .store import Store
from .window import Window, Wish


@decodable
class State(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted.

    Attributes:
        wish: of the operator.
        why: what has stopped it, if nobody paused it by hand.
        error_budget: see `budget`; None for as many failed rows as there are.
        since: when it was last resumed, seconds since the epoch by Redis' clock.
    """

    wish: Wish = "run"
    why: str | None = None
    error_budget: float | None = None
    since: float = 0.0


def read(store: Store) -> State:
    """What is wanted; to run, where nobody has said anything.

    Raises:
        BackfillError: if what stands there cannot be read.
    """
    try:
        return msgspec.json.decode(store.read(layout.STATE), type=State)
    except FileNotFoundError:
        return State()
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        raise BackfillError(f"{store.url}/{layout.STATE} is not a state of this version: {err}") from err


def wanted(told: State, window: Window) -> State:
    """What is wanted: what the folder has told, unless Redis was told to stop after that was resumed.

    Raises:
        redis.RedisError: if Redis fails.
    """
    wish = window.wish_since(told.since) if told.wish == "run" else None
    return told if wish in (None, "run") else msgspec.structs.replace(told, wish=wish, why=window.why)


def write(store: Store, state: State) -> None:
    """Say what is wanted.

    Raises:
        OutputError: if the folder cannot be written.
    """
    store.replace(layout.STATE, encode(state))
