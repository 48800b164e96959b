"""Importing torchvision without torch's compiler.

When it is imported, torchvision takes one function from the compiler, for ``roi_align`` to call. With it comes all of
the compiler: 150 MB of memory in every worker, and seconds of its start. Few models call it; so here the function finds
the compiler when it is called.

Laws:

* What torchvision does is what it did: the function asks the compiler's own.
* Whoever wants the compiler finds it, whole, also if torchvision should want more of it one day: then it is loaded at
  once. Where it is loaded already nothing changes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

_UTILS = "torch._dynamo.utils"


@contextmanager
def without_compiler() -> Iterator[None]:
    """Around an import of torchvision."""
    if "torch._dynamo" in sys.modules:
        yield
        return
    # Only this module of it: ``from … import`` takes one that is there without looking for its package, and whoever
    # imports another one meanwhile, on this thread or a different one, gets the compiler.
    utils = _Later(_UTILS)
    utils.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    sys.modules[_UTILS] = utils
    try:
        yield
    finally:
        _end()


class _Later(ModuleType):
    """Stands for the module of the compiler."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # whoever looks through all modules asks for their files, and wants nothing of them
            raise AttributeError(name)
        _end()
        return getattr(import_module(_UTILS), name)


def _end() -> None:
    if isinstance(sys.modules.get(_UTILS), _Later):
        sys.modules.pop(_UTILS, None)


def _is_compile_supported(device_type: Any) -> Any:
    return import_module(_UTILS).is_compile_supported(device_type)


# As of the compiler's own: a call in code that is being compiled is a constant.
_is_compile_supported._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001
