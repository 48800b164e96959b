"""Columns of numbers: what one row is, or does, never changes another one's input or prediction."""

from __future__ import annotations

import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch

from nograd.tasks.backfill.rows import Slice
from nograd.tasks.backfill.sources import survey
from nograd.tasks.modelfile import load_model_file
from nograd.workers.backfill.block import Block
from nograd.workers.backfill.columns import to_array
from nograd.workers.backfill.scoring import FAR, NEAR, Device, Lead, lead_for, scorer_for
from nograd.workers.models import open_model

CODE = """
import torch

class Greedy(torch.nn.Module):
    '''Writes into its input, and answers with a buffer of its own.'''
    def __init__(self):
        super().__init__()
        self.register_buffer('answer', torch.zeros(64))

    def forward(self, x):
        x -= 1
        torch.sum(x, dim=1, out=self.answer[: len(x)])
        return self.answer[: len(x)]

class Square(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('answer', torch.zeros(64))

    def forward(self, x):
        return x[:, :, None] * x[:, None, :]
"""


#: classes of the user's own, by where their weights are: rows are prepared further ahead of all but those on the CPU
PLACES = {
    "torch.nn.Linear(1, 1)": NEAR,
    "torch.nn.Linear(1, 1, device='meta')": FAR,
    "torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, device='meta')])": FAR,
    "torch.nn.Identity()": FAR,
    "'a service elsewhere'": FAR,
}
OWN = """
import torch

class Own:
    def load(self, device):
        net = {net}
        self.net = net.eval() if isinstance(net, torch.nn.Module) else net

    def forward(self, batch):
        return batch
"""


@pytest.mark.parametrize(("net", "lead"), PLACES.items())
def test_only_a_model_whose_weights_are_on_the_cpu_is_not_prepared_far_ahead_of(tmp_path, monkeypatch, net, lead):
    (tmp_path / "own_models.py").write_text(OWN.replace("{net}", net))
    (tmp_path / "models.toml").write_text('[m]\nloader = "python"\nclass = "own_models:Own"\ninput = "rows"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    model = open_model(load_model_file(tmp_path / "models.toml"), "m")
    try:
        model.load(torch.device("cpu"))
        assert lead_for(model) is lead
    finally:
        sys.modules.pop("own_models", None)


@pytest.fixture
def hosted(tmp_path, monkeypatch):
    def hosted(name):
        (tmp_path / "scoring_models.py").write_text(CODE)
        torch.save({"answer": torch.zeros(64)}, tmp_path / "w.pth")
        (tmp_path / "models.toml").write_text(
            f'[m]\nloader = "module"\nclass = "scoring_models:{name}"\nweights = "w.pth"\ninput = "rows"\nshape = [2]\n'
        )
        model = open_model(load_model_file(tmp_path / "models.toml"), "m")
        monkeypatch.syspath_prepend(str(tmp_path))
        model.load(torch.device("cpu"))
        return model

    yield hosted
    sys.modules.pop("scoring_models", None)


def run(model, block):
    with torch.no_grad():
        block.settle(0, len(block.rows), model.forward(block.rows, {}))
    block.finish(None)


def device_of(block, submit, lead=FAR):
    return Device(
        submit=submit,
        check=lambda: None,
        block=block,
        note=lambda *_: None,
        guard=lambda _: contextlib.nullcontext(),
        lead=lead,
    )


def scored(model, source, slices, device=None):
    if device is None:
        device = device_of(lambda rows: Block("id", None, {}, rows, []), lambda block: run(model, block))
    with ThreadPoolExecutor(1) as threads:
        return list(scorer_for(model, source, {}, device, threads, batch_rows=4).score(slices))


def slices_of(table, size=4):
    batch = table.combine_chunks().to_batches()[0]
    return [
        Slice(start, batch.slice(start, size), pa.array(range(start, start + len(batch.slice(start, size)))))
        for start in range(0, len(batch), size)
    ]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in.csv").write_text("id,a,b\n1,1.5,2.5\n")
    return survey(tmp_path / "in.csv", id="id").spec


def test_a_module_that_keeps_what_it_gets_and_gives_spoils_nothing(hosted, source):
    values = np.arange(24, dtype="float32").reshape(12, 2)
    model = hosted("Greedy")
    rows = torch.from_numpy(values.copy())
    first = model.forward(rows, {})
    second = model.forward(rows, {})  # as after a batch that was split
    assert torch.equal(rows, torch.from_numpy(values))
    assert torch.equal(first, second)
    table = pa.table({"id": range(12), "a": values[:, 0].astype(float), "b": values[:, 1].astype(float)})
    predictions = [each.predictions for each in scored(model, source, slices_of(table))]
    np.testing.assert_array_equal(np.concatenate(predictions), values.sum(axis=1) - 2)


def test_a_bad_row_among_predictions_that_are_matrices_fails_alone(hosted, source):
    table = pa.table({"id": range(4), "a": [1.0, float("nan"), 3.0, 4.0], "b": [1.0, 1.0, 1.0, 1.0]})
    (only,) = scored(hosted("Square"), source, slices_of(table))
    assert list(only.failures) == [1]
    assert only.predictions.shape == (4, 2, 2)
    np.testing.assert_array_equal(only.predictions[2], [[9, 3], [3, 1]])


def test_a_missing_whole_number_does_not_round_its_neighbours():
    batch = pa.record_batch({"a": pa.array([2**53 + 1, None]), "b": pa.array([1, 2])})
    assert to_array(batch, ["a", "b"], scalars=False) is None
    whole = pa.record_batch({"a": pa.array([2**53 + 1, 5]), "b": pa.array([1, 2])})
    assert to_array(whole, ["a", "b"], scalars=False)[0, 0] == 2**53 + 1


COUNTED = """
import weakref
import torch

held, most = weakref.WeakSet(), 0

class Prepared:
    def __init__(self, number):
        self.number = number

class Counted:
    def load(self, device):
        self.net = torch.nn.Linear(1, 1).eval()

    def prepare(self, text):
        global most
        row = Prepared(int(text))
        held.add(row)
        most = max(most, len(held))
        return row

    def forward(self, batch):
        return [2 * row.number for row in batch]
"""


class Late(Block):
    """Of a device that runs nothing before somebody waits for it."""

    def wait(self, timeout_s):
        run(self.params["model"], self)
        return super().wait(timeout_s)


@pytest.mark.parametrize("lead", [Lead(0, 1), NEAR, FAR])
def test_no_more_rows_are_held_than_the_lead_over_the_device_says(tmp_path, monkeypatch, lead):
    (tmp_path / "counted_models.py").write_text(COUNTED)
    (tmp_path / "models.toml").write_text('[m]\nloader = "python"\nclass = "counted_models:Counted"\ninput = "text"\n')
    (tmp_path / "in.csv").write_text("id,text\n1,a\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = survey(tmp_path / "in.csv", id="id", columns=["text"]).spec
    slices = slices_of(pa.table({"id": range(40), "text": [str(n) for n in range(40)]}))
    model = open_model(load_model_file(tmp_path / "models.toml"), "m")
    try:
        model.load(torch.device("cpu"))
        device = device_of(lambda rows: Late("id", None, {"model": model}, rows, []), lambda block: None, lead)
        found = [value for each in scored(model, source, slices, device) for value in each.predictions]
        most = sys.modules["counted_models"].most
    finally:
        sys.modules.pop("counted_models", None)
    assert found == [2 * n for n in range(40)]
    assert most <= (lead.slices + lead.blocks) * len(slices[0])
