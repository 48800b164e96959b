"""The plan: every selected row in one chunk, the same plan for the same inputs, written once."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nograd.tasks.backfill import plan as plans
from nograd.tasks.backfill.draft import cuts, draft
from nograd.tasks.backfill.plan import ModelIdentity, Selection
from nograd.tasks.backfill.sources import survey
from nograd.tasks.backfill.store import open_store
from nograd.tasks.errors import BackfillError, PlanChanged, SourceError
from racing import exit_of, forked
from scoring import MODEL, planned, read_all


@given(
    st.integers(0, 5000),
    st.integers(1, 700),
    st.lists(st.integers(1, 5000), max_size=20).map(lambda edges: sorted(set(edges))),
)
@example(1001, 1000, [])
@example(1, 1, [1])
def test_cuts_cover_all_rows_and_no_chunk_is_much_too_large(rows, per_chunk, edges):
    ends = cuts(rows, per_chunk, edges)
    assert ends == sorted(set(ends))
    assert (ends[-1:] or [0]) == [rows]
    sizes = np.diff([0, *ends])
    assert (sizes >= 1).all()
    assert (sizes <= per_chunk * 1.25).all()


def test_the_tail_is_cut_into_quarters():
    sizes = np.diff([0, *cuts(100_000, 1000)])
    assert set(sizes[:90]) == {1000}
    assert set(sizes[90:]) == {250}
    assert len(sizes) == 90 + 40


def test_a_chunk_ends_where_a_file_or_group_ends_if_that_is_near():
    assert cuts(3000, 1000, [900, 2100]) == [900, 2100, 3000]
    assert cuts(900, 1000) == [900]


@pytest.fixture
def csv(tmp_path):
    (tmp_path / "in.csv").write_text("k,x\n" + "".join(f"{i},{i}\n" for i in range(5000)))
    return tmp_path / "in.csv"


def test_the_same_inputs_make_the_same_plan_byte_by_byte_in_another_process(csv, tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests/tasks/backfill'); from scoring import planned\n"
        f"planned({str(csv)!r}, {str(tmp_path / 'two')!r}, id='k', columns=['x'])"
    )
    planned(csv, tmp_path / "one", id="k", columns=["x"])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"})
    assert (tmp_path / "one" / "_plan.json").read_bytes() == (tmp_path / "two" / "_plan.json").read_bytes()


@pytest.mark.parametrize(
    ("limit", "sample"), [(None, None), (777, None), (None, 300), (4000, 3900), (1, None), (9999, 9999)]
)
def test_limit_and_sample_choose_rows_in_input_order(csv, tmp_path, limit, sample):
    job = planned(csv, tmp_path / "out", id="k", columns=["x"], selection=Selection(limit=limit, sample=sample, seed=3))
    rows = [row["k"] for row in read_all(job)[0]]
    assert len(rows) == job.plan.rows == sum(count for _, count in job.chunk_rows())
    assert rows == sorted(set(rows))
    first = min(limit or 5000, 5000)
    assert job.plan.rows == min(sample or first, first)
    assert max(rows) < first
    if sample is None:
        assert rows == list(range(first))
    other = planned(
        csv, tmp_path / "o2", id="k", columns=["x"], selection=Selection(limit=limit, sample=sample, seed=4)
    )
    assert (other.plan.ranges == job.plan.ranges) == (sample in {None, 9999})


def test_a_small_sample_of_text_reads_little(csv, tmp_path):
    job = planned(csv, tmp_path / "out", selection=Selection(sample=3))
    (extents,) = [job.extents(chunk) for chunk in range(job.plan.chunks)]
    assert sum(extent.end - extent.offset for extent in extents) < csv.stat().st_size / 3


@given(st.integers(0, 40), st.integers(1, 50))
@settings(deadline=None, max_examples=50)
def test_a_sample_is_of_exactly_so_many_rows(rows, sample):
    from nograd.tasks.backfill.draft import _sample

    chosen = _sample(rows, Selection(sample=sample, seed=1))
    assert (len(chosen) if chosen is not None else rows) == min(rows, sample)
    if chosen is not None:
        assert chosen.tolist() == sorted(set(chosen.tolist()) & set(range(rows)))


def test_many_small_files_share_a_chunk_and_large_tables_are_read_in_pieces(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(50):
        pq.write_table(pa.table({"x": [i, i]}), folder / f"{i:02}.parquet")
    monkeypatch.setattr(plans, "_GROUP_ROWS", 8)
    job = planned(folder, tmp_path / "out", rows_per_chunk=30)
    assert job.plan.chunks == 5
    assert [row["x"] for row in read_all(job)[0]] == [i for i in range(50) for _ in range(2)]
    assert [file.name for file in job.all_files()] == [f"{i:02}.parquet" for i in range(50)]
    assert [file.name for file in job.files(6, 12)] == [f"{i:02}.parquet" for i in range(6, 18)]
    with pytest.raises(BackfillError, match="has 5 chunks, there is no chunk 5"):
        job.extents(5)


def test_an_empty_input_is_a_plan_of_one_chunk_without_rows(tmp_path):
    (tmp_path / "in.csv").write_text("x\n")
    job = planned(tmp_path / "in.csv", tmp_path / "out")
    assert (job.plan.rows, job.plan.chunks, list(job.chunk_rows()), job.extents(0)) == (0, 1, [(0, 0)], [])


def test_duplicate_ids_are_refused_by_name_or_counted(tmp_path):
    (tmp_path / "in.csv").write_text("k,x\n" + "".join(f"id{i},1\n" for i in [1, 2, 3, 2, 4, 1, 2]))
    with pytest.raises(
        SourceError, match=r"column 'k' names 3 rows by an id another row before them has \('id1', 'id2'\)"
    ):
        planned(tmp_path / "in.csv", tmp_path / "out", id="k")
    assert planned(tmp_path / "in.csv", tmp_path / "out", id="k", duplicates="keep").plan.inputs.duplicates == 3
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(SourceError, match="column 'path' names 1 rows"):
        planned([tmp_path / "a.jpg"] * 2, tmp_path / "o2")


@given(st.lists(st.one_of(st.none(), st.integers(-50, 50)), max_size=200), st.booleans())
@settings(deadline=None, max_examples=50)
def test_duplicates_are_counted_exactly(values, text):
    from nograd.tasks.backfill import duplicates

    kept = [None if value is None else str(value) if text else value for value in values]
    arrays = [pa.array(kept[i : i + 37], pa.string() if text else pa.int64()) for i in range(0, len(kept), 37)]
    present = [value for value in kept if value is not None]
    count, examples = duplicates.find(lambda: arrays)
    assert count == len(present) - len(set(present))
    assert bool(examples) == bool(count)
    assert all(present.count(example) > 1 for example in examples)


def test_values_that_merely_hash_alike_are_no_duplicates(monkeypatch):
    from nograd.tasks.backfill import duplicates

    monkeypatch.setattr(duplicates, "_hashes", lambda values: np.zeros(len(values), np.int64))
    assert duplicates.find(lambda: [pa.array(["a", "b", "c"])]) == (0, [])
    assert duplicates.find(lambda: [pa.array(["a", "b", "a"])]) == (1, ["a"])


def test_a_folder_takes_one_plan_and_says_how_another_differs(csv, tmp_path):
    job = planned(csv, tmp_path / "out", id="k", columns=["x"], parameters={"top": 5})
    assert planned(csv, tmp_path / "out", id="k", columns=["x"], parameters={"top": 5}).plan == job.plan
    with pytest.raises(PlanChanged) as refusal:
        planned(
            csv,
            tmp_path / "out",
            id="k",
            columns=["x"],
            parameters={"top": 6},
            prediction=pa.string(),
            model=ModelIdentity(name="doubler", parts={"weights": "cd34"}, versions=MODEL.versions),
        )
    message = refusal.value.message
    assert 'model.parts.weights was "ab12", is "cd34"' in message
    assert "parameters.top was 5, is 6" in message
    assert "output.schema.fields" in message


def test_of_racing_planners_one_plan_stands_whole(csv, tmp_path):
    """Ten processes, two different plans: whichever stands there is loaded with its own tables."""

    def plan(number):
        try:
            planned(csv, tmp_path / "out", id="k", columns=["x"], rows_per_chunk=100 + number % 2)
        except PlanChanged:
            return

    pids = [forked(lambda number=number: plan(number)) for number in range(10)]
    assert [exit_of(pid) for pid in pids] == [0] * 10
    job = plans.load(open_store(tmp_path / "out"))
    assert [row["k"] for row in read_all(job)[0]] == list(range(5000))


def test_a_plan_that_was_edited_is_refused(csv, tmp_path):
    planned(csv, tmp_path / "out")
    path = tmp_path / "out" / "_plan.json"
    body = json.loads(path.read_text())
    body["plan"]["rows"] = 1
    path.write_text(json.dumps(body))
    with pytest.raises(BackfillError, match="its sha256 does not fit it"):
        plans.load(open_store(tmp_path / "out"))
    path.write_text("{}")
    with pytest.raises(BackfillError, match="is not a plan of this version"):
        plans.load(open_store(tmp_path / "out"))
    with pytest.raises(BackfillError, match="holds no backfill"):
        plans.load(open_store(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("wrong", [{"rows_per_chunk": 0}, {"batch_rows": -1}, {"selection": Selection(limit=0)}])
def test_numbers_that_make_no_sense_are_refused(csv, wrong):
    options = {"rows_per_chunk": 10, "batch_rows": 10, **wrong}
    with pytest.raises(BackfillError, match="it must be at least 1"):
        draft(survey(csv), model=MODEL, prediction=pa.float64(), **options)
