"""Medians, and confidence intervals of paired rounds."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from math import exp, log

#: resamples of a bootstrap
RESAMPLES = 10_000


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> dict[str, float]:
    """How many times ``theirs`` is ``ours``, round by round.

    Returns:
        ``median`` of the rounds' ratios, and ``low`` and ``high``: the 95 % interval of their geometric mean, by
        bootstrap over the rounds. Few rounds make it narrower than it should be.
    """
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    low, high = interval([log(ratio) for ratio in ratios], seed)
    return {"median": statistics.median(ratios), "low": exp(low), "high": exp(high)}


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean, by bootstrap."""
    chance = random.Random(seed)
    means = sorted(statistics.fmean(chance.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return means[int(RESAMPLES * 0.025)], means[int(RESAMPLES * 0.975)]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie (the next one up)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
