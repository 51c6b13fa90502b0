"""The fuser: every fused layer's keys and values in one batched pass (paper, section 3.2).

Parameters are stacked along two leading axes, (kind, layer) with kind in (keys, values), so a pass
is a dozen batched matmuls instead of two small networks per layer. One (kind, layer) is a *slice*;
keys and values never mix, nor do layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from c2c_mlx import device
from c2c_mlx.config import FuserConfig, Provenance
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion.project import GROUP, KV, Slices, message_mean, project, soft_gates

# Statistics and what gates are decided by: float32 whatever the rest is in.
FLOAT32 = ("gate_logit", "input_mean", "input_scale", "output_scale")

SHUT = 0.5  # where a message gate stands that lets nothing through at inference


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
        slices: S of them, keys before values.
        delta: [S, B, Hr, N, Dr] in the cache's dtype, gates and dynamic weights included.
        weight: [S, B, Hr, N, 1], the dynamic weights in [0, 1].
        votes: [1, B, N, 1] on the message gate, float32; None if the fuser has none.
        message_weight: [1, B, 1, N, 1], the message gate, float32; None before it is decided.
    """

    slices: Slices
    delta: mx.array
    weight: mx.array
    votes: mx.array | None = None
    message_weight: mx.array | None = None

    def added_to(self, receiver: KV) -> KV:
        """Keys and values [L, B, Hr, N, Dr] with the change; what is closed stays as it is."""
        layers = [list(x) for x in receiver]
        for (kind, layer), delta in zip(self.slices, self.delta, strict=True):
            layers[kind][layer] = layers[kind][layer] + delta
        keys, values = (mx.stack(x) for x in layers)
        return keys, values

    def unless_shut(self) -> Change:
        """The same, or zeros where the message gate leaves nothing of it.

        To find out, the votes are evaluated; the rest of the pass then is never computed.
        """
        if self.message_weight is None or mx.any(self.message_weight > SHUT).item():
            return self
        return replace(self, delta=mx.zeros_like(self.delta), weight=mx.zeros_like(self.weight))


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
        if config.bits:
            self.quantise(config.bits)

    @property
    def gates(self) -> np.ndarray:
        """[2, L] bool: which slices are open at inference; a kind that is not fused is closed."""
        gates = np.zeros((2, len(self.config.layer_map)), dtype=bool)
        # Strict: a fresh gate is closed. NumPy knows no bfloat16.
        gates[self.kinds] = np.array(self.gate_logit.astype(mx.float32)) > 0
        return gates

    @property
    def kinds(self) -> list[int]:
        """What is fused, the parameters' leading axis: 0 for keys, 1 for values."""
        return [("keys", "values").index(kind) for kind in self.config.fused_kinds]

    def set_gate(self, kind: int, layer: int, is_open: bool) -> None:
        """Opens or closes one slice; `layer` indexes the layer map, `kind` is 0 for keys."""
        row = self.kinds.index(kind)
        self.gate_logit[row, layer] = 1.0 if is_open else -1.0

    def cast(self, dtype: mx.Dtype) -> None:
        """Holds weights in this precision; gate logits and statistics stay in float32."""

        def held(name: str, p: mx.array) -> mx.array:
            if p.dtype == mx.uint32:  # packed
                return p
            return p.astype(mx.float32 if name in FLOAT32 else dtype)

        self.update(tree_map_with_path(held, self.parameters()))

    def quantise(self, bits: Literal[4, 8]) -> None:
        """Packs every weight whose rows divide into groups; the rest stays as it is."""
        self.config = replace(self.config, bits=bits)
        for module, name in self._weights():
            if module[name].shape[-1] % GROUP == 0:
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
        return self.gate([self.propose(sharer=sharer, receiver=receiver)], messages)[0]

    def propose(self, *, sharer: KV, receiver: KV) -> Change:
        """The change of some positions as if every message gate were open.

        Positions do not see each other until `gate`, so a long prompt may come in parts.
        """
        rows, slices = self._taking_part()
        batch, heads, length, head_dim = receiver[0].shape[1:]
        if not slices:
            empty = mx.zeros((0, batch, heads, length, head_dim), receiver[0].dtype)
            return Change([], empty, empty[..., :1])
        params = tree_map(lambda p: p.reshape(-1, *p.shape[2:]), self.parameters())
        dropout = self.config.dropout if self.training else 0.0
        p, s, votes = project(params, rows, sharer, receiver, slices, self.config, dropout)
        if self.training and self.temperature is not None:
            logit = params["gate_logit"].reshape(-1, 1, 1, 1, 1)
            uniform = mx.random.uniform(shape=s.shape)  # keys' noise before values'
            p = p * soft_gates(logit, uniform, self.temperature)
        return Change(slices, p.astype(receiver[0].dtype), s, votes)

    def gate(self, parts: Sequence[Change], messages: np.ndarray | None) -> list[Change]:
        """Decides the message gates, and takes the change off positions that are not to have one.

        Args:
            parts: from `propose`, of consecutive positions, N over all of them.
            messages: [B, N], see `change`.
        """
        if not parts[0].slices:
            return list(parts)
        weights: list[mx.array | None] = [None] * len(parts)
        ends = np.cumsum([part.delta.shape[3] for part in parts]).tolist()
        if parts[0].votes is not None:
            votes = mx.concatenate([cast(mx.array, part.votes) for part in parts], axis=2)
            decided = mx.sigmoid(message_mean(votes, messages))[:, :, None]  # [1, B, 1, N, 1]
            weights = list(mx.split(decided, ends[:-1], axis=3))
        gated = []
        for part, m, end in zip(parts, weights, ends, strict=True):
            delta, here = part.delta, None
            if m is not None:
                delta = delta * m.astype(delta.dtype)
                # Below a half nothing is added. While it learns, see `training.loss.fuse`.
                here = None if self.training else m > SHUT
            if messages is not None:
                at = messages[:, end - delta.shape[3] : end]
                if (at < 0).any():
                    member = mx.array((at >= 0)[None, :, None, :, None])
                    here = member if here is None else here & member
            # Not a product with 0: what is shut must be as if it had never been computed.
            delta = delta if here is None else mx.where(here, delta, mx.zeros_like(delta))
            gated.append(replace(part, delta=delta, message_weight=m))
        return gated

    def _taking_part(self) -> tuple[mx.array | None, Slices]:
        """Rows of the stacks that a pass needs (None: all), and the slices they are."""
        n_layers = len(self.config.layer_map)
        every = [(kind, layer) for kind in self.kinds for layer in range(n_layers)]
        if self.training and self.temperature is not None:
            return None, every
        is_open = self.gates[self.kinds].reshape(-1)
        if is_open.all():
            return None, every
        rows = np.flatnonzero(is_open)
        return mx.array(rows.astype(np.uint32)), [every[row] for row in rows]


def parameters(fuser: Fuser) -> dict[str, mx.array]:
    """Every parameter by the name that it has in fuser.safetensors."""
    return cast(dict[str, mx.array], tree_flatten(fuser.parameters(), destination={}))


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


def count(config: FuserConfig) -> int:
    """How many numbers a fuser's parameters are."""
    return sum(w.size for w in parameters(skeleton(config, 10**6, "the fuser")).values())


def positions_at_once(fuser: Fuser, itemsize: int, rows: int = 1) -> int:
    """Positions that a pass has room for, of each of so many rows of a batch."""
    weights = sum(w.nbytes for w in parameters(fuser).values())
    return max(device.fuser_pass(weights) // (itemsize * rows * pass_width(fuser.config)), 1)


def pass_width(config: FuserConfig) -> int:
    """Numbers that a pass over all slices holds per position, as measured at two sizes."""
    width = config.sharer.width + 3 * config.receiver.width
    inside = 7 * (config.hidden_dim + config.intermediate_dim)
    return len(config.fused_kinds) * len(config.layer_map) * (width + inside)
