"""What travels between reading, scoring and writing: slices of rows, and rows that failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from nograd.tasks.structs import decodable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
else:
    from .extra import np, pa

#: what Arrow raises for a value that does not fit a type
MISFIT = (TypeError, ValueError, OverflowError, NotImplementedError)

#: where a row failed: its record could not be read; the model's ``prepare``, ``forward`` or ``finish`` raised;
#: the prediction does not fit the declared type; the worker died over it
Stage = Literal["read", "prepare", "predict", "output", "crash"]


@decodable
class RowFailure(msgspec.Struct, frozen=True, kw_only=True):
    """A row that has no prediction, and why. One line of an errors file.

    Attributes:
        row: its position in the input, counted over all files.
        id: its id, None if that could not be read either.
        stage: where it failed.
        type: of the error: an error's ``code`` or the name of an exception's class.
        message: for people.
    """

    row: int
    id: Any
    stage: Stage
    type: str
    message: str

    @property
    def label(self) -> str:
        """What names it for people: its id, or its position where it has none of its own."""
        return f"row {self.row}" if self.id in (None, self.row) else str(self.id)


@dataclass(frozen=True, slots=True)
class Slice:
    """Neighbouring rows of a chunk.

    Attributes:
        position: of its first row, counted in the chunk.
        batch: the columns of the plan's source schema, for every row; null where the row failed.
        rows: position of each row in the input (int64).
        failures: index in the batch → why that row could not be read.
    """

    position: int
    batch: pa.RecordBatch
    rows: pa.Array
    failures: Mapping[int, RowFailure] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    @property
    def good(self) -> pa.RecordBatch:
        """The rows that were read: what the model is given. Its i-th row is the batch's `good_indices` [i]."""
        return self.batch if not self.failures else self.batch.take(self.good_indices)

    @property
    def good_indices(self) -> npt.NDArray[np.int64]:
        """Where in the batch the rows stand that were read."""
        indices = np.arange(len(self), dtype=np.int64)
        return np.delete(indices, list(self.failures)) if self.failures else indices


def fits(value: Any, kind: pa.DataType) -> bool:
    """Whether Arrow would keep all of a plain value: it drops keys it does not know, and turns truth into numbers."""
    if value is None:
        return True
    if isinstance(value, dict):
        if not pa.types.is_struct(kind):
            return False
        types = {field.name: field.type for field in kind}
        return set(value) <= set(types) and all(fits(item, types[key]) for key, item in value.items())
    if isinstance(value, list | tuple):
        return bool(pa.types.is_list(kind)) and all(fits(item, kind.value_type) for item in value)
    for plain, holds in _PLAIN:
        if isinstance(value, plain):
            return any(getattr(pa.types, name)(kind) for name in holds)
    return True


#: plain values and the kinds of type that keep them as they are; bool first, for it is an int, too
_PLAIN: tuple[tuple[type, tuple[str, ...]], ...] = (
    (bool, ("is_boolean",)),
    (int, ("is_integer", "is_floating")),
    (float, ("is_floating",)),
    (str, ("is_string", "is_large_string")),
)
