"""What every module goes through once it is loaded: dtype, evaluation mode, device, memory format, compilation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .compiling import compile_module

if TYPE_CHECKING:
    from torch import nn

    from .base import HostedModel


def ready_for_inference(
    model: HostedModel, module: nn.Module, device: torch.device, *, dynamic: bool | None = None
) -> None:
    """Put a loaded module into evaluation mode, and where and how the model file wants it.

    Args:
        model: whose module it is.
        module: the module.
        device: where it goes.
        dynamic: for `compile_module`, if the model file says ``compile``.

    Raises:
        ModelFileError: if a part of it stays in training mode.
    """
    module.eval()
    module.requires_grad_(requires_grad=False)
    assert_eval(model, module)
    module.to(device)
    if model.spec.channels_last:
        module.to(memory_format=torch.channels_last)
    if model.spec.compile:
        compile_module(module, dynamic=dynamic)


def assert_eval(model: HostedModel, module: nn.Module) -> None:
    """Check every part: one dropout left in training mode makes each answer another one.

    Raises:
        ModelFileError: naming the parts.
    """
    training = [name or type(module).__name__ for name, part in module.named_modules() if part.training]
    if training:
        raise model.error(
            "loader", model.spec.loader, f"still in training mode after eval(): {', '.join(training[:5])}"
        )


def dtype_of(model: HostedModel) -> torch.dtype:
    """The model file's floating type."""
    dtype: torch.dtype = getattr(torch, model.spec.dtype)
    return dtype


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is floating. `nn.Module.to` would also cast what is complex, and lose the imaginary half of it."""
    tensors = [*module.parameters(), *module.buffers()]
    if not any(tensor.is_complex() for tensor in tensors):
        module.to(dtype)
        return
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
