"""Torchvision's classifiers; preprocessing and categories come with the weights, never from a guess."""

from __future__ import annotations

import logging
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch

from nograd.tasks.modelfile import TorchvisionSpec

from .tensor_model import TensorModel
from .weights import SUFFIXES, load_weights
from .without_compiler import without_compiler

with without_compiler():
    import torchvision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from .images import Transform

logger = logging.getLogger(__name__)


class TorchvisionModel(TensorModel):
    """Opens a builder of ``torchvision.models`` with a member of its weights enum, or with a local state dict.

    With a local one, the transforms are those of the architecture's default weights. Its categories are, too, if the
    model has as many outputs; a fine-tuned model with another number of them needs ``labels``, and without labels a
    class is named by its index (``{"label": "2", …}``).
    """

    spec: TorchvisionSpec
    _weights: Any  # a member of the architecture's weights enum

    def open(self, device: torch.device) -> nn.Module:  # noqa: ARG002 - weights are cast on the CPU, then moved
        """Build the architecture and load its weights."""
        members = self._members()
        module = self._open_local(members) if self._is_local(members) else self._open_enum(members)
        if self.labels is None:
            self.labels = self._categories(module)
        return module

    def own_transform(self) -> Transform:
        """The transforms that belong to the weights."""
        transform: Transform = self._weights.transforms()
        return transform

    def _members(self) -> Mapping[str, Any]:
        name = self.spec.model
        known = torchvision.models.list_models(module=torchvision.models)
        if name not in known:
            close = get_close_matches(name, known, n=3)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise self.error(
                "model", name, f"torchvision {torchvision.__version__} has no classifier of that name{hint}"
            )
        members: Mapping[str, Any] = torchvision.models.get_model_weights(name).__members__
        return members

    def _is_local(self, members: Mapping[str, Any]) -> bool:
        value = self.spec.weights
        return value not in members and (value.endswith(SUFFIXES) or (self.file.parent / value).is_file())

    def _open_enum(self, members: Mapping[str, Any]) -> nn.Module:
        name, value = self.spec.model, self.spec.weights
        if value not in members:
            raise self.error(
                "weights", value, f"neither a file ({', '.join(SUFFIXES)}) nor one of {', '.join(members)}"
            )
        self._weights = members[value]
        try:
            module: nn.Module = torchvision.models.get_model(name, weights=self._weights, **self.spec.init)
        except (TypeError, ValueError) as err:
            raise self.error("init", self.spec.init, f"{name} raised {type(err).__name__}: {err}") from err
        except (OSError, RuntimeError) as err:  # the download failed, or brought something else than expected
            raise self.error("weights", value, f"cannot be downloaded from {self._weights.url}: {err}") from err
        return module

    def _open_local(self, members: Mapping[str, Any]) -> nn.Module:
        name = self.spec.model
        self._weights = members["DEFAULT"]
        try:
            module: nn.Module = torchvision.models.get_model(name, weights=None, **self.spec.init)
        except (TypeError, ValueError) as err:
            raise self.error("init", self.spec.init, f"{name} raised {type(err).__name__}: {err}") from err
        load_weights(self, module, "weights", self.spec.weights)
        return module

    def _categories(self, module: nn.Module) -> list[str]:
        """The names in the weights' metadata where they fit; else each class's index, as a string."""
        categories: list[str] = self._weights.meta["categories"]
        outputs = _count_outputs(module)
        if len(categories) == outputs:
            return categories
        logger.warning(
            "model %s has %d outputs, and the categories of %s are %d: classes are named by their index; set `labels`",
            self.name,
            outputs,
            self._weights,
            len(categories),
        )
        return [str(index) for index in range(outputs)]


def _count_outputs(module: nn.Module) -> int:
    """The outputs of a classifier: torchvision's end in a linear layer, or in a convolution (SqueezeNet)."""
    last = [part for part in module.modules() if isinstance(part, torch.nn.Linear | torch.nn.Conv2d)][-1]
    return last.out_features if isinstance(last, torch.nn.Linear) else last.out_channels
