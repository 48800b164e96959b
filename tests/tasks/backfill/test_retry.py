"""Failed rows are listed, grouped and run again; what was committed stays, and each row is in the dataset once."""

import json

import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from nograd.tasks.backfill import plan as plans
from nograd.tasks.backfill.commit import committed_chunks, records
from nograd.tasks.backfill.failures import clusters, failures
from nograd.tasks.backfill.finalize import finalize
from nograd.tasks.backfill.plan import ModelIdentity
from nograd.tasks.backfill.retry import draft_retry, give_up, remaining, retries
from nograd.tasks.backfill.store import open_store
from nograd.tasks.backfill.verify import verify, verify_all
from nograd.tasks.errors import BackfillError, NotFinished, OutputFull, PlanChanged
from scoring import planned, run


def failing(*bad):
    """A model that answers some rows with what does not fit."""

    def score(batch):
        return ["no" if value in bad else 2.0 * value for value in batch.column("x").to_pylist()]

    return score


@pytest.fixture
def job(tmp_path):
    lines = [f"id{i},{i}" for i in range(1000)]
    lines[500] = "id500,text"
    (tmp_path / "in.csv").write_text("k,x\n" + "\n".join(lines) + "\n")
    made = planned(tmp_path / "in.csv", tmp_path / "out", id="k", columns=["x"])
    finalize(run(made, failing(3, 4, 5, 777)))
    return made


def ids(job):
    return sorted(pyarrow.dataset.dataset(f"{job.store.url}/parts").to_table()["k"].to_pylist())


def test_failures_come_in_input_order_and_group_by_what_they_say(job):
    assert [failure.row for failure in failures(job)] == [3, 4, 5, 500, 777]
    first, second = clusters(failures(job))
    assert (first.rows, first.stage, [each.row for each in first.samples]) == (4, "output", [3, 4, 5])
    assert (second.rows, second.stage, second.message) == (1, "read", "column …: … is not a whole number")


def test_a_retry_adds_the_rows_that_succeed_now_and_touches_no_other(job):
    before = {name: job.store.read(f"parts/{name}") for name in job.store.names("parts")}
    again = plans.save(*draft_retry(job, rows_per_chunk=2, model=ModelIdentity(name="mended")))
    assert (again.plan.rows, again.plan.model.name) == (5, "mended")
    run(again, failing(4), chunks=[0])
    assert list(remaining(job)) == [4, 5, 500, 777]
    finalize(run(again, failing(4)))
    assert list(remaining(job)) == [4, 500]
    assert ids(job) == sorted(f"id{i}" for i in range(1000) if i not in {4, 500})
    assert {name: job.store.read(f"parts/{name}") for name in before} == before
    for each in (job, again, *retries(job.store)):
        report = verify(each)
        assert report.problems == []
        assert report.rows_ok + report.rows_err == each.plan.rows
    third = plans.save(*draft_retry(job, rows_per_chunk=10, which=lambda failure: failure.stage == "output"))
    assert third.plan.rows == 1
    finalize(run(third))
    assert list(remaining(job)) == [500]
    assert ids(job) == sorted(f"id{i}" for i in range(1000) if i != 500)
    assert pq.read_table(f"{job.store.url}/parts").num_rows == 999
    assert verify(job).problems == []


def test_one_retry_at_a_time_and_none_without_need(job, tmp_path):
    again = plans.save(*draft_retry(job, rows_per_chunk=2))
    with pytest.raises(BackfillError, match="retry-1 is not finished: resume it first"):
        draft_retry(job, rows_per_chunk=2)
    run(again)
    with pytest.raises(BackfillError, match="no failed row to run again"):
        draft_retry(job, rows_per_chunk=2, which=lambda failure: failure.row == 3)
    with (tmp_path / "in.csv").open("a") as file:
        file.write("new,1\n")
    with pytest.raises(PlanChanged, match=r"the inputs of .* changed"):
        draft_retry(job, rows_per_chunk=2)


def test_openai_lines_and_images_can_be_run_again(tmp_path):
    lines = [json.dumps({"custom_id": f"r{i}", "body": {"x": i}}) for i in range(10)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    (tmp_path / "images").mkdir()
    for i in range(10):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"x")
    for source in ("in.jsonl", "images"):
        made = planned(tmp_path / source, tmp_path / f"out-{source}")
        run(made, lambda batch: ["no" if i % 4 == 0 else 1.0 for i in range(batch.num_rows)])
        rows = list(remaining(made))
        assert rows == [0, 4, 8]
        again = run(plans.save(*draft_retry(made, rows_per_chunk=2)), lambda batch: [1.0] * batch.num_rows)
        assert list(remaining(made)) == []
        finalize(made)
        finalize(again)
        assert verify(again).problems == []
        assert again.plan.chunks == 2


def test_closing_the_backfill_again_harms_no_retry_that_was_cut_off_behind_its_decision(job, monkeypatch):
    again = plans.save(*draft_retry(job, rows_per_chunk=10))
    with monkeypatch.context() as patch:
        patch.setattr(type(job.store), "settle", lambda *_: (_ for _ in ()).throw(OutputFull("cut off")))
        with pytest.raises(OutputFull):
            run(again, worker="cut off")
    assert committed_chunks(again.store) == [0]
    finalize(job)
    finalize(run(again, worker="late"))
    assert verify(again).problems == []
    assert [record.worker for record in records(again.store, again.plan)] == ["cut off"]


def test_the_url_of_a_retry_opens_it(job):
    again = plans.save(*draft_retry(job, rows_per_chunk=2))
    assert again.store.url == f"{job.store.url}#retry-1"
    opened = plans.load(open_store(again.store.url))
    assert (opened.store.url, opened.plan) == (again.store.url, again.plan)
    assert plans.load(open_store(f"file://{job.store.url}#retry-1")).plan == again.plan
    assert plans.find(open_store(f"{job.store.url}#retry-2")) is None


def test_verifying_all_counts_each_row_once_and_finds_what_is_wrong_with_a_retry(job):
    report = verify_all(job)
    assert (report.problems, report.rows_ok, report.rows_err) == ([], 995, 5)
    again = plans.save(*draft_retry(job, rows_per_chunk=2))
    run(again, failing(4), chunks=[0])
    report = verify_all(job)
    assert (report.problems, report.chunks < report.planned, report.rows_ok, report.rows_err) == ([], True, 996, 4)
    finalize(run(again, failing(4)))
    report = verify_all(job)
    assert (report.problems, report.chunks, report.rows_ok, report.rows_err) == ([], report.planned, 998, 2)
    name = f"parts/retry-1-{again.store.names('parts')[0]}"
    job.store.replace(name, job.store.read(name)[:-1] + b"x")
    assert [problem.split(":")[0] for problem in verify_all(job).problems] == ["retry 1"]


def test_a_retry_of_rows_that_had_not_failed_does_not_pass(job):
    store, made = draft_retry(job, rows_per_chunk=10)
    finalize(run(plans.save(store, made)))
    finalize(run(plans.save(open_store(f"{job.store.url}#retry-2"), made)))
    assert verify_all(job).problems == ["retry 2: row 3 had not failed before"]


def test_nothing_is_retried_before_the_backfill_is_finished(tmp_path):
    (tmp_path / "in.csv").write_text("k,x\n" + "".join(f"id{i},{i}\n" for i in range(100)))
    made = run(planned(tmp_path / "in.csv", tmp_path / "out", rows_per_chunk=50), failing(4), chunks=[0])
    with pytest.raises(NotFinished, match="is not finished: resume it first"):
        draft_retry(made, rows_per_chunk=2)


def test_a_retry_that_is_given_up_keeps_what_it_has_and_whoever_still_runs_it_loses(job):
    before = remaining(job)
    again = plans.save(*draft_retry(job, rows_per_chunk=2, model=ModelIdentity(name="other")))
    run(again, chunks=[0])
    assert give_up(job) == 3
    assert remaining(job) == {row: why for row, why in before.items() if row not in {3, 4}}
    assert ids(job) == sorted(f"id{i}" for i in range(1000) if i not in {5, 500, 777})
    run(again)  # a worker that was slow
    assert ids(job) == sorted(f"id{i}" for i in range(1000) if i not in {5, 500, 777})
    report = verify_all(job)
    assert (report.problems, report.rows_ok, report.rows_err) == ([], 997, 3)
    third = plans.save(*draft_retry(job, rows_per_chunk=10))
    finalize(run(third))
    assert ids(job) == sorted(f"id{i}" for i in range(1000) if i != 500)
    assert list(remaining(job)) == [500]
    assert verify_all(job).problems == []


def test_nothing_is_given_up_but_a_retry_that_is_not_finished(job):
    with pytest.raises(BackfillError, match="no retry is under way"):
        give_up(job)
    again = plans.save(*draft_retry(job, rows_per_chunk=2))
    finalize(run(again))
    with pytest.raises(BackfillError, match="no retry is under way"):
        give_up(job)
