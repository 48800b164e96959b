"""A block whose rows fail is halved between the turns of others, and comes to what it would have come to at once."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from nograd.tasks.errors import ModelFailed
from nograd.tasks.modelfile import load_model_file
from nograd.workers.backfill.block import Block
from nograd.workers.batching import Item
from nograd.workers.engine import Engine
from waiting import PATIENCE_S as TIMEOUT

CODE = """
import threading

import torch

forwards = []
entered, gate = threading.Event(), threading.Event()


class Picky:
    def load(self, device):
        pass

    def forward(self, batch):
        forwards.append(list(batch))
        entered.set()
        assert gate.wait(180)
        if any(value < 0 for value in batch):
            raise ValueError("negative")
        if len(batch) > 3 and max(batch) > 100:
            raise torch.OutOfMemoryError("too many")
        return [2 * value for value in batch]
"""
MODELS = """
[picky]
loader = "python"
class = "halving_models:Picky"
batch = { max_items = 16 }
"""


@pytest.fixture
def engine(tmp_path):
    (tmp_path / "halving_models.py").write_text(CODE)
    (tmp_path / "models.toml").write_text(MODELS)
    engine = Engine(load_model_file(tmp_path / "models.toml"), ["picky"], device=torch.device("cpu"))
    engine.start()
    yield engine
    sys.modules["halving_models"].gate.set()
    engine.finish()


@pytest.fixture
def code(engine):
    """The model's module: what it records, and where it waits."""
    code = sys.modules["halving_models"]
    code.forwards.clear()
    code.entered.clear()
    code.gate.clear()
    return code


class Job:
    """An interactive one."""

    def __init__(self):
        self.params, self.outcome, self.done = {}, None, threading.Event()

    def abandoned(self):
        return False

    def resolve(self, index, outcome, forward=None):
        self.outcome = outcome
        self.done.set()


def block_of(rows):
    return Block("id", None, {}, rows, [])


def test_an_interactive_job_waits_for_one_forward_of_a_block_of_which_many_rows_fail(engine, code):
    rows = [-n if n % 2 else n for n in range(1, 17)]
    block, job = block_of(rows), Job()
    assert engine.queue.put([block.item("picky")])
    assert code.entered.wait(TIMEOUT)
    assert engine.queue.put([Item("picky", "online", 1000, job)])
    code.gate.set()
    assert job.done.wait(TIMEOUT)
    assert block.wait(TIMEOUT)
    assert code.forwards[:2] == [rows, [1000]]
    assert len(code.forwards) > 17


@pytest.mark.parametrize("bad", [set(), {5}, {0, 15}, set(range(16)), {3, 4, 9}], ids=str)
def test_every_row_of_a_block_has_its_outcome_whatever_comes_between(engine, code, bad):
    rows = [-n - 1 if n in bad else n for n in range(16)]
    blocks, online = [block_of(rows), block_of(rows)], [Job() for _ in range(5)]
    assert engine.queue.put([block.item("picky") for block in blocks])
    assert engine.queue.put([Item("picky", "online", n, job) for n, job in enumerate(online)])
    code.gate.set()
    outcomes = []
    for block in blocks:
        assert block.wait(TIMEOUT)
        assert [segment[:2] for segment in block.segments] == sorted(segment[:2] for segment in block.segments)
        found = {}
        for start, stop, outputs in block.segments:
            for at in range(start, stop):
                found[at] = "failed" if isinstance(outputs, ModelFailed) else outputs[at - start]
        outcomes.append([found[at] for at in range(16)])
    assert outcomes == [["failed" if n in bad else 2 * n for n in range(16)]] * 2
    for n, job in enumerate(online):
        assert job.done.wait(TIMEOUT)
        assert job.outcome.value == 2 * n
    assert engine.stats["picky"].failed == 2 * len(bad)
    assert engine.stats["picky"].items == 32 + 5


def test_what_fits_is_learnt_over_the_turns(engine, code):
    code.gate.set()
    block = block_of(list(range(101, 117)))
    assert engine.queue.put([block.item("picky")])
    assert block.wait(TIMEOUT)
    assert block.split == ["batches of more than 2 rows did not fit into memory and were run in parts"]
    assert [outputs for _, _, each in block.segments for outputs in each] == [2 * n for n in range(101, 117)]


def test_a_block_that_is_half_done_when_its_model_goes_is_dropped(engine, code):
    block = block_of([-1] * 16)
    assert engine.queue.put([block.item("picky")])
    assert code.entered.wait(TIMEOUT)
    removed = engine.remove("picky")
    code.gate.set()
    (item,) = removed.result(TIMEOUT)
    assert item.job is block
    block.claim()
    assert block.wait(TIMEOUT)
    assert block.dropped
