"""What every hosted model is to the pool, whatever loaded it.

::

    load ──► (warm-up) ──► prepare ──► forward ──► finish
    any      device thread  CPU threads  device thread  CPU threads
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nograd.tasks.errors import InvalidInput, ModelFileError
from nograd.tasks.payloads import decode_input

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nograd.tasks.modelfile import AnySpec


class HostedModel(ABC):
    """One model of the model file, in one worker process.

    The pool calls `forward` on its device thread only, and `load` there at its start; a model that comes later is
    loaded on a thread of its own while others answer, so `load` leaves alone what is the whole process's. Both are
    inside ``torch.no_grad()``. `prepare` and `finish` run on CPU threads, several at once. After `load` nothing of a
    model changes, so that needs no locks.

    Attributes:
        name: its name in the model file.
        spec: what the model file says of it.
        file: the model file; relative paths in it are relative to its folder.
        version: fingerprint of what makes its predictions (`nograd.workers.models.version`); empty until it is loaded.
        parts: what that is the fingerprint of.
        revision: commit of a model from a hub, if `load` learned it.
        own_finish: whether `finish` is code of the user's own, which may be slow, hang or crash.
        loads_alone: whether `load` changes what is the whole process's while it lasts (torch's default dtype), so that
            no other model may run beside it.
    """

    version: str = ""
    parts: Mapping[str, str] = {}
    revision: str | None = None
    own_finish: bool = False
    loads_alone: bool = False

    def __init__(self, name: str, spec: AnySpec, file: Path) -> None:
        self.name = name
        self.spec = spec
        self.file = file

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Load the weights onto ``device`` and assert ``eval()``.

        Raises:
            ModelFileError: naming key, value and file, if something of the model is missing or refused.
        """

    @abstractmethod
    def prepare(self, input: Any, params: Mapping[str, Any]) -> Any:  # noqa: A002
        """Check, decode and preprocess one input, as `nograd.tasks.payloads.decode_input` gives it.

        Raises:
            InvalidInput: if the model cannot take it, saying why.
        """

    def prepare_many(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Sequence[Any] | None:  # noqa: ARG002
        """What `prepare` returns for each of some inputs, where making them together is cheaper and comes to the same.

        Must be quick, and raise nothing; None, whenever there is any doubt, has each prepared by itself.
        """
        return None

    @abstractmethod
    def forward(self, batch: Sequence[Any], params: Mapping[str, Any]) -> Sequence[Any]:
        """Run one batch of what `prepare` returned; all of one `bucket` and with equal ``params``.

        Returns:
            One output for each input, in order, on the CPU: whoever gets it may be on another thread, and a CUDA error
            must surface here, where it blames the right batch.
        """

    def finish(self, output: Any, params: Mapping[str, Any]) -> Any:  # noqa: ARG002
        """Turn one output into a plain JSON-able prediction."""
        return output

    def bucket(self, prepared: Any) -> Hashable:  # noqa: ARG002
        """What must be equal for two prepared inputs to share a batch (a shape, a length class)."""
        return None

    def cost(self, prepared: Any) -> int:  # noqa: ARG002
        """What a prepared input adds to a batch, in units of the model (tokens, elements), for ``batch.max_cost``."""
        return 1

    def examples(self) -> Sequence[Any]:
        """Inputs for the warm-up, as `prepare` takes them; none if the model gives no way to know."""
        return [] if self.spec.example is None else [self.given_example()]

    def modules(self) -> Sequence[nn.Module]:
        """The modules that were loaded, for the memory they hold."""
        return []

    def batch_sizes(self) -> Sequence[int]:
        """Sizes of the warm-up's batches.

        One, because that is a case of its own for compilers and for models that squeeze. Three, because a step that
        unpacks its batch (``x, _ = batch``) runs happily, and wrongly, on two.
        """
        return sorted({1, min(3, self.spec.batch.max_items)})

    def given_example(self) -> Any:
        """The model file's ``example`` as `prepare` takes it: the bytes of an image file, arrays decoded.

        Raises:
            ModelFileError: if there is no such file, or the value is no input.
        """
        value = self.spec.example
        if self.spec.kind == "image" and isinstance(value, str):
            return self.path("example", value).read_bytes()
        try:
            return decode_input(value)
        except InvalidInput as err:
            raise self.error("example", value, err.message) from err

    def warm_up_params(self) -> Mapping[str, Any]:
        """Parameters of the warm-up, over those of the model file."""
        return {}

    def settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of a prediction: the job's over the model file's."""
        return {**self.spec.params, **params}

    def path(self, key: str, value: str) -> Path:
        """The existing file or folder a key of the model file points to.

        Raises:
            ModelFileError: if there is none.
        """
        path = (self.file.parent / value).resolve()
        if not path.exists():
            raise self.error(key, value, f"no such file: {path}")
        return path

    def error(self, key: str, value: Any, why: str) -> ModelFileError:
        """An error that names key, value and file as the model file's own checks do."""
        return ModelFileError(f"{self.file}: [{self.name}] {key} = {value!r}: {why}")
