"""What nograd leaves of a device's speed: ``python benchmarks/gpu.py --model resnet18 --dtype bfloat16 --compile``.

Every line runs the same module with the same batch, dtype and compile settings on the same device; the best there can
be is the first one. Without a GPU (or with ``--device cpu``) a tiny network goes the same ways, to see that they work;
its figures mean nothing.

=========== ===========================================================================================================
forward     the module alone, again and again, on a batch that is on the device
copied      the same, the batch copied from pinned memory before each forward and the result read after it
copy        only the copy; its share of a forward is the most that overlapping the two could gain
engine      prepared inputs through the engine's queue and device thread: batches, isolation, one outcome for each
jobs        a real worker on a real Redis: ``client.map``, messages of ``--pack`` inputs, to the last result
=========== ===========================================================================================================

Rounds are interleaved; a figure is the median of the rounds, in items per second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torchvision
from common import fleet

from nograd.producer import Client
from nograd.producer.embedded import EmbeddedRedis
from nograd.tasks.modelfile import load_model_file
from nograd.workers.batching import Item
from nograd.workers.engine import Engine
from nograd.workers.models.base import HostedModel

#: name → (torchvision's name, side of an image)
MODELS = {"tiny": ("squeezenet1_1", 64), "resnet18": ("resnet18", 224), "resnet50": ("resnet50", 224)}


class Sink:
    """A job with one input, of which only the end counts."""

    params: ClassVar[dict[str, Any]] = {}

    def __init__(self, ends: threading.Semaphore) -> None:
        self._ends = ends

    def abandoned(self) -> bool:
        return False

    def resolve(self, index: int, outcome: Any, forward: Any = None) -> None:
        del index, forward
        if outcome.error is not None:
            raise outcome.error
        self._ends.release()


def write_model_file(folder: Path, options: argparse.Namespace) -> Path:
    name, side = MODELS[options.model]
    torch.manual_seed(0)
    torch.save(torchvision.models.get_model(name, weights=None, num_classes=10).state_dict(), folder / "w.pth")
    file = folder / "models.toml"
    file.write_text(f"""
[net]
loader = "torchvision"
model = "{name}"
weights = "w.pth"
init = {{ num_classes = 10 }}
input = "tensor"
shape = [3, {side}, {side}]
labels = {json.dumps(list("abcdefghij"))}
dtype = "{options.dtype}"
compile = {str(options.compile).lower()}
channels_last = {str(options.channels_last).lower()}
batch = {{ max_items = {options.batch} }}
""")
    return file


def per_second(step: Callable[[], int], seconds: float, device: torch.device) -> float:
    """Items a second of a step that says how many it did."""
    step()
    wait(device)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        done += step()
    wait(device)
    return done / (time.perf_counter() - began)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def raw_steps(model: HostedModel, inputs: list[torch.Tensor], device: torch.device) -> dict[str, Callable[[], int]]:
    """The loops without nograd, over the very module it hosts."""
    (module,) = model.modules()
    cuda = device.type == "cuda"
    batch = torch.stack(inputs)
    if model.spec.channels_last:
        batch = batch.contiguous(memory_format=torch.channels_last)
    batch = batch.pin_memory() if cuda else batch
    there = batch.to(device)

    def forward() -> int:
        module(there)
        return len(batch)

    def copied() -> int:
        module(batch.to(device, non_blocking=True)).cpu()
        return len(batch)

    def copy() -> int:
        batch.to(device, non_blocking=True, copy=True)
        return len(batch)

    return {"forward": forward, "copied": copied, "copy": copy}


def engine_step(engine: Engine, inputs: list[torch.Tensor], batches: int) -> Callable[[], int]:
    """Many batches' worth of inputs into the queue, and wait for the last outcome."""
    model, ends = engine.models["net"], threading.Semaphore(0)

    def step() -> int:
        for _ in range(batches):
            engine.queue.put([Item("net", model.bucket(one), one, Sink(ends)) for one in inputs])
        for _ in range(batches * len(inputs)):
            ends.acquire()
        return batches * len(inputs)

    return step


def jobs_step(client: Client, inputs: list[torch.Tensor], batches: int, pack: int) -> Callable[[], int]:
    """As many inputs as jobs of a client."""
    arrays = [one.float().numpy() for one in inputs]

    def step() -> int:
        values = (array for _ in range(batches) for array in arrays)
        return sum(1 for _ in client.map("net", values, batch=pack))

    return step


def run(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    device = torch.device(options.device)
    file = write_model_file(folder, options)
    engine = Engine(load_model_file(file), ["net"], device=device)
    engine.start()
    side = MODELS[options.model][1]
    model = engine.models["net"]
    inputs = [model.prepare(torch.rand(3, side, side).numpy(), {}) for _ in range(options.batch)]
    env = {"NOGRAD_MODELS": str(file)} | ({"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {})
    rates: dict[str, list[float]] = {}
    with torch.no_grad(), EmbeddedRedis() as server, Client(server.url, models=file) as client:
        raw = raw_steps(model, inputs, device)
        try:
            for _ in range(options.rounds):
                steps = {**raw, "engine": engine_step(engine, inputs, options.batches)}
                for name, step in steps.items():
                    rates.setdefault(name, []).append(per_second(step, options.seconds, device))
        finally:
            engine.finish()
        with fleet.workers(1, folder, env={**env, "NOGRAD_REDIS_URL": server.url}):
            step = jobs_step(client, inputs, options.batches, options.pack)
            for _ in range(options.rounds):
                rates.setdefault("jobs", []).append(per_second(step, options.seconds, device))
    return rates


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if cuda else "cpu")
    parser.add_argument("--model", choices=MODELS, default="resnet18" if cuda else "tiny")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--batch", type=int, default=64 if cuda else 8, help="items in a batch")
    parser.add_argument("--batches", type=int, default=32 if cuda else 4, help="batches of one step of engine and jobs")
    parser.add_argument("--pack", type=int, default=16, help="inputs in a message")
    parser.add_argument("--seconds", type=float, default=5.0 if cuda else 1.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5 if cuda else 2)
    parser.add_argument("--json", action="store_true", help="one document instead of the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates = run(options, Path(folder))
    best = statistics.median(rates["forward"])
    figures = {name: statistics.median(each) for name, each in rates.items()}
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU: the figures mean nothing"
    if options.json:
        print(json.dumps({"device": name, "options": vars(options), "items_per_s": figures, "rounds": rates}))
        return
    print(f"{name}; {options.model}, {options.dtype}, batches of {options.batch}{', compiled' * options.compile}")
    for line, figure in figures.items():
        share = f"{best / figure:7.1%} of a forward" if line == "copy" else f"{figure / best:7.1%}"
        print(f"{line:10}{figure:12,.1f} items/s  {share}")


if __name__ == "__main__":
    main()
