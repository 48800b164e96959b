"""The device thread of `nograd.workers.engine` with real models: whom it names when, and what ends it."""

import sys
import threading
import weakref
from concurrent.futures import Future

import pytest
import torch

from nograd.tasks.errors import ConfigError, ModelFileError
from nograd.tasks.modelfile import load_model_file
from nograd.workers.batching import Item
from nograd.workers.engine import Engine, Hooks
from nograd.workers.models import open_model
from waiting import PATIENCE_S as TIMEOUT

CODE = """
import threading

import torch

log, entered, gate = [], threading.Event(), threading.Event()


class Echo:
    def load(self, device):
        pass

    def forward(self, batch):
        log.append("echo")
        return batch


class Stepwise(Echo):
    def load(self, device):
        log.append(threading.current_thread().name)

    def forward(self, batch):
        log.append(len(batch))
        entered.set()
        gate.wait(180)
        return batch


class Late(Echo):
    def load(self, device):
        gate.wait(180)


class Silent(Echo):
    def forward(self, batch):
        return [None] * len(batch)


class Lost(Echo):
    def load(self, device):
        try:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        except RuntimeError as err:
            raise ValueError("cannot load") from err


class Broken(Echo):
    def load(self, device):
        raise ValueError("cannot load")
"""
MODELS = """
[echo]
loader = "python"
class = "engine_models:Echo"
batch = { max_items = 1 }

[silent]
loader = "python"
class = "engine_models:Silent"

[lost]
loader = "python"
class = "engine_models:Lost"

[stepwise]
loader = "python"
class = "engine_models:Stepwise"
example = 1

[late]
loader = "python"
class = "engine_models:Late"

[broken]
loader = "python"
class = "engine_models:Broken"
"""


class Job:
    """What the engine tells of one input."""

    def __init__(self):
        self.params, self.outcome, self.done = {}, None, threading.Event()

    def abandoned(self):
        return False

    def resolve(self, index, outcome, forward=None):
        self.outcome = outcome
        self.done.set()


class Heard(Job):
    """A job that notes when it hears of its outcome."""

    def __init__(self, log):
        super().__init__()
        self._log = log

    def resolve(self, index, outcome, forward=None):
        self._log.append(self)
        super().resolve(index, outcome, forward)


class Prepared:
    """What is ready for the device."""


class Told:
    """Every call of the engine's hooks."""

    def __init__(self):
        self.forwards, self.lost, self.cleared, self.died = [], [], threading.Event(), threading.Event()

    def on_forward(self, jobs):
        self.forwards.append(list(jobs))
        if not jobs:
            self.cleared.set()

    def on_lost(self, why, jobs):
        self.lost.append((why, list(jobs)))
        self.died.set()


@pytest.fixture
def file(tmp_path):
    sys.modules.pop("engine_models", None)
    (tmp_path / "engine_models.py").write_text(CODE)
    path = tmp_path / "models.toml"
    path.write_text(MODELS)
    return load_model_file(path)


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def engine(file, told):
    made = Engine(file, ["echo"], Hooks(on_forward=told.on_forward, on_lost=told.on_lost), torch.device("cpu"))
    made.start()
    yield made
    made.finish()


def put(engine, *jobs, late=None):
    engine.queue.put([Item("echo", None, n, job, late=late) for n, job in enumerate(jobs)])


def test_who_is_on_the_device_is_replaced_and_taken_back_only_when_nobody_follows(engine, told):
    gate, entered = threading.Event(), threading.Event()
    engine.queue.call(lambda: (entered.set(), gate.wait()))
    assert entered.wait(TIMEOUT)
    jobs = [Job() for _ in range(3)]
    put(engine, *jobs)
    told.cleared.clear()
    del told.forwards[:]
    gate.set()
    for job in jobs:
        assert job.done.wait(TIMEOUT)
    assert told.cleared.wait(TIMEOUT)
    written = [jobs for jobs in told.forwards if jobs]
    assert written == [[job] for job in jobs]
    assert told.forwards[-1] == []
    assert told.forwards[:3] == written  # no empty one between them


def test_an_outcome_is_told_when_the_next_batch_is_named_and_at_once_if_none_follows(engine, told):
    gate, entered = threading.Event(), threading.Event()
    engine.queue.call(lambda: (entered.set(), gate.wait()))
    assert entered.wait(TIMEOUT)
    first, second = (Heard(told.forwards) for _ in range(2))  # the hooks and the jobs in one list
    put(engine, first, second)
    told.cleared.clear()
    del told.forwards[:]
    gate.set()
    assert told.cleared.wait(TIMEOUT)
    assert told.forwards == [[first], [second], first, second, []]


def test_a_batch_that_has_run_is_freed_by_another_thread(engine, file):
    engine.add(open_model(file, "silent")).result(TIMEOUT)
    freed = Future()
    prepared = Prepared()
    weakref.finalize(prepared, lambda: freed.set_result(threading.current_thread().name))
    engine.queue.put([Item("silent", None, prepared, Job())])
    del prepared
    assert freed.result(TIMEOUT) == "nograd-free-0"


def test_what_had_run_before_the_device_was_lost_is_told(engine, told):
    before, lost = Job(), Job()

    def prepare():
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    engine.queue.put([Item("echo", None, 0, before), Item("echo", None, None, lost, late=prepare)])
    assert told.died.wait(TIMEOUT)
    assert before.outcome.value == 0
    assert lost.outcome is None


def test_before_a_model_is_loaded_nobody_is_on_the_device(engine, told, file):
    job, seen = Job(), []
    gate = threading.Event()
    engine.queue.call(gate.wait)
    put(engine, job)
    gate.set()
    assert job.done.wait(TIMEOUT)
    engine.queue.call(lambda: seen.append(list(told.forwards)))
    with pytest.raises(ModelFileError, match="cannot load"):
        engine.add(open_model(file, "broken")).result(TIMEOUT)
    assert seen[0][-1] == []
    assert engine.alive
    assert told.lost == []


def test_who_ran_alone_is_taken_back_before_others_are_let_in_though_another_follows(engine, told):
    gate, entered = threading.Event(), threading.Event()
    engine.queue.call(lambda: (entered.set(), gate.wait()))
    assert entered.wait(TIMEOUT)
    alone, other = Job(), Job()
    put(engine, alone, late=lambda: 0)
    put(engine, other)
    del told.forwards[:]
    gate.set()
    assert alone.done.wait(TIMEOUT)
    assert other.done.wait(TIMEOUT)
    between = told.forwards[: told.forwards.index([other])]
    assert between[-1] == []
    assert next(jobs for jobs in between if jobs) == [alone]


def test_who_has_run_is_told_and_taken_back_before_the_next_waits_to_be_alone(engine, told):
    gate, entered = threading.Event(), threading.Event()
    engine.queue.call(lambda: (entered.set(), gate.wait()))
    assert entered.wait(TIMEOUT)
    before, alone = Job(), Job()
    put(engine, before)
    put(engine, alone, late=lambda: 0)
    engine.risks.gate.enter()  # a preparation that takes its time
    told.cleared.clear()
    gate.set()
    assert before.done.wait(TIMEOUT)
    assert told.cleared.wait(TIMEOUT)
    assert not alone.done.is_set()
    engine.risks.gate.leave()
    assert alone.done.wait(TIMEOUT)


def test_a_device_lost_in_a_late_preparation_is_lost_over_its_job(engine, told):
    def prepare():
        try:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        except RuntimeError as err:
            raise ValueError("bad input") from err

    job = Job()
    put(engine, job, late=prepare)
    assert told.died.wait(TIMEOUT)
    ((why, jobs),) = told.lost
    assert "bad input" in why
    assert jobs == [job]
    assert job.outcome is None


def test_a_device_lost_while_a_model_is_loaded_is_lost_over_nobody(engine, told, file):
    job = Job()
    put(engine, job)
    assert job.done.wait(TIMEOUT)
    with pytest.raises(ModelFileError, match="cannot load"):
        engine.add(open_model(file, "lost")).result(TIMEOUT)
    assert told.died.wait(TIMEOUT)
    ((_, jobs),) = told.lost
    assert jobs == []


def test_whoever_fails_when_told_of_room_does_not_end_the_thread(engine):
    def fail():
        raise RuntimeError("Set changed size during iteration")

    engine.queue.on_taken = fail
    jobs = [Job(), Job()]
    put(engine, *jobs)
    for job in jobs:
        assert job.done.wait(TIMEOUT)
    assert engine.alive


def test_a_model_is_loaded_beside_the_others_and_warmed_up_in_turn_with_them(engine, file):
    loading = engine.add(open_model(file, "stepwise"))
    seen = sys.modules["engine_models"]
    assert seen.entered.wait(TIMEOUT)
    job = Job()
    put(engine, job)  # while the first size is on the device
    seen.gate.set()
    loading.result(TIMEOUT)
    assert seen.log == ["nograd-load-stepwise", 1, "echo", 3]
    assert job.done.is_set()


def test_a_model_whose_load_changes_what_is_the_process_s_is_loaded_while_no_other_runs(engine, file):
    model = open_model(file, "stepwise")
    model.loads_alone = True
    loading = engine.add(model)
    sys.modules["engine_models"].gate.set()
    loading.result(TIMEOUT)
    assert sys.modules["engine_models"].log[0] == "nograd-device"


def test_a_load_that_is_given_up_enters_nothing_when_it_ends_after_all(engine, file):
    loading = engine.add(open_model(file, "late"))
    with pytest.raises(ModelFileError, match=r"\[late\]: loading takes longer than load_timeout_s = 0.1 s"):
        loading.result(0.1)
    sys.modules["engine_models"].gate.set()
    for thread in threading.enumerate():
        if thread.name == "nograd-load-late":
            thread.join(TIMEOUT)
    assert list(engine.models) == list(engine.stats) == list(engine.memory.held) == ["echo"]
    engine.add(open_model(file, "late")).result(TIMEOUT)
    assert list(engine.models) == ["echo", "late"]


def test_while_a_model_is_loaded_nobody_is_named_for_the_death_may_be_the_load_s(engine, file, told):
    loading = engine.add(open_model(file, "late"))
    during, after = Job(), Job()
    put(engine, during)
    assert during.done.wait(TIMEOUT)
    assert [during] not in told.forwards
    sys.modules["engine_models"].gate.set()
    loading.result(TIMEOUT)
    put(engine, after)
    assert after.done.wait(TIMEOUT)
    assert [after] in told.forwards


def test_a_load_has_its_own_limit_for_the_warm_up_and_for_code_that_holds_the_interpreter(engine, file):
    hard, load = file.specs["echo"].hard_timeout_s, file.specs["stepwise"].load_timeout_s
    assert engine.limits_s() == [hard]
    loading = engine.add(open_model(file, "stepwise"))
    seen = sys.modules["engine_models"]
    assert seen.entered.wait(TIMEOUT)
    assert engine.limits_s() == [hard, load]
    (warm_up,) = engine.activities._running.values()
    assert (warm_up.what, warm_up.limit_s, warm_up.limit) == ("the warm-up", load, "load_timeout_s")
    seen.gate.set()
    loading.result(TIMEOUT)
    assert engine.limits_s() == [hard, file.specs["stepwise"].hard_timeout_s]


def test_a_load_that_wakes_up_late_leaves_the_books_of_the_one_that_came_after_it(engine, file):
    first = engine.add(open_model(file, "late"))
    with pytest.raises(ModelFileError):
        first.result(0.1)
    second = open_model(file, "late")
    second.load = lambda device: None  # this one does not hang
    engine.add(second).result(TIMEOUT)
    sys.modules["engine_models"].gate.set()
    for thread in threading.enumerate():
        if thread.name == "nograd-load-late":
            thread.join(TIMEOUT)
    assert engine.models["late"] is second
    assert list(engine.memory.held) == ["echo", "late"]


def test_who_waits_for_the_device_thread_hears_that_it_has_ended(engine, file):
    loading = engine.add(open_model(file, "stepwise"))
    seen = sys.modules["engine_models"]
    assert seen.entered.wait(TIMEOUT)
    waiting = engine.remove("echo")  # behind the step that is on the device
    engine.queue.close()
    seen.gate.set()
    with pytest.raises(ConfigError, match="shutting down"):
        waiting.result(TIMEOUT)
    with pytest.raises(ConfigError, match="shutting down"):
        loading.result(TIMEOUT)
