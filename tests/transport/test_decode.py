"""Law: what is decoded fast is what kombu would have decoded, errors included."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import math
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.utils import json as kombu_json

from nograd.tasks.transport.decode import loads

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("__type__")
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


def outcome(decode, text):
    try:
        return repr(decode(text))  # NaN is not equal to itself; its repr is, and 1 and 1.0 differ
    except (ValueError, RecursionError) as err:
        return type(err)


@given(VALUES, st.booleans())
def test_values_are_those_of_kombu(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert outcome(loads, text) == outcome(kombu_json.loads, text)


@given(st.text(alphabet='[]{}":,0123456789.eE+-tfnNaI\\u d\t_"', max_size=30))
def test_what_is_no_json_is_refused_alike(text):
    assert outcome(loads, text) == outcome(kombu_json.loads, text)


@pytest.mark.parametrize(
    "value",
    [dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC), decimal.Decimal("1.10"), uuid.UUID(int=7), b"bytes"],
)
def test_kombus_typed_values_are_rebuilt(value):
    text = kombu_json.dumps([value])
    assert loads(text) == kombu_json.loads(text) == [value]


@pytest.mark.parametrize("spelled", ["__type__", "\\u005f_type__", "_\\u005F\\u0074ype__"])
def test_however_a_typed_value_is_spelled(spelled):
    text = f'[{{"{spelled}": "uuid", "__value__": {{"hex": "{"0" * 32}"}}}}]'
    assert outcome(loads, text) == outcome(kombu_json.loads, text)


@pytest.mark.parametrize("text", ["[1e400]", '["\\ud800"]', "[" * 100_000, "\ufeff[1]", '{"a":1,"a":2}', "[-0.0]", ""])
def test_corner_cases(text):
    assert outcome(loads, text) == outcome(kombu_json.loads, text)


def test_a_number_no_machine_word_holds_stays_exact():
    assert loads("[123456789012345678901234567890]") == [123456789012345678901234567890]
    assert math.isnan(loads("[NaN]")[0])
