"""Time limits, NaN, memory and lost devices in real workers: what costs a job costs no other, and nothing is lost."""

import shutil
import time

import pytest

import fleet_of_tests
from nograd.producer import Client
from nograd.producer.broker import Message
from nograd.tasks import cancelled, errors, keys
from nograd.workers import exits
from waiting import PATIENCE_S as TIMEOUT
from waiting import until

MODELS = """
[deadly]
loader = "python"
class = "fleet_of_tests:Deadly"
batch = { max_items = 16 }
hard_timeout_s = 3

[waits]
loader = "python"
class = "fleet_of_tests:Waits"
batch = { max_items = 4 }

[hungry]
loader = "python"
class = "fleet_of_tests:Hungry"
init = { fits = 5 }
batch = { max_items = 16 }

[log]
loader = "python"
class = "fleet_of_tests:Log"
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    shutil.copy(fleet_of_tests.__file__, folder)
    path = folder / "models.toml"
    path.write_text(MODELS)
    return path


@pytest.fixture(scope="module")
def client(redis_url, models):
    with Client(redis_url, models=models) as made:
        yield made


@pytest.fixture
def doomed(start_worker, models):
    """Start a worker of these models that is expected to die, with a lease that is soon over."""

    def start(*names):
        return start_worker(models, "-Q", ",".join(map(keys.queue_name, names)), env={"NOGRAD_LEASE_S": "3"})

    return start


# -- processes that cannot go on --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("hang", "the forward of model deadly took longer than hard_timeout_s = 3 s"),
        ("hang in prepare", "the preparation of model deadly took longer"),
        ("hang in finish", "finish of model deadly took longer"),
    ],
)
def test_a_worker_with_a_model_that_hangs_says_where_and_ends_and_all_its_jobs_succeed(
    client, doomed, tmp_path, how, says
):
    mark = tmp_path / "happened"
    jobs = client.submit_many("deadly", [*range(40), [how, str(mark)], *range(40)])
    first = doomed("deadly")
    assert first.process.wait(TIMEOUT) == exits.EXIT_HUNG, first.text()
    assert says in first.text()
    assert "time.sleep(1000)" in first.text()  # where the thread was
    # Nothing waits for a lease to run out: all that is not done stands in the queue at the next worker's second beat.
    second = doomed("deadly")
    results = [job.result(TIMEOUT) for job in jobs]
    assert results[40] == "in a batch of 1"  # alone from then on
    assert results[:40] + results[41:] == [*range(40), *range(40)]
    assert second.alive()
    second.stop()
    words = client.app.backend.client.get(keys.LAST_WORDS + jobs[40].id).decode()
    assert words.startswith(says)
    assert client.app.backend.client.ttl(keys.LAST_WORDS + jobs[40].id) > 3600


def test_a_worker_whose_device_thread_has_ended_says_so_and_ends_and_its_jobs_succeed_elsewhere(
    client, doomed, tmp_path
):
    jobs = client.submit_many("deadly", [*range(40), ["end the device thread", str(tmp_path / "happened")], *range(40)])
    first = doomed("deadly")
    assert first.process.wait(TIMEOUT) == exits.EXIT_DEVICE, first.text()
    assert "the device thread has ended" in first.text()
    second = doomed("deadly")
    results = [job.result(TIMEOUT) for job in jobs]
    assert results[:40] + results[41:] == [*range(40), *range(40)]
    second.stop()


def test_code_that_hangs_and_holds_the_gil_ends_the_worker_as_well(client, start_worker, models, tmp_path):
    job = client.submit("deadly", ["hang with the GIL", str(tmp_path / "happened")])
    # The timer in C leaves a margin to what may hold the GIL; a test has no time for it.
    worker = start_worker(
        models, "-Q", "nograd.deadly", env={"NOGRAD_LEASE_S": "3", "PYTHONPATH": str(_impatient(tmp_path))}
    )
    assert worker.process.wait(TIMEOUT) == 1
    assert "Timeout (0:00:" in worker.text()
    second = start_worker(models, "-Q", "nograd.deadly", env={"NOGRAD_LEASE_S": "3"})
    assert job.result(TIMEOUT) == "in a batch of 1"
    second.stop()


def _impatient(folder):
    (folder / "sitecustomize.py").write_text(
        "import faulthandler\n"
        "later = faulthandler.dump_traceback_later\n"
        "faulthandler.dump_traceback_later = lambda s, **more: later(s - 13, **more)\n"
    )
    return folder


# -- time limits of jobs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker(start_worker, models, client):
    made = start_worker(models, "-Q", "nograd.waits,nograd.log", lasts=True)
    assert client.submit("waits", None).result(TIMEOUT) is None  # from here on it consumes
    return made


@pytest.fixture
def front(client, worker, gate):
    """A job that is on the device, until the gate is opened."""
    job = client.submit("waits", str(gate))
    until(lambda: gate.reached)
    return job


def test_a_job_that_waits_longer_than_its_timeout_is_told_so_while_the_device_is_still_busy(client, front, gate):
    late = client.submit("waits", None, timeout_s=0.5)
    with pytest.raises(errors.DeadlinePassed):
        late.result(TIMEOUT)
    assert not front.done()
    gate.open()
    assert front.result(TIMEOUT) == str(gate)


def test_a_job_whose_forward_outlasts_its_timeout_is_told_so_and_its_neighbours_get_their_predictions(
    client, worker, front, gate, gates
):
    second = gates()
    late = client.submit("waits", str(second), timeout_s=3)
    patient = client.submit("waits", str(second), timeout_s=1000)
    until(lambda: client.broker.workers(TIMEOUT, [worker.name])[worker.name]["waiting_items"] == 2)
    gate.open()  # they go on the device together
    until(lambda: second.reached)
    with pytest.raises(errors.DeadlinePassed):
        late.result(TIMEOUT)
    assert not patient.done()
    second.open()
    assert patient.result(TIMEOUT) == str(second)
    assert front.result(TIMEOUT) == str(gate)
    time.sleep(0.5)
    assert late.state == "FAILURE"  # the late prediction was dropped
    assert worker.alive()


def test_the_items_of_a_message_pass_their_deadline_each_for_itself(client, worker, gate):
    inputs = [None] * 4 + [str(gate)] * 5
    outcomes = list(client.map("waits", inputs, batch=9, timeout_s=3, return_exceptions=True))
    assert outcomes[:4] == [None] * 4
    assert [type(outcome) for outcome in outcomes[4:]] == [errors.DeadlinePassed] * 5


def test_a_stock_client_gives_a_timeout_by_name(client, front, gate):
    late = client.app.send_task("nograd.predict", ["waits", None], {"timeout_s": 0.3}, queue="nograd.waits")
    with pytest.raises(errors.DeadlinePassed):
        late.get(timeout=TIMEOUT)
    assert not front.done()
    gate.open()
    front.result(TIMEOUT)


@pytest.mark.parametrize("timeout_s", [0, -1, "soon", True, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused_on_both_sides(client, worker, timeout_s):
    with pytest.raises(errors.InvalidInput, match="timeout_s"):
        client.submit("waits", None, timeout_s=timeout_s)
    result = client.app.send_task("nograd.predict", ["waits", None], {"timeout_s": timeout_s}, queue="nograd.waits")
    with pytest.raises(errors.InvalidInput, match="timeout_s"):
        result.get(timeout=TIMEOUT)


# -- NaN --------------------------------------------------------------------------------------------------------------


def test_a_prediction_with_nan_or_infinity_fails_in_its_place(client, worker):
    jobs = client.submit_many("log", [1.0, 0.0, -1.0, 1.0])
    assert [type(job.exception(TIMEOUT)) for job in jobs] == [
        type(None), errors.NonFiniteOutput, errors.NonFiniteOutput, type(None),
    ]  # fmt: skip
    with pytest.raises(errors.NonFiniteOutput, match=r"the prediction is -inf; .*nonfinite_output"):
        jobs[1].result()
    assert [type(each) for each in client.map("log", [-1.0] * 3, return_exceptions=True)] == [
        errors.NonFiniteOutput
    ] * 3


# -- memory -----------------------------------------------------------------------------------------------------------


def test_what_fits_into_memory_is_learnt_once_by_the_whole_fleet(client, start_worker, models):
    learns = "4 inputs of group (None, b'') fit into memory, more do not"
    first = start_worker(models, "-Q", "nograd.hungry")
    assert list(client.map("hungry", range(16), batch=16)) == [4] * 16
    until(lambda: first.text().count(learns) == 1)
    assert list(client.map("hungry", range(16), batch=16)) == [4] * 16
    redis = client.app.backend.client
    (key,) = redis.keys(keys.SAFE_SIZES + "*")
    assert 0 < redis.ttl(key) <= keys.SAFE_SIZE_TTL_S
    first.stop()
    assert first.text().count(learns) == 1
    second = start_worker(models, "-Q", "nograd.hungry")
    assert list(client.map("hungry", range(16), batch=16)) == [4] * 16
    second.stop()
    assert learns not in second.text()


# -- cancelled while nobody is up -------------------------------------------------------------------------------------


def test_a_job_that_is_cancelled_while_no_worker_is_up_never_runs(client, start_worker, models):
    unwanted, kept = client.submit("hungry", 1), client.submit("hungry", 1)
    unwanted.cancel()
    worker = start_worker(models, "-Q", "nograd.hungry")
    with pytest.raises(errors.JobCancelled):
        unwanted.result(TIMEOUT)
    assert kept.result(TIMEOUT) == 1
    assert client.app.backend.client.ttl(keys.CANCELLED) > 3600
    worker.stop()


LATE = """
from celery.signals import worker_ready

from nograd.tasks import cancelled


class Late:
    def __init__(self, job):
        self.job = job

    def load(self, device):
        worker_ready.connect(self.cancel, weak=False)

    def cancel(self, sender, **_):
        cancelled.remember(sender.app.backend.client, [self.job])

    def forward(self, batch):
        return batch
"""


def test_a_job_that_is_cancelled_while_a_worker_starts_never_runs(client, start_worker, tmp_path):
    """Its models are loaded, and nobody broadcasts it: the worker must read it right before its first message."""
    unwanted, kept = (Message.of("late", value, value) for value in (1, 2))
    (tmp_path / "late_cancel.py").write_text(LATE)
    models = tmp_path / "models.toml"
    models.write_text(f"""
[late]
loader = "python"
class = "late_cancel:Late"
init = {{ job = "{unwanted.id}" }}
""")
    client.broker.publish_many([unwanted, kept])
    worker = start_worker(models)
    assert client.result(kept.id, TIMEOUT) == 2
    with pytest.raises(errors.JobCancelled):
        client.result(unwanted.id, TIMEOUT)
    worker.stop()


def test_a_job_that_is_cancelled_while_a_worker_has_lost_its_connection_never_runs(client, start_worker, models):
    """Nobody broadcasts it: the worker must read it again when it is back."""
    unwanted, kept = (Message.of("hungry", value, value) for value in (1, 2))
    worker = start_worker(models, "-Q", "nograd.hungry")
    redis = client.app.backend.client
    connected = worker.text().count("Connected to redis")
    cancelled.remember(redis, [unwanted.id])
    redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    until(lambda: worker.text().count("Connected to redis") > connected)
    client.broker.publish_many([unwanted, kept])
    assert client.result(kept.id, TIMEOUT) == 1
    with pytest.raises(errors.JobCancelled):
        client.result(unwanted.id, TIMEOUT)
    worker.stop()


def test_a_cancellation_is_written_down_before_it_is_broadcast(client, monkeypatch):
    redis, seen = client.app.backend.client, []
    broadcast = client.app.control.revoke

    def revoke(ids):
        seen.append(set(ids) <= set(cancelled.recall(redis)))
        return broadcast(ids)

    monkeypatch.setattr(client.app.control, "revoke", revoke)
    client.broker.revoke(["a", "b"])
    assert seen == [True]
