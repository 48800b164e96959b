"""From what a forward returned for one input to its prediction, as JSON holds it.

Law: a prediction with NaN or infinity in it is what the model file says of such (``nonfinite_output``): an error of its
own input, null in their place, or itself. JSON knows neither; Python writes them all the same, and most others cannot
read that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nograd.tasks.errors import DeadlinePassed, ModelFailed, NogradError, NonFiniteOutput
from nograd.tasks.predict import Outcome

from .models import HostedModel


def finish(model: HostedModel, output: Any, params: Mapping[str, Any]) -> Outcome:
    """The outcome of one output of a forward; whatever the model's own ``finish`` raises is in it."""
    try:
        prediction = model.finish(output, params)
        policy = model.spec.nonfinite_output
        if policy == "allow" or _is_finite(prediction):
            return Outcome(value=prediction)
        if policy == "null":
            return Outcome(value=_with_null(prediction))
        place, value = next(iter(_nonfinite(prediction, "the prediction")))
        how = 'the model file lets it out with nonfinite_output = "null" or "allow"'
        return Outcome(error=NonFiniteOutput(f"{place} is {value}; {how}"))
    except NogradError as err:
        return Outcome(error=err)
    except BaseException as err:  # noqa: BLE001 - a model's own code; its item fails
        return Outcome(error=ModelFailed(f"finish raised {type(err).__name__}: {err}"))


def too_late() -> Outcome:
    """The outcome of an input whose job's time is over."""
    return Outcome(error=DeadlinePassed("no prediction within the job's timeout_s"))


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        # A list of numbers, mostly, and a long one: in C, unless something else is in it.
        if value and isinstance(value[0], float):
            try:
                return all(map(math.isfinite, value))
            except (TypeError, OverflowError):
                pass
        return all(map(_is_finite, value))
    return True


def _nonfinite(value: Any, place: str) -> Any:
    """Every NaN and infinity in a prediction, with its place."""
    if isinstance(value, float):
        if not math.isfinite(value):
            yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _nonfinite(item, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _nonfinite(item, f"{place}[{index}]")


def _with_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _with_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_null(item) for item in value]
    return value
