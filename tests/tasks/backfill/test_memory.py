"""Memory does not grow with the rows: planning and reading millions of them, each in a process of its own.

Measured as the growth of the largest resident size, between a small input and one twenty times larger: what the
libraries themselves take is in both.
"""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

#: MiB the large input may take more than the small one
ALLOWED_MIB = 40

WORK = """
import resource, sys
sys.path.insert(0, "tests/tasks/backfill")
import pyarrow as pa
from scoring import planned
from nograd.tasks.backfill.commit import commit
from nograd.tasks.backfill.output import PartWriter
from nograd.tasks.backfill.sources import open_reader

source, out = sys.argv[1:]
job = planned(source, out, id="k", columns=["x"], rows_per_chunk=20_000)
reader = open_reader(job)
rows = 0
for chunk in range(job.plan.chunks):
    writer = PartWriter(job.plan, chunk, job.rows_of(chunk))
    for piece in reader.slices(job.extents(chunk), 4096):
        writer.add(piece, piece.good.column("x").to_numpy() * 2.0)
        rows += len(piece)
    commit(job.store, job.plan, chunk, writer.finish(), started_at=0, ended_at=1, worker="w")
pa.default_memory_pool().release_unused()
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def write(kind, path, rows):
    with path.open("wb") as file:
        if kind == "parquet":
            with pq.ParquetWriter(file, pa.schema({"k": pa.int64(), "x": pa.float64()})) as writer:
                for start in range(0, rows, 50_000):
                    numbers = np.arange(start, min(start + 50_000, rows))
                    writer.write_table(pa.table({"k": numbers, "x": numbers / 7}))
        else:
            row = {"csv": "{0},{1}\n", "jsonl": '{{"k": {0}, "x": {1}}}\n'}[kind]
            file.write(b"k,x\n" if kind == "csv" else b"")
            for start in range(0, rows, 50_000):
                end = min(start + 50_000, rows)
                file.write("".join(row.format(i, i / 7) for i in range(start, end)).encode())


@pytest.mark.parametrize(("kind", "rows"), [("parquet", 2_000_000), ("csv", 1_000_000), ("jsonl", 1_000_000)])
def test_a_large_input_takes_hardly_more_than_a_small_one(tmp_path, kind, rows):
    peaks = []
    for count in (rows // 20, rows):
        write(kind, tmp_path / f"{count}.{kind}", count)
        done = subprocess.run(
            [sys.executable, "-c", WORK, tmp_path / f"{count}.{kind}", tmp_path / f"out{count}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        scored, peak = map(int, done.stdout.split())
        assert scored == count
        peaks.append(peak)
    assert peaks[1] - peaks[0] < ALLOWED_MIB, peaks
