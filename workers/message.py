"""One message of ``nograd.predict`` in this process, from fetch to acknowledgement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nograd.tasks.errors import JobError
from nograd.tasks.predict import Outcome

from .handle import Handle
from .models import HostedModel
from .outputs import finish, too_late
from .stopwatch import Forward, Stopwatch
from .trace import Callbacks, TraceArgs

#: what the tracer gets for a message that could not be read: the error is then ours, not a TypeError about arguments
UNREADABLE: tuple[Any, Any, Any] = ((None, None), {}, {})


class Message(Handle):
    """A message whose items are batched.

    Items are resolved by the device thread and by the thread that prepares; whoever resolves the last one hands the
    message on to be settled. Attributes are written by the preparing thread, before any item is on its way.

    Attributes:
        model: whose prediction it is; None while that is not known.
        params: the job's parameters over the model's defaults.
        many: whether its input is a list of inputs.
        timeout_s: seconds it may take from its arrival here; None for ever.
        body: ``(args, kwargs, embed)`` for Celery's tracer: decoded once, and in one form whatever the sender wrote.
        deaths: workers that died while it was on their device.
        watch: how long its stages take.
        peeked: whether its time limit has been looked for while it waited to be read.
    """

    def __init__(self, celery: Callbacks, args: TraceArgs) -> None:
        super().__init__(celery, args)
        self.body = UNREADABLE
        self.model: HostedModel | None = None
        self.params: Mapping[str, Any] = {}
        self.many = False
        self.timeout_s: float | None = None
        self.deaths = 0
        self.peeked = False
        self.watch = Stopwatch(self.received)
        self._outcomes: list[Outcome | None] = []
        self._waiting = 0
        self._on_complete: Callable[[Message], None] | None = None

    @property
    def embed(self) -> Mapping[str, Any]:
        """Links, chain and chord."""
        return self.body[2] or {}

    @property
    def args(self) -> TraceArgs:
        """What Celery's tracer takes."""
        name, task_id, request, *_ = self.raw
        return (name, task_id, request, self.body, None, None)

    @property
    def deadline(self) -> float | None:
        """Monotonic time after which nobody waits for it."""
        return None if self.timeout_s is None else self.received + self.timeout_s

    def expect(self, count: int, on_complete: Callable[[Message], None]) -> None:
        """Say how many items the message has and whom to call when all have their outcome."""
        self._outcomes = [None] * count
        self._waiting = count
        self._on_complete = on_complete

    @property
    def alone(self) -> bool:
        """Whether it runs in a batch of its own, since a worker has died over it."""
        return self.deaths > 0

    def resolve(self, index: int, outcome: Outcome, forward: Forward | None = None) -> None:
        """Take the outcome of one item (see `engine.Job`); the first one counts."""
        with self._lock:
            if self._outcomes[index] is not None:
                return
            if forward is not None:
                self.watch.ran(forward)
            self._outcomes[index] = outcome
            self._waiting -= 1
            complete = self._waiting == 0
        if complete and self._on_complete is not None:
            self._on_complete(self)

    def untouched(self) -> bool:
        """Whether no item of it has had device time."""
        return all(outcome is None or outcome.error is not None for outcome in self._outcomes)

    def expire(self) -> None:
        """Its time is over: resolve every item that has no outcome yet."""
        for index in range(len(self._outcomes)):
            self.resolve(index, too_late())

    @property
    def complete(self) -> bool:
        """Whether every item has its outcome."""
        return self._waiting == 0

    def outcome(self, on_item: Callable[[], None]) -> Outcome:
        """The outcome of the whole message, predictions finished.

        Args:
            on_item: called before an item is finished.
        """
        # What ran alone was finished where it ran.
        model = None if self.alone else self.model
        outcomes = [outcome for outcome in self._outcomes if outcome is not None]
        for index, outcome in enumerate(outcomes):
            if model is not None and outcome.error is None:
                on_item()
                outcomes[index] = finish(model, outcome.value, self.params)
        if not self.many:
            return outcomes[0]
        return Outcome(value=[_wire(outcome) for outcome in outcomes])

    def timings(self, worker: str | None) -> dict[str, Any]:
        """Its timings up to now, as they are stored, in a worker of this node name."""
        version = self.model.version if self.model is not None else None
        return self.watch.read(self.request_dict, model_version=version, worker=worker, deaths=self.deaths)

    def log_context(self, represented: str, runtime: float) -> dict[str, Any]:
        """What Celery's own log line of a success takes."""
        headers = self.request_dict
        return {
            "id": self.id,
            "name": self.raw[0],
            "return_value": represented,
            "runtime": runtime,
            "args": headers.get("argsrepr"),
            "kwargs": headers.get("kwargsrepr"),
        }


def _wire(outcome: Outcome) -> dict[str, Any]:
    """One item's outcome in the result of a message with many."""
    if outcome.error is None:
        return {"prediction": outcome.value}
    error = outcome.error
    code = getattr(error, "code", JobError.code)
    return {"error": {"type": type(error).__name__, "code": code, "message": str(error)}}
