import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nograd.tasks.errors import ModelFileError

CODE = "from torch import nn\nclass Net(nn.Linear): pass\nclass Other(nn.Module): pass\n"


@pytest.fixture
def load(opened, user_code):
    """Load a linear layer of 3 inputs from a file of weights."""
    name = user_code(CODE)

    def run(file):
        init = "init = { in_features = 3, out_features = 1 }"
        model = opened(f'loader = "module"\nclass = "{name}:Net"\nweights = "{file}"\n{init}')
        model.load(torch.device("cpu"))
        return model.module

    return run


@pytest.fixture
def failure(load, tmp_path):
    def run(file):
        with pytest.raises(ModelFileError) as caught:
            load(file)
        message = caught.value.message
        assert message.startswith(f"{tmp_path / 'models.toml'}: [it] weights = {file!r}: ")
        return message

    return run


def wrapped(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "content",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: wrapped(state, "module."),
        lambda state: wrapped(state, "_orig_mod."),
        lambda state: {name: tensor.double() for name, tensor in state.items()},
    ],
    ids=["state dict", "checkpoint", "DataParallel", "compiled", "float64"],
)
def test_a_state_dict_in_any_usual_form_is_loaded(load, tmp_path, content):
    net = nn.Linear(3, 1)
    torch.save(content(net.state_dict()), tmp_path / "w.pth")
    loaded = load("w.pth")
    assert torch.equal(loaded.weight, net.weight)
    assert loaded.weight.dtype == torch.float32


def test_safetensors_are_loaded(load, tmp_path):
    net = nn.Linear(3, 1)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    assert torch.equal(load("w.safetensors").weight, net.weight)


def test_a_missing_file_is_named_with_its_full_path(failure, tmp_path):
    assert f"no such file: {tmp_path / 'gone.pth'}" in failure("gone.pth")


def test_a_whole_pickled_model_is_refused_and_no_code_of_it_runs(failure, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was here"), "w"))

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    message = failure("evil.pth")
    assert "torch refused it with weights_only=True" in message
    assert "save model.state_dict()" in message
    assert not (tmp_path / "was here").exists()
    torch.save(nn.Linear(3, 1), tmp_path / "model.pth")
    assert "torch.nn.modules.linear.Linear" in failure("model.pth")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("w.pth", b""),
        ("w.pth", b"hello"),
        ("w.pth", b"PK\x03\x04junk"),
        ("w.safetensors", b""),
        ("w.safetensors", b"x" * 99),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(failure, tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert "\n" not in failure(name)


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {}, {"state_dict": 3}, {3: torch.zeros(1)}])
def test_what_is_no_state_dict_is_refused(failure, tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    assert "not a state dict; save model.state_dict()" in failure("w.pth")


def test_names_and_shapes_that_do_not_fit_are_listed_as_torch_lists_them(failure, tmp_path):
    torch.save({"weight": torch.zeros(1, 4), "scale": torch.zeros(1)}, tmp_path / "w.pth")
    message = failure("w.pth")
    for line in (
        'Missing key(s) in state_dict: "bias"',
        'Unexpected key(s) in state_dict: "scale"',
        "size mismatch for weight",
    ):
        assert line in message
