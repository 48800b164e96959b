"""Nobody's mistake stops a worker: bad input fails its own job, by a typed error that says what is wrong."""

import io
import math
import shutil

import pytest
from PIL import Image

import fleet_of_tests
import seed_data
from nograd.producer import Client
from nograd.tasks.errors import InvalidInput, JobError, ResultTimeout, UnknownModel
from waiting import PATIENCE_S, until

INPUTS = seed_data.EXAMPLES / "inputs"
DIGIT = seed_data.example_inputs()["digits"][0]
ROW = [32.1, 101.0, 4.8598]


@pytest.fixture(scope="module")
def worker(start_worker):
    return start_worker(seed_data.EXAMPLES / "models.toml", lasts=True)


@pytest.fixture(scope="module")
def client(redis_url, worker):
    with Client(redis_url) as made:
        yield made


def truncated_png():
    return (INPUTS / DIGIT).read_bytes()[:60]


def huge_png():
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("model", "value", "says"),
    [
        ("digits", b"this is no image", "image"),
        ("digits", b"", "image"),
        ("digits", truncated_png(), "image"),
        ("digits", huge_png(), "400000000 pixels"),
        ("digits", [1, 2, 3], "image"),
        ("regression", "a text", "text|str"),
        ("regression", [1.0, 2.0], "2"),
        ("regression", [1.0, 2.0, 3.0, 4.0], "4"),
        ("regression", [1.0, math.nan, 3.0], "nan"),
        ("regression", [1.0, math.inf, 3.0], "inf"),
        ("regression", [], "empty|0"),
        ("regression", None, "null|None"),
        ("regression", [[1.0, 2.0], [3.0]], ""),
        ("regression", {"a": 1}, ""),
        ("linear", [0.0] * 9, "9"),
        ("lstm", [[1.0] * 8, [1.0] * 7], ""),
        ("lstm", [], "empty|0"),
        ("gpt2", "", "empty"),
        ("gpt2", ["a list"], "list"),
        ("gpt2", "word " * 500, "128"),
    ],
)
def test_a_bad_input_fails_its_job_and_its_neighbours_go_on(client, worker, model, value, says):
    good = seed_data.example_inputs()[model][0]
    good = INPUTS / good if model in {"photos", "digits"} else good
    before, bad, after = client.submit(model, good), client.submit(model, value), client.submit(model, good)
    with pytest.raises(InvalidInput, match=f"(?i){says}"):
        bad.result(PATIENCE_S)
    assert before.result(PATIENCE_S) == after.result(PATIENCE_S)
    assert worker.alive()


def test_a_bad_parameter_is_named(client):
    with pytest.raises(InvalidInput, match="max_new_token"):
        client.submit("gpt2", "The quick", params={"max_new_token": 5}).result(PATIENCE_S)
    with pytest.raises(InvalidInput, match="nonsense"):
        client.submit("regression", ROW, params={"nonsense": 1}).result(PATIENCE_S)


def test_an_unknown_model_fails_at_once_at_the_client(client):
    with pytest.raises(UnknownModel, match="regression"):
        client.submit("regresion", ROW)


def test_a_bad_item_in_a_packed_message_costs_only_itself(client):
    answers = list(client.map("regression", [ROW, [1.0], ROW, "x", ROW], return_exceptions=True, timeout=PATIENCE_S))
    assert [isinstance(answer, JobError) for answer in answers] == [False, True, False, True, False]
    assert answers[0] == answers[2] == answers[4]


def test_a_job_waits_while_no_worker_serves_its_queue_and_runs_when_one_comes(redis_url, start_worker, tmp_path):
    shutil.copy(fleet_of_tests.__file__, tmp_path)
    (tmp_path / "models.toml").write_text('[late]\nloader = "python"\nclass = "fleet_of_tests:Log"\n')
    with Client(redis_url, models=tmp_path / "models.toml") as client:
        job = client.submit("late", 1.0)
        with pytest.raises(ResultTimeout):
            job.result(0.5)
        start_worker(tmp_path / "models.toml")
        assert job.result(PATIENCE_S) == 0.0


def test_a_worker_s_log_says_of_a_failed_job_one_line_without_a_traceback(client, worker):
    job = client.submit("regression", [1.0, 2.0])
    with pytest.raises(InvalidInput):
        job.result(PATIENCE_S)
    said = until(lambda: [line for line in worker.text().splitlines() if f"{job.id}] raised" in line], worker.text)
    assert len(said) == 1
    assert "raised expected: InvalidInput(" in said[0]
    assert "Traceback" not in worker.text()
