"""Resume, progress, finalize, verify: what they promise, on backfills from end to end."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from nograd.tasks.backfill import fingerprint
from nograd.tasks.backfill.commit import commit, committed_chunks, records
from nograd.tasks.backfill.finalize import finalize
from nograd.tasks.backfill.output import PartWriter
from nograd.tasks.backfill.plan import ModelIdentity, load
from nograd.tasks.backfill.progress import Observer, as_json, progress
from nograd.tasks.backfill.sources import open_reader
from nograd.tasks.backfill.store import open_store
from nograd.tasks.backfill.verify import verify
from nograd.tasks.errors import BackfillError, NotFinished, OutputError, PlanChanged, VerificationFailed
from racing import exit_of, forked
from scoring import MODEL, planned, run


@pytest.fixture
def csv(tmp_path):
    lines = [f"id{i},{i}" for i in range(1000)]
    lines[123] = "id123,oops"
    (tmp_path / "in.csv").write_text("k,x\n" + "\n".join(lines) + "\n")
    return tmp_path / "in.csv"


@pytest.fixture
def job(csv, tmp_path):
    return planned(csv, tmp_path / "out", id="k", columns=["x"])


def test_the_manifest_is_the_same_whoever_ran_which_chunk_in_which_order(job, csv, tmp_path):
    other = planned(csv, tmp_path / "other", id="k", columns=["x"])
    run(job)
    chunks = list(range(other.plan.chunks))
    pids = [
        forked(lambda n=n: run(other, chunks=chunks[::-1][n::3] + chunks[:2], worker=f"w{n}", rows=5 + n))
        for n in range(3)
    ]
    assert [exit_of(pid) for pid in pids] == [0] * 3
    one, two = finalize(job), finalize(other)
    assert one == two
    read = [(folder / "_MANIFEST.json").read_bytes() for folder in (tmp_path / "out", tmp_path / "other")]
    assert read[0] == read[1]
    for entry in one.parts:
        assert job.store.read(entry["name"]) == other.store.read(entry["name"])
    assert verify(other).problems == []
    receipt = json.loads(other.store.read("_RECEIPT.json"))
    assert sum(receipt["workers"].values()) == other.plan.chunks
    assert set(receipt["workers"]) <= {"w0", "w1", "w2"}


def test_it_cannot_be_closed_before_it_is_whole_and_twice_is_once(job):
    run(job, chunks=range(3))
    with pytest.raises(NotFinished, match=rf"{job.plan.chunks - 3} of {job.plan.chunks} chunks are not committed yet"):
        finalize(job)
    assert job.store.size("_SUCCESS") is None
    run(job)
    job.store.stage(b"left by somebody who died")
    first = finalize(job)
    before = {name: job.store.read(name) for name in ("_MANIFEST.json", "_RECEIPT.json", "_SUCCESS")}
    assert job.store.names("_staging") == []
    assert finalize(job) == first
    assert {name: job.store.read(name) for name in before} == before
    assert (first.rows, first.rows_ok, first.rows_err) == (1000, 999, 1)


def test_an_empty_input_ends_like_any_other(tmp_path):
    (tmp_path / "in.csv").write_text("x\n")
    job = run(planned(tmp_path / "in.csv", tmp_path / "out"))
    assert finalize(job).rows == 0
    report = verify(job)
    assert (report.problems, report.rows_ok) == ([], 0)
    assert pyarrow.dataset.dataset(tmp_path / "out" / "parts").to_table().schema.names == ["row", "prediction"]


def test_verify_finds_nothing_in_what_is_whole_and_counts_every_row(job):
    run(job, chunks=range(4))
    halfway = verify(job)
    assert halfway.problems == []
    assert halfway.chunks == 4
    finalize(run(job))
    seen = []
    report = verify(job, each=seen.append)
    report.check()
    assert (report.rows_ok, report.rows_err) == (999, 1)
    assert seen == list(range(job.plan.chunks))


def damaged_part(out):
    path = out / "parts" / "part-000002.parquet"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def another_s_part(out):
    shutil.copy(out / "parts" / "part-000002.parquet", out / "parts" / "part-000099.parquet")


def lost_errors(out):
    (out / "errors" / "part-000001.jsonl").unlink()


def lost_record(out):
    (out / "_commits" / "000003.json").unlink()


def edited_manifest(out):
    path = out / "_MANIFEST.json"
    path.write_text(path.read_text().replace("999", "998"))


def lost_manifest(out):
    (out / "_MANIFEST.json").unlink()


def wrong_success(out):
    (out / "_SUCCESS").write_text("yes")


def rows_of_another_chunk(out):
    """Record and part agree, but the rows are not those of the plan."""
    record = json.loads((out / "_commits" / "000005.json").read_text())
    other = json.loads((out / "_commits" / "000004.json").read_text())
    shutil.copy(out / "parts" / "part-000004.parquet", out / "parts" / "part-000005.parquet")
    record["part"].update(sha256=other["part"]["sha256"], bytes=other["part"]["bytes"])
    (out / "_commits" / "000005.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (damaged_part, r"chunk 2: parts/part-000002.parquet is not what was committed \(sha256\)"),
        (another_s_part, "parts/part-000099.parquet belongs to no commit"),
        (lost_errors, "chunk 1: errors/part-000001.jsonl is gone"),
        (lost_record, "chunk 3: is not committed, but the output is closed"),
        (edited_manifest, "_MANIFEST.json is not the manifest of the commit records"),
        (lost_manifest, "_MANIFEST.json is gone"),
        (wrong_success, "_SUCCESS does not name that manifest"),
        (rows_of_another_chunk, "chunk 5: ids are not those of the inputs: 'id400' instead of 'id500'"),
    ],
)
def test_verify_names_what_is_wrong(job, tmp_path, damage, finding):
    finalize(run(job))
    damage(tmp_path / "out")
    with pytest.raises(VerificationFailed, match=finding):
        verify(job).check()


def test_progress_is_told_by_the_commit_records_alone(job):
    now = progress(job)
    assert (now.rows, now.rows_ok, now.chunks_done, now.rows_per_s, now.eta_low_s, now.stalled) == (
        1000,
        0,
        0,
        None,
        None,
        False,
    )
    observer = Observer(job, clock=lambda: 30.0)
    run(job, chunks=range(2), worker="a")
    assert observer.look().rows_per_s is None  # not before three chunks
    run(job, chunks=range(2, 5), worker="b")
    now = observer.look()
    assert now == progress(job, clock=lambda: 30.0)  # whoever looks, and whenever he began to
    assert (now.rows_ok, now.rows_err, now.chunks_done, now.workers) == (499, 1, 5, {"a": 2, "b": 3})
    assert now.rows_per_s == pytest.approx(10.0)  # 100 rows every 10 s
    assert now.eta_low_s <= 50 <= now.eta_high_s
    assert now.bytes == sum(job.store.size(f"parts/{name}") for name in job.store.names("parts")) + job.store.size(
        "errors/part-000001.jsonl"
    )
    assert not now.stalled
    assert observer.missing() == list(range(5, job.plan.chunks))
    late = Observer(job, clock=lambda: 1000.0)
    assert late.look().stalled
    assert late.look(since=900.0).stalled
    assert not late.look(since=950.0).stalled  # it had been paused, and goes on since then
    run(job)
    done = late.look()
    assert (done.done, done.eta_high_s, done.stalled) == (True, 0.0, False)
    assert as_json(done)["done"]


def test_each_record_is_read_once_however_often_somebody_looks(job, monkeypatch):
    run(job, chunks=range(3))
    observer = Observer(job)
    observer.look()
    read = []
    whole = type(job.store).read
    monkeypatch.setattr(type(job.store), "read", lambda self, name: read.append(name) or whole(self, name))
    run(job, chunks=[3])
    read.clear()
    observer.look()
    assert read == ["_commits/000003.json"]


def changed_size(csv):
    with csv.open("a") as file:
        file.write("new,1\n")


def touched(csv):
    before = csv.stat()
    os.utime(csv, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


def gone(csv):
    csv.rename(csv.with_suffix(".old"))
    (csv.parent / "other.csv").write_text("k,x\n")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (changed_size, r"in.csv had \d+ bytes when the plan was made, has \d+"),
        (touched, r"in.csv was written after the plan was made \(same size; dated 20.*:2[12].5, now 20.*:2[12].5\); "),
        (gone, "in.csv is gone since the plan was made; other.csv is new since the plan was made; "),
    ],
)
def test_a_resume_with_other_inputs_is_refused_and_says_which(tmp_path, csv, change, sentence):
    folder = tmp_path / "folder"
    folder.mkdir()
    csv = csv.rename(folder / "in.csv")
    os.utime(csv, (1_700_000_001.5, 1_700_000_001.5))
    planned(folder, tmp_path / "out", id="k", columns=["x"])
    job = load(open_store(tmp_path / "out"))
    fingerprint.check(job, model=MODEL, parameters={})
    change(csv)
    with pytest.raises(PlanChanged, match=f"{sentence}.*restore the inputs with their dates .*--content.*a new run"):
        fingerprint.check(job)


def test_with_hashes_a_copy_with_a_new_date_passes_and_another_content_does_not(csv, tmp_path):
    job = planned(csv, tmp_path / "out", id="k", columns=["x"], content=True)
    touched(csv)
    fingerprint.check(job)
    text = csv.read_text()
    csv.write_text(text.replace("id7,7\n", "id7,8\n"))
    with pytest.raises(
        PlanChanged, match=r"in.csv has another content than when the plan was made; restore the inputs;"
    ):
        fingerprint.check(job)


def test_many_may_close_an_output_at_once(tmp_path, csv):
    job = run(planned(csv, tmp_path / "out", id="k", columns=["x"]))
    for _ in range(5):
        with ThreadPoolExecutor(8) as threads:
            manifests = list(threads.map(lambda _: finalize(job), range(16)))
        assert all(manifest == manifests[0] for manifest in manifests)
    assert job.store.size("_SUCCESS")


def test_a_resume_with_another_model_or_parameters_is_refused_and_says_what(tmp_path, csv):
    before = ModelIdentity(name="m", parts={"weights": "ab12", "dtype": '"float32"'}, versions={"torch": "2.15"})
    now = ModelIdentity(name="m", parts={"weights": "cd34", "top": "3"}, versions={"torch": "2.16"})
    job = planned(csv, tmp_path / "out", id="k", columns=["x"], model=before, parameters={"top": 5})
    fingerprint.check(job, model=before, parameters={"top": 5})
    with pytest.raises(PlanChanged) as refusal:
        fingerprint.check(job, model=now, parameters={"top": 6})
    for what in (
        "model m: weights was ab12, is cd34",
        'model m: dtype is gone (was "float32")',
        "model m: top is new (3)",
        "parameter top was 5, is 6",
    ):
        assert what in refusal.value.message
    assert fingerprint.version_changes(before.versions, {"torch": "2.16", "numpy": "3"}) == [
        "torch 2.16 instead of 2.15"
    ]


@pytest.mark.parametrize("out", ["in/out", "in", "", "other/parts"])
def test_an_output_among_the_inputs_is_refused(tmp_path, out):
    for folder in ("in", "other/parts"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.csv").write_text("x\n1\n")
    source = tmp_path / ("other/parts" if out.startswith("other") else "in")
    # Inputs below the output would be no harm to each other, but nothing is written among files of others.
    with pytest.raises(OutputError, match="is among the inputs" if out else r"is not empty .*there: in, other\)"):
        planned(source, tmp_path / "other" if out.startswith("other") else tmp_path / out)
    assert not list(tmp_path.rglob("_*"))


def test_a_whole_backfill_on_an_object_store(csv):
    fsspec.filesystem("memory").store.clear()
    job = planned(csv, "memory://bucket/out", id="k", columns=["x"])
    assert job.store.probe() == "put"
    run(job, chunks=range(4))
    late = PartWriter(job.plan, 2, job.rows_of(2))
    for piece in open_reader(job).slices(job.extents(2)):
        late.add(piece, [0.0] * piece.good.num_rows)
    assert not commit(job.store, job.plan, 2, late.finish(), started_at=0, ended_at=1, worker="late").won
    run(load(open_store("memory://bucket/out")))
    finalize(job)
    report = verify(job)
    report.check()
    assert (report.rows_ok, report.rows_err) == (999, 1)
    assert {record.worker for record in records(job.store, job.plan)} == {"w"}
    assert job.store.names("_staging") == []
    parts = pyarrow.dataset.dataset("/bucket/out/parts", filesystem=fsspec.filesystem("memory"))
    assert parts.count_rows() == 999
    fsspec.filesystem("memory").store.clear()


def test_a_file_url_is_a_local_path(csv, tmp_path):
    job = run(planned(csv, f"file://{tmp_path}/out", id="k", columns=["x"]), chunks=[0])
    assert committed_chunks(job.store) == [0]
    assert pq.read_table(tmp_path / "out" / "parts").num_rows == 100


def test_the_output_of_another_plan_is_not_touched(job, csv, tmp_path):
    run(job, chunks=[0])
    planned(csv, tmp_path / "other", id="k", columns=["x"], model=ModelIdentity(name="other"))
    shutil.copytree(tmp_path / "other", tmp_path / "out", dirs_exist_ok=True)
    other = load(open_store(tmp_path / "out"))
    with pytest.raises(BackfillError, match=f"belongs to plan {job.plan.job}"):
        run(other, chunks=[0])
