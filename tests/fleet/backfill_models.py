"""Models that backfills of tests are scored with; `backfills.write_models` copies this file beside the model file.

Files beside it arm a moment: whoever comes by it first waits there until the test has done its harm (`crashes`).
"""

import os
import threading
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent


def moment(name, detail=""):
    """Wait here if somebody has armed this moment; only the first one who comes by does."""
    try:
        (HERE / f"armed {name}").rename(HERE / "taken")
    except FileNotFoundError:
        return
    (HERE / "new").write_text(f"{os.getpid()} {detail}")
    (HERE / "new").rename(HERE / "held")
    while (HERE / "held").exists():
        time.sleep(0.01)
    (HERE / "left").touch()


def watch(call, name, before, after):
    def watched(*args, **kwargs):
        at = str(args[-1])
        mine = threading.current_thread().name.startswith("nograd-chunk") and name(at)
        if mine and before:
            moment(before, Path(at).stem)
        done = call(*args, **kwargs)
        if mine and after:
            moment(after, Path(at).stem)
        return done

    return watched


class Linear(torch.nn.Module):
    """A model whose weights somebody changes."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.layer(x)


class Area:
    """The pixels of an image."""

    def load(self, device):
        pass

    def prepare(self, value):
        moment("an image")
        return value.size

    def forward(self, batch):
        return [float(width * height) for width, height in batch]


class Scored:
    """Scores a text by its length, beside texts of about its own; does not like some."""

    def load(self, device):
        if not hasattr(os, "unwatched"):
            os.unwatched = os.link, os.listdir
            os.link = watch(os.link, lambda at: "/_commits/" in at, "before the record", "after the record")
            os.listdir = watch(os.listdir, lambda at: at.endswith("/_commits"), "", "before the ack")

    def prepare(self, value):
        moment("prepare")
        return value

    def bucket(self, text):
        return len(text) > 10

    def forward(self, batch):
        moment("forward")
        if "raise" in batch:
            raise ValueError("I do not like it")
        return [{"length": len(text), "score": len(text) / 7} for text in batch]

    def finish(self, output):
        moment("finish")
        return output


class Slow(Scored):
    """Slow enough to be caught in the middle, while a file ``slowly`` is beside this one."""

    def forward(self, batch):
        if (HERE / "slowly").exists():
            time.sleep(0.2)
        return super().forward(batch)


class Rude(Scored):
    """Takes its worker along, or never comes back."""

    def forward(self, batch):
        if "exit" in batch:
            os._exit(3)
        if "hang" in batch:
            time.sleep(1000)
        return super().forward(batch)
