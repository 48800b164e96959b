"""Parts: the same bytes for the same rows; every row once; whatever does not fit is an error row."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nograd.tasks.backfill.output import PartWriter, as_array, infer_type
from nograd.tasks.backfill.rows import RowFailure
from nograd.tasks.backfill.sources import open_reader
from nograd.tasks.errors import BackfillError
from scoring import planned, run


@pytest.fixture
def csv(tmp_path):
    (tmp_path / "in.csv").write_text("k,x,note\n" + "".join(f'id{i},{i},"n {i}"\n' for i in range(50)))
    return tmp_path / "in.csv"


def part_of(job, predictions, failures=None, rows=50, chunk=0):
    writer = PartWriter(job.plan, chunk, job.rows_of(chunk))
    at = 0
    for piece in open_reader(job).slices(job.extents(chunk), rows):
        count = piece.good.num_rows
        writer.add(piece, predictions[at : at + count], failures)
        at += count
    return writer.finish()


def table(part):
    return pq.read_table(pa.BufferReader(part.data))


def errors(part):
    return [json.loads(line) for line in part.errors.splitlines()]


def test_a_part_has_id_joined_columns_prediction_and_says_where_it_comes_from(csv, tmp_path):
    job = planned(csv, tmp_path / "out", id="k", columns=["x"], join=["note"])
    part = part_of(job, [float(i) for i in range(50)])
    assert table(part).to_pylist()[7] == {"k": "id7", "note": "n 7", "prediction": 7.0}
    assert part.errors == b""
    metadata = pq.ParquetFile(pa.BufferReader(part.data)).schema_arrow.metadata
    assert metadata[b"nograd.plan"] == job.plan.sha256.encode()
    assert metadata[b"nograd.chunk"] == b"0"
    assert metadata[b"nograd.model_sha256"] == job.plan.model.sha256.encode()
    assert json.loads(metadata[b"nograd.versions"])["torch"] == "2.15"


@pytest.mark.parametrize("output", ["parquet", "jsonl"])
def test_the_same_rows_make_the_same_bytes_however_they_were_sliced(csv, tmp_path, output):
    job = planned(csv, tmp_path / "out", id="k", columns=["x"], join=["note"], output=output)
    predictions = [i / 7 for i in range(50)]
    bytes_of = {part_of(job, predictions, rows=rows).data for rows in (1, 7, 50)}
    bytes_of.add(part_of(job, np.array(predictions)).data)
    bytes_of.add(part_of(job, pa.array(predictions)).data)
    assert len(bytes_of) == 1


def test_a_prediction_that_does_not_fit_the_declared_type_is_an_error_row(csv, tmp_path):
    kind = pa.struct({"label": pa.string(), "score": pa.float64()})
    job = planned(csv, tmp_path / "out", kind, id="k", columns=["x"])
    predictions = [{"label": "a", "score": i} for i in range(50)]
    predictions[3] = {"label": "a", "score": "high"}
    predictions[4] = {"label": "a", "score": 1.0, "more": 1}
    predictions[5] = "text"
    predictions[6] = {"label": "only"}
    predictions[7] = {"label": 1, "score": True}
    predictions[8] = {"label": object(), "score": 1.0}
    part = part_of(job, predictions)
    rows = table(part).to_pylist()
    assert len(rows) == 45
    assert rows[3] == {"k": "id6", "prediction": {"label": "only", "score": None}}
    assert [(e["id"], e["row"], e["stage"], e["type"]) for e in errors(part)] == [
        (f"id{i}", i, "output", "output_type") for i in (3, 4, 5, 7, 8)
    ]
    assert (
        errors(part)[0]["message"]
        == "the prediction {'label': 'a', 'score': 'high'} is no struct<label: string, score: double>"
    )


def test_rows_that_failed_anywhere_stand_in_input_order_in_the_errors_file(tmp_path):
    lines = [f"id{i},{i}" for i in range(20)]
    lines[2] = "id2,"
    (tmp_path / "in.csv").write_text("k,x\n" + "\n".join(lines) + "\n")
    job = planned(tmp_path / "in.csv", tmp_path / "out", id="k", columns=["x"])
    failed = RowFailure(row=1, id="id1", stage="predict", type="model_failed", message="no")
    late = RowFailure(row=19, id="id19", stage="prepare", type="invalid_input", message="no")
    predictions = [float(i) for i in range(19)]
    predictions[3] = "x"  # the fourth good row is row 4
    part = part_of(job, predictions, {1: failed, 18: late})
    assert [(e["row"], e["stage"]) for e in errors(part)] == [
        (1, "predict"),
        (2, "read"),
        (4, "output"),
        (19, "prepare"),
    ]
    assert [row["k"] for row in table(part).to_pylist()] == [f"id{i}" for i in range(20) if i not in {1, 2, 4, 19}]
    assert (part.rows_ok, part.rows_err) == (16, 4)


def test_a_chunk_of_which_every_row_failed_is_an_empty_part(csv, tmp_path):
    job = planned(csv, tmp_path / "out", id="k", columns=["x"])
    part = part_of(job, ["x"] * 50)
    assert table(part).num_rows == 0
    assert table(part).schema.field("prediction").type == pa.float64()
    assert len(errors(part)) == 50


def test_rows_missing_or_predictions_of_another_number_are_no_part(csv, tmp_path):
    job = planned(csv, tmp_path / "out", id="k", columns=["x"])
    piece = next(open_reader(job).slices(job.extents(0), 10))
    writer = PartWriter(job.plan, 0, 50)
    with pytest.raises(BackfillError, match="9 predictions for 10 rows"):
        writer.add(piece, [1.0] * 9)
    writer.add(piece, [1.0] * 10)
    with pytest.raises(BackfillError, match="10 predictions and 0 failed rows are not the 50 rows of the plan"):
        writer.finish()


@pytest.mark.parametrize(
    ("predictions", "kind"),
    [
        ([1, 2], "int64"),
        ([1, 2.5], "double"),
        ([True, None], "bool"),
        (["a", None], "string"),
        ([None, None], "string"),
        ([[], [1.5]], "list<item: double>"),
        ([[], []], "list<item: string>"),
        (
            [{"label": "a", "top": []}, {"label": "b", "extra": 1}],
            "struct<label: string, top: list<item: string>, extra: int64>",
        ),
        (np.zeros((2, 3), np.float32), "list<item: float>"),
        (np.zeros((2, 3, 4), np.float16), "list<item: list<item: halffloat>>"),
        (np.zeros(2, np.int32), "int32"),
    ],
)
def test_the_declared_type_is_that_of_real_predictions(predictions, kind):
    assert str(infer_type(predictions)) == kind


def test_predictions_without_a_common_type_are_refused():
    with pytest.raises(BackfillError, match="no type in common"):
        infer_type([1, "a"])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_an_array_of_any_rank_becomes_nested_lists_without_losing_a_number(shape):
    array = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    assert as_array(array).to_pylist() == array.tolist()


@given(st.lists(st.floats(allow_nan=True), min_size=50, max_size=50))
@settings(deadline=None, max_examples=20)
def test_numbers_come_back_to_the_last_bit(tmp_path_factory, numbers):
    folder = tmp_path_factory.mktemp("bits")
    (folder / "in.csv").write_text("x\n" + "1\n" * 50)
    job = planned(folder / "in.csv", folder / "out")
    kept = table(part_of(job, np.array(numbers)))["prediction"].to_numpy()
    assert kept.tobytes() == np.array(numbers).tobytes()


def test_a_wider_type_takes_narrower_arrays_and_a_narrower_refuses_what_it_would_lose(csv, tmp_path):
    job = planned(csv, tmp_path / "o1", pa.float64(), id="k", columns=["x"])
    assert part_of(job, np.arange(50, dtype=np.float32)).rows_ok == 50
    assert part_of(job, np.arange(50)).rows_ok == 50
    job = planned(csv, tmp_path / "o2", pa.int64(), id="k", columns=["x"])
    half = part_of(job, np.arange(50) / 2)
    assert (half.rows_ok, half.rows_err) == (0, 50)
    job = planned(csv, tmp_path / "o3", pa.list_(pa.float32()), id="k", columns=["x"])
    assert part_of(job, np.zeros((50, 3), np.float32)).rows_ok == 50


def test_openai_lines_go_in_and_out(tmp_path):
    lines = [{"custom_id": f"r{i}", "body": {"input": i}} for i in range(10)]
    text = [json.dumps(line) for line in lines]
    text[4] = "broken"
    (tmp_path / "in.jsonl").write_text("\n".join(text))
    job = planned(tmp_path / "in.jsonl", tmp_path / "out", pa.string())
    part = part_of(job, [f"answer {i}" for i in range(9)])
    first = json.loads(part.data.splitlines()[0])
    assert first == {
        "id": f"batch_req_{job.plan.job}_0",
        "custom_id": "r0",
        "response": {
            "status_code": 200,
            "request_id": f"batch_req_{job.plan.job}_0",
            "body": {"model": "doubler", "prediction": "answer 0"},
        },
        "error": None,
    }
    assert [json.loads(line)["custom_id"] for line in part.data.splitlines()] == [f"r{i}" for i in range(10) if i != 4]
    (error,) = errors(part)
    assert error["custom_id"] is None
    assert error["row"] == 4
    assert error["response"] is None
    assert error["error"]["code"] == "invalid_input"


def test_not_a_number_is_null_in_json(csv, tmp_path):
    job = planned(csv, tmp_path / "out", id="k", columns=["x"], output="jsonl")
    part = part_of(job, [math.nan] * 50)
    assert json.loads(part.data.splitlines()[0]) == {"k": "id0", "prediction": None}


def test_committed_parts_read_as_one_dataset_while_it_runs(csv, tmp_path):
    duckdb = pytest.importorskip("duckdb")
    pandas = pytest.importorskip("pandas")
    job = planned(csv, tmp_path / "out", id="k", columns=["x"], rows_per_chunk=10)
    for chunk in range(job.plan.chunks):
        job.store.stage(b"torn attempt")
        run(job, chunks=[chunk])
        done = sum(job.rows_of(number) for number in range(chunk + 1))
        expected = [f"id{i}" for i in range(done)]
        folder = str(tmp_path / "out" / "parts")
        assert pyarrow.dataset.dataset(folder).to_table()["k"].to_pylist() == expected
        assert pandas.read_parquet(folder)["k"].tolist() == expected
        query = f"select k from read_parquet('{folder}/*.parquet', filename=true) order by filename, file_row_number"
        query = query.replace("filename=true", "filename=true, file_row_number=true")
        assert [row[0] for row in duckdb.sql(query).fetchall()] == expected
