"""The maths of a fuser's pass (paper, section 3.2): pure functions over stacked parameters.

S slices take part in a pass, one (kind, layer) each; their parameters are rows of stacks [K, ...].
Weights are dense [K, out, in], or packed. `rows` [S] picks them inside of the product, so that
nothing is copied when some gates are shut; None: all of them take part, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from c2c_mlx import device
from c2c_mlx.config import FuserConfig

KV = tuple[mx.array, mx.array]
Slices = list[tuple[int, int]]  # (kind, index into the layer map), keys before values
Weight = mx.array | dict[str, mx.array]  # dense; or packed, scales and biases
Activation = Callable[[mx.array], mx.array]

NORM_EPS = 1e-6
GROUP = 64  # numbers of a row that share a scale once it is quantised
# 1 / p(a)^32 is the normal distribution's tail beyond a >= 0, as in Abramowitz and Stegun's 7.1.28;
# fitted so that a GELU, which needs a / p(a)^32 of it, is off by 1.7e-7 and its slope by 1.4e-6.
_TAIL = (
    2.031743551813994e-05,
    -8.184871934417486e-05,
    1.420969844497728e-03,
    1.0483224982263102e-02,
    2.5479186590008848e-02,
    1.0218972358039884,
)


def gelu(x: mx.array) -> mx.array:
    """The exact GELU, not its tanh approximation; in float32 it is 1e-6 off at most."""
    return cast(mx.array, _fast_gelu(x)) if device.has_slow_erf() else nn.gelu(x)


@mx.custom_function
def _fast_gelu(x: mx.array) -> mx.array:
    wide = x.astype(mx.float32)
    size = mx.abs(wide)
    p = _TAIL[0] * size + _TAIL[1]
    for c in _TAIL[2:]:
        p = p * size + c
    return (mx.maximum(wide, 0) - size / _to_the_32nd(p)).astype(x.dtype)


# Of what is between, nothing is kept for the gradient: for a paper's fuser it would be gigabytes.
@_fast_gelu.vjp
def _(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    wide = x.astype(mx.float32)
    size = mx.minimum(mx.abs(wide), 20.0)  # there is no tail beyond, and p would overflow
    p, slope = _TAIL[0] * size + _TAIL[1], mx.array(_TAIL[0])
    for c in _TAIL[2:]:
        p, slope = p * size + c, slope * size + p
    below = (1 - 32 * size * slope / p) / _to_the_32nd(p)
    return cotangent * mx.where(wide > 0, 1 - below, below).astype(x.dtype)


def _to_the_32nd(x: mx.array) -> mx.array:
    for _ in range(5):
        x = x * x
    return x


ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "silu": nn.silu,
    "relu": nn.relu,
}


def project(
    params: dict[str, Any],
    rows: mx.array | None,
    sharer: KV,
    receiver: KV,
    slices: Slices,
    config: FuserConfig,
    dropout: float = 0.0,
) -> tuple[mx.array, mx.array, mx.array | None]:
    """The weighted projection, its dynamic weights and the votes on the message gate.

    Args:
        params: the fuser's parameters, stacks [K, ...].
        rows: [S] of the slices in the stacks; None: S is K.
        sharer: keys and values, each [L, B, Hs, N, Ds].
        receiver: keys and values, each [L, B, Hr, N, Dr].
        slices: S of them.
        config: the fuser's configuration.
        dropout: probability of dropping a channel inside a block.

    Returns:
        The projection [S, B, Hr, N, Dr], weighted, and the dynamic weights [S, B, Hr, N, 1] in the
        precision of the parameters; the votes [1, B, N, 1] in float32, or None.
    """
    positions = receiver[0].shape[1] * receiver[0].shape[3]
    width = max(config.hidden_dim, config.intermediate_dim, 1)
    step = max(device.cached_bytes() // (4 * positions * width + 1), 1)
    if step >= len(slices) or dropout:  # noise is drawn for all slices at once
        return _project(params, rows, sharer, receiver, slices, config, dropout)
    projections, weights, votes = [], [], []
    for at in range(0, len(slices), step):
        some = slice(at, at + step)
        part = params if rows is not None else tree_map(lambda p, some=some: p[some], params)
        p, s, v = _project(
            part, None if rows is None else rows[some], sharer, receiver, slices[some], config
        )
        projections.append(p)
        weights.append(s)
        votes += [] if v is None else [v * len(p)]
    vote = sum(votes[1:], votes[0]) / len(slices) if votes else None
    return mx.concatenate(projections), mx.concatenate(weights), vote


def _project(
    params: dict[str, Any],
    rows: mx.array | None,
    sharer: KV,
    receiver: KV,
    slices: Slices,
    config: FuserConfig,
    dropout: float = 0.0,
) -> tuple[mx.array, mx.array, mx.array | None]:
    """As `project`, all slices at once."""
    _, batch, heads, length, head_dim = receiver[0].shape
    shape = (len(slices), batch, length)
    act = ACTIVATIONS[config.activation]
    x = inputs(sharer, receiver, slices).flatten(1, 2)  # [S, B*N, in]
    dtype = _dtype(params["proj_in"]["weight"])
    if config.normalise:  # small differences of large numbers: in float32 whatever the rest is in
        mean, scale = (_take(params[f"input_{name}"], rows)[:, None] for name in ("mean", "scale"))
        x = (x.astype(mx.float32) - mean) * scale
    h = linear(params["proj_in"], rows, x.astype(dtype))
    h = block(params["mlp1"], rows, h, act, dropout)
    s = block(params["scalar_mlp2"], rows, h, act, dropout)
    s = mx.sigmoid(linear(params["scalar_head"], rows, s))
    p = h
    for one in params["proj_mlp2"]:
        p = block(one, rows, p, act, dropout)
    p = linear(params["proj_out"], rows, p)
    if config.normalise:
        p = p * _take(params["output_scale"], rows)[:, None].astype(dtype)
    votes = None
    if config.message_gate:
        # All slices vote on one gate: thirty gates of their own would leave some open by mistake.
        votes = linear(params["message_head"], rows, h).astype(mx.float32)
        votes = votes.reshape(*shape, 1).mean(axis=0, keepdims=True)
    s = s.reshape(*shape, heads, 1).swapaxes(2, 3)
    return s * p.reshape(*shape, heads, head_dim).swapaxes(2, 3), s, votes


def soft_gates(logit: mx.array, uniform: mx.array, temperature: float) -> mx.array:
    """The gates in training: sigmoid of the logit plus one Gumbel variate (paper, Eq. 6).

    Args:
        logit: gate logits, broadcastable to `uniform`.
        uniform: uniform noise in [0, 1), one per (slice, batch, head, position).
        temperature: near 0 the gates are almost hard.
    """
    noise = -mx.log(-mx.log(uniform + 1e-20) + 1e-20)
    return mx.sigmoid((logit + noise) / temperature)


def message_mean(votes: mx.array, messages: np.ndarray | None) -> mx.array:
    """Replaces each position's vote [1, B, N, 1] by the mean over its message [B, N]."""
    if messages is None:
        return mx.broadcast_to(votes.mean(axis=2, keepdims=True), votes.shape)
    member = messages[..., None] == np.arange(max(messages.max(), 0) + 1)  # [B, N, M]
    mean = member / np.maximum(member.sum(axis=1, keepdims=True), 1)
    spread = mx.array(member.astype(np.float32))
    return spread @ (mx.array(mean.astype(np.float32)).swapaxes(1, 2) @ votes)


def inputs(sharer: KV, receiver: KV, slices: Slices) -> mx.array:
    """[S, B, N, Hs*Ds + Hr*Dr]: the two caches of each slice side by side, the sharer's first."""
    return mx.concatenate([_of_slices(sharer, slices), _of_slices(receiver, slices)], axis=-1)


def _of_slices(kv: KV, slices: Slices) -> mx.array:
    """[L, B, H, N, D] keys and values -> [S, B, N, H*D] of the slices, head-major."""
    parts = []
    for kind in (0, 1):
        layers = [layer for k, layer in slices if k == kind]
        if layers == list(range(kv[kind].shape[0])):
            parts.append(kv[kind])
        elif layers:
            parts.append(kv[kind][mx.array(layers)])
    x = mx.concatenate(parts) if len(parts) > 1 else parts[0]
    return x.transpose(0, 1, 3, 2, 4).flatten(3)


def block(
    params: dict[str, Any],
    rows: mx.array | None,
    x: mx.array,
    act: Activation,
    dropout: float = 0.0,
) -> mx.array:
    """A residual block over x [S, N, H]: x + w2(inner)."""
    y = _product(inner(params, rows, x, act), params["w2"], rows)
    if dropout:
        y = y * mx.random.bernoulli(1 - dropout, y.shape) / (1 - dropout)
    return x + y


def inner(params: dict[str, Any], rows: mx.array | None, x: mx.array, act: Activation) -> mx.array:
    """A block's inner channels [S, N, I] over x [S, N, H]: act(w1(rmsnorm(x)))."""
    norm = mx.fast.rms_norm(x, None, NORM_EPS) * _take(params["norm"], rows)[:, None]
    return act(_product(norm, params["w1"], rows))


def linear(params: dict[str, Any], rows: mx.array | None, x: mx.array) -> mx.array:
    """One linear layer per slice over x [S, N, in], [S, N, out]."""
    weight, bias = params["weight"], _take(params["bias"], rows)[:, None]
    if rows is None and isinstance(weight, mx.array):
        return mx.addmm(bias, x, weight.swapaxes(-1, -2))
    return _product(x, weight, rows) + bias


def _product(x: mx.array, w: Weight, rows: mx.array | None) -> mx.array:
    """The product of x [S, N, in] with rows of a weight [K, out, in], [S, N, out]."""
    if isinstance(w, mx.array):
        w = w.swapaxes(-1, -2)
        if rows is None:
            return x @ w
        if w.dtype != mx.float32 and mx.default_device().type == mx.cpu:
            return x @ w[rows]  # a rehearsal: MLX's CPU backend gathers float32 alone
        return mx.gather_mm(x, w, rhs_indices=rows)
    packed = (w["packed"], w["scales"], w["biases"])
    bits = 32 * w["packed"].shape[-1] // x.shape[-1]
    if rows is None:
        return mx.quantized_matmul(x, *packed, transpose=True, group_size=GROUP, bits=bits)
    return mx.gather_qmm(x, *packed, rhs_indices=rows, transpose=True, group_size=GROUP, bits=bits)


def _take(stack: mx.array, rows: mx.array | None) -> mx.array:
    """Rows of a stack of vectors, which is small enough to be copied."""
    return stack if rows is None else stack[rows]


def _dtype(w: Weight) -> mx.Dtype:
    return w.dtype if isinstance(w, mx.array) else w["scales"].dtype
