"""`compile = true`, with the real compiler."""

import pytest
import torch

from nograd.workers.models.compiling import bucket_sizes, padded

CODE = """
import torch
from torch import nn


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 2))

    def forward(self, x):
        return self.layers(x)


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x.transpose(1, 2))).mean(-1))


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))
"""


@pytest.fixture
def table(user_code, tmp_path):
    def make(cls, keys):
        scope = {}
        exec(CODE, scope)
        torch.save(scope[cls]().state_dict(), tmp_path / "w.pth")
        return f'loader = "module"\nclass = "{user_code(CODE)}:{cls}"\nweights = "w.pth"\n{keys}\n'

    return make


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12]), (64, [1, 2, 4, 8, 16, 32, 64])],
)
def test_the_buckets_are_the_powers_of_two_and_the_largest_batch(most, sizes):
    assert bucket_sizes(most) == sizes


@pytest.mark.parametrize(("n", "size"), [(1, 1), (3, 4), (5, 6), (6, 6), (7, 7)])
def test_a_batch_is_padded_with_its_last_input(n, size):
    batch = [torch.tensor([k]) for k in range(n)]
    assert [int(row) for row in padded(batch, 6)] == [*range(n), *[n - 1] * (size - n)]


@pytest.fixture
def no_compilation():
    """From here on a compilation is an error."""
    return lambda: torch.compiler.set_stance("fail_on_recompile")


@pytest.mark.slow
def test_rows_agree_with_eager_and_nothing_is_compiled_after_the_warm_up(hosted, predict, table, no_compilation):
    keys = table("Flat", "shape = [3]\nbatch = { max_items = 12 }")
    rows = torch.randn(12, 3).tolist()
    wanted = predict(hosted(keys), rows)
    torch._dynamo.utils.counters.clear()
    model = hosted(keys + "compile = true")
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"
    with no_compilation():
        for n in range(1, 13):
            for answer, row in zip(predict(model, rows[:n]), wanted, strict=False):
                assert answer == pytest.approx(row, abs=1e-5)


@pytest.mark.slow
def test_an_unknown_shape_is_noticed_by_the_test_above(hosted, predict, table, no_compilation):
    """A control: without its bucket, a batch would be compiled anew."""
    model = hosted(table("Flat", "shape = [3]\nbatch = { max_items = 2 }\ncompile = true"))
    with no_compilation(), torch.no_grad(), pytest.raises(RuntimeError, match="recompile"):
        model.module(torch.zeros(5, 3))


@pytest.mark.slow
def test_free_dimensions_are_compiled_once_for_all_lengths(hosted, predict, table, no_compilation):
    keys = table("Sequence", "shape = [-1, 4]")
    model, eager = hosted(keys + "compile = true"), hosted(keys)
    with no_compilation():
        for n in (1, 2, 4, 5, 9):
            for length in (2, 4, 7, 100):
                rows = torch.randn(n, length, 4).tolist()
                for answer, wanted in zip(predict(model, rows), predict(eager, rows), strict=True):
                    assert answer == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["{ resize = 20, center_crop = 16 }", "{ resize = 16 }"], ids=["fixed", "free"])
def test_images_of_one_size_and_of_any(hosted, predict, table, picture, no_compilation, transform):
    keys = f'input = "image"\ntransform = {transform}\nchannels_last = true\nbatch = {{ max_items = 4 }}'
    keys = table("Pixels", keys)
    model, eager = hosted(keys + "compile = true"), hosted(keys)
    sizes = [(80, 60), (60, 60), (60, 90)]
    with no_compilation():
        for n in (1, 2, 3, 4):
            for size in sizes:
                images = [picture(size=size, shift=10 * k) for k in range(n)]
                for answer, wanted in zip(predict(model, images), predict(eager, images), strict=True):
                    assert answer == pytest.approx(wanted, abs=1e-5)
