"""Models for the pool's tests: what they do is what a test needs to see."""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

import torch
from torch import nn

from nograd.workers.batching import BatchQueue


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
            if value == "hang":
                time.sleep(1000)
            if value == "segfault":
                ctypes.string_at(0)  # this very thread, at once; a signal would be taken by any
        return batch


class Fragile:
    """Does at each stage what its input says, ``"what in where"``; it waits for ``folder/open``."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def load(self, device):
        pass

    def prepare(self, value):
        return self.act("prepare", value)

    def forward(self, batch):
        return [self.act("forward", value) for value in batch]

    def finish(self, output):
        return self.act("finish", output)

    def act(self, where, value):
        if f"crash in {where}" in str(value):
            os.kill(os.getpid(), signal.SIGKILL)
        if f"wait in {where}" in str(value):
            (self.folder / f"waits-{os.getpid()}").touch()
            while not (self.folder / "open").exists():
                time.sleep(0.01)
        if f"slow in {where}" in str(value):
            time.sleep(0.3)
        return value


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


class Deadly:
    """Ends badly for its process the first time it meets a value like ``["hang", "/a/file"]``; the file remembers."""

    def load(self, device):
        pass

    def prepare(self, value):
        self.meet("hang in prepare", value)
        return value

    def forward(self, batch):
        time.sleep(0.05)
        for value in batch:
            if self.meet("accelerator error", value):
                raise torch.AcceleratorError("CUDA error: device-side assert triggered")
            if self.meet("hang with the GIL", value):
                ctypes.PyDLL(None).sleep(1000)
            if self.meet("end the device thread", value):
                BatchQueue.take = None
            self.meet("hang", value)
        return [value if isinstance(value, int) else (value, f"in a batch of {len(batch)}") for value in batch]

    def finish(self, output):
        if isinstance(output, int):
            return output
        value, answer = output
        self.meet("hang in finish", value)
        return answer

    def meet(self, how, value):
        if not isinstance(value, list) or value[0] != how or Path(value[1]).exists():
            return False
        Path(value[1]).touch()
        if how in ("hang", "hang in prepare", "hang in finish"):
            time.sleep(1000)
        return True


class Hungry:
    """Has memory for so many inputs; answers with the size of its batch. A negative input never fits."""

    def __init__(self, fits):
        self.fits = fits

    def load(self, device):
        pass

    def forward(self, batch):
        time.sleep(0.1)
        if len(batch) > self.fits or min(batch) < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return [len(batch)] * len(batch)


class Log:
    """The logarithm, of numbers that may have none."""

    def load(self, device):
        pass

    def forward(self, batch):
        return torch.tensor(batch).log()


class Slow:
    """Takes as many seconds as it is told."""

    def load(self, device):
        pass

    def forward(self, batch):
        time.sleep(max(batch))
        return batch


class Waits:
    """Gives back its input; one that is a `waiting.Gate` stands on the device until that is opened."""

    def load(self, device):
        pass

    def forward(self, batch):
        for path in filter(None, batch):
            with Path(f"{path}.reached").open("a") as note:
                note.write(".")
            while not Path(path).exists():
                time.sleep(0.01)
        return batch


class Dropout(nn.Module):
    """Gives another answer each time unless it is in eval mode."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.linear(x))
