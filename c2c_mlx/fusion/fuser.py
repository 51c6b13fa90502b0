"""The fuser: every fused layer's keys and values in one batched pass (paper, section 3.2).

Parameters are stacked along two leading axes, (kind, layer) with kind in (keys, values), so a pass
is a dozen batched matmuls instead of two small networks per layer. One (kind, layer) is a *slice*;
keys and values never mix, nor do layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from c2c_mlx import device
from c2c_mlx.config import FuserConfig, Provenance
from c2c_mlx.errors import C2CError

KV = tuple[mx.array, mx.array]
Weight = mx.array | dict[str, mx.array]  # dense [..., out, in]; or packed, scales and biases

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "silu": nn.silu,
    "relu": nn.relu,
}
NORM_EPS = 1e-6
GROUP = 64  # numbers of a row that share a scale once it is quantised


class StackedLinear(nn.Module):
    """One linear layer per slice: weight [..., out, in], bias [..., out]."""

    def __init__(self, stack: tuple[int, ...], in_dim: int, out_dim: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_dim)
        self.weight = mx.random.uniform(-bound, bound, (*stack, out_dim, in_dim))
        self.bias = mx.random.uniform(-bound, bound, (*stack, out_dim))


class StackedBlock(nn.Module):
    """One residual block per slice: x + w2(act(w1(rmsnorm(x)))), inner width `inner`."""

    def __init__(self, stack: tuple[int, ...], dim: int, inner: int) -> None:
        super().__init__()
        self.norm = mx.ones((*stack, dim))
        self.w1 = StackedLinear(stack, dim, inner).weight
        self.w2 = StackedLinear(stack, inner, dim).weight


@dataclass(frozen=True)
class Change:
    """What a fuser adds to the receiver's cache, for its open slices alone.

    Attributes:
        slices: [S] (kind, index into the layer map), kind 0 for keys and 1 for values.
        delta: [S, B, Hr, N, Dr], gate and dynamic weights included.
        weight: [S, B, Hr, N, 1], the dynamic weights in [0, 1].
        message_weight: [1, B, 1, N, 1], the message gate; None if the fuser has none.
    """

    slices: list[tuple[int, int]]
    delta: mx.array
    weight: mx.array
    message_weight: mx.array | None

    def added_to(self, receiver: KV, rows: Sequence[int] | None = None) -> KV:
        """The receiver's keys and values with the change; all that is closed stays as it is.

        Args:
            receiver: keys and values, each [M, B, Hr, N, Dr].
            rows: where among the M the layers of the fuser's layer map stand; None: they are all.
        """
        fused = list(receiver)
        for kind in (0, 1):
            at = [i for i, (k, _) in enumerate(self.slices) if k == kind]
            if not at:
                continue
            layers = [self.slices[i][1] for i in at]
            changed = layers if rows is None else [rows[layer] for layer in layers]
            x, delta = fused[kind], self.delta[at[0] : at[-1] + 1]
            order = np.arange(len(x))
            if changed == order.tolist():
                fused[kind] = x + delta
                continue
            order[changed] = len(x) + np.arange(len(changed))
            fused[kind] = mx.concatenate([x, x[mx.array(changed)] + delta])[mx.array(order)]
        return fused[0], fused[1]


class Fuser(nn.Module):
    """The trained part of C2C: projects the sharer's cache into the receiver's.

    A fresh fuser has every gate closed and so is the identity.
    """

    def __init__(self, config: FuserConfig) -> None:
        super().__init__()
        self.config = config
        self.provenance = Provenance()
        # Of the Gumbel-sigmoid gates in training; None: gates are hard in training, too.
        self.temperature: float | None = 1.0
        stack = (len(config.fused_kinds), len(config.layer_map))
        hidden, inner = config.hidden_dim, config.intermediate_dim
        in_dim = config.sharer.width + config.receiver.width
        self.proj_in = StackedLinear(stack, in_dim, hidden)
        self.mlp1 = StackedBlock(stack, hidden, inner)
        self.scalar_mlp2 = StackedBlock(stack, hidden, hidden)
        self.scalar_head = StackedLinear(stack, hidden, config.receiver.kv_heads)
        self.proj_mlp2 = [StackedBlock(stack, hidden, inner) for _ in range(config.depth - 2)]
        self.proj_out = StackedLinear(stack, hidden, config.receiver.width)
        self.gate_logit = mx.zeros(stack)
        if config.message_gate:
            self.message_head = StackedLinear(stack, hidden, 1)
        if config.normalise:
            self.input_mean = mx.zeros((*stack, in_dim))
            self.input_scale = mx.ones((*stack, in_dim))
            self.output_scale = mx.ones((*stack, config.receiver.width))
            self.freeze(keys=["input_mean", "input_scale", "output_scale"], recurse=False)
        self._selected: tuple[list[mx.array], list[tuple[int, int]], dict[str, Any]] | None = None
        if config.bits:
            self.quantise(config.bits)

    @property
    def gates(self) -> np.ndarray:
        """[2, L] bool: which slices are open at inference; a kind that is not fused is closed."""
        gates = np.zeros((2, len(self.config.layer_map)), dtype=bool)
        gates[self.kinds] = np.array(self.gate_logit) > 0
        return gates

    def quantise(self, bits: Literal[4, 8]) -> None:
        """Packs every weight whose rows divide into groups; the rest stays as it is."""
        self.config = replace(self.config, bits=bits)
        halves = (self.config.sharer.width, self.config.receiver.width)
        for module, name in self._weights():
            widths = halves if module is self.proj_in else (module[name].shape[-1],)
            if all(width % GROUP == 0 for width in widths):
                packed, scales, biases = mx.quantize(module[name], GROUP, bits)
                module[name] = {"packed": packed, "scales": scales, "biases": biases}

    def dequantise(self) -> None:
        """Makes every weight dense: for training, and for the CPU."""
        for module, name in self._weights():
            if isinstance(w := module[name], dict):
                module[name] = mx.dequantize(
                    w["packed"], w["scales"], w["biases"], GROUP, self.config.bits
                )
        self.config = replace(self.config, bits=0)

    def _weights(self) -> Iterator[tuple[nn.Module, str]]:
        for module in self.modules():
            if isinstance(module, (StackedLinear, StackedBlock)):
                yield from ((module, name) for name in ("weight", "w1", "w2") if name in module)

    def set_gate(self, kind: int, layer: int, is_open: bool) -> None:
        """Opens or closes one slice; `layer` indexes the layer map, `kind` is 0 for keys."""
        row = self.kinds.index(kind)
        self.gate_logit[row, layer] = 1.0 if is_open else -1.0

    @property
    def kinds(self) -> list[int]:
        """What is fused, the parameters' leading axis: 0 for keys, 1 for values."""
        return [("keys", "values").index(kind) for kind in self.config.fused_kinds]

    def __call__(self, *, sharer: KV, receiver: KV, messages: np.ndarray | None = None) -> KV:
        """Fuses two caches (paper, Eq. 4): receiver + gate * weight * projection.

        Args:
            sharer: keys and values, each [L, B, Hs, N, Ds], L over the layer map.
            receiver: keys and values, each [L, B, Hr, N, Dr].
            messages: see `change`.

        Returns:
            Keys and values, each [L, B, Hr, N, Dr]. Closed slices come back as they are.
        """
        change = self.change(sharer=sharer, receiver=receiver, messages=messages)
        return change.added_to(receiver)

    def change(self, *, sharer: KV, receiver: KV, messages: np.ndarray | None = None) -> Change:
        """The change alone, for the open slices alone; nothing is computed for the others.

        In training there is dropout, and every slice takes part with a Gumbel-sigmoid gate.

        Args:
            sharer: keys and values, each [L, B, Hs, N, Ds], L over the layer map.
            receiver: keys and values, each [L, B, Hr, N, Dr].
            messages: [B, N] the number of the message that a position belongs to, -1 where nothing
                is to be added; None: one message.
        """
        slices, params = self._select()
        heads, head_dim = self.config.receiver.kv_heads, self.config.receiver.head_dim
        batch, length = receiver[0].shape[1], receiver[0].shape[3]
        if not slices:
            empty = mx.zeros((0, batch, heads, length, head_dim), receiver[0].dtype)
            return Change([], empty, empty[..., :1], None)
        p, s, score = self._project(params, sharer, receiver, slices)
        p = p.reshape(len(slices), batch, length, heads, head_dim).transpose(0, 1, 3, 2, 4)
        s = s.reshape(len(slices), batch, length, heads, 1).transpose(0, 1, 3, 2, 4)
        weight, m = s, None
        if score is not None:
            m = mx.sigmoid(_message_mean(score, messages))[:, :, None]  # [1, B, 1, N, 1]
            # As the paper's gate: soft while it learns, then nothing is added below a half.
            weight = weight * (m if self.training else mx.where(m > 0.5, m, 0.0))
        if messages is not None and (messages < 0).any():
            weight = weight * mx.array((messages >= 0)[None, :, None, :, None], weight.dtype)
        if self.training and self.temperature is not None:
            logit = params["gate_logit"].reshape(-1, 1, 1, 1, 1)
            uniform = mx.random.uniform(shape=weight.shape)  # keys' noise before values'
            weight = weight * soft_gates(logit, uniform, self.temperature)
        return Change(slices, weight * p, s, m)

    def _project(
        self, params: dict[str, Any], sharer: KV, receiver: KV, slices: list[tuple[int, int]]
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """`project`, at inference in parts of which each fits into `device.fuser_pass`."""
        if self.training:
            return project(params, sharer, receiver, slices, self.config, self.config.dropout)
        length = receiver[0].shape[3]
        size = receiver[0].itemsize * receiver[0].shape[1] * pass_width(self.config)
        step = max(device.fuser_pass() // size, 1)
        if length <= step:
            return project(params, sharer, receiver, slices, self.config)
        parts = []
        for at in range(0, length, step):
            here = np.s_[..., at : at + step, :]
            (sk, sv), (rk, rv) = sharer, receiver
            pairs = (sk[here], sv[here]), (rk[here], rv[here])
            parts.append(project(params, *pairs, slices, self.config))
            mx.eval(parts[-1])
        p, s, score = map(list, zip(*parts, strict=True))
        voted = mx.concatenate(score, axis=2) if self.config.message_gate else None
        return mx.concatenate(p, axis=2), mx.concatenate(s, axis=2), voted

    def _select(self) -> tuple[list[tuple[int, int]], dict[str, Any]]:
        """The slices that take part, and their parameters with one leading axis [S, ...]."""
        n_layers = len(self.config.layer_map)
        every = [(kind, layer) for kind in self.kinds for layer in range(n_layers)]
        parameters = self.parameters()
        if self.training and self.temperature is not None:
            return every, tree_map(lambda p: p.reshape(-1, *p.shape[2:]), parameters)
        flat: dict[str, mx.array] = tree_flatten(parameters, destination={})  # type: ignore[assignment]
        leaves = list(flat.values())
        is_open = np.array(self.gate_logit).reshape(-1) > 0  # strict: a fresh gate is closed
        slices = [s for s, o in zip(every, is_open, strict=True) if o]
        known = self._selected
        # Gates are compared by value: they may be written in place, in the same array object.
        if (
            known is None
            or known[1] != slices
            or any(a is not b for a, b in zip(known[0], leaves, strict=True))
        ):
            rows = mx.array(np.flatnonzero(is_open))
            select = tree_map(
                lambda p: (
                    p.reshape(-1, *p.shape[2:])[rows]
                    if not is_open.all()
                    else p.reshape(-1, *p.shape[2:])
                ),
                parameters,
            )
            known = (leaves, slices, select)
            self._selected = known
        return known[1], known[2]


def skeleton(config: FuserConfig, n_tensors: int, where: str) -> Fuser:
    """A fuser whose random weights are not computed unless somebody asks for them.

    Args:
        config: untrusted; what it asks for may be absurd.
        n_tensors: how many tensors there are to fill it.
        where: named in the message of an error.

    Raises:
        C2CError: if the configuration can't be that of `n_tensors` tensors.
    """
    try:
        if config.depth > n_tensors:
            raise ValueError
        return Fuser(config)
    except (ValueError, TypeError, OverflowError, RuntimeError):
        raise C2CError(f"{where}: its description does not fit its {n_tensors} tensors") from None


def parameters(fuser: Fuser) -> dict[str, mx.array]:
    """Every parameter by the name that it has in fuser.safetensors."""
    return cast(dict[str, mx.array], tree_flatten(fuser.parameters(), destination={}))


def pass_width(config: FuserConfig) -> int:
    """Numbers that a pass over all slices holds per position, as measured at two sizes."""
    width = config.sharer.width + 3 * config.receiver.width
    inside = 7 * (config.hidden_dim + config.intermediate_dim)
    return len(config.fused_kinds) * len(config.layer_map) * (width + inside)


def soft_gates(logit: mx.array, uniform: mx.array, temperature: float) -> mx.array:
    """The gates in training: sigmoid of the logit plus one Gumbel variate (paper, Eq. 6).

    Args:
        logit: gate logits, broadcastable to `uniform`.
        uniform: uniform noise in [0, 1), one per (slice, batch, head, position).
        temperature: near 0 the gates are almost hard.
    """
    noise = -mx.log(-mx.log(uniform + 1e-20) + 1e-20)
    return mx.sigmoid((logit + noise) / temperature)


def project(
    params: dict[str, Any],
    sharer: KV,
    receiver: KV,
    slices: list[tuple[int, int]],
    config: FuserConfig,
    dropout: float = 0.0,
) -> tuple[mx.array, mx.array, mx.array | None]:
    """The maths of one pass over S slices.

    Args:
        params: the fuser's parameters with one leading axis [S, ...].
        sharer: keys and values, each [L, B, Hs, N, Ds].
        receiver: keys and values, each [L, B, Hr, N, Dr].
        slices: which of them, keys before values.
        config: the fuser's configuration.
        dropout: probability of dropping a channel inside a block.

    Returns:
        The projection [S, B, N, Hr*Dr], the dynamic weights [S, B, N, Hr], and the votes on the
        message gate [1, B, N, 1] or None.
    """
    shape = (len(slices), receiver[0].shape[1], receiver[0].shape[3], -1)
    act = ACTIVATIONS[config.activation]
    h, width = params["proj_in"]["bias"][:, None], config.sharer.width
    # The two caches have a part of the weights each; laying them side by side would be a copy.
    for side, part in ((sharer, slice(width)), (receiver, slice(width, None))):
        x = _rows(side, slices).flatten(1, 2)
        if config.normalise:
            mean, scale = (params[f"input_{n}"][:, None, part] for n in ("mean", "scale"))
            x = (x - mean) * scale
        h = _plus_product(h, x, _columns(params["proj_in"]["weight"], part))
    h = _block(params["mlp1"], h, act, dropout)
    s = _block(params["scalar_mlp2"], h, act, dropout)
    s = mx.sigmoid(_linear(params["scalar_head"], s))
    p = h
    for block in params["proj_mlp2"]:
        p = _block(block, p, act, dropout)
    p = _linear(params["proj_out"], p)
    if config.normalise:
        p = p * params["output_scale"][:, None]
    score = None
    if config.message_gate:
        # All slices vote on one gate: thirty gates of their own would leave some open by mistake.
        score = _linear(params["message_head"], h).reshape(shape).mean(axis=0, keepdims=True)
    return p.reshape(shape), s.reshape(shape), score


def _message_mean(score: mx.array, messages: np.ndarray | None) -> mx.array:
    """Replaces each position's score [1, B, N, 1] by the mean over its message."""
    if messages is None:
        return mx.broadcast_to(score.mean(axis=2, keepdims=True), score.shape)
    member = messages[..., None] == np.arange(max(messages.max(), 0) + 1)  # [B, N, M]
    mean = member / np.maximum(member.sum(axis=1, keepdims=True), 1)
    spread = mx.array(member.astype(np.float32))
    return spread @ (mx.array(mean.astype(np.float32)).swapaxes(1, 2) @ score)


def inputs(sharer: KV, receiver: KV, slices: list[tuple[int, int]]) -> mx.array:
    """[S, B, N, Hs*Ds + Hr*Dr]: the two caches of each slice side by side, the sharer's first."""
    return mx.concatenate([_rows(sharer, slices), _rows(receiver, slices)], axis=-1)


def _rows(kv: KV, slices: list[tuple[int, int]]) -> mx.array:
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


def _linear(params: dict[str, Any], x: mx.array) -> mx.array:
    return _plus_product(params["bias"][:, None], x, params["weight"])


def _plus_product(c: mx.array, x: mx.array, w: Weight) -> mx.array:
    """The sum of `c` and the product of x [S, N, in] with a weight [S, out, in]."""
    return mx.addmm(c, x, w.swapaxes(-1, -2)) if isinstance(w, mx.array) else c + _product(x, w)


def _product(x: mx.array, w: Weight) -> mx.array:
    if isinstance(w, mx.array):
        return x @ w.swapaxes(-1, -2)
    bits = 32 * w["packed"].shape[-1] // x.shape[-1]
    return mx.quantized_matmul(
        x, w["packed"], w["scales"], w["biases"], transpose=True, group_size=GROUP, bits=bits
    )


def _columns(w: Weight, part: slice) -> Weight:
    """Some of a weight's input channels; of a quantised one, whole groups."""
    if isinstance(w, mx.array):
        return w[..., part]
    width = GROUP * w["scales"].shape[-1]
    start, stop, _ = part.indices(width)
    return {
        name: x[..., start * x.shape[-1] // width : stop * x.shape[-1] // width]
        for name, x in w.items()
    }


def _block(
    params: dict[str, Any], x: mx.array, act: Callable[[mx.array], mx.array], dropout: float
) -> mx.array:
    norm = mx.fast.rms_norm(x, None, NORM_EPS) * params["norm"][:, None]
    y = _product(act(_product(norm, params["w1"])), params["w2"])
    if dropout:
        y = y * mx.random.bernoulli(1 - dropout, y.shape) / (1 - dropout)
    return x + y
