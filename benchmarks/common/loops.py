"""The same backfills without nograd, each in a process of its own: ``python -m common.loops WHAT MODELS SOURCE OUT``.

Prints JSON: seconds from the first row read to the last one written, with the model loaded and warm; the peak of
resident memory in MB; rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from common.hosted import IMAGE_BATCH, MLP, NUMBERS_BATCH
from common.peak import peak_mb
from common.raw import ResNet


def raw_numbers(models: Path, source: Path, out: Path) -> int:
    """What one would write: pyarrow in, torch, pyarrow out."""
    model = MLP().eval()
    model.load_state_dict(torch.load(models.parent / "mlp.pth", weights_only=True))
    with torch.no_grad():
        model(torch.zeros(NUMBERS_BATCH, 16))
        began, rows, writer = time.perf_counter(), 0, None
        for batch in pq.ParquetFile(source).iter_batches(NUMBERS_BATCH):
            x = np.stack([batch.column(f"x{k}").to_numpy() for k in range(16)], axis=1)
            y = pa.array(model(torch.from_numpy(x)).numpy()[:, 0])
            table = pa.table({"id": batch.column("id"), "prediction": y})
            writer = writer or pq.ParquetWriter(out, table.schema, compression="zstd")
            writer.write_table(table)
            rows += len(y)
        assert writer is not None
        writer.close()
    return _told(began, rows)


def raw_images(models: Path, source: Path, out: Path) -> int:
    """Decode, transform, forward, top 5; one batch after the other."""
    net, files = ResNet(models.parent / "resnet18.pth"), sorted(source.iterdir())
    net.answers([net.prepare(files[0].read_bytes())])
    began = time.perf_counter()
    found: list[Any] = []
    for first in range(0, len(files), IMAGE_BATCH):
        found += net.answers([net.prepare(file.read_bytes()) for file in files[first : first + IMAGE_BATCH]])
    pq.write_table(pa.table({"path": [file.name for file in files], "prediction": found}), out, compression="zstd")
    return _told(began, len(files))


def lightning_images(models: Path, source: Path, out: Path) -> int:
    """``Trainer.predict`` with a DataLoader, no extra processes (as many threads as the raw loop has)."""
    import lightning.pytorch as pl

    net, files = ResNet(models.parent / "resnet18.pth"), sorted(source.iterdir())

    class Files(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> torch.Tensor:
            return net.prepare(files[index].read_bytes())

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = net.model

        def predict_step(self, batch: torch.Tensor, _index: int) -> list[Any]:
            return net.answers(batch)

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    loader = torch.utils.data.DataLoader(Files(), batch_size=IMAGE_BATCH)
    net.answers([net.prepare(files[0].read_bytes())])
    began = time.perf_counter()
    found = [answer for batch in trainer.predict(Module(), loader) for answer in batch]
    pq.write_table(pa.table({"path": [file.name for file in files], "prediction": found}), out, compression="zstd")
    return _told(began, len(files))


def lightning_numbers(models: Path, source: Path, out: Path) -> int:
    """``Trainer.predict`` over an IterableDataset of batches; it keeps every prediction until the end."""
    import lightning.pytorch as pl

    class Batches(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for batch in pq.ParquetFile(source).iter_batches(NUMBERS_BATCH):
                x = np.stack([batch.column(f"x{k}").to_numpy() for k in range(16)], axis=1)
                yield torch.from_numpy(x), torch.from_numpy(batch.column("id").to_numpy().copy())

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = MLP()

        def predict_step(self, batch: Any, _index: int) -> tuple[torch.Tensor, torch.Tensor]:
            return batch[1], self.model(batch[0])[:, 0]

    module = Module()
    module.model.load_state_dict(torch.load(models.parent / "mlp.pth", weights_only=True))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    began = time.perf_counter()
    parts = trainer.predict(module, torch.utils.data.DataLoader(Batches(), batch_size=None))
    ids, values = (torch.cat([part[k] for part in parts]).numpy() for k in (0, 1))
    pq.write_table(pa.table({"id": ids, "prediction": values}), out, compression="zstd")
    return _told(began, len(ids))


def _told(began: float, rows: int) -> int:
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "rows": rows, "MB": peak_mb()}))
    return 0


LOOPS: dict[str, Callable[[Path, Path, Path], int]] = {
    each.__name__.replace("_", "-"): each for each in (raw_numbers, raw_images, lightning_images, lightning_numbers)
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="loops", description=__doc__)
    parser.add_argument("what", choices=LOOPS)
    parser.add_argument("models", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    return LOOPS[options.what](options.models, options.source, options.out)


if __name__ == "__main__":
    raise SystemExit(main())
