"""Rows and tensors: numbers checked on the way in, one batch for the device, one plain output for each input.

::

    value ──► TensorReader ──► stack ──► the model ──► split ──► to_json
              shape, dtype     (n, …)                  n outputs  numbers, nested lists
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nograd.tasks.errors import InvalidInput, ModelFailed, OutputMismatch

_NUMERIC = frozenset("biuf")  # NumPy's kinds: bool, int, unsigned, float

#: Lists nested deeper than that are no tensor that a model takes.
_DEEPEST = 16

#: NumPy has no bfloat16: that goes by way of float32.
_NUMPY = {torch.float16: np.float16, torch.float32: np.float32, torch.bfloat16: np.float32, torch.float64: np.float64}


@dataclass(frozen=True, slots=True)
class TensorReader:
    """Reads one input into the tensor a model takes.

    Attributes:
        dtype: of the tensor; floats, whole numbers and booleans are all cast to it.
        row: the input is one flat list of numbers.
        shape: the only shape taken, -1 for a free dimension; any if None.
        allow_nonfinite: take NaN and infinity.
    """

    dtype: torch.dtype
    row: bool = False
    shape: tuple[int, ...] | None = None
    allow_nonfinite: bool = False

    def read(self, value: Any) -> torch.Tensor:
        """Check and cast one number, nested list or array.

        Raises:
            InvalidInput: naming what is wrong, and where in the input.
        """
        array = _numbers(value)
        self._check_shape(array.shape)
        return self._cast(array) if self.dtype.is_floating_point else self._cast_whole(array)

    def read_rows(self, array: np.ndarray[Any, Any]) -> tuple[torch.Tensor, dict[int, InvalidInput]]:
        """Check and cast many inputs that stand in one array: ``(n, *shape)``, whose memory the tensor may take over.

        Returns:
            All of them, and for those that `read` would have refused, by their index, what it would have raised. What
            stands in the tensor for those means nothing.

        Raises:
            InvalidInput: if their shape or type is not what the model takes.
        """
        if array.dtype.kind not in _NUMERIC:
            raise InvalidInput(f"the input is an array of {array.dtype}, not of numbers")
        self._check_shape(array.shape[1:])
        wrong: dict[int, InvalidInput] = {}
        with np.errstate(over="ignore", invalid="ignore"):
            # A copy where it is read-only (torch warns about that) or of another type.
            own = array.astype(_NUMPY.get(self.dtype, np.int64), copy=not array.flags.writeable)
        tensor = torch.from_numpy(own).to(self.dtype)
        if not self.dtype.is_floating_point:
            doubtful = np.arange(len(array)) if array.dtype.kind == "f" or self.dtype is torch.bool else _outside(array)
        elif all_finite(tensor):
            return tensor, wrong
        else:
            doubtful = torch.nonzero(~torch.isfinite(tensor.reshape(len(tensor), -1)).all(dim=1)).flatten().numpy()
        for index in doubtful.tolist():
            try:
                tensor[index] = self.read(array[index])
            except InvalidInput as err:
                wrong[index] = err
        return tensor, wrong

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if self.row and len(shape) != 1:
            raise InvalidInput(f"a row is one flat list of numbers; this input has shape {_shape(shape)}")
        if 0 in shape:
            raise InvalidInput(f"the input is empty: it has shape {_shape(shape)}")
        if self.shape is None or (
            len(shape) == len(self.shape) and all(want in (-1, n) for n, want in zip(shape, self.shape, strict=True))
        ):
            return
        if len(shape) == len(self.shape) == 1:
            raise InvalidInput(f"row has {shape[0]} values, the model takes {self.shape[0]}")
        raise InvalidInput(f"the input has shape {_shape(shape)}, the model takes {_shape(self.shape)}")

    def _cast(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        via = _NUMPY[self.dtype]
        with np.errstate(over="ignore", invalid="ignore"):
            cast = array.astype(via)  # always a copy: arrays from the wire are read-only, which torch warns about
        tensor = torch.from_numpy(cast)
        finite = np.isfinite(cast)
        if self.dtype is torch.bfloat16:
            tensor = tensor.to(self.dtype)
            finite = torch.isfinite(tensor).numpy()
        if not finite.all():
            self._explain_nonfinite(array, finite)
        return tensor

    def _explain_nonfinite(self, array: np.ndarray[Any, Any], finite: np.ndarray[Any, Any]) -> None:
        overflowed = ~finite & np.isfinite(array)
        if overflowed.any():  # refused also where infinity is allowed: nobody sent one
            index = _first(overflowed)
            raise InvalidInput(f"{_place(index)} is {array[index]}, too large for {_name(self.dtype)}")
        if not self.allow_nonfinite:
            index = _first(~finite)
            raise InvalidInput(f"{_place(index)} is {array[index]}")

    def _cast_whole(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        if array.dtype.kind == "b":
            return torch.from_numpy(array.copy()).to(self.dtype)
        low, high = (0, 1) if self.dtype is torch.bool else (torch.iinfo(self.dtype).min, torch.iinfo(self.dtype).max)
        wrong = (array < low) | (array >= high + 1)  # not "> high": as a float, 2**63 - 1 is 2**63
        if array.dtype.kind == "f":
            wrong |= ~np.isfinite(array) | (np.floor(array) != array)
        if wrong.any():
            index = _first(wrong)
            raise InvalidInput(f"{_place(index)} is {array[index]}; the model takes whole numbers, {low} to {high}")
        return torch.from_numpy(array.astype(np.int64)).to(self.dtype)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity among floats; one pass without a temporary where there is none."""
    # Neither goes away in a sum. A sum of large numbers may overflow: only then each one is looked at.
    return math.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).item()) or bool(
        torch.isfinite(tensor).all()
    )


def _outside(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The rows of whole numbers that hold one which 64 bits do not."""
    return np.flatnonzero((array > np.iinfo(np.int64).max).reshape(len(array), -1).any(axis=1))


def _numbers(value: Any) -> np.ndarray[Any, Any]:
    """An array of numbers; strings are not parsed, and missing values are not filled in."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise InvalidInput(_why_not_numbers(value, ()) or "the input is not an array of numbers") from None
    if array.dtype.kind not in _NUMERIC:
        raise InvalidInput(_why_not_numbers(value, ()) or f"the input is an array of {array.dtype}, not of numbers")
    return array


def _why_not_numbers(value: Any, index: tuple[int, ...]) -> str | None:
    """What makes a nested list no array: the first value that is no number, or the first list of another length."""
    if not isinstance(value, list | tuple):
        return _why_no_number(value, index)
    if len(index) == _DEEPEST:
        return f"lists are nested more than {_DEEPEST} deep"
    for i, item in enumerate(value):
        if why := _why_not_numbers(item, (*index, i)):
            return why
    shapes = [_outline(item) for item in value]
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            what = f"{_place((*index, i))} has shape {_shape(shape)}, {_place((*index, 0))} has {_shape(shapes[0])}"
            return f"the lists are of different lengths: {what}"
    return None


def _why_no_number(value: Any, index: tuple[int, ...]) -> str | None:
    if isinstance(value, np.ndarray):
        return None if value.dtype.kind in _NUMERIC else f"{_place(index)} holds {value.dtype}, not numbers"
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return f"{_place(index)} is too large"
    if isinstance(value, bool | int | float) or (isinstance(value, np.generic) and value.dtype.kind in _NUMERIC):
        return None
    short = value is None or (isinstance(value, str) and len(value) < 40)
    return f"{_place(index)} is {repr(value) if short else f'a {type(value).__name__}'}, not a number"


def _outline(value: Any) -> tuple[int, ...]:
    """The shape of a regular nest of lists, read off its first members."""
    if isinstance(value, list | tuple):
        return (len(value), *(_outline(value[0]) if value else ()))
    return np.shape(value)


def _first(mask: np.ndarray[Any, Any]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape))


def _place(index: tuple[int, ...]) -> str:
    if not index:
        return "the input"
    return f"value {index[0]}" if len(index) == 1 else f"value [{', '.join(map(str, index))}]"


def _shape(shape: Sequence[int]) -> str:
    """A shape as Python writes it, with ``?`` for a free dimension."""
    sizes = ["?" if n == -1 else str(n) for n in shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def stack(items: Sequence[torch.Tensor], *, pin: bool) -> torch.Tensor:
    """The batch of some inputs of one shape, on the CPU: ``(n, *shape)``.

    Args:
        items: what `TensorReader.read` or an image transform returned; or the batch itself.
        pin: stack into page-locked memory, from where a GPU copies without waiting.
    """
    if isinstance(items, torch.Tensor):
        return items.pin_memory() if pin else items
    if not pin:
        return torch.stack(list(items))
    batch = torch.empty((len(items), *items[0].shape), dtype=items[0].dtype, pin_memory=True)
    return torch.stack(list(items), out=batch)


def split(output: Any, n: int, what: str = "the model") -> list[Any]:
    """One output for each of ``n`` inputs, on the CPU and out of the graph.

    A tensor or array is split along its first dimension, a dict or tuple member by member (``None`` stays ``None``);
    a list is one output for each input already. A single number answers a single input: ``squeeze()`` does that.

    Raises:
        OutputMismatch: saying how many came for how many.
    """
    if isinstance(output, torch.Tensor):
        if output.ndim == 0 and n == 1:
            return [output.detach().cpu()]
        count = output.shape[0] if output.ndim else None
        _check_count(count, n, f"{what} returned a tensor of shape {tuple(output.shape)}")
        return list(output.detach().cpu().unbind(0))
    if isinstance(output, np.ndarray):
        return split(torch.from_numpy(output) if output.dtype.kind in _NUMERIC else output.tolist(), n, what)
    if isinstance(output, Mapping):
        parts = [_split_member(part, n, f"{what}[{key!r}]") for key, part in output.items()]
        return [dict(zip(output, values, strict=True)) for values in _transpose(parts, n, what)]
    if isinstance(output, tuple):
        parts = [_split_member(part, n, f"{what}[{i}]") for i, part in enumerate(output)]
        return _transpose(parts, n, what)
    if isinstance(output, list):
        _check_count(len(output), n, f"{what} returned a list of {len(output)}")
        return [to_cpu(item) for item in output]
    raise OutputMismatch(f"{what} returned a {type(output).__name__} for {n} inputs, not one output for each")


def _split_member(part: Any, n: int, what: str) -> list[Any]:
    return [None] * n if part is None else split(part, n, what)


def _transpose(parts: list[list[Any]], n: int, what: str) -> list[Any]:
    _check_count(n if parts else 0, n, f"{what} returned nothing")
    return list(zip(*parts, strict=True))


def _check_count(count: int | None, n: int, returned: str) -> None:
    if count != n:
        outputs = "one value" if count is None else f"{count} outputs"
        raise OutputMismatch(f"{returned}: {outputs} for {n} input{'s' * (n != 1)}")


def to_cpu(value: Any) -> Any:
    """The same nest of values with its tensors on the CPU and out of the graph."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_cpu(item) for item in value]
    return value


def to_json(value: Any) -> Any:
    """A prediction as JSON holds it: numbers, strings, nested lists, dicts.

    A tensor with one element of shape ``()`` or ``(1,)`` becomes a plain number; whole numbers stay whole. NaN and
    infinity stay what they are here; the model file says what becomes of them (`nograd.workers.outputs`).

    Raises:
        ModelFailed: for what JSON cannot hold (an image, bytes, complex numbers).
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, torch.Tensor) and not value.is_complex():
        return value.item() if value.ndim < 2 and value.numel() == 1 else value.detach().tolist()
    if isinstance(value, np.generic) and value.dtype.kind in _NUMERIC:
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in _NUMERIC | {"U"}:
        return value.item() if value.ndim < 2 and value.size == 1 else value.tolist()
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    raise ModelFailed(f"the prediction holds a {type(value).__module__}.{type(value).__name__}, which JSON cannot hold")
