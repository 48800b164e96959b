"""A ``torch.export`` program: its graph, weights and input shapes are in one file, and no class is imported."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.export.passes import move_to_device_pass

from nograd.tasks.modelfile import ExportSpec

from .compiling import compile_module
from .inference import dtype_of
from .tensor_model import TensorModel

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

#: Operators that know a training mode → the position of the argument that switches it on.
_TRAINING_ARGUMENT = {
    "aten.dropout.default": 2,
    "aten.dropout_.default": 2,
    "aten.feature_dropout.default": 2,
    "aten.alpha_dropout.default": 2,
    "aten.native_dropout.default": 2,
    "aten.rrelu.default": 3,
    "aten.batch_norm.default": 5,
    "aten.native_batch_norm.default": 5,
    "aten.cudnn_batch_norm.default": 5,
}

#: Operators that exist for training only.
_TRAINING_ONLY = ("aten._native_batch_norm_legit.default", "aten._native_batch_norm_legit_functional.default")


class ExportModel(TensorModel):
    """Loads the program and reads from it what other loaders are told: dtype and shape of its one input."""

    spec: ExportSpec
    _input: torch.Tensor  # fake: the shape and dtype the program was exported for

    def open(self, device: torch.device) -> nn.Module:
        """Load the program onto the device, and check that it can serve batches."""
        key, value = "program", self.spec.program
        path = self.path(key, value)
        try:
            program = torch.export.load(path)
        except Exception as err:
            # A damaged file makes torch raise many things
            reason = (str(err).strip().splitlines() or [""])[0]
            raise self.error(key, value, f"cannot be read: {type(err).__name__}: {reason}") from err
        self._input = self._only_input(program)
        self._check_batch_dimension(*_range(program, self._input.shape[0]))
        self._check_dtype()
        if trained := sorted({name for node in program.graph.nodes if (name := _in_training(node))}):
            raise self.error(key, value, f"was exported in training mode ({', '.join(trained)}); call eval() before")
        return move_to_device_pass(program, device).module()

    def place(self, device: torch.device) -> None:  # noqa: ARG002 - `open` did, and modes are written into the graph
        """Nothing is left to do but to compile."""
        self.module.requires_grad_(requires_grad=False)
        if self.spec.compile:
            compile_module(self.module, dynamic=self.dynamic())

    def input_dtype(self) -> torch.dtype:
        """The program's own."""
        return self._input.dtype

    def input_shape(self) -> tuple[int, ...] | None:
        """The model file's, else the program's own."""
        own = tuple(size if isinstance(size, int) else -1 for size in self._input.shape[1:])
        return super().input_shape() or own

    def _only_input(self, program: ExportedProgram) -> torch.Tensor:
        names = program.graph_signature.user_inputs
        inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
        if len(names) != 1 or not isinstance(inputs[0], torch.Tensor) or not inputs[0].ndim:
            raise self.error(
                "program", self.spec.program, f"takes {', '.join(map(str, names))}, not one batch of tensors"
            )
        tensor: torch.Tensor = inputs[0]
        return tensor

    def _check_batch_dimension(self, low: int, high: float) -> None:
        largest = self.spec.batch.max_items
        # Of a dynamic dimension torch writes that it starts at 2; the program takes 1 all the same.
        if low > (1 if low == high else 2) or high < largest:
            takes = f"exactly {low}" if low == high else f"{max(low, 1)} to {high if high < math.inf else 'any number'}"
            raise self.error(
                "program",
                self.spec.program,
                f"its batch dimension takes {takes}, and batches have 1 to {largest} (batch.max_items): "
                "export it with dynamic_shapes, torch.export.Dim('batch') for dimension 0",
            )

    def _check_dtype(self) -> None:
        dtype, own = dtype_of(self), self._input.dtype
        if self.spec.dtype != "float32" and own != dtype:
            raise self.error(
                "dtype", self.spec.dtype, f"the program takes {str(own).removeprefix('torch.')}; leave it out"
            )
        if self.spec.input_dtype == "int64" and own != torch.int64:
            raise self.error(
                "input_dtype", "int64", f"the program takes {str(own).removeprefix('torch.')}; leave it out"
            )
        if self.spec.channels_last:
            raise self.error("channels_last", True, "a program's memory format is written into it when it is exported")


def _range(program: ExportedProgram, size: int | torch.SymInt) -> tuple[int, float]:
    """The smallest and the largest value of a dimension; equal for a static one."""
    if isinstance(size, int):
        return size, size
    bounds = program.range_constraints[size.node.expr]
    unbounded = not bounds.upper.is_number or bounds.upper > 2**62
    return int(bounds.lower), math.inf if unbounded else int(bounds.upper)


def _in_training(node: Any) -> str | None:
    """The name of an operator that runs in training mode."""
    name = str(node.target)
    if node.op != "call_function":
        return None
    position = _TRAINING_ARGUMENT.get(name)
    trains = name in _TRAINING_ONLY or (
        position is not None and len(node.args) > position and node.args[position] is True
    )
    return name if trains else None
