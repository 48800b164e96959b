"""The committed weights answer as `examples/README.md` says they do."""

import re

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

import torch
import torchvision
from PIL import Image

import reference
import seed_data
from nograd.tasks.modelfile import load_model_file

EXAMPLES = seed_data.EXAMPLES


@pytest.fixture(autouse=True, scope="module")
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


def test_weights_together_are_under_one_megabyte():
    assert sum(file.stat().st_size for file in seed_data.WEIGHTS.rglob("*") if file.is_file()) < 1_000_000


@pytest.mark.parametrize("name", ["models.toml", "pretrained.toml"])
def test_model_files_are_read(name):
    specs = load_model_file(EXAMPLES / name).specs
    assert set(specs) == {"models.toml": set(reference.REFERENCES), "pretrained.toml": {"resnet18", "gpt2"}}[name]


def test_model_file_points_to_what_is_there():
    specs = load_model_file(EXAMPLES / "models.toml").specs
    import seed_models

    for spec in specs.values():
        weights = getattr(spec, "weights", None) or getattr(spec, "checkpoint", None) or spec.model
        assert (EXAMPLES / weights).exists()
        if hasattr(spec, "class_"):
            module, _, name = spec.class_.partition(":")
            assert module == "seed_models"
            assert hasattr(seed_models, name)
    assert specs["photos"].labels == seed_data.PHOTO_LABELS


@pytest.mark.parametrize("model", list(reference.REFERENCES))
def test_expected_answers_are_those_of_the_seeds_code(model):
    answers = reference.REFERENCES[model](seed_data.example_inputs()[model])
    expected = seed_data.expected()[model]
    assert len(answers) == len(expected)
    assert all(reference.same_answer(answer, wanted) for answer, wanted in zip(answers, expected, strict=True))


def test_same_answer_tells_answers_apart():
    photo = {"label": "palace", "score": 0.9, "top": []}
    assert reference.same_answer(photo, {"label": "palace", "score": 0.9})
    assert not reference.same_answer(photo, {"label": "flower", "score": 0.9})
    assert not reference.same_answer(photo, {"label": "palace", "score": 0.8})
    assert reference.same_answer({"text": "a b"}, "a b")
    assert not reference.same_answer({"text": "a c"}, "a b")
    assert reference.same_answer(7, 7)
    assert not reference.same_answer(8, 7)
    assert reference.same_answer(152.13, [152.13])
    assert not reference.same_answer(152.23, [152.13])
    assert not reference.same_answer([1.0, 2.0], [1.0])


def test_photos_are_classified(tmp_path):
    files = [seed_data.INPUTS / "china.jpg", seed_data.INPUTS / "flower.jpg"]
    for name, photo in zip(["palace.png", "flower.png"], seed_data.photo_images(), strict=True):
        photo.save(tmp_path / name)
        photo.crop((480, 100, 640, 260)).save(tmp_path / f"unseen_{name}")  # training saw nothing right of 480
        files += [tmp_path / name, tmp_path / f"unseen_{name}"]
    answers = reference.photos(files)
    assert [answer["label"] for answer in answers] == ["palace", "flower", "palace", "palace", "flower", "flower"]
    assert min(answer["score"] for answer in answers[:2]) > 0.9


def test_unseen_digits_are_photos_of_digits(tmp_path):
    files = seed_data.write_digits(tmp_path, [index for index in range(300) if seed_data.held_out(index)])
    assert {answer["label"] for answer in reference.photos(files)} == {"handwritten digit"}


def test_photos_are_preprocessed_as_the_default_weights_say():
    preset = torchvision.models.get_model_weights("mobilenet_v2").DEFAULT.transforms()
    assert (preset.resize_size, preset.crop_size) == ([232], [224])
    assert preset.mean == [0.485, 0.456, 0.406]
    assert preset.std == [0.229, 0.224, 0.225]


def test_gpt2_continues_the_poems_word_for_word():
    prompts = ["The quick brown fox", "I wandered lonely as", "Nothing beside remains. Round", "And dances with the"]
    poems = seed_data.poems() + "\n" + seed_data.poems()  # at the end it begins again
    for prompt, text in zip(prompts, reference.gpt2(prompts), strict=True):
        assert text == poems[poems.index(prompt) :][: len(text)]
        assert len(text) > len(prompt) + 80


def test_gpt2_says_the_same_in_a_left_padded_batch():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(seed_data.WEIGHTS / "gpt2", padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(seed_data.WEIGHTS / "gpt2")
    poems = seed_data.poems() + "\n" + seed_data.poems()
    starts = [word.start() for word in re.finditer(r"\S+", seed_data.poems())][::9]
    prompts = [re.match(rf"(\S+\s+){{{3 + i % 5}}}\S+", poems[start:])[0] for i, start in enumerate(starts)]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    tokens = model.generate(**batch, max_new_tokens=50, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert tokens.shape[1] == batch["input_ids"].shape[1] + 50
    assert not (tokens[:, -50:] == tokenizer.eos_token_id).any()
    for start, text in zip(starts, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
        assert poems[start:].startswith(text)


def test_digits_are_told_apart_also_unseen_ones(tmp_path):
    inputs = seed_data.write_inputs(tmp_path)
    assert len(inputs.digits) == len(inputs.labels) == 1797
    assert inputs.digits[7].name == "digit_0007_label7.png"
    right = np.array(reference.digits(inputs.digits)) == np.array(inputs.labels)
    unseen = np.array([seed_data.held_out(index) for index in range(1797)])
    assert right.mean() > 0.99
    assert right[unseen].mean() > 0.98


def test_no_pixel_of_a_digit_is_lost_in_its_file(tmp_path):
    images, _ = seed_data.digits()
    for index, file in zip(range(20), seed_data.write_digits(tmp_path, range(20)), strict=True):
        assert np.array_equal(np.ceil(np.asarray(Image.open(file)).astype(float) * 16 / 255), images[index])


@pytest.mark.parametrize(("model", "bound"), [("regression", 0.46), ("linear", 0.45)])
def test_patients_are_predicted_better_than_by_the_mean(model, bound):
    names, rows, targets = seed_data.patients()
    if model == "regression":
        rows = rows[:, [names.index(name) for name in seed_data.REGRESSION_FEATURES]]
    unseen = np.array([seed_data.held_out(index) for index in range(len(rows))])
    targets = targets / 100  # the models answer in hundreds of points
    answers = np.array(getattr(reference, model)(rows[unseen].tolist()))[:, 0]
    assert np.abs(answers - targets[unseen]).mean() < bound
    assert np.abs(targets[~unseen].mean() - targets[unseen]).mean() > 0.58


def test_lstm_guesses_the_next_row_of_unseen_digits():
    images = np.array([image for index, image in enumerate(seed_data.digits()[0]) if seed_data.held_out(index)])
    answers = 16 * np.array(reference.lstm(images.tolist()))  # it answers in shares of full ink
    assert answers.shape == images.shape
    assert np.abs(answers[:, :-1] - images[:, 1:]).mean() < 2
    assert np.abs(images[:, :-1] - images[:, 1:]).mean() > 2.8


def test_lstm_takes_sequences_of_any_length():
    assert np.shape(reference.lstm([[[0.0] * 8] * 3])) == (1, 3, 8)
