"""The models of the measurements, and the model file that hosts them."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import torch

#: a row of the small model
ROW = [round(0.1 * n, 1) for n in range(16)]
#: images in one forward of the CNN
IMAGE_BATCH = 32
#: seconds of one forward of the simulated accelerator: so much, and so much more for each item
SIMULATED_S, SIMULATED_ITEM_S = 0.005, 0.0005
SIMULATED_BATCH = 64
#: rows in one forward over a table, texts in one over text
NUMBERS_BATCH = 4096
TEXT_BATCH = 32

_ROWS = """
[{}]
loader = "module"
class = "common.hosted:{}"
weights = "{}.pth"
input = "rows"
shape = [16]
batch = {{ max_items = {} }}
"""

_TEXT = """
[{}]
loader = "python"
class = "common.hosted:{}"
input = "text"
batch = {{ max_items = {} }}
"""

MODEL_FILE = f"""
[resnet18]
loader = "torchvision"
model = "resnet18"
weights = "resnet18.pth"
batch = {{ max_items = {IMAGE_BATCH} }}
""" + "".join(
    [
        _ROWS.format("mlp", "MLP", "mlp", 64),
        _ROWS.format("accelerator", "SimulatedAccelerator", "accelerator", SIMULATED_BATCH),
        _ROWS.format("table", "MLP", "mlp", NUMBERS_BATCH),
        _TEXT.format("bucketed", "Bucketed", TEXT_BATCH),
        _TEXT.format("as-they-come", "AsTheyCome", TEXT_BATCH),
    ]
)

_FORWARD = struct.Struct("ddI")


class MLP(torch.nn.Module):
    """16 → 128 → 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(16, 128), torch.nn.ReLU(), torch.nn.Linear(128, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class SimulatedAccelerator(torch.nn.Module):
    """Takes a device's time and none of the CPU's; notes each forward in a file of its process."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 1)
        path = Path(os.environ.get("BENCH_TRACE", os.devnull))
        self.trace = os.open(path / f"{os.getpid()}" if path.is_dir() else path, os.O_WRONLY | os.O_CREAT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        began = time.monotonic()
        y = self.linear(x)
        time.sleep(max(0.0, began + SIMULATED_S + SIMULATED_ITEM_S * len(x) - time.monotonic()))
        os.write(self.trace, _FORWARD.pack(began, time.monotonic(), len(x)))
        return y


class AsTheyCome:
    """A small transformer over words; a batch is padded to its longest text."""

    def load(self, device: torch.device) -> None:
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
        self.embed = torch.nn.Embedding(1024, 128, padding_idx=0).eval()
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        self.device = device

    def prepare(self, text: str) -> torch.Tensor:
        return torch.tensor([1 + sum(map(ord, word)) % 1023 for word in text.split()])

    def forward(self, batch: list[torch.Tensor]) -> list[float]:
        tokens = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        masked = tokens == 0
        out = self.encoder(self.embed(tokens), src_key_padding_mask=masked).masked_fill(masked[..., None], 0)
        return (out.sum(1).mean(1) / (~masked).sum(1)).tolist()


class Bucketed(AsTheyCome):
    """The same; texts of about a length share a batch."""

    def bucket(self, tokens: torch.Tensor) -> int:
        return len(tokens).bit_length()


def forwards(trace: Path) -> dict[str, list[tuple[float, float, int]]]:
    """What the accelerators of a folder did: process → (begin, end, items) of each forward, in monotonic seconds."""
    return {path.name: list(_FORWARD.iter_unpack(_whole(path.read_bytes()))) for path in trace.iterdir()}


def _whole(data: bytes) -> bytes:
    return data[: len(data) // _FORWARD.size * _FORWARD.size]


def write_models(folder: Path) -> Path:
    """Write the model file and random weights; the model file."""
    import torchvision

    torch.manual_seed(0)
    torch.save(MLP().state_dict(), folder / "mlp.pth")
    torch.save(SimulatedAccelerator().state_dict(), folder / "accelerator.pth")
    torch.save(torchvision.models.resnet18().state_dict(), folder / "resnet18.pth")
    path = folder / "models.toml"
    path.write_text(MODEL_FILE)
    return path


def jpegs(count: int) -> list[bytes]:
    """JPEG files of two photos in many sizes."""
    return [file for _, file in zip(range(count), _jpegs(), strict=False)]


def _jpegs() -> Iterator[bytes]:
    import io

    from PIL import Image

    inputs = Path(__file__).parents[2] / "examples" / "inputs"
    files = []
    for width in range(320, 640, 20):
        for name in ("china.jpg", "flower.jpg"):
            with Image.open(inputs / name) as image:
                file = io.BytesIO()
                image.resize((width, width * image.height // image.width)).save(file, "JPEG", quality=90)
            files.append(file.getvalue())
    while True:
        yield from files
