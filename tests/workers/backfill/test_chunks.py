"""Chunks on real workers: planned, sent, scored, committed; compared with the model's own answers."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from backfills import committed, drive, errors, planned, run, score, write_models
from nograd.producer import Client
from nograd.tasks.backfill.progress import progress
from nograd.tasks.backfill.verify import verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chunks")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def fleet(folder, start_worker):
    return start_worker(folder / "models.toml", env={"NOGRAD_LEASE_S": "3"}.items(), lasts=True)


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
    expected = sum(weight * columns[name] for weight, name in enumerate("abcd", 1))
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
    job = planned(client, "area", images, tmp_path / "out", 11)
    table = run(client, job)
    good = [n for n in range(30) if n not in (7, 8)]
    assert [Path(path).name for path in table["path"].to_pylist()] == [f"{n:02}.png" for n in good]
    assert table["prediction"].to_pylist() == [2.0 * (n + 1) for n in good]
    assert [each["stage"] for each in errors(job)] == ["prepare", "prepare"]


def test_a_row_that_raises_fails_alone(client, tmp_path):
    texts = ["raise" if n % 50 == 7 else "x" * (n % 23) for n in range(200)]
    table = pa.table({"n": range(200), "text": texts})
    pq.write_table(table, tmp_path / "in.parquet")
    job = planned(client, "scored", tmp_path / "in.parquet", tmp_path / "out", 64, id="n")
    scored = run(client, job)
    good = [n for n in range(200) if texts[n] != "raise"]
    assert scored["n"].to_pylist() == good
    assert scored["prediction"].to_pylist() == [score(texts[n]) for n in good]
    assert {each["type"] for each in errors(job)} == {"model_failed"}


def test_a_killed_worker_costs_nothing_and_changes_no_byte(redis_url, folder, client, start_worker, tmp_path):
    rng = np.random.default_rng(1)
    pq.write_table(
        pa.table({name: rng.standard_normal(20_000) for name in "abcd"}), tmp_path / "in.parquet", row_group_size=5000
    )
    job = planned(client, "linear", tmp_path / "in.parquet", tmp_path / "out", 400)
    start = functools.partial(start_worker, folder / "models.toml", env={"NOGRAD_LEASE_S": "3"}.items())
    victims = [start(ready=False) for _ in range(2)]
    for worker in victims:
        worker.wait_until_ready()

    def kill_some():
        if victims and progress(job).chunks_done > 10 * (3 - len(victims)):
            victims.pop().process.kill()

    drive(client, job, until=kill_some)
    again = planned(client, "linear", tmp_path / "in.parquet", tmp_path / "again", 400)
    run(client, again)
    verify(job).check()
    assert committed(job) == committed(again)
