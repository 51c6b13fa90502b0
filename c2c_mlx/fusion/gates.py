"""How a turn's fusion changed the receiver's cache, in numbers per slice, head and position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
