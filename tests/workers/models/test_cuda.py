"""What holds on a CPU holds on a GPU."""

import pytest
import torch

from nograd.workers.models.warmup import warm_up

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CODE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        hidden, _ = self.lstm(x)
        return self.fc(hidden[:, -1])
"""


@pytest.fixture
def on_gpu(opened):
    def host(table):
        model = opened(table)
        model.load(torch.device("cuda"))
        warm_up(model)
        return model

    return host


@pytest.mark.parametrize("extra", ["", 'dtype = "float16"', "compile = true"])
def test_a_module_answers_on_the_gpu_as_on_the_cpu(hosted, on_gpu, predict, user_code, tmp_path, extra):
    name = user_code(CODE)
    table = f'loader = "module"\nclass = "{name}:Net"\nweights = "w.pth"\nshape = [-1, 4]\n'
    scope = {}
    exec(CODE, scope)
    torch.save(scope["Net"]().state_dict(), tmp_path / "w.pth")
    rows = torch.randn(5, 7, 4).tolist()
    wanted = predict(hosted(table), rows)
    model = on_gpu(table + extra)
    assert next(model.module.parameters()).is_cuda
    for answer, row in zip(predict(model, rows), wanted, strict=True):
        assert answer == pytest.approx(row, abs=2e-2 if "16" in extra else 1e-3)
    (output, *_) = model.forward([model.prepare(row, {}) for row in rows], {})
    assert output.device.type == "cpu"


def test_a_program_answers_on_the_gpu_as_on_the_cpu(hosted, on_gpu, predict, tmp_path):
    """Also one with a constant that was made on the CPU."""

    class Shifted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.arange(2)

    program = torch.export.export(
        Shifted(3, 2).eval(), (torch.zeros(2, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(program, tmp_path / "net.pt2")
    table = 'loader = "export"\nprogram = "net.pt2"\n'
    rows = torch.randn(5, 3).tolist()
    for answer, wanted in zip(predict(on_gpu(table), rows), predict(hosted(table), rows), strict=True):
        assert answer == pytest.approx(wanted, abs=1e-3)
