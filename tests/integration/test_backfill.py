"""Backfills with real workers, from the command line and from Python, through what happens to them in a night."""

import json
import os
import signal
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import redis

from backfills import NOGRAD, nograd, score, write_weights
from nograd.producer import Client
from nograd.tasks.errors import PlanChanged
from waiting import until


@pytest.fixture(scope="module")
def fleet(folder, start_worker):
    return start_worker(folder / "models.toml", env={"NOGRAD_LEASE_S": "3"}.items(), lasts=True)


@pytest.fixture
def client(redis_url, fleet):
    with Client(redis_url) as client:
        yield client


@pytest.fixture
def slowly(folder):
    """A file: while it is there, a batch of the model ``slow`` takes a fifth of a second."""
    yield folder / "slowly"
    (folder / "slowly").unlink(missing_ok=True)


@pytest.fixture
def texts(tmp_path):
    """Two thousand texts: fifty seconds of work while it is slow."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"name": f"t{i}", "text": "x" * (i % 50 + 1)}) + "\n" for i in range(2000)))
    return path


def content(out):
    """What a reader sees, and the manifest."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and (path.parent.name in {"parts", "errors"} or path.name == "_MANIFEST.json")
    }


def table(out):
    return ds.dataset(out / "parts").to_table()


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_table_of_numbers(redis_url, client, tmp_path, kind):
    rng = np.random.default_rng(0)
    rows = pa.table({"key": [f"k{i}" for i in range(500)], **{c: rng.normal(size=500) for c in "abcd"}})
    source = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(rows, source, row_group_size=150)
    else:
        lines = [",".join(map(str, row.values())) for row in rows.to_pylist()]
        source.write_text("\n".join(["key,a,b,c,d", *lines]) + "\n")
    code, end = nograd(
        redis_url, "run", "linear", source, tmp_path / "out", "--id", "key", "--columns", "a,b,c,d", "--chunk-rows", 64
    )
    assert (code, end["rows_ok"], end["state"]) == (0, 500, "done")
    expected = sum(weight * rows[name].to_numpy() for weight, name in enumerate("abcd", 1))
    found = table(tmp_path / "out")
    assert found["key"].to_pylist() == rows["key"].to_pylist()
    np.testing.assert_allclose(found["prediction"].to_numpy(), expected, rtol=1e-5, atol=1e-6)
    assert nograd(redis_url, "verify", tmp_path / "out")[0] == 0


def test_lines_of_openai_s_batch_format(redis_url, client, tmp_path):
    source = tmp_path / "batch.jsonl"
    lines = [{"custom_id": f"r{i}", "body": {"input": "y" * i}} for i in range(1, 31)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _ = nograd(redis_url, "run", "scored", source, tmp_path / "out")
    assert code == 0
    written = [
        json.loads(x) for part in sorted((tmp_path / "out/parts").iterdir()) for x in part.read_text().splitlines()
    ]
    assert [line["custom_id"] for line in written] == [f"r{i}" for i in range(1, 31)]
    assert [line["response"]["body"]["prediction"] for line in written] == [score("y" * i) for i in range(1, 31)]


def test_a_night_detached_paused_forgotten_by_redis_resumed_gives_the_bytes_of_a_quiet_one(
    redis_url, client, texts, slowly, tmp_path
):
    words = ("slow", texts)
    options = ("--id", "name", "--columns", "text", "--chunk-rows", 40)
    assert nograd(redis_url, "run", *words, tmp_path / "quiet", *options)[0] == 0
    out = tmp_path / "night"
    slowly.touch()
    code, started = nograd(redis_url, "run", *words, out, *options, "--detach")
    assert code == 0
    again = client.backfill_at(started["id"])
    until(lambda: again.status().progress.chunks_done >= 2, "progress")
    again.pause()
    until(lambda: again.status().running == 0, "the pause")
    stood = again.status()
    assert (stood.state, stood.progress.done) == ("paused", False)
    slowly.unlink()
    with redis.Redis.from_url(redis_url) as connection:
        connection.flushall()
    assert client.backfill_at(out).status().state == "paused"
    until(lambda: "slow" in client.models(), "the worker's models known again")
    code, end = nograd(redis_url, "resume", out)
    assert (code, end["state"], end["rows_ok"]) == (0, "done", 2000)
    assert content(out) == content(tmp_path / "quiet")
    assert nograd(redis_url, "verify", out)[0] == 0


def test_the_driver_is_killed_and_the_run_goes_on(redis_url, client, texts, slowly, tmp_path):
    out = tmp_path / "out"
    slowly.touch()
    driver = subprocess.Popen(
        [NOGRAD, "backfill", "run", "slow", texts, out, "--id", "name", "--chunk-rows", "40"],
        env={**os.environ, "NOGRAD_REDIS_URL": redis_url},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "planning" in driver.stderr.readline()
    assert "of 2,000 rows" in driver.stderr.readline()
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert not (out / "_SUCCESS").exists()
    slowly.unlink()
    until((out / "_SUCCESS").exists, "the end")
    assert client.backfill_at(out).verify().problems == []


def test_new_weights_are_refused_by_a_resume(redis_url, client, folder, start_worker, fleet, tmp_path):
    source = tmp_path / "rows.csv"
    source.write_text("a,b,c,d\n" + "1,2,3,4\n" * 50)
    job = client.backfill("linear", source, tmp_path / "out")
    job.plan()
    fleet.stop()
    write_weights(folder, [4.0, 3.0, 2.0, 1.0])
    start_worker(folder / "models.toml")
    with pytest.raises(PlanChanged, match="linear"):
        job.run()
    code, told = nograd(redis_url, "resume", tmp_path / "out")
    assert (code, told["error"]["code"]) == (2, "plan_changed")
    assert not (tmp_path / "out" / "_commits").exists()
