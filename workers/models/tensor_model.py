"""A model that takes one tensor per input: what torchvision, module, lightning and export have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from nograd.tasks.errors import InvalidInput

from .base import HostedModel
from .compiling import bucket_sizes, mark_free, padded
from .images import Transform, colour_mode, configured_transform, decode_image
from .inference import cast, dtype_of, ready_for_inference
from .labels import classify, read_labels
from .tensors import TensorReader, all_finite, split, stack, to_json

#: What stands for a free dimension in a warm-up with zeros: enough for a stack of poolings, little for a sequence.
_FREE_DIMENSION = 32

#: below this a float64 holds every whole number
_EXACT = 2**53

#: dimensions of a batch of inputs of any shape, for the compiler
_MOST_DIMENSIONS = 8


class TensorModel(HostedModel):
    """Reads inputs into tensors, stacks them, calls the module once, splits what it returns.

    A loader says how the module is opened; preprocessing and labels come from the model file or, where a loader knows
    them, with the weights.

    Attributes:
        device: where the module is.
        module: the module, in evaluation mode.
        labels: class names, or None.
    """

    device: torch.device
    module: nn.Module
    labels: Sequence[str] | None
    _read: Callable[[Any], torch.Tensor]

    @abstractmethod
    def open(self, device: torch.device) -> nn.Module:
        """The module with its weights, wherever loading put it.

        Raises:
            ModelFileError: naming key, value and file.
        """

    def load(self, device: torch.device) -> None:
        """Open the module and make it ready: see `HostedModel.load`."""
        self._check_keys()
        self.device = device
        self.labels = read_labels(self)
        self.module = self.open(device)
        self.place(device)
        self._read = self._reader()

    def modules(self) -> Sequence[nn.Module]:
        """The one."""
        return [self.module]

    def place(self, device: torch.device) -> None:
        """Dtype, evaluation mode, device, memory format, compilation."""
        cast(self.module, dtype_of(self))
        ready_for_inference(self, self.module, device, dynamic=self.dynamic())

    def own_transform(self) -> Transform | None:
        """The image preprocessing that comes with the weights, if any does."""
        return None

    def input_dtype(self) -> torch.dtype:
        """What rows and tensors are cast to."""
        return torch.int64 if self.spec.input_dtype == "int64" else dtype_of(self)

    def input_shape(self) -> tuple[int, ...] | None:
        """The shape one input has, -1 for a free dimension; None if any may do."""
        return None if self.spec.shape is None else tuple(self.spec.shape)

    def dynamic(self) -> bool | None:
        """What to tell the compiler: every shape by itself, or free dimensions as marked (see `compiling`)."""
        return None if self.free_dimensions() else False

    def free_dimensions(self) -> tuple[int, ...]:
        """The dimensions of a batch that vary among batches, other than by its bucket; none if that is its shape."""
        transform = self.spec.transform
        if self.spec.kind == "image":
            free = isinstance(transform, str) or (transform is not None and transform.center_crop is None)
            return (0, 2, 3) if free else ()
        shape = self.input_shape()
        if shape is None:
            return tuple(range(_MOST_DIMENSIONS))
        free_inner = tuple(k + 1 for k, size in enumerate(shape) if size == -1)
        return (0, *free_inner) if free_inner else ()

    def batch_sizes(self) -> Sequence[int]:
        """Compiled for one shape of input: all bucket sizes."""
        if self.spec.compile and not self.free_dimensions():
            return bucket_sizes(self.spec.batch.max_items)
        return super().batch_sizes()

    def prepare(self, input: Any, params: Mapping[str, Any]) -> torch.Tensor:  # noqa: A002
        """One input as the tensor the module takes a batch of."""
        for name in params:
            raise InvalidInput(f"unknown parameter {name!r}: model {self.name!r} takes none")
        return self._read(input)

    def prepare_many(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Sequence[torch.Tensor] | None:
        """Rows of plain numbers as one array; the checks of each are most of the work for a small model."""
        if params or self.spec.kind != "rows" or not self.input_dtype().is_floating_point:
            return None
        try:
            array = np.asarray(inputs)
            # Whole numbers beyond this are not the same in an array with a float in it; NaN is not below it, either.
            if array.dtype.kind not in "iuf" or not np.abs(array).max() < _EXACT:
                return None
            rows, wrong = self.prepare_rows(array)
        except (InvalidInput, ValueError, TypeError, OverflowError, RecursionError):
            return None
        return None if wrong else rows.unbind()

    @property
    def takes_rows(self) -> bool:
        """Whether `prepare_rows` may be called: inputs are numbers, and need no code of their own."""
        return self.spec.kind in ("rows", "tensor")

    def prepare_rows(self, array: np.ndarray[Any, Any]) -> tuple[torch.Tensor, dict[int, InvalidInput]]:
        """Many inputs at once: ``(n, *shape)``; what `prepare` would have said of each one, and the errors by row.

        Raises:
            InvalidInput: if not one of them can be taken, because of their shape or type.
        """
        return self._tensor_reader().read_rows(array)

    def bucket(self, prepared: torch.Tensor) -> Hashable:
        """The shape: only equal ones can be stacked."""
        return tuple(prepared.shape)

    def cost(self, prepared: torch.Tensor) -> int:
        """Its elements."""
        return prepared.numel()

    def forward(self, batch: Sequence[torch.Tensor], params: Mapping[str, Any]) -> Sequence[Any]:  # noqa: ARG002
        """Run the module on the stacked inputs, ``(n, *shape)``.

        A batch may be one tensor already (a backfill's rows are never objects of their own); then the outputs stay
        together as well, where the module returns one tensor.

        Raises:
            OutputMismatch: if it does not return one output for each.
        """
        stacked = self._stack(batch)
        if isinstance(batch, torch.Tensor) and self.device.type == "cpu":
            stacked = stacked.clone()  # a module may write into its input, and these rows may have to be run again
        output = self.call(stacked)
        together = isinstance(batch, torch.Tensor) and isinstance(output, torch.Tensor)
        if together and output.ndim and len(output) == len(stacked):
            rows: Any = output.detach().cpu()[: len(batch)]
            if output.device.type == "cpu":
                rows = rows.clone()  # a module may return a buffer of its own, and use it again in the next forward
            return rows  # type: ignore[no-any-return] # a tensor has a length and slices; that is all that is asked
        return split(output, len(stacked))[: len(batch)]

    def call(self, batch: torch.Tensor) -> Any:
        """Call the module on a batch that is still on the CPU."""
        moved = batch.to(self.device, non_blocking=True)
        self.mark(moved)
        return self.module(moved)

    def finish(self, output: Any, params: Mapping[str, Any]) -> Any:  # noqa: ARG002
        """Name the classes if there are labels; else plain numbers and nested lists."""
        if self.labels is not None and isinstance(output, torch.Tensor):
            return classify(output, self.labels, self.spec.top)
        return to_json(output)

    def finish_rows(self, outputs: torch.Tensor) -> np.ndarray[Any, Any] | None:
        """The predictions of a batch as one array ``(n, …)``; None where each has to be finished by itself.

        The values are those of `finish`; where that makes a plain number of an output with one element, this is
        ``(n,)``. NaN and infinity are each output's own business, too.
        """
        if self.labels is not None or outputs.is_complex() or not outputs.ndim:
            return None
        if outputs.is_floating_point() and not all_finite(outputs):
            return None
        if outputs.ndim < 3 and outputs.numel() == len(outputs):
            outputs = outputs.reshape(-1)
        if outputs.dtype in (torch.float16, torch.bfloat16):
            outputs = outputs.float()
        return outputs.numpy()

    def examples(self) -> Sequence[Any]:
        """The model file's example, else a grey image, else zeros of the known shape."""
        if self.spec.example is not None:
            return super().examples()
        if self.spec.kind == "image":
            return [np.full((64, 64, 3), 127, dtype=np.uint8)]
        shape = self.input_shape()
        if shape is None:
            return []
        # Free dimensions of one size would be taken by a compiler for one and the same.
        return [np.zeros([_FREE_DIMENSION + k if n == -1 else n for k, n in enumerate(shape)])]

    def mark(self, moved: Any) -> None:
        """Tell the compiler, if there is one, which dimensions of a batch on the device are free."""
        if self.spec.compile and isinstance(moved, torch.Tensor):
            mark_free(moved, self.free_dimensions())

    def _stack(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.spec.compile and not self.free_dimensions():
            batch = padded(batch, self.spec.batch.max_items)
        stacked = stack(batch, pin=self.device.type == "cuda")
        if self.spec.channels_last and stacked.ndim == 4:
            stacked = stacked.contiguous(memory_format=torch.channels_last)
        return stacked

    def _check_keys(self) -> None:
        """Refuse keys that would do nothing, rather than let somebody believe in them."""
        kind = self.spec.kind
        if kind not in ("image", "rows", "tensor"):
            raise self.error("input", kind, f"loader {self.spec.loader!r} takes image, rows or tensor")
        if kind != "image" and self.spec.transform is not None:
            raise self.error("transform", self.spec.transform, f'only images are transformed; input = "{kind}"')
        if kind == "image" and self.spec.shape is not None:
            raise self.error("shape", self.spec.shape, "an image gets its shape from its transform")
        if kind == "image" and self.spec.input_dtype != "float":
            raise self.error("input_dtype", self.spec.input_dtype, "images are floating")
        if self.spec.params:
            raise self.error("params", self.spec.params, f"loader {self.spec.loader!r} takes none")

    def _tensor_reader(self) -> TensorReader:
        return TensorReader(
            dtype=self.input_dtype(),
            row=self.spec.kind == "rows",
            shape=self.input_shape(),
            allow_nonfinite=self.spec.allow_nonfinite,
        )

    def _reader(self) -> Callable[[Any], torch.Tensor]:
        if self.spec.kind != "image":
            return self._tensor_reader().read
        transform = configured_transform(self) or self.own_transform()
        if transform is None:
            raise self.error(
                "input",
                "image",
                "the model does not bring its preprocessing: name a `transform` (a table, or module:callable)",
            )
        mode, dtype = colour_mode(self.spec.transform), self.input_dtype()
        return lambda value: transform(decode_image(value, mode)).to(dtype)
