"""Weights: state dicts from files that cannot run code, and loaded without a difference."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from .base import HostedModel

#: file names that hold weights rather than name some
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")

#: put before every name by `DataParallel` and by `torch.compile`
_WRAPPERS = ("module.", "_orig_mod.", "module.")


def load_weights(model: HostedModel, module: torch.nn.Module, key: str, value: str) -> None:
    """Load the state dict a key of the model file points to into ``module``, every name and shape matching.

    Raises:
        ModelFileError: if the file is missing, is no state dict, or does not fit; then with torch's own lines.
    """
    state = read_state_dict(model, key, value)
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in state) and not any(
            name.startswith(prefix) for name in module.state_dict()
        ):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as err:
        raise model.error(key, value, str(err)) from err


def read_state_dict(model: HostedModel, key: str, value: str) -> dict[str, Any]:
    """Names → tensors, from ``.safetensors`` or ``torch.save``; of a checkpoint, what it calls ``state_dict``.

    Raises:
        ModelFileError: if the file is missing or holds something else.
    """
    path = model.path(key, value)
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    loaded = read(model, key, value, path)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping) or not state or not all(isinstance(name, str) for name in state):
        raise model.error(key, value, f"holds a {type(state).__name__}, not a state dict; save model.state_dict()")
    return dict(state)


def _read_safetensors(model: HostedModel, key: str, value: str, path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as err:
        raise model.error(key, value, f"not a safetensors file: {err}") from err


def _read_torch(model: HostedModel, key: str, value: str, path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise model.error(key, value, why_refused(err)) from err
    except Exception as err:
        # A damaged file makes torch raise many things: EOFError, RuntimeError, KeyError, ValueError
        raise model.error(key, value, f"cannot be read: {type(err).__name__}: {_first_line(err)}") from err


def why_refused(err: pickle.UnpicklingError) -> str:
    """What to do about a file that ``weights_only`` refused: it holds objects, and loading those runs their code."""
    reason = str(err).partition("WeightsUnpickler error:")[2] or str(err)
    return (
        f"torch refused it with weights_only=True: {reason.strip().splitlines()[0]} "
        "It is damaged, or it holds more than weights: save model.state_dict() and name the class in the model file"
    )


def _first_line(err: Exception) -> str:
    return (str(err).strip().splitlines() or [""])[0]
