"""Backfills from and into a bucket: a real S3 server, real workers, and what happens to them.

What is committed there is what the same backfill commits into a local folder, byte by byte, whoever dies over it.
"""

from __future__ import annotations

import io

import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

import backfills
from crashes import Fleet
from nograd.producer import Client
from nograd.tasks.backfill import layout
from nograd.tasks.backfill import plan as plans
from nograd.tasks.backfill.commit import find_record
from nograd.tasks.backfill.draft import draft
from nograd.tasks.backfill.sources import survey
from nograd.tasks.backfill.store import open_store
from nograd.tasks.backfill.verify import verify
from waiting import until

#: rows of the backfill, none a multiple of the chunk, and of a chunk, none a multiple of the batch
ROWS, CHUNK = 100, 36
SOURCE = "s3://data/in"
BAD = {7, 57}
#: a record that is held on its way
FIRST = layout.commit_name(0)


@pytest.fixture(scope="module")
def source(object_store):
    """Two files in a bucket."""
    texts = ["raise" if n in BAD else "x" * (n % 23) for n in range(ROWS)]
    table = pa.table({"n": range(ROWS), "text": texts})
    fs = fsspec.filesystem("s3")
    for name, part in (("a", table.slice(0, 60)), ("b", table.slice(60))):
        pq.write_table(part, sink := io.BytesIO())
        fs.pipe_file(f"{SOURCE}/{name}.parquet", sink.getvalue())
    return SOURCE


@pytest.fixture(scope="module")
def fleet(source, folder, start_worker):
    return Fleet(start_worker, folder / "models.toml")


@pytest.fixture(scope="module")
def client(redis_url, folder, fleet):
    with Client(redis_url, models=folder / "models.toml") as client:
        yield client


@pytest.fixture(scope="module")
def local(client, source, tmp_path_factory):
    """What comes of it in a folder of this machine, when nothing happens."""
    job = backfills.planned(client, "scored", source, tmp_path_factory.mktemp("local") / "out", CHUNK, id="n")
    backfills.run(client, job)
    return job


@pytest.fixture
def job(local, source, tmp_path):
    """The same backfill into a bucket, not yet begun."""
    plan = local.plan
    made = draft(
        survey(source, id="n"),
        rows_per_chunk=CHUNK,
        batch_rows=plan.batch_rows,
        model=plan.model,
        prediction=plan.output.schema.to_arrow().field("prediction").type,
    )
    assert made.plan.sha256 == plan.sha256
    return plans.save(open_store(f"s3://data/{tmp_path.name}"), made)


def check_same(job, local):
    verify(job).check()
    assert backfills.committed(job) == backfills.committed(local)
    until(lambda: not job.store.names(layout.STAGING), "the removal of what lost")


def test_a_whole_backfill_from_the_command_line(redis_url, client, source, tmp_path):
    out = f"s3://data/{tmp_path.name}"
    code, end = backfills.nograd(
        redis_url, "run", "scored", f"{source}/*.parquet", out, "--id", "n", "--chunk-rows", CHUNK
    )
    assert (code, end["rows_ok"], end["rows_err"], end["state"]) == (1, ROWS - 2, 2, "done")
    parts = ds.dataset(out.removeprefix("s3://") + "/parts", filesystem=fsspec.filesystem("s3"))
    found = parts.to_table().sort_by("n").to_pylist()
    assert found == [{"n": n, "prediction": backfills.score("x" * (n % 23))} for n in range(ROWS) if n not in BAD]
    code, told = backfills.nograd(redis_url, "retry", out)
    assert (code, told["rows_err"], told["retries"]) == (1, 2, 1)
    there = client.backfill_at(out)
    assert {each.id for cluster in there.errors() for each in cluster.samples} == BAD
    assert (there.verify().problems, there.verify().rows_ok) == ([], ROWS - 2)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_workers_die_and_the_record_of_one_arrives_before_or_after_another_s(
    client, fleet, object_store, local, job, late
):
    fleet.both()
    object_store.hold(FIRST)
    backfills.drive(client, job, until=object_store.held)
    fleet.kill()
    assert job.store.size(FIRST) is None
    if not late:
        object_store.release()
        assert job.store.size(FIRST)
    fleet.replace()
    backfills.drive(client, job)
    if late:
        object_store.release()
    check_same(job, local)


def test_of_two_workers_with_one_chunk_the_first_record_wins_and_the_other_does_no_harm(
    client, fleet, object_store, local, job
):
    fleet.both()
    object_store.hold(FIRST)
    window = backfills.drive(client, job, until=object_store.held)
    # Nobody remembers that it is being run; again and again, for the worker that is held renews its claim.
    backfills.drive(client, job, until=window.clear)
    winner = find_record(job.store, job.plan, 0)
    object_store.release()
    check_same(job, local)
    assert find_record(job.store, job.plan, 0) == winner
    assert all(worker.alive() for worker in fleet.workers)


def test_where_no_backfill_can_be_held_is_said_before_anything_else(redis_url, source):
    for out, told in (("s3://careless/out", "name a store that has them"), ("s3://nosuch/out", "make it first")):
        code, document = backfills.nograd(redis_url, "plan", "unknown", source, out)
        assert (code, document["error"]["code"]) == (2, "output")
        assert told in document["error"]["message"]
