import json

import numpy as np
import pytest
import torch

from nograd.tasks.errors import InvalidInput, ModelFileError, OutputMismatch

CODE = """
import torch
from torch import nn


class RegressionModel(nn.Module):
    def __init__(self, input_size):
        super().__init__()
        self.fc1 = nn.Linear(input_size, 128)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(128)
        self.fc2 = nn.Linear(128, 1)

    def forward(self, x):
        return self.fc2(self.drop(self.norm(torch.relu(self.fc1(x)))))


class Classifier(nn.Linear):
    pass


class Squeezing(nn.Linear):
    def forward(self, x):
        return super().forward(x).squeeze()


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, indices):
        return self.table(indices).sum(1)


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 1)
        self.noise = Noise()

    def forward(self, x):
        return self.fc(x)


class Noise(nn.Dropout):
    def train(self, mode=True):
        return super().train(True)


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
        self.register_buffer("steps", torch.tensor(3))
        self.fc = nn.Linear(2, 2)

    def forward(self, x):
        return {"power": (self.kernel * self.fc(x)).abs(), "steps": self.steps.expand(len(x))}


class Averaging(nn.Linear):
    def forward(self, x):
        return super().forward(x).mean(0, keepdim=True)


class Pixels(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3)

    def forward(self, x):
        self.strides = x.stride()
        return self.conv(x).mean((2, 3))


def halve(image):
    if image.width > 100:
        raise ValueError("too wide for me")
    return torch.tensor(image.getpixel((0, 0))).float().reshape(3, 1, 1).expand(3, 8, 8) / 2


def wrong(image):
    return image
"""


@pytest.fixture
def module(user_code, tmp_path):
    """Save a module of `CODE` as a state dict, and write its table."""
    name = user_code(CODE)

    def write(cls, extra="", **init):
        import importlib
        import sys

        sys.path.insert(0, str(tmp_path))
        module = getattr(importlib.import_module(name), cls)(**init)
        torch.save(module.state_dict(), tmp_path / f"{cls}.pth")
        write.original = module.eval()
        table = ", ".join(f"{key} = {value}" for key, value in init.items())
        return f'loader = "module"\nclass = "{name}:{cls}"\nweights = "{cls}.pth"\ninit = {{ {table} }}\n{extra}'

    write.code = name
    return write


def test_a_regression_answers_what_the_notebook_answers(hosted, predict, module):
    model = hosted(module("RegressionModel", 'input = "rows"\nshape = [3]', input_size=3))
    rows = [[1.2, 3.4, 5.6], [7.8, 9.0, 1.1]]
    with torch.no_grad():
        expected = module.original(torch.from_numpy(np.array(rows)).float())[:, 0].tolist()
    assert predict(model, rows) == pytest.approx(expected, abs=1e-5)
    assert all(type(value) is float for value in predict(model, rows))


def test_a_model_with_dropout_answers_the_same_twice(hosted, predict, module):
    model = hosted(module("RegressionModel", input_size=3))
    assert not any(part.training for part in model.module.modules())
    assert predict(model, [[1, 2, 3]] * 2) == predict(model, [[1, 2, 3]] * 2)


def test_a_batch_and_its_members_alone_agree(hosted, predict, module):
    model = hosted(module("RegressionModel", input_size=3))
    rows = torch.randn(9, 3).tolist()
    alone = [predict(model, [row])[0] for row in rows]
    assert predict(model, rows) == pytest.approx(alone, abs=1e-5)


def test_outputs_never_require_grad_not_even_outside_no_grad(hosted, module):
    model = hosted(module("RegressionModel", input_size=3))
    (output,) = model.forward([model.prepare([1, 2, 3], {})], {})
    assert not output.requires_grad
    assert output.grad_fn is None


def test_a_part_that_stays_in_training_mode_stops_the_start(opened, module):
    model = opened(module("Stubborn"))
    with pytest.raises(ModelFileError, match=r"loader = 'module': still in training mode after eval\(\): noise"):
        model.load(torch.device("cpu"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-2), ("bfloat16", 5e-2)])
def test_weights_and_inputs_are_cast_to_the_dtype(hosted, predict, module, dtype, tolerance):
    table = module("RegressionModel", f'dtype = "{dtype}"', input_size=3)
    model = hosted(table)
    assert model.module.fc1.weight.dtype == getattr(torch, dtype)
    assert model.prepare([1, 2, 3], {}).dtype == getattr(torch, dtype)
    with torch.no_grad():
        expected = module.original(torch.tensor([[1.0, 2, 3]])).item()
    assert predict(model, [[1, 2, 3]]) == [pytest.approx(expected, abs=tolerance)]


def test_complex_and_whole_parameters_keep_their_type(hosted, predict, module):
    model = hosted(module("Spectral"))
    assert model.module.kernel.dtype == torch.complex64
    (answer,) = predict(model, [[1, 2]])
    assert list(answer) == ["power", "steps"]
    assert answer["steps"] == 3
    json.dumps(answer)


def test_labels_name_the_classes_of_logits(hosted, predict, module, tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\n")
    for labels in ('labels = ["cat", "dog", "bird"]', 'labels = "names.txt"'):
        model = hosted(module("Classifier", f"{labels}\ntop = 2\nshape = [2]", in_features=2, out_features=3))
        (answer,) = predict(model, [[1, 2]])
        with torch.no_grad():
            scores = module.original(torch.tensor([1.0, 2])).softmax(0)
        assert answer["label"] == ["cat", "dog", "bird"][scores.argmax()]
        assert answer["score"] == pytest.approx(scores.max().item(), abs=1e-6)
        assert len(answer["top"]) == 2


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ('"gone.txt"', "labels = 'gone.txt': no such file"),
        ("[]", "labels = []: every class needs a name"),
        ('["a", ""]', "every class needs a name"),
        ('["a", "b"]', "2 labels name the values of a vector; the model's output has shape (3,)"),
    ],
)
def test_labels_that_do_not_fit_stop_the_start(hosted, module, labels, why):
    with pytest.raises(ModelFileError) as caught:
        hosted(module("Classifier", f"labels = {labels}\nshape = [2]", in_features=2, out_features=3))
    assert why in caught.value.message


def test_a_model_that_squeezes_answers_alone_and_in_batches(hosted, predict, module):
    model = hosted(module("Squeezing", "shape = [2]", in_features=2, out_features=1))
    alone = [predict(model, [row])[0] for row in ([1, 2], [3, 4])]
    assert predict(model, [[1, 2], [3, 4]]) == pytest.approx(alone)


def test_indices_stay_whole_numbers_for_a_model_that_embeds_them(hosted, predict, module):
    model = hosted(module("Embedding", 'input_dtype = "int64"\nshape = [-1]'))
    (answer,) = predict(model, [[1, 2, 9]])
    assert answer == pytest.approx(module.original.table.weight[[1, 2, 9]].sum(0).tolist(), abs=1e-6)
    with pytest.raises(InvalidInput, match="whole numbers"):
        model.prepare([1, 2.5], {})


def test_inputs_of_other_shapes_never_share_a_batch(hosted, module):
    model = hosted(module("Embedding", 'input_dtype = "int64"'))
    assert [model.cost(model.prepare(value, {})) for value in ([1], [1, 2])] == [1, 2]
    buckets = {model.bucket(model.prepare(value, {})) for value in ([1], [1, 2], [2, 3])}
    assert buckets == {(1,), (2,)}


def test_a_model_that_mixes_its_batch_is_found_out_at_warm_up(hosted, opened, module):
    table = module("Averaging", "shape = [2]", in_features=2, out_features=1)
    with pytest.raises(ModelFileError, match=r"the warm-up failed: .*shape \(1, 1\): 1 outputs for 3 inputs"):
        hosted(table)
    model = opened(table)
    model.load(torch.device("cpu"))
    with pytest.raises(OutputMismatch):
        model.forward([model.prepare([1, 2], {})] * 2, {})


def test_a_shape_that_the_model_does_not_take_is_found_out_at_warm_up(hosted, module):
    with pytest.raises(ModelFileError, match=r"\[it\] the warm-up failed: RuntimeError: .*set `example`"):
        hosted(module("Classifier", "shape = [4]", in_features=2, out_features=3))


def test_the_example_of_the_model_file_is_what_warms_up(hosted, module):
    assert hosted(module("Classifier", "example = [1, 2]", in_features=2, out_features=3)).examples() == [[1, 2]]
    with pytest.raises(ModelFileError, match="the warm-up failed: value 1 is 'x', not a number"):
        hosted(module("Classifier", 'example = [1, "x"]', in_features=2, out_features=3))


def test_a_model_takes_no_parameters(hosted, opened, module):
    table = module("Classifier", in_features=2, out_features=3)
    with pytest.raises(InvalidInput, match="unknown parameter 'top_k': model 'it' takes none"):
        hosted(table).prepare([1, 2], {"top_k": 1})
    with pytest.raises(ModelFileError, match=r"params = \{'top_k': 1\}: loader 'module' takes none"):
        opened(table + "params = { top_k = 1 }").load(torch.device("cpu"))


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_image_model_needs_its_preprocessing_to_be_named(opened, module):
    with pytest.raises(ModelFileError, match=r"input = 'image': the model does not bring its preprocessing"):
        opened(module("Pixels", 'input = "image"')).load(torch.device("cpu"))


def test_a_transform_table_does_what_torchvision_s_presets_do(hosted, module, picture):
    from torchvision import transforms

    from nograd.workers.models.images import decode_image

    table = "{ resize = 40, center_crop = 32, mean = [0.4, 0.5, 0.6], std = [0.2, 0.3, 0.4] }"
    model = hosted(module("Pixels", f'input = "image"\ntransform = {table}'))
    expected = transforms.Compose(
        [
            transforms.Resize(40),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]),
        ]
    )
    data = picture()
    assert torch.allclose(model.prepare(data, {}), expected(decode_image(data)), atol=1e-6)


def test_a_grey_model_gets_one_channel(hosted, predict, module, picture):
    model = hosted(module("Pixels", 'input = "image"\ntransform = { mode = "L" }', channels=1))
    assert model.prepare(picture(), {}).shape == (1, 60, 80)
    assert len(predict(model, [picture()])[0]) == 4


def test_a_transform_may_be_the_user_s_own_function(hosted, predict, module, picture):
    model = hosted(module("Pixels", f'input = "image"\ntransform = "{module.code}:halve"'))
    assert model.prepare(picture(), {}).shape == (3, 8, 8)
    with pytest.raises(InvalidInput, match=f"{module.code}:halve refused the image: too wide for me"):
        model.prepare(picture(size=(200, 10)), {})
    with pytest.raises(ModelFileError, match=r"the warm-up failed: .*:wrong returned a Image, not a tensor"):
        hosted(module("Pixels", f'input = "image"\ntransform = "{module.code}:wrong"'))
    with pytest.raises(ModelFileError, match=r"transform = '.*:gone': .* has no gone"):
        hosted(module("Pixels", f'input = "image"\ntransform = "{module.code}:gone"'))


def test_channels_last_reaches_weights_and_batches(hosted, predict, module, picture):
    model = hosted(module("Pixels", 'input = "image"\ntransform = { resize = 16 }\nchannels_last = true'))
    predict(model, [picture(), picture(shift=30)])
    assert model.module.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.module.strides[1] == 1


def test_an_example_image_is_a_path_beside_the_model_file(hosted, module, picture, tmp_path):
    (tmp_path / "cat.png").write_bytes(picture())
    table = module("Pixels", 'input = "image"\ntransform = { resize = 16 }\nexample = ')
    assert hosted(table + '"cat.png"').examples() == [picture()]
    with pytest.raises(ModelFileError, match=r"example = 'dog.png': no such file"):
        hosted(table + '"dog.png"')


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ('input = "text"', "input = 'text': loader 'module' takes image, rows or tensor"),
        ("transform = { resize = 3 }", 'only images are transformed; input = "tensor"'),
        ('input = "image"\ntransform = { resize = 3 }\nshape = [3]', "an image gets its shape from its transform"),
        ('input = "image"\ntransform = { resize = 3 }\ninput_dtype = "int64"', "images are floating"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(opened, module, extra, why):
    with pytest.raises(ModelFileError) as caught:
        opened(module("Pixels", extra)).load(torch.device("cpu"))
    assert why in caught.value.message


def test_a_class_that_is_no_module_is_refused(opened, user_code):
    name = user_code("class Plain: pass\n")
    with pytest.raises(ModelFileError, match=f"class = '{name}:Plain': not an nn.Module"):
        opened(f'loader = "module"\nclass = "{name}:Plain"\nweights = "w.pth"').load(torch.device("cpu"))


def test_an_error_of_the_model_itself_comes_through_as_it_is(hosted, module):
    model = hosted(module("Classifier", in_features=2, out_features=3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model.forward([model.prepare([1, 2, 3], {})], {})
