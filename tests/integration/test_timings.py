"""What a job spent its time on, from whoever asks: the handle, another process, Celery's own client, an event."""

import json
import shutil
import time

import pytest
from celery import Celery
from celery.app.task import Context
from celery.events.state import State
from click.testing import CliRunner

import fleet_of_tests
from nograd.producer import Client
from nograd.producer.cli.root import cli
from nograd.tasks import PREDICT_TASK, errors, registry
from nograd.tasks.backend import RedisBackend
from nograd.tasks.timings import read_timings
from waiting import PATIENCE_S as TIMEOUT
from waiting import until

MODELS = """
[spy]
loader = "python"
class = "fleet_of_tests:Spy"
batch = { max_items = 8, max_wait_ms = 300 }

[picky]
loader = "python"
class = "fleet_of_tests:Picky"

[slow]
loader = "python"
class = "fleet_of_tests:Slow"
batch = { max_items = 1 }

[waits]
loader = "python"
class = "fleet_of_tests:Waits"
batch = { max_items = 1 }
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    shutil.copy(fleet_of_tests.__file__, folder)
    (folder / "models.toml").write_text(MODELS)
    return folder / "models.toml"


@pytest.fixture(scope="module")
def worker(models, start_worker):
    return start_worker(models, lasts=True)


@pytest.fixture(scope="module")
def client(redis_url, models, worker):
    with Client(redis_url, models=models) as made:
        yield made


def send(client, value, model="slow", **options):
    """Send a job without our client's ways."""
    sent = client.app.send_task(PREDICT_TASK, [model, value], queue=f"nograd.{model}", **options)
    return client.job(sent.id)


def test_the_stages_fill_the_time_between_sending_and_result(client, worker):
    began = time.monotonic()
    job = client.submit("slow", 0.3)
    job.result(TIMEOUT)
    elapsed = time.monotonic() - began
    timings = job.timings(0)
    assert timings.device_s >= 0.3
    assert timings.device_s <= timings.total_s <= elapsed
    assert (timings.batch_size, timings.batches, timings.retries, timings.deaths) == (1, 1, 0, 0)
    assert timings.worker == worker.name
    assert job.look().timings == timings


def test_a_job_behind_another_waits_for_the_device(client, worker, gate):
    first = client.submit("waits", str(gate))
    until(lambda: gate.reached)
    second = client.submit("waits", None)
    until(lambda: client.broker.workers(TIMEOUT, [worker.name])[worker.name]["waiting_items"] == 1)
    time.sleep(0.3)
    gate.open()
    assert second.timings(TIMEOUT).batch_wait_s >= 0.3
    assert first.timings(TIMEOUT).device_s >= 0.3


def test_the_batch_is_the_one_the_model_saw(client):
    jobs = client.submit_many("spy", range(8))
    sizes = {job.result(TIMEOUT)["batch"] for job in jobs}
    assert max(sizes) > 1
    for job in jobs:
        assert job.timings(TIMEOUT).batch_size == job.result(TIMEOUT)["batch"]


def test_many_inputs_count_each_of_their_forwards(client):
    job = send(client, [0.1, 0.2, 0.1], kwargs={"many": True})
    timings = job.timings(TIMEOUT)
    assert (timings.batches, timings.batch_size) == (3, 1)
    assert timings.device_s >= 0.4


def test_a_failure_has_its_timings(client):
    job = client.submit("picky", "bad forward")
    assert isinstance(job.exception(TIMEOUT), errors.ModelFailed)
    timings = job.timings(TIMEOUT)
    assert timings.device_s >= 0.05
    assert timings.batches == 1
    unprepared = client.submit("picky", "bad prepare").timings(TIMEOUT)
    assert unprepared.prepare_s > 0
    assert unprepared.batches == 0


def test_the_model_s_version_is_the_registered_one(client, worker):
    versions = {name: card.version for name, card in registry.known(client.app.backend.client).items()}
    assert len(set(versions.values())) == 4
    assert client.models()["picky"].version == versions["picky"]
    assert client.submit("picky", 1).timings(TIMEOUT).model_version == versions["picky"]
    (pool,) = client.broker.workers(TIMEOUT, [worker.name]).values()
    assert {name: model["version"] for name, model in pool["models"].items()} == versions


def test_a_job_that_never_came_to_the_pool_has_none(client):
    job = send(client, 0, expires=-1)
    assert isinstance(job.exception(TIMEOUT), errors.JobCancelled)
    assert job.timings(TIMEOUT) is None


def test_a_job_that_is_revoked_in_the_worker_has_the_stages_it_got_through(client, worker, gate):
    app, state = client.app, State()
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": state.event})
        capture = receiver.itercapture(limit=None, timeout=TIMEOUT, wakeup=False)
        next(capture)
        front = client.submit("waits", str(gate))
        until(lambda: gate.reached)  # or the others might join its batch
        running, waiting = client.submit_many("waits", [None, None])
        tasks = [front.id, running.id, waiting.id]
        while not all(state.tasks.get(each) and state.tasks[each].started for each in tasks):
            next(capture)
        waiting.cancel()
        app.control.revoke(running.id, terminate=True)
        inspect = app.control.inspect(timeout=TIMEOUT, limit=1)
        until(lambda: {running.id, waiting.id} <= set(inspect.revoked()[worker.name]))
        gate.open()
        for job in (running, waiting):
            assert isinstance(job.exception(TIMEOUT), errors.JobCancelled)
            timings = job.timings(TIMEOUT)
            assert (timings.batches, timings.device_s) == (0, 0.0)
            assert timings.queue_s is not None
            while not state.tasks[job.id].ready:
                next(capture)
            assert read_timings(state.tasks[job.id].timings) == timings
        front.result(TIMEOUT)


def test_a_stock_sender_gives_no_time_of_sending_and_reads_its_result_as_ever(client, redis_url):
    stock = Celery("stock", broker=redis_url, backend=redis_url, set_as_current=False)
    result = stock.send_task(PREDICT_TASK, args=["picky", {"a": 1}], queue="nograd.picky")
    assert result.get(timeout=TIMEOUT) == {"a": 1}
    assert result.result == {"a": 1}
    assert result.info == {"a": 1}
    assert result.state == "SUCCESS"
    timings = client.job(result.id).timings(TIMEOUT)
    assert timings.queue_s is None
    assert timings.device_s > 0
    failed = stock.send_task(PREDICT_TASK, args=["picky", "bad forward"], queue="nograd.picky")
    with pytest.raises(errors.ModelFailed):
        failed.get(timeout=TIMEOUT)
    stock.close()


@pytest.mark.parametrize(("sent", "queue_s"), [(2e9 * 2, 0.0), ("soon", None), ({}, None)])
def test_a_sender_may_write_any_time(client, sent, queue_s):
    assert send(client, 0, timestamp=sent).timings(TIMEOUT).queue_s == queue_s


def test_a_countdown_is_time_in_the_queue(client):
    assert send(client, 0, countdown=1).timings(TIMEOUT).queue_s >= 0.9


def test_retries_are_told(client):
    assert send(client, 0, retries=2).timings(TIMEOUT).retries == 2


def test_an_event_s_timings_are_those_of_the_result_and_do_not_disturb_celery_s_state(client):
    app, state = client.app, State()
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": state.event})
        capture = receiver.itercapture(limit=None, timeout=TIMEOUT, wakeup=False)
        next(capture)
        jobs = [client.submit("slow", 0.1), client.submit("picky", "bad forward")]
        deadline = time.monotonic() + TIMEOUT
        while not all(state.tasks.get(job.id) and state.tasks[job.id].ready for job in jobs):
            assert time.monotonic() < deadline
            next(capture)
    for job, end in zip(jobs, ("SUCCESS", "FAILURE"), strict=True):
        task = state.tasks[job.id]
        assert task.state == end
        assert read_timings(task.timings) == job.timings(TIMEOUT)
        json.dumps(task.as_dict(), default=str)
        assert task.info()
        assert str(task)
    assert state.tasks[jobs[0].id].runtime >= 0.1


def run(redis_url, *args):
    return CliRunner().invoke(cli, [*args, "--redis", redis_url])


def test_the_command_line_shows_them(client, redis_url, models):
    job = client.submit("slow", 0)
    timings = job.timings(TIMEOUT)
    document = json.loads(run(redis_url, "result", job.id, "--json").stdout)
    assert document["prediction"] == 0
    assert read_timings(document["timings"]) == timings
    plain = run(redis_url, "result", job.id).stdout.splitlines()
    shown = run(redis_url, "result", job.id, "--timings").stdout.splitlines()
    assert plain == ["0"]
    assert shown[0] == "0"
    assert "(batch of 1)" in shown[1]
    assert f"version {timings.model_version} on {timings.worker}" in shown[1]
    submitted = run(redis_url, "submit", "slow", "0", "--wait", "--timings", "--models", str(models))
    assert "batch wait" in submitted.stdout.splitlines()[1]
    failed = run(redis_url, "submit", "picky", '"bad forward"', "--wait", "--json", "--models", str(models))
    assert json.loads(failed.stdout)["timings"]["batches"] == 1
    listed = json.loads(run(redis_url, "models", "--json").stdout)["models"]
    assert timings.model_version in {card["version"] for card in listed}


def test_an_app_of_somebody_else_s_takes_the_backend_by_its_name(redis_url):
    app = Celery("theirs", backend=f"nograd.tasks.backend:RedisBackend+{redis_url}", set_as_current=False)
    assert type(app.backend) is RedisBackend
    app.backend.store_result("one", 1, "SUCCESS", request=Context(id="one", timings={"batches": 1}))
    app.backend.store_result("two", 2, "SUCCESS", request=Context(id="two"))
    assert app.AsyncResult("one").get(timeout=TIMEOUT) == 1
    assert app.backend.get_task_meta("one")["timings"] == {"batches": 1}
    assert "timings" not in app.backend.get_task_meta("two")
    app.close()
