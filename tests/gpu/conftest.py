"""Each test runs on a CPU and on a GPU, so that where there is none only CUDA itself is untried."""

import pytest
import torch

from model_files import clean, ready, user_code  # noqa: F401 - fixtures
from nograd.tasks.modelfile import load_model_file
from nograd.workers.engine import Engine
from nograd.workers.models import open_model

from .support import CPU, CUDA, Driver


@pytest.fixture(params=[pytest.param(CPU, id="cpu"), CUDA])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def free_memory():
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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

    return lambda table, device: ready(open_model(models(it=table), "it"), device)


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
