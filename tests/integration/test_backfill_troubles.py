"""What lies in real folders, and what happens to them meanwhile: each has its outcome, and costs no other row.

=================================== ====================================================================
files that are no images, or huge   error rows; the worker's memory stays as it was
text among numbers                  an error row
an input without rows               refused by name; among files that have some, nothing
ids that occur twice                refused by name, or kept if that is wanted
an input that disappears midway     the run pauses and says which; an image is a row, and an error row
no room for the output              tried again, then paused; once there is room, the same bytes
an output without hard links        the same bytes
=================================== ====================================================================
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import resource
import struct
import time
import zlib
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from PIL import Image

import backfills
from crashes import Moments, read_folder
from nograd.producer import Client
from nograd.tasks.backfill.task import hints_of
from nograd.tasks.errors import BackfillError, SourceError
from waiting import until

pytestmark = pytest.mark.timeout(600)

#: side of a square image of more than a billion pixels
HUGE = 33_000
#: rows of each of three files of texts, and of a chunk
ROWS, CHUNK = 60, 16


@pytest.fixture(scope="module")
def worker(folder, start_worker):
    return start_worker(folder / "models.toml", env={"NOGRAD_LEASE_S": "3"}.items(), lasts=True)


@pytest.fixture(scope="module")
def client(redis_url, worker):
    with Client(redis_url) as client:
        yield client


@pytest.fixture
def moments(folder):
    moments = Moments(folder)
    yield moments
    moments.clear()


@pytest.fixture(scope="module")
def undisturbed(client, tmp_path_factory):
    """Three files of texts, scored while nothing happens. Parts are some kilobytes."""
    source, chance = tmp_path_factory.mktemp("texts"), random.Random(0)
    for file, name in enumerate("abc"):
        rows = [{"n": file * ROWS + n, "text": chance.randbytes(n).hex()} for n in range(ROWS)]
        (source / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    job = backfills.planned(client, "scored", source, out, CHUNK, id="n", columns=["text"], join=["text"])
    backfills.run(client, job)
    return job


def check_same(job, undisturbed):
    """Every row once, every byte the same."""
    assert sorted(backfills.ids(job)) == list(range(3 * ROWS))
    assert backfills.committed(job) == backfills.committed(undisturbed)
    until(lambda: not job.store.names("_staging"), "the removal of what lost")


def table(out):
    return ds.dataset(out / "parts").to_table()


# -- what lies in a folder ---------------------------------------------------------------------------------------------


def file_of(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def huge_png():
    """A whole and valid one, black on black, in a few hundred kilobytes: who decodes it needs gigabytes."""
    packer, lines = zlib.compressobj(1), bytes(1 + HUGE // 8 + 1) * 100
    pixels = b"".join([*(packer.compress(lines) for _ in range(HUGE // 100)), packer.flush()])

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", HUGE, HUGE, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def peak_mb(process):
    """The most memory a process has had resident."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024


def test_corrupt_images_and_one_of_a_billion_pixels_are_error_rows_and_take_no_memory(
    redis_url, worker, client, tmp_path
):
    source = tmp_path / "images"
    source.mkdir()
    for n in range(300):
        (source / f"{n:03}.png").write_bytes(file_of(Image.new("RGB", (n + 1, 2))))
    photo = file_of(Image.effect_noise((64, 64), 50), "JPEG")
    bad = {7: b"no image", 120: b"", 211: photo[: len(photo) // 2], 250: huge_png()}
    for n, data in bad.items():
        (source / f"{n:03}.png").write_bytes(data)
    out, before = tmp_path / "out", peak_mb(worker.process)
    code, end = backfills.nograd(redis_url, "run", "area", source, out, "--chunk-rows", 40)
    assert (code, end["rows_ok"], end["rows_err"]) == (1, 296, 4)
    assert peak_mb(worker.process) < before + 300
    good = [n for n in range(300) if n not in bad]
    assert [Path(path).stem for path in table(out)["path"].to_pylist()] == [f"{n:03}" for n in good]
    assert table(out)["prediction"].to_pylist() == [2.0 * (n + 1) for n in good]
    code, told = backfills.nograd(redis_url, "errors", out)
    assert (code, told["rows"]) == (0, 4)
    reasons = [
        "not an image:",
        "the JPEG image is damaged: ",
        "the file is empty",
        "the image cannot be opened: Image size",
    ]
    for reason, message in zip(sorted(reasons), sorted(each["message"] for each in told["clusters"]), strict=True):
        assert message.startswith(reason)
    assert backfills.nograd(redis_url, "verify", out)[0] == 0


def test_csv_with_quoted_newlines_and_a_row_of_text_among_numbers(client, tmp_path):
    notes = [["plain", "two\nlines", 'a "quoted" word', "comma, comma", "\r\n", ""][n % 6] for n in range(100)]
    numbers = [[n, "oops" if n == 57 else n / 2, -n, 1] for n in range(100)]
    lines = [
        ",".join([f"k{n}", *map(str, numbers[n]), '"' + notes[n].replace('"', '""') + '"']) + "\n" for n in range(100)
    ]
    (tmp_path / "in.csv").write_text("key,a,b,c,d,note\n" + "".join(lines), newline="")
    job = client.backfill(
        "linear", tmp_path / "in.csv", tmp_path / "out",
        id="key", columns=list("abcd"), join=["note"], rows_per_chunk=16,
    )  # fmt: skip
    end = job.run(interval_s=0.1)
    good = [n for n in range(100) if n != 57]
    assert (end.progress.rows_ok, end.progress.rows_err) == (99, 1)
    assert table(tmp_path / "out").to_pydict() == {
        "key": [f"k{n}" for n in good],
        "note": [notes[n] for n in good],
        "prediction": [n + 2 * n / 2 - 3 * n + 4 for n in good],
    }
    (failed,) = backfills.errors(job.job)
    assert (failed["id"], failed["stage"], failed["message"]) == ("k57", "read", "column 'b': 'oops' is not a number")
    assert job.verify().problems == []


def test_a_sample_that_fails_for_one_reason_says_it_once(client, tmp_path):
    (tmp_path / "in.csv").write_text("key,a,b\n" + "".join(f"k{n},{n},1\n" for n in range(100)))
    with pytest.raises(BackfillError) as failed:
        client.backfill("linear", tmp_path / "in.csv", tmp_path / "out", id="key").plan()
    assert re.search(r"got a prediction: k0 and 99 others: .*2 values", failed.value.message)
    assert failed.value.message.count("values") == 1
    assert not (tmp_path / "out").exists()


def test_files_without_rows_are_refused_by_name_and_cost_nothing_among_others(client, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "b.csv").touch()
    (source / "c.csv").write_text("a,b,c,d\n")
    for alone in (source / "b.csv", source / "c.csv", source):
        with pytest.raises(SourceError, match=f"^{alone}: there are no rows to score"):
            client.backfill("linear", alone, out).run()
    assert not out.exists()
    (source / "a.csv").write_text("a,b,c,d\n1,0,0,0\n2,0,0,0\n")
    (source / "d.csv").write_text("a,b,c,d\n3,0,0,0\n")
    job = client.backfill("linear", source, out)
    assert job.run(interval_s=0.1).state == "done"
    assert table(out).to_pydict() == {"row": [0, 1, 2], "prediction": [1.0, 2.0, 3.0]}


def test_ids_that_occur_twice_are_refused_by_name_or_kept(client, tmp_path):
    keys = [f"k{n % 45}" for n in range(50)]
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"key": key, "text": "x" * n}) + "\n" for n, key in enumerate(keys))
    )
    asked = ("scored", tmp_path / "in.jsonl", tmp_path / "out")
    with pytest.raises(SourceError, match=r"'key' names 5 rows by an id another row before them has \('k0', 'k1',"):
        client.backfill(*asked, id="key", rows_per_chunk=8).run()
    assert not (tmp_path / "out").exists()
    job = client.backfill(*asked, id="key", rows_per_chunk=8, duplicates="keep")
    assert job.run(interval_s=0.1).state == "done"
    assert job.job.plan.inputs.duplicates == 5
    found = table(tmp_path / "out")
    assert found["key"].to_pylist() == keys
    assert found["prediction"].to_pylist() == [backfills.score("x" * n) for n in range(50)]
    assert job.verify().problems == []


# -- what happens meanwhile --------------------------------------------------------------------------------------------


def test_a_file_that_disappears_midway_pauses_the_run_until_it_is_back(client, undisturbed, moments, tmp_path):
    job = read_folder(undisturbed, tmp_path / "out")
    moments.arm("forward")
    window = backfills.drive(client, job, until=moments.reached)
    last = Path(job.plan.source.urls[0]) / "c.jsonl"
    last.rename(tmp_path / "elsewhere")
    moments.release()
    try:
        with pytest.raises(backfills.Paused, match=r"c\.jsonl is gone since the plan was made"):
            backfills.drive(client, job)
    finally:
        (tmp_path / "elsewhere").rename(last)
    window.wish = "run"
    backfills.run(client, job)
    check_same(job, undisturbed)


def test_an_image_that_disappears_midway_is_an_error_row(client, moments, tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    for n in range(64):
        (source / f"{n:02}.png").write_bytes(file_of(Image.new("RGB", (n + 1, 2))))
    job = backfills.planned(client, "area", source, tmp_path / "out", 8, sampled=4)
    moments.arm("an image")
    window = backfills.send_first(client, job)
    until(moments.reached)
    (source / "63.png").unlink()
    moments.release()
    backfills.let_go_on(window, job)
    found = backfills.run(client, job)
    assert found["prediction"].to_pylist() == [2.0 * (n + 1) for n in range(63)]
    (failed,) = backfills.errors(job)
    assert (Path(failed["id"]).name, failed["stage"]) == ("63.png", "prepare")
    assert failed["message"].startswith("cannot read the file: No such file")


def test_a_full_disk_pauses_the_run_until_there_is_room(client, undisturbed, small_disk):
    job = read_folder(undisturbed, small_disk / "out")
    window = backfills.send_first(client, job)
    until(lambda: job.store.names("_commits"))
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    backfills.let_go_on(window, job)
    with pytest.raises(backfills.Paused, match="No space left on device"):
        backfills.drive(client, job)
    assert job.store.size("_SUCCESS") is None
    filler.unlink()
    window.wish = "run"
    backfills.run(client, job)
    check_same(job, undisturbed)


def test_room_that_is_made_while_a_chunk_is_tried_again_is_enough(redis_url, client, worker, undisturbed, tmp_path):
    """Of a disk with a quota for each file, which needs no right to mount anything."""
    job = read_folder(undisturbed, tmp_path / "out")
    pid, (_, hard) = worker.process.pid, resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, hard))
    try:
        troubles = f"nograd:backfill:{hints_of(job)}:troubles"
        backfills.drive(client, job, until=lambda: client.app.backend.client.exists(troubles))
        tried = time.monotonic() + 1.5  # shorter than the first pause
        backfills.drive(client, job, until=lambda: time.monotonic() > tried)
        assert job.store.names("_commits") == []
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    backfills.run(client, job)  # never paused
    check_same(job, undisturbed)


def test_an_output_without_hard_links_has_the_same_bytes(client, folder, worker, start_worker, undisturbed, tmp_path):
    """Last in this file: the worker that has links makes room for one that has none."""
    worker.stop()
    env = {"NOGRAD_LEASE_S": "3"}
    start_worker(folder / "models.toml", app="unlinkable_app", cwd=Path(backfills.__file__).parent, env=env.items())
    job = read_folder(undisturbed, tmp_path / "out")
    backfills.run(client, job)
    check_same(job, undisturbed)
