import sys

import lightning.pytorch as pl
import pytest
import torch

from nograd.tasks.errors import ModelFailed, ModelFileError

CODE = """
import lightning.pytorch as pl
import torch
from torch import nn


class Base(pl.LightningModule):
    def __init__(self, input_dim, output_dim):
        super().__init__()
        self.save_hyperparameters()
        self.linear = nn.Linear(input_dim, output_dim)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.linear(self.drop(x))


class Plain(Base):
    pass  # Lightning's own predict_step: forward


class Unpacking(Base):
    def predict_step(self, batch, batch_idx):
        x, _ = batch
        return self(x)


class Squeezed(Base):
    def predict_step(self, batch, batch_idx):
        return self(batch).argmax(dim=1)


class NoIndex(Base):
    def predict_step(self, batch):
        return self(batch)


class AllIndices(Base):
    def predict_step(self, batch, batch_idx, dataloader_idx=7):
        return self(batch) * 0 + batch_idx + dataloader_idx


class OtherNames(Base):
    def predict_step(self, rows, i, j):
        return self(rows) * 0 + i + j


class NeedsTrainer(Base):
    def predict_step(self, batch, batch_idx):
        return self(batch) * self.trainer.world_size


class Hooks(Base):
    seen = []

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.seen.append(("before", type(batch).__name__, dataloader_idx))
        return batch * 2

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.seen.append(("transfer", str(device), dataloader_idx))
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.seen.append(("after", type(batch).__name__, dataloader_idx))
        return batch + 1

    def predict_step(self, batch, batch_idx):
        self.seen.append(("step", batch_idx))
        return batch


class MonteCarlo(Base):
    def predict_step(self, batch, batch_idx):
        self.drop.train()
        return torch.stack([self(batch) for _ in range(50)]).std(0)


class WithExample(Base):
    def __init__(self, input_dim, output_dim):
        super().__init__(input_dim, output_dim)
        self.example_input_array = torch.zeros(4, input_dim)

    def predict_step(self, batch, batch_idx):
        x, _ = batch
        return self(x)


class LSTMModel(pl.LightningModule):
    def __init__(self, input_dim, hidden_dim, output_dim):
        super().__init__()
        self.save_hyperparameters()
        self.lstm = nn.LSTM(input_dim, hidden_dim, batch_first=True)
        self.linear = nn.Linear(hidden_dim, output_dim)

    def forward(self, sequence):
        hidden, state = self.lstm(sequence)
        return self.linear(hidden), state

    def predict_step(self, batch, batch_idx):
        sequence, _ = batch
        output, _ = self(sequence)
        return output


class NothingSaved(pl.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, x):
        return self.linear(x)
"""


@pytest.fixture
def lightning(user_code, tmp_path):
    """Save a module of `CODE` as a Trainer's own checkpoint, and write its table."""
    name = user_code(CODE)

    def write(cls, extra="", **init):
        import importlib

        sys.path.insert(0, str(tmp_path))
        init = init or {"input_dim": 3, "output_dim": 2}
        module = getattr(importlib.import_module(name), cls)(**init)
        trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False, accelerator="cpu")
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / f"{cls}.ckpt")
        write.original = module.eval()
        return f'loader = "lightning"\nclass = "{name}:{cls}"\ncheckpoint = "{cls}.ckpt"\n{extra}\n'

    write.code = name
    return write


ROWS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [0.5, 0.0, -1.0]]


def expected(lightning, rows=ROWS):
    with torch.no_grad():
        return lightning.original(torch.tensor(rows)).tolist()


@pytest.mark.parametrize("cls", ["Plain", "NoIndex"])
def test_predict_step_answers_what_a_trainer_would(hosted, predict, lightning, cls):
    model = hosted(lightning(cls, "shape = [3]"))
    for answer, wanted in zip(predict(model, ROWS), expected(lightning), strict=True):
        assert answer == pytest.approx(wanted, abs=1e-5)


def test_a_batch_and_its_members_alone_agree_and_dropout_is_off(hosted, predict, lightning):
    model = hosted(lightning("Plain"))
    assert not any(part.training for part in model.module.modules())
    alone = [predict(model, [row])[0] for row in ROWS]
    for answer, wanted in zip(predict(model, ROWS), alone, strict=True):
        assert answer == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(("cls", "value"), [("AllIndices", 7.0), ("OtherNames", 0.0)])
def test_predict_step_gets_the_indices_its_signature_has(hosted, predict, lightning, cls, value):
    assert predict(hosted(lightning(cls)), ROWS[:1]) == [[value, value]]


def test_the_transfer_hooks_run_in_a_trainer_s_order(hosted, predict, lightning):
    model = hosted(lightning("Hooks"))
    model.module.seen.clear()
    assert predict(model, [[1, 2, 3]]) == [[3, 5, 7]]
    assert model.module.seen == [("before", "Tensor", 0), ("transfer", "cpu", 0), ("after", "Tensor", 0), ("step", 0)]


def test_a_step_that_unpacks_its_batch_gets_a_pair(hosted, predict, lightning):
    model = hosted(lightning("Unpacking", 'shape = [3]\nbatch_style = "inputs_and_targets"'))
    for n in (1, 2, 3):
        for answer, wanted in zip(predict(model, ROWS[:n]), expected(lightning), strict=False):
            assert answer == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("known_by", ["shape = [3]", "example = [1, 2, 3]", "shape = [3]\nbatch = { max_items = 2 }"])
def test_the_wrong_batch_style_stops_the_start_and_names_the_right_one(hosted, lightning, known_by):
    with pytest.raises(ModelFileError, match=r"unpacks what it gets .*set batch_style = \"inputs_and_targets\""):
        hosted(lightning("Unpacking", known_by))


def test_the_module_s_own_example_warms_it_up(hosted, lightning):
    with pytest.raises(ModelFileError, match="batch_style"):
        hosted(lightning("WithExample"))
    model = hosted(lightning("WithExample", 'batch_style = "inputs_and_targets"'))
    assert [example.tolist() for example in model.examples()] == [[0, 0, 0]]


def test_a_step_that_needs_a_trainer_stops_the_start_and_says_so(hosted, opened, lightning):
    with pytest.raises(
        ModelFileError, match=r"\[it\] the warm-up failed: predict_step of .* uses self.trainer; nograd"
    ):
        hosted(lightning("NeedsTrainer", "shape = [3]"))
    model = opened(lightning("NeedsTrainer"))  # without a shape nothing warms it up
    model.load(torch.device("cpu"))
    with pytest.raises(ModelFailed, match="runs modules without a Trainer"):
        model.forward([model.prepare([1, 2, 3], {})], {})


def test_monte_carlo_dropout_is_the_step_s_own_decision(hosted, predict, lightning):
    assert min(predict(hosted(lightning("MonteCarlo")), [[1, 2, 3]])[0]) > 0


def test_sequences_are_answered_with_sequences_of_their_own_length(hosted, predict, lightning):
    table = lightning(
        "LSTMModel",
        'shape = [-1, 4]\nbatch_style = "inputs_and_targets"',
        input_dim=4,
        hidden_dim=8,
        output_dim=2,
    )
    model = hosted(table)
    (answer,) = predict(model, [torch.randn(7, 4).tolist()])
    assert torch.tensor(answer).shape == (7, 2)


def test_labels_name_a_class_that_the_step_chose(hosted, predict, lightning):
    model = hosted(lightning("Squeezed", 'labels = ["no", "yes"]\nshape = [3]'))
    answers = predict(model, ROWS)
    assert answers == [{"label": ["no", "yes"][int(row[1] > row[0])]} for row in expected(lightning)]


def test_hyperparameters_may_be_overridden_or_given(hosted, predict, opened, lightning):
    table = lightning("NothingSaved", "shape = [5]", width=5)
    with pytest.raises(ModelFileError, match=r"init = \{\}: .*missing 1 required positional argument: 'width'"):
        opened(table).load(torch.device("cpu"))
    assert len(predict(hosted(table + "init = { width = 5 }"), [[1] * 5])) == 1


@pytest.mark.parametrize("data", [b"", b"hello"])
def test_a_damaged_checkpoint_is_named(opened, lightning, tmp_path, data):
    table = lightning("Plain")
    (tmp_path / "Plain.ckpt").write_bytes(data)
    with pytest.raises(ModelFileError, match=r"models.toml: \[it\] checkpoint = 'Plain.ckpt': "):
        opened(table).load(torch.device("cpu"))


def test_a_checkpoint_with_code_in_it_is_refused_and_none_runs(opened, lightning, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was here"), "w"))

    table = lightning("Plain")
    checkpoint = torch.load(tmp_path / "Plain.ckpt", weights_only=True)
    torch.save({**checkpoint, "callbacks": Evil()}, tmp_path / "Plain.ckpt")
    with pytest.raises(ModelFileError, match=r"checkpoint = 'Plain.ckpt': torch refused it with weights_only=True"):
        opened(table).load(torch.device("cpu"))
    assert not (tmp_path / "was here").exists()


def test_a_checkpoint_of_another_module_lists_what_does_not_fit(opened, lightning, tmp_path):
    table = lightning("Plain")
    checkpoint = torch.load(tmp_path / "Plain.ckpt", weights_only=True)
    checkpoint["state_dict"]["linear.weight"] = torch.zeros(9, 9)
    torch.save(checkpoint, tmp_path / "Plain.ckpt")
    with pytest.raises(ModelFileError, match=r"checkpoint = 'Plain.ckpt': (?s:.)*size mismatch for linear.weight"):
        opened(table).load(torch.device("cpu"))


def test_a_missing_checkpoint_and_a_class_that_is_no_lightning_module_are_named(opened, lightning):
    table = lightning("Plain")
    with pytest.raises(ModelFileError, match=r"checkpoint = 'gone.ckpt': no such file"):
        opened(table.replace("Plain.ckpt", "gone.ckpt")).load(torch.device("cpu"))
    with pytest.raises(ModelFileError, match=r"class = 'torch.nn:Linear': not a LightningModule"):
        opened(table.replace(f"{lightning.code}:Plain", "torch.nn:Linear")).load(torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_module_runs_in_the_dtype_of_the_model_file(hosted, predict, lightning, dtype):
    model = hosted(lightning("Plain", f'shape = [3]\ndtype = "{dtype}"'))
    assert {p.dtype for p in model.module.parameters()} == {getattr(torch, dtype)}
    for answer, wanted in zip(predict(model, ROWS), expected(lightning), strict=True):
        assert answer == pytest.approx(wanted, rel=3e-2, abs=3e-2)


@pytest.mark.slow
def test_a_step_that_calls_its_module_runs_compiled(hosted, predict, lightning):
    model = hosted(lightning("Plain", "shape = [3]\ncompile = true\nbatch = { max_items = 4 }"))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (1, 2, 3):
            for answer, wanted in zip(predict(model, ROWS[:n]), expected(lightning), strict=False):
                assert answer == pytest.approx(wanted, abs=1e-5)
