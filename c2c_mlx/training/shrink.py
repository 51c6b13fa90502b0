"""A big fuser made small in closed form: a narrower one of the same kind, begun from its weights.

The hidden channels of a slice are one residual stream: linear maps lead in and out, blocks add to
it, and an RMSNorm sees nothing of a rotation. So the stream is turned to its principal axes, which
is exact, and the last of them are left out. Where a block's activation stands nothing can be
turned: of its inner channels those are kept that explain best what the block adds, and the product
behind them is fitted anew by least squares, which makes good some of what was cut before. What
leads out of the stream is fitted likewise. The result is an ordinary fuser, of a lower rank
between the caches (hidden_dim is below both of their widths) without a field that says so.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from c2c_mlx.config import FuserConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.fuser import Fuser, count
from c2c_mlx.fusion.project import ACTIVATIONS, GROUP, Activation, block, inner, inputs, linear
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training.batch import collate
from c2c_mlx.training.dataset import Example
from c2c_mlx.training.prefills import Prefiller

POSITIONS = 4096  # that the small weights are fitted to, at most
_RIDGE = 1e-3  # of the channels' mean energy; keeps a fit to few positions from running away
_WHOLE = 8  # widths are multiples of it where that costs little; wide ones of GROUP, to be packed

Params = dict[str, Any]  # of one slice, in stacks of one: [1, ...]


def smaller(config: FuserConfig, share: float) -> FuserConfig:
    """The widest fuser in a big one's proportions with at most a share of its parameters.

    Its widths are rounded down, so it may be somewhat smaller. It has no dropout: it imitates, and
    there is nothing that it could learn by heart.

    Args:
        config: the big one's.
        share: above 0 and below 1.

    Raises:
        C2CError: if not even a single channel is as small as that.
    """
    config = replace(config, bits=0, dropout=0.0)

    def narrowed(hidden: int) -> FuserConfig:
        inner = max(round(config.intermediate_dim * hidden / config.hidden_dim), 1)
        return replace(config, hidden_dim=hidden, intermediate_dim=inner)

    every = range(1, config.hidden_dim)
    size = count(config)
    widest = bisect_right(every, share * size, key=lambda hidden: count(narrowed(hidden)))
    if not widest:
        why = "it has a single channel"
        if every:
            why = f"a single channel takes {count(narrowed(1)) / size:.1%}"
        raise C2CError(f"--to {share:.3g}: this fuser can't be made so small, {why}")
    whole = GROUP if widest >= 2 * GROUP else _WHOLE if widest > 8 * _WHOLE else 1
    return narrowed(widest - widest % whole)


def read(
    c2c: C2C, prefiller: Prefiller, examples: Sequence[Example], batch_size: int
) -> list[mx.array]:
    """What the slices of a fuser read in the prompts of these examples, parts [S, N, in] float32.

    Raises:
        C2CError: if nothing in the examples is fused.
    """
    config = c2c.fuser.config
    slices = [(kind, at) for kind in c2c.fuser.kinds for at in range(len(config.layer_map))]
    found: list[mx.array] = []
    n = 0
    for at in range(0, len(examples), batch_size):
        batch = collate(examples[at : at + batch_size], config.positions)
        if batch.start == batch.stop or n >= POSITIONS:
            continue
        prefills = prefiller(batch)
        part = step_loss.read_receiver(c2c, prefills.own, batch)
        view = c2c.fuser_view(part, step_loss.first_position(batch))
        rows = np.flatnonzero(batch.messages.reshape(-1) >= 0)[: POSITIONS - n]
        found.append(inputs(prefills.sharer, view, slices).flatten(1, 2)[:, mx.array(rows)])
        n += len(rows)
        mx.eval(found)
        mx.clear_cache()  # the next batch has another shape
    if not found:
        raise C2CError("the data has no message to fuse")
    return found


def begin(
    small: Fuser,
    big: Fuser,
    parts: Sequence[mx.array],
    tell: Callable[[int, int], None] = lambda i, n: None,
) -> None:
    """Sets the weights of a small fuser from a big one's.

    Args:
        small: of the shape that `smaller` gives, or any other no wider than the big one.
        big: dense.
        parts: each [S, N, in], what its slices read, from `read`.
        tell: called now and then with the slices that are done, and all of them.
    """
    stack = (len(small.config.fused_kinds), len(small.config.layer_map))
    found, slices = [], len(parts[0])
    for i in range(slices):
        if i % 10 == 0:
            tell(i, slices)
        one = tree_map(
            lambda p, i=i: p.reshape(-1, *p.shape[2:])[i : i + 1].astype(mx.float32),
            big.parameters(),
        )
        x = mx.concatenate([part[i : i + 1] for part in parts], axis=1)
        found.append(_cut(one, x, small.config))
        mx.eval(found[-1])
    tell(slices, slices)
    small.update(
        tree_map(lambda *of: mx.concatenate(list(of)).reshape(*stack, *of[0].shape[1:]), *found)
    )
    mx.eval(small.parameters())


def _cut(p: Params, x: mx.array, config: FuserConfig) -> Params:
    """One slice with the widths of `config`, fitted to what it reads, x [1, N, in]."""
    act = ACTIVATIONS[config.activation]
    if config.normalise:
        x = (x - p["input_mean"]) * p["input_scale"]
    first = linear(p["proj_in"], None, x)
    h = block(p["mlp1"], None, first, act)
    s = block(p["scalar_mlp2"], None, h, act)
    path = [h]
    for part in p["proj_mlp2"]:
        path.append(block(part, None, path[-1], act))
    axes = _principal([first, s, *path], config.hidden_dim)

    new = dict(p)
    weight, bias = (p["proj_in"][name] for name in ("weight", "bias"))
    new["proj_in"] = {"weight": axes.T @ weight, "bias": bias @ axes}
    z = linear(new["proj_in"], None, x)
    cutting = _Cutting(axes, act)
    new["mlp1"], h_small = cutting.block(p["mlp1"], first, h, z, config.intermediate_dim)
    new["scalar_mlp2"], s_small = cutting.block(p["scalar_mlp2"], h, s, h_small, config.hidden_dim)
    new["proj_mlp2"], z = [], h_small
    for part, before, after in zip(p["proj_mlp2"], path[:-1], path[1:], strict=True):
        cut, z = cutting.block(part, before, after, z, config.intermediate_dim)
        new["proj_mlp2"].append(cut)
    for name, of_big, of_small in (
        ("scalar_head", s, s_small),
        ("proj_out", path[-1], z),
        ("message_head", h, h_small),
    ):
        if name in p:
            new[name] = _fitted(of_small, linear(p[name], None, of_big))
    return new


class _Cutting:
    """How blocks lose channels.

    Args:
        axes: [H, H'] of the stream that stay, orthonormal.
        act: the fuser's activation.
    """

    def __init__(self, axes: mx.array, act: Activation) -> None:
        self.axes, self.act = axes, act

    def block(
        self, p: Params, before: mx.array, after: mx.array, z: mx.array, width: int
    ) -> tuple[Params, mx.array]:
        """A narrow block that leads from z to the axes of what a wide one leads to.

        Args:
            p: the wide block.
            before: [1, N, H], what it was fed.
            after: [1, N, H], what it made of it.
            z: [1, N, H'], what the narrow one is fed.
            width: of the inner channels that stay.

        Returns:
            The narrow block, and what it makes of z.
        """
        # A norm divides by the length of what is left; this gives it that of all.
        left = mx.square(z).sum() / mx.maximum(mx.square(before).sum(), 1e-20)
        scale = mx.sqrt(left * self.axes.shape[0] / self.axes.shape[1])
        new = {"norm": mx.full((1, z.shape[-1]), scale)}
        new["w1"] = (p["w1"] * p["norm"][:, None]) @ self.axes
        channels = np.array(inner(new, None, z, self.act)[0])
        wanted = np.array((after @ self.axes - z)[0])
        kept = _explaining(channels, wanted, width)
        new["w1"] = new["w1"][:, mx.array(kept)]
        new["w2"] = mx.array(_least_squares(channels[:, kept], wanted).T)[None]
        return new, block(new, None, z, self.act)


def _principal(states: Sequence[mx.array], n: int) -> mx.array:
    """The first n principal axes [H, n] of states [1, N, H], each position of the same length.

    For it is the direction that a norm sees.
    """
    x = mx.concatenate([mx.fast.rms_norm(s[0], None, 1e-6) for s in states])
    _, axes = np.linalg.eigh(np.array(x.T @ x).astype(np.float64))
    return mx.array(np.ascontiguousarray(axes[:, ::-1][:, :n]).astype(np.float32))


def _explaining(x: np.ndarray, y: np.ndarray, n: int) -> np.ndarray:
    """The n columns of x [N, I], in order, of which y [N, H] is a sum: orthogonal matching pursuit.

    Each is the one that leaves least of y when it joins those before it.
    """
    if n >= x.shape[1]:
        return np.arange(x.shape[1])
    gram, rest = (x.T @ x).astype(np.float64), (x.T @ y).astype(np.float64)
    least = 1e-6 * gram.diagonal().max() + 1e-20
    chosen = np.zeros(len(gram), dtype=bool)
    for _ in range(n):
        own = gram.diagonal()
        gain = np.where(own > least, np.square(rest).sum(axis=1) / np.maximum(own, least), 0.0)
        best = int(np.where(chosen, -1.0, gain).argmax())
        chosen[best] = True
        if own[best] > least:  # else it is a sum of the others, or always zero
            share = gram[:, best] / own[best]
            rest -= np.outer(share, rest[best])
            gram -= np.outer(share, gram[best])
    return np.flatnonzero(chosen)


def _least_squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The w [I, H] with the smallest |x w - y|, by ridge regression; x is [N, I]."""
    gram = (x.T @ x).astype(np.float64)
    gram[np.diag_indices_from(gram)] += _RIDGE * gram.trace() / len(gram) + 1e-12
    return cast(np.ndarray, np.linalg.solve(gram, (x.T @ y).astype(np.float64))).astype(np.float32)


def _fitted(x: mx.array, y: mx.array) -> Params:
    """The linear layer that leads from x [1, N, H'] to y [1, N, out] as nearly as it can."""
    a, b = np.array(x[0]), np.array(y[0])
    weight = _least_squares(a - a.mean(axis=0), b - b.mean(axis=0))
    bias = b.mean(axis=0) - a.mean(axis=0) @ weight
    return {"weight": mx.array(weight.T)[None], "bias": mx.array(bias)[None]}
