"""A class of the user's own: ``load(device)``, ``prepare(input)``, ``forward(list)``, ``finish(output)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from nograd.tasks.errors import InvalidInput, ModelFailed
from nograd.tasks.modelfile import PythonSpec

from .base import HostedModel
from .classes import build
from .images import decode_image
from .inference import assert_eval
from .tensors import split, to_json

if TYPE_CHECKING:
    import torch


class PythonModel(HostedModel):
    """Calls the methods of an instance, and holds them to the contract.

    ``load`` and ``forward`` are required. ``load`` may run while other models of the process answer, if this one comes
    when the worker is up: it must leave alone what is the whole process's, above all torch's default dtype.

    ``prepare`` and ``finish`` hand on what they get where they are missing; ``bucket(prepared)``, where it is there,
    says which inputs may share a batch, ``cost(prepared)`` what each adds to it (``batch.max_cost``). A method with a
    parameter named ``params`` gets the parameters of the prediction, too; if none has one, a job may not bring any.

    ``forward`` answers with a list (or a tensor, split along its first dimension), one output for each input. With
    ``input = "image"``, ``prepare`` gets an upright Pillow image in RGB; otherwise what the producer sent.
    """

    spec: PythonSpec
    _methods: dict[str, Callable[..., Any]]
    _takes_params: frozenset[str]
    _modules: Sequence[nn.Module] = ()

    def load(self, device: torch.device) -> None:
        """Build the class and let it load; see `HostedModel.load`."""
        if self.spec.transform is not None or self.spec.labels is not None:
            raise self.error("class", self.spec.class_, "transforms and labels are the class's own; take out the keys")
        for key, default in (("dtype", "float32"), ("compile", False), ("channels_last", False)):
            if (value := getattr(self.spec, key)) != default:
                raise self.error(key, value, f"what {self.spec.class_} loads is its own; take out the key")
        instance = build(self, self.spec.class_, self.spec.init)
        self._methods = {
            name: getattr(instance, name)
            for name in ("load", "prepare", "forward", "finish", "bucket", "cost")
            if callable(getattr(instance, name, None))
        }
        for name in ("load", "forward"):
            if name not in self._methods:
                raise self.error("class", self.spec.class_, f"has no method {name}")
        self.own_finish = "finish" in self._methods
        self._takes_params = frozenset(name for name, method in self._methods.items() if _takes_params(method))
        if self.spec.params and not self._takes_params:
            raise self.error("params", self.spec.params, f"no method of {self.spec.class_} has a parameter `params`")
        try:
            self._methods["load"](device)
        except (Exception, SystemExit) as err:
            raise self.error("class", self.spec.class_, f"load() raised {type(err).__name__}: {err}") from err
        parts = vars(instance).values() if hasattr(instance, "__dict__") else ()
        self._modules = [part for part in parts if isinstance(part, nn.Module)]
        for part in self._modules:
            assert_eval(self, part)

    def modules(self) -> Sequence[nn.Module]:
        """Those the instance has as attributes."""
        return self._modules

    def prepare(self, input: Any, params: Mapping[str, Any]) -> Any:  # noqa: A002
        """Run the class's ``prepare``.

        Raises:
            InvalidInput: what it raises as ``ValueError`` or ``TypeError``.
        """
        if params and not self._takes_params:
            raise InvalidInput(f"unknown parameter {next(iter(params))!r}: model {self.name!r} takes none")
        value = decode_image(input) if self.spec.kind == "image" else input
        try:
            return self._call("prepare", value, params)
        except (ValueError, TypeError) as err:
            raise InvalidInput(str(err) or type(err).__name__) from err

    def bucket(self, prepared: Any) -> Hashable:
        """What the class's ``bucket`` says, if it has one."""
        return self._methods["bucket"](prepared) if "bucket" in self._methods else None

    def cost(self, prepared: Any) -> int:
        """What the class's ``cost`` says, 1 if it has none.

        Raises:
            ModelFailed: if that is no whole number, or negative.
        """
        cost = self._methods["cost"](prepared) if "cost" in self._methods else 1
        if type(cost) is not int or cost < 0:
            raise ModelFailed(f"{self.spec.class_}.cost returned {cost!r}; expected a whole number, 0 or more")
        return cost

    def forward(self, batch: Sequence[Any], params: Mapping[str, Any]) -> Sequence[Any]:
        """Run the class's ``forward``.

        Raises:
            OutputMismatch: if it does not return one output for each input.
        """
        output = self._call("forward", list(batch), params)
        return split(list(output) if isinstance(output, tuple) else output, len(batch), f"{self.spec.class_}.forward")

    def finish(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Run the class's ``finish``, and turn tensors in what it returns into plain values."""
        return to_json(self._call("finish", output, params))

    def _call(self, name: str, value: Any, params: Mapping[str, Any]) -> Any:
        method = self._methods.get(name)
        if method is None:
            return value
        return method(value, params=self.settings(params)) if name in self._takes_params else method(value)


def _takes_params(method: Callable[..., Any]) -> bool:
    try:
        return "params" in inspect.signature(method).parameters
    except (TypeError, ValueError):  # some built-in callables have no signature
        return False
