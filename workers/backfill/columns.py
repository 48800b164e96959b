"""Between Arrow and the models: whole columns where they are numbers, one input for each row elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nograd.tasks.backfill.plan import SourceSpec
from nograd.tasks.backfill.sources import read_image
from nograd.tasks.errors import InvalidInput
from nograd.tasks.modelfile import InputKind
from nograd.tasks.payloads import decode_input

#: where the input stands in the body of a line of OpenAI's batch format
_BODY_KEYS = ("input", "prompt", "messages")


def numeric(spec: SourceSpec) -> bool:
    """Whether the columns of the model are numbers, or one column of lists of them."""
    types = [spec.schema.to_arrow().field(name).type for name in spec.columns]
    if len(types) == 1 and (pa.types.is_list(types[0]) or pa.types.is_fixed_size_list(types[0])):
        return _is_number(types[0].value_type)
    return all(_is_number(kind) for kind in types)


def to_array(batch: pa.RecordBatch, columns: Sequence[str], *, scalars: bool) -> np.ndarray[Any, Any] | None:
    """The columns of the model as one array, without an object per row.

    Args:
        batch: rows without missing values, or with missing floats.
        columns: for which `numeric` holds.
        scalars: a single column of numbers is one number a row, not a row of one.

    Returns:
        ``(n, columns)``; ``(n,)`` for scalars; ``(n, k)`` for a column of lists. None for lists of different lengths,
        and for missing values among whole numbers.
    """
    if len(columns) == 1 and not _is_number(batch.column(columns[0]).type):
        return _lists(batch.column(columns[0]))
    if any(batch.column(name).null_count and not pa.types.is_floating(batch.column(name).type) for name in columns):
        return None  # NumPy would make floats of the whole column, and round its large numbers
    arrays = [batch.column(name).to_numpy(zero_copy_only=False) for name in columns]
    if scalars and len(arrays) == 1:
        return arrays[0]  # type: ignore[no-any-return]
    whole = np.empty((batch.num_rows, len(arrays)), np.result_type(*arrays))
    for index, array in enumerate(arrays):
        whole[:, index] = array
    return whole


def input_of(spec: SourceSpec, kind: InputKind) -> Callable[[pa.RecordBatch, int], Any]:
    """How row ``i`` of a batch becomes one input, as `HostedModel.prepare` takes it.

    Raises, when called:
        InvalidInput: if the row holds no such input.
        SourceError: if a file's storage does not answer; no row is to blame.
    """
    columns = spec.columns
    if spec.kind == "images":
        return lambda batch, i: read_image(batch.column("url")[i].as_py(), batch.column("size")[i].as_py())
    if len(columns) > 1 and kind == "json":
        return lambda batch, i: {name: batch.column(name)[i].as_py() for name in columns}
    if len(columns) > 1 or (kind == "rows" and _is_number(spec.schema.to_arrow().field(columns[0]).type)):
        return lambda batch, i: [batch.column(name)[i].as_py() for name in columns]
    convert = _of_body if spec.kind == "openai" else _image if kind == "image" else _value
    return lambda batch, i: convert(batch.column(columns[0])[i].as_py())


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _lists(column: pa.Array) -> np.ndarray[Any, Any] | None:
    if column.null_count or not len(column):
        return None
    values = column.flatten()
    if values.null_count and not pa.types.is_floating(values.type):
        return None
    length, rest = divmod(len(values), len(column))
    if rest or not length:
        return None
    if not pa.types.is_fixed_size_list(column.type):
        lengths = np.diff(column.offsets.to_numpy())
        if (lengths != length).any():
            return None
    return values.to_numpy(zero_copy_only=False).reshape(len(column), length)  # type: ignore[no-any-return]


def _value(value: Any) -> Any:
    return decode_input(value) if isinstance(value, dict) else value


def _image(value: Any) -> Any:
    """An image in a column: its bytes, the path of its file, or the struct that Hugging Face's datasets write."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str):
        return value
    try:
        return Path(value).read_bytes()
    except (OSError, ValueError) as err:
        raise InvalidInput(f"cannot read the image {value!r}: {getattr(err, 'strerror', None) or err}") from err


def _of_body(body: str) -> Any:
    fields = json.loads(body)
    for key in _BODY_KEYS:
        if isinstance(fields, dict) and key in fields:
            return fields[key]
    raise InvalidInput(f"the body has none of the keys {', '.join(_BODY_KEYS)}")
