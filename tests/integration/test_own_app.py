"""A user's own Celery app, with the pool and the transport of ours and nothing else."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import backfills
import own_app
from crashes import Moments
from nograd.producer import Client
from waiting import PATIENCE_S, until

FLEET = Path(own_app.__file__).parent
LEASE_S = 3
ROWS = 300


@pytest.fixture(scope="module")
def start(start_worker, folder):
    def start(model, *, ready=True, **env):
        env = {"NOGRAD_LEASE_S": str(LEASE_S), **env}
        return start_worker(
            folder / "models.toml", "-Q", f"nograd.{model}", ready=ready, app="own_app", cwd=FLEET, env=env.items()
        )

    return start


def test_its_workers_run_a_backfill_to_its_end_though_one_is_killed(redis_url, folder, start, tmp_path):
    """Nobody resumes or follows it: the driver only looks."""
    moments = Moments(folder)
    pq.write_table(pa.table({"n": range(ROWS), "text": ["x" * (n % 23) for n in range(ROWS)]}), tmp_path / "in.parquet")
    first = start("slow")
    with Client(redis_url, models=folder / "models.toml") as client:
        backfill = client.backfill(
            "slow", tmp_path / "in.parquet", tmp_path / "out", id="n", columns=["text"], rows_per_chunk=20
        )
        moments.arm("before the record")
        backfill.start(PATIENCE_S)
        until(moments.reached, "the first commit")
        assert moments.pid() == first.process.pid
        first.process.kill()
        first.process.wait()
        assert not backfill.status().ended
        start("slow", ready=False)
        until(lambda: backfill.job.store.size("_SUCCESS"), "the end")
        backfill.verify().check()
        assert backfills.ids(backfill.job) == list(range(ROWS))


def test_it_may_keep_its_results_on_another_redis(redis_url, start, start_worker):
    with start_worker.redis() as other:
        start("linear", OWN_RESULTS=other.url)
        with contextlib.closing(own_app.make_app(redis_url, other.url)) as app:
            sent = [
                app.send_task("nograd.predict", args=["linear", [n, 0, 0, 1]], queue="nograd.linear") for n in range(20)
            ]
            assert [each.get(timeout=PATIENCE_S) for each in sent] == [n + 4.0 for n in range(20)]
            del sent
            gc.collect()  # results unsubscribe when they are collected
        start_worker.stop(redis_url)  # before its results' server does


@pytest.mark.parametrize(("results", "named"), [("", "DisabledBackend"), ("cache+memory://", "CacheBackend")])
def test_without_redis_for_its_results_a_worker_does_not_start_and_says_why(start, results, named):
    worker = start("linear", ready=False, OWN_RESULTS=results)
    assert worker.process.wait(PATIENCE_S) == 2
    assert f"the app own has {named} for its results" in worker.text()
