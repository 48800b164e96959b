"""The real inputs of the example models: where they come from and how they become files.

Two sets of them:

* `example_inputs()` reads the few that are committed under `inputs/`; it needs nothing but Python.
* `write_inputs(folder)` writes all there are (2 photos, 1,797 handwritten digits, 442 patients) from the data that
  scikit-learn ships, so they are there without a download.
"""

import csv
import io
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

EXAMPLES = Path(__file__).parent
INPUTS = EXAMPLES / "inputs"
WEIGHTS = EXAMPLES / "weights"

#: the classes of `photos`, in the order of its outputs
PHOTO_LABELS = ["palace", "flower", "handwritten digit"]

#: what the rows of `regression` hold, among the ten features of a patient, which the rows of `linear` hold
REGRESSION_FEATURES = ["bmi", "bp", "s5"]


def held_out(index):
    """Whether the digit or patient at this place was kept from training: every fourth one."""
    return index % 4 == 3


# ── what scikit-learn ships ──────────────────────────────────────────────────────────────────────────────────────────


def photo_files():
    """The two photos, 640 by 427, by name."""
    images = files("sklearn.datasets.images")
    return {name: images / name for name in ("china.jpg", "flower.jpg")}


def photo_images():
    """The two photos as Pillow images: the palace and the flower."""
    from PIL import Image

    return [Image.open(io.BytesIO(file.read_bytes())).convert("RGB") for file in photo_files().values()]


def digits():
    """1,797 handwritten digits: pixels (1797, 8, 8) from 0 (paper) to 16 (ink), and their labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images.astype("float32"), bunch.target


def digit_image(pixels):
    """A digit as a grey Pillow image; 17 grey levels of 256, so no pixel is lost."""
    from PIL import Image

    return Image.fromarray((pixels.astype("int64") * 255 // 16).astype("uint8"))


def patients():
    """442 diabetes patients: names of the ten features, rows of them as measured, progression a year later."""
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    return bunch.feature_names, bunch.data.astype("float32"), bunch.target.astype("float32")


# ── as files ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Inputs:
    """What `write_inputs` wrote.

    Attributes:
        photos: two JPEG files.
        digits: 1,797 PNG files of 8x8 pixels, in the order of `labels`.
        labels: the digit each of them shows.
        patients: a CSV file with a row per patient: `patient` (1, 2, …), ten features, `progression`.
    """

    photos: list[Path]
    digits: list[Path]
    labels: list[int]
    patients: Path


def write_inputs(folder):
    """Write every real input into `folder` and return where it is."""
    folder = Path(folder)
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    (folder / "digits").mkdir(exist_ok=True)
    return Inputs(
        photos=[_write(folder / "photos" / name, file.read_bytes()) for name, file in photo_files().items()],
        digits=write_digits(folder / "digits"),
        labels=digits()[1].tolist(),
        patients=write_patients(folder / "patients.csv"),
    )


def write_digits(folder, indices=None):
    """Write digits as `digit_0001_label7.png`, all or those at `indices`."""
    images, labels = digits()
    written = []
    for index in range(len(images)) if indices is None else indices:
        path = Path(folder) / f"digit_{index:04}_label{labels[index]}.png"
        digit_image(images[index]).save(path, optimize=True)
        written.append(path)
    return written


def write_patients(path):
    """Write the patients as a table with an id column."""
    names, rows, targets = patients()
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["patient", *names, "progression"])
        for number, (row, target) in enumerate(zip(rows, targets, strict=True), start=1):
            table.writerow([number, *(f"{value:g}" for value in row), f"{target:g}"])
    return Path(path)


def _write(path, data):
    path.write_bytes(data)
    return path


# ── the committed ones ───────────────────────────────────────────────────────────────────────────────────────────────

#: models whose inputs in `inputs.json` are names of image files
IMAGE_MODELS = ("photos", "digits")


def example_inputs():
    """Model name → a few inputs as a producer would send them: paths of images, texts, rows, sequences."""
    inputs = json.loads((INPUTS / "inputs.json").read_text(encoding="utf-8"))
    return {
        model: [INPUTS / name for name in values] if model in IMAGE_MODELS else values
        for model, values in inputs.items()
    }


def expected():
    """Model name → what the seeds' code (`reference.py`) answers to `example_inputs()`, in their order."""
    return json.loads((EXAMPLES / "expected.json").read_text(encoding="utf-8"))


def poems():
    """The text `gpt2` knows by heart."""
    return (INPUTS / "poems.txt").read_text(encoding="utf-8")


def write_example_inputs():
    """Write what is committed under `inputs/`, but for `poems.txt`, which is a source."""
    (INPUTS / "digits").mkdir(parents=True, exist_ok=True)
    for name, photo in zip(photo_files(), photo_images(), strict=True):
        photo.resize((360, 240)).save(INPUTS / name, quality=85, optimize=True)
    images, labels = digits()
    # the first held-out digit of each kind
    chosen = [next(i for i in range(len(labels)) if held_out(i) and labels[i] == digit) for digit in range(10)]
    names, rows, _ = patients()
    columns = [names.index(name) for name in REGRESSION_FEATURES]
    some = [round_row(row) for row in rows[:8]]
    digit_names = [f"digits/{path.name}" for path in write_digits(INPUTS / "digits", chosen)]
    write_patients(INPUTS / "patients.csv")
    write_json(
        INPUTS / "inputs.json",
        {
            "photos": ["china.jpg", "flower.jpg", *digit_names[:3]],
            "gpt2": ["The quick brown fox", "Shall I compare thee", "Two vast and trunkless legs", "A host, of golden"],
            "regression": [[row[column] for column in columns] for row in some],
            "linear": some,
            "digits": digit_names,
            "lstm": [images[index].astype(int).tolist() for index in chosen[:3]],
        },
    )


def round_row(row):
    """Floats as people write them: 4.8598, not its nearest float32."""
    return [float(f"{value:g}") for value in row]


def write_json(path, models):
    """Write model → list of values with one value on a line."""
    blocks = [
        f"  {json.dumps(model)}: [\n" + ",\n".join(f"    {json.dumps(value)}" for value in values) + "\n  ]"
        for model, values in models.items()
    ]
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write_example_inputs()
