"""Running one batch so that what goes wrong costs nobody but its culprit.

Laws:

* A forward that raises is split and run again until the culprit stands alone: one bad item never costs its neighbours.
* So is one that returns another number of outputs than it had inputs: nobody knows whose is whose, so none of them is
  used, and the log says so. An input whose outputs are not one, alone, has broken the contract.
* A forward that runs out of memory is split as well, and nothing larger than what then fits is tried again; unless one
  input is found that does not fit alone: then it was its fault, and nothing is said of the others.
* Whatever is raised, also what is no `Exception`, becomes the outcome of an item; except `DeviceLost`, after which
  nothing can be run in this process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any, TypeVar

import torch

from nograd.tasks.errors import JobError, ModelFailed, OutputMismatch, Overloaded
from nograd.tasks.predict import Outcome

from .batching import Item
from .faults import DeviceLost, chain, is_device_lost, is_out_of_memory
from .memory import free
from .models import HostedModel

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Failure:
    """How a forward failed.

    Attributes:
        error: what each of its items is told if no smaller batch helps.
        out_of_memory: whether it was for want of memory.
    """

    error: JobError
    out_of_memory: bool = False


def run_isolated(
    model: HostedModel,
    items: Sequence[Item],
    device: torch.device,
    on_forward: Callable[[Sequence[Item]], None],
    on_outcome: Callable[[Item, Outcome], None],
) -> int | None:
    """Run a batch; each item gets one outcome.

    Args:
        model: whose items these are.
        items: of one group.
        device: where the model is.
        on_forward: called with the items of each forward before it runs.
        on_outcome: called with each item's outcome as soon as it is known.

    Returns:
        How many items fit into one forward, if more than that ran out of memory; else None.

    Raises:
        DeviceLost: if the device answers no more. The items of the last forward, and those that had not had one, have
            no outcome then.
    """

    def on_done(piece: Sequence[Item], result: Sequence[Any] | JobError) -> None:
        if not isinstance(result, JobError):
            for item, output in zip(piece, result, strict=True):
                on_outcome(item, Outcome(value=output))
            return
        for item in piece:
            on_outcome(item, Outcome(error=result))

    return to_end(
        run_pieces(
            model,
            list(items),
            lambda piece: [item.prepared for item in piece],
            items[0].job.params,
            device,
            on_forward,
            on_done,
        )
    )


def to_end(steps: Generator[None, None, T]) -> T:
    """Take all steps at once; what they return."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def run_pieces(  # noqa: PLR0917 - two of them are what, five are how
    model: HostedModel,
    batch: Sequence[T],
    inputs: Callable[[Sequence[T]], Sequence[Any]],
    params: Mapping[str, Any],
    device: torch.device,
    on_forward: Callable[[Sequence[T]], None],
    on_done: Callable[[Sequence[T], Sequence[Any] | JobError], None],
    fits: int | None = None,
) -> Generator[None, None, int | None]:
    """Run a batch in as few pieces as succeed, one forward a step: whoever asks for the next may do other things first.

    Between two steps nothing is held but the batch and what `on_done` keeps.

    Args:
        model: whose batch it is.
        batch: its members; anything that can be cut into slices.
        inputs: the prepared inputs of some members.
        params: of the model.
        device: where the model is.
        on_forward: called with the members of each forward before it runs.
        on_done: called with members and their outputs, or with the one member that failed and its error.
        fits: how many members fit into one forward, if that was found out before.

    Returns:
        How many members fit into one forward, if more than that ran out of memory, now or before; else None.

    Raises:
        DeviceLost: see `run_isolated`.
    """
    pieces = [batch]
    while pieces:
        piece = pieces.pop()
        if fits is not None and len(piece) > fits:
            pieces += [piece[fits:], piece[:fits]]
            continue
        on_forward(piece)
        result = _attempt(model, inputs(piece), params, device)
        if not isinstance(result, _Failure):
            on_done(piece, result)
        else:
            if result.out_of_memory:
                free(device)  # out here nothing refers to its tensors any more
                fits = len(piece) // 2 or None
            if len(piece) > 1:
                if isinstance(result.error, OutputMismatch):
                    logger.error("%s; none of them is used, and its halves are run by themselves", result.error.message)
                middle = len(piece) // 2
                pieces += [piece[middle:], piece[:middle]]
            else:
                logger.warning("model %s failed on one input: %s", model.name, result.error.message)
                on_done(piece, result.error)
        del result
        if pieces:
            yield
    return fits


def _attempt(
    model: HostedModel, inputs: Sequence[Any], params: Mapping[str, Any], device: torch.device
) -> Sequence[Any] | _Failure:
    """One forward: its outputs, or how it failed. No tensor of a failed one is kept alive by what is returned."""
    try:
        outputs = model.forward(inputs, params)
        if len(outputs) != len(inputs):
            raise OutputMismatch(f"model {model.name!r} returned {len(outputs)} outputs for {len(inputs)} inputs")
    except BaseException as err:
        if is_device_lost(err, device):
            raise DeviceLost(f"{type(err).__name__}: {err}") from err
        _let_go(err)
        if isinstance(err, JobError):
            return _Failure(err)
        if is_out_of_memory(err, len(inputs)):
            return _Failure(Overloaded(f"out of memory on {len(inputs)} input(s): {err}"), out_of_memory=True)
        error = ModelFailed(f"{type(err).__name__}: {err}")
        error.__cause__ = err
        return _Failure(error)
    return outputs


def _let_go(err: BaseException) -> None:
    """Forget where an error came from: frames hold tensors, and the halves of a batch need their memory."""
    for each in chain(err):
        clear_frames(each.__traceback__)
        each.__traceback__ = None
