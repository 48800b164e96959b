"""The engine on its device: pinned copies, memory that runs out, two models, models that come and go, a lost device."""

import subprocess
import sys

import pytest
import torch

from nograd.tasks.errors import ModelFileError, Overloaded
from nograd.workers.memory import free
from nograd.workers.models import open_model
from waiting import PATIENCE_S, until

from .support import CPU, CUDA

CODE = """
import torch
from torch import nn

MB = 1024 * 1024


class Double:
    def load(self, device): self.device = device
    def forward(self, batch): return torch.tensor(batch, device=self.device) * 2


class Linear(nn.Linear):
    def __init__(self, size): super().__init__(size, size, bias=False)


class Hungry:
    \"\"\"Takes 64 MB for each item; on a CPU it says at which size memory would have run out.\"\"\"
    def __init__(self, most): self.most = most
    def load(self, device): self.device, self.sizes = device, []
    def prepare(self, value): return value
    def forward(self, batch):
        if self.device.type == "cpu" and len(batch) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        held = torch.empty(len(batch) * 64 * MB, dtype=torch.uint8, device=self.device)
        return [value + 1 for value in batch]


class Eternal:
    def load(self, device): self.device = device
    def forward(self, batch):
        size = 10 ** 15 if "huge" in batch else 1
        if self.device.type == "cpu" and size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        torch.empty(size, dtype=torch.uint8, device=self.device)
        return batch
"""


def python(name, cls, keys=""):
    return f'loader = "python"\nclass = "{name}:{cls}"\n{keys}\n'


def linear(name, path, size, keys=""):
    torch.save({"weight": torch.eye(size)}, path)
    keys = f"init = {{ size = {size} }}\nshape = [{size}]\n{keys}"
    return f'loader = "module"\nclass = "{name}:Linear"\nweights = "{path.name}"\n{keys}\n'


def allocated(device):
    free(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def test_batches_in_a_row_do_not_get_each_other_s_inputs(drive, models, user_code, tmp_path, device):
    """Inputs are copied from pinned memory without waiting: it must not be filled again before it was read."""
    driver = drive(models(same=linear(user_code(CODE), tmp_path / "w.pth", 64, "batch = { max_items = 16 }")), device)
    rows = [[float(n)] * 64 for n in range(800)]
    assert driver.answers(driver.send("same", rows)) == rows


def test_two_models_answer_side_by_side(drive, models, user_code, tmp_path, device):
    name = user_code(CODE)
    driver = drive(models(same=linear(name, tmp_path / "w.pth", 8), double=python(name, "Double")), device)
    sent = []
    for n in range(200):
        sent += driver.send("same", [[float(n)] * 8]) + driver.send("double", [n])
    answers = driver.answers(sent)
    assert answers[::2] == [[float(n)] * 8 for n in range(200)]
    assert answers[1::2] == [2 * n for n in range(200)]


def test_a_batch_that_runs_out_of_memory_is_split_and_every_item_answered(drive, models, user_code, device):
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 512 * 1024**2 / total), device)  # eight items at most
    try:
        keys = "init = { most = 8 }\nbatch = { max_items = 64, max_wait_ms = 200 }"
        driver = drive(models(hungry=python(user_code(CODE), "Hungry", keys)), device)
        assert driver.answers(driver.send("hungry", range(64))) == [n + 1 for n in range(64)]
        assert driver.answers(driver.send("hungry", range(64))) == [n + 1 for n in range(64)]
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def test_an_input_too_large_even_alone_fails_alone_and_the_memory_is_there_again(drive, models, user_code, device):
    keys = "batch = { max_items = 16, max_wait_ms = 200 }"
    driver = drive(models(eternal=python(user_code(CODE), "Eternal", keys)), device)
    before = allocated(device)
    values = ["a", "huge", "b", "c"]
    answers = driver.answers(driver.send("eternal", values))
    assert isinstance(answers[1], Overloaded)
    assert [answers[0], *answers[2:]] == ["a", "b", "c"]
    assert allocated(device) <= before + 1024**2


def test_models_are_measured_refused_over_the_budget_and_freed(drive, models, user_code, tmp_path, device):
    name, megabyte = user_code(CODE), 1024**2
    file = models(
        small=linear(name, tmp_path / "s.pth", 512),  # 1 MiB
        large=linear(name, tmp_path / "l.pth", 2048),  # 16 MiB
        huge=linear(name, tmp_path / "h.pth", 4096),  # 64 MiB
    )
    driver = drive(file, device, ["small"], memory_budget=40 * megabyte)
    engine, before = driver.engine, allocated(device)
    engine.add(open_model(file, "large")).result(60)
    assert engine.memory.held["large"] == pytest.approx(16 * megabyte, rel=0.1)
    with pytest.raises(ModelFileError, match=r"\[huge\]: the model holds 6.\.. MB, beside small .*, large"):
        engine.add(open_model(file, "huge")).result(60)
    assert list(engine.models) == ["small", "large"]
    assert driver.answers(driver.send("large", [[1.0] * 2048])) == [[1.0] * 2048]
    assert engine.remove("large").result(60) == []
    until(lambda: allocated(device) <= before + megabyte)
    assert driver.answers(driver.send("small", [[2.0] * 512])) == [[2.0] * 512]


LOSE = """
import sys, threading, torch
from pathlib import Path
from nograd.tasks.modelfile import load_model_file
from nograd.workers.batching import Item
from nograd.workers.engine import Engine, Hooks

class Job:
    params, value = {}, None
    def abandoned(self): return False
    def resolve(self, index, outcome, forward=None): print("RESOLVED", outcome, flush=True)

lost = threading.Event()
def on_lost(why, jobs): print("LOST", len(jobs), flush=True); lost.set()

engine = Engine(load_model_file(Path(sys.argv[1])), ["table"], Hooks(on_lost=on_lost), torch.device("cuda:0"))
engine.start()
engine.queue.put([Item("table", None, 10 ** 6, Job())])  # the index of no row: a device-side assertion
assert lost.wait(60)
"""


@pytest.mark.parametrize("device", [CUDA])
def test_a_failed_assertion_on_the_device_is_a_lost_device_not_a_failed_job(models, user_code, device):
    """In a process of its own: nothing can be run on the GPU after it."""
    name = user_code("""
import torch

class Table:
    def load(self, device): self.table = torch.nn.Embedding(10, 4, device=device).eval(); self.device = device
    def forward(self, batch): return self.table(torch.tensor(batch, device=self.device)).cpu()
""")
    file = models(table=python(name, "Table"))
    done = subprocess.run(
        [sys.executable, "-c", LOSE, str(file.path)], capture_output=True, text=True, check=False, timeout=170
    )
    assert "LOST 1" in done.stdout, done.stdout + done.stderr
    assert "RESOLVED" not in done.stdout


def test_a_worker_uses_its_device(start_worker, models, user_code, redis_url, device):
    from nograd.producer import Client

    file = models(double=python(user_code(CODE), "Double"))
    worker = start_worker(file.path, env={"CUDA_VISIBLE_DEVICES": ""} if device == CPU else {})
    with Client(redis_url, models=file.path) as client:
        assert list(client.map("double", range(100))) == [2 * n for n in range(100)]
        [stats] = client.broker.workers(PATIENCE_S, [worker.name]).values()
        assert stats["device"] == str(device)
    assert worker.stop() == 0
