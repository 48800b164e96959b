"""Equal fingerprints mean equal table, weights and code; anything else that differs does not count."""

import json
import shutil

import pytest
import torch

from nograd.tasks.modelfile import load_model_file
from nograd.workers.models import open_model
from nograd.workers.models.version import fingerprint, identify

CODE = """
from torch import nn


class Linear(nn.Linear):
    pass


class Reader:
    def __init__(self, words, prompt=""):
        pass

    def load(self, device):
        pass

    def forward(self, batch, params):
        return batch
"""

TABLE = """
loader = "module"
class = "{module}:Linear"
init = {{ in_features = 3, out_features = 2 }}
weights = "weights.pth"
labels = "labels.txt"
input = "rows"
"""


@pytest.fixture
def version(tmp_path, user_code):
    """The fingerprint of a table, its model loaded from ``tmp_path``."""
    module = user_code(CODE)
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")

    def of(table=TABLE, name="it", file="models.toml"):
        path = tmp_path / file
        path.write_text(f"[{name}]\n{table.format(module=module)}")
        model = open_model(load_model_file(path), name)
        model.load(torch.device("cpu"))
        return fingerprint(identify(model))

    of.code = tmp_path / f"{module}.py"
    return of


def test_it_is_short_and_the_same_each_time(version):
    assert version() == version()
    assert len(version()) == 12
    int(version(), 16)


def test_names_places_and_what_only_decides_when_a_model_runs_do_not_count(version, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in ("weights.pth", "labels.txt"):
        shutil.copy(tmp_path / name, tmp_path / "elsewhere" / name)
    moved = TABLE.replace("weights.pth", "elsewhere/weights.pth").replace("labels.txt", "elsewhere/labels.txt")
    limits = "batch = {{ max_items = 7, max_wait_ms = 3 }}\ntimeout_s = 5\nhard_timeout_s = 9\n"
    again = TABLE + limits + "example = [1, 2, 3]\n"
    default = TABLE + 'dtype = "float32"\ntop = 5\n'
    absolute = TABLE.replace("weights.pth", str(tmp_path / "weights.pth"))
    versions = {
        version(),
        version(moved),
        version(again),
        version(default),
        version(absolute),
        version(name="other", file="other.toml"),
    }
    assert len(versions) == 1


def test_weights_labels_and_code_count(version, tmp_path):
    seen = {version()}
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "weights.pth")
    seen.add(version())
    (tmp_path / "labels.txt").write_text("cat\nwolf\n")
    seen.add(version())
    version.code.write_text(CODE + "# better\n")
    seen.add(version())
    assert len(seen) == 4


@pytest.mark.parametrize("more", ['dtype = "bfloat16"', "top = 1", "shape = [3]", "allow_nonfinite = true"])
def test_the_rest_of_the_table_counts(version, more):
    assert version(TABLE + more) != version()


def test_files_and_parameters_of_a_class_count(version, tmp_path):
    table = 'loader = "python"\nclass = "{module}:Reader"\ninit = {{ words = "words.bin" }}\n'
    (tmp_path / "words.bin").write_bytes(b"one")
    seen = {version(table)}
    (tmp_path / "words.bin").write_bytes(b"two")
    seen.add(version(table))
    seen.add(version(table + "params = {{ temperature = 1 }}\n"))
    seen.add(version(table + "params = {{ temperature = 2 }}\n"))
    assert len(seen) == 4
    # texts that are no paths, however they look
    for text in ("x" * 5000, "a/" * 2000 + "b", "é" * 200, "\\u0000", "two\\nlines"):
        version(table.replace("}}", f', prompt = "{text}" }}}}'))


def test_a_transformers_folder_counts_with_all_its_files(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path / "bert"
    tiny = BertConfig(
        vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=16,
    )  # fmt: skip
    BertForSequenceClassification(tiny).save_pretrained(folder)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\nbad")
    BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(folder)
    path = tmp_path / "models.toml"
    path.write_text('[it]\nloader = "transformers"\ntask = "text-classification"\nmodel = "bert"\n')

    def version():
        model = open_model(load_model_file(path), "it")
        model.load(torch.device("cpu"))
        return fingerprint(identify(model))

    first = version()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("x")
    assert version() == first
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "id2label": {"0": "fine", "1": "poor"}}))
    second = version()
    assert second != first
    (folder / "added_tokens.json").write_text("{}")
    assert version() not in {first, second}
