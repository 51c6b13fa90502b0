"""What a mean over items is worth: its interval, and differences item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from c2c_mlx.bootstrap import interval


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
