"""Fixtures of tests that host models in their own process: a model file, and code beside it."""

import itertools
import sys

import pytest
import torch

from nograd.workers.models.warmup import steps

_names = (f"user_code_{n}" for n in itertools.count())


@pytest.fixture(autouse=True)
def clean():
    """The same weights each time. Loaders put folders on the path; a test must not see those of another."""
    torch.manual_seed(7)
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture
def user_code(tmp_path):
    """Write a module beside the model file; returns its name, which no other test has."""

    def write(source):
        name = next(_names)
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def ready(model, device):
    """Load a model and warm it up, as the engine does."""
    with torch.no_grad():
        model.load(device)
    for step in steps(model):
        step()
    return model
