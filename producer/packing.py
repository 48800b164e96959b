"""Many inputs in few messages: how `Client.map` groups what it sends and takes apart what comes back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nograd.tasks.errors import InvalidInput, JobError, NogradError, OutputMismatch
from nograd.tasks.payloads import encode_input

from .broker import Message, wire_size
from .outcomes import Outcome, error_of_item

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from nograd.tasks.modelfile import InputKind

    from .job import Job

#: inputs in one message if neither the caller nor the model asks for fewer
PACK_ITEMS = 64
#: bytes in one message, about, however few inputs that is: workers decode messages on their event loop
PACK_BYTES = 512 * 1024


@dataclass(slots=True)
class Pack:
    """The inputs of one message, in order; those that cannot be sent keep their place by their error.

    Attributes:
        wires: what is sent.
        places: for each input, None if it is sent, or why it cannot be.
        size: bytes of ``wires``, about.
        job: the job, once sent.
    """

    wires: list[Any] = field(default_factory=list)
    places: list[InvalidInput | None] = field(default_factory=list)
    size: int = 0
    job: Job | None = None

    def add(self, value: Any, kind: InputKind | None) -> None:
        """Encode one more input."""
        try:
            wire = encode_input(value, kind)
        except InvalidInput as err:
            self.places.append(err)
            return
        self.wires.append(wire)
        self.places.append(None)
        self.size += wire_size(wire)

    def message(self, model: str, params: dict[str, Any] | None, **options: Any) -> Message:
        """The message that carries it; ``options`` are those of `Message`."""
        return Message(model, self.wires, f"{model} {len(self.wires)} inputs", params=params, many=True, **options)

    def outcomes(self, outcome: Outcome | None) -> Iterator[Any]:
        """Each input's prediction, or the error in its place.

        Args:
            outcome: of the message; None if nothing of it could be sent.
        """
        items = iter(_items(outcome, len(self.wires)))
        for error in self.places:
            yield error if error is not None else next(items)


def pack(values: Iterable[Any], kind: InputKind | None, items: int) -> Iterator[Pack]:
    """Group inputs into packs of at most ``items`` inputs and about `PACK_BYTES`."""
    current = Pack()
    for value in values:
        current.add(value, kind)
        if len(current.places) >= items or current.size >= PACK_BYTES:
            yield current
            current = Pack()
    if current.places:
        yield current


class Window:
    """The packs that are on their way, oldest first: at most ``max_in_flight`` inputs, and one pack at least.

    Args:
        packs: what is to be sent.
        send: sends one pack; the job.
        max_in_flight: inputs sent and not taken back yet.
    """

    def __init__(self, packs: Iterator[Pack], send: Callable[[Pack], Job], max_in_flight: int) -> None:
        self._packs = packs
        self._send = send
        self._max = max_in_flight
        self._sent: deque[Pack] = deque()
        self._next: Pack | None = None
        self._inputs = 0

    def fill(self) -> None:
        """Send as much as the window holds."""
        while True:
            if self._next is None:
                self._next = next(self._packs, None)
            if self._next is None or (self._sent and self._inputs + len(self._next.places) > self._max):
                return
            pack, self._next = self._next, None
            if pack.wires:
                pack.job = self._send(pack)
            self._sent.append(pack)
            self._inputs += len(pack.places)

    def oldest(self) -> Pack | None:
        """The pack whose turn it is; None when all are back."""
        return self._sent[0] if self._sent else None

    def drop_oldest(self) -> None:
        """Let go of the oldest pack: its inputs are back."""
        self._inputs -= len(self._sent.popleft().places)

    def jobs(self) -> list[Job]:
        """The jobs still on their way."""
        return [pack.job for pack in self._sent if pack.job is not None]


def _items(outcome: Outcome | None, count: int) -> list[Any]:
    if outcome is None:
        return []
    if outcome.error is not None:  # the message failed as one: each of its inputs did
        return [outcome.error] * count
    if not isinstance(outcome.value, list) or len(outcome.value) != count:
        return [OutputMismatch(f"a message with {count} inputs was answered with {_shape(outcome.value)}")] * count
    return [_item(item) for item in outcome.value]


def _item(item: Any) -> Any | NogradError:
    if isinstance(item, dict) and "prediction" in item:
        return item["prediction"]
    if isinstance(item, dict) and isinstance(item.get("error"), dict):
        return error_of_item(item["error"])
    return JobError(f"a worker answered one input with {_shape(item)}")


def _shape(value: Any) -> str:
    return f"{len(value)} outcomes" if isinstance(value, list) else f"a {type(value).__name__}"
