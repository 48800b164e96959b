"""What goes over the wire comes back equal, or is refused with a reason before it is sent."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from nograd.tasks.errors import InvalidInput
from nograd.tasks.payloads import MAX_DEPTH, decode_input, describe, encode_input, encode_inputs


def through_json(value, kind=None):
    return decode_input(json.loads(json.dumps(encode_input(value, kind))))


@given(
    npst.arrays(
        dtype=st.sampled_from(["<f4", "<f8", ">f4", "<f2", "<i8", ">i2", "u1", "?"]),
        shape=npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    )
)
def test_arrays_come_back_with_dtype_shape_and_every_bit(array):
    back = through_json(array)
    assert back.dtype == array.dtype.newbyteorder("<")
    np.testing.assert_array_equal(back, array)


def test_arrays_of_any_memory_layout_come_back_equal():
    array = np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)[::2]
    np.testing.assert_array_equal(through_json(array), array)


def test_tensors_are_arrays_also_when_they_require_grad():
    tensor = torch.arange(6.0).reshape(2, 3).requires_grad_()
    np.testing.assert_array_equal(through_json(tensor), tensor.detach().numpy())


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.tensor([1.5, -3e38, 1e-40], dtype=torch.bfloat16), None),
        (torch.tensor(2.5, dtype=torch.bfloat16), None),
        (torch.eye(3).to_sparse(), torch.eye(3)),
        (torch.eye(3).to_sparse_csr(), torch.eye(3)),
        (torch.eye(3, dtype=torch.bfloat16).to_sparse().requires_grad_(), torch.eye(3)),
    ],
)
def test_tensors_numpy_does_not_know_lose_nothing(tensor, dense):
    back = through_json(tensor)
    assert back.dtype == "float32"
    np.testing.assert_array_equal(back, (tensor.detach().float() if dense is None else dense).numpy())


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, device="meta"), torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2, dtype=torch.cfloat)]
)
def test_a_tensor_that_has_no_array_is_refused(tensor):
    with pytest.raises(InvalidInput, match="cannot be sent"):
        encode_input(tensor, None)


@pytest.mark.parametrize(
    ("scalar", "plain"),
    [
        (np.float64(3), 3.0),
        (np.float32(0.5), 0.5),
        (np.int8(-3), -3),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
    ],
)
def test_scalars_are_plain_values_alone_and_in_lists(scalar, plain):
    inside = encode_input([{"a": scalar}], None)[0]["a"]
    assert (inside, type(inside)) in [(plain, type(plain)), (plain, type(scalar))]
    assert json.dumps(inside) == json.dumps(plain)
    if not isinstance(scalar, torch.Tensor):
        alone = encode_input(scalar, None)
        assert json.dumps(alone) == json.dumps(plain)
        assert describe("mlp", scalar)


@pytest.mark.parametrize("scalar", [np.complex64(1), np.datetime64("2020-01-01"), np.longdouble(1)])
def test_a_scalar_that_json_lacks_is_refused(scalar):
    for value in (scalar, [scalar]):
        with pytest.raises(InvalidInput, match="cannot be sent as JSON"):
            encode_input(value, None)


def nested(depth, wrap):
    value = 1
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: {"a": value}, lambda value: (1, [value])])
def test_an_input_nested_too_deep_is_refused_and_one_at_the_limit_is_sent(wrap):
    with pytest.raises(InvalidInput, match=f"nested more than {MAX_DEPTH} deep"):
        encode_input(nested(100_000, wrap), None)
    assert json.dumps(through_json(nested(MAX_DEPTH // 2, wrap))) == json.dumps(nested(MAX_DEPTH // 2, wrap))


def test_a_list_that_holds_itself_is_refused():
    endless = [1]
    endless.append(endless)
    with pytest.raises(InvalidInput, match="nested"):
        encode_input(endless, None)


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5).filter(lambda k: k != "base64"), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(_json.filter(lambda v: not (isinstance(v, dict) and set(v) == {"__type__", "__value__"})))
def test_plain_json_is_sent_as_it_is(value):
    assert through_json(value) == value


def test_files_and_bytes_arrive_as_bytes(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"\x00\xffbytes")
    assert through_json(path) == b"\x00\xffbytes"
    assert through_json(str(path), "image") == b"\x00\xffbytes"
    assert through_json(bytearray(b"abc")) == b"abc"
    assert through_json(str(path), "text") == str(path)


def test_a_pillow_image_arrives_with_its_pixels():
    import io

    image = Image.effect_noise((17, 9), 80)
    assert Image.open(io.BytesIO(through_json(image))).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"__type__": "x", "__value__": 1}, "the broker drops it"),
        ([1, {"a": [{"__type__": "x", "__value__": 1}]}], r"input\[1\]\.a\[0\]"),
        (object(), "builtins.object cannot be sent"),
        ({1: 2}, "the key 1 is not a string"),
        ([1, {2}], r"input\[1\]: a builtins.set"),
        (Path("no/such/file.jpg"), "no/such/file.jpg: cannot read the file"),
        (np.array(["a"]), "dtype str"),
        (np.array([1 + 2j]), "dtype complex128"),
    ],
)
def test_what_cannot_be_sent_is_refused_naming_where(value, says):
    with pytest.raises(InvalidInput, match=says):
        encode_input(value, None)


def test_an_input_among_many_is_named_by_its_place():
    with pytest.raises(InvalidInput, match="input 1: "):
        encode_inputs([1, object()], None)


@pytest.mark.parametrize(
    ("wire", "says"),
    [
        ({"base64": "not base64!"}, "does not hold base64"),
        ({"base64": 3}, "does not hold base64"),
        ({"base64": "", "dtyp": "float32"}, "unknown key 'dtyp'"),
        ({"base64": "", "dtype": "object", "shape": []}, "unknown dtype 'object'"),
        ({"base64": "", "dtype": ["float32"], "shape": []}, "unknown dtype"),
        ({"base64": "AAAA", "dtype": "float32", "shape": [1]}, "has 4 bytes, not 3"),
        ({"base64": "AAAA", "dtype": "uint8", "shape": [-3]}, "not a list of whole numbers"),
        ({"base64": "AAAA", "dtype": "uint8"}, "not a list of whole numbers"),
    ],
)
def test_a_broken_marker_is_refused(wire, says):
    with pytest.raises(InvalidInput, match=says):
        decode_input(wire)


def test_a_job_is_described_without_its_contents(tmp_path):
    photo = tmp_path / "cat.jpg"
    photo.write_bytes(bytes(12_345))
    assert describe("photos", photo) == "photos cat.jpg 12 KB"
    assert describe("gpt2", "secret") == "gpt2 6 characters"
    assert describe("mlp", [1.0, 2.0]) == "mlp 2 values"
    assert describe("mlp", np.zeros((2, 3), "float32")) == "mlp 2x3 float32"
    assert describe("mlp", b"12") == "mlp 2 B"
