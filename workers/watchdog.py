"""The thread that watches the others: it ends waiting in time, and finds a model's code that hangs.

Laws:

* A forward, or the preparation or ``finish`` of one input, that takes longer than its model's ``hard_timeout_s`` is
  called out, with the stack of its thread. One that is slow, but within that, is left alone. The load of a model that a
  worker starts with has its ``load_timeout_s``, and so has a step of the warm-up of one that is loaded while others
  work; a load on a thread of its own is `loading`'s to give up.
* Between two ticks `on_tick` runs, `TICK_S` apart at most while the interpreter runs at all.
* Code that holds the GIL stops this thread as well. So it keeps pushing back a timer of the interpreter's own, in C,
  that prints every stack and ends the process (exit code 1) when nobody pushes it any more. It leaves one limit and
  `MARGIN_S` to whatever may hold the GIL; a process in which any model has no limit has no such timer.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

logger = logging.getLogger(__name__)

#: seconds between two ticks: so exactly time limits are kept
TICK_S: Final = 0.1
#: seconds between two pushes of the timer in C, each of which starts a thread
PUSH_S: Final = 5.0
#: seconds the timer in C waits beyond the longest limit, for this thread to do it better
MARGIN_S: Final = 10.0


@dataclass(slots=True, eq=False)  # a frozen one takes twice as long to make, and every message makes one
class Activity:
    """What a thread does that runs a model's code.

    Attributes:
        what: "the forward", "the preparation", "finish": the subject of a sentence.
        model: whose code.
        jobs: over which it runs.
        since: monotonic time at which it began, or began with the next input.
        limit_s: seconds it may take.
        thread: the id of the thread.
        limit: the key of the model file that says so.
    """

    what: str
    model: str
    jobs: Sequence[Any]
    since: float
    limit_s: float
    thread: int
    limit: str = "hard_timeout_s"

    def stack(self) -> str:
        """Where its thread is now."""
        return stack_of(self.thread)


def stack_of(thread: int | None) -> str:
    """Where the thread of this id is now."""
    frame = sys._current_frames().get(thread or 0)  # noqa: SLF001 - the documented way
    return "".join(traceback.format_stack(frame)) if frame is not None else "(its thread has ended)"


class Activities:
    """What the threads of this process do just now. Each thread writes its own entry; any may read."""

    def __init__(self) -> None:
        self._running: dict[int, Activity] = {}

    def begin(
        self, what: str, model: str, jobs: Sequence[Any], limit_s: float, limit: str = "hard_timeout_s"
    ) -> Activity:
        """The calling thread runs a model's code from now on."""
        thread = threading.get_ident()
        activity = self._running[thread] = Activity(what, model, jobs, time.monotonic(), limit_s, thread, limit)
        return activity

    def end(self) -> None:
        """The calling thread is done with it."""
        self._running.pop(threading.get_ident(), None)

    def overdue(self) -> Activity | None:
        """One that has taken longer than it may."""
        now = time.monotonic()
        return next((each for each in list(self._running.values()) if now - each.since > each.limit_s), None)


class Watchdog:
    """Owns its thread.

    Args:
        activities: what it watches.
        limits_s: the limit of each model there is; asked again and again.
        on_tick: called every `TICK_S` seconds.
        on_hung: called with an activity that is overdue; expected to end the process.
    """

    def __init__(
        self,
        activities: Activities,
        limits_s: Callable[[], Iterable[float]],
        on_tick: Callable[[], None],
        on_hung: Callable[[Activity], None],
    ) -> None:
        self._activities = activities
        self._limits_s = limits_s
        self._on_tick = on_tick
        self._on_hung = on_hung
        self._stopping = threading.Event()
        self._push_at = self._pushed = 0.0
        self._timed = True
        self._thread = threading.Thread(target=self._run, name="nograd-watchdog", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it watches."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def finish(self) -> None:
        """Stop watching."""
        self._stopping.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        while not self._stopping.wait(TICK_S):
            try:
                self._push()
                self._on_tick()
                overdue = self._activities.overdue()
                if overdue is not None:
                    self._on_hung(overdue)
            except Exception:
                logger.exception("the watchdog goes on")

    def _push(self) -> None:
        now = time.monotonic()
        longest = max(self._limits_s(), default=float("inf"))
        if not self._timed or (now < self._push_at and longest == self._pushed):
            return
        self._push_at, self._pushed = now + PUSH_S, longest
        if longest > threading.TIMEOUT_MAX / 2:
            faulthandler.cancel_dump_traceback_later()
            return
        try:
            faulthandler.dump_traceback_later(longest + PUSH_S + MARGIN_S, exit=True)
        except (OSError, ValueError, AttributeError, RuntimeError) as err:  # standard error is no file here
            logger.warning("code that holds the GIL for ever will not be found: %s", err)
            self._timed = False
