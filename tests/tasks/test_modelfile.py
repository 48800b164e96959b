"""The model file is read strictly, and every complaint names key, value and file."""

import pytest

from nograd.tasks.errors import ModelFileError
from nograd.tasks.modelfile import LightningSpec, TorchvisionSpec, load_model_file

MODULE = '[m]\nloader = "module"\nclass = "a:B"\nweights = "w.pth"\n'


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "models.toml"
        path.write_text(text)
        return load_model_file(path)

    return read


def test_each_table_is_a_model_with_its_loader_s_keys(read):
    file = read(
        '[a]\nloader = "torchvision"\nmodel = "resnet18"\nweights = "IMAGENET1K_V1"\nbatch = { max_items = 8 }\n'
        '[b]\nloader = "lightning"\nclass = "x:Y"\ncheckpoint = "y.ckpt"\ninput = "rows"\n'
    )
    assert list(file.specs) == ["a", "b"]
    assert isinstance(file.specs["a"], TorchvisionSpec)
    assert isinstance(file.specs["b"], LightningSpec)
    assert file.specs["a"].kind == "image"
    assert file.specs["b"].kind == "rows"
    assert (file.specs["a"].batch.max_items, file.specs["a"].batch.max_wait_ms) == (8, 0)
    assert file.specs["b"].class_ == "x:Y"


def test_a_batch_may_be_bounded_by_cost(read):
    file = read(MODULE + "batch = { max_cost = 4096 }")
    assert file.specs["m"].batch.max_cost == 4096
    assert read(MODULE).specs["m"].batch.max_cost is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MODULE + "batchh = 3", "[m] batchh = 3: unknown key. Did you mean 'batch'?"),
        (MODULE + "batch = { max_itemz = 4 }", "[m] batch.max_itemz = 4: unknown key. Did you mean 'max_items'?"),
        (MODULE + "shap = [12]", "[m] shap = [12]: unknown key. Did you mean 'shape'?"),
        (MODULE + "clas = 1", "[m] clas = 1: unknown key. Did you mean 'class'?"),
        (MODULE + "batch = { max_cost = 0 }", "[m] batch.max_cost = 0: Expected `int` >= 1"),
        (MODULE + "batch = { max_items = 0 }", "[m] batch.max_items = 0: Expected `int` >= 1"),
        (MODULE + "batch = { max_wait_ms = -1 }", "[m] batch.max_wait_ms = -1"),
        (MODULE + 'dtype = "float31"', "[m] dtype = 'float31'"),
        (
            MODULE + 'input = "row"',
            "'row': expected one of image, json, rows, tensor, text. Did you mean 'rows'?",
        ),
        (MODULE + 'input = "pictures"', "[m] input = 'pictures': expected one of image, json, rows, tensor, text"),
        (
            MODULE + 'transform = { mode = "RGBA" }',
            "[m] transform.mode = 'RGBA': expected one of L, RGB. Did you",
        ),
        (MODULE + "timeout_s = 0", "[m] timeout_s = 0"),
        (MODULE + "init = 3", "[m] init = 3"),
        (MODULE + "shape = [3, -2]", "[m] shape"),
        (MODULE + "transform = { mean = [0.5], std = [0.5] }", "`mean` has 1 values for 3 channels"),
        (MODULE + 'transform = { mode = "L", mean = [0.5] }', "`mean` and `std` come together"),
        (
            '[m]\nloader = "onnx"',
            "[m] loader = 'onnx': expected one of torchvision, transformers, module, lightning",
        ),
        ('[m]\nloader = "modul"', "export, python. Did you mean 'module'?"),
        ("[m]\nloader = 3", "[m] loader = 3"),
        ("[m]\nloader = []", "[m] loader = []"),
        ("[m]\nclass = 'a:B'", "[m] loader: missing; expected one of torchvision, transformers, module"),
        ('[m]\nloader = "module"\nclass = "a:B"', "[m] weights: missing; loader 'module' needs it"),
        ("m = 3", "m = 3: a model is a table"),
        ('["a b"]\nloader = "module"', "[a b]: a model's name has"),
        ("", "the file names no model"),
        ("[m", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_naming_key_value_and_file(read, tmp_path, text, says):
    with pytest.raises(ModelFileError) as caught:
        read(text)
    assert says in caught.value.message
    assert str(tmp_path / "models.toml") in caught.value.message


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelFileError, match=r"nothing\.toml"):
        load_model_file(tmp_path / "nothing.toml")
