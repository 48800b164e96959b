"""What the models of a worker hold on its device, how much they may, and giving back what is no longer held.

Laws:

* The models together never stay above the budget: one that would is dropped again, with an error that names the sizes.
* On a GPU the budget is nine tenths of its memory unless given; the rest is for what a forward needs beside weights.
  On a CPU there is none unless given.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from nograd.tasks.errors import ModelFileError

from .resources import show_size

if TYPE_CHECKING:
    from .models import HostedModel

#: part of a GPU's memory that models may hold if nobody says otherwise
DEFAULT_SHARE = 0.9
#: seconds between two trims in the middle of work: each takes some milliseconds, and what is used again has to be got
#: again
OFTEN_S: Final = 1.0


class MemoryBudget:
    """Keeps the books; used on the device thread only, but may be read on any.

    Args:
        device: the worker's.
        budget: bytes; None for the device's default.

    Attributes:
        held: bytes of each model.
    """

    def __init__(self, device: torch.device, budget: int | None = None) -> None:
        self._device = device
        self._before = 0
        self.held: dict[str, int] = {}
        self.budget = budget if budget is not None else _default_budget(device)

    def open(self) -> None:
        """A model is about to be loaded."""
        self._before = _allocated(self._device)

    def close(self, model: HostedModel) -> None:
        """The model is loaded and warm: enter what it holds.

        Raises:
            ModelFileError: if that is too much. The model is not entered, and the caller drops it.
        """
        size = self._size(model)
        held = sum(self.held.values())
        if self.budget is not None and held + size > self.budget:
            others = ", ".join(f"{name} ({show_size(bytes_)})" for name, bytes_ in self.held.items())
            beside = f", beside {others}" if others else ""
            raise ModelFileError(
                f"{model.file}: [{model.name}]: the model holds {show_size(size)}{beside}; "
                f"the memory budget of {self._device} is {show_size(self.budget)} (NOGRAD_MEMORY_BUDGET)"
            )
        self.held[model.name] = size

    def forget(self, name: str) -> None:
        """The model is gone."""
        self.held.pop(name, None)

    def _size(self, model: HostedModel) -> int:
        if self._device.type == "cuda":
            return max(0, _allocated(self._device) - self._before)
        return tensor_bytes(model.modules())


def tensor_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all parameters and buffers; what is shared counts once."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.layout == torch.strided
        for storage in (tensor.untyped_storage(),)
    }
    return sum(storages.values())


def free(device: torch.device) -> None:
    """Collect what nobody refers to any more, and give what the allocators keep of it back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim()


_trimmed = float("-inf")


def trim(after_s: float = 0.0) -> None:
    """Return to the system what this process has freed on the CPU. Nothing where the C library is not glibc.

    What a thread has freed stays with that thread: without this a worker's memory grows to what decoding, stacking and
    the forwards each took at their largest, together.

    Args:
        after_s: only if this was not done for so many seconds.
    """
    global _trimmed  # noqa: PLW0603 - of the process, as its memory is; two threads that both trim do no harm
    now = time.monotonic()
    if now - _trimmed >= after_s and (malloc_trim := _malloc_trim()) is not None:
        _trimmed = now
        malloc_trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    free(device)
    return int(torch.cuda.memory_allocated(device))


def _default_budget(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    _, total = torch.cuda.mem_get_info(device)
    return int(total * DEFAULT_SHARE)
