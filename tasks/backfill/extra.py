"""The libraries only a backfill needs, imported when first used.

``pip install nograd`` stays light: importing any module of `nograd.tasks.backfill` imports neither pyarrow nor fsspec
nor numpy. Where one is missing, its first use raises `MissingExtra`, which names the extra that brings it.
"""

from __future__ import annotations

import importlib
from typing import Any

from nograd.tasks.errors import MissingExtra
from nograd.tasks.hints import install


class _Lazy:
    """A module that is imported when the first of its names is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        try:
            module = importlib.import_module(self._name)
        except ImportError as err:
            raise MissingExtra(f"a backfill needs {self._name.split('.')[0]}: {install('backfill')} ({err})") from err
        value = getattr(module, attribute)
        setattr(self, attribute, value)
        return value


def is_foreign(err: Exception) -> bool:
    """Whether an error is of a kind that only some library behind fsspec knows: no credentials, no answer of a host."""
    return not isinstance(err, OSError) and type(err).__module__.split(".")[0] not in {"builtins", "nograd"}


pa: Any = _Lazy("pyarrow")
pc: Any = _Lazy("pyarrow.compute")
pq: Any = _Lazy("pyarrow.parquet")
pa_csv: Any = _Lazy("pyarrow.csv")
pa_json: Any = _Lazy("pyarrow.json")
np: Any = _Lazy("numpy")
fsspec: Any = _Lazy("fsspec")
