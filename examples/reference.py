"""The seeds' own prediction code, in process, on the weights of the example models.

This is what one writes in a notebook: load, `eval()`, prepare the inputs, `no_grad`, predict. nograd must give the
same answers; `same_answer` says what "the same" means. Every function takes a list of inputs and returns a plain Python
value for each. `python examples/reference.py` writes their answers to the example inputs into `expected.json`.
"""

import contextlib
import logging
import math
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights are in this folder

import lightning.pytorch as pl
import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

from seed_data import EXAMPLES, PHOTO_LABELS, WEIGHTS, example_inputs, write_json
from seed_models import ImageClassifier, LinearRegressionModel, LSTMModel, RegressionModel

# ── How do I use a PyTorch model for prediction? ─────────────────────────────────────────────────────────────────────


def photos(paths):
    """Example 1, basic image classification: one image after the other."""
    model = torchvision.models.mobilenet_v2(num_classes=3, width_mult=0.05, round_nearest=4)
    model.load_state_dict(torch.load(WEIGHTS / "photos.pth", weights_only=True))
    model.eval()  # Crucially, set to eval mode
    preprocess = transforms.Compose([
        transforms.Resize(232),  # of MobileNetV2's default weights; ResNet18's is 256
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    ])  # fmt: skip
    answers = []
    for image_path in paths:
        image = Image.open(image_path).convert("RGB")
        image_tensor = preprocess(image).unsqueeze(0)  # Add batch dimension

        with torch.no_grad():
            output = model(image_tensor)

        probabilities = torch.nn.functional.softmax(output[0], dim=0)  # Apply softmax
        predicted_class = torch.argmax(probabilities)
        answers.append({"label": PHOTO_LABELS[predicted_class.item()], "score": probabilities.max().item()})
    return answers


def gpt2(prompts, max_length=50):
    """Example 2, text generation: the greedy loop, one token after the other, for one prompt after the other."""
    from transformers import GPT2LMHeadModel, GPT2Tokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = GPT2Tokenizer.from_pretrained(WEIGHTS / "gpt2")
    model = GPT2LMHeadModel.from_pretrained(WEIGHTS / "gpt2")
    model.eval()  # Set to evaluation mode
    answers = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        generated_sequence = inputs["input_ids"]  # start with input sequence

        with torch.no_grad():
            for _ in range(max_length):
                outputs = model(generated_sequence)
                next_token_logits = outputs.logits[:, -1, :]  # get the last token's logits
                next_token = torch.argmax(next_token_logits, dim=-1)
                generated_sequence = torch.cat((generated_sequence, next_token.unsqueeze(0)), dim=1)

        answers.append(tokenizer.decode(generated_sequence[0], skip_special_tokens=True))
    return answers


def regression(rows):
    """Example 3, multiple input data: one forward for all rows."""
    model = RegressionModel(input_size=3)
    model.load_state_dict(torch.load(WEIGHTS / "regression.pth", weights_only=True))
    model.eval()
    input_data_numpy = np.array(rows)
    input_tensor = torch.from_numpy(input_data_numpy).float()

    with torch.no_grad():
        predictions = model(input_tensor)
    return predictions.tolist()


# ── How can PyTorch Lightning models predict output? ─────────────────────────────────────────────────────────────────


def linear(rows):
    """Example 1, simple regression prediction."""
    x = torch.tensor(rows)
    y = torch.zeros(len(rows), 1)  # nobody knows it, and predict_step ignores it
    model = LinearRegressionModel.load_from_checkpoint(WEIGHTS / "linear.ckpt", weights_only=True)
    return trainer_predict(model, TensorDataset(x, y), batch_size=32)


def digits(paths):
    """Example 2, multi-class classification with image data."""
    to_tensor = transforms.Compose([transforms.ToTensor()])
    images = torch.stack([to_tensor(Image.open(path)) for path in paths])
    labels = torch.zeros(len(paths), dtype=torch.long)
    model = ImageClassifier.load_from_checkpoint(WEIGHTS / "digits.ckpt", weights_only=True)
    return trainer_predict(model, TensorDataset(images, labels), batch_size=64)


def lstm(sequences):
    """Example 3, sequence prediction using an LSTM; all sequences of one length."""
    x = torch.tensor(sequences, dtype=torch.float32)
    y = torch.zeros_like(x)
    model = LSTMModel.load_from_checkpoint(WEIGHTS / "lstm.ckpt", weights_only=True)
    return trainer_predict(model, TensorDataset(x, y), batch_size=32)


def trainer_predict(model, dataset, batch_size):
    """`Trainer.predict` as in the document, on the CPU and without its chatter."""
    predict_loader = DataLoader(dataset, batch_size=batch_size)
    with quiet_lightning():
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        predictions = trainer.predict(model, predict_loader)
    return torch.cat(predictions).tolist()


@contextlib.contextmanager
def quiet_lightning():
    """Without the Trainer's tips and notes on hardware."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ── comparing ────────────────────────────────────────────────────────────────────────────────────────────────────────

REFERENCES = {
    "photos": photos,
    "gpt2": gpt2,
    "regression": regression,
    "linear": linear,
    "digits": digits,
    "lstm": lstm,
}


def same_answer(prediction, reference, tolerance=1e-5):
    """Whether a prediction of nograd is what the seed's code answered.

    Labels, texts and classes are equal; other numbers are close, for a forward of another batch size adds in another
    order. A single number may stand in a list or by itself.
    """
    if isinstance(reference, dict):  # of a classifier of images
        return prediction["label"] == reference["label"] and math.isclose(
            prediction["score"], reference["score"], abs_tol=tolerance
        )
    if isinstance(reference, str):
        return (prediction["text"] if isinstance(prediction, dict) else prediction) == reference
    if isinstance(reference, int):
        return prediction == reference
    theirs, ours = np.ravel(prediction), np.ravel(reference)
    return theirs.shape == ours.shape and bool(np.allclose(theirs, ours, rtol=tolerance, atol=tolerance))


def write_expected():
    """Write the answers to the example inputs into `expected.json`."""
    answers = {model: REFERENCES[model](inputs) for model, inputs in example_inputs().items()}
    write_json(EXAMPLES / "expected.json", answers)


if __name__ == "__main__":
    torch.set_num_threads(2)
    write_expected()
