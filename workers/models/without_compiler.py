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

_PACKAGE = "torch._dynamo"
_UTILS = f"{_PACKAGE}.utils"


@contextmanager
def without_compiler() -> Iterator[None]:
    """Around an import of torchvision."""
    if _PACKAGE in sys.modules:
        yield
        return
    package, utils = _Later(_PACKAGE), _Later(_UTILS)
    package.__path__ = []
    utils.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    sys.modules.update({_PACKAGE: package, _UTILS: utils})
    try:
        yield
    finally:
        _end()


class _Later(ModuleType):
    """Stands for a module of the compiler."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # whoever looks through all modules asks for their files, and wants nothing of them
            raise AttributeError(name)
        _end()
        return getattr(import_module(self.__name__), name)


def _end() -> None:
    for name in (_PACKAGE, _UTILS):
        if isinstance(sys.modules.get(name), _Later):
            del sys.modules[name]


def _is_compile_supported(device_type: Any) -> Any:
    return import_module(_UTILS).is_compile_supported(device_type)


# As of the compiler's own: a call in code that is being compiled is a constant.
_is_compile_supported._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001
