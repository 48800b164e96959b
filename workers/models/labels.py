"""Class names, and predictions that carry them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nograd.tasks.errors import ModelFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .base import HostedModel


def read_labels(model: HostedModel) -> list[str] | None:
    """The class names of the model file: its list, or the lines of the text file it names; None without any.

    Raises:
        ModelFileError: if the file is missing, empty or not text.
    """
    value = model.spec.labels
    if value is None:
        return None
    if isinstance(value, list):
        labels = value
    else:
        try:
            labels = model.path("labels", value).read_text(encoding="utf-8").rstrip("\n").split("\n")
        except (OSError, UnicodeDecodeError) as err:
            raise model.error("labels", value, f"cannot read it as text: {err}") from err
        labels = [label.strip() for label in labels]
    if not labels or not all(labels):
        raise model.error("labels", value, "every class needs a name")
    return labels


def classify(output: torch.Tensor, labels: Sequence[str], top: int) -> dict[str, Any]:
    """Name the classes of one output.

    Args:
        output: a vector of logits, one for each label; or the index of a class, where the model takes the ``argmax``
            itself: a whole number, of shape ``()`` or ``(1,)``.
        labels: the class names.
        top: how many classes to list.

    Returns:
        ``{"label", "score", "top": [{"label", "score"}, …]}``, softmax scores, best first; ``{"label"}`` for an index.

    Raises:
        ModelFailed: if the labels do not fit the output.
    """
    if not output.is_floating_point() and output.numel() == 1:
        return {"label": _name(int(output.item()), labels)}
    if output.shape != (len(labels),):
        raise ModelFailed(
            f"{len(labels)} labels name the values of a vector; the model's output has shape {tuple(output.shape)}"
        )
    scores, indices = output.float().softmax(0).topk(min(top, len(labels)))
    best = [
        {"label": labels[index], "score": score} for index, score in zip(indices.tolist(), scores.tolist(), strict=True)
    ]
    return {**best[0], "top": best}


def _name(index: int, labels: Sequence[str]) -> str:
    if not 0 <= index < len(labels):
        raise ModelFailed(f"the model's output is class {index}; there are {len(labels)} labels")
    return labels[index]
