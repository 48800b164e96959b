"""``compile = true``: whatever size a batch has, its code was compiled before the first job.

torch compiles a module anew for each new shape, seconds to minutes long, in the middle of somebody's job; and after a
few times (8) it gives up and runs it uncompiled without a word. So, for inputs of one known shape, batches are padded
to *bucket sizes* (1, 2, 4, … ``max_items``) and the warm-up runs every one of them. Where inputs may have any shape,
their free dimensions and the batch's are compiled as unknown, once, and nothing is padded; a batch of one is a case of
its own, which the warm-up runs too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

#: shapes compiled of one piece of code; all models of a class share these
_MOST_SHAPES = 64


def compile_module(module: nn.Module, *, dynamic: bool | None) -> None:
    """Compile in place, so that a ``predict_step`` which calls ``self(x)`` runs the compiled forward, too.

    Args:
        module: the module.
        dynamic: False compiles for each shape; None leaves what is not marked as unknown fixed; True fixes nothing.
    """
    config = torch._dynamo.config  # noqa: SLF001 - documented under this name
    config.recompile_limit = max(config.recompile_limit, _MOST_SHAPES)
    module.compile(dynamic=dynamic)


def bucket_sizes(max_items: int) -> list[int]:
    """The sizes that batches are padded to: the powers of two, and the largest."""
    return [*(1 << n for n in range((max_items - 1).bit_length())), max_items]


def padded(batch: Sequence[torch.Tensor], max_items: int) -> Sequence[torch.Tensor]:
    """The inputs of a batch, the last one repeated up to the next bucket size; the others do not notice."""
    size = next((size for size in bucket_sizes(max_items) if size >= len(batch)), len(batch))
    if isinstance(batch, torch.Tensor):
        return torch.cat((batch, batch[-1:].expand(size - len(batch), *batch.shape[1:])))
    return [*batch, *[batch[-1]] * (size - len(batch))]


def mark_free(batch: torch.Tensor, dimensions: Iterable[int]) -> None:
    """Tell the compiler that these dimensions have another size in another batch."""
    for dimension in dimensions:
        if dimension < batch.ndim and batch.shape[dimension] > 1:  # 1 is always a case of its own
            torch._dynamo.maybe_mark_dynamic(batch, dimension)  # noqa: SLF001 - documented under this name
