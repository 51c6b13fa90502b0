"""Caches of batches that gradients flow through: padding in the middle, no writing in place."""

from __future__ import annotations

from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import create_attention_mask

from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv


class TrainingCache:
    """A cache layer for batches that gradients flow through: concatenates, never writes in place.

    Its columns are a prefix that all rows share, then padding, then each row's own rest.

    Args:
        padding: [B] columns of padding per row; None if there is none at all.
        prefix: columns before the padding.
        ahead: the last columns held, if they are those of the ids that come next. A pass over
            these attends to what is here, fused, in place of what it computes.
        hidden: [B, N] True for columns that count as positions, but nobody attends to; None if
            there is none at all.
    """

    def __init__(
        self,
        padding: mx.array | None,
        prefix: int,
        ahead: int = 0,
        hidden: np.ndarray | None = None,
    ) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.padding, self.prefix, self.ahead, self.hidden = padding, prefix, ahead, hidden

    def copy(self, keys: mx.array | None = None, values: mx.array | None = None) -> TrainingCache:
        """The same layout, with these keys and values or the same ones."""
        other = TrainingCache(self.padding, self.prefix, self.ahead, self.hidden)
        other.keys = self.keys if keys is None else keys
        other.values = self.values if values is None else values
        return other

    @property
    def columns(self) -> int:
        """Columns before the ids that come next, padding included."""
        return 0 if self.keys is None else int(self.keys.shape[2]) - self.ahead

    @property
    def offset(self) -> int | mx.array:
        """The position of the next column, which padding does not count for."""
        if self.padding is None or self.columns < self.prefix:
            return self.columns
        return self.columns - self.padding

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """mlx-lm's cache protocol."""
        if self.ahead:
            return self.keys, self.values  # type: ignore[return-value]
        if self.keys is not None and self.values is not None:
            keys = mx.concatenate([self.keys, keys], axis=2)
            values = mx.concatenate([self.values, values], axis=2)
        self.keys, self.values = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[Any, Any]:
        """mlx-lm's cache protocol."""
        return self.keys, self.values

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """mlx-lm's cache protocol: causal, windowed where the layer is, blind to padding."""
        past = self.columns
        if self.padding is None and self.hidden is None:
            return create_attention_mask(n, past, return_array, window_size)
        padding = mx.zeros(1, mx.int32) if self.padding is None else self.padding
        position = mx.arange(past + n)[None] - mx.where(
            mx.arange(past + n)[None] >= self.prefix, padding[:, None], 0
        )  # [B, columns]; columns of padding get the positions right before their row's rest
        column = mx.arange(past + n)
        is_padding = (column >= self.prefix) & (column < self.prefix + padding[:, None])
        mask = (column[past:, None] >= column[None])[None] & ~is_padding[:, None]
        if self.hidden is not None:
            hidden = mx.array(np.pad(self.hidden, [(0, 0), (0, past + n)])[:, : past + n])
            # Something to attend to, in any case.
            mask = mask & (~hidden[:, None] | (column[past:, None] == column[None])[None])
        if window_size is not None:
            mask = mask & (position[:, past:, None] < position[:, None] + window_size)
        return mask[:, None]

    def empty(self) -> bool:
        """mlx-lm's cache protocol."""
        return self.keys is None

    @property
    def state(self) -> tuple[Any, Any]:
        """mlx-lm's cache protocol."""
        return self.keys, self.values


def check_layers(model: nn.Module, name: str) -> None:
    """Refuses a model that can share and receive, but not be trained.

    Raises:
        C2CError: if a layer is not attention, or has no keys and values of its own.
    """
    if len(kv.attention_layers(kv.make_cache(model))) != len(model.layers):
        raise C2CError(
            f"{name}: training needs models whose layers are all attention layers; without a fuser "
            "such a pair can relay (--mode relay)"
        )


def training_cache(
    model: nn.Module,
    padding: mx.array | None,
    prefix: int,
    shared: kv.Cache | None = None,
    batch: int = 1,
    hidden: np.ndarray | None = None,
) -> kv.Cache:
    """One `TrainingCache` per layer, starting from a `shared` prefix of one row if there is one.

    Raises:
        C2CError: as `check_layers`.
    """
    check_layers(model, "a model")
    hidden = hidden if hidden is not None and hidden.any() else None
    cache = [TrainingCache(padding, prefix, hidden=hidden) for _ in model.layers]
    for c, s in zip(cache, shared or [], strict=False):
        if s.keys is not None:
            shape = (batch, *s.keys.shape[1:])
            c.keys, c.values = mx.broadcast_to(s.keys, shape), mx.broadcast_to(s.values, shape)
    return cache
