"""The one device of a worker process."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """The first visible GPU, else the CPU.

    A launcher that wants another GPU sets ``CUDA_VISIBLE_DEVICES`` before torch is imported, so inside a worker the
    device is always the first.
    """
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
