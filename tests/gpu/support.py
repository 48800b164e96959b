"""The devices, and ways to run models on them."""

import threading

import pytest
import torch

from nograd.workers.batching import Item

CPU = torch.device("cpu")
CUDA = pytest.param(
    torch.device("cuda:0"),
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    id="cuda",
)


def predict(model, inputs):
    """Predictions of one batch, as the pool makes them."""
    prepared = [model.prepare(value, {}) for value in inputs]
    with torch.no_grad():
        outputs = model.forward(prepared, {})
    return [model.finish(output, {}) for output in outputs]


class Job:
    """One input on its way through an engine."""

    def __init__(self, model, value):
        self.model, self.value, self.params = model, value, {}
        self.outcome, self.done = None, threading.Event()

    def abandoned(self):
        return False

    def resolve(self, index, outcome, forward=None):
        self.outcome = outcome
        self.done.set()


class Driver:
    """Sends inputs through an engine, without Celery."""

    def __init__(self, engine):
        self.engine = engine

    def send(self, name, values):
        model = self.engine.models[name]
        jobs = [Job(model, value) for value in values]
        for job in jobs:
            prepared = model.prepare(job.value, {})
            self.engine.queue.put([Item(name, model.bucket(prepared), prepared, job)])
        return jobs

    def answers(self, jobs):
        for job in jobs:
            assert job.done.wait(120), "no outcome"
        return [job.outcome.error or job.model.finish(job.outcome.value, {}) for job in jobs]
