"""Layers of mlx-lm caches in which some positions are padding, alone and as rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, KVCache


class PaddedCache(KVCache):  # type: ignore[misc]
    """A cache layer of which some positions are padding: they count, but nobody attends to them."""

    def __init__(self, layer: KVCache) -> None:
        super().__init__()
        self.keys, self.values, self.offset = layer.keys, layer.values, layer.offset
        self.hidden: list[int] = []

    def trim(self, n: int) -> int:
        """mlx-lm's cache protocol."""
        trimmed: int = super().trim(n)
        self.hidden = [position for position in self.hidden if position < self.offset]
        return trimmed

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """mlx-lm's cache protocol."""
        if not self.hidden:
            return super().make_mask(n, return_array=return_array, window_size=window_size)
        column = np.arange(self.offset + n)
        row = column[self.offset :, None]
        visible = np.isin(column, self.hidden, invert=True)
        mask = (column < row) & visible | (column == row)  # something to attend to, in any case
        if window_size is not None:
            mask &= row < column + window_size
        return mx.array(mask)

    @classmethod
    def merge(cls, caches: Sequence[PaddedCache]) -> PaddedBatch:
        """mlx-lm's cache protocol."""
        return PaddedBatch.merge(caches)


class PaddedBatch(BatchKVCache):  # type: ignore[misc]
    """Several `PaddedCache` as rows: beside mlx-lm's padding on the left, each has its own."""

    def __init__(self, left_padding: list[int]) -> None:
        super().__init__(left_padding)
        self.hidden = mx.zeros((len(left_padding), 0), mx.bool_)  # [B, columns to the last hidden]

    @classmethod
    def merge(cls, caches: Sequence[PaddedCache]) -> PaddedBatch:
        """mlx-lm's cache protocol."""
        longest = max(c.offset for c in caches)
        if not longest:
            return cls([0] * len(caches))
        batch: PaddedBatch = super().merge(caches)
        hidden = np.zeros((len(caches), longest), dtype=bool)
        for row, c in zip(hidden, caches, strict=True):
            row[longest - c.offset :][c.hidden] = True
        columns = np.flatnonzero(hidden.any(axis=0))
        batch.hidden = mx.array(hidden[:, : columns[-1] + 1 if len(columns) else 0])
        return batch

    def make_mask(self, n: int, return_array: bool = False, **options: Any) -> mx.array:
        """mlx-lm's cache protocol."""
        mask = super().make_mask(n, return_array, **options)  # [B, 1, n, columns]
        if not self.hidden.shape[1]:
            return mask
        return mask & ~_widened(self.hidden, 0, mask.shape[-1])[:, None, None]

    def filter(self, batch_indices: Sequence[int]) -> None:
        """mlx-lm's cache protocol."""
        columns = self._idx
        super().filter(batch_indices)
        self.hidden = self.hidden[mx.array(list(batch_indices)), columns - self._idx :]

    def extend(self, other: PaddedBatch) -> None:
        """mlx-lm's cache protocol."""
        columns = max(self._idx, other._idx)
        rows = [_widened(c.hidden, columns - c._idx, columns) for c in (self, other)]
        super().extend(other)
        self.hidden = mx.concatenate(rows)

    def extract(self, idx: int) -> PaddedCache:
        """mlx-lm's cache protocol."""
        row = PaddedCache(super().extract(idx))
        hidden = np.flatnonzero(np.array(self.hidden[idx])) - self.left_padding[idx].item()
        row.hidden = hidden.tolist()
        return row


def _widened(hidden: mx.array, left: int, columns: int) -> mx.array:
    """So many columns, of which some come before those of `hidden`; the new ones are seen."""
    return mx.pad(hidden, [(0, 0), (left, columns - left - hidden.shape[1])])
