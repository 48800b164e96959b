"""What a GPU answers is what a CPU answers, within the tolerance of its dtype."""

import pytest
import torch
import torchvision
import transformers

from .support import CPU, predict

NETS = """
import torch
from torch import nn


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        hidden, _ = self.lstm(x)
        return self.fc(hidden[:, -1])


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 3))

    def forward(self, x):
        return self.layers(x)


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.layers(x).mean((2, 3)))
"""
#: absolute, for outputs of about 1. TF32, on by default in convolutions, has 10 bits of mantissa, as float16 has.
TOLERANCE = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 5e-2}


@pytest.fixture
def net(user_code, tmp_path):
    def table(cls, keys):
        scope = {}
        exec(NETS, scope)
        torch.save(scope[cls]().state_dict(), tmp_path / "w.pth")
        return f'loader = "module"\nclass = "{user_code(NETS)}:{cls}"\nweights = "w.pth"\n{keys}\n'

    return table


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("cls", "keys", "shape"),
    [
        ("Rows", 'input = "rows"\nshape = [4]', (6, 4)),
        ("Sequence", "shape = [-1, 4]", (5, 7, 4)),
        ("Pixels", "shape = [3, 16, 16]\nchannels_last = true", (3, 3, 16, 16)),
    ],
)
def test_a_module_answers_as_on_the_cpu(host, net, device, cls, keys, shape, dtype):
    table = net(cls, keys)
    inputs = torch.randn(shape).tolist()
    wanted = predict(host(table, CPU), inputs)
    model = host(table + f'dtype = "{dtype}"', device)
    assert {p.device.type for p in model.module.parameters()} == {device.type}
    assert {p.dtype for p in model.module.parameters()} == {getattr(torch, dtype)}
    for answer, row in zip(predict(model, inputs), wanted, strict=True):
        assert answer == pytest.approx(row, abs=TOLERANCE[dtype])
    (output, *_) = model.forward([model.prepare(value, {}) for value in inputs], {})
    assert output.device.type == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_compiled_module_answers_as_an_eager_one_and_compiles_nothing_more(host, net, device, dtype):
    table = net("Rows", f'shape = [4]\nbatch = {{ max_items = 8 }}\ndtype = "{dtype}"')
    rows = torch.randn(8, 4).tolist()
    wanted = predict(host(table, device), rows)
    model = host(table + "compile = true", device)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in range(1, 9):
            for answer, row in zip(predict(model, rows[:n]), wanted, strict=False):
                assert answer == pytest.approx(row, abs=TOLERANCE[dtype])


def test_a_program_answers_as_on_the_cpu_also_with_a_constant_made_there(host, device, tmp_path):
    class Shifted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.arange(2)

    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Shifted(3, 2).eval(), (torch.zeros(2, 3),), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "net.pt2")
    table = 'loader = "export"\nprogram = "net.pt2"\n'
    rows = torch.randn(5, 3).tolist()
    for answer, wanted in zip(predict(host(table, device), rows), predict(host(table, CPU), rows), strict=True):
        assert answer == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_resnet_scores_as_on_the_cpu(host, device, tmp_path, dtype):
    torch.save(torchvision.models.resnet18(weights=None, num_classes=7).state_dict(), tmp_path / "r.pth")
    table = (
        'loader = "torchvision"\nmodel = "resnet18"\nweights = "r.pth"\ninit = { num_classes = 7 }\n'
        'input = "tensor"\nshape = [3, 64, 64]\ntop = 7\n'
    )
    images = torch.rand(3, 3, 64, 64).tolist()
    wanted = predict(host(table, CPU), images)
    answers = predict(host(table + f'channels_last = true\ndtype = "{dtype}"', device), images)
    for answer, one in zip(answers, wanted, strict=True):
        scores = {each["label"]: each["score"] for each in one["top"]}
        assert {each["label"]: each["score"] for each in answer["top"]} == pytest.approx(scores, abs=TOLERANCE[dtype])


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A small GPT-2 with a tokenizer of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(3)
    letters = ["<pad>", "<end>", *"abcdefghijklmnopqrstuvwxyz "]
    tokenizer = Tokenizer(models.WordLevel({letter: n for n, letter in enumerate(letters)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<pad>")
    fast.save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=len(letters), n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5,
        eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_greedy_generation_writes_as_on_the_cpu_alone_and_in_a_batch(host, device, gpt2):
    table = f'loader = "transformers"\ntask = "text-generation"\nmodel = "{gpt2}"\nparams = {{ max_new_tokens = 8 }}\n'
    texts = ["a fox", "the quick brown fox jumps", "shall i"]
    wanted = predict(host(table, CPU), texts)
    model = host(table, device)
    assert next(model.modules()[0].parameters()).device.type == device.type
    assert predict(model, texts) == wanted
    assert [predict(model, [text])[0] for text in texts] == wanted
