import pytest
import torch

from nograd.tasks.errors import InvalidInput, ModelFileError
from nograd.tasks.modelfile import BatchLimits, PythonSpec
from nograd.workers.models import HostedModel
from nograd.workers.models.warmup import steps


class Recorder(HostedModel):
    """A hosted model that writes down what is asked of it."""

    def __init__(self, file, max_items, fail):
        super().__init__("it", PythonSpec(class_="x:Y", batch=BatchLimits(max_items=max_items)), file)
        self.batches = []
        self.fail = fail

    def load(self, device):
        raise NotImplementedError

    def prepare(self, input, params):  # noqa: A002 - as in the base
        return input

    def forward(self, batch, params):
        assert not torch.is_grad_enabled()
        self.batches.append(list(batch))
        if self.fail:
            raise self.fail
        return batch

    def examples(self):
        return ["a", "b"]


def warm_up(model):
    for step in steps(model):
        step()


@pytest.fixture
def recorder(tmp_path):
    return lambda max_items=64, fail=None: Recorder(tmp_path / "models.toml", max_items, fail)


@pytest.mark.parametrize(("max_items", "sizes"), [(64, [1, 3]), (2, [1, 2]), (1, [1])])
def test_each_example_runs_alone_and_three_at_a_time(recorder, max_items, sizes):
    model = recorder(max_items)
    warm_up(model)
    assert [len(batch) for batch in model.batches] == sizes * 2
    assert {value for batch in model.batches for value in batch} == {"a", "b"}


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("no kernel"), "RuntimeError: no kernel"),
        (InvalidInput("value 1 is nan"), "value 1 is nan"),
        (torch.OutOfMemoryError("too large"), "OutOfMemoryError: too large"),
    ],
)
def test_whatever_a_model_raises_names_the_model_and_the_file(recorder, tmp_path, error, why):
    with pytest.raises(ModelFileError) as caught:
        warm_up(recorder(fail=error))
    assert caught.value.message.startswith(f"{tmp_path / 'models.toml'}: [it] the warm-up failed: {why}")
    assert caught.value.__cause__ is error
