"""What a mean over items is worth: its bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
_CHUNK = 4_000_000  # numbers drawn at a time; bounds the memory


def interval(
    values: Sequence[float], seed: int, weights: Sequence[float] | None = None
) -> list[float]:
    """The 95 % percentile bootstrap interval of the mean.

    Args:
        values: one per item, at least one.
        seed: of the resampling; the same values give the same interval.
        weights: positive, one per item; with them, of the sum of values over that of weights, as
            a loss per token is.

    Returns:
        The lower and the upper end.
    """
    x = np.asarray(values, dtype=np.float64)
    w = None if weights is None else np.asarray(weights, dtype=np.float64)
    rng = np.random.default_rng(seed)
    rows = max(_CHUNK // len(x), 1)
    means = np.empty(RESAMPLES)
    for at in range(0, RESAMPLES, rows):
        part = means[at : at + rows]
        drawn = rng.integers(len(x), size=(len(part), len(x)))
        if w is None:
            part[:] = x[drawn].mean(axis=1)
        else:
            part[:] = x[drawn].sum(axis=1) / w[drawn].sum(axis=1)
    return [float(end) for end in np.quantile(means, [0.025, 0.975])]
