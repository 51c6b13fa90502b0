"""How a turn's fusion changed the cache, for people: means over heads, tokens by their text."""

from __future__ import annotations

from typing import Any

import numpy as np

from c2c_mlx.events import GateReport
from c2c_mlx.fusion.gates import GateStats
from c2c_mlx.text.alignment import TokenAlignment


def report(
    stats: GateStats,
    text: TokenAlignment,
    receiver_tokenizer: Any,
    sharer_tokenizer: Any,
    sharer: int = 0,
) -> GateReport:
    """The stats for people to look at: means over heads, and tokens by their text.

    Args:
        stats: of positions of `text`.
        text: what was read.
        receiver_tokenizer: the answering model's.
        sharer_tokenizer: the reading model's.
        sharer: which one it is, should there be several.
    """
    at = slice(stats.start, stats.start + stats.weight.shape[-1])
    pairs = zip(text.receiver_ids[at], text.index[at].tolist(), strict=True)
    weights = stats.weight.mean(axis=2)
    changes = (stats.change / np.maximum(stats.own, 1e-12)).mean(axis=2)
    keys, values = stats.gates.tolist()
    return GateReport(
        layers=stats.layers,
        gates=(tuple(keys), tuple(values)),
        weights=_rounded(stats.mean_weight),
        changes=_rounded(stats.relative_change.mean(axis=-1)),
        tokens=tuple(
            (_said(receiver_tokenizer, r), _said(sharer_tokenizer, text.sharer_ids[s]))
            for r, s in pairs
        ),
        token_weights=_rounded(weights),
        token_changes=_rounded(changes),
        start=stats.start,
        sharer=sharer,
    )


def _said(tokenizer: Any, token: int) -> str:
    """A token's text; padding says nothing."""
    return str(tokenizer.decode([token])) if token >= 0 else ""


def _rounded(values: np.ndarray) -> Any:
    """Nested tuples of floats with four decimals: short in a file, and good enough to be seen."""
    if values.ndim == 1:
        return tuple(np.round(values.astype(float), 4).tolist())
    return tuple(map(_rounded, values))
