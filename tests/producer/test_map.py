"""`Client.map`: order, bounds, errors in their place, and nothing left behind."""

import itertools
import json

import numpy as np
import pytest

from nograd.producer import Client
from nograd.producer.outcomes import Outcome
from nograd.producer.packing import PACK_BYTES, pack
from nograd.tasks import BrokerUnavailable, InvalidInput, JobError, ModelFailed, OutputMismatch, ResultTimeout
from waiting import PATIENCE_S as TIMEOUT
from waiting import until


def test_predictions_come_in_the_order_of_the_inputs(served):
    assert list(served.map("echo", range(1000))) == list(range(1000))
    assert list(served.map("total", ([n, 1] for n in range(100)), batch=7)) == [n + 1 for n in range(100)]
    assert list(served.map("echo", [])) == []


def test_arrays_and_parameters_travel_as_in_submit(served):
    rows = np.arange(6, dtype="float32").reshape(3, 2)
    [first, *_] = served.map("echo", rows)
    assert (first["dtype"], first["shape"]) == ("float32", [2])
    assert list(served.map("echo", [1], params={"k": 1})) == [{"echo": 1, "params": {"k": 1}}]


def test_an_endless_iterator_is_read_only_as_far_as_the_window(served):
    read = []

    def numbers():
        for number in itertools.count():
            read.append(number)
            yield number

    predictions = served.map("echo", numbers(), batch=10, max_in_flight=50)
    assert read == []  # nothing before the first prediction is asked for
    assert list(itertools.islice(predictions, 5)) == [0, 1, 2, 3, 4]
    assert len(read) <= 50 + 2 * 10  # the window, what has come back, and the pack that waits for its turn
    assert list(itertools.islice(predictions, 95)) == list(range(5, 100))
    assert len(read) <= 100 + 50 + 2 * 10
    predictions.close()


def test_inputs_in_flight_are_bounded(client, redis):
    predictions = client.map("echo", range(1000), batch=8, max_in_flight=32, timeout=0.2)
    with pytest.raises(ResultTimeout):
        next(predictions)
    assert redis.llen("nograd.echo") == 4  # messages of 8


def test_a_window_smaller_than_a_pack_makes_the_packs_smaller(client, redis):
    with pytest.raises(ResultTimeout):
        next(client.map("echo", range(1000), max_in_flight=3, timeout=0.1))
    assert redis.llen("nograd.echo") == 1


def test_by_default_a_message_holds_what_the_model_batches(client, redis):
    with pytest.raises(ResultTimeout):
        next(client.map("echo", range(20), timeout=0.1))
    assert [json.loads(text)["headers"]["argsrepr"] for text in redis.lrange("nograd.echo", 0, -1)] == [
        "echo 4 inputs",
        "echo 16 inputs",
    ]


def test_large_inputs_travel_in_smaller_packs():
    packs = list(pack([bytes(PACK_BYTES // 2)] * 5, "image", 64))
    assert [len(one.wires) for one in packs] == [2, 2, 1]


def test_a_failed_input_raises_in_its_place(served):
    predictions = served.map("total", [[1], [2], ["x"], [4]], batch=2)
    assert [next(predictions), next(predictions)] == [1, 2]
    with pytest.raises(InvalidInput, match="input 2: rows are numbers"):
        next(predictions)
    assert list(predictions) == []


def test_errors_can_be_had_in_place(served, tmp_path):
    outcomes = list(served.map("total", [[1], ["x"], object(), [4]], return_exceptions=True))
    assert [outcomes[0], outcomes[3]] == [1, 4]
    assert [type(outcomes[1]), type(outcomes[2])] == [InvalidInput, InvalidInput]
    assert outcomes[2].message.startswith("input 2: ")


def test_inputs_that_cannot_be_sent_need_no_message(client, redis):
    outcomes = list(client.map("echo", [object(), object()], return_exceptions=True))
    assert [type(outcome) for outcome in outcomes] == [InvalidInput] * 2
    assert redis.llen("nograd.echo") == 0


def test_a_message_that_fails_as_one_fails_each_of_its_inputs(served):
    outcomes = list(served.map("fails", ["foreign", "foreign"], return_exceptions=True))
    assert [type(outcome) for outcome in outcomes] == [JobError] * 2
    assert "input 1: ZeroDivisionError" in outcomes[1].message
    typed = list(served.map("fails", ["typed"], return_exceptions=True))
    assert [type(outcome) for outcome in typed] == [ModelFailed]


def test_an_answer_of_the_wrong_length_blames_nobody_in_particular():
    [one] = pack([1, 2, 3], "json", 64)
    outcomes = list(one.outcomes(Outcome("SUCCESS", [{"prediction": 1}])))
    assert [type(outcome) for outcome in outcomes] == [OutputMismatch] * 3
    assert next(iter(one.outcomes(Outcome("SUCCESS", [{"prediction": 1}, {"x": 1}, 7])))) == 1


def test_results_leave_redis_as_they_are_read(served):
    before = set(served.app.backend.client.keys("celery-task-meta-*"))
    list(served.map("echo", range(200)))
    assert set(served.app.backend.client.keys("celery-task-meta-*")) <= before


@pytest.fixture
def limited(served, served_url):
    """A client whose user an administrator may limit: `limited("-del")`; gives the client."""
    redis = served.app.backend.client
    redis.execute_command("ACL", "SETUSER", "mapper", "reset", "on", ">pw", "~*", "&*", "+@all")
    with Client(f"redis://mapper:pw@{served_url.rpartition('@')[2]}") as client:

        def limit(rule):
            redis.execute_command("ACL", "SETUSER", "mapper", rule)
            return client

        yield limit
    redis.execute_command("ACL", "DELUSER", "mapper")


def test_results_that_cannot_be_removed_are_handed_out_all_the_same(limited):
    assert list(limited("-del").map("echo", range(200))) == list(range(200))


def test_what_was_received_is_handed_out_before_the_error_of_the_next_message(limited):
    def numbers():
        yield from range(10)
        limited("-@write")
        yield from range(10, 30)

    predictions = limited("+@all").map("echo", numbers(), batch=10, max_in_flight=10)
    assert [next(predictions) for _ in range(10)] == list(range(10))
    with pytest.raises(BrokerUnavailable):
        next(predictions)


def test_an_iterator_closed_early_revokes_what_waits(served, revoked, gate):
    known = len(revoked())
    predictions = served.map("waits", [None, *[str(gate)] * 199], batch=1, max_in_flight=100)
    assert next(predictions) is None
    predictions.close()
    until(lambda: len(revoked()) >= known + 99)
    gate.open()
    assert served.submit("waits", None).result(TIMEOUT) is None  # behind the 99 that are no more
    assert gate.reached <= 8  # those that had been begun
    until(lambda: served.broker.waiting(["waits"]) == {"waits": 0})


def test_an_iterator_nobody_reads_sends_nothing(client, redis):
    client.map("echo", [1, 2, 3])
    assert redis.llen("nograd.echo") == 0
