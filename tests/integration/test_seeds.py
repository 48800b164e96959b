"""The seeds' six models through the queue answer as the seeds' own code does in process, on the same weights."""

import itertools
import random

import pytest

import reference
import seed_data
from nograd.producer import Client
from waiting import PATIENCE_S

EXAMPLES = seed_data.EXAMPLES
FILES = {"photos", "digits"}
#: inputs in one forward, at most; as in examples/models.toml
FULL = {"photos": 32, "gpt2": 64, "regression": 64, "linear": 64, "digits": 256, "lstm": 64}


@pytest.fixture(scope="module")
def client(redis_url, start_worker):
    start_worker(EXAMPLES / "models.toml", lasts=True)
    with Client(redis_url) as made:
        yield made


def as_sent(model, value):
    return EXAMPLES / "inputs" / value if model in FILES else value


@pytest.fixture(scope="module")
def answers():
    """What the seeds' code answers in this process, now; the committed file says the same."""
    inputs = seed_data.example_inputs()
    return {
        model: list(zip(inputs[model], reference.REFERENCES[model](inputs[model]), strict=True)) for model in inputs
    }


def check(model, prediction, expected):
    assert reference.same_answer(prediction, expected), f"{model}: {prediction} is not {expected}"


@pytest.mark.parametrize("model", FULL)
def test_a_batch_of_one(client, answers, model):
    for value, expected in answers[model]:
        check(model, client.submit(model, as_sent(model, value)).result(PATIENCE_S), expected)


@pytest.mark.parametrize("model", FULL)
def test_full_batches_of_one_caller(client, answers, model):
    pairs = [random.Random(n).choice(answers[model]) for n in range(2 * FULL[model])]
    jobs = client.submit_many(model, [as_sent(model, value) for value, _ in pairs])
    for job, (_, expected) in zip(jobs, pairs, strict=True):
        check(model, job.result(PATIENCE_S), expected)


@pytest.mark.parametrize("model", FULL)
def test_packed_messages_with_a_full_batch_in_each(client, answers, model):
    pairs = list(itertools.islice(itertools.cycle(answers[model]), FULL[model] + 5))
    predictions = list(client.map(model, [as_sent(model, value) for value, _ in pairs], timeout=PATIENCE_S))
    for prediction, (_, expected) in zip(predictions, pairs, strict=True):
        check(model, prediction, expected)


def test_mixed_callers_and_models(client, redis_url, answers):
    pairs = [(model, value, expected) for model, known in answers.items() for value, expected in known * 4]
    random.Random(0).shuffle(pairs)
    with Client(redis_url) as other:
        jobs = [
            (client, other)[n % 2].submit(model, as_sent(model, value)) for n, (model, value, _) in enumerate(pairs)
        ]
        for job, (model, _, expected) in zip(jobs, pairs, strict=True):
            check(model, job.result(PATIENCE_S), expected)


def test_batches_really_were_larger_than_one(client):
    (stats,) = client.app.control.inspect(timeout=PATIENCE_S, limit=1).stats().values()
    largest = {name: numbers["largest_batch"] for name, numbers in stats["pool"]["models"].items()}
    # The client packs 64 inputs at most, so a batch of 256 depends on how quickly messages come in.
    assert {name: min(size, 64) for name, size in largest.items()} == {
        name: min(size, 64) for name, size in FULL.items()
    }


def test_token_ids_are_those_of_the_seed_s_loop(client, answers):
    from transformers import GPT2Tokenizer

    tokenizer = GPT2Tokenizer.from_pretrained(seed_data.WEIGHTS / "gpt2")
    for prompt, expected in answers["gpt2"]:
        answer = client.submit("gpt2", prompt, params={"return_token_ids": True}).result(PATIENCE_S)
        assert answer["text"] == expected
        assert len(answer["token_ids"]) == 50
        assert tokenizer.decode(tokenizer(prompt)["input_ids"] + answer["token_ids"]) == expected


def test_numpy_float64_in_the_model_s_dtype_inside(client, answers):
    import numpy as np

    rows = np.array([value for value, _ in answers["regression"]], dtype=np.float64)
    predictions = [job.result(PATIENCE_S) for job in client.submit_many("regression", rows)]
    for prediction, (_, expected) in zip(predictions, answers["regression"], strict=True):
        check("regression", prediction, expected)
