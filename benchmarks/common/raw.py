"""The same work without any queue: loops in this process, items per second."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torchvision
from PIL import Image

from common.hosted import MLP, ROW


def mlp(weights: Path, batch: int, seconds: float = 1.0) -> float:
    """Rows per second of the small model, ``batch`` rows a forward; lists in, lists out."""
    model = MLP().eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    rows, done, began = [ROW] * batch, 0, time.perf_counter()
    with torch.no_grad():
        while time.perf_counter() - began < seconds:
            model(torch.tensor(rows)).tolist()
            done += batch
    return done / (time.perf_counter() - began)


class ResNet:
    """Decode, transform, forward, top 5."""

    def __init__(self, weights: Path) -> None:
        self.model = torchvision.models.resnet18().eval()
        self.model.load_state_dict(torch.load(weights, weights_only=True))
        self.transform = torchvision.models.ResNet18_Weights.DEFAULT.transforms()

    def loop(self, files: Sequence[bytes], batch: int) -> float:
        """Images per second, one step after the other."""
        began = time.perf_counter()
        for files_of_batch in _batches(files, batch):
            self.answers([self.prepare(file) for file in files_of_batch])
        return len(files) / (time.perf_counter() - began)

    def overlapped(self, files: Sequence[bytes], batch: int, threads: int) -> float:
        """Images per second with the next batches prepared on threads meanwhile, as a DataLoader would."""
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            prepared = pool.map(self.prepare, files)
            while tensors := list(itertools.islice(prepared, batch)):
                self.answers(tensors)
        return len(files) / (time.perf_counter() - began)

    def prepare(self, file: bytes) -> torch.Tensor:
        """A file as the model's input."""
        return self.transform(Image.open(io.BytesIO(file)).convert("RGB"))

    def answers(self, tensors: Sequence[torch.Tensor] | torch.Tensor) -> list[tuple[list[float], list[int]]]:
        """Scores and classes, the best five of each."""
        with torch.no_grad():
            scores = self.model(tensors if isinstance(tensors, torch.Tensor) else torch.stack(tuple(tensors))).softmax(
                1
            )
        return [(values.tolist(), indices.tolist()) for values, indices in zip(*scores.topk(5), strict=True)]


def _batches(files: Sequence[bytes], batch: int) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(files), batch):
        yield files[start : start + batch]
