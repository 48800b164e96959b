"""One loader per file; `open_model` finds the one a table of the model file asks for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .base import HostedModel

if TYPE_CHECKING:
    from nograd.tasks.modelfile import ModelFile

#: loader → what makes the hosted model. Imported on demand: plain modules need neither transformers nor lightning.
_LOADERS = {
    "torchvision": "torchvision:TorchvisionModel",
    "transformers": "transformers:open_transformers",
    "module": "module:ModuleModel",
    "lightning": "lightning:LightningModel",
    "export": "export:ExportModel",
    "python": "python:PythonModel",
}


def open_model(models: ModelFile, name: str) -> HostedModel:
    """The hosted model of one table of the model file, not loaded yet."""
    spec = models.specs[name]
    module, _, cls = _LOADERS[spec.loader].partition(":")
    hosted: HostedModel = getattr(import_module(f".{module}", __name__), cls)(name, spec, models.path)
    return hosted


__all__ = ["HostedModel", "open_model"]
