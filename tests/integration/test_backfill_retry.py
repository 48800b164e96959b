"""Rows that fail until something is mended, run again by real workers: whole in the end, each row once."""

import json

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from backfills import nograd
from nograd.producer import Client
from nograd.tasks.errors import BackfillError, ConfigError, NotFinished, PlanChanged
from waiting import until

MODELS = """
[length]
loader = "python"
class = "mended_models:Length"
input = "text"
batch = { max_items = 8 }
"""

CLASSES = """
import os
import time
from pathlib import Path

MENDED = Path(os.environ["MENDED"])


class Length:
    def load(self, device):
        pass

    def prepare(self, text):
        if "odd" in text and not (MENDED / "odd").exists():
            raise ValueError(f"{text!r} is odd")
        return text

    def forward(self, batch):
        if any("odd" in text for text in batch) and (MENDED / "wait").exists():
            while (MENDED / "one").exists() and (MENDED / "wait").exists():
                time.sleep(0.01)
            (MENDED / "one").touch()
        if any("fragile" in text for text in batch) and not (MENDED / "fragile").exists():
            raise RuntimeError("a fragile text")
        return [len(text) for text in batch]
"""

ROWS = 200
ODD, FRAGILE = range(3, ROWS, 20), range(7, ROWS, 40)


def text(row):
    return f"odd {row}" if row in ODD else f"fragile {row}" if row in FRAGILE else "x" * (row % 9 + 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retry")
    (folder / "mended_models.py").write_text(CLASSES)
    (folder / "models.toml").write_text(MODELS)
    (folder / "mended").mkdir()
    return folder


@pytest.fixture(scope="module")
def fleet(folder, start_worker):
    env = {"NOGRAD_LEASE_S": "3", "MENDED": str(folder / "mended")}
    return start_worker(folder / "models.toml", env=env.items(), lasts=True)


@pytest.fixture
def mended(folder):
    """A folder: what stands in it is mended."""
    for path in (folder / "mended").iterdir():
        path.unlink()
    return folder / "mended"


@pytest.fixture
def client(redis_url, fleet):
    with Client(redis_url) as client:
        yield client


@pytest.fixture(params=["csv", "parquet", "jsonl"])
def source(request, tmp_path):
    return write(tmp_path / f"rows.{request.param}")


@pytest.fixture
def csv(tmp_path):
    return write(tmp_path / "rows.csv")


def write(path):
    rows = [{"key": f"k{row}", "text": text(row)} for row in range(ROWS)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text("key,text\n" + "".join(f"{row['key']},{row['text']}\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(url, source, out):
    return nograd(url, "run", "length", source, out, "--id", "key", "--columns", "text", "--chunk-rows", 40)


def predictions(out):
    """What a reader sees: ``(key, prediction)``, sorted."""
    return sorted(zip(*ds.dataset(out / "parts").to_table().to_pydict().values(), strict=True))


def expected(*missing):
    left_out = {row for rows in missing for row in rows}
    return sorted((f"k{row}", len(text(row))) for row in range(ROWS) if row not in left_out)


def test_what_failed_is_run_again_once_it_is_mended(redis_url, client, mended, source, tmp_path):
    out = tmp_path / "out"
    code, end = run(redis_url, source, out)
    assert (code, end["rows_ok"], end["rows_err"]) == (1, ROWS - 15, 15)
    assert predictions(out) == expected(ODD, FRAGILE)
    before = {path: path.read_bytes() for path in (out / "parts").iterdir()}
    (mended / "odd").touch()
    (mended / "fragile").touch()
    code, end = nograd(redis_url, "retry", out)
    assert (code, end["state"], end["rows_ok"], end["rows_err"], end["retries"]) == (0, "done", ROWS, 0, 1)
    assert predictions(out) == expected()
    assert {path: path.read_bytes() for path in before} == before
    code, report = nograd(redis_url, "verify", out)
    assert (code, report["ok"], report["rows_ok"], report["rows_err"]) == (0, True, ROWS, 0)
    assert nograd(redis_url, "errors", out) == (0, {"rows": 0, "clusters": []})
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, told = nograd(redis_url, "retry", out)
    assert (code, told["rows_err"], told["retries"]) == (0, 0, 1)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    job = client.backfill_at(out)
    assert job.retry() is None
    job.resume()
    assert job.follow().progress.rows_err == 0


def test_errors_of_one_type_are_run_again_and_the_others_remain(redis_url, client, mended, csv, tmp_path):
    out = tmp_path / "out"
    run(redis_url, csv, out)
    (mended / "odd").touch()
    code, end = nograd(redis_url, "retry", out, "--only", "invalid_input")
    assert (code, end["rows_ok"], end["rows_err"]) == (1, ROWS - 5, 5)
    assert predictions(out) == expected(FRAGILE)
    code, told = nograd(redis_url, "errors", out)
    assert (told["rows"], [each["type"] for each in told["clusters"]]) == (5, ["model_failed"])
    code, told = nograd(redis_url, "retry", out, "--only", "invalid_input,no_such")
    assert code == 2
    assert "no row failed with invalid_input or no_such; there are model_failed" in told["error"]["message"]
    code, end = nograd(redis_url, "retry", out)  # nothing is mended: they fail again
    assert (code, end["rows_err"], end["retries"]) == (1, 5, 2)
    (mended / "fragile").touch()
    code, end = nograd(redis_url, "retry", out, "--only", "no_such,model_failed")
    assert (code, end["rows_err"], end["retries"]) == (0, 0, 3)
    assert predictions(out) == expected()
    assert nograd(redis_url, "verify", out)[0] == 0


def test_a_retry_is_paused_looked_at_and_gone_on_with_as_the_backfill_is(redis_url, client, mended, csv, tmp_path):
    out = tmp_path / "out"
    client.backfill("length", csv, out, id="key", columns=["text"], rows_per_chunk=1).run(interval_s=0.1)
    (mended / "odd").touch()
    (mended / "wait").touch()  # all but the one that is on the device first
    other = client.backfill_at(out)
    job = client.backfill_at(out)
    assert job.retry(["invalid_input"]).rows == len(ODD)
    until(lambda: other.status().progress.rows_ok > ROWS - 15, "a chunk of the retry")
    other.pause()
    (mended / "wait").unlink()
    until(lambda: other.status().running == 0, "the pause")
    stood = other.status()
    assert (stood.state, stood.retries, stood.progress.done) == ("paused", 1, False)
    assert stood.progress.rows_err == len(FRAGILE)
    assert client.backfill_at(job.id).out == str(out)
    with pytest.raises(PlanChanged, match="retry-1 is not finished, and is of other rows"):
        other.retry(["model_failed"])
    assert other.retry(["invalid_input"]).rows == len(ODD)
    end = other.follow(interval_s=0.1)
    assert (end.state, end.progress.rows_err) == ("done", len(FRAGILE))
    assert predictions(out) == expected(FRAGILE)
    assert other.verify().problems == []


def test_what_cannot_be_retried_says_why(client, mended, csv, tmp_path):
    job = client.backfill("length", csv, tmp_path / "out", id="key", columns=["text"], rows_per_chunk=40)
    job.plan()
    with pytest.raises(NotFinished, match="5 of 5 chunks are not committed yet; resume it"):
        job.retry()
    with pytest.raises(ConfigError, match="is a retry; name the output folder alone"):
        client.backfill_at(f"{tmp_path / 'out'}#retry-1")
    with pytest.raises(BackfillError, match="holds no backfill"):
        client.backfill_at(tmp_path / "nothing").retry()
    job.run(interval_s=0.1)
    with csv.open("a") as file:
        file.write("new,row\n")
    with pytest.raises(PlanChanged, match=r"rows\.csv had"):
        job.retry()
    assert not (tmp_path / "out" / "_retry").exists()
