"""What a device computes in ways of its own: products with packed weights, and rotations."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from c2c_mlx.config import FuserConfig, ModelShape
from c2c_mlx.doctor import models
from c2c_mlx.doctor.check import DTYPES, Found, Proof, error, name_of, spacing, tolerance, worst
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fuser import Fuser
from c2c_mlx.fusion.project import GROUP
from c2c_mlx.fusion.rope import Rotation, rope_of

_LENGTHS = (1, 5, 40)  # one, few and many rows: kernels of their own on a GPU
_WIDTH = 256
_BITS = (4, 6, 8)
_POSITION = 1000  # where keys stand that are turned


def proofs() -> list[Proof]:
    """Packed against dense, and RoPE put on and taken off, in every dtype."""
    return [
        *(Proof(f"quantised products, {name_of(d)}", partial(_products, d)) for d in DTYPES),
        *(Proof(f"quantised fuser, {name_of(d)}", partial(_fuser, d)) for d in DTYPES),
        *(Proof(f"RoPE, {name_of(d)}", partial(_rope, d)) for d in DTYPES),
        *(Proof(f"un-rotated keys, {name_of(d)}", partial(_unrotated, d)) for d in DTYPES),
    ]


def _products(dtype: mx.Dtype) -> Found:
    """A product with packed weights against the one with the same numbers dense."""
    errors = []
    for bits in _BITS:
        mx.random.seed(bits)
        weight = mx.random.normal((64, _WIDTH)).astype(dtype) / _WIDTH**0.5
        packed = mx.quantize(weight, GROUP, bits)
        dense = mx.dequantize(*packed, GROUP, bits).astype(mx.float32)
        for n in _LENGTHS:
            x = mx.random.normal((n, _WIDTH)).astype(dtype)
            product = mx.quantized_matmul(x, *packed, group_size=GROUP, bits=bits)
            errors.append(error(product, x.astype(mx.float32) @ dense.T))
    return Found(worst(errors), tolerance(dtype), "4, 6 and 8 bits against dense")


def _fuser(dtype: mx.Dtype) -> Found:
    """A fuser of 8 and of 4 bits against the same numbers dense."""
    shapes = ModelShape("receiver", 1, 2, 64), ModelShape("sharer", 1, 1, 128)
    config = FuserConfig(*shapes, ((0, 0),), hidden_dim=64, intermediate_dim=64)
    errors = []
    for bits in (8, 4):
        mx.random.seed(bits)
        packed = Fuser(config)
        packed.gate_logit = mx.ones_like(packed.gate_logit)
        packed.cast(dtype)
        packed.eval()
        packed.quantise(bits)
        dense = copy.deepcopy(packed)
        dense.dequantise()
        for n in _LENGTHS:
            sharer, receiver = (
                mx.random.normal((2, 1, 1, m.kv_heads, n, m.head_dim)).astype(dtype)
                for m in (config.sharer, config.receiver)
            )
            ours, right = (
                fuser.change(sharer=(*sharer,), receiver=(*receiver,)) for fuser in (packed, dense)
            )
            errors.append(error(ours.delta, right.delta))
    return Found(worst(errors), tolerance(dtype), "8 and 4 bits against dense")


def _rope(dtype: mx.Dtype) -> Found:
    """Keys that the models' own RoPE has turned, against its formula in double precision."""
    errors = []
    for model, rotation, keys in _keys(dtype):
        by_hand = [
            _turned(rope_of(model, layer, "a model"), x)
            for layer, x in enumerate(np.array(keys.astype(mx.float32)).astype(np.float64))
        ]
        right = mx.array(np.stack(by_hand).astype(np.float32))
        errors.append(error(rotation.put_on(keys, _POSITION), right))
    # An angle that has grown to the position is rounded as a number of that size.
    allowed = tolerance(dtype) + 2 * _POSITION * spacing(mx.float32)
    return Found(worst(errors), allowed, f"from position {_POSITION}, against the formula")


def _unrotated(dtype: mx.Dtype) -> Found:
    """Keys with RoPE put on and taken off, at one position and at another per row."""
    errors = []
    for _, rotation, keys in _keys(dtype):
        for offset in (_POSITION, mx.array([_POSITION, _POSITION - 7])):
            again = rotation.take_off(rotation.put_on(keys, offset), offset)
            errors.append(error(again, keys))
    return Found(worst(errors), tolerance(dtype), "RoPE put on and taken off again")


def _keys(dtype: mx.Dtype) -> Iterator[tuple[nn.Module, Rotation, mx.array]]:
    """Random keys [L, 2, H, 40, D] for each of the two models, and what turns them."""
    for make in (models.receiver, models.sharer):
        model = make(dtype)
        layers = range(len(model.layers))
        shape = kv.model_shape(model, "a model")
        mx.random.seed(0)
        keys = mx.random.normal((len(layers), 2, shape.kv_heads, 40, shape.head_dim)).astype(dtype)
        yield model, Rotation(model, layers, "a model"), keys


def _turned(rope: Any, keys: np.ndarray) -> np.ndarray:
    """Keys [B, H, N, D] rotated in double precision, by RoPE's half-split form."""
    half = keys.shape[-1] // 2
    if isinstance(rope, nn.RoPE):
        periods = rope.base ** (np.arange(half) / half)
    else:
        periods = np.array(rope._freqs).astype(np.float64)
    angle = (_POSITION + np.arange(keys.shape[2]))[:, None] / periods
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = keys[..., :half], keys[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
