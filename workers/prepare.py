"""From a message to items the device can take, on CPU threads.

Laws:

* Celery's event loop only puts messages in; decoding and preprocessing happen here.
* Interactive messages are prepared before bulk ones, and between the inputs of a bulk one.
* An input that cannot be prepared is resolved with its own error; the others of its message go on.
* A message that cannot be read at all ends with an error that says what is wrong with it.
* A message whose time is over is told so by `expire`, also while it waits for a thread or is being prepared.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from kombu.serialization import loads, prepare_accept_content

from nograd.tasks import transport
from nograd.tasks.errors import InvalidInput, JobError, NogradError, UnknownModel
from nograd.tasks.keys import PREDICT_TASK
from nograd.tasks.payloads import decode_input
from nograd.tasks.predict import Outcome, TimeoutS
from nograd.tasks.structs import decodable

from .batching import BatchQueue, Item
from .crew import Crew
from .engine import as_invalid
from .intake import Intake
from .message import UNREADABLE, Message
from .models import HostedModel
from .outputs import too_late
from .risk import Risks, is_risky_to_prepare
from .settle import Settler
from .trace import as_job_error

logger = logging.getLogger(__name__)

#: workers that may die over a job before it is given up
MOST_DEATHS = 3
#: inputs of a message that are prepared together where that is cheaper
AT_ONCE = 64
#: seconds a message has waited for a thread when its time limit is looked for: reading it twice is only worth it then
PEEK_S = 0.5


class Preparer:
    """Owns the threads that prepare.

    Args:
        models: the loaded models, by name.
        batches: where prepared items go.
        settler: where messages go whose items all have their outcome.
        accept: content types of bodies.
        on_poison: called with a message over which too many workers have died, and how many; what it is settled with.
        on_unknown: called with a message for a model that is not here, and its name; whether it took care of it.
        on_late: called with a message that was prepared when the device takes nothing more.
        intake: hears of every message how many items it has.
        threads: how many prepare at a time.
        risks: where a thread says what it does.
    """

    def __init__(  # noqa: PLR0917 - what it owns and whom it tells
        self,
        models: Mapping[str, HostedModel],
        batches: BatchQueue,
        settler: Settler,
        accept: list[str] | None,
        on_poison: Callable[[Message, int], JobError],
        on_unknown: Callable[[Message, str], bool],
        on_late: Callable[[Message], None],
        *,
        intake: Intake,
        threads: int,
        risks: Risks,
    ) -> None:
        self._models = models
        self._batches = batches
        self._settler = settler
        self._accept = prepare_accept_content(accept)
        self._on_poison = on_poison
        self._on_unknown = on_unknown
        self._on_late = on_late
        self._intake = intake
        self._risks = risks
        self._crew: Crew[Message] = Crew("nograd-prepare", threads, self._work)
        #: for messages whose time is over before one of the others gets to them
        self._late: Crew[Message] = Crew("nograd-late", 1, self._work)
        #: messages that have a deadline, while they are prepared
        self._timed: dict[Message, float] = {}

    def start(self) -> None:
        """Start the threads."""
        self._crew.start()
        self._late.start()

    def submit(self, message: Message) -> None:
        """Take a message from Celery's event loop. Never blocks."""
        self._intake.came(bulk=message.bulk)
        self._crew.submit(message, bulk=message.bulk)

    def close(self) -> list[Message]:
        """Prepare no more; the messages nobody has begun with, in order."""
        return self._crew.close()

    def finish(self, timeout_s: float | None = None) -> bool:
        """Wait for what is being prepared; False if that took longer than ``timeout_s`` seconds."""
        return self._crew.finish(timeout_s) and self._late.finish(timeout_s)

    def expire(self) -> None:
        """Give up every message whose time is over and that is not prepared yet. For the watchdog's thread."""
        now = time.monotonic()
        for message, deadline in list(self._timed.items()):
            if deadline <= now:
                message.expire()
        for message in self._crew.waiting():
            if not message.peeked and now - message.received > PEEK_S:
                message.peeked = True
                self._peek(message)
            if message.deadline is not None and message.deadline <= now and self._crew.withdraw(message):
                self._late.submit(message)

    def _work(self, messages: list[Message]) -> None:
        for message in messages:
            try:
                self._prepare(message)
            except BaseException as err:
                logger.exception("a message could not be prepared; it fails")
                self._settler.submit(message, Outcome(error=as_job_error(err)))
            finally:
                self._intake.began(bulk=message.bulk)

    def _prepare(self, message: Message) -> None:
        if not message.begin():
            return
        message.deaths = _deaths(message)
        if message.deaths >= MOST_DEATHS:
            self._settler.submit(message, Outcome(error=self._on_poison(message, message.deaths)))
            return
        try:
            inputs = self._read(message)
        except UnknownModel as err:
            name, _ = message.body[0]
            if not self._on_unknown(message, name):
                self._settler.submit(message, Outcome(error=err))
            return
        except NogradError as err:
            self._settler.submit(message, Outcome(error=err))
            return
        if message.deadline is not None and time.monotonic() >= message.deadline:
            self._settler.submit(message, too_late())
            return
        self._intake.read(len(inputs), bulk=message.bulk)
        if inputs:
            message.expect(len(inputs), self._settler.submit)
            self._prepare_all(message, inputs)
        else:
            self._settler.submit(message, Outcome(value=[]))

    def _prepare_all(self, message: Message, inputs: list[Any]) -> None:
        model = message.model
        assert model is not None
        if message.alone:
            items = [_left_for_later(message, model, index, wire) for index, wire in enumerate(inputs)]
        else:
            items = self._prepare_items(message, model, inputs)
        message.watch.prepared = time.monotonic()
        if message.complete:  # also what is prepared has its outcome, if the message's time is over
            items = []
        if not items:
            return
        try:
            if self._models.get(model.name) is not model:
                raise UnknownModel(f"model {model.name!r} has been unloaded")
            if not self._batches.put(items, message.deadline):
                self._on_late(message)
        except UnknownModel as err:
            if not self._on_unknown(message, model.name):
                for item in items:
                    message.resolve(item.index, Outcome(error=err))

    def _prepare_items(self, message: Message, model: HostedModel, inputs: list[Any]) -> list[Item]:
        items: list[Item] = []
        together: Sequence[Any] | None = None
        deadline = message.deadline
        if deadline is not None:
            self._timed[message] = deadline
        try:
            with self._risks.stint("the preparation", model, message, risky=is_risky_to_prepare(model)) as stint:
                for index, wire in enumerate(inputs):
                    if message.bulk and self._crew.urgent:
                        stint.pause()
                        self._crew.overtake()
                    stint.item()
                    if deadline is not None and message.complete:
                        break
                    if index % AT_ONCE == 0:
                        together = _prepare_together(message, model, inputs[index : index + AT_ONCE])
                    ready = None if together is None else together[index % AT_ONCE]
                    if item := _prepare_item(message, model, index, wire, ready):
                        items.append(item)
        finally:
            self._timed.pop(message, None)
        return items

    def _peek(self, message: Message) -> None:
        """Learn the time limit of a message that waits for a thread."""
        with suppress(NogradError):  # the thread that reads it says what is wrong with it
            args, kwargs, _ = self._decode(message)
            call = _read_call(args, kwargs)
            model = self._models.get(call.model)
            if model is not None:
                message.timeout_s = _timeout_s(model, call)

    def _read(self, message: Message) -> list[Any]:
        """Decode the body; fill in the message's model and parameters; its inputs.

        Raises:
            InvalidInput: for a message that is not as `nograd.tasks.predict` says.
            UnknownModel: if this worker has no such model.
        """
        args, kwargs, embed = self._decode(message)
        message.body = (*UNREADABLE[:2], embed)  # a chord or an errback hears of a bad call, too
        call = _read_call(args, kwargs)
        named: dict[str, Any] = {"params": call.params, "many": call.many}
        if call.timeout_s is not None:
            named["timeout_s"] = call.timeout_s
        message.body = ((call.model, call.input), named, embed)
        message.model = self._models.get(call.model)
        if message.model is None:
            raise UnknownModel(f"this worker has no model {call.model!r}; it serves {', '.join(sorted(self._models))}")
        message.params = {**message.model.spec.params, **(call.params or {})}
        message.many = call.many
        message.timeout_s = _timeout_s(message.model, call)
        return call.input if call.many else [call.input]

    def _decode(self, message: Message) -> tuple[Any, Any, Any]:
        """The body: ``(args, kwargs, embed)``.

        Raises:
            InvalidInput: if it is none.
        """
        _, _, _, body, content_type, encoding = message.raw
        try:
            if content_type and message.delivery is not None:
                body = message.delivery.payload  # Celery's strategy has decoded it to look at it; kombu remembers
            elif content_type:
                body = loads(body, content_type, encoding, accept=self._accept)
            args, kwargs, embed = body
        except Exception as err:
            raise InvalidInput(f"the message cannot be decoded: {err}") from err
        if not isinstance(args, list | tuple) or not isinstance(kwargs, dict) or not isinstance(embed or {}, dict):
            raise InvalidInput("the message's body is not [args, kwargs, embed]")
        return args, kwargs, embed or {}


def _deaths(message: Message) -> int:
    return transport.delivery_count(message.delivery) if message.delivery is not None else 0


@decodable
class _Call(msgspec.Struct, frozen=True):
    """The arguments of ``nograd.predict``."""

    model: str
    input: Any
    params: dict[str, Any] | None = None
    many: bool = False
    timeout_s: TimeoutS | None = None

    def __post_init__(self) -> None:
        if self.many and not isinstance(self.input, list):
            raise ValueError("with `many` the input is a list of inputs")


def _timeout_s(model: HostedModel, call: _Call) -> float | None:
    given = [limit for limit in (model.spec.timeout_s, call.timeout_s) if limit is not None]
    return min(given, default=None)


#: the arguments that have a place; the others have a name only
_POSITIONAL = ("model", "input", "params", "many")


def _read_call(args: Any, kwargs: Any) -> _Call:
    # A chain puts the result before it in front: with the model by name, the first argument is the input.
    fields = tuple(field for field in _POSITIONAL if field != "model" or "model" not in kwargs)
    try:
        if len(args) > len(fields):
            raise ValueError(f"takes {', '.join(fields)}; {len(args)} arguments given")
        given = dict(zip(fields, args, strict=False))
        wrong = [key for key in kwargs if key not in _Call.__struct_fields__ or key in given]
        if wrong:
            raise ValueError(f"unknown or repeated argument {wrong[0]!r}")
        return msgspec.convert(given | kwargs, _Call)
    except (TypeError, ValueError) as err:  # msgspec's ValidationError is a ValueError
        raise InvalidInput(f"{PREDICT_TASK}: {err}") from err


def _prepare_together(message: Message, model: HostedModel, inputs: list[Any]) -> Sequence[Any] | None:
    """Some inputs, prepared; None where each has to be by itself."""
    if len(inputs) == 1 or any(isinstance(wire, dict) for wire in inputs):
        return None
    return model.prepare_many(inputs, message.params)


def _prepare_item(message: Message, model: HostedModel, index: int, wire: Any, ready: Any = None) -> Item | None:
    """Prepare one input, unless it is ready, or resolve it with its own error."""
    try:
        prepared = model.prepare(decode_input(wire), message.params) if ready is None else ready
        group = (model.bucket(prepared), _freeze(message.params))
        hash(group)
        cost = model.cost(prepared)
    except BaseException as err:  # noqa: BLE001 - user code; its item fails
        message.resolve(index, Outcome(error=as_invalid(err)))
        return None
    return Item(model.name, group, prepared, message, index, message.priority, cost)


def _left_for_later(message: Message, model: HostedModel, index: int, wire: Any) -> Item:
    """An input over which a worker may have died: prepared and run on the device thread, in a batch of its own.

    So nothing else is on the device or in its preparation if it kills this worker as well, and nobody else is blamed.
    """
    return Item(
        model.name,
        ("alone", message.id, index),
        None,
        message,
        index,
        message.priority,
        late=lambda: model.prepare(decode_input(wire), message.params),
    )


def _freeze(params: Mapping[str, Any]) -> bytes:
    """Parameters as something that can be compared: jobs batch together if theirs are equal."""
    # In msgpack, since JSON writes NaN as null and bytes as text: jobs that differ must not share a batch.
    return msgspec.msgpack.encode(params, order="deterministic") if params else b""
