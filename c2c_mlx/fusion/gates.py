"""How a turn's fusion changed the receiver's cache: figures for programs, and for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from c2c_mlx.events import GateReport
from c2c_mlx.text.alignment import TokenAlignment


@dataclass(frozen=True)
class GateStats:
    """How a turn's fusion changed the receiver's cache, per slice, head and position.

    Attributes:
        layers: (receiver layer, sharer layer) of each of the L fused layers.
        start: the first of the N fused positions.
        gates: [2, L] bool, keys before values; nothing is computed for a closed one.
        weight: [2, L, Hr, N] the dynamic weight, message gate included; 0 where nothing was added.
        own: [2, L, Hr, N] norm of the receiver's own key or value.
        change: [2, L, Hr, N] norm of what was added to it.
        fused: [N] bool; a template's positions may be left out, whatever the gates say.
    """

    layers: tuple[tuple[int, int], ...]
    start: int
    gates: np.ndarray
    weight: np.ndarray
    own: np.ndarray
    change: np.ndarray
    fused: np.ndarray

    @property
    def mean_weight(self) -> np.ndarray:
        """[2, L] the dynamic weight over heads and fused positions; 0 if there are none."""
        total: np.ndarray = self.weight.mean(axis=2).sum(axis=-1)
        return total / max(int(self.fused.sum()), 1)

    @property
    def relative_change(self) -> np.ndarray:
        """[2, L, Hr] ||fused - own|| / ||own|| over the fused positions."""
        own = np.linalg.norm(self.own[..., self.fused], axis=-1)
        return np.linalg.norm(self.change, axis=-1) / np.maximum(own, 1e-12)


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
            (receiver_tokenizer.decode([r]), sharer_tokenizer.decode([text.sharer_ids[s]]))
            for r, s in pairs
        ),
        token_weights=_rounded(weights),
        token_changes=_rounded(changes),
        start=stats.start,
        sharer=sharer,
    )


def _rounded(values: np.ndarray) -> Any:
    """Nested tuples of floats with four decimals: short in a file, and good enough to be seen."""
    if values.ndim == 1:
        return tuple(np.round(values.astype(float), 4).tolist())
    return tuple(map(_rounded, values))
