"""Backfills from their owner's side: a real Redis, real files, a worker process that reads, commits and pumps."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from nograd.producer.backfill import planning
from nograd.tasks.backfill.budget import parse_budget
from nograd.tasks.backfill.plan import ModelIdentity, load
from nograd.tasks.backfill.state import read as read_state
from nograd.tasks.backfill.store import open_store
from nograd.tasks.backfill.task import Calibration
from nograd.tasks.backfill.window import Window
from nograd.tasks.errors import (
    BackfillCancelled,
    BackfillError,
    BudgetExceeded,
    ConfigError,
    OutputError,
    PlanChanged,
    SourceError,
    UnknownModel,
)
from waiting import until


def backfill(world, csv, out, chunk=50, **options):
    return world.client.backfill("doubler", csv, out, id="k", columns=["x"], rows_per_chunk=chunk, **options)


def content(out):
    """Everything a reader sees, and the manifest."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if (path.is_file() and path.parent.name in {"parts", "errors"}) or path.name == "_MANIFEST.json"
    }


# -- from the beginning to the end -----------------------------------------------------------------------------------


def test_run_scores_every_row_once_in_order_and_tells_the_truth_on_the_way(backfills, csv, tmp_path):
    seen = []
    job = backfill(backfills, csv, tmp_path / "out")
    end = job.run(seen.append, interval_s=0.05)
    assert end.state == "done"
    assert (end.progress.rows_ok, end.progress.rows_err) == (989, 11)
    table = pyarrow.dataset.dataset(tmp_path / "out" / "parts").to_table()
    expected = [(f"id{i}", 2.0 * i) for i in range(1000) if i % 100 != 7 and i != 500]
    assert list(zip(*table.to_pydict().values(), strict=True)) == expected
    done = [status.progress.rows_ok + status.progress.rows_err for status in seen]
    assert done == sorted(done)
    assert all(status.state != "done" for status in seen[:-1])
    assert job.verify().problems == []


def test_a_thousand_alike_errors_are_one_line_with_examples(backfills, csv, tmp_path):
    job = backfill(backfills, csv, tmp_path / "out")
    job.run(interval_s=0.05)
    first, second = job.errors()
    assert (first.rows, first.stage, first.type, first.message) == (10, "predict", "model_failed", "… is negative")
    assert [sample.id for sample in first.samples] == ["id7", "id107", "id207"]
    assert (second.rows, second.stage) == (1, "read")


def test_start_returns_and_the_workers_go_on_without_anybody(backfills, csv, tmp_path):
    job = backfill(backfills, csv, tmp_path / "out")
    job.start()
    until((tmp_path / "out" / "_SUCCESS").exists)
    again = backfills.client.backfill_at(tmp_path / "out")
    assert again.status().state == "done"
    # The worker lets go of its last claim a moment after the end.
    until(lambda: backfills.client.backfill_at(job.id).status() == again.status())


def test_running_a_finished_backfill_again_does_nothing_and_needs_no_worker(backfills, empty, csv, tmp_path):
    backfill(backfills, csv, tmp_path / "out").run(interval_s=0.05)
    before = content(tmp_path / "out")
    assert backfill(empty, csv, tmp_path / "out").run(interval_s=0.05).state == "done"
    assert content(tmp_path / "out") == before


def test_the_driver_may_be_killed_and_the_run_goes_on(backfills, csv, tmp_path):
    backfills.gate.touch()
    code = (
        "from nograd.producer import Client\n"
        f"Client({backfills.url!r}).backfill('doubler', {str(csv)!r}, {str(tmp_path / 'out')!r}, id='k', "
        "columns=['x'], rows_per_chunk=20).run(lambda now: print(now.state, flush=True))\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    driver.stdout.readline()
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    backfills.gate.unlink()
    until((tmp_path / "out" / "_SUCCESS").exists)
    assert backfills.client.backfill_at(tmp_path / "out").verify().problems == []


def test_a_plan_where_one_was_deleted_begins_without_its_hints(backfills, csv, tmp_path):
    first = backfill(backfills, csv, tmp_path / "out")
    first.plan()
    window = Window(backfills.client.app.backend.client, first.id)
    window.stop("trouble")
    window.count_failures(5)
    shutil.rmtree(tmp_path / "out")
    again = backfill(backfills, csv, tmp_path / "out")
    again.plan()
    assert again.id == first.id
    assert (window.wish, window.why, window.count_failures(1)) == (None, None, 1)


# -- pause, cancel, resume, amnesia ----------------------------------------------------------------------------------


def test_what_is_paused_stands_still_until_it_is_resumed(backfills, csv, tmp_path):
    job = backfill(backfills, csv, tmp_path / "out", chunk=20)
    backfills.gate.touch()
    job.start()
    other = backfills.client.backfill_at(tmp_path / "out")
    other.pause()
    backfills.gate.unlink()
    until(lambda: job.status().queued == 0 == job.status().running)
    assert job.status().state == "paused"
    assert job.status().progress.chunks_done == 0
    assert next(job.watch()).state == "paused"
    before = time.time()
    other.resume()
    assert read_state(open_store(tmp_path / "out")).since >= before
    assert job.follow(interval_s=0.05).state == "done"


@pytest.mark.parametrize("wish", ["pause", "cancel"])
def test_a_redis_that_comes_back_with_what_was_wanted_before_the_last_resume_stops_nothing(
    backfills, csv, tmp_path, wish
):
    job = backfill(backfills, csv, tmp_path / "out", chunk=20)
    backfills.gate.touch()
    job.start()
    getattr(job, wish)()
    key = f"nograd:backfill:{job.id}:wish"
    older = backfills.redis.dump(key)
    job.resume()
    backfills.redis.restore(key, 0, older, replace=True)
    backfills.gate.unlink()
    assert job.status().state not in ("paused", "cancelled")
    assert job.follow(interval_s=0.05).state == "done"


def test_who_follows_a_cancelled_backfill_is_told_and_a_flushall_does_not_start_it_again(backfills, csv, tmp_path):
    job = backfill(backfills, csv, tmp_path / "out", chunk=20)
    backfills.gate.touch()
    job.start()
    job.cancel()
    with pytest.raises(BackfillCancelled, match="what is committed stays"):
        job.follow(interval_s=0.05)
    backfills.redis.delete(*backfills.redis.keys("nograd:backfill:*"))  # as a FLUSHALL, but the worker's own keys
    backfills.gate.unlink()
    with pytest.raises(BackfillCancelled):
        job.follow(interval_s=0.05)
    assert job.status().queued == 0
    job.resume()
    assert job.follow(interval_s=0.05).state == "done"


def test_a_redis_that_forgot_everything_in_the_middle_costs_no_byte(backfills, csv, tmp_path):
    whole = backfill(backfills, csv, tmp_path / "whole", chunk=20)
    whole.run(interval_s=0.05)
    job = backfill(backfills, csv, tmp_path / "out", chunk=20)
    job.start()
    until(lambda: job.status().progress.chunks_done > 3)
    backfills.gate.touch()
    backfills.redis.delete(*backfills.redis.keys("nograd:backfill:*"))
    backfills.gate.unlink()
    again = backfills.client.backfill_at(tmp_path / "out")
    again.resume()
    assert again.follow(interval_s=0.05).state == "done"
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_status_without_redis_still_says_what_is_committed(csv, tmp_path, backfills):
    from nograd.producer import Client

    backfill(backfills, csv, tmp_path / "out").run(interval_s=0.05)
    # A copy: who else has seen the end of the backfill may write its _SUCCESS once more.
    copy = shutil.copytree(tmp_path / "out", tmp_path / "copy", ignore=shutil.ignore_patterns("_SUCCESS", "_staging"))
    with Client("redis://127.0.0.1:1/0") as nowhere:
        now = nowhere.backfill_at(copy).status()
    assert now.progress.rows_ok == 989
    assert (now.state, now.running) == ("unknown", None)
    assert "127.0.0.1:1" in now.trouble


# -- refusals --------------------------------------------------------------------------------------------------------


def test_another_request_into_the_same_folder_is_refused_and_says_in_what_it_differs(backfills, csv, tmp_path):
    backfill(backfills, csv, tmp_path / "out").run(interval_s=0.05)
    with pytest.raises(PlanChanged, match=r"selection\.limit was null, is 10"):
        backfill(backfills, csv, tmp_path / "out", limit=10).start()
    with pytest.raises(PlanChanged, match=r"parameters\.k was null, is 1"):
        backfill(backfills, csv, tmp_path / "out", params={"k": 1}).start()
    with pytest.raises(PlanChanged, match=r"source\.id"):
        backfills.client.backfill("doubler", csv, tmp_path / "out", columns=["x"], rows_per_chunk=50).start()


def test_changed_inputs_and_changed_weights_are_refused(empty, csv, tmp_path):
    with empty.worker():
        job = backfill(empty, csv, tmp_path / "out")
        job.plan()
        kept = csv.read_text()
        csv.write_text(kept + "id1000,1000\n")
        with pytest.raises(PlanChanged, match=r"rows\.csv"):
            job.resume()
        (csv.parent / "more.csv").write_text("k,x\nid1000,1\n")
        with pytest.raises(PlanChanged, match=r"rows\.csv"):
            backfill(empty, csv, tmp_path / "out").start()
        (csv.parent / "more.csv").unlink()
    stat = (tmp_path / "out" / "_plan.json").stat()
    csv.write_text(kept)
    fresh = backfill(empty, csv, tmp_path / "fresh")
    with empty.worker():
        fresh.plan()
    with empty.worker(weights="bb"):
        with pytest.raises(PlanChanged, match="weights was aa, is bb"):
            fresh.resume()
        with pytest.raises(PlanChanged, match="weights was aa, is bb"):
            backfill(empty, csv, tmp_path / "fresh").run()
    assert (tmp_path / "out" / "_plan.json").stat() == stat
    assert not (tmp_path / "fresh" / "_commits").exists()


def test_a_retry_under_other_weights_is_refused_with_a_way_out_that_works(empty, csv, tmp_path):
    job = backfill(empty, csv, tmp_path / "out")
    with empty.worker():
        job.run(interval_s=0.05)
        empty.gate.touch()
        job.retry()
        job.pause()
        empty.gate.unlink()  # a chunk that waits there finds the pause, and the worker can stop
    with empty.worker(weights="bb"):
        with pytest.raises(
            PlanChanged, match=r"weights was aa, is bb; put that back, or `nograd backfill retry .*/out --g"
        ):
            job.retry()
        window = job._stages.last().window
        window.stop("trouble")
        commits = tmp_path / "out" / "_retry" / "1" / "_commits"
        shutil.rmtree(commits, ignore_errors=True)
        commits.touch()  # a folder that cannot be written
        with pytest.raises(OutputError):
            job.give_up_retry()
        assert (window.wish, window.why) == ("pause", "trouble")
        window.wish = "run"
        (watchlist,) = window.client.keys("nograd:backfills:*")
        window.client.delete(watchlist)  # as a worker does that finds it cancelled meanwhile
        with pytest.raises(OutputError):
            job.give_up_retry()
        assert window.wish == "run"
        assert window.client.zcard(watchlist) == 1
        commits.unlink()
        assert job.give_up_retry() == 11
        assert window.wish == "cancel"
        now = job.status()
        assert (now.state, now.retries, now.progress.rows_err) == ("done", 1, 11)
        assert [each.rows for each in job.errors()] == [10, 1]
        assert job.verify().problems == []
        assert job.retry().model.parts == {"weights": "bb"}
        assert job.follow(interval_s=0.05).progress.rows_err == 11
    with pytest.raises(BackfillError, match="no retry is under way"):
        job.give_up_retry()


def test_an_output_within_the_inputs_an_unknown_model_and_an_empty_source_are_refused(backfills, csv, tmp_path):
    with pytest.raises(OutputError, match="is among the inputs"):
        backfills.client.backfill("doubler", csv.parent, csv.parent / "out").start()
    with pytest.raises(UnknownModel, match="Did you mean 'doubler'"):
        backfills.client.backfill("dubler", csv, tmp_path / "out").start()
    (tmp_path / "empty.csv").write_text("k,x\n")
    with pytest.raises(SourceError, match="no rows"):
        backfills.client.backfill("doubler", tmp_path / "empty.csv", tmp_path / "out").start()
    with pytest.raises(ConfigError, match="no option 'ids'"):
        backfills.client.backfill("doubler", csv, tmp_path / "out", ids="k")
    assert not (tmp_path / "out").exists()


def test_a_model_that_fails_at_everything_is_refused_before_anything_is_written(backfills, csv, tmp_path):
    with pytest.raises(BackfillError, match="none of the 1000 sampled rows got a prediction: id0: 0 is negative"):
        backfills.client.backfill("broken", csv, tmp_path / "out", id="k").start()
    assert not (tmp_path / "out").exists()


def test_without_a_worker_the_error_says_which_queue_nobody_reads(empty, register, csv, tmp_path):
    register(empty.client, doubler="rows")
    with pytest.raises(BackfillError, match=r"no worker serves doubler: nobody answered from queue nograd\.doubler"):
        backfill(empty, csv, tmp_path / "out").start(timeout_s=0.2)
    assert not (tmp_path / "out").exists()


# -- the error budget ------------------------------------------------------------------------------------------------


def test_more_failed_rows_than_may_stop_it_and_a_larger_budget_goes_on(backfills, csv, tmp_path):
    job = backfill(backfills, csv, tmp_path / "out", chunk=20, error_budget="0.2%")
    with pytest.raises(BudgetExceeded, match="the error budget is 2;"):
        job.run(interval_s=0.02)
    state = job.status()
    assert state.progress.rows_err > 2
    assert (state.state, state.error_budget) in {("stopped", 0.002), ("done", 0.002)}
    end = backfills.client.backfill_at(tmp_path / "out", error_budget=20)
    end.resume()
    assert end.follow(interval_s=0.05).progress.rows_err == 11


def test_a_budget_is_kept_by_the_records_when_redis_forgot_its_count(backfills, csv, tmp_path):
    job = backfill(backfills, csv, tmp_path / "out", chunk=20, error_budget=1)
    job.start()  # this worker minds no budget: it is the driver that counts
    until(lambda: job.status().progress.rows_err > 1)
    with pytest.raises(BudgetExceeded, match="the error budget is 1;"):
        job.follow(interval_s=0.02)


@pytest.mark.parametrize(
    ("given", "budget"),
    [("1%", 0.01), ("0.01", 0.01), (0.01, 0.01), ("100", 100), (100, 100), ("100%", None), (None, None), ("0", 0)],
)
def test_budgets_are_shares_or_rows(given, budget):
    assert parse_budget(given) == budget


@pytest.mark.parametrize("given", ["many", "-1", "1.5", "150%", "nan", "inf", ""])
def test_a_budget_that_is_neither_is_refused(given):
    with pytest.raises(ConfigError, match="error budget"):
        parse_budget(given)


# -- the plan --------------------------------------------------------------------------------------------------------


def measured(rows_per_s, batch_rows=16, bytes_per_row=8.0):
    return Calibration(
        rows=int(rows_per_s * 10), failed=0, seconds=10.0, out_bytes=int(rows_per_s * 10 * bytes_per_row),
        batch_rows=batch_rows, prediction=None, errors=[], model=ModelIdentity(name="m"),
    )  # fmt: skip


def test_a_chunk_takes_twenty_seconds_in_whole_batches():
    assert planning.chunk_rows(10_000_000, measured(100)) == 2000 // 16 * 16
    assert planning.chunk_rows(10_000_000, measured(100, batch_rows=64)) == 2000 // 64 * 64


def test_a_chunk_has_a_batch_even_if_that_takes_minutes():
    assert planning.chunk_rows(10_000, measured(0.2, batch_rows=64)) == 64


def test_a_part_is_not_larger_than_it_may_be():
    rows = planning.chunk_rows(10_000_000, measured(10_000, bytes_per_row=100_000))
    assert rows * 100_000 <= planning.PART_BYTES
    assert rows % 16 == 0


def test_a_small_input_is_shared_by_several_workers_unless_that_makes_chunks_too_short():
    assert planning.chunk_rows(8000, measured(100)) == 1000 // 16 * 16
    assert planning.chunk_rows(400, measured(100)) == 100 // 16 * 16


def test_a_dry_run_measures_and_leaves_nothing_behind(backfills, csv, tmp_path):
    job = backfill(backfills, csv, tmp_path / "out", chunk=100)
    found = until(lambda: (found := job.plan(save=False)).workers and found)  # it gives workers a second to answer
    assert not (tmp_path / "out").exists()
    assert (found.rows, found.files, found.workers, found.failed, found.rows_per_chunk) == (1000, 1, 1, 11, 100)
    assert 0 < found.low_s < found.high_s
    assert found.out_bytes == 20_000
    assert job.plan().chunks == found.chunks
    assert load(open_store(tmp_path / "out")).plan.rows == 1000


def test_a_limit_and_a_sample_choose_rows(backfills, csv, tmp_path):
    end = backfill(backfills, csv, tmp_path / "out", limit=100, sample=30, seed=4).run(interval_s=0.05)
    assert end.progress.rows == 30
    ids = pq.read_table(tmp_path / "out" / "parts")["k"].to_pylist()
    assert all(int(name[2:]) < 100 for name in ids)
