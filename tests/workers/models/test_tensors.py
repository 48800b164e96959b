import json
import math
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from nograd.tasks.errors import InvalidInput, ModelFailed, OutputMismatch
from nograd.workers.models.tensors import TensorReader, all_finite, split, stack, to_json

NAN, INF = math.nan, math.inf


def read(value, dtype=torch.float32, **options):
    return TensorReader(dtype=dtype, **options).read(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, torch.tensor(3.0)),
        ([1, 2.5], torch.tensor([1.0, 2.5])),
        ([[1, 2], [3, 4]], torch.tensor([[1.0, 2], [3, 4]])),
        ([True, False], torch.tensor([1.0, 0])),
        (np.array([1, 2], dtype=np.uint8), torch.tensor([1.0, 2])),
        (np.array([0.1], dtype=np.float64), torch.tensor([0.1])),
        (np.array([0.5], dtype=">f4"), torch.tensor([0.5])),
        ([np.float32(1), 2], torch.tensor([1.0, 2])),
    ],
)
def test_numbers_in_any_form_become_the_model_s_dtype(value, expected):
    tensor = read(value)
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_is_the_model_s(dtype):
    assert read([1.0, 2.0], dtype).dtype == dtype


def test_a_read_only_array_is_copied_not_shared(recwarn):
    array = np.frombuffer(np.float32([1, 2]).tobytes(), dtype=np.float32)
    read(array).add_(1)
    assert array.tolist() == [1, 2]
    assert not recwarn.list


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([1, "2", 3], r"value 1 is '2', not a number"),
        (["true"], r"value 0 is 'true', not a number"),
        ("1.5", r"the input is '1.5', not a number"),
        ([1, None], r"value 1 is None, not a number"),
        (None, r"the input is None"),
        ([[1, 2], [3, {}]], r"value \[1, 1\] is a dict"),
        ({"a": 1}, r"the input is a dict"),
        ([1, b"x"], r"value 1 is a bytes"),
        ([[1, 2, 3], [4, 5]], r"different lengths: value 1 has shape \(2,\), value 0 has \(3,\)"),
        ([[1, 2], 3], r"different lengths: value 1 has shape \(\), value 0 has \(2,\)"),
        ([[[1], [2]], [[1], [2, 3]]], r"different lengths: value \[1, 1\] has shape \(2,\)"),
        ([1, 10**30], r"value 1 is too large"),
        ([1, 2j], r"value 1 is a complex"),
        (np.array(["a"]), r"holds <U1, not numbers"),
        ([], r"the input is empty: it has shape \(0,\)"),
        ([[], []], r"the input is empty: it has shape \(2, 0\)"),
        ([1, NAN], r"value 1 is nan"),
        ([[1, 2], [-INF, 0]], r"value \[1, 0\] is -inf"),
        (NAN, r"the input is nan"),
        ([0, 1e300], r"value 1 is 1e\+300, too large for float32"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(value, why):
    with pytest.raises(InvalidInput, match=why):
        read(value)


def test_a_very_deep_nest_is_refused_not_followed_for_ever():
    value = [1]
    for _ in range(200):
        value = [value]
    with pytest.raises(InvalidInput):
        read(value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_overflows_a_small_dtype_is_refused(dtype):
    big = 70_000 if dtype == torch.float16 else 3.3999e38
    with pytest.raises(InvalidInput, match=f"value 1 is .*, too large for {str(dtype)[6:]}"):
        read([1, big], dtype)


def test_infinity_is_taken_where_it_is_allowed_but_never_made():
    assert torch.equal(read([1, INF], allow_nonfinite=True), torch.tensor([1, INF]))
    assert read([NAN], allow_nonfinite=True).isnan().all()
    with pytest.raises(InvalidInput, match="too large for float32"):
        read([INF, 1e39], allow_nonfinite=True)


@pytest.mark.parametrize(
    ("options", "value", "why"),
    [
        ({"shape": (3,)}, [1, 2, 3, 4], r"^row has 4 values, the model takes 3$"),
        ({"shape": (3,)}, [[1, 2, 3]], r"shape \(1, 3\), the model takes \(3,\)"),
        ({"shape": (-1, 8)}, [[1, 2]], r"shape \(1, 2\), the model takes \(\?, 8\)"),
        ({"row": True}, [[1, 2]], r"a row is one flat list of numbers; this input has shape \(1, 2\)"),
        ({"row": True}, 3, r"a row is one flat list of numbers; this input has shape \(\)"),
    ],
)
def test_another_shape_is_refused_with_both(options, value, why):
    with pytest.raises(InvalidInput, match=why):
        read(value, **options)


def test_a_free_dimension_takes_any_size():
    assert read([[1, 2]] * 5, shape=(-1, 2)).shape == (5, 2)
    assert read(3, shape=()).shape == ()


def test_whole_numbers_stay_exact_for_models_that_take_them():
    tensor = read([2**53 + 1, 3], torch.int64)
    assert (tensor.dtype, tensor.tolist()) == (torch.int64, [2**53 + 1, 3])
    assert read([3.0, 4.0], torch.int64).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ([1, 1.5], torch.int64),
        ([1, NAN], torch.int64),
        ([1, INF], torch.int64),
        ([1, 2.0**63], torch.int64),
        (np.array([1, 2**63], dtype=np.uint64), torch.int64),
        ([1, 2**31], torch.int32),
        ([1, -1], torch.uint8),
        ([1, 2], torch.bool),
    ],
)
def test_what_is_no_whole_number_of_the_dtype_is_refused(value, dtype):
    with pytest.raises(InvalidInput, match=r"value 1 is .*; the model takes whole numbers"):
        read(value, dtype)


def test_stack_puts_items_into_one_batch():
    assert stack([torch.zeros(2, 3), torch.ones(2, 3)], pin=False).shape == (2, 2, 3)


# ── outputs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Pair(NamedTuple):
    mean: object
    std: object


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (torch.tensor([1.0, 2.0]), [1.0, 2.0]),
        (torch.tensor([[1.0], [2.0]]), [1.0, 2.0]),
        (torch.tensor([[1.0, 3.0], [2.0, 4.0]]), [[1.0, 3.0], [2.0, 4.0]]),
        (torch.tensor([[[1.0]], [[2.0]]]), [[[1.0]], [[2.0]]]),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor([True, False]), [True, False]),
        (torch.tensor([[1.5], [2.5]], dtype=torch.bfloat16), [1.5, 2.5]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ((torch.tensor([1.0, 2.0]), torch.tensor([[3], [4]])), [[1.0, 3], [2.0, 4]]),
        (Pair(torch.tensor([1.0, 2.0]), None), [[1.0, None], [2.0, None]]),
        ({"a": torch.tensor([1, 2]), "b": (torch.tensor([3, 4]),)}, [{"a": 1, "b": [3]}, {"a": 2, "b": [4]}]),
        (OrderedDict(x=torch.tensor([[1.0, 2.0]] * 2)), [{"x": [1.0, 2.0]}] * 2),
        ([{"boxes": torch.zeros(0, 4)}, {"boxes": torch.ones(1, 4)}], [{"boxes": []}, {"boxes": [[1.0] * 4]}]),
        (["cat", "dog"], ["cat", "dog"]),
    ],
)
def test_a_batch_of_outputs_is_split_into_plain_predictions(output, expected):
    predictions = [to_json(item) for item in split(output, 2)]
    assert predictions == expected
    assert [type(a) for a in predictions] == [type(b) for b in expected]
    json.dumps(predictions)


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (torch.zeros(5, 2), r"shape \(5, 2\): 5 outputs for 3 inputs"),
        (torch.tensor(1.0), r"shape \(\): one value for 3 inputs"),
        ((torch.zeros(3), torch.zeros(1, 3)), r"the model\[1\] returned a tensor of shape \(1, 3\): 1 outputs for 3"),
        ({"loss": 0.5}, r"the model\['loss'\] returned a float for 3 inputs"),
        ({}, r"returned nothing: 0 outputs for 3 inputs"),
        ([1, 2], r"a list of 2: 2 outputs for 3 inputs"),
        (None, r"returned a NoneType for 3 inputs"),
        ("abc", r"returned a str for 3 inputs"),
    ],
)
def test_another_number_of_outputs_than_inputs_is_refused_with_both(output, why):
    with pytest.raises(OutputMismatch, match=why):
        split(output, 3)


def test_a_single_number_answers_a_single_input():
    assert [to_json(item) for item in split(torch.tensor(2.5), 1)] == [2.5]


def test_outputs_leave_the_graph():
    output = torch.ones(2, requires_grad=True) * 2
    assert not any(item.requires_grad for item in split(output, 2))
    assert not any(item["x"].requires_grad for item in split([{"x": output}, {"x": output}], 2))


@pytest.mark.parametrize(
    "value", [b"bytes", Image.new("L", (2, 2)), 1j, torch.tensor([1j]), {"mask": [Image.new("L", (2, 2))]}, object()]
)
def test_what_json_cannot_hold_is_named(value):
    with pytest.raises(ModelFailed, match="which JSON cannot hold"):
        to_json(value)


def test_nonfinite_predictions_stay_what_they_are():
    assert math.isnan(to_json(torch.tensor(NAN)))
    assert to_json(torch.tensor([INF, 1])) == [INF, 1]


NUMBERS = hnp.arrays(
    dtype=st.sampled_from([np.float64, np.float32, np.int64, np.uint64, np.bool_]),
    shape=hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=5),
    elements=None,
)


@given(
    array=NUMBERS,
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]),
    allow_nonfinite=st.booleans(),
)
def test_many_rows_at_once_are_what_each_one_is(array, dtype, allow_nonfinite):
    reader = TensorReader(dtype=dtype, allow_nonfinite=allow_nonfinite)
    together, wrong = reader.read_rows(array)
    alone = [outcome(reader, row) for row in array]
    assert {index: err.message for index, err in wrong.items()} == {
        index: each for index, each in enumerate(alone) if isinstance(each, str)
    }
    for index, each in enumerate(alone):
        if not isinstance(each, str):
            assert torch.equal(each.nan_to_num(7), together[index].nan_to_num(7))


def outcome(reader, row):
    try:
        return reader.read(row)
    except InvalidInput as err:
        return err.message


def test_rows_of_another_shape_are_refused_together():
    with pytest.raises(InvalidInput, match="row has 2 values, the model takes 3"):
        TensorReader(dtype=torch.float32, row=True, shape=(3,)).read_rows(np.zeros((5, 2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("values", [[], [1.0], [NAN], [INF], [1.0, -INF], [INF, -INF], [1.0, NAN, INF]])
def test_all_finite_is_what_isfinite_says(values, dtype):
    tensor = torch.tensor(values, dtype=dtype)
    assert all_finite(tensor) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_numbers_whose_sum_overflows_are_finite(dtype):
    assert all_finite(torch.full((10,), torch.finfo(dtype).max, dtype=dtype))
