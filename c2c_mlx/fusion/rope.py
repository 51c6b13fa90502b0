"""Rotary position embeddings: taken off keys and put on again, whatever variant a model uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE
from mlx_lm.models.smollm3 import NoPE

from c2c_mlx.errors import C2CError


def rope_of(model: nn.Module, layer: int, name: str) -> Any:
    """The rotary embedding of one layer: a callable (x [B, H, N, D], offset) -> rotated x.

    Of a layer that is known to rotate nothing, as every fourth one of some models, it gives back x.

    Raises:
        C2CError: if the layer has none that can be found.
    """
    modules = model.layers[layer].named_modules()
    if any(_rotates_nothing(module) for _, module in modules):
        return NoPE()
    for path, module in modules:
        if path.rsplit(".", 1)[-1] in ("rope", "rotary_emb"):
            return module
    raise C2CError(f"{name}: layer {layer} has no rotary embedding; train with rotated_keys: true")


def _rotates_nothing(module: nn.Module) -> bool:
    """Whether this is attention whose keys know no positions, in the words of mlx-lm's models."""
    says = vars(module)
    # Cohere 2 has a rotary embedding there as well, and leaves it alone.
    is_told = says.get("use_rope", True) and says.get("use_sliding_window", True)
    return not is_told or says.get("rope", module) is None


class Rotation:
    """The rotary embeddings of several layers; those that are alike rotate in one pass.

    Args:
        model: an mlx-lm model.
        layers: L of its layers.
        name: of the model, in the message of an error.

    Raises:
        C2CError: if a layer has none that can be found.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], name: str) -> None:
        self.name = name
        self._ropes: list[Any] = []
        self._rope_of: list[int] = []  # per layer, into `_ropes`
        for layer in layers:
            rope = rope_of(model, layer, name)
            alike = (i for i, known in enumerate(self._ropes) if _alike(rope, known))
            self._rope_of.append(next(alike, len(self._ropes)))
            if self._rope_of[-1] == len(self._ropes):
                self._ropes.append(rope)

    def put_on(self, x: mx.array, offset: Any, rows: Sequence[int] | None = None) -> mx.array:
        """Rotates (and scales) [S, B, H, N, D] that stands at positions offset, offset + 1, ...

        Args:
            x: keys, or what is to be added to keys.
            offset: the position of the first of the N, an int or [B].
            rows: the S rows as indices into the L layers; None: all of them.

        Raises:
            C2CError: as `take_off` does.
        """
        return self._each(lambda rope, x, offset: rope(x, offset=offset), x, offset, rows)

    def take_off(self, x: mx.array, offset: Any) -> mx.array:
        """Undoes what RoPE did to keys [L, B, H, N, D] at positions offset, offset + 1, ...

        Raises:
            C2CError: if the rotation depended on how long the context was.
        """
        return self._each(unrotate, x, offset, None)

    def _each(
        self,
        turn: Callable[[Any, mx.array, Any], mx.array],
        x: mx.array,
        offset: Any,
        rows: Sequence[int] | None,
    ) -> mx.array:
        ropes = np.array(self._rope_of)[slice(None) if rows is None else list(rows)]
        order = np.argsort(ropes, kind="stable")
        parts = []
        for number in sorted({*ropes.tolist()}):
            part = x if (ropes == number).all() else x[mx.array(np.flatnonzero(ropes == number))]
            at = mx.tile(offset, part.shape[0]) if isinstance(offset, mx.array) else offset
            self._check_length(self._ropes[number], x.shape[3], offset)
            turned = turn(self._ropes[number], part.flatten(0, 1), at)
            parts.append(turned.reshape(part.shape))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)[mx.array(np.argsort(order))]

    def _check_length(self, rope: Any, n: int, offset: Any) -> None:
        """Dynamic RoPE turns beyond its trained length as far as the context is long by then."""
        if not isinstance(rope, DynamicNTKScalingRoPE):
            return
        last: Any = offset.max().item() if isinstance(offset, mx.array) else offset
        end = n + int(last)
        if end > rope.max_position_embeddings:
            raise C2CError(
                f"{self.name}: its rotary embedding can be undone up to position "
                f"{rope.max_position_embeddings} alone: shorten the conversation, or train with "
                "rotated_keys: true"
            )


def unrotate(rope: Any, keys: mx.array, start: Any) -> mx.array:
    """Takes the rotation off keys [B, H, N, D] that stand at positions start, start + 1, ...

    A rotation is undone by its transpose, which is what its gradient is multiplied by: so this
    works for every RoPE variant without knowing its frequencies, and without the negative offset
    that Metal's kernel takes for one near 2^32. Some variants (yarn, longrope) scale as well, and
    then both did.
    """
    (bare,) = mx.vjp(lambda x: rope(x, offset=start), [keys], [keys])[1]
    scale = _scale(rope, keys.shape[3])
    return bare if scale is None else bare / mx.square(scale).astype(keys.dtype)


def _scale(rope: Any, head_dim: int) -> mx.array | None:
    """What RoPE scales by, [D]: at position 0 nothing turns. None if it does not scale."""
    if not {"mscale", "_scale"} & vars(rope).keys():  # mlx-lm's names; most variants have neither
        return None
    scale: mx.array = rope(mx.ones((1, 1, 1, head_dim)), offset=0)
    return scale


def _alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules of one kind have equal settings and equal arrays."""
    if type(a) is not type(b) or vars(a) != vars(b):
        return False
    ours: list[Any] = tree_flatten(dict(a))  # type: ignore[assignment]
    theirs: list[Any] = tree_flatten(dict(b))  # type: ignore[assignment]
    return [name for name, _ in ours] == [name for name, _ in theirs] and all(
        bool(mx.array_equal(x, y)) for (_, x), (_, y) in zip(ours, theirs, strict=True)
    )
