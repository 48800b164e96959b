"""Backfills with real workers, from the command line and from Python, through what happens to them in a night."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import redis
import torch
from PIL import Image

from nograd.producer import Client
from nograd.tasks.errors import PlanChanged

NOGRAD = Path(sys.executable).with_name("nograd")

MODELS = """
[mlp]
loader = "module"
class = "night_models:MLP"
weights = "mlp.pth"
input = "rows"
shape = [4]
batch = { max_items = 32 }

[area]
loader = "python"
class = "night_models:Area"
input = "image"
batch = { max_items = 8 }

[length]
loader = "python"
class = "night_models:Length"
input = "text"
batch = { max_items = 8 }
"""

CLASSES = '''
import time
import torch


class MLP(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))


class Area:
    def load(self, device):
        pass

    def prepare(self, value):
        return value.size

    def forward(self, batch):
        return [float(width * height) for width, height in batch]


class Length:
    """Slow enough to be caught in the middle."""

    def load(self, device):
        pass

    def forward(self, batch):
        time.sleep(0.01)
        return [len(text) for text in batch]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("night")
    (folder / "night_models.py").write_text(CLASSES)
    (folder / "models.toml").write_text(MODELS)
    write_weights(folder, seed=0)
    return folder


def write_weights(folder, seed):
    torch.manual_seed(seed)
    mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    torch.save(mlp.state_dict(), folder / "mlp.pth")
    return mlp


@pytest.fixture(scope="module")
def fleet(folder, start_worker):
    return start_worker(folder / "models.toml", env={"NOGRAD_LEASE_S": "3"}.items())


@pytest.fixture
def client(redis_url, fleet):
    with Client(redis_url) as client:
        yield client


@pytest.fixture
def texts(tmp_path):
    """Two thousand texts: some seconds of work."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"name": f"t{i}", "text": "x" * (i % 50 + 1)}) + "\n" for i in range(2000)))
    return path


def nograd(url, *words, **options):
    done = subprocess.run(
        [NOGRAD, "backfill", *map(str, words), "--json"],
        env={**os.environ, "NOGRAD_REDIS_URL": url},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def content(out):
    """What a reader sees, and the manifest."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and (path.parent.name in {"parts", "errors"} or path.name == "_MANIFEST.json")
    }


def until(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen")
        time.sleep(0.05)
    return value


def table(out):
    return ds.dataset(out / "parts").to_table()


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_table_of_numbers(redis_url, client, folder, tmp_path, kind):
    rng = np.random.default_rng(0)
    rows = pa.table({"key": [f"k{i}" for i in range(500)], **{c: rng.normal(size=500) for c in "abcd"}})
    source = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(rows, source, row_group_size=150)
    else:
        lines = [",".join(map(str, row.values())) for row in rows.to_pylist()]
        source.write_text("\n".join(["key,a,b,c,d", *lines]) + "\n")
    code, end = nograd(
        redis_url, "run", "mlp", source, tmp_path / "out", "--id", "key", "--columns", "a,b,c,d", "--chunk-rows", 64
    )
    assert (code, end["rows_ok"], end["state"]) == (0, 500, "done")
    mlp = write_weights(folder, seed=0)
    with torch.no_grad():
        expected = mlp(torch.tensor(np.stack([rows[c] for c in "abcd"], 1), dtype=torch.float32)).squeeze(1)
    found = table(tmp_path / "out")
    assert found["key"].to_pylist() == rows["key"].to_pylist()
    np.testing.assert_allclose(found["prediction"].to_numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)
    assert nograd(redis_url, "verify", tmp_path / "out")[0] == 0


def test_a_folder_of_images_with_corrupt_ones(redis_url, client, tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    for n in range(40):
        if n % 10 == 3:
            (source / f"{n:02}.png").write_bytes(b"no image")
            continue
        buffer = io.BytesIO()
        Image.new("RGB", (n + 1, 2)).save(buffer, "PNG")
        (source / f"{n:02}.png").write_bytes(buffer.getvalue())
    code, end = nograd(redis_url, "run", "area", source, tmp_path / "out")
    assert (code, end["rows_ok"], end["rows_err"]) == (1, 36, 4)
    assert table(tmp_path / "out")["prediction"].to_pylist() == [2.0 * (n + 1) for n in range(40) if n % 10 != 3]
    code, told = nograd(redis_url, "errors", tmp_path / "out")
    assert (code, told["rows"], len(told["clusters"])) == (0, 4, 1)
    assert nograd(redis_url, "verify", tmp_path / "out")[0] == 0


def test_lines_of_openai_s_batch_format(redis_url, client, tmp_path):
    source = tmp_path / "batch.jsonl"
    lines = [{"custom_id": f"r{i}", "body": {"input": "y" * i}} for i in range(1, 31)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _ = nograd(redis_url, "run", "length", source, tmp_path / "out")
    assert code == 0
    written = [
        json.loads(x) for part in sorted((tmp_path / "out/parts").iterdir()) for x in part.read_text().splitlines()
    ]
    assert [line["custom_id"] for line in written] == [f"r{i}" for i in range(1, 31)]
    assert [line["response"]["body"]["prediction"] for line in written] == list(range(1, 31))


def test_a_night_detached_paused_forgotten_by_redis_resumed_gives_the_bytes_of_a_quiet_one(
    redis_url, client, texts, tmp_path
):
    words = ("length", texts)
    options = ("--id", "name", "--columns", "text", "--chunk-rows", 80)
    assert nograd(redis_url, "run", *words, tmp_path / "quiet", *options)[0] == 0
    out = tmp_path / "night"
    code, started = nograd(redis_url, "run", *words, out, *options, "--detach")
    assert code == 0
    again = client.backfill_at(started["id"])
    until(lambda: again.status().progress.chunks_done >= 2, "progress")
    again.pause()
    until(lambda: again.status().running == 0, "the pause")
    stood = again.status()
    assert (stood.state, stood.progress.done) == ("paused", False)
    with redis.Redis.from_url(redis_url) as connection:
        connection.flushall()
    assert client.backfill_at(out).status().state == "paused"
    until(lambda: "length" in client.models(), "the worker's models known again")
    code, end = nograd(redis_url, "resume", out)
    assert (code, end["state"], end["rows_ok"]) == (0, "done", 2000)
    assert content(out) == content(tmp_path / "quiet")
    assert nograd(redis_url, "verify", out)[0] == 0


def test_the_driver_is_killed_and_the_run_goes_on(redis_url, client, texts, tmp_path):
    out = tmp_path / "out"
    driver = subprocess.Popen(
        [NOGRAD, "backfill", "run", "length", texts, out, "--id", "name", "--chunk-rows", "80"],
        env={**os.environ, "NOGRAD_REDIS_URL": redis_url},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "of 2,000 rows" in driver.stderr.readline()
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert not (out / "_SUCCESS").exists()
    until((out / "_SUCCESS").exists, "the end")
    assert client.backfill_at(out).verify().problems == []


def test_new_weights_are_refused_by_a_resume(redis_url, client, folder, start_worker, fleet, tmp_path):
    source = tmp_path / "rows.csv"
    source.write_text("a,b,c,d\n" + "1,2,3,4\n" * 50)
    job = client.backfill("mlp", source, tmp_path / "out")
    job.plan()
    fleet.stop()
    write_weights(folder, seed=1)
    start_worker(folder / "models.toml")
    with pytest.raises(PlanChanged, match="mlp"):
        job.run()
    code, told = nograd(redis_url, "resume", tmp_path / "out")
    assert (code, told["error"]["code"]) == (2, "plan_changed")
    assert not (tmp_path / "out" / "_commits").exists()
