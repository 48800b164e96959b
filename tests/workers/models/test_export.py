import pytest
import torch
from torch import nn
from torch.export import Dim

from nograd.tasks.errors import InvalidInput, ModelFileError

ANY = Dim("batch")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.fc(x))) + torch.arange(2)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, indices):
        return self.table(indices).sum(1)


class Pair(nn.Module):
    def forward(self, x, y):
        return x + y


@pytest.fixture
def exported(tmp_path):
    """Export a module to a file, and write its table."""

    def write(module, *inputs, batch=ANY, extra="", train=False, **dims):
        shapes = None if batch is None else tuple({0: batch, **dims.get("more", {})} for _ in inputs)
        program = torch.export.export(module.train(train), inputs, dynamic_shapes=shapes)
        torch.export.save(program, tmp_path / "net.pt2")
        return f'loader = "export"\nprogram = "net.pt2"\n{extra}\n'

    return write


def test_a_program_answers_what_its_module_answers(hosted, predict, exported):
    net = Net()
    model = hosted(exported(net, torch.zeros(2, 3)))
    rows = torch.randn(5, 3)
    with torch.no_grad():
        wanted = net.eval()(rows).tolist()
    for n in (1, 2, 5):
        for answer, row in zip(predict(model, rows[:n].tolist()), wanted, strict=False):
            assert answer == pytest.approx(row, abs=1e-5)


def test_shape_and_dtype_are_the_program_s_own(hosted, predict, exported):
    model = hosted(exported(Net(), torch.zeros(2, 3)))
    assert [example.shape for example in model.examples()] == [(3,)]
    with pytest.raises(InvalidInput, match="row has 2 values, the model takes 3"):
        model.prepare([1, 2], {})
    words = hosted(exported(Table(), torch.zeros(2, 5, dtype=torch.int64), more={1: Dim("length")}))
    assert words.prepare([1, 2], {}).dtype == torch.int64
    assert len(predict(words, [[1, 2, 3]])[0]) == 4


def test_outputs_never_require_grad(hosted, exported):
    model = hosted(exported(Net(), torch.zeros(2, 3)))
    assert not model.forward([model.prepare([1, 2, 3], {})], {})[0].requires_grad


@pytest.mark.parametrize(
    ("batch", "max_items", "takes"),
    [
        (None, 64, "exactly 4"),
        (None, 4, "exactly 4"),
        (Dim("b", min=3), 64, "3 to any number"),
        (Dim("b", max=8), 16, "1 to 8"),
    ],
)
def test_a_program_that_cannot_take_every_batch_stops_the_start(opened, exported, batch, max_items, takes):
    table = exported(Net(), torch.zeros(4, 3), batch=batch, extra=f"batch = {{ max_items = {max_items} }}")
    why = rf"program = 'net.pt2': its batch dimension takes {takes}, and batches have 1 to {max_items}.*Dim\('batch'\)"
    with pytest.raises(ModelFileError, match=why):
        opened(table).load(torch.device("cpu"))


def test_a_program_for_single_items_serves_single_items(hosted, predict, exported):
    table = exported(Net(), torch.zeros(1, 3), batch=None, extra="batch = { max_items = 1 }")
    assert len(predict(hosted(table), [[1, 2, 3]])) == 1


@pytest.mark.parametrize("batch", [Dim("b", max=64), Dim.AUTO, 2 * Dim("half")])
def test_every_way_to_write_a_dynamic_batch_is_understood(hosted, predict, exported, batch):
    assert len(predict(hosted(exported(Net(), torch.zeros(4, 3), batch=batch)), [[1, 2, 3]] * 2)) == 2


def test_a_program_exported_in_training_mode_is_refused(opened, exported):
    table = exported(Net(), torch.zeros(4, 3), train=True)
    why = r"program = 'net.pt2': was exported in training mode \(aten.batch_norm.default, aten.dropout.default\)"
    with pytest.raises(ModelFileError, match=why):
        opened(table).load(torch.device("cpu"))


def test_a_program_with_two_inputs_is_refused(opened, exported):
    with pytest.raises(ModelFileError, match="takes x, y, not one batch of tensors"):
        opened(exported(Pair(), torch.zeros(2), torch.zeros(2))).load(torch.device("cpu"))


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ('dtype = "float16"', "dtype = 'float16': the program takes float32"),
        ('input_dtype = "int64"', "input_dtype = 'int64': the program takes float32"),
        ("channels_last = true", "channels_last = True: a program's memory format"),
    ],
)
def test_keys_that_cannot_change_a_program_are_refused(opened, exported, extra, why):
    with pytest.raises(ModelFileError, match=why):
        opened(exported(Net(), torch.zeros(4, 3), extra=extra)).load(torch.device("cpu"))


def test_half_precision_programs_take_half_precision(hosted, exported):
    model = hosted(exported(nn.Linear(3, 1).half(), torch.zeros(4, 3).half()))
    assert model.prepare([1, 2, 3], {}).dtype == torch.float16


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x05\x06" + bytes(18)])
def test_a_damaged_program_is_named_in_one_line(opened, tmp_path, data):
    (tmp_path / "net.pt2").write_bytes(data)
    with pytest.raises(ModelFileError, match=r"^.*models.toml: \[it\] program = 'net.pt2': cannot be read: [^\n]*$"):
        opened('loader = "export"\nprogram = "net.pt2"').load(torch.device("cpu"))
