"""Celery's promises around a job hold for predictions: times, revokes, remote control, signals, retries, shutdowns.

What `tests/workers/test_pool.py` shows of the pool itself is not repeated here.
"""

import json
import signal
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis as redis_client

import own_tasks
from nograd.tasks import create_app, errors
from nograd.tasks.settings import Settings
from waiting import PATIENCE_S as TIMEOUT
from waiting import until

FLEET = Path(own_tasks.__file__).parent
MODELS = """
[triple]
loader = "python"
class = "own_tasks:Triple"

[lingers]
loader = "python"
class = "own_tasks:Lingers"
batch = { max_items = 1 }
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("semantics") / "models.toml"
    path.write_text(MODELS)
    return path


class Fleet:
    """Workers on a Redis of their own, and Celery's client."""

    def __init__(self, server, models, start_worker):
        self.server, self._models, self._start = server, models, start_worker
        self.app = create_app(Settings(server.url))
        self.redis = redis_client.Redis.from_url(server.url, decode_responses=True)

    def start(self, *args, conf=None, lasts=False):
        env = {"TEST_CONF": json.dumps(conf or {})}
        where = {"redis_url": self.server.url, "app": "configured_app", "cwd": FLEET}
        return self._start(self._models, *args, env=env.items(), lasts=lasts, **where)

    def send(self, model, value, **options):
        return self.app.send_task("nograd.predict", (model, value), queue=f"nograd.{model}", **options)

    def linger(self, seconds, where="forward"):
        """A job that takes so long the first time it runs, or until `let_go`; its result is its own id."""
        task_id = uuid.uuid4().hex
        return self.send("lingers", {"run": task_id, "seconds": seconds, "where": where}, task_id=task_id)

    def on_the_device(self):
        """A job that runs until `let_go`."""
        return self._begun("forward")

    def in_preparation(self):
        """A job that is prepared until `let_go`."""
        return self._begun("prepare")

    def _begun(self, where):
        job = self.linger(3600, where)
        until(lambda: self.times(job))
        return job

    def let_go(self, job):
        """It has lingered long enough."""
        self.redis.set(own_tasks.GO_ON.format(job.id), 1, ex=own_tasks.KEEP_S)

    def times(self, result):
        """How often that job reached a device."""
        return int(self.redis.get(f"own:times:{result.id}") or 0)

    def queued(self, model="lingers"):
        return self.redis.llen(f"nograd.{model}")

    def inspect(self, what):
        """What the only worker says."""
        ((_, found),) = getattr(self.app.control.inspect(timeout=TIMEOUT, limit=1), what)().items()
        return found


@pytest.fixture
def fleet(models, start_worker):
    """A Redis for one test, without workers so far; they end with the module."""
    with start_worker.redis() as server:
        made = Fleet(server, models, start_worker)
        yield made
        made.app.close()


@pytest.fixture(scope="module")
def shared(models, start_worker):
    """One worker that does not end in any test, with extended results."""
    with start_worker.redis() as server:
        made = Fleet(server, models, start_worker)
        made.start(conf={"result_extended": True}, lasts=True)
        yield made
        made.app.close()


@pytest.fixture(scope="module")
def narrow(models, start_worker):
    """One worker that holds a single message: all others are in the queue. Task signals are noted."""
    with start_worker.redis() as server:
        made = Fleet(server, models, start_worker)
        made.start("-I", "signal_log", "-c", "1", lasts=True)
        yield made
        made.app.close()


def ids(requests):
    return {request["id"] for request in requests}


# -- times -------------------------------------------------------------------------------------------------------------


def test_a_job_with_an_eta_is_scheduled_until_then(shared):
    eta = datetime.now(UTC) + timedelta(seconds=2)
    result = shared.send("triple", 2, eta=eta)
    assert result.get(timeout=TIMEOUT) == 6
    assert datetime.now(UTC) >= eta
    until(lambda: shared.inspect("scheduled") == [])


def test_a_scheduled_job_can_be_revoked(shared):
    result = shared.send("triple", 2, countdown=3600)
    (scheduled,) = until(lambda: shared.inspect("scheduled"))
    assert scheduled["request"]["id"] == result.id
    shared.app.control.revoke(result.id)
    until(lambda: result.id in shared.inspect("revoked"))
    # Celery answers a revoked job when its time comes, not before; the client need not wait for that.
    assert result.state in {"PENDING", "REVOKED"}


def test_a_job_that_expires_in_the_queue_is_revoked_and_never_runs(narrow):
    front = narrow.on_the_device()
    task_id = uuid.uuid4().hex
    late = narrow.send("lingers", {"run": task_id, "seconds": 0}, task_id=task_id, expires=0.5)
    assert narrow.queued() == 1
    time.sleep(0.6)
    narrow.let_go(front)
    front.get(timeout=TIMEOUT)
    until(lambda: late.state == "REVOKED")
    assert narrow.times(late) == 0


# -- revokes -----------------------------------------------------------------------------------------------------------


def test_a_job_revoked_in_the_queue_never_runs(narrow):
    front = narrow.on_the_device()
    queued = narrow.linger(0)
    assert narrow.queued() == 1
    narrow.app.control.revoke(queued.id)
    until(lambda: queued.id in narrow.inspect("revoked"))
    narrow.let_go(front)
    front.get(timeout=TIMEOUT)
    until(lambda: queued.state == "REVOKED")
    assert narrow.times(queued) == 0


def test_revoking_a_running_job_without_terminate_lets_it_end(shared):
    running = shared.on_the_device()
    shared.app.control.revoke(running.id)
    until(lambda: running.id in shared.inspect("revoked"))
    shared.let_go(running)
    assert running.get(timeout=TIMEOUT)
    assert running.state == "SUCCESS"


# -- remote control ----------------------------------------------------------------------------------------------------


def test_inspect_names_what_the_worker_holds(shared):
    jobs = [shared.linger(3600) for _ in range(3)]
    held = until(
        lambda: (found := ids(shared.inspect("active") + shared.inspect("reserved"))) and len(found) == 3 and found
    )
    assert held == {job.id for job in jobs}
    active = shared.inspect("active")
    assert {request["name"] for request in active} == {"nograd.predict"}
    for job in jobs:
        shared.let_go(job)
    assert all(job.get(timeout=TIMEOUT) for job in jobs)
    until(lambda: shared.inspect("active") + shared.inspect("reserved") == [])


def test_a_remote_shutdown_ends_the_worker_it_names_and_loses_nothing(fleet):
    leaving, staying = fleet.start(), fleet.start()
    jobs = [fleet.linger(0.3) for _ in range(12)]
    time.sleep(0.5)
    fleet.app.control.shutdown(destination=[leaving.name])
    assert leaving.process.wait(TIMEOUT) == 0
    assert all(job.get(timeout=TIMEOUT) for job in jobs)
    assert staying.alive()
    until(lambda: list(fleet.app.control.inspect(timeout=2).ping() or ()) == [staying.name])


# -- results and signals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linked", [False, True], ids=["fast path", "complete path"])
def test_an_extended_result_tells_what_was_asked_and_who_answered(shared, linked):
    link = shared.app.signature("nograd.predict", ("triple", 0), immutable=True, queue="nograd.triple")
    result = shared.send("triple", 2, **({"link": link} if linked else {}))
    assert result.get(timeout=TIMEOUT) == 6
    assert result.name == "nograd.predict"
    assert list(result.args) == ["triple", 2]
    assert result.queue == "nograd.triple"
    assert result.worker.startswith("test-")
    assert result.retries == 0


@pytest.mark.parametrize(
    ("value", "state", "fired"),
    [
        (2, "SUCCESS", ["task_postrun", "task_prerun", "task_success"]),
        ("bad", "FAILURE", ["task_failure", "task_postrun", "task_prerun"]),
    ],
)
def test_each_signal_is_fired_once(narrow, value, state, fired):
    results = [narrow.send("triple", value) for _ in range(5)]
    for result in results:
        result.get(timeout=TIMEOUT, propagate=False)
        assert result.state == state
    for result in results:
        until(lambda result=result: len(signals_of(narrow, result)) >= len(fired))
    time.sleep(0.2)
    assert [sorted(signals_of(narrow, result)) for result in results] == [fired] * 5


def signals_of(fleet, result):
    notes = map(json.loads, fleet.redis.lrange(own_tasks.LOG.format("signals"), 0, -1))
    return [name for task_id, name in notes if task_id == result.id]


def test_a_job_that_may_work_later_is_tried_again_with_growing_pauses(shared):
    began = time.monotonic()
    result = shared.send("triple", {"run": uuid.uuid4().hex, "busy until": 3})
    until(lambda: result.state == "RETRY")
    assert result.get(timeout=TIMEOUT) == 9
    assert result.retries == 2
    assert time.monotonic() - began > 1 + 2


def test_a_job_that_never_works_fails_with_its_own_error_and_is_not_tried_again(shared):
    value = {"run": uuid.uuid4().hex}  # no such key: the model raises
    result = shared.send("triple", value)
    result.get(timeout=TIMEOUT, propagate=False)
    assert isinstance(result.result, errors.ModelFailed)
    assert result.retries == 0


# -- shutdowns ---------------------------------------------------------------------------------------------------------


def test_sigterm_gives_back_at_once_what_has_not_started_and_finishes_the_rest(fleet):
    worker = fleet.start()
    first = fleet.on_the_device()
    others = [fleet.linger(0) for _ in range(20)]
    until(lambda: fleet.queued() == 0)
    worker.process.send_signal(signal.SIGTERM)
    until(lambda: fleet.queued() == 20)
    assert worker.alive()  # it is still at the first
    assert not first.ready()
    fleet.let_go(first)
    assert worker.process.wait(TIMEOUT) == 0
    assert first.get(timeout=TIMEOUT)
    fleet.start()
    assert all(job.get(timeout=TIMEOUT) for job in others)


def test_what_was_being_prepared_at_sigterm_goes_back_once_it_is_while_the_device_is_still_busy(fleet):
    worker = fleet.start()
    first, second = fleet.on_the_device(), fleet.in_preparation()
    third = fleet.linger(0)
    until(lambda: fleet.queued() == 0)
    worker.process.send_signal(signal.SIGTERM)
    until(lambda: fleet.queued() == 1)  # the third
    fleet.let_go(second)
    until(lambda: fleet.queued() == 2)
    assert worker.alive()  # it is still at the first
    fleet.let_go(first)
    assert worker.process.wait(TIMEOUT) == 0
    fleet.start()
    assert all(job.get(timeout=TIMEOUT) for job in (first, second, third))
    assert fleet.times(second) == 2  # prepared once more, by the second worker


def test_a_soft_shutdown_lets_short_jobs_end_and_gives_long_ones_back(fleet):
    worker = fleet.start(conf={"worker_soft_shutdown_timeout": 5})
    short = fleet.on_the_device()
    long = fleet.linger(3600)
    until(
        lambda: f"[{long.id}] received" in worker.text(), worker.text
    )  # so it begins here, once the short one has ended
    worker.process.send_signal(signal.SIGQUIT)
    until(lambda: "Soft Shutdown" in worker.text(), worker.text)
    fleet.let_go(short)
    worker.process.wait(TIMEOUT)
    assert short.state == "SUCCESS"
    assert not long.ready()
    fleet.start()
    assert long.get(timeout=TIMEOUT)  # from its second worker


def test_a_warm_shutdown_that_is_asked_to_hurry_does_not_wait_for_the_device(fleet):
    worker = fleet.start()
    running = fleet.on_the_device()
    waiting = fleet.linger(0)
    until(lambda: fleet.queued() == 0)
    worker.process.send_signal(signal.SIGTERM)
    until(lambda: fleet.queued() == 1)
    worker.process.send_signal(signal.SIGQUIT)
    worker.process.wait(TIMEOUT)
    assert not running.ready()
    fleet.start()
    assert waiting.get(timeout=TIMEOUT)


def test_a_cold_shutdown_loses_nothing(fleet):
    worker = fleet.start()
    running = fleet.on_the_device()
    waiting = [fleet.linger(0) for _ in range(30)]
    until(lambda: fleet.queued() == 0)
    worker.process.send_signal(signal.SIGQUIT)
    worker.process.wait(TIMEOUT)
    fleet.start()
    assert all(job.get(timeout=TIMEOUT) for job in [running, *waiting])
