"""The one device of a worker process."""

from __future__ import annotations

import contextlib
import os

import torch

from nograd.tasks.errors import ConfigError

from .resources import GPUS, Resources


def default_device() -> torch.device:
    """The first visible GPU, else the CPU.

    A launcher that wants another GPU sets ``CUDA_VISIBLE_DEVICES`` before torch is imported, so inside a worker the
    device is always the first.
    """
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def require() -> None:
    """See that a worker that was given a GPU by name has one: it must not run on the CPU unnoticed.

    Raises:
        ConfigError: if torch sees none.
    """
    asked = os.environ.get(GPUS)
    if asked and not torch.cuda.is_available():
        raise ConfigError(
            f"--gpus {asked}: torch sees no CUDA device here (torch.cuda.is_available() is False); "
            "--gpus none runs on the CPU"
        )


def configure(resources: Resources) -> None:
    """Hold torch to a worker's share of the machine. Once per process, before its first forward."""
    torch.set_num_threads(resources.torch_threads)
    with contextlib.suppress(RuntimeError):  # it may be set once, and another program in this process may have
        torch.set_num_interop_threads(resources.torch_threads)
    if resources.tf32 is not None:
        # By the older names: after the newer `fp32_precision`, whoever reads the older ones gets an error (torch 2.15).
        torch.backends.cuda.matmul.allow_tf32 = resources.tf32
        torch.backends.cudnn.allow_tf32 = resources.tf32


def threads() -> dict[str, int]:
    """Threads torch uses, for ``inspect stats``."""
    return {"torch": torch.get_num_threads(), "torch_interop": torch.get_num_interop_threads()}
