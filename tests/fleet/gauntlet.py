"""A model whose inputs can be bad in twelve ways; a good one is a number, and its answer is 2 n + 0.5."""

import ctypes
import math
import os
import time

import torch

from nograd.tasks import errors

#: characters of an input
LONGEST = 1000

#: what is bad → what a client sends. The model knows those it must misbehave on by these texts.
BAD = {
    "raises in prepare": "raises in prepare",
    "raises in forward": "raises in forward",
    "out of memory unless alone": "out of memory unless alone",
    "wrong output count": "wrong output count",
    "not a number": "not a number",
    "hangs": "hangs",
    "exits": "exits",
    "segfaults": "segfaults",
    "huge": "x" * 3_000_000,
    "tiny": "",
    "wrong type": {"a": [1, None]},
    "unicode garbage": "\ud800\udfff\x00\ufffe",
}

#: what is bad → the error it ends with; None: it succeeds, since alone it can
ERRORS = {
    "raises in prepare": errors.InvalidInput,
    "raises in forward": errors.ModelFailed,
    "out of memory unless alone": None,
    "wrong output count": errors.OutputMismatch,
    "not a number": errors.NonFiniteOutput,
    "hangs": errors.WorkerDied,
    "exits": errors.WorkerDied,
    "segfaults": errors.WorkerDied,
    "huge": errors.InvalidInput,
    "tiny": errors.InvalidInput,
    "wrong type": errors.InvalidInput,
    "unicode garbage": errors.InvalidInput,
}


class Gauntlet:
    def load(self, device):
        self.device = device

    def prepare(self, value):
        if value == "raises in prepare":
            raise RuntimeError("it does raise")
        if isinstance(value, int | float) or value in BAD:
            return value
        if not isinstance(value, str):
            raise TypeError(f"a {type(value).__name__} is neither a number nor a text")
        if not 0 < len(value) <= LONGEST:
            raise ValueError(f"{len(value)} characters; from 1 to {LONGEST} are allowed")
        value.encode()
        raise ValueError("not a number")

    def forward(self, batch):
        if "exits" in batch:
            os._exit(7)
        if "segfaults" in batch:
            ctypes.string_at(0)
        if "hangs" in batch:
            time.sleep(3600)
        if "raises in forward" in batch:
            raise RuntimeError("cannot digest")
        if "out of memory unless alone" in batch and len(batch) > 1:
            raise torch.OutOfMemoryError("more than there is")
        numbers = torch.tensor([_number(value) for value in batch], dtype=torch.float64, device=self.device)
        answers = 2 * numbers + 0.5
        return answers[1:] if "wrong output count" in batch else answers


def _number(value):
    if value == "not a number":
        return math.nan
    return 0 if isinstance(value, str) else value
