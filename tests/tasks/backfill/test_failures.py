"""Failed rows: read also where a crash kept their file from its place, and sorted by what they have in common."""

import json

import pytest

from nograd.tasks.backfill import plan as plans
from nograd.tasks.backfill.failures import MOST, clusters, failures, normalised
from nograd.tasks.backfill.rows import RowFailure
from nograd.tasks.errors import OutputFull
from scoring import planned, run


def failure(row, message, kind="model_failed"):
    return RowFailure(row=row, id=f"id{row}", stage="predict", type=kind, message=message)


def test_messages_are_alike_but_for_numbers_words_and_paths():
    assert normalised("row 12: 'a b' is no int64") == normalised("row 3: 'c' is no int64") == "row …: … is no int…"
    assert normalised("/a/b.png: cannot identify") == normalised("/c/d/e.png: cannot identify")
    assert normalised("too short") != normalised("too long")


def test_the_most_frequent_come_first_with_three_examples():
    found = [failure(9, "other"), *(failure(row, f"/in/{row}.png: is {row} wide") for row in range(5))]
    first, second = clusters(found)
    assert (first.rows, first.message, [each.row for each in first.samples]) == (5, "…: is … wide", [0, 1, 2])
    assert (second.rows, second.message, [each.id for each in second.samples]) == (1, "other", ["id9"])


def test_messages_that_are_all_different_do_not_fill_memory():
    words = (f"{chr(97 + row % 26)}{chr(97 + row // 26 % 26)}{chr(97 + row // 676)}" for row in range(2 * MOST))
    found = clusters(failure(row, word) for row, word in enumerate(words))
    assert len(found) == MOST + 1
    assert (found[0].message, found[0].rows) == ("…", MOST)


@pytest.mark.parametrize("kind", ["csv", "openai"])
def test_errors_that_are_committed_and_not_yet_in_their_place_are_read(tmp_path, monkeypatch, kind):
    if kind == "csv":
        source = tmp_path / "in.csv"
        source.write_text("k,x\n" + "".join(f"id{i},{i}\n" for i in range(10)))
    else:
        source = tmp_path / "in.jsonl"
        source.write_text("".join(json.dumps({"custom_id": f"id{i}", "body": {"x": i}}) + "\n" for i in range(10)))
    job = planned(source, tmp_path / "out")
    assert list(failures(plans.load(job.store))) == []

    def cut_off(*_):
        raise OutputFull("cut off")

    monkeypatch.setattr(type(job.store), "settle", cut_off)
    with pytest.raises(OutputFull):
        run(job, lambda batch: ["no" if i == 4 else 1.0 for i in range(batch.num_rows)])
    assert job.store.names("errors") == []
    (found,) = failures(job)
    assert (found.row, found.stage, found.type) == (4, "output", "output_type")
    assert found.id == (4 if kind == "csv" else "id4")


@pytest.mark.parametrize(("named", "label"), [("k7", "k7"), (None, "row 7"), (7, "row 7"), (8, "8")])
def test_a_row_is_told_by_its_id_and_by_its_position_if_it_has_none(named, label):
    assert RowFailure(row=7, id=named, stage="read", type="invalid_input", message="x").label == label
