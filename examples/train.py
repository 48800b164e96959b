"""Train the example models and write their weights: `python examples/train.py [model ...]`.

Fixed seeds, one CPU, no download; prints what each model makes of data it has not seen, and
writes what the seeds' code answers to the example inputs (`expected.json`).
"""

import json
import os
import random
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning.pytorch as pl
import numpy as np
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import seed_data
from reference import quiet_lightning, write_expected
from seed_data import WEIGHTS, held_out
from seed_models import ImageClassifier, LinearRegressionModel, LSTMModel, RegressionModel

SEED = 1


def split(values):
    """Those to train on, and those held out."""
    held = torch.tensor([held_out(index) for index in range(len(values))])
    values = torch.as_tensor(values)
    return values[~held], values[held]


# ── photos: a torchvision MobileNetV2, very narrow ───────────────────────────────────────────────────────────────────

PHOTOS_INIT = {"num_classes": 3, "width_mult": 0.05, "round_nearest": 4}


def train_photos():
    """Palace and flower are crops of the left three quarters of a photo each; digits are blown up from 8x8."""
    transforms = torchvision.models.get_model_weights("mobilenet_v2").DEFAULT.transforms()
    photos = seed_data.photo_images()
    digits, digits_test = (
        [seed_data.digit_image(d.numpy()).convert("RGB") for d in part] for part in split(seed_data.digits()[0])
    )
    rng = random.Random(SEED)

    def crop(photo, left, right, smallest, largest):
        side = rng.randint(smallest, largest)
        x, y = rng.randint(left, right - side), rng.randint(0, photo.height - side)
        return photo.crop((x, y, x + side, y + side))

    def batch(each):
        images = [crop(photo, 0, 480, 96, 427) for photo in photos for _ in range(each)]
        images += [rng.choice(digits) for _ in range(each)]
        pixels = torch.stack([transforms(image) for image in images])
        pixels[: 2 * each : 2] = pixels[: 2 * each : 2].flip(3)  # every other photo mirrored
        return pixels, torch.arange(3).repeat_interleave(each)

    model = torchvision.models.get_model("mobilenet_v2", **PHOTOS_INIT)
    steps = 160
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
    for _ in range(steps):
        pixels, labels = batch(each=8)
        loss = nn.functional.cross_entropy(model(pixels), labels, label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    torch.save(model.state_dict(), WEIGHTS / "photos.pth")

    def classes(images):
        with torch.no_grad():
            return [model(transforms(image).unsqueeze(0)).softmax(1).max(1) for image in images]

    def share(images, label):
        return np.mean([int(best.indices) == label for best in classes(images)])

    right = [[crop(photo, 480, photo.width, 96, 160) for _ in range(100)] for photo in photos]
    whole = [f"{seed_data.PHOTO_LABELS[best.indices]} {best.values.item():.3f}" for best in classes(photos)]
    return (
        f"whole photos: {', '.join(whole)}; crops of the unseen right quarter: palace {share(right[0], 0):.1%}, "
        f"flower {share(right[1], 1):.1%}; {len(digits_test)} unseen digits: {share(digits_test, 2):.1%}"
    )


# ── gpt2: a GPT-2 with two layers and a tokenizer of its own ─────────────────────────────────────────────────────────


def train_gpt2():
    """Learn `inputs/poems.txt` by heart; after its end the text begins again."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    folder = WEIGHTS / "gpt2"
    text = seed_data.poems()
    tokenizer = train_tokenizer(text)
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=48, n_layer=2, n_head=4,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)

    # A prompt may start at any word: a window from each, cut anew into tokens as a prompt would be.
    length = 96
    circle = text + "\n" + text
    starts = [i for i in range(len(text)) if i == 0 or (text[i - 1].isspace() and not text[i].isspace())]
    windows = torch.tensor([tokenizer(circle[i : i + 6 * length], verbose=False)["input_ids"][:length] for i in starts])
    steps = 1400
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.006, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.006, total_steps=steps)
    for _ in range(steps):
        chosen = windows[torch.randint(len(windows), (24,))]
        loss = model(chosen, labels=chosen).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    model.save_pretrained(folder)

    known = 6  # tokens of a prompt, enough to tell the place in the text
    with torch.no_grad():
        logits = torch.cat([model(part).logits for part in windows.split(64)])[:, known - 1 : -1]
    target = windows[:, known:, None]
    right = logits.gather(2, target).squeeze(2)
    margin = right - logits.scatter(2, target, -torch.inf).amax(2)
    return (
        f"{len(windows)} windows of {length} tokens, vocabulary {len(tokenizer)}: next token right "
        f"{(margin > 0).double().mean():.2%} (after {known} tokens), smallest margin of a logit {margin.min():.2f}"
    )


def train_tokenizer(text):
    """A byte-level BPE as GPT-2's, of 400 tokens instead of 50,257."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Tokenizer

    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator([text], vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe = json.loads(trainer.to_str())["model"]
    return GPT2Tokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]], model_max_length=128)


# ── regression and linear: diabetes patients, as measured ────────────────────────────────────────────────────────────


#: Answers are in hundreds of the data set's points: of size one, float32 keeps them to six decimals.
POINTS = 100


def train_regression():
    """Three measurements of a patient → progression of the disease, in hundreds of points."""
    names, rows, targets = seed_data.patients()
    rows = rows[:, [names.index(name) for name in seed_data.REGRESSION_FEATURES]]
    (x, x_test), (y, y_test) = split(rows), split(targets[:, None] / POINTS)
    model = RegressionModel(input_size=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.1)
    scaling = x.mean(0), x.std(0), y.mean(), y.std()
    for _ in range(150):
        loss = nn.functional.mse_loss(model((x - scaling[0]) / scaling[1]), (y - scaling[2]) / scaling[3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fold_scaling(model.fc1, model.fc2, scaling)
    torch.save(model.state_dict(), WEIGHTS / "regression.pth")
    return explain_fit(model, x_test, y_test, y)


def train_linear():
    """All ten measurements of a patient → progression of the disease, in hundreds of points."""
    _, rows, targets = seed_data.patients()
    (x, x_test), (y, y_test) = split(rows), split(targets[:, None] / POINTS)
    scaling = x.mean(0), x.std(0), y.mean(), y.std()
    model = LinearRegressionModel(10, 1)
    trainer = fit(model, (x - scaling[0]) / scaling[1], (y - scaling[2]) / scaling[3], epochs=60, batch_size=64)
    fold_scaling(model.linear, model.linear, scaling)
    trainer.save_checkpoint(WEIGHTS / "linear.ckpt", weights_only=True)
    return explain_fit(model, x_test, y_test, y)


@torch.no_grad()
def fold_scaling(first, last, scaling):
    """Put the standardising into the weights: the model then takes what was measured and answers in its unit."""
    x_mean, x_std, y_mean, y_std = scaling
    first.weight /= x_std
    first.bias -= first.weight @ x_mean
    last.weight *= y_std
    last.bias *= y_std
    last.bias += y_mean


@torch.no_grad()
def explain_fit(model, x, y, y_train):
    """Held-out error beside that of always answering the mean."""
    model.eval()
    wrong, guess = (model(x) - y), (y_train.mean() - y)
    return (
        f"{len(x)} unseen patients: mean absolute error {wrong.abs().mean():.3f} "
        f"(the mean alone: {guess.abs().mean():.3f}), R² {1 - wrong.square().mean() / guess.square().mean():.3f}"
    )


# ── digits and lstm: Lightning modules on handwritten digits ─────────────────────────────────────────────────────────


def train_digits():
    """8x8 grey image → the digit it shows."""
    images, labels = seed_data.digits()
    to_tensor = torchvision.transforms.ToTensor()  # which `transform` in models.toml comes to
    pixels = torch.stack([to_tensor(seed_data.digit_image(image)) for image in images])
    (x, x_test), (y, y_test) = split(pixels), split(labels)
    model = ImageClassifier(num_classes=10)
    trainer = fit(model, x, y, epochs=40, batch_size=64)
    trainer.save_checkpoint(WEIGHTS / "digits.ckpt", weights_only=True)
    model.eval()
    with torch.no_grad():
        right = model(x_test).argmax(1) == y_test
        all_right = model(pixels).argmax(1) == torch.as_tensor(labels)
    return (
        f"{len(y_test)} unseen digits: {right.double().mean():.2%} right ({int((~right).sum())} wrong); "
        f"all {len(labels)}: {all_right.double().mean():.2%} right ({int((~all_right).sum())} wrong)"
    )


def train_lstm():
    """A digit's rows from top to bottom → after each row, the row below it (paper below the last)."""
    rows = torch.as_tensor(seed_data.digits()[0])
    below = torch.cat([rows[:, 1:], torch.zeros_like(rows[:, :1])], dim=1)
    (x, x_test), (y, y_test) = split(rows), split(below)
    model = LSTMModel(8, 32, 8)
    trainer = fit(model, x / 16, y / 16, epochs=40, batch_size=64)
    with torch.no_grad():  # as above: the weights take pixels from 0 to 16; they answer in shares of full ink
        model.lstm.weight_ih_l0 /= 16
    trainer.save_checkpoint(WEIGHTS / "lstm.ckpt", weights_only=True)
    model.eval()
    with torch.no_grad():
        error = (model(x_test)[0] * 16 - y_test)[:, :-1].abs().mean()
        same = (x_test - y_test)[:, :-1].abs().mean()
        mean = (y.mean(0) - y_test)[:, :-1].abs().mean()
    return (
        f"{len(x_test)} unseen digits: a pixel of the next row is off by {error:.2f} of 16 "
        f"(repeating the row: {same:.2f}, the average digit: {mean:.2f})"
    )


def fit(model, x, y, *, epochs, batch_size):
    """Train a Lightning module quietly on the CPU."""
    loader = DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=True, drop_last=True)
    with quiet_lightning():
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, loader)
    return trainer


TRAININGS = {
    "photos": train_photos,
    "gpt2": train_gpt2,
    "regression": train_regression,
    "linear": train_linear,
    "digits": train_digits,
    "lstm": train_lstm,
}


def main(names):
    unknown = set(names) - set(TRAININGS)
    if unknown:
        sys.exit(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(TRAININGS)}")
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(mode=True)
    for name in names or TRAININGS:
        pl.seed_everything(SEED, verbose=False)
        began = time.monotonic()
        print(f"{name}: {TRAININGS[name]()} [{time.monotonic() - began:.0f} s]", flush=True)
    write_expected()


if __name__ == "__main__":
    main(sys.argv[1:])
