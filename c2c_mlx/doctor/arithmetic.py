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
    errors = [
        error(rotation.put_on(keys, _POSITION), _turned(model, keys, _POSITION))
        for model, rotation, keys in _keys(dtype)
    ]
    note = f"from position {_POSITION}, against the formula"
    return Found(worst(errors), _allowed(dtype), note)


def _unrotated(dtype: mx.Dtype) -> Found:
    """Keys that the formula has turned, bare again: from one position, and from one per row."""
    errors = [
        error(rotation.take_off(_turned(model, keys, offset).astype(dtype), offset), keys)
        for model, rotation, keys in _keys(dtype)
        for offset in (_POSITION, mx.array([_POSITION, _POSITION - 7]))
    ]
    return Found(worst(errors), _allowed(dtype), "RoPE taken off what the formula has turned")


def _allowed(dtype: mx.Dtype) -> float:
    # An angle that has grown to the position is rounded as a number of that size.
    return tolerance(dtype) + 2 * _POSITION * spacing(mx.float32)


def _keys(dtype: mx.Dtype) -> Iterator[tuple[nn.Module, Rotation, mx.array]]:
    """Random keys [L, 2, H, 40, D] for each of the two models, and what turns them."""
    for make in (models.receiver, models.sharer):
        model = make(dtype)
        layers = range(len(model.layers))
        shape = kv.model_shape(model, "a model")
        mx.random.seed(0)
        keys = mx.random.normal((len(layers), 2, shape.kv_heads, 40, shape.head_dim)).astype(dtype)
        yield model, Rotation(model, layers, "a model"), keys


def _turned(model: nn.Module, keys: mx.array, offset: Any) -> mx.array:
    """Keys [L, B, H, N, D] rotated in double precision, by RoPE's half-split form; in float32."""
    half = keys.shape[-1] // 2
    position = np.array(offset).reshape(-1, 1, 1, 1) + np.arange(keys.shape[3])[:, None]
    turned = []
    for layer, x in enumerate(np.array(keys.astype(mx.float32)).astype(np.float64)):
        rope = rope_of(model, layer, "a model")
        if isinstance(rope, nn.RoPE):
            periods = rope.base ** (np.arange(half) / half)
        else:
            periods = np.array(rope._freqs).astype(np.float64)
        cos, sin = np.cos(position / periods), np.sin(position / periods)
        a, b = x[..., :half], x[..., half:]
        turned.append(np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1))
    return mx.array(np.stack(turned).astype(np.float32))
