"""``nograd demo``: a fleet for the example models, real inputs through all of them, every answer checked.

What an answer should be was computed by the plain PyTorch code the examples come from (``examples/reference.py``);
this module only compares, and needs no torch itself.
"""

from __future__ import annotations

import http.client
import importlib.util
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nograd.tasks.errors import ConfigError, JobError
from nograd.tasks.keys import PREDICT_TASK

from .client import Client
from .embedded import HOST
from .outcomes import error_to_dict

#: how far a number may be from the expected one: a forward of another batch size adds in another order
TOLERANCE = 1e-4
#: the same for a score, which is an exponential of such numbers
SCORE_TOLERANCE = 1e-3
#: seconds one prediction may take; generous, since a laptop loads and answers six models at once
RESULT_TIMEOUT_S = 120.0
#: seconds Flower has to show a job; events are with it within one, unless it does not listen at all
FLOWER_TIMEOUT_S = 15.0

_SUCCEEDED = re.compile(r"^flower_events_total\{([^}]*)\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Answer:
    """One input of the demo and what came back.

    Attributes:
        model: the model asked.
        input: what was sent.
        prediction: what came back; None if the job failed.
        expected: what plain PyTorch gives.
        seconds: from sending to having the result.
        error: why the job failed, or None.
    """

    model: str
    input: Any
    prediction: Any
    expected: Any
    seconds: float
    error: dict[str, str] | None = None

    @property
    def right(self) -> bool:
        """Whether it is the expected one."""
        return self.error is None and same_answer(self.prediction, self.expected)


class Examples:
    """The ``examples`` folder of a source checkout.

    Raises:
        ConfigError: if it is not there, or not whole.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = _find(folder)
        self.models = self.folder / "models.toml"

    def questions(self) -> Iterator[tuple[str, list[Any], list[Any]]]:
        """Each model with its inputs and the expected answers."""
        module = self._module("seed_data")
        expected = module.expected()
        for model, inputs in module.example_inputs().items():
            yield model, inputs, expected[model]

    def digits(self, folder: Path) -> tuple[list[Path], list[int]]:
        """Write all digit images into a folder; their files and what they show.

        Raises:
            ConfigError: without scikit-learn, which ships them.
        """
        if importlib.util.find_spec("sklearn") is None:
            raise ConfigError("the 1,797 digit images come with scikit-learn: pip install scikit-learn")
        written = self._module("seed_data").write_inputs(folder)
        return written.digits, written.labels

    def _module(self, name: str) -> ModuleType:
        path = self.folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"nograd_demo_{name}", path)
        assert spec is not None, path
        assert spec.loader is not None, path
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def ask(client: Client, model: str, inputs: list[Any], expected: list[Any]) -> Iterator[Answer]:
    """Send all inputs of a model at once, as independent jobs, and collect the answers in order."""
    started = time.perf_counter()
    jobs = client.submit_many(model, inputs)
    for job, value, wanted in zip(jobs, inputs, expected, strict=True):
        prediction, error = None, None
        try:
            prediction = job.result(RESULT_TIMEOUT_S)
        except JobError as err:
            error = error_to_dict(err)
        yield Answer(model, value, prediction, wanted, time.perf_counter() - started, error)


def jobs_in_flower(port: int, timeout_s: float = FLOWER_TIMEOUT_S) -> int:
    """How many jobs Flower on this machine has seen succeed; waits for the first, 0 if there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (jobs := _succeeded(_metrics(port))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return jobs


def _metrics(port: int) -> str:
    # Its API asks for a login; its metrics do not.
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    except OSError:
        return ""
    finally:
        connection.close()


def _succeeded(metrics: str) -> int:
    wanted = (f'task="{PREDICT_TASK}"', 'type="task-succeeded"')
    return sum(int(float(count)) for labels, count in _SUCCEEDED.findall(metrics) if all(w in labels for w in wanted))


def same_answer(prediction: Any, expected: Any) -> bool:
    """Whether a prediction is the expected one: labels, texts and classes equal, other numbers close."""
    if isinstance(expected, dict):  # of an image classifier
        return (
            isinstance(prediction, dict)
            and prediction.get("label") == expected["label"]
            and math.isclose(prediction.get("score", math.nan), expected["score"], abs_tol=SCORE_TOLERANCE)
        )
    if isinstance(expected, str):
        return (prediction.get("text") if isinstance(prediction, dict) else prediction) == expected
    if isinstance(expected, int):
        return bool(prediction == expected)
    ours, theirs = list(_numbers(prediction)), list(_numbers(expected))
    return len(ours) == len(theirs) and all(
        math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) for a, b in zip(ours, theirs, strict=True)
    )


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    else:
        yield float(value) if isinstance(value, int | float) else math.nan


def _find(folder: Path | None) -> Path:
    # The last is the checkout of an editable install; the package itself has no examples.
    places = [folder] if folder else [Path("examples"), Path(__file__).resolve().parents[1] / "examples"]
    for place in places:
        if all((place / name).is_file() for name in ("models.toml", "expected.json", "seed_data.py")):
            return place.resolve()
    looked = " and ".join(str(place) for place in places)
    raise ConfigError(
        f"no example models in {looked}: run the demo in a checkout of nograd's sources, or give --examples FOLDER"
    )
