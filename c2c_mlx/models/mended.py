"""Modules of mlx-lm's models that are right for one row, made right for batches."""

from __future__ import annotations

from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma2
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE


class _Gemma2Attention(gemma2.Attention):  # type: ignore[misc]
    """Gemma 2's: mlx-lm lays the masks of a batch's rows along the KV heads.

    That raises, or is silently wrong where there are as many rows as KV heads
    (github.com/ml-explore/mlx-lm/pull/1903).
    """

    def __call__(self, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        if self.repeats > 1 and mask is not None and mask.ndim == 4:
            mask = mask[:, :, None]  # [B, 1, 1, N, S], for scores of [B, KV heads, repeats, N, S]
        return super().__call__(x, mask, cache)


class _DynamicRoPE(DynamicNTKScalingRoPE):  # type: ignore[misc]
    """As InternLM2 has it: mlx-lm's wants one offset for all rows."""

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        if not isinstance(offset, mx.array):
            return super().__call__(x, offset)
        # Up to the trained length, where conversations end, it is as any other.
        return mx.fast.rope(
            x, self.dims, traditional=self.traditional, base=self.base, scale=1.0, offset=offset
        )


_MENDED: dict[type, type] = {
    gemma2.Attention: _Gemma2Attention,
    DynamicNTKScalingRoPE: _DynamicRoPE,
}


def mend(model: nn.Module) -> None:
    """Gives a model's modules the classes of this file, where mlx-lm's can't do batches."""
    for module in model.modules():
        if mended := _MENDED.get(type(module)):
            module.__class__ = mended
