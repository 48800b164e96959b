"""What an error of a forward says about the device, beyond the batch it came from.

Laws:

* Memory that ran out is no fault of the inputs: fewer of them at a time may fit.
* A device that is lost (a device-side assert, an illegal access: the CUDA context is dead) answers nothing any more in
  this process. Running the halves of the batch on it would blame innocents, so nobody does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: what memory that ran out says where it has no exception of its own: host memory, cuBLAS, CUDA outside torch's
#: allocator
_OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
#: what cuDNN says when no workspace is left; on a single input it may mean what it says
_PERHAPS_MEMORY = "CUDNN_STATUS_NOT_SUPPORTED"
#: words in a `RuntimeError` that may come from a dead context
_OF_THE_DEVICE = ("CUDA error", "CUDNN_STATUS", "cuDNN error", "CUBLAS_STATUS")


class DeviceLost(BaseException):
    """The device of this process answers no more; only a new process helps. No `Exception`: nobody may swallow it."""


def is_out_of_memory(err: BaseException, items: int) -> bool:
    """Whether a forward of so many inputs failed for want of memory."""
    if isinstance(err, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(err, RuntimeError):
        return False
    text = str(err)
    return any(words in text for words in _OUT_OF_MEMORY) or (items > 1 and _PERHAPS_MEMORY in text)


def is_device_lost(err: BaseException, device: torch.device) -> bool:
    """Whether the device is gone for this process, whatever a model made of the error that says so.

    Asks the device where it can: not every CUDA error is fatal.
    """
    suspicious = [each for each in chain(err) if _is_of_the_device(each)]
    if device.type == "cuda":
        return bool(suspicious) and not _answers(device)
    return any(
        isinstance(each, torch.AcceleratorError) and not any(words in str(each) for words in _OUT_OF_MEMORY)
        for each in suspicious
    )


def chain(err: BaseException) -> Iterator[BaseException]:
    """An error, and every one it was raised from or while handling, each once."""
    seen: set[int] = set()
    left: list[BaseException | None] = [err]
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            left += [each.__context__, each.__cause__]


def _is_of_the_device(err: BaseException) -> bool:
    if isinstance(err, torch.AcceleratorError):
        return True
    return isinstance(err, RuntimeError) and any(words in str(err) for words in _OF_THE_DEVICE)


def _answers(device: torch.device) -> bool:
    # A dead context repeats its error at every call from then on.
    try:
        torch.cuda.synchronize(device)
        return bool(torch.ones((), device=device).item())
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False
