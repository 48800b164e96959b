"""The warm-up: a model answers its examples before the worker takes a job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from nograd.tasks.errors import ModelFileError, NogradError, OutputMismatch

if TYPE_CHECKING:
    from .base import HostedModel


def steps(model: HostedModel) -> Iterator[Callable[[], None]]:
    """Each example through *prepare → forward → finish*, in batches of each of the model's `batch_sizes`.

    Raises:
        ModelFileError: as each step does, naming the model and what it raised, whatever that was.
    """
    examples: list[object] = []
    _checked(model, lambda: examples.extend(model.examples()))
    for example in examples:
        for n in model.batch_sizes():
            yield partial(_checked, model, partial(_run, model, example, n))


def _checked(model: HostedModel, run: Callable[[], None]) -> None:
    try:
        with torch.no_grad():
            run()
    except ModelFileError:
        raise
    except (Exception, SystemExit) as err:  # a model that exits must not look like a worker that was asked to
        what = err.message if isinstance(err, NogradError) else f"{type(err).__name__}: {err}"
        hint = (
            "" if model.spec.example is not None else " (set `example` to a real input if the made-up one is at fault)"
        )
        raise ModelFileError(f"{model.file}: [{model.name}] the warm-up failed: {what}{hint}") from err


def _run(model: HostedModel, example: object, n: int) -> None:
    params = model.warm_up_params()
    outputs = model.forward([model.prepare(example, params) for _ in range(n)], params)
    if len(outputs) != n:
        raise OutputMismatch(f"the model returned {len(outputs)} outputs for {n} inputs")
    for output in outputs:
        model.finish(output, params)
