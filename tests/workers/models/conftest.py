"""Real models, saved to disk by each test as their authors would, and opened through a model file."""

import io

import pytest
import torch
from PIL import Image

from model_files import clean, ready, user_code  # noqa: F401 - fixtures
from nograd.tasks.modelfile import load_model_file
from nograd.workers.models import open_model

CPU = torch.device("cpu")


@pytest.fixture
def opened(tmp_path):
    """Open a table of a model file, not loaded yet."""

    def open_(table):
        file = tmp_path / "models.toml"
        file.write_text(f"[it]\n{table}")
        return open_model(load_model_file(file), "it")

    return open_


@pytest.fixture
def hosted(opened):
    """Open, load and warm up, as the engine does."""

    return lambda table: ready(opened(table), CPU)


@pytest.fixture
def predict():
    """Predictions of one batch, as the pool makes them."""

    def run(model, inputs, params=None):
        params = params or {}
        prepared = [model.prepare(value, params) for value in inputs]
        assert len({model.bucket(item) for item in prepared}) == 1, "the pool would not batch these"
        with torch.no_grad():
            outputs = model.forward(prepared, params)
        assert len(outputs) == len(inputs)
        return [model.finish(output, params) for output in outputs]

    return run


@pytest.fixture
def picture():
    """The bytes of a picture with something on it, as a file of any format."""

    def make(form="PNG", size=(80, 60), mode="RGB", shift=0, **options):
        gradient = Image.linear_gradient("L").resize(size).rotate(shift)
        image = Image.merge("RGB", (gradient, gradient.rotate(90).resize(size), gradient.rotate(180))).convert(mode)
        file = io.BytesIO()
        image.save(file, form, **options)
        return file.getvalue()

    return make
