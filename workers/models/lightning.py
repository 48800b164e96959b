"""A ``LightningModule`` from its checkpoint, run by its own ``predict_step``, without a Trainer.

What a Trainer would do around a step is done here: the batch passes ``on_before_batch_transfer``,
``transfer_batch_to_device`` and ``on_after_batch_transfer``, and then ``predict_step(batch, batch_idx=0)``.
What only a Trainer can give, ``self.trainer``, raises there, and is answered with what to do about it.

Neither ``lightning`` nor ``pytorch_lightning`` is imported here: the class brings its own, and they are not the same.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nograd.tasks.errors import ModelFailed
from nograd.tasks.modelfile import LightningSpec

from .classes import import_class
from .tensor_model import TensorModel
from .weights import why_refused

if TYPE_CHECKING:
    from torch import nn


class LightningModel(TensorModel):
    """Loads the checkpoint with ``weights_only`` and hands each batch to ``predict_step``."""

    spec: LightningSpec
    module: Any

    def open(self, device: torch.device) -> nn.Module:
        """Load the checkpoint into the class; hyperparameters come from it, and from ``init``."""
        key, value = "checkpoint", self.spec.checkpoint
        cls = import_class(self, self.spec.class_)
        if not (hasattr(cls, "load_from_checkpoint") and hasattr(cls, "predict_step")):
            raise self.error("class", self.spec.class_, "not a LightningModule")
        path = self.path(key, value)
        try:
            module = cls.load_from_checkpoint(path, map_location=device, weights_only=True, **self.spec.init)
        except pickle.UnpicklingError as err:
            raise self.error(key, value, why_refused(err)) from err
        except TypeError as err:
            raise self.error(
                "init", self.spec.init, f"{self.spec.class_} raised {err}; the checkpoint does not hold the rest"
            ) from err
        except Exception as err:
            # A state dict that does not fit, or a damaged file: torch and lightning raise many things
            raise self.error(key, value, f"{type(err).__name__}: {err}") from err
        self._arguments = step_arguments(module.predict_step)
        loaded: nn.Module = module
        return loaded

    def call(self, batch: torch.Tensor) -> Any:
        """Pass the batch through the transfer hooks to ``predict_step``, as a Trainer does.

        A step may put parts of the module back into training mode (Monte Carlo dropout); that is its own decision.

        Raises:
            ModelFailed: if the step needs a Trainer or another ``batch_style``, saying so.
        """
        pair = self.spec.batch_style == "inputs_and_targets"
        module = self.module
        try:
            moved = module.on_before_batch_transfer((batch, None) if pair else batch, 0)
            moved = module.transfer_batch_to_device(moved, self.device, 0)
            moved = module.on_after_batch_transfer(moved, 0)
            self.mark(moved[0] if pair else moved)
            return module.predict_step(moved, *self._arguments)
        except RuntimeError as err:
            if "not attached to a `Trainer`" not in str(err):
                raise
            raise ModelFailed(
                f"predict_step of {self.spec.class_} uses self.trainer; nograd runs modules without a Trainer"
            ) from err
        except ValueError as err:
            if pair or "values to unpack" not in str(err):
                raise
            raise ModelFailed(
                f"predict_step of {self.spec.class_} unpacks what it gets ({err}): if it begins with `x, _ = batch`, "
                'set batch_style = "inputs_and_targets"'
            ) from err

    def examples(self) -> Sequence[Any]:
        """As for any tensor, and after that the module's own ``example_input_array``, its batch dimension taken off."""
        own = getattr(self.module, "example_input_array", None)
        if self.spec.example is None and self.spec.shape is None and self.spec.kind != "image":
            return [own[0].cpu().numpy()] if isinstance(own, torch.Tensor) and own.ndim and len(own) else []
        return super().examples()


def step_arguments(predict_step: Callable[..., Any]) -> list[int]:
    """What a ``predict_step`` gets after the batch: ``batch_idx`` and ``dataloader_idx``, both 0, if it takes them.

    As a Trainer does with one data loader: the second parameter is the batch's index whatever its name; a third is
    passed only if it has to be.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in inspect.signature(predict_step).parameters.values() if p.kind in kinds]
    required = [p for p in positional[2:] if p.default is inspect.Parameter.empty]
    return [0] * (len(positional[1:2]) + len(required))
