"""How a turn's fusion changed the receiver's cache, in numbers per slice, head and position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

from c2c_mlx.fusion.fuser import Change


class Trace(NamedTuple):
    """What is kept of a change to tell of it: two numbers a head and position."""

    start: int  # the first of the n positions
    slices: list[tuple[int, int]]
    weight: mx.array  # [S, Hr, n], message gate included; 0 where nothing was added
    norm: mx.array  # [S, Hr, n], of what was added

    @classmethod
    def of(cls, change: Change, start: int) -> Trace:
        """What is kept of this one, of a batch of one; in float32, for squares overflow."""
        weight = change.weight[:, 0, ..., 0].astype(mx.float32)
        if change.message_weight is not None:
            weight = weight * change.message_weight[:, 0, ..., 0]
        norm = mx.linalg.norm(change.delta[:, 0].astype(mx.float32), axis=-1)
        return cls(start, change.slices, mx.where(norm > 0, weight, 0.0), norm)


@dataclass(frozen=True)
class Fusion:
    """What one fusion cost, and how each sharer changed positions [start, stop)."""

    start: int
    stop: int
    sharer_tokens: int  # that had to be read, over all sharers
    sharer_s: float
    receiver_s: float  # of an answer, which all models read at once, it is the time of all
    fuse_s: float
    traces: tuple[list[Trace], ...]  # per sharer, in order of positions


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
