import json

import pytest
import torch

from nograd.tasks.errors import InvalidInput, ModelFailed, ModelFileError, OutputMismatch

CODE = """
import numpy as np
import torch
from nograd.tasks.errors import DeadlinePassed
from torch import nn


class Doubling:
    def __init__(self, factor=2):
        self.factor = factor

    def load(self, device):
        self.device = device

    def prepare(self, input):
        if input == "later":
            raise DeadlinePassed("not now")
        return float(input["value"])

    def forward(self, batch):
        return torch.tensor(batch, device=self.device) * self.factor

    def finish(self, output):
        return {"value": output, "array": np.array([1, 2])}


class Bare:
    def load(self, device): pass
    def forward(self, batch): return [len(text) for text in batch]
    def bucket(self, prepared): return len(prepared) // 10


class Priced(Bare):
    def cost(self, prepared): return len(prepared) or "nothing"


class Tunable(Bare):
    def forward(self, batch, params): return [text * params["times"] for text in batch]


class Losing(Bare):
    def forward(self, batch): return batch[:-1]


class Training(Bare):
    def load(self, device): self.net = nn.Sequential(nn.Dropout())


class Failing(Bare):
    def load(self, device): raise OSError("no licence")


class Exiting(Bare):
    def load(self, device): raise SystemExit(0)


class Looking:
    def load(self, device): pass
    def forward(self, batch): return [(image.mode, image.size) for image in batch]


class NoForward:
    def load(self, device): pass


class NoLoad:
    def forward(self, batch): return batch
"""


@pytest.fixture
def table(user_code):
    name = user_code(CODE)
    return lambda cls, extra="": f'loader = "python"\nclass = "{name}:{cls}"\n{extra}\n'


def test_the_four_methods_are_called_and_their_tensors_become_plain(hosted, predict, table):
    model = hosted(table("Doubling", "init = { factor = 3 }"))
    answers = predict(model, [{"value": 1}, {"value": "2.5"}])
    assert answers == [{"value": 3.0, "array": [1, 2]}, {"value": 7.5, "array": [1, 2]}]
    json.dumps(answers)


def test_prepare_and_finish_may_be_missing_and_bucket_may_be_there(hosted, predict, table):
    model = hosted(table("Bare"))
    assert predict(model, ["ab", "c"]) == [2, 1]
    assert model.bucket("x" * 25) == 2


def test_the_class_may_say_what_an_input_costs(hosted, table):
    assert hosted(table("Bare")).cost("abc") == 1
    assert hosted(table("Priced")).cost("abc") == 3
    with pytest.raises(ModelFailed, match=r"Priced\.cost returned 'nothing'; expected a whole number"):
        hosted(table("Priced")).cost("")


def test_value_and_type_errors_of_prepare_are_the_caller_s_fault_and_ours_pass_through(hosted, table):
    model = hosted(table("Doubling"))
    with pytest.raises(InvalidInput, match="could not convert string to float: 'x'"):
        model.prepare({"value": "x"}, {})
    with pytest.raises(InvalidInput, match="indices must be integers"):
        model.prepare([1], {})
    with pytest.raises(Exception, match="not now") as caught:
        model.prepare("later", {})
    assert type(caught.value).__name__ == "DeadlinePassed"


def test_the_number_of_outputs_is_checked(hosted, table):
    model = hosted(table("Losing"))
    with pytest.raises(OutputMismatch, match=r"Losing.forward returned a list of 1: 1 outputs for 2 inputs"):
        model.forward(["a", "b"], {})
    with pytest.raises(ModelFileError, match=r"the warm-up failed: .*0 outputs for 1 input"):
        hosted(table("Losing", 'example = "a"'))


def test_parameters_reach_the_methods_that_ask_for_them_and_no_others(hosted, opened, predict, table):
    model = hosted(table("Tunable", "params = { times = 2 }"))
    assert predict(model, ["ab"]) == ["abab"]
    assert predict(model, ["ab"], {"times": 3}) == ["ababab"]
    with pytest.raises(InvalidInput, match="unknown parameter 'times': model 'it' takes none"):
        hosted(table("Bare")).prepare("a", {"times": 3})
    with pytest.raises(ModelFileError, match=r"params = \{'times': 2\}: no method of .*Bare has a parameter `params`"):
        opened(table("Bare", "params = { times = 2 }")).load(torch.device("cpu"))


def test_images_come_decoded(hosted, predict, table, picture):
    model = hosted(table("Looking", 'input = "image"'))
    assert predict(model, [picture(mode="L")]) == [["RGB", [80, 60]]]
    with pytest.raises(InvalidInput, match="not an image"):
        model.prepare(b"x", {})


@pytest.mark.parametrize(
    ("cls", "extra", "why"),
    [
        ("NoForward", "", "class = '.*:NoForward': has no method forward"),
        ("NoLoad", "", "class = '.*:NoLoad': has no method load"),
        ("Failing", "", r"class = '.*:Failing': load\(\) raised OSError: no licence"),
        ("Exiting", "", r"class = '.*:Exiting': load\(\) raised SystemExit: 0"),
        ("Training", "", "still in training mode after eval"),
        ("Bare", 'labels = ["a"]', "transforms and labels are the class's own"),
        ("Bare", 'dtype = "float16"', "dtype = 'float16': what .*:Bare loads is its own"),
        ("Bare", "compile = true", "compile = True: what .*:Bare loads is its own"),
        ("Bare", "channels_last = true", "channels_last = True: what .*:Bare loads is its own"),
    ],
)
def test_a_class_that_breaks_the_contract_stops_the_start(opened, table, cls, extra, why):
    with pytest.raises(ModelFileError, match=why):
        opened(table(cls, extra)).load(torch.device("cpu"))
