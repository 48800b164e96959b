"""Every format hands out each of its rows once, in order, as a value or as a failure that says why."""

import json
import os
import random
from pathlib import Path

import botocore.exceptions
import fsspec
import fsspec.implementations.memory
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nograd.tasks.backfill.draft import head
from nograd.tasks.backfill.sources import reader_of, survey
from nograd.tasks.backfill.sources.images import read_image
from nograd.tasks.backfill.sources.parquet import ParquetReader
from nograd.tasks.errors import InvalidInput, PlanChanged, SourceError
from scoring import planned, read_all


@pytest.fixture(scope="module", autouse=True)
def _memory():
    yield
    fsspec.filesystem("memory").store.clear()


def test_csv_with_quoted_newlines_and_a_row_of_text_among_numbers(tmp_path):
    rows = [f'{i},{i}.5,"line one {i}\nline two, with a comma"' for i in range(1000)]
    rows[500] = '500,oops,"x"'
    (tmp_path / "in.csv").write_text("key,x,note\n" + "\n".join(rows) + "\n")
    job = planned(tmp_path / "in.csv", tmp_path / "out", id="key", columns=["x"], join=["note"])
    assert dict(job.plan.source.schema.fields) == {"key": "int64", "x": "double", "note": "string"}
    good, failures = read_all(job)
    expected = [
        {"key": i, "x": i + 0.5, "note": f"line one {i}\nline two, with a comma"} for i in range(1000) if i != 500
    ]
    assert good == expected
    assert [(f.row, f.id, f.stage) for f in failures] == [(500, 500, "read")]
    assert failures[0].message == "column 'x': 'oops' is not a number"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"3,1,2,4", "the record has 4 fields, the header 3; it begins at byte 36 of '"),
        (b"3", "the record has 1 fields, the header 3"),
        (b"3,\xff\xfe,2", "the record is no UTF-8"),
        (b"3,,2", "column 'x' has no value"),
        (b"3,1e999999x,2", "column 'x': '1e999999x' is not a number"),
    ],
)
def test_a_bad_record_of_csv_is_a_failure_of_its_row_alone(tmp_path, record, message):
    lines = [b"key,x,y", *[b"%d,%d.5,1" % (i, i) for i in range(3)], record, *[b"%d,1.5,1" % i for i in range(4, 9)]]
    (tmp_path / "in.csv").write_bytes(b"\r\n".join(lines))
    good, failures = read_all(planned(tmp_path / "in.csv", tmp_path / "out", id="key", columns=["x"]))
    assert [row["key"] for row in good] == [0, 1, 2, 4, 5, 6, 7, 8]
    assert [failure.row for failure in failures] == [3]
    assert failures[0].message.startswith(message)


def test_the_id_and_joined_columns_of_csv_keep_what_was_written(tmp_path):
    (tmp_path / "in.csv").write_text("zip,x,code,n,long\n007,1,0010,3,1234567890123456789\n12,2.5,7,4,1.5\n")
    job = planned(tmp_path / "in.csv", tmp_path / "out", id="zip", columns=["x"], join=["code", "n", "long"])
    assert read_all(job)[0] == [
        {"zip": "007", "x": 1.0, "code": "0010", "n": 3, "long": "1234567890123456789"},
        {"zip": "12", "x": 2.5, "code": "7", "n": 4, "long": "1.5"},
    ]


def test_csv_options_byte_order_mark_tabs_and_no_header(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbfx\ty\r\n1\t2\r\n")
    assert read_all(planned(tmp_path / "a.tsv", tmp_path / "o1"))[0] == [{"row": 0, "x": 1, "y": 2}]
    (tmp_path / "b.csv").write_text("1;2\n3;4\n")
    job = planned(tmp_path / "b.csv", tmp_path / "o2", options={"delimiter": ";", "header": False}, columns=["f1"])
    assert read_all(job)[0] == [{"row": 0, "f1": 2}, {"row": 1, "f1": 4}]


def test_several_csv_files_with_columns_in_another_order_and_an_empty_one(tmp_path):
    (tmp_path / "1.csv").write_text("x,y\n1,2\n")
    (tmp_path / "2.csv").write_text("")
    (tmp_path / "3.csv").write_text("y,x\n4,3\n6,5\n")
    job = planned(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", columns=["x"])
    assert read_all(job)[0] == [{"row": 0, "x": 1}, {"row": 1, "x": 3}, {"row": 2, "x": 5}]


def test_jsonl_with_a_bad_line_text_among_numbers_and_dates(tmp_path):
    lines = [json.dumps({"k": f"a{i}", "x": i if i % 2 else i + 0.5, "day": "2024-01-02"}) for i in range(300)]
    lines[7] = '{"k": "a7", "x": "text", "day": ""}'
    lines[8] = "{not json"
    lines[9] = "[1, 2]"
    lines[10] = '{"k": "a10"}'
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    job = planned(tmp_path / "in.jsonl", tmp_path / "out", id="k", columns=["x"], join=["day"])
    good, failures = read_all(job)
    assert [row["k"] for row in good] == [f"a{i}" for i in range(300) if i not in {7, 8, 9, 10}]
    assert good[0] == {"k": "a0", "x": 0.5, "day": "2024-01-02"}
    assert good[1]["x"] == 1.0
    assert [(f.row, f.id) for f in failures] == [(7, "a7"), (8, None), (9, None), (10, "a10")]
    assert failures[0].message == "column 'x': 'text' is not a number"
    assert failures[1].message.startswith("the line is no JSON")
    place = len("\n".join(lines[:9])) + 1
    where = f"it begins at byte {place} of '{tmp_path / 'in.jsonl'}'"
    assert failures[2].message == f"the line is no JSON object but a list; {where}"
    assert failures[3].message == "column 'x' has no value"


def test_jsonl_keeps_lists_and_objects(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"v": [1, 2.5], "o": {"a": 1}}\n{"v": [], "o": {"b": "x"}}\n')
    good, failures = read_all(planned(tmp_path / "in.jsonl", tmp_path / "out"))
    assert failures == []
    assert [row["v"] for row in good] == [[1.0, 2.5], []]
    assert good[1]["o"] == {"a": None, "b": "x"}


def test_openai_lines_are_recognised_and_bodies_stay_as_they_are(tmp_path):
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/x", "body": {"model": "m", "input": f"té {i}"}}
        for i in range(20)
    ]
    text = [json.dumps(line) for line in lines]
    text[3] = '{"custom_id": 3, "body": {}}'
    (tmp_path / "in.jsonl").write_text("\n".join(text))
    job = planned(tmp_path / "in.jsonl", tmp_path / "out")
    assert (job.plan.source.kind, job.plan.output.format, job.plan.source.id) == ("openai", "openai", "custom_id")
    good, failures = read_all(job)
    assert [(row["custom_id"], json.loads(row["body"])) for row in good] == [
        (line["custom_id"], line["body"]) for i, line in enumerate(lines) if i != 3
    ]
    assert [failure.row for failure in failures] == [3]


def table_of(rows, start=0):
    return pa.table({"k": pa.array(range(start, start + rows)), "x": pa.array([float(i) for i in range(rows)])})


def test_parquet_reads_only_the_row_groups_of_the_chunk_and_none_twice(tmp_path, monkeypatch):
    pq.write_table(table_of(1000), tmp_path / "in.parquet", row_group_size=128)
    job = planned(tmp_path / "in.parquet", tmp_path / "out", id="k", columns=["x"], rows_per_chunk=256)
    read = []
    decode = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, **kw: (kw.get("columns") and read.append(group)) or decode(self, group, **kw),
    )
    reader = ParquetReader(job.plan.source, job.files)
    seen = []
    for chunk in range(job.plan.chunks):
        before = len(read)
        rows = [row for piece in reader.slices(job.extents(chunk)) for row in piece.rows.to_pylist()]
        assert set(read[before:]) <= {row // 128 for row in rows}
        seen.extend(rows)
    assert seen == list(range(1000))
    assert sorted(read) == list(range(8))


def test_a_group_too_large_to_keep_is_read_in_passing(tmp_path, monkeypatch):
    from nograd.tasks.backfill.sources import parquet

    pq.write_table(table_of(50_000), tmp_path / "in.parquet", row_group_size=50_000)
    job = planned(tmp_path / "in.parquet", tmp_path / "out", id="k", columns=["x"], rows_per_chunk=20_000)
    kept, _ = read_all(job)
    monkeypatch.setattr(parquet, "CACHE_BYTES", 0)
    assert read_all(job)[0] == kept
    assert [row["k"] for row in kept] == list(range(50_000))


def test_parquet_files_of_several_types_nulls_and_dictionaries(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(
        pa.table({"x": pa.array([1, None], pa.int32()), "s": pa.array(["a", "b"]).dictionary_encode()}),
        folder / "1.parquet",
    )
    pq.write_table(pa.table({"s": ["c"], "x": [2.5], "more": [1]}), folder / "2.parquet")
    (folder / "_metadata").write_text("no data")
    good, failures = read_all(planned(folder, tmp_path / "out", columns=["x"], join=["s"]))
    assert good == [{"row": 0, "x": 1.0, "s": "a"}, {"row": 2, "x": 2.5, "s": "c"}]
    assert [(f.row, f.message) for f in failures] == [(1, "column 'x' has no value")]
    pq.write_table(pa.table({"s": ["c"]}), folder / "3.parquet")
    with pytest.raises(SourceError, match=r"3.parquet has no column 'x', which 1.parquet has"):
        survey(folder, columns=["x"])
    pq.write_table(pa.table({"x": [["list"]]}), folder / "3.parquet")
    with pytest.raises(SourceError, match=r"3.parquet: its columns do not go with those of 1.parquet"):
        survey(folder, columns=["x"])


def test_a_parquet_file_that_is_none_is_refused_by_name(tmp_path):
    (tmp_path / "in.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(SourceError, match=r"in.parquet is no readable Parquet file"):
        survey(tmp_path / "in.parquet")


def test_images_of_a_folder_are_listed_and_read_only_when_asked(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.jpg", "a.PNG", "sub/c.jpeg", "notes.txt", ".hidden.jpg"):
        (folder / name).write_bytes(name.encode())
    (folder / "empty.jpg").write_bytes(b"")
    job = planned(folder, tmp_path / "out")
    good, failures = read_all(job)
    assert [row["path"] for row in good] == ["a.PNG", "b.jpg", "empty.jpg", "sub/c.jpeg"]
    assert failures == []
    assert job.plan.inputs.skipped == 1
    by_name = {row["path"]: row for row in good}
    assert read_image(by_name["b.jpg"]["url"], by_name["b.jpg"]["size"]) == b"b.jpg"
    with pytest.raises(InvalidInput, match="the file is empty"):
        read_image(by_name["empty.jpg"]["url"], 0)
    (folder / "b.jpg").write_bytes(b"changed since")
    with pytest.raises(InvalidInput, match="had 5 bytes when the plan was made, has 13"):
        read_image(by_name["b.jpg"]["url"], by_name["b.jpg"]["size"])
    (folder / "sub" / "c.jpeg").unlink()
    with pytest.raises(InvalidInput, match="cannot read the file: No such file"):
        read_image(by_name["sub/c.jpeg"]["url"], 10)
    (folder / "sub").rmdir()
    with pytest.raises(SourceError, match="sub is gone since the plan was made"):  # not a million bad rows
        read_image(by_name["sub/c.jpeg"]["url"], 10)


def test_globs_lists_and_several_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b.jpg", "c.png"):
        (tmp_path / name).write_bytes(b"x")
    assert [file.name for file in survey("*.jpg").files] == ["a.jpg", "b.jpg"]
    (tmp_path / "list.txt").write_text("c.png\n\na.jpg\n")
    assert [file.name for file in survey("@list.txt").files] == ["c.png", "a.jpg"]
    assert [file.name for file in survey(["c.png", tmp_path / "b.jpg"]).files] == ["c.png", "b.jpg"]
    assert all(Path(file.url).is_absolute() for file in survey("*.jpg").files)


def write(tmp_path, name, data):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, "no-such: no such file or folder$"),
        ({"no-such/x.txt": b""}, {}, "the files are of no known format"),
        ({"no-such/x.csv": b"a\n", "no-such/y.jpg": b""}, {}, "of several formats .csv, images."),
        ({"no-such/x.csv": b"a,b\n1,2\n"}, {"id": "c"}, "has no column 'c'; there are: 'a', 'b'"),
        ({"no-such/x.csv": b"a,b\n1,2\n"}, {"columns": ["c"]}, "has no column 'c'"),
        ({"no-such/x.csv": b"a,a\n1,2\n"}, {}, "two columns are named 'a'"),
        ({"no-such/x.csv": b"a,b\n1,2\n"}, {"columns": ["a", "a"]}, "column 'a' is named twice"),
        ({"no-such/x.csv": b"", "no-such/y.csv": b""}, {}, "no-such: there are no rows to score: no file has a column"),
        ({"no-such/x.jsonl": b""}, {"columns": ["a"]}, "no-such: there are no rows to score: no file has a column"),
        ({"no-such/x.csv": b"a\n1\n"}, {"id": "a"}, "no column for the model besides the id 'a'"),
        ({"no-such/x.csv": b"prediction,b\n1,2\n"}, {"id": "prediction"}, "would collide with the predictions"),
        ({"no-such/x.csv.gz": b"a\n"}, {}, "x.csv.gz is compressed"),
        ({"no-such/x.csv": b"a\n"}, {"options": {"quote": "'"}}, "unknown option 'quote'"),
        ({"no-such/x.jpg": b"a"}, {"columns": ["a"]}, "images have no columns"),
        ({"no-such/x.csv": b"a\n"}, {"kind": "tar"}, "unknown format 'tar'"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path, files, options, message):
    for name, data in files.items():
        write(tmp_path, name, data)
    with pytest.raises(SourceError, match=message):
        survey(tmp_path / "no-such", **options)


def test_an_fsspec_url_is_read_like_a_local_path(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/in/a.csv", b"x\n1\n2\n")
    memory.pipe("/bucket/in/b.csv", b"x\n3\n")
    memory.pipe("/bucket/img/1.jpg", b"one")
    sink = pa.BufferOutputStream()
    pq.write_table(table_of(10), sink)
    memory.pipe("/bucket/t.parquet", sink.getvalue().to_pybytes())
    for url in ("memory://bucket/in", "memory://bucket/in/*.csv"):
        out = tmp_path / url.replace("/", "_").replace("*", "g")
        assert [row["x"] for row in read_all(planned(url, out))[0]] == [1, 2, 3]
    assert [row["x"] for row in read_all(planned("memory://bucket/t.parquet", tmp_path / "o2"))[0]] == [
        float(i) for i in range(10)
    ]
    (row,) = read_all(planned("memory://bucket/img", tmp_path / "o3"))[0]
    assert (row["path"], read_image(row["url"], row["size"])) == ("1.jpg", b"one")
    job = planned("memory://bucket/in", tmp_path / "o4")
    memory.pipe("/bucket/in/b.csv", b"x\n3\n4\n")
    with pytest.raises(PlanChanged, match=r"b.csv had 4 bytes when the plan was made, has 6"):
        read_all(job)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_file_that_disappears_midway_or_changes_is_no_bad_row(tmp_path, kind):
    path = tmp_path / f"in.{kind}"
    text = {"csv": "x\n1\n2\n3\n", "jsonl": '{"x": 1}\n{"x": 2}\n{"x": 3}\n'}
    if kind == "parquet":
        pq.write_table(pa.table({"x": [1, 2, 3]}), path)
    else:
        path.write_text(text[kind])
    job = planned(path, tmp_path / "out")
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    with pytest.raises(PlanChanged, match="was written after the plan was made"):
        read_all(job)
    path.unlink()
    with pytest.raises(PlanChanged, match="is gone since the plan was made"):
        read_all(job)


values = st.one_of(
    st.integers(-(10**6), 10**6),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.just("oops"),
    st.just(""),
)


@given(
    st.lists(st.tuples(values, st.text(alphabet='a,"\n é', max_size=5)), min_size=1, max_size=600),
    st.integers(1, 200),
    st.integers(1, 64),
)
@settings(max_examples=40, deadline=None)
def test_any_csv_read_in_any_pieces_gives_each_row_once(tmp_path_factory, rows, rows_per_chunk, slice_rows):
    import csv

    folder = tmp_path_factory.mktemp("csv")
    with (folder / "in.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["n", "x", "s"])
        writer.writerows([i, x, s] for i, (x, s) in enumerate(rows))
    job = planned(folder / "in.csv", folder / "out", id="n", columns=["x"], join=["s"], rows_per_chunk=rows_per_chunk)
    reader = reader_of(job.plan.source, job.files)
    seen = {}
    for chunk in random.sample(range(job.plan.chunks), job.plan.chunks):
        position = 0
        for piece in reader.slices(job.extents(chunk), slice_rows):
            assert piece.position == position
            position += len(piece)
            for index, (row, value) in enumerate(zip(piece.rows.to_pylist(), piece.batch.to_pylist(), strict=True)):
                assert row not in seen
                seen[row] = None if index in piece.failures else value
        assert position == job.rows_of(chunk)
    assert sorted(seen) == list(range(len(rows)))
    numbers = dict(job.plan.source.schema.fields)["x"] != "string"
    for row, value in seen.items():
        x, s = rows[row]
        if numbers:
            assert (value is None) == isinstance(x, str)
        if value is not None:
            assert (value["n"], value["s"]) == (row, s)
            assert value["x"] == (x if numbers else str(x))


def test_a_calibration_reads_rows_before_there_is_a_plan(tmp_path):
    (tmp_path / "in.csv").write_text("x\n" + "\n".join(map(str, range(2000))))
    found = survey(tmp_path / "in.csv")
    reader = reader_of(found.spec, lambda first, count: found.files[first : first + count])
    rows = [row for piece in reader.slices(head(found, 5, start=1500)) for row in piece.good.to_pylist()]
    assert rows == [{"row": i, "x": i} for i in range(1500, 1505)]


class Unanswered(fsspec.implementations.memory.MemoryFileSystem):
    """Its library has errors of its own."""

    protocol = "unanswered"

    def _open(self, path, *args, **kwargs):
        raise botocore.exceptions.EndpointConnectionError(endpoint_url="http://nowhere")


def test_a_storage_that_does_not_answer_blames_no_row_whatever_its_library_raises():
    fsspec.register_implementation("unanswered", Unanswered, clobber=True)
    with pytest.raises(SourceError, match="nowhere"):
        read_image("unanswered://bucket/a.jpg", 10)
