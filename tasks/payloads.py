"""Inputs on the wire: plain JSON, with two markers for what JSON lacks.

=====================  ===========================================================
in Python              on the wire
=====================  ===========================================================
str, numbers, lists    as they are
bytes, image files     ``{"base64": "…"}``
arrays and tensors     ``{"base64": "…", "dtype": "float32", "shape": [2, 3]}`` (C order, little endian)
=====================  ===========================================================

A sender that has no code of ours writes the same by hand. Encoding needs neither numpy nor torch: arrays are
recognised by what they offer, not by their class.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InvalidInput

if TYPE_CHECKING:
    import numpy as np

    from .modelfile import InputKind

#: dtypes an array may have on the wire
_DTYPES = frozenset(
    f"{kind}{bits}"
    for kind, widths in (("float", (16, 32, 64)), ("int", (8, 16, 32, 64)), ("uint", (8, 16, 32, 64)))
    for bits in widths
) | {"bool"}

#: lists and objects inside each other at most; JSON encoders and decoders, also those of workers, recurse
MAX_DEPTH = 100

#: A dict with exactly these keys makes kombu's JSON decoder drop the whole message, and its result waits for ever.
_KOMBU_MARKER = {"__type__", "__value__"}


def encode_input(value: Any, kind: InputKind | None) -> Any:
    """Turn one input into what crosses the wire.

    Args:
        value: a path, bytes, Pillow image, str, number, list, NumPy array or tensor.
        kind: what the model takes; for ``image`` a str is a path. None if not known.

    Raises:
        InvalidInput: if it cannot be sent, saying why.
    """
    if isinstance(value, Path) or (kind == "image" and isinstance(value, str)):
        return _encode_bytes(_read_file(Path(value)))
    if isinstance(value, bytes | bytearray | memoryview):
        return _encode_bytes(bytes(value))
    if hasattr(value, "detach") and hasattr(value, "numpy"):
        value = _array_of_tensor(value)
    # A NumPy scalar has all this, too, but no length; it is a plain number.
    if all(hasattr(value, name) for name in ("dtype", "tobytes", "shape", "__len__")) and not isinstance(value, str):
        return _encode_array(value)
    if hasattr(value, "save") and hasattr(value, "getbands"):  # a Pillow image
        file = io.BytesIO()
        value.save(file, format="PNG")  # lossless: the model sees the pixels the caller had
        return _encode_bytes(file.getvalue())
    return _check_json(value, "input")


def encode_inputs(values: list[Any], kind: InputKind | None) -> list[Any]:
    """Encode the inputs of a message with many; an error names the position.

    Raises:
        InvalidInput: for the first input that cannot be sent.
    """
    encoded = []
    for index, value in enumerate(values):
        try:
            encoded.append(encode_input(value, kind))
        except InvalidInput as err:
            raise InvalidInput(f"input {index}: {err.message}") from err
    return encoded


def decode_input(wire: Any) -> Any:
    """Turn what crossed the wire back: bytes for a file, a NumPy array for an array, anything else as it is.

    Raises:
        InvalidInput: for a broken marker.
    """
    if not isinstance(wire, dict) or "base64" not in wire:
        return wire
    extra = set(wire) - {"base64", "dtype", "shape"}
    if extra:
        raise InvalidInput(f"unknown key {min(extra)!r} beside 'base64'")
    try:
        data = base64.b64decode(wire["base64"], validate=True)
    except (binascii.Error, TypeError, ValueError) as err:
        raise InvalidInput(f"'base64' does not hold base64: {err}") from err
    return _decode_array(data, wire["dtype"], wire.get("shape")) if "dtype" in wire else data


def describe(model: str, value: Any) -> str:
    """One line about a job for logs and Flower, never its contents: ``photos cat.jpg 12 KB``."""
    return f"{model} {_describe_input(value)}"


def _describe_input(value: Any) -> str:  # noqa: PLR0911 - one line for each kind of input
    if isinstance(value, Path):
        try:
            return f"{value.name} {_size(value.stat().st_size)}"
        except OSError:
            return value.name
    if isinstance(value, bytes | bytearray | memoryview):
        return _size(len(value))
    if isinstance(value, str):
        return f"{len(value)} characters"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{'x'.join(map(str, tuple(value.shape)))} {str(value.dtype).removeprefix('torch.')}".lstrip()
    if isinstance(value, list | tuple):
        return f"{len(value)} values"
    return type(value).__name__


def _size(n: int) -> str:
    return f"{n} B" if n < 1024 else f"{n / 1024:.0f} KB" if n < 1024**2 else f"{n / 1024**2:.1f} MB"


def _read_file(path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as err:
        raise InvalidInput(f"{path}: cannot read the file: {err.strerror or err}") from err


def _encode_bytes(data: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(data).decode("ascii")}


def _array_of_tensor(tensor: Any) -> Any:
    """The NumPy array of a torch tensor on any device, attached or not, dense or sparse."""
    try:
        tensor = tensor.detach()
        if str(tensor.layout) != "torch.strided":
            tensor = tensor.to_dense()
        if str(tensor.dtype) == "torch.bfloat16":  # NumPy has none; float32 holds every value of it
            tensor = tensor.float()
        return tensor.cpu().numpy()
    except (TypeError, RuntimeError) as err:  # a dtype NumPy lacks, a tensor without data, one too large when dense
        raise InvalidInput(f"a tensor of dtype {tensor.dtype} cannot be sent: {err}") from err


def _encode_array(array: Any) -> dict[str, Any]:
    dtype = array.dtype.name
    if dtype not in _DTYPES:
        raise InvalidInput(f"an array of dtype {dtype} cannot be sent; send one of {', '.join(sorted(_DTYPES))}")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    # tobytes() is C order whatever the array's own layout
    return {**_encode_bytes(array.tobytes()), "dtype": dtype, "shape": [int(n) for n in array.shape]}


def _decode_array(data: bytes, dtype: Any, shape: Any) -> np.ndarray[Any, Any]:
    import numpy as np

    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise InvalidInput(f"unknown dtype {dtype!r}; expected one of {', '.join(sorted(_DTYPES))}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise InvalidInput(f"shape {shape!r} is not a list of whole numbers")
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if len(data) != expected:
        raise InvalidInput(f"an array of dtype {dtype} and shape {shape} has {expected} bytes, not {len(data)}")
    return np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<")).reshape(shape)


def _check_json(value: Any, where: str, depth: int = 0) -> Any:
    """Return ``value`` if JSON can hold it and kombu will deliver it, NumPy's scalars as plain ones."""
    if type(value) in _SCALARS:
        return value
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, str | bool | int | float):
        return value
    if depth >= MAX_DEPTH and isinstance(value, list | tuple | dict):
        raise InvalidInput(f"the input is nested more than {MAX_DEPTH} deep")
    depth += 1
    if isinstance(value, list | tuple):
        if not _mixed(value):
            return list(value)
        return [_check_json(item, f"{where}[{i}]", depth) for i, item in enumerate(value)]
    if isinstance(value, dict):
        _check_keys(value, where)
        return {key: _check_json(item, f"{where}.{key}", depth) for key, item in value.items()}
    raise InvalidInput(f"{where}: a {type(value).__module__}.{type(value).__qualname__} cannot be sent as JSON")


def _check_keys(value: dict[Any, Any], where: str) -> None:
    if set(value) == _KOMBU_MARKER:
        raise InvalidInput(
            f"{where}: a dict with exactly the keys '__type__' and '__value__' cannot be sent: the broker drops it"
        )
    for key in value:
        if not isinstance(key, str):
            raise InvalidInput(f"{where}: the key {key!r} is not a string")


_SCALARS = frozenset({int, float, str, bool, type(None)})


def _mixed(values: list[Any] | tuple[Any, ...]) -> bool:
    """Whether anything in the list needs a look of its own (a row of plain numbers does not)."""
    return not _SCALARS.issuperset(map(type, values))
