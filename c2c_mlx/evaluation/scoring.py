"""What a mean over items is worth: bootstrap intervals, and differences item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000
_CHUNK = 4_000_000  # numbers drawn at a time; bounds the memory


def interval(values: Sequence[float], seed: int) -> list[float]:
    """The 95 % percentile bootstrap interval of the mean.

    Args:
        values: one per item, at least one.
        seed: of the resampling; the same values give the same interval.

    Returns:
        The lower and the upper end.
    """
    x = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    rows = max(_CHUNK // len(x), 1)
    means = np.empty(RESAMPLES)
    for at in range(0, RESAMPLES, rows):
        part = means[at : at + rows]
        part[:] = x[rng.integers(len(x), size=(len(part), len(x)))].mean(axis=1)
    return [float(end) for end in np.quantile(means, [0.025, 0.975])]


def mean(values: Sequence[float], seed: int) -> dict[str, Any]:
    """Mean, interval and count; empty without values."""
    if not values:
        return {}
    return {
        "mean": float(np.mean(values)),
        "ci95": interval(values, seed),
        "items": len(values),
    }


def difference(a: Mapping[str, float], b: Mapping[str, float], seed: int) -> dict[str, Any]:
    """The mean of a - b over the items that both have, item by item."""
    return mean([a[item] - b[item] for item in a if item in b], seed)
