"""The laws of `nograd.workers.risk`: who pays for a crash and who does not, in real workers; and time limits before the
device.
"""

import shutil
import threading
import time
from types import SimpleNamespace

import pytest

import fleet_of_tests
from nograd.producer import Client
from nograd.tasks import errors, transport
from nograd.workers import risk, watchdog
from nograd.workers.risk import Gate, Risks
from nograd.workers.watchdog import Activities
from waiting import PATIENCE_S as TIMEOUT
from waiting import until


class Fleet:
    """A Redis of its own, a client, and workers of models that do what their inputs say."""

    def __init__(self, folder, start_worker, redis, client, models):
        self.folder, self.start_worker, self.redis, self.client, self.models = (
            folder, start_worker, redis, client, models,
        )  # fmt: skip

    def start(self):
        return self.start_worker(self.models, redis_url=self.redis.url, env={"NOGRAD_LEASE_S": "3"})

    def waits(self, worker):
        return (self.folder / f"waits-{worker.process.pid}").exists()

    def until_dead(self, worker):
        assert worker.process.wait(TIMEOUT) < 0, worker.text()

    def dead_letters(self):
        return [letter["task_id"] for letter in transport.DeadLetters(self.client.app.backend.client)]


@pytest.fixture
def fleet(tmp_path, start_worker):
    shutil.copy(fleet_of_tests.__file__, tmp_path)
    models = tmp_path / "models.toml"
    models.write_text(
        "".join(
            f"""
[{name}]
loader = "python"
class = "fleet_of_tests:Fragile"
init = {{ folder = "{tmp_path}" }}
batch = {{ max_items = 4 }}
{more}
"""
            for name, more in {
                "fragile": "hard_timeout_s = 2.5",
                "patient": "",
                "text": 'input = "text"',
                "hurried": "timeout_s = 1",
            }.items()
        )
        + """
[slow]
loader = "python"
class = "fleet_of_tests:Slow"
"""
    )
    with start_worker.redis() as redis, Client(redis.url, models=models) as client:
        made = Fleet(tmp_path, start_worker, redis, client, models)
        yield made
        (tmp_path / "open").touch()


# -- whose fault it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "how"), [("fragile", "crash in finish"), ("text", "crash in prepare")])
def test_a_crash_in_a_model_s_own_code_is_its_own_job_s_fault_and_no_other_s(fleet, model, how):
    before, culprit, after = (
        fleet.client.submit_many(model, [str(n) for n in range(10)]),
        fleet.client.submit(model, how),
        fleet.client.submit_many(model, [str(n) for n in range(10, 20)]),
    )
    for _ in range(3):
        fleet.until_dead(fleet.start())
    fleet.start()
    with pytest.raises(errors.WorkerDied, match="3 workers died"):
        culprit.result(TIMEOUT)
    assert [job.result(TIMEOUT) for job in before + after] == [str(n) for n in range(20)]
    # Beside it the first time, at most: from then on it ran alone.
    assert max(job.timings().deaths for job in before + after) <= 1
    assert fleet.dead_letters() == [culprit.id]


@pytest.mark.parametrize("where", ["forward", "finish", "prepare"])
def test_nothing_that_may_crash_runs_beside_a_job_that_runs_alone(fleet, where):
    innocent = fleet.client.submit("patient", f"wait in {where}")
    worker = fleet.start()
    until(lambda: fleet.waits(worker))
    guilty = fleet.client.submit("patient", "crash in prepare")
    fleet.until_dead(worker)
    guilty.cancel()  # it has done its part: now the innocent one is suspected
    worker = fleet.start()
    until(lambda: fleet.waits(worker))
    guilty = fleet.client.submit("patient", "crash in prepare")  # a new one: nobody knows anything of it
    time.sleep(1)
    assert worker.alive()
    guilty.cancel()
    (fleet.folder / "open").touch()
    fleet.start()  # the guilty one, if its preparation had begun but for its turn, takes the first worker along now
    assert innocent.result(TIMEOUT) == f"wait in {where}"
    assert innocent.timings().deaths == 1


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["prepare", "finish"])
def test_the_hard_time_limit_is_one_input_s_not_that_of_a_message_of_many(fleet, where):
    worker = fleet.start()
    values = [f"slow in {where}"] * 10  # 3 s in all
    assert list(fleet.client.map("fragile", values, batch=10)) == values
    assert worker.alive()


def test_a_time_limit_also_ends_the_preparation_and_the_waiting_for_it(fleet):
    worker = fleet.start()
    # More of them than there are threads; one message of several inputs.
    jobs = fleet.client.submit_many("hurried", ["wait in prepare"] * 40)
    some = list(fleet.client.map("hurried", ["wait in prepare"] * 3, batch=3, return_exceptions=True))
    assert [type(one) for one in some] == [errors.DeadlinePassed] * 3
    for job in jobs:
        with pytest.raises(errors.DeadlinePassed):
            job.result(TIMEOUT)
    assert not (fleet.folder / "open").exists()
    (fleet.folder / "open").touch()
    until(lambda: fleet.client.submit("hurried", "x").exception(TIMEOUT) is None)
    assert worker.alive()


def test_results_do_not_wait_for_another_model_that_finishes_slowly(fleet):
    worker = fleet.start()
    slow = fleet.client.submit_many("patient", ["wait in finish"] * 20)
    until(lambda: fleet.waits(worker))
    assert fleet.client.submit("slow", 0).result(TIMEOUT) == 0
    (fleet.folder / "open").touch()
    assert [job.result(TIMEOUT) for job in slow] == ["wait in finish"] * 20


# -- the parts --------------------------------------------------------------------------------------------------------


def test_who_wants_to_be_alone_waits_for_all_inside_and_keeps_others_out():
    gate, order = Gate(), []
    gate.enter()
    gate.enter()

    def alone():
        with gate.alone():
            order.append("alone")
            time.sleep(0.1)
            order.append("not any more")

    def enter():
        gate.enter()
        order.append("inside")
        gate.leave()

    threads = [threading.Thread(target=alone)]
    threads[0].start()
    while not gate.closed:
        time.sleep(0.001)
    threads += [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads[1:]:
        thread.start()
    gate.leave()
    assert order == []
    gate.leave()
    for thread in threads:
        thread.join(TIMEOUT)
    assert order == ["alone", "not any more", *["inside"] * 3]


def test_the_inputs_of_a_stint_have_a_limit_each_and_it_makes_way_between_them(monkeypatch):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    for module in (risk, watchdog):
        monkeypatch.setattr(module, "time", clock)
    activities = Activities()
    risks = Risks(activities)
    model = SimpleNamespace(name="m", spec=SimpleNamespace(hard_timeout_s=0.2))
    done = threading.Event()

    def alone():
        with risks.gate.alone():
            assert activities.overdue() is None
            done.set()

    with risks.stint("finish", model, SimpleNamespace(delivery=None), risky=True) as stint:
        for _ in range(5):
            stint.item()
            clock.now += 0.15
            assert activities.overdue() is None
        thread = threading.Thread(target=alone)
        thread.start()
        while not risks.gate.closed:
            time.sleep(0.001)
        assert not done.is_set()
        stint.item()
        assert done.is_set()
        clock.now += 0.25
        assert activities.overdue().what == "finish"
    thread.join(TIMEOUT)
    assert activities.overdue() is None
    with risks.gate.alone():
        pass
