"""Any ``nn.Module``: its class, and a state dict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from nograd.tasks.modelfile import ModuleSpec

from .classes import build
from .tensor_model import TensorModel
from .weights import load_weights

if TYPE_CHECKING:
    import torch


class ModuleModel(TensorModel):
    """Builds the class with ``init`` and loads ``weights`` into it."""

    spec: ModuleSpec

    def open(self, device: torch.device) -> nn.Module:  # noqa: ARG002 - weights are cast on the CPU, then moved
        """Build the class and load its weights."""
        module = build(self, self.spec.class_, self.spec.init)
        if not isinstance(module, nn.Module):
            raise self.error("class", self.spec.class_, "not an nn.Module")
        load_weights(self, module, "weights", self.spec.weights)
        return module
