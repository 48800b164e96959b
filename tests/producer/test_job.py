"""A job's outcome, seen by threads and coroutines, and its end by other means than success."""

import asyncio
import json
import threading
import time

import pytest

from nograd.producer import Client, watcher
from nograd.producer.embedded import EmbeddedRedis, find_server
from nograd.producer.outcomes import Outcome, read_outcome
from nograd.tasks import (
    BrokerUnavailable,
    InvalidInput,
    JobCancelled,
    JobError,
    ModelFailed,
    ResultTimeout,
    UnknownModel,
    errors,
)
from waiting import PATIENCE_S as TIMEOUT
from waiting import until

# -- results ----------------------------------------------------------------------------------------------------------


def test_a_result_comes_back_from_a_worker(served):
    job = served.submit("total", [1, 2, 3.5])
    assert job.result(TIMEOUT) == 6.5
    assert (job.state, job.done(), job.exception(0)) == ("SUCCESS", True, None)
    assert served.result(job.id, 10) == 6.5  # known by its id alone
    assert served.job(job.id).result(0) == 6.5


def test_a_null_prediction_is_a_result(served):
    assert served.submit("echo", None).result(TIMEOUT) is None


def test_parameters_reach_the_worker(served):
    assert served.submit("echo", 1, params={"k": 2}).result(TIMEOUT) == {"echo": 1, "params": {"k": 2}}


def test_a_file_reaches_the_worker_as_its_bytes(served, tmp_path):
    (tmp_path / "x.jpg").write_bytes(bytes(1000))
    assert served.submit("image", tmp_path / "x.jpg").result(TIMEOUT) == {"bytes": 1000}


def test_many_jobs_have_a_result_each(served):
    jobs = served.submit_many("echo", [{"n": n} for n in range(300)])
    assert [job.result(TIMEOUT) for job in jobs] == [{"n": n} for n in range(300)]


def test_a_result_is_forgotten_on_request(served):
    job = served.submit("echo", 1)
    job.result(TIMEOUT)
    job.forget()
    assert job.state == "PENDING"


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_job_raises_its_own_typed_error(served):
    with pytest.raises(InvalidInput, match="rows are numbers"):
        served.submit("total", ["a"]).result(TIMEOUT)
    job = served.submit("fails", "typed")
    error = job.exception(TIMEOUT)
    assert (type(error), error.message, job.state) == (ModelFailed, "it broke", "FAILURE")


def test_a_foreign_exception_becomes_a_job_error_that_names_it(served):
    with pytest.raises(JobError, match="ZeroDivisionError: division by zero") as error:
        served.submit("fails", "foreign").result(TIMEOUT)
    assert type(error.value) is JobError


def test_each_raise_is_an_error_of_its_own(served):
    job = served.submit("fails", "typed")
    raised = []
    for _ in range(2):
        with pytest.raises(ModelFailed) as error:
            job.result(TIMEOUT)
        raised.append(error.value)
    assert raised[0] is not raised[1]  # or the second would carry the traceback of the first


@pytest.mark.parametrize("name", ["system", "NoSuchError", "JobError.__init__", "annotations", "ClassVar"])
def test_a_stored_error_can_name_our_error_classes_only(name):
    result = {"exc_type": name, "exc_module": errors.__name__, "exc_message": ["boom"]}
    outcome = read_outcome({"status": "FAILURE", "result": result})
    assert type(outcome.error) is JobError
    assert outcome.error.message == f"{name}: boom"


def test_a_result_nobody_can_read_is_an_error_and_not_a_hang(client, redis):
    job = client.job("broken")
    redis.set("celery-task-meta-broken", "{not json")
    with pytest.raises(JobError, match="cannot be read"):
        job.result(5)


# -- waiting ----------------------------------------------------------------------------------------------------------


def test_a_timeout_names_the_job_its_state_and_the_queue_nobody_serves(client):
    client.submit("echo", 1)
    job = client.submit("echo", 2)
    started = time.monotonic()
    with pytest.raises(ResultTimeout) as error:
        job.result(0.2)
    assert time.monotonic() - started >= 0.2
    assert job.id in error.value.message
    assert "PENDING (unknown id, or no worker is serving the queue nograd.echo, 2 jobs waiting)" in error.value.message


def test_a_timeout_of_zero_only_looks(client):
    with pytest.raises(ResultTimeout, match="unknown or expired id"):
        client.result("nobody-sent-this", timeout=0)


def test_a_job_can_be_asked_again_after_a_timeout(served, gate):
    job = served.submit("waits", str(gate))
    with pytest.raises(ResultTimeout):
        job.result(0.05)
    gate.open()
    assert job.result(TIMEOUT) == str(gate)


def test_a_result_timeout_is_a_timeout_error(client):
    with pytest.raises(TimeoutError):
        client.result("x", 0)


def test_closing_the_client_ends_the_waits(redis_url):
    client = Client(redis_url)
    caught = []

    def wait():
        try:
            client.result("x")
        except ResultTimeout as err:
            caught.append(err.message)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: client._watcher._watched)
    asking = client._watcher._thread
    client.close()
    thread.join(TIMEOUT)
    assert caught == ["the client was closed while the job was waited for; the job goes on"]
    asking.join(TIMEOUT)
    assert not asking.is_alive()


def answer_once(client):
    """Its Redis has answered: from now on it may be away for a while."""
    client.app.backend.store_result("y", 1, "SUCCESS")
    assert client.result("y", TIMEOUT) == 1


def test_a_restart_of_redis_does_not_end_a_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(watcher, "OUTAGE_S", TIMEOUT)
    server = EmbeddedRedis(tmp_path).start()
    url, port = server.url, server.port
    client = Client(url)
    try:
        answer_once(client)
        future = client.job("x")._watcher.watch("x")
        server.stop()
        time.sleep(0.7)
        server._password, server.port = url.split(":")[2].partition("@")[0], port
        again = server._spawn(find_server(), tmp_path)
        server._stack.callback(again.stop)
        assert server._answers(again)
        client.app.backend.store_result("x", {"a": 1}, "SUCCESS")
        assert future.result(TIMEOUT) == Outcome("SUCCESS", {"a": 1})
    finally:
        client.close()
        server.stop()


def test_redis_gone_for_long_ends_every_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(watcher, "OUTAGE_S", 0.5)
    with EmbeddedRedis() as server, Client(server.url) as client:
        answer_once(client)
        server.stop()
        with pytest.raises(BrokerUnavailable):
            client.result("x", TIMEOUT)


# -- await ------------------------------------------------------------------------------------------------------------


def test_hundreds_of_awaits_share_one_thread_and_never_block_the_loop(served, monkeypatch):
    fetch, hanging, go_on = served._watcher._fetch, threading.Event(), threading.Event()

    def hang(job_ids):
        hanging.set()
        assert go_on.wait(TIMEOUT)
        return fetch(job_ids)

    monkeypatch.setattr(served._watcher, "_fetch", hang)
    before = threading.active_count()

    async def main():
        results = asyncio.gather(*served.submit_many("echo", list(range(400))))
        assert await asyncio.to_thread(hanging.wait, TIMEOUT)
        for _ in range(100):  # the loop turns, although Redis does not answer
            await asyncio.sleep(0.001)
        assert threading.active_count() <= before + 2  # who has waited for this, and the watcher
        go_on.set()
        return await results

    assert asyncio.run(main()) == list(range(400))


def test_await_raises_the_typed_error(served):
    async def main():
        await served.submit("fails", "typed")

    with pytest.raises(ModelFailed, match="it broke"):
        asyncio.run(main())


def test_await_can_be_limited_and_cancelled(client):
    async def main():
        async with asyncio.timeout(0.1):
            await client.job("x")

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    until(lambda: not client._watcher._watched)  # nobody is asked for any more


# -- cancel -----------------------------------------------------------------------------------------------------------


def test_a_cancelled_job_is_not_run(served, busy, revoked, gate):
    job = served.submit("waits", str(gate))
    job.cancel()
    until(lambda: job.id in revoked())
    assert busy()
    with pytest.raises(JobCancelled, match="cancelled"):
        job.result(TIMEOUT)
    assert job.state == "REVOKED"
    assert not gate.reached


def test_a_job_that_has_expired_is_not_run(served):
    with pytest.raises(JobCancelled):
        served.submit("echo", 1, expires_s=0).result(TIMEOUT)


def test_a_retryable_outcome_is_not_the_end(client):
    meta = {"status": "RETRY", "result": {"exc_type": "Overloaded", "exc_message": ["full"]}, "task_id": "x"}
    client.app.backend.client.set("celery-task-meta-x", json.dumps(meta))
    assert (client.job("x").state, client.job("x").done()) == ("RETRY", False)


def test_the_errors_a_worker_can_store_are_rebuilt(client):
    for cls in (UnknownModel, InvalidInput, errors.WorkerDied, errors.DeadlinePassed):
        client.app.backend.mark_as_failure("x", cls("why"))
        with pytest.raises(cls, match="why"):
            client.result("x", 0)
