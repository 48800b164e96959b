"""What becomes of predictions that JSON cannot hold."""

import math

import pytest
import torch

from nograd.tasks.errors import ModelFailed, NonFiniteOutput
from nograd.workers.models.tensors import to_json
from nograd.workers.outputs import finish

NAN, INF = math.nan, math.inf


class Model:
    def __init__(self, policy="fail"):
        self.spec = type("Spec", (), {"nonfinite_output": policy})

    def finish(self, output, params):
        return to_json(output)


FINITE = [
    1.5,
    3,
    None,
    True,
    "nan",
    [],
    {},
    [1.0, "nan", None],
    [[1.0], [2.0]],
    {"a": [1.0, {"b": 2.0}]},
    [1.0, 10**400],
]
NONFINITE = [
    (NAN, "the prediction is nan", None),
    ([1.0, INF], "the prediction[1] is inf", [1.0, None]),
    ([[0.0], [-INF]], "the prediction[1][0] is -inf", [[0.0], [None]]),
    ({"score": NAN, "label": "x"}, "the prediction['score'] is nan", {"score": None, "label": "x"}),
    (["x", {"a": (1.0, NAN)}], "the prediction[1]['a'][1] is nan", ["x", {"a": [1.0, None]}]),
    ([1.0, 10**400, NAN], "the prediction[2] is nan", [1.0, 10**400, None]),
    (torch.tensor([[1.0, NAN]]), "the prediction[0][1] is nan", [[1.0, None]]),
]


@pytest.mark.parametrize("policy", ["fail", "null", "allow"])
@pytest.mark.parametrize("value", FINITE, ids=str)
def test_a_finite_prediction_stays_as_it_is(policy, value):
    assert finish(Model(policy), value, {}).value == value


@pytest.mark.parametrize(("value", "says", "_"), NONFINITE, ids=str)
def test_nan_and_infinity_fail_by_default_and_their_place_is_named(value, says, _):
    error = finish(Model(), value, {}).error
    assert type(error) is NonFiniteOutput
    assert error.message.startswith(says + ";")


@pytest.mark.parametrize(("value", "_", "null"), NONFINITE, ids=str)
def test_they_may_become_null(value, _, null):
    assert finish(Model("null"), value, {}).value == null


@pytest.mark.parametrize(("value", "_", "__"), NONFINITE, ids=str)
def test_they_may_go_out(value, _, __):
    assert str(finish(Model("allow"), value, {}).value) == str(to_json(value))


def test_what_finish_raises_is_the_model_s_failure():
    assert type(finish(Model(), object(), {}).error) is ModelFailed
