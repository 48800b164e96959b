"""Models for the pool's tests: what they do is what a test needs to see."""

import ctypes
import os
import threading
import time
from pathlib import Path

import torch
from torch import nn


class Spy:
    """Answers with what a forward sees of the world around it."""

    def load(self, device):
        self.loaded_on = threading.get_ident()

    def forward(self, batch):
        seen = {
            "batch": len(batch),
            "grad": torch.is_grad_enabled(),
            "loading_thread": threading.get_ident() == self.loaded_on,
            "pid": os.getpid(),
        }
        return [seen] * len(batch)


class Picky:
    """Misbehaves on demand."""

    def load(self, device):
        pass

    def prepare(self, value):
        if value == "bad prepare":
            raise ValueError("I do not like it")
        if value == "exit in prepare":
            raise SystemExit(3)
        return value

    def forward(self, batch):
        time.sleep(0.05)
        if "too few" in batch:
            return batch[:-1]
        for value in batch:
            if value == "bad forward":
                raise RuntimeError("cannot digest")
            if value == "memory":
                raise MemoryError("no more")
            if value == "exit":
                raise SystemExit(4)
            if value == "interrupt":
                raise KeyboardInterrupt
        return [{"echo": value} for value in batch]

    def finish(self, output):
        if output["echo"] == "bad finish":
            raise KeyError("gone")
        return object() if output["echo"] == "no json" else output["echo"]


class Echo:
    """Answers with the parameters of its batch."""

    def load(self, device):
        pass

    def forward(self, batch, params):
        return [dict(params) for _ in batch]


class Killer:
    """Takes its process along when it is told to."""

    def load(self, device):
        pass

    def prepare(self, value):
        if value == "crash in prepare":
            ctypes.string_at(0)
        return value

    def forward(self, batch):
        time.sleep(0.1)
        for value in batch:
            if value == "exit":
                os._exit(7)
            if value == "segfault":
                ctypes.string_at(0)  # this very thread, at once; a signal would be taken by any
        return batch


class Gated:
    """Runs nothing until a file is there, then a batch in 20 ms; answers with who ran it, when, and with how many."""

    def __init__(self, gate):
        self.gate = Path(gate)

    def load(self, device):
        pass

    def forward(self, batch):
        while not self.gate.exists():
            time.sleep(0.01)
        time.sleep(0.02)
        return [{"pid": os.getpid(), "at": time.monotonic(), "batch": len(batch)}] * len(batch)


class Slow:
    """Takes as many seconds as it is told."""

    def load(self, device):
        pass

    def forward(self, batch):
        time.sleep(max(batch))
        return batch


class Dropout(nn.Module):
    """Gives another answer each time unless it is in eval mode."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.linear(x))
