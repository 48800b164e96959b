"""Code that may crash or hang the process: whom it would be over, for how long it may run, and beside what.

Laws:

* While code that may crash runs over a message, Redis knows that it does: if the process dies, that message counts a
  death, and comes back to run alone.
* Nothing that may crash runs beside a message that runs alone, but for the load of a model: while one is under way, no
  message is named, for the death may be the load's. So a second death is its own fault, or not its fault.
* While the device is busy, the messages of a forward are named until the next one begins, moments after. A process that
  dies just then counts a death for those of them that are not acknowledged yet, although it was not over them: they run
  alone once more than they had to, and by the law above nothing else follows from it.
* The time limit of a model is one input's: it begins anew with each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Self

from nograd.tasks import transport

from .watchdog import Activities, Activity

if TYPE_CHECKING:
    from .message import Message
    from .models import HostedModel

#: inputs whose preparation runs code that may crash the process (image decoders, a user's own). Saying so to Redis
#: costs two small writes, which would be most of the work for a row of numbers.
RISKY_KINDS: Final = frozenset({"image", "json"})


def is_risky_to_prepare(model: HostedModel) -> bool:
    """Whether preparing an input of this model may crash the process."""
    return model.spec.kind in RISKY_KINDS or model.spec.loader == "python"


class Gate:
    """Many threads may be inside, or one thread alone. Whoever wants to be alone lets nobody else in any more.

    No thread may wait here while it is inside.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        #: whether somebody is, or waits to be, alone
        self.closed = False

    def enter(self) -> None:
        """Go inside; waits while somebody is, or wants to be, alone."""
        with self._changed:
            while self.closed:
                self._changed.wait()
            self._inside += 1

    def leave(self) -> None:
        """Be inside no more."""
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody is inside, and keep everybody out."""
        with self._changed:
            while self.closed:
                self._changed.wait()
            self.closed = True
            while self._inside:
                self._changed.wait()
        try:
            yield
        finally:
            with self._changed:
                self.closed = False
                self._changed.notify_all()


class Risks:
    """Makes the stints of all threads.

    Attributes:
        activities: where a stint says what its thread does.
        gate: inside are stints that may crash; the device thread is alone in it with a message that runs alone.
        unclear: what runs beside them that is no message's code, and over which the process may die as well.
    """

    def __init__(self, activities: Activities) -> None:
        self.gate = Gate()
        self.unclear: Collection[object] = ()
        self.activities = activities

    def stint(self, what: str, model: HostedModel, message: Message, *, risky: bool) -> Stint:
        """A model's code over the inputs of a message, on the calling thread.

        Args:
            what: "the preparation", "finish".
            model: whose code.
            message: whose inputs.
            risky: whether it may crash the process.
        """
        return Stint(self, what, model, message, risky=risky)


class Stint:
    """A context manager; call `item` before each input in it, and `pause` before the thread does something else."""

    __slots__ = ("_activity", "_gate", "_message", "_model", "_risks", "_what")

    def __init__(self, risks: Risks, what: str, model: HostedModel, message: Message, *, risky: bool) -> None:
        self._risks = risks
        self._gate = risks.gate if risky else None
        self._what = what
        self._model = model
        self._message = message
        self._activity: Activity | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()

    def item(self) -> None:
        """The next input begins. If the code may crash, this waits while a message runs alone."""
        gate = self._gate
        if self._activity is not None:
            if gate is None or not gate.closed:
                self._activity.since = time.monotonic()
                return
            self.pause()
        if gate is not None:
            gate.enter()
        self._activity = self._risks.activities.begin(
            self._what, self._model.name, [self._message], self._model.spec.hard_timeout_s
        )
        if gate is not None:
            named = [] if self._risks.unclear else [self._message.delivery]
            transport.suspect(named, threading.current_thread().name)

    def pause(self) -> None:
        """None of its code runs until `item` is called again."""
        if self._activity is None:
            return
        self._activity = None
        self._risks.activities.end()
        if self._gate is not None:
            transport.suspect([], threading.current_thread().name)
            self._gate.leave()
