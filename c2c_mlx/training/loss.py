"""One training step's tensors: frozen prefills, fusion, and the loss on the response alone.

The models keep their precision; what the fuser reads and what is scored is float32.
"""

from __future__ import annotations

from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from c2c_mlx.fusion import kv
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.fuser import Change
from c2c_mlx.fusion.project import KV
from c2c_mlx.training.batch import Batch, Padded
from c2c_mlx.training.caches import training_cache
from c2c_mlx.training.sections import Sections

PrefixMemo = dict[tuple[int, ...], list[kv.StackedKV]]


def prefill(model: nn.Module, prompts: Padded, memo: PrefixMemo) -> kv.Cache:
    """A frozen prefill of a block of prompts.

    Args:
        model: an mlx-lm model.
        prompts: B rows of N columns.
        memo: this model's latest shared prefix; reused while batches share it.

    Returns:
        Per layer a `TrainingCache` over N columns, evaluated.
    """
    batch, width = prompts.ids.shape
    prefix = tuple(prompts.ids[0, : prompts.prefix].tolist())
    padding = mx.array(prompts.padding) if prompts.padding.any() else None
    ids, hidden = mx.array(np.maximum(prompts.ids, ~prompts.ids)), prompts.hidden
    if prefix not in memo:
        memo.clear()
        shared = training_cache(model, None, len(prefix), hidden=hidden[:1])
        if prefix:
            model(ids[:1, : len(prefix)], cache=shared)
            mx.eval(kv.arrays(shared))
        memo[prefix] = shared
    cache = training_cache(model, padding, len(prefix), memo[prefix], batch, hidden)
    if width > len(prefix):
        model(ids[:, len(prefix) :], cache=cache)
    mx.eval(kv.arrays(cache))
    return cache


def fuse(c2c: C2C, own: kv.Cache, sharer: KV, batch: Batch) -> tuple[kv.Cache, Change | None]:
    """The receiver's cache with the fuser's change in columns [start, stop), for every layer.

    Gradients flow through the change; `own` is left as it is.
    """
    if batch.start == batch.stop:
        return [c.copy() for c in own], None
    part = read_receiver(c2c, own, batch)
    proposed = c2c.propose(sharer, part, first_position(batch))
    change = c2c.fuser.gate([proposed], batch.messages)[0]
    delta = change.delta
    if change.message_weight is not None and c2c.fuser.training:
        delta = _as_labelled(proposed.delta, batch)
    added = {
        (c2c.receiver_layers[at], kind): x
        for (kind, at), x in zip(change.slices, delta, strict=True)
    }
    fused = []
    for layer, c in enumerate(own):
        keys, values = (
            _add(x, added.get((layer, kind)), batch.start)
            for kind, x in enumerate(c.keys_and_values())
        )
        fused.append(c.copy(keys, values))
    return fused, change


def _as_labelled(delta: mx.array, batch: Batch) -> mx.array:
    """A change [S, B, H, N, D] where its message gate is to be open, nothing elsewhere.

    While a fuser learns, its gates are learned from the labels alone. Soft gates inside of the loss
    shut for good, on what helps as well, for in the beginning no change helps.
    """
    here = (batch.messages >= 0) & ~batch.own[:, None]
    return mx.where(mx.array(here[None, :, None, :, None]), delta, mx.zeros_like(delta))


def first_position(batch: Batch) -> Any:
    """The position that RoPE saw at the first fused column, an int or [B]."""
    padding = batch.receiver.padding
    return mx.array(batch.start - padding) if padding.any() else batch.start


def _add(x: mx.array, delta: mx.array | None, start: int) -> mx.array:
    """Adds delta [B, H, M, D] to x [B, H, N, D] at `start`, in x's precision."""
    if delta is None:
        return x
    stop = start + delta.shape[2]
    parts = [x[:, :, :start], x[:, :, start:stop] + delta.astype(x.dtype), x[:, :, stop:]]
    return mx.concatenate([p for p in parts if p.shape[2]], axis=2)


def read_receiver(c2c: C2C, own: kv.Cache, batch: Batch) -> kv.StackedKV:
    """The receiver's fused layers in the fused columns, [L, B, Hr, stop - start, Dr], float32."""
    part = kv.read(own, c2c.receiver_layers, batch.start, batch.stop)
    return kv.StackedKV(*(x.astype(mx.float32) for x in part))


def read_sharer(c2c: C2C, cache: kv.Cache, batch: Batch) -> KV:
    """What feeds the fused columns, [L, B, Hs, stop - start, Ds], float32."""
    padding = batch.sharer.padding
    offset = mx.array(-padding) if padding.any() else 0
    keys, values = c2c.read_sharer(cache, batch.index, offset)
    return keys.astype(mx.float32), values.astype(mx.float32)


def zeroed(c2c: C2C, batch: Batch) -> KV:
    """A sharer that says nothing, in the shape of `read_sharer`."""
    shape = c2c.fuser.config.sharer
    rows, columns = batch.messages.shape
    zeros = mx.zeros((len(c2c.receiver_layers), rows, shape.kv_heads, columns, shape.head_dim))
    return zeros, zeros


def response_loss(
    receiver: Sections,
    cache: kv.Cache,
    batch: Batch,
    state: mx.array | None = None,
    recompute: bool = False,
) -> mx.array:
    """Cross-entropy summed over the response's tokens (nats); the prompt is never scored.

    Only the last prompt id and the response run here, so no other logits exist.

    Args:
        receiver: the frozen model.
        cache: its fused cache over the prompts but their last ids.
        batch: the responses.
        state: of the responses at the first fused layer; None: the layers below run, too.
        recompute: whether a layer's insides are computed again for the gradient, not kept.
    """
    ids = mx.array(batch.inputs)
    return receiver.losses(ids, cache, batch.targets, batch.mask, state, recompute).sum()


def response_losses(
    receiver: Sections, cache: kv.Cache, batch: Batch, state: mx.array | None = None
) -> mx.array:
    """As `response_loss`, but each row's own, [B], and nothing learns from them."""
    ids = mx.array(batch.inputs)
    losses = receiver.losses(ids, cache, batch.targets, batch.mask, state, learning=False)
    return losses.sum(axis=1)


def message_loss(change: Change | None, batch: Batch) -> mx.array:
    """Cross-entropy of the message gates, summed over the fused positions (nats).

    A gate is to be shut where the receiver's own answer is wanted, and open everywhere else.
    """
    if change is None or change.message_weight is None:
        return mx.array(0.0)
    member = mx.array((batch.messages >= 0)[None, :, None, :, None].astype(np.float32))
    shut = mx.array(batch.own[None, :, None, None, None])
    right = mx.where(shut, 1 - change.message_weight, change.message_weight)
    return -(mx.log(right + 1e-6) * member).sum()
