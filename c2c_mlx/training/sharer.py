"""What the sharer holds of a batch's prompts: computed here, or asked of another machine."""

from __future__ import annotations

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

from c2c_mlx.fusion import kv
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training.batch import Padded
from c2c_mlx.training.caches import training_cache

_AT_ONCE = 8  # requests; the other machine may have other clients


def prefill(c2c: C2C, prompts: Padded, memo: step_loss.PrefixMemo) -> kv.Cache:
    """A frozen prefill of a block of prompts by the sharer, see `loss.prefill`.

    Of a sharer elsewhere, only the layers that the fuser reads are there.

    Raises:
        C2CError: if a sharer elsewhere does not bring them.
    """
    if not hasattr(c2c.sharer, "make_reader"):
        return step_loss.prefill(c2c.sharer, prompts, memo)
    found = []
    for at in range(0, len(prompts.ids), _AT_ONCE):
        rows = range(at, min(at + _AT_ONCE, len(prompts.ids)))
        readers = [c2c.make_reader(c2c.sharer_layers) for _ in rows]
        texts = [_without_padding(prompts, row) for row in rows]
        for reader, text in zip(readers, texts, strict=True):
            reader.extend(text)  # which asks, and does not wait
        for reader, text, row in zip(readers, texts, rows, strict=True):
            held = kv.read(reader.cache, c2c.sharer_layers, 0, len(text))
            found.append([_with_padding(x, prompts, row) for x in held])
    keys, values = (mx.concatenate([row[kind] for row in found], axis=1) for kind in (0, 1))
    padding = mx.array(prompts.padding) if prompts.padding.any() else None
    cache = training_cache(c2c.sharer, padding, prompts.prefix)
    for at, layer in enumerate(c2c.sharer_layers):
        cache[layer].keys, cache[layer].values = keys[at], values[at]
    mx.eval(keys, values)
    return cache


def _without_padding(prompts: Padded, row: int) -> list[int]:
    ids, start = prompts.ids[row], prompts.prefix
    rest = ids[start + int(prompts.padding[row]) :]
    text: list[int] = np.concatenate([ids[:start], rest]).tolist()
    return text


def _with_padding(x: mx.array, prompts: Padded, row: int) -> mx.array:
    """Zeros [L, 1, H, padding, D] where the block has padding."""
    if not (n := int(prompts.padding[row])):
        return x
    shape = (*x.shape[:3], n, x.shape[4])
    parts = [x[..., : prompts.prefix, :], mx.zeros(shape, x.dtype), x[..., prompts.prefix :, :]]
    return mx.concatenate([part for part in parts if part.shape[3]], axis=3)
