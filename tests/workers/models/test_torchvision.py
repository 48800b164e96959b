import json

import pytest
import torch
import torchvision
from torchvision.models import ResNet18_Weights

from nograd.tasks.errors import InvalidInput, ModelFileError
from nograd.tasks.modelfile import load_model_file
from nograd.workers.models import open_model
from nograd.workers.models.images import decode_image
from nograd.workers.models.warmup import steps


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A full-size resnet18 with random weights, its running statistics included, and its state dict."""
    torch.manual_seed(1)
    module = torchvision.models.resnet18(weights=None)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_var.uniform_(0.5, 2)
            part.running_mean.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(module.state_dict(), path)
    return module.eval(), path


def table(path, extra=""):
    return f'loader = "torchvision"\nmodel = "resnet18"\nweights = "{path}"\n{extra}\n'


def fine_tuned(tmp_path, classes):
    torch.save(torchvision.models.resnet18(weights=None, num_classes=classes).state_dict(), tmp_path / "tuned.pth")
    return table("tuned.pth", f"init = {{ num_classes = {classes} }}")


@pytest.fixture(scope="module")
def photos(resnet):
    """That resnet18, loaded once: it is of full size."""
    _, path = resnet
    file = path.with_name("models.toml")
    file.write_text("[photos]\n" + table(path.name, "top = 1000"))
    model = open_model(load_model_file(file), "photos")
    model.load(torch.device("cpu"))
    for step in steps(model):
        step()
    return model


def test_a_local_state_dict_gets_the_transforms_and_categories_of_the_default_weights(photos, predict, picture, resnet):
    module, _ = resnet
    weights = ResNet18_Weights.DEFAULT
    data = picture(size=(300, 260))
    with torch.no_grad():
        scores = module(weights.transforms()(decode_image(data)).unsqueeze(0))[0].softmax(0)
    (answer,) = predict(photos, [data])
    assert answer["label"] == weights.meta["categories"][scores.argmax()]
    assert answer["score"] == pytest.approx(scores.max().item(), abs=1e-5)
    assert len(answer["top"]) == 1000
    json.dumps(answer)


def test_batches_of_one_and_of_many_agree_and_images_of_any_size_share_a_batch(photos, predict, picture):
    sizes = {(300, 260): 0, (90, 400): 40, (64, 64): 9}
    images = [picture("JPEG", size=size, shift=shift) for size, shift in sizes.items()]
    together = predict(photos, images)
    for answer, alone in zip(together, [predict(photos, [image])[0] for image in images], strict=True):
        scores = {entry["label"]: entry["score"] for entry in alone["top"]}
        assert {entry["label"]: entry["score"] for entry in answer["top"]} == pytest.approx(scores, abs=1e-5)


def test_pixels_that_were_preprocessed_elsewhere_may_come_as_tensors(photos, opened, predict, picture, resnet):
    tensors = opened(table(resnet[1], 'top = 1000\ninput = "tensor"\nshape = [3, 224, 224]'))
    tensors.load(torch.device("cpu"))
    data = picture()
    assert predict(tensors, [photos.prepare(data, {}).numpy()]) == predict(photos, [data])


def test_a_configured_transform_wins(hosted, resnet, picture):
    model = hosted(table(resnet[1], "transform = { resize = 40, center_crop = 32 }"))
    assert model.prepare(picture(), {}).shape == (3, 32, 32)


def test_a_fine_tuned_model_names_its_classes_by_labels_or_else_by_index(hosted, predict, picture, tmp_path, caplog):
    plain = fine_tuned(tmp_path, 3)
    (answer,) = predict(hosted(plain), [picture()])
    assert sorted(entry["label"] for entry in answer["top"]) == ["0", "1", "2"]
    assert "set `labels`" in caplog.text
    (named,) = predict(hosted(plain + 'labels = ["palace", "flower", "digit"]'), [picture()])
    assert named["label"] == ["palace", "flower", "digit"][int(answer["label"])]


def test_what_is_no_image_is_the_caller_s_fault(photos):
    for value in ("cat.jpg", [1, 2, 3], b"GIF89a junk"):
        with pytest.raises(InvalidInput, match="image"):
            photos.prepare(value, {})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            ("resnet18", "resnet81"),
            "model = 'resnet81': torchvision .* has no classifier of that name; close to it: .*resnet18",
        ),
        (("resnet18", "fcn_resnet50"), "model = 'fcn_resnet50': .* has no classifier of that name"),
        (("W.pth", "gone.pth"), "weights = 'gone.pth': no such file"),
        (("W.pth", "IMAGENET"), r"weights = 'IMAGENET': neither a file .* nor one of IMAGENET1K_V1, DEFAULT"),
        (("W.pth", "IMAGENET1K_V1"), r"weights = 'IMAGENET1K_V1': cannot be downloaded from https.*: .*no network"),
        (("W.pth", 'W.pth"\ninit = { num_classes = 3 }#'), "size mismatch for fc.weight"),
        (("W.pth", 'W.pth"\ninit = { classes = 3 }#'), r"init = \{'classes': 3\}: resnet18 raised TypeError"),
    ],
)
def test_what_is_wrong_is_named_with_key_value_and_file(opened, tmp_path, monkeypatch, resnet, change, why):
    def no_network(*args, **kwargs):
        raise OSError("no network here")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch home"))
    (tmp_path / "W.pth").symlink_to(resnet[1])
    with pytest.raises(ModelFileError, match=rf"models.toml: \[it\] (?s:.)*{why}"):
        opened(table("W.pth").replace(*change, 1)).load(torch.device("cpu"))


def test_enum_weights_bring_their_transforms_and_categories(
    photos, opened, predict, picture, monkeypatch, tmp_path, resnet
):
    """As torchvision finds them: in its cache, where a download would have put them."""
    _, path = resnet
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]).symlink_to(path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = opened(table("IMAGENET1K_V1", "top = 1000"))
    model.load(torch.device("cpu"))
    data = picture()
    assert predict(model, [data]) == predict(photos, [data])


@pytest.mark.parametrize(("extra", "tolerance"), [('dtype = "bfloat16"', 5e-2), ("channels_last = true", 1e-4)])
def test_dtype_and_memory_format_are_honoured_and_change_the_scores_little(
    photos, hosted, predict, picture, resnet, extra, tolerance
):
    images = [picture(), picture(shift=40)]
    model = hosted(table(resnet[1], "top = 1000\n" + extra))
    assert model.module.conv1.weight.dtype == (torch.bfloat16 if "bfloat16" in extra else torch.float32)
    assert model.module.conv1.weight.is_contiguous(memory_format=torch.channels_last) == ("channels_last" in extra)
    for answer, wanted in zip(predict(model, images), predict(photos, images), strict=True):
        scores = {one["label"]: one["score"] for one in wanted["top"]}
        for one in answer["top"]:
            assert one["score"] == pytest.approx(scores[one["label"]], abs=tolerance)
        json.dumps(answer)
