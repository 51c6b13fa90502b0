"""A conversation that grew by turns against one read at once, and shut gates against no fuser."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

from c2c_mlx import device
from c2c_mlx.config import FuserConfig
from c2c_mlx.doctor import models
from c2c_mlx.doctor.check import DTYPES, Found, Proof, error, name_of, tolerance, worst
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.fuser import Fuser
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.text.alignment import TokenAlignment

_TURNS = (9, 10, 40, 75)  # positions after each; a window of the sharer holds 32
_WRITTEN = 8  # tokens that a shut fuser's receiver writes


def proofs() -> list[Proof]:
    """Both claims in every dtype, and the first for packed models as this device holds them."""
    packed = device.dtype_of(mx.bfloat16)
    return [
        *(Proof(f"conversation, {name_of(d)}", partial(_grown, d, 0)) for d in DTYPES),
        Proof(f"conversation, 4-bit models, {name_of(packed)}", partial(_grown, packed, 4)),
        *(Proof(f"shut gates, {name_of(d)}", partial(_shut, d)) for d in DTYPES),
    ]


def grown_by_turns(link: C2C, turns: Sequence[TokenAlignment], room: int = 1) -> Found:
    """How far the caches and the next logits are from a prefill of the last turn from scratch.

    Args:
        link: two models and a fuser.
        turns: a conversation's prompts, each of which begins with the one before it.
        room: how many tolerances are allowed; every layer of a model adds to the deviation.
    """
    grown, scratch = FusedCache(link), FusedCache(link)
    for turn in turns:
        grown.extend([turn])
    scratch.extend(turns[-1:])
    dtype = _dtype(grown.own.cache)
    for fused in (grown.cache, scratch.cache):
        if _dtype(fused) != dtype:
            note = f"the fused cache became {name_of(_dtype(fused))}"
            return Found(float("inf"), tolerance(dtype), note)
    errors = [
        error(ours, right)
        for ours, right in zip(_stacked(grown.cache), _stacked(scratch.cache), strict=True)
    ]
    last = mx.array(turns[-1].receiver_ids[-1:])[None]
    logits = (link.receiver(last, cache=fused.cache) for fused in (grown, scratch))
    errors.append(error(*logits))
    return Found(
        worst(errors), room * tolerance(dtype), "grown by turns against a prefill from scratch"
    )


def equals_receiver(link: C2C, prompt: TokenAlignment) -> Found:
    """Whether, bit for bit, a shut fuser leaves the receiver's cache and answer as they are."""
    fused, alone = FusedCache(link), Reader(link.receiver)
    fused.extend([prompt])
    alone.extend(prompt.receiver_ids[:-1])
    same = [_same(*pair) for pair in zip(_stacked(fused.cache), _stacked(alone.cache), strict=True)]
    ids = mx.array(prompt.receiver_ids[-1:])[None]
    for _ in range(_WRITTEN):
        ours, right = (link.receiver(ids, cache=cache) for cache in (fused.cache, alone.cache))
        same.append(_same(ours, right))
        ids = right[:, -1:].argmax(axis=-1)
    return Found(float(not all(same)), 0.0, "the receiver alone, bit for bit")


def timed() -> tuple[C2C, TokenAlignment]:
    """What `speed.measure` wants, in the dtype in which this device holds a bfloat16 model."""
    return _link(device.dtype_of(mx.bfloat16)), _prompt(_TURNS[-1])


def _grown(dtype: mx.Dtype, bits: int) -> Found:
    turns = _TURNS[:3] if bits else _TURNS  # a CPU is slow with packed half precision
    return grown_by_turns(_link(dtype, bits), [_prompt(n) for n in turns])


def _shut(dtype: mx.Dtype) -> Found:
    return equals_receiver(_link(dtype, is_open=False), _prompt(_TURNS[-1]))


def _link(dtype: mx.Dtype, bits: int = 0, *, is_open: bool = True) -> C2C:
    """Two small models and a random fuser that sees keys without RoPE.

    Of its four gates one is shut, for which a device gathers the weights of the others; or all.
    """
    receiver, sharer = models.receiver(dtype, bits), models.sharer(dtype, bits)
    shapes = kv.model_shape(receiver, "receiver"), kv.model_shape(sharer, "sharer")
    layer_map = ((1, 1), (2, 2))
    config = FuserConfig(
        *shapes, layer_map, 64, 64, positions="messages", message_gate=True, rotated_keys=False
    )
    mx.random.seed(3)
    fuser = Fuser(config)
    fuser.gate_logit = mx.array([[1.0, -1.0], [1.0, 1.0]]) if is_open else -mx.ones((2, 2))
    fuser.message_head.bias = mx.full(fuser.message_head.bias.shape, 8.0)  # open
    fuser.cast(dtype)
    mx.eval(fuser.parameters())
    fuser.eval()
    return C2C(receiver, sharer, fuser)


def _prompt(n: int) -> TokenAlignment:
    """The first n positions of one conversation, whose messages are 13 long between 3 of template.

    The sharer reads four tokens where the receiver reads three.
    """
    at = np.arange(n)
    message = np.where(at % 16 < 3, -1, at // 16).astype(np.int32)
    index = (at * 4 // 3).astype(np.int32)
    receiver_ids, sharer_ids = (
        ((np.arange(length) * step + 7) % models.VOCABULARY).tolist()
        for length, step in ((n, 37), (int(index[-1]) + 1, 53))
    )
    return TokenAlignment(receiver_ids, sharer_ids, index, message)


def _stacked(cache: kv.Cache) -> kv.StackedKV:
    return kv.read(cache, kv.attention_layers(cache), 0, kv.length(cache))


def _dtype(cache: kv.Cache) -> mx.Dtype:
    """Of its keys and values; float32 if only some of them are."""
    found = {x.dtype for x in _stacked(cache)}
    return found.pop() if len(found) == 1 else mx.float32


def _same(ours: mx.array, right: mx.array) -> bool:
    return ours.dtype == right.dtype and bool(mx.array_equal(ours, right))
