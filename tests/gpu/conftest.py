"""Each test runs on a CPU and on a GPU, so that where there is none only CUDA itself is untried."""

import itertools
import sys

import pytest
import torch

from nograd.tasks.modelfile import load_model_file
from nograd.workers.engine import Engine
from nograd.workers.models import open_model
from nograd.workers.models.warmup import steps

from .support import CPU, CUDA, Driver

_names = (f"gpu_test_code_{n}" for n in itertools.count())


@pytest.fixture(params=[pytest.param(CPU, id="cpu"), CUDA])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def clean():
    """The same weights each time, and the path and the memory as before."""
    torch.manual_seed(7)
    before = list(sys.path)
    yield
    sys.path[:] = before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def code(tmp_path):
    """Write a module beside the model file; returns its name, which no other test has."""

    def write(source):
        name = next(_names)
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


@pytest.fixture
def models(tmp_path):
    """A model file of these tables."""

    def write(**tables):
        file = tmp_path / "models.toml"
        file.write_text("\n".join(f"[{name}]\n{table}" for name, table in tables.items()))
        return load_model_file(file)

    return write


@pytest.fixture
def host(models):
    """Load and warm up the model of a table, as the engine does."""

    def load(table, device):
        model = open_model(models(it=table), "it")
        with torch.no_grad():
            model.load(device)
        for step in steps(model):
            step()
        return model

    return load


@pytest.fixture
def drive():
    """An engine that has started; it ends with the test."""
    engines = []

    def start(file, device, names=None, **options):
        engine = Engine(file, list(file.specs) if names is None else names, device=device, **options)
        engines.append(engine)
        engine.start()
        return Driver(engine)

    yield start
    for engine in engines:
        engine.finish()
