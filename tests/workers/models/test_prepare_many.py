"""Rows that are prepared together come to what each comes to by itself, or are left to be."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nograd.tasks.errors import InvalidInput
from nograd.tasks.modelfile import ModuleSpec
from nograd.workers.models.module import ModuleModel

NUMBERS = st.one_of(
    st.floats(),
    st.floats(-1e5, 1e5),
    st.integers(-(2**70), 2**70),
    st.integers(-9, 9),
    st.booleans(),
    st.none(),
    st.text(max_size=2),
)
ROWS = st.lists(
    st.one_of(
        st.lists(st.floats(-1e5, 1e5), min_size=2, max_size=2),
        st.lists(st.integers(-(2**55), 2**55), min_size=2, max_size=2),
        st.lists(NUMBERS, max_size=3),
        NUMBERS,
    ),
    max_size=4,
)


def rows(dtype, input_dtype="float"):
    spec = ModuleSpec(class_="a:B", weights="c", input="rows", shape=[2], dtype=dtype, input_dtype=input_dtype)
    model = ModuleModel("it", spec, Path("models.toml"))
    model._read = model._reader()  # what `load` does; the module plays no part here
    return model


def alone(model, row):
    try:
        return model.prepare(row, {})
    except InvalidInput as err:
        return err


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@given(inputs=ROWS)
def test_together_they_are_what_each_is_alone(dtype, inputs):
    model = rows(dtype)
    together = model.prepare_many(inputs, {})
    if together is None:
        return
    expected = [alone(model, row) for row in inputs]
    assert len(together) == len(expected)
    for one, other in zip(together, expected, strict=True):
        assert isinstance(other, torch.Tensor), other
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_plain_rows_are_made_together(dtype):
    model = rows(dtype)
    together = model.prepare_many([[1.5, 2], [3, -4.25], [0, 1]], {})
    assert torch.equal(
        torch.stack(list(together)), torch.tensor([[1.5, 2], [3, -4.25], [0, 1]]).to(model.input_dtype())
    )


@pytest.mark.parametrize(
    "inputs",
    [
        [[1, 2], [1, 2, 3]],
        [[1, 2, 3], [1, 2, 3]],
        [[1.0, 2.0], [float("nan"), 1.0]],
        [[1.0, 2.0], [1e300, 1.0]],
        [[1, 2.5], [2**53 + 1, 1]],
        [[1, 2], ["1", 2]],
        [1, 2],
        [[], []],
    ],
)
def test_what_is_doubtful_is_left_to_each(inputs):
    assert rows("float32").prepare_many(inputs, {}) is None


def test_indices_and_parameters_are_left_to_each():
    assert rows("float32", "int64").prepare_many([[1, 2], [3, 4]], {}) is None
    assert rows("float32").prepare_many([[1, 2], [3, 4]], {"a": 1}) is None
    assert rows("float32").prepare_many(np.ones((2, 2)), {}) is not None
