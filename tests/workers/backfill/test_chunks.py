"""Chunks on real workers: planned, sent, scored, committed; compared with the model's own answers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from backfills import calibrated, committed, drive, errors, planned, run
from nograd.producer import Client
from nograd.tasks.backfill import plan as plans
from nograd.tasks.backfill.draft import draft
from nograd.tasks.backfill.progress import progress
from nograd.tasks.backfill.sources import survey
from nograd.tasks.backfill.store import open_store
from nograd.tasks.backfill.verify import verify

MODELS = """
[linear]
loader = "module"
class = "chunk_models:Linear"
weights = "linear.pth"
input = "rows"
shape = [4]
batch = { max_items = 32 }

[tiny]
loader = "python"
class = "chunk_models:Tiny"
input = "image"
batch = { max_items = 8 }

[length]
loader = "python"
class = "chunk_models:Length"
input = "text"
batch = { max_items = 8 }
"""

CLASSES = '''
import os
import torch


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.layer(x)


class Tiny:
    def load(self, device):
        pass

    def prepare(self, value):
        return value.size

    def forward(self, batch):
        return [float(width * height) for width, height in batch]


class Length:
    """Answers with the length of a text, and of the batch it was in; some texts do harm."""

    def load(self, device):
        pass

    def bucket(self, text):
        return len(text) > 10

    def forward(self, batch):
        if any(text == "raise" for text in batch):
            raise ValueError("I do not like it")
        if any(text == "exit" for text in batch):
            os._exit(3)
        return [{"length": len(text)} for text in batch]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chunks")
    (folder / "chunk_models.py").write_text(CLASSES)
    (folder / "models.toml").write_text(MODELS)
    layer = torch.nn.Linear(4, 1)
    torch.save({"layer.weight": layer.weight.data, "layer.bias": layer.bias.data}, folder / "linear.pth")
    return folder


@pytest.fixture(scope="module")
def fleet(folder, start_worker):
    return start_worker(folder / "models.toml", env={"NOGRAD_LEASE_S": "3"}.items())


@pytest.fixture
def client(redis_url, folder, fleet):
    with Client(redis_url, models=folder / "models.toml") as client:
        yield client


def test_numbers_go_from_column_to_column(client, folder, tmp_path):
    rng = np.random.default_rng(0)
    columns = {name: rng.standard_normal(1000).astype("float32") for name in "abcd"}
    columns["b"][17] = np.nan
    pq.write_table(pa.table({"key": np.arange(1000) * 3, **columns}), tmp_path / "in.parquet", row_group_size=150)
    job = planned(client, "linear", tmp_path / "in.parquet", tmp_path / "out", 200, id="key")
    table = run(client, job)
    assert table.schema.field("prediction").type == pa.float32()
    state = torch.load(folder / "linear.pth")
    rows = np.stack([columns[name] for name in "abcd"], axis=1)
    expected = rows @ state["layer.weight"].numpy()[0] + state["layer.bias"].numpy()[0]
    good = np.delete(np.arange(1000), 17)
    assert table["key"].to_pylist() == (good * 3).tolist()
    np.testing.assert_allclose(table["prediction"].to_numpy(), expected[good], rtol=1e-5, atol=1e-6)
    (failed,) = errors(job)
    assert failed["id"] == 51
    assert failed["stage"] == "prepare"
    assert failed["message"] == "value 1 is nan"


def test_images_are_read_by_the_worker_and_bad_ones_cost_nobody_else(client, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for n in range(30):
        Image.new("RGB", (n + 1, 2)).save(images / f"{n:02}.png")
    (images / "07.png").write_bytes(b"no image")
    (images / "08.png").write_bytes(b"")
    job = planned(client, "tiny", images, tmp_path / "out", 11)
    table = run(client, job)
    good = [n for n in range(30) if n not in (7, 8)]
    assert [Path(path).name for path in table["path"].to_pylist()] == [f"{n:02}.png" for n in good]
    assert table["prediction"].to_pylist() == [2.0 * (n + 1) for n in good]
    assert [each["stage"] for each in errors(job)] == ["prepare", "prepare"]


def test_a_row_that_raises_fails_alone(client, tmp_path):
    texts = ["raise" if n % 50 == 7 else "x" * (n % 23) for n in range(200)]
    table = pa.table({"n": range(200), "text": texts})
    pq.write_table(table, tmp_path / "in.parquet")
    job = planned(client, "length", tmp_path / "in.parquet", tmp_path / "out", 64, id="n")
    scored = run(client, job)
    good = [n for n in range(200) if texts[n] != "raise"]
    assert scored["n"].to_pylist() == good
    assert scored["prediction"].to_pylist() == [{"length": len(texts[n])} for n in good]
    assert {each["type"] for each in errors(job)} == {"model_failed"}


def test_a_killed_worker_costs_nothing_and_changes_no_byte(redis_url, folder, client, start_worker, tmp_path):
    rng = np.random.default_rng(1)
    pq.write_table(
        pa.table({name: rng.standard_normal(20_000) for name in "abcd"}), tmp_path / "in.parquet", row_group_size=5000
    )
    job = planned(client, "linear", tmp_path / "in.parquet", tmp_path / "out", 400)
    victims = []

    def kill_some():
        if len(victims) < 2 and progress(job).chunks_done > 10 * len(victims):
            victims.append(start_worker(folder / "models.toml", env={"NOGRAD_LEASE_S": "3"}.items()))
            time.sleep(0.2)
            victims[-1].process.kill()

    drive(client, job, 120, until=kill_some)
    assert victims
    again = planned(client, "linear", tmp_path / "in.parquet", tmp_path / "again", 400)
    run(client, again)
    verify(job).check()
    assert committed(job) == committed(again)


@pytest.mark.slow  # three deaths, and the pauses before a worker that keeps dying is started again
def test_a_row_that_kills_workers_is_found_and_its_neighbours_are_scored(redis_url, folder, client, fleet, tmp_path):
    """Last in this file: it takes workers with it, so it brings a launcher that starts them again."""
    fleet.stop()
    texts = ["exit" if n == 70 else "y" * (n % 9) for n in range(96)]
    pq.write_table(pa.table({"n": range(96), "text": texts}), tmp_path / "in.parquet")
    launcher = subprocess.Popen(
        [sys.executable, "-m", "nograd.producer.cli", "worker", "--models", folder / "models.toml", "--gpus", "none"],
        env=os.environ | {"NOGRAD_REDIS_URL": redis_url, "NOGRAD_LEASE_S": "3"},
    )
    try:
        found = survey(tmp_path / "in.parquet", id="n")
        made = draft(
            found,
            rows_per_chunk=48,
            batch_rows=8,
            model=calibrated(client, "length", found, rows=8).model,
            prediction=pa.struct({"length": pa.int64()}),
        )
        job = plans.save(open_store(tmp_path / "out"), made)
        table = run(client, job, seconds=150)
    finally:
        launcher.terminate()
        launcher.wait(60)
    assert table["n"].to_pylist() == [n for n in range(96) if n != 70]
    (failed,) = errors(job)
    assert (failed["id"], failed["stage"], failed["type"]) == (70, "crash", "worker_died")
