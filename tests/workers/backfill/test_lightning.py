"""A backfill of a LightningModule gives the rows that ``Trainer.predict`` gives, in the same order."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from backfills import planned, run
from nograd.producer import Client

ROWS, BATCH = 333, 32

CODE = '''
import lightning.pytorch as pl
import torch


class Scorer(pl.LightningModule):
    """Dropout and batch normalisation: wrong in training mode; a prediction that is not what forward returns."""

    def __init__(self, width=16):
        super().__init__()
        self.save_hyperparameters()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU(), torch.nn.Dropout(0.5),
            torch.nn.Linear(width, 3),
        )

    def forward(self, x):
        return self.layers(x)

    def predict_step(self, batch, batch_idx):
        return self(batch[0] if isinstance(batch, list) else batch).softmax(1)
'''

MODELS = f"""
[scorer]
loader = "lightning"
class = "lightning_scorer:Scorer"
checkpoint = "scorer.ckpt"
input = "rows"
shape = [4]
batch = {{ max_items = {BATCH} }}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lightning")
    (folder / "lightning_scorer.py").write_text(CODE)
    (folder / "models.toml").write_text(MODELS)
    return folder


@pytest.fixture(scope="module")
def module(folder):
    names = {}
    exec(CODE, names)
    torch.manual_seed(0)
    module = names["Scorer"]()
    module.layers(torch.randn(64, 4) * 3 + 1)  # statistics of the normalisation that are not the initial ones
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "scorer.ckpt")
    return module


def test_the_rows_of_a_trainer(redis_url, folder, module, start_worker, tmp_path):
    values = np.random.default_rng(0).standard_normal((ROWS, 4)).astype("float32")
    pq.write_table(pa.table({name: values[:, k] for k, name in enumerate("abcd")}), tmp_path / "in.parquet")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    batches = trainer.predict(module, DataLoader(TensorDataset(torch.from_numpy(values)), batch_size=BATCH))
    expected = torch.cat(batches).numpy()
    start_worker(folder / "models.toml")
    with Client(redis_url, models=folder / "models.toml") as client:
        # Chunks of whole batches: then every row meets the same neighbours as in the loader.
        table = run(client, planned(client, "scorer", tmp_path / "in.parquet", tmp_path / "same", 3 * BATCH))
        others = run(client, planned(client, "scorer", tmp_path / "in.parquet", tmp_path / "others", 50))
    assert table["row"].to_pylist() == others["row"].to_pylist() == list(range(ROWS))
    np.testing.assert_array_equal(np.array(table["prediction"].to_pylist(), np.float32), expected)
    np.testing.assert_allclose(np.array(others["prediction"].to_pylist()), expected, rtol=1e-5, atol=1e-7)
