"""Models that come and go in a real worker, by the command line, while jobs of another model run all the time."""

import json
import subprocess
import sys
import threading
import time

import pytest

from nograd.producer import Client
from nograd.workers.exits import EXIT_HUNG
from waiting import PATIENCE_S as TIMEOUT
from waiting import until

READY = ("status", "--ready", "--timeout", "1")

CODE = """
import os, time, torch

HERE = os.path.dirname(__file__)


class Steady:
    def load(self, device): pass
    def forward(self, batch): time.sleep(0.01); return [2 * n for n in batch]


class Slow:
    def __init__(self, factor, gate=None): self.factor, self.gate = factor, gate
    def load(self, device):
        while self.gate and not os.path.exists(self.gate): time.sleep(0.01)
        self.weights = torch.nn.Linear(1000, 250, bias=False).eval()  # 1 MB
        self.myself = self  # a cycle: only the collector lets go of it
    def forward(self, batch):
        if os.path.exists(HERE + "/slowly"):
            time.sleep(0.1)
        return [self.factor * n for n in batch]
    def __del__(self): os.write(1, f"LET GO {self.factor}\\n".encode())  # whole, whatever the log writes meanwhile


class Hanging:
    def load(self, device): time.sleep(1000)
    def forward(self, batch): return batch


class Broken:
    def load(self, device): raise OSError("no licence")
    def forward(self, batch): return batch
"""

STEADY = """
[steady]
loader = "python"
class = "hosted_models:Steady"
"""


def slow(name, factor, gate=""):
    return f"""
[{name}]
loader = "python"
class = "hosted_models:Slow"
init = {{ factor = {factor}, gate = "{gate}" }}
batch = {{ max_items = 4 }}
"""


HANGING = """
[hanging]
loader = "python"
class = "hosted_models:Hanging"
load_timeout_s = 1
"""


class Fleet:
    """One worker, its model file, and the command line."""

    def __init__(self, file, url, start_worker):
        self.file, self.url, self.start_worker = file, url, start_worker

    def start(self, *args, ready=True, **env):
        self.worker = self.start_worker(self.file, *args, env=env, ready=ready)
        return self

    def hosting(self, verb, *words):
        """Have the worker load or unload a model; without its name, others would be waited for."""
        return self.nograd("models", verb, *words, "--worker", self.worker.name)

    def nograd(self, *words):
        command = [sys.executable, "-m", "nograd.producer.cli", *words, "--redis", self.url, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
        return done.returncode, json.loads(done.stdout) if done.stdout else None

    def shown(self, *words):
        """What a person sees."""
        command = [sys.executable, "-m", "nograd.producer.cli", *words, "--redis", self.url]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT).stdout

    def state(self, model):
        """How a model stands in the worker."""
        [worker] = until(lambda: [each for each in self.status() if each["name"] == self.worker.name])
        return worker["models"][model]

    def status(self):
        """The workers that answered within a second."""
        code, status = self.nograd("status", "--timeout", "1")
        assert code == 0
        return status["workers"]

    def ready(self, *words):
        """Whether one said within a second that it is."""
        return self.nograd(*READY, *words)[0] == 0


@pytest.fixture
def fleet(tmp_path, redis_url, start_worker):
    (tmp_path / "hosted_models.py").write_text(CODE)
    file = tmp_path / "models.toml"
    file.write_text(STEADY)
    made = Fleet(file, redis_url, start_worker)
    yield made
    made.worker.stop()


@pytest.fixture
def client(redis_url, fleet):
    with Client(redis_url, models=fleet.file) as made:
        yield made


@pytest.fixture
def traffic(client, fleet):
    """Jobs for the steady model, all the time; in the end each must have its own answer."""
    jobs, stop = [], threading.Event()

    def send():
        while not stop.wait(0.02):
            jobs.append((len(jobs), client.submit("steady", len(jobs))))

    def check():
        thread.join(TIMEOUT)
        assert [job.result(TIMEOUT) for _, job in jobs] == [2 * n for n, _ in jobs]
        return len(jobs)

    thread = threading.Thread(target=send)
    thread.start()
    yield lambda: stop.set() or check()
    stop.set()
    thread.join(TIMEOUT)


def test_a_model_is_loaded_and_unloaded_while_others_work_and_no_job_is_lost(fleet, client, traffic):
    fleet.start()
    fleet.file.write_text(STEADY + slow("extra", 10))
    code, said = fleet.hosting("load", "extra")
    assert (code, said["workers"][fleet.worker.name]["status"]) == (0, "ready")
    assert client.submit("extra", 1).result(TIMEOUT) == 10
    assert fleet.state("extra")["bytes"] == 1_000_000

    slowly = fleet.file.with_name("slowly")
    slowly.touch()
    waiting = client.submit_many("extra", range(2000))  # 50 seconds of work
    waiting[0].result(TIMEOUT)
    code, said = fleet.hosting("unload", "extra")
    assert (code, said["workers"][fleet.worker.name]["status"]) == (0, "unloaded")
    assert "LET GO 10" in fleet.worker.text()
    left = client.broker.waiting(["extra"])["extra"]
    assert left > 0
    until(lambda: sum(job.done() for job in waiting) + left == len(waiting))
    assert "extra" in client.models()

    slowly.unlink()
    assert fleet.hosting("load", "extra")[0] == 0
    assert [job.result(TIMEOUT) for job in waiting] == [10 * n for n in range(2000)]
    assert traffic() > 20
    assert "this is a bug" not in fleet.worker.text()


def test_reload_takes_what_the_file_says_now(fleet, client, traffic):
    fleet.file.write_text(STEADY + slow("extra", 10))
    fleet.start()
    fleet.file.write_text(STEADY + slow("extra", 7))
    assert fleet.hosting("load", "extra")[0] == 0  # it is there: nothing happens
    assert client.submit("extra", 1).result(TIMEOUT) == 10
    jobs = [client.submit("extra", n) for n in range(60)]
    assert fleet.hosting("load", "extra", "--reload")[0] == 0
    assert client.submit("extra", 1).result(TIMEOUT) == 7
    assert all(job.result(TIMEOUT) in (10 * n, 7 * n) for n, job in enumerate(jobs))
    assert traffic() > 0


def test_a_job_that_comes_when_its_model_has_gone_goes_back_to_its_queue(fleet, client, redis_url):
    """With a countdown it is in the worker's hands before the unload, and due after it."""
    from nograd.tasks import create_app
    from nograd.tasks.settings import Settings

    fleet.file.write_text(STEADY + slow("extra", 10))
    fleet.start()
    app = create_app(Settings(redis_url))
    for seconds in (4, 20, 100):
        due = time.monotonic() + seconds
        late = app.tasks["nograd.predict"].apply_async(("extra", 3), countdown=seconds)
        until(lambda: client.broker.waiting(["extra"])["extra"] == 0)
        assert fleet.hosting("unload", "extra")[0] == 0
        if time.monotonic() < due:
            break
        assert fleet.hosting("load", "extra")[0] == 0  # that took so long that the job was due before
        assert late.get(timeout=TIMEOUT) == 30
    until(lambda: client.broker.waiting(["extra"])["extra"] == 1)
    # Through the queue of another model it would come back again and again: that one is answered.
    misled = app.send_task("nograd.predict", args=["extra", 1], queue="nograd.steady")
    with pytest.raises(Exception, match="this worker has no model 'extra'"):
        misled.get(timeout=TIMEOUT)
    assert fleet.hosting("load", "extra")[0] == 0
    assert late.get(timeout=TIMEOUT) == 30
    app.close()


def test_a_model_that_cannot_be_loaded_says_why_and_the_worker_goes_on(fleet, client, traffic):
    fleet.start()
    fleet.file.write_text(STEADY + slow("extra", 10) + '[broken]\nloader = "python"\nclass = "hosted_models:Broken"\n')
    code, said = fleet.hosting("load", "broken")
    assert (code, said["error"]["type"]) == (2, "ModelFileError")
    assert "load() raised OSError: no licence" in said["error"]["message"]
    why = f"broken failed on {fleet.worker.name}: {fleet.state('broken')['error']}"
    for words in ((), ("--model", "broken")):
        until(lambda: fleet.nograd(*READY, *words)[1].get("reason") == why)  # noqa: B023
    assert not fleet.ready()
    until(lambda: why in fleet.shown("status", "--timeout", "1"))
    unknown = until(lambda: [said for _, said in [fleet.nograd(*READY, "--model", "stedy")] if said["workers"]])
    assert unknown[0]["reason"] == "no worker has 'stedy'. Did you mean 'steady'? They have broken, steady"
    assert fleet.hosting("unload", "broken")[0] == 0
    until(fleet.ready)
    assert traffic() > 0


def test_a_name_the_model_file_does_not_have_is_refused_and_the_worker_stays_as_it_is(fleet, client, traffic):
    fleet.start()
    for text, name, why in (
        (STEADY, "steddy", "no model 'steddy'. Did you mean 'steady'? It has steady"),
        (slow("extra", 10), "nobody", "no model 'nobody'. It has extra"),
        ("not toml", "steady", "not valid TOML"),  # what is loaded is not unloaded for it
    ):
        fleet.file.write_text(text)
        code, said = fleet.hosting("load", name, "--reload")
        assert (code, said["error"]["type"]) == (2, "ModelFileError")
        assert why in said["error"]["message"]
    [worker] = until(fleet.status)
    assert {name: state["status"] for name, state in worker["models"].items()} == {"steady": "ready"}
    until(fleet.ready)
    assert client.submit("steady", 4).result(TIMEOUT) == 8
    assert traffic() > 0


def test_other_models_answer_while_one_is_loaded(fleet, client):
    fleet.start()
    gate = fleet.file.with_name("gate")
    fleet.file.write_text(STEADY + slow("extra", 10, gate))
    assert fleet.hosting("load", "extra", "--timeout", "0")[1]["workers"][fleet.worker.name]["status"] == "loading"
    assert [job.result(TIMEOUT) for job in client.submit_many("steady", range(20))] == [2 * n for n in range(20)]
    assert fleet.state("extra")["status"] == "loading"
    gate.touch()
    assert fleet.hosting("load", "extra")[0] == 0
    assert client.submit("extra", 1).result(TIMEOUT) == 10


def test_a_load_that_hangs_fails_in_time_and_says_where_and_the_worker_goes_on(fleet, client, traffic):
    fleet.start()
    fleet.file.write_text(STEADY + slow("extra", 10) + HANGING)
    code, said = fleet.hosting("load", "hanging")
    assert code == 2
    assert "[hanging]: loading takes longer than load_timeout_s = 1 s" in said["error"]["message"]
    assert "time.sleep(1000)" in fleet.worker.text()
    assert fleet.hosting("load", "extra")[0] == 0  # the next change does not wait for it
    assert client.submit("extra", 1).result(TIMEOUT) == 10
    assert traffic() > 0
    assert fleet.worker.stop() == 0


def test_a_worker_that_cannot_load_its_models_in_time_ends_and_says_where_it_was(fleet):
    fleet.file.write_text(STEADY + HANGING)
    worker = fleet.start(ready=False).worker
    until(lambda: not worker.alive(), worker.text)
    assert worker.process.returncode == EXIT_HUNG
    assert "the load of model hanging took longer than load_timeout_s = 1 s" in worker.text()
    assert "time.sleep(1000)" in worker.text()


def test_a_load_that_was_given_up_leaves_nothing_once_it_ends(fleet):
    gate = fleet.file.with_name("gate")
    fleet.start()
    fleet.file.write_text(STEADY + slow("late", 10, gate) + "load_timeout_s = 1\n" + slow("extra", 20))
    assert fleet.hosting("load", "late")[0] == 2
    gate.touch()
    until(lambda: fleet.nograd("models", "load", "extra", "--reload")[0] == 0 and "LET GO 10" in fleet.worker.text())


def test_models_beyond_the_memory_budget_are_refused_and_leave_nothing_behind(fleet, client):
    fleet.file.write_text(STEADY + slow("one", 1) + slow("two", 2) + slow("three", 3))
    fleet.start("-Q", "nograd.steady,nograd.one", NOGRAD_MEMORY_BUDGET="2.5MB")
    assert fleet.hosting("load", "two")[0] == 0
    code, said = fleet.hosting("load", "three")
    assert code == 2
    assert (
        "[three]: the model holds 1.0 MB, beside steady (0 B), one (1.0 MB), two (1.0 MB); "
        "the memory budget of cpu is 2.5 MB"
    ) in said["error"]["message"]
    assert "LET GO 3" in fleet.worker.text()
    assert fleet.hosting("unload", "one")[0] == 0
    assert fleet.hosting("load", "three")[0] == 0
    assert client.submit("three", 2).result(TIMEOUT) == 6


def test_models_beyond_the_budget_stop_the_start(fleet):
    fleet.file.write_text(slow("one", 1) + slow("two", 2))
    fleet.start(ready=False, NOGRAD_MEMORY_BUDGET="1.5MB")
    assert fleet.worker.process.wait(TIMEOUT) == 2
    assert "[two]: the model holds 1.0 MB, beside one (1.0 MB)" in fleet.worker.text()


def test_a_worker_is_alive_before_a_model_is_ready(fleet, client):
    fleet.start()
    gate = fleet.file.with_name("gate")
    fleet.file.write_text(STEADY + slow("extra", 10, gate))
    until(fleet.ready)
    code, said = fleet.hosting("load", "extra", "--timeout", "0")
    assert (code, said["workers"][fleet.worker.name]["status"]) == (1, "loading")
    why = f"extra is loading on {fleet.worker.name}"
    until(lambda: fleet.nograd(*READY) == (1, {"ready": False, "workers": [fleet.worker.name], "reason": why}))
    assert not fleet.ready("--model", "extra")
    until(lambda: fleet.ready("--model", "steady"))
    assert client.broker.answers()
    gate.touch()
    assert fleet.hosting("load", "extra")[0] == 0  # waits for the one that is on its way
    until(lambda: fleet.ready("--model", "extra"))
    assert not fleet.ready("--here")  # its name is of no host


def test_a_worker_that_is_not_up_is_named(fleet):
    fleet.start()
    code, said = fleet.nograd("models", "unload", "steady", "--worker", "nobody@nowhere")
    assert (code, said["error"]["type"]) == (2, "ConfigError")
    assert "nobody@nowhere" in said["error"]["message"]
