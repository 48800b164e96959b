"""The batch pool in a real worker process, on a real Redis, driven by Celery's own client."""

import json
import math
import shutil
import threading
import time
import uuid

import pytest
import torch
from celery import Celery, chain, chord, group
from celery.exceptions import ChordError

import fleet_of_tests
from nograd.tasks import create_app, errors, predict, registry
from nograd.tasks.settings import Settings
from waiting import PATIENCE_S as TIMEOUT
from waiting import until


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    torch.manual_seed(0)
    torch.save(fleet_of_tests.Dropout().state_dict(), folder / "dropout.pth")
    shutil.copy(fleet_of_tests.__file__, folder)  # classes are imported with the model file's folder on the path
    path = folder / "models.toml"
    path.write_text("""
[spy]
loader = "python"
class = "fleet_of_tests:Spy"
batch = { max_items = 8, max_wait_ms = 300 }

[picky]
loader = "python"
class = "fleet_of_tests:Picky"
batch = { max_items = 16 }

[echo]
loader = "python"
class = "fleet_of_tests:Echo"
batch = { max_items = 8, max_wait_ms = 100 }
nonfinite_output = "allow"

[slow]
loader = "python"
class = "fleet_of_tests:Slow"
batch = { max_items = 1 }

[waits]
loader = "python"
class = "fleet_of_tests:Waits"
batch = { max_items = 1 }

[hurried]
loader = "python"
class = "fleet_of_tests:Waits"
batch = { max_items = 1 }
timeout_s = 0.5

[dropout]
loader = "module"
class = "fleet_of_tests:Dropout"
weights = "dropout.pth"
input = "rows"
shape = [4]
""")
    return path


@pytest.fixture(scope="module")
def worker(start_worker, models):
    return start_worker(models, lasts=True)


@pytest.fixture(scope="module")
def app(redis_url, worker):
    made = create_app(Settings(redis_url))
    yield made
    made.close()


def send(app, model, value, **kwargs):
    return predict_of(app).apply_async((model, value), kwargs)


def predict_of(app):
    return app.tasks[predict.name]


def error_of(result):
    result.get(timeout=TIMEOUT, propagate=False)
    return result.result


def test_a_stock_celery_client_needs_no_code_of_ours(redis_url, worker):
    stock = Celery("stock", broker=redis_url, backend=redis_url, set_as_current=False)
    result = stock.send_task("nograd.predict", args=["picky", "hello"], queue="nograd.picky")
    assert result.get(timeout=TIMEOUT) == "hello"
    stock.close()


def test_messages_of_different_callers_share_a_batch_on_the_thread_that_loaded_with_grad_off(app):
    seen = [result.get(timeout=TIMEOUT) for result in [send(app, "spy", n) for n in range(8)]]
    assert max(one["batch"] for one in seen) > 1
    assert not any(one["grad"] for one in seen)
    assert all(one["loading_thread"] for one in seen)


def test_a_dropout_model_is_in_eval_mode(app):
    row = [1.0, 2.0, 3.0, 4.0]
    answers = [send(app, "dropout", row).get(timeout=TIMEOUT) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert 0.0 not in answers[0]


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ("bad prepare", errors.InvalidInput, "I do not like it"),
        ("exit in prepare", errors.InvalidInput, "SystemExit: 3"),
        ("bad forward", errors.ModelFailed, "RuntimeError: cannot digest"),
        ("exit", errors.ModelFailed, "SystemExit: 4"),
        ("interrupt", errors.ModelFailed, "KeyboardInterrupt"),
        ("bad finish", errors.ModelFailed, "KeyError"),
    ],
)
def test_a_bad_item_fails_alone_with_its_own_typed_error(app, worker, value, error, says):
    good = [send(app, "picky", n) for n in range(5)]
    bad = send(app, "picky", value)
    more = [send(app, "picky", n) for n in range(5, 10)]
    assert [result.get(timeout=TIMEOUT) for result in good + more] == list(range(10))
    outcome = error_of(bad)
    assert type(outcome) is error
    assert says in str(outcome)
    assert worker.alive()


def test_an_input_that_does_not_fit_into_memory_is_tried_again_later_and_its_neighbours_succeed(app):
    good = [send(app, "picky", n) for n in range(5)]
    bad = send(app, "picky", "memory")
    assert [result.get(timeout=TIMEOUT) for result in good] == list(range(5))
    until(lambda: bad.state == "RETRY")
    assert isinstance(bad.result, errors.Overloaded)
    app.control.revoke(bad.id)


def test_a_wrong_number_of_outputs_fails_its_batch_loudly(app):
    assert isinstance(error_of(send(app, "picky", "too few")), errors.OutputMismatch)


def test_a_prediction_that_is_no_json_fails_its_job(app):
    result = send(app, "picky", "no json")
    error_of(result)
    assert result.state == "FAILURE"
    assert send(app, "picky", 1).get(timeout=TIMEOUT) == 1


def test_a_message_with_many_inputs_answers_in_order_each_item_for_itself(app):
    answer = send(app, "picky", [1, "bad forward", {"a": 2}, "bad prepare", 5], many=True).get(timeout=TIMEOUT)
    assert [one.get("prediction") for one in answer] == [1, None, {"a": 2}, None, 5]
    assert [one["error"]["type"] for one in answer if "error" in one] == ["ModelFailed", "InvalidInput"]
    assert send(app, "picky", [], many=True).get(timeout=TIMEOUT) == []


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "says"),
    [
        (
            ["nobody", 1],
            {},
            errors.UnknownModel,
            "no model 'nobody'; it serves dropout, echo, hurried, picky, slow, spy, waits",
        ),
        (["picky"], {}, errors.InvalidInput, "input"),
        ([], {}, errors.InvalidInput, "model"),
        (["picky", 1, None, False, 5], {}, errors.InvalidInput, "5 arguments"),
        (["picky", 1], {"parms": {}}, errors.InvalidInput, "'parms'"),
        (["picky", 1], {"params": 3}, errors.InvalidInput, "params"),
        (["picky", 1], {"many": True}, errors.InvalidInput, "list of inputs"),
        ([7, 1], {}, errors.InvalidInput, "model"),
        (["picky", {"base64": "?"}], {}, errors.InvalidInput, "base64"),
    ],
)
def test_a_message_that_makes_no_sense_is_answered_with_what_is_wrong(app, args, kwargs, error, says):
    outcome = error_of(app.send_task("nograd.predict", args=args, kwargs=kwargs, queue="nograd.picky"))
    assert type(outcome) is error
    assert says in str(outcome)


def test_a_message_kombu_cannot_decode_is_answered(app):
    result = app.send_task("nograd.predict", args=["picky", {"__type__": "x", "__value__": 1}], queue="nograd.picky")
    assert isinstance(error_of(result), errors.InvalidInput)


def test_msgpack_is_understood(app):
    result = app.send_task("nograd.predict", args=["picky", [1, "ü"]], queue="nograd.picky", serializer="msgpack")
    assert result.get(timeout=TIMEOUT) == [1, "ü"]


def test_chains_groups_and_chords_of_predictions_are_celery_s_own(app):
    task = predict_of(app)
    collect = app.signature("celery.accumulate").set(queue="nograd.picky")
    both = group(task.s("picky", n) for n in range(20))()
    assert both.get(timeout=TIMEOUT) == list(range(20))
    chained = chain(task.s("picky", "x"), collect)()
    assert chained.get(timeout=TIMEOUT) is not None
    collected = chord([task.s("picky", n) for n in range(10)], collect)()
    assert collected.get(timeout=TIMEOUT) == [list(range(10))]


def test_a_prediction_can_be_chained_into_a_prediction(app):
    task = predict_of(app)
    result = chain(task.s("picky", {"first": 1}), task.s(model="picky"))()
    assert result.get(timeout=TIMEOUT) == {"first": 1}
    result = chain(app.signature("celery.accumulate", (5, 6)).set(queue="nograd.picky"), task.s(model="picky"))()
    assert result.get(timeout=TIMEOUT) == [5, 6]


def test_a_chord_with_a_call_that_makes_no_sense_fails_instead_of_waiting(app):
    task = predict_of(app)
    result = chord(
        [task.s("picky", 1), task.s("picky", 1, 3)], app.signature("celery.accumulate").set(queue="nograd.picky")
    )()
    with pytest.raises((ChordError, errors.InvalidInput)):
        result.get(timeout=TIMEOUT)


def test_link_error_is_called_for_a_bad_call(app):
    told = predict_of(app).si("picky", "told").set(task_id=str(uuid.uuid4()))
    predict_of(app).apply_async(("picky", 1, 3), link_error=told)
    assert app.AsyncResult(told.options["task_id"]).get(timeout=TIMEOUT) == "told"


@pytest.mark.parametrize(
    "change",
    [
        {"headers": {"timelimit": "soon"}},
        {"headers": {"expires": "whenever"}},
        {"headers": {"eta": "whenever"}},
        {"body": b"7"},
        {"body": b'"args"'},
        {"body": b"[]"},
        {"body": b'[["picky", 1], {}, 5]'},
        {"body": b"{", "content_type": "application/json"},
        {"body": b"x", "content_type": "application/x-python-serialize"},
        {"body": b"x", "content_type": "application/x-unheard-of"},
    ],
    ids=str,
)
def test_no_message_stops_the_worker_or_goes_unanswered(app, worker, change):
    task_id = str(uuid.uuid4())
    headers = {
        "lang": "py",
        "task": "nograd.predict",
        "id": task_id,
        "root_id": task_id,
        "argsrepr": "?",
        **change.get("headers", {}),
    }
    body = change.get("body", b'[["picky", 1], {}, null]')
    with app.connection_for_write() as connection, connection.Producer() as producer:
        producer.publish(
            body, routing_key="nograd.picky", exchange="", headers=headers, correlation_id=task_id,
            content_type=change.get("content_type", "application/json"), content_encoding="utf-8",
        )  # fmt: skip
    assert isinstance(error_of(app.AsyncResult(task_id)), errors.InvalidInput)
    assert send(app, "picky", 1).get(timeout=TIMEOUT) == 1
    assert worker.alive()


def test_jobs_whose_parameters_only_look_alike_in_json_do_not_share_a_batch(app):
    results = [
        send(app, "echo", n, params={"x": value}) for n, value in enumerate([math.nan, None, 1, 1.5, "1", True] * 4)
    ]
    seen = [result.get(timeout=TIMEOUT)["x"] for result in results]
    assert [repr(x) for x in seen] == [repr(x) for x in [math.nan, None, 1, 1.5, "1", True] * 4]


def test_link_is_called_with_the_prediction(app):
    linked = predict_of(app).si("picky", {"linked": True})
    result = predict_of(app).apply_async(("picky", 1), link=linked)
    assert result.get(timeout=TIMEOUT) == 1
    assert result.children[0].get(timeout=TIMEOUT) == {"linked": True}


def test_ignore_result_stores_nothing(app):
    result = predict_of(app).apply_async(("picky", 1), ignore_result=True)
    send(app, "picky", 2).get(timeout=TIMEOUT)
    time.sleep(0.5)
    assert app.backend.client.get(app.backend.get_key_for_task(result.id)) is None


def at_the_gate(app, gate):
    """A job that is on the device, until somebody opens the gate."""
    job = send(app, "waits", str(gate))
    until(lambda: gate.reached)
    return job


@pytest.fixture
def other(gates):
    """An open gate: it shows who has been on the device, and holds nobody."""
    made = gates()
    made.open()
    return made


def inspected(app, what):
    """The ids the only worker names."""
    ((_, found),) = getattr(app.control.inspect(timeout=TIMEOUT, limit=1), what)().items()
    return [each if isinstance(each, str) else each["id"] for each in found]


def test_a_job_revoked_while_it_waits_for_the_device_never_runs(app, gate, other):
    front, waiting = at_the_gate(app, gate), send(app, "waits", str(other))
    until(lambda: waiting.id in inspected(app, "active") + inspected(app, "reserved"))
    app.control.revoke(waiting.id)
    until(lambda: waiting.id in inspected(app, "revoked"))
    gate.open()
    assert front.get(timeout=TIMEOUT) == str(gate)
    error_of(waiting)
    assert waiting.state == "REVOKED"
    assert not other.reached


def test_a_job_that_expires_is_revoked(app, gate, other):
    front = at_the_gate(app, gate)
    late = predict_of(app).apply_async(("waits", str(other)), expires=0.5)
    time.sleep(0.6)
    gate.open()
    front.get(timeout=TIMEOUT)
    error_of(late)
    assert late.state == "REVOKED"
    assert not other.reached


def test_terminating_a_running_job_frees_its_caller_and_not_the_worker(app, worker, gate):
    running = at_the_gate(app, gate)
    app.control.revoke(running.id, terminate=True)
    until(lambda: running.state == "REVOKED")
    gate.open()
    assert send(app, "waits", None).get(timeout=TIMEOUT) is None
    time.sleep(0.3)
    assert running.state == "REVOKED"
    assert worker.alive()


def test_a_job_past_its_timeout_never_reaches_the_device(app, gate, other):
    front = at_the_gate(app, gate)
    late = send(app, "hurried", str(other))
    assert isinstance(error_of(late), errors.DeadlinePassed)
    gate.open()
    front.get(timeout=TIMEOUT)
    assert send(app, "waits", None).get(timeout=TIMEOUT) is None  # the device has been through what was before it
    assert not other.reached


def test_a_countdown_is_kept(app):
    began = time.monotonic()
    assert predict_of(app).apply_async(("picky", 1), countdown=1.5).get(timeout=TIMEOUT) == 1
    assert time.monotonic() - began >= 1.4


def test_models_are_registered_for_clients_and_the_key_has_an_end(app, worker):
    cards = registry.known(app.backend.client)
    assert set(cards) == {"spy", "picky", "echo", "slow", "hurried", "dropout", "waits"}
    assert cards["dropout"].input == "rows"
    assert app.backend.client.ttl("nograd:models") > 24 * 3600


def test_inspect_shows_the_pool_s_own_numbers(app, worker):
    (stats,) = app.control.inspect(timeout=TIMEOUT, limit=1).stats().values()
    assert stats["pool"]["implementation"] == "nograd.workers.pool:TaskPool"
    assert stats["pool"]["models"]["picky"]["items"] > 0
    assert stats["pool"]["max-concurrency"] == 256
    json.dumps(stats["pool"])


def test_task_events_are_celery_s_and_carry_the_real_runtime(app, worker):
    seen, caught_up = {}, threading.Event()

    def note(event):
        seen.setdefault(event["uuid"], {})[event["type"]] = event

    def watch(connection):
        receiver = app.events.Receiver(
            connection, handlers={"*": lambda event: note(event) if "uuid" in event else None}
        )
        for _ in receiver.itercapture(limit=None, timeout=TIMEOUT, wakeup=False):
            caught_up.set()
            if "task-succeeded" in seen.get(result.id, {}):
                return

    with app.connection_for_read() as connection:
        result = app.AsyncResult(str(uuid.uuid4()))
        thread = threading.Thread(target=watch, args=(connection,), daemon=True)
        thread.start()
        caught_up.wait(TIMEOUT)
        predict_of(app).apply_async(("slow", 0.4), task_id=result.id)
        thread.join(TIMEOUT)
    events = seen[result.id]
    assert {"task-sent", "task-received", "task-started", "task-succeeded"} <= set(events)
    assert events["task-succeeded"]["runtime"] >= 0.4


def test_a_warm_shutdown_finishes_what_is_on_the_device_and_gives_the_rest_back(start_worker, models, app):
    stopping = start_worker(models, "-Q", "nograd.slow", "--concurrency", "16")
    # More than both workers can hold on their devices: some of these must be given back.
    results = [send(app, "slow", 0.5) for _ in range(10)]
    time.sleep(1.0)
    assert stopping.stop() == 0
    assert [result.get(timeout=TIMEOUT) for result in results] == [0.5] * 10


def test_nothing_is_left_unacknowledged(app):
    until(lambda: app.backend.client.hlen("unacked") == 0)
