"""Keys and values of any attention cache, stacked over layers.

With `padded`, the only file that knows mlx-lm's cache classes. A *layer* here is an index into the
cache list. Layers without keys and values (state-space layers of hybrids) are skipped by
`attention_layers` and carried along untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from c2c_mlx.config import ModelShape
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion.padded import PaddedCache

Cache = list[Any]  # an mlx-lm prompt cache: one cache object per layer

_ATTENTION = (KVCache, RotatingKVCache, QuantizedKVCache)


class StackedKV(NamedTuple):
    """Keys and values of several layers over the same positions."""

    keys: mx.array  # [L, B, H, N, D]
    values: mx.array  # [L, B, H, N, D]

    def of(self, rows: Sequence[int]) -> StackedKV:
        """Some of the layers."""
        if list(rows) == list(range(len(self.keys))):
            return self
        at = mx.array(list(rows))
        return StackedKV(self.keys[at], self.values[at])


def make_cache(model: nn.Module) -> Cache:
    """An empty prompt cache that never forgets a position.

    A sliding-window layer gets a plain cache: its mask still applies the window, and every position
    of the prompt stays there to be fused and to be rolled back to.
    """
    cache = make_prompt_cache(model)
    return [KVCache() if isinstance(c, RotatingKVCache) else c for c in cache]


def attention_layers(cache: Cache) -> list[int]:
    """The layers that hold keys and values."""
    return [i for i, c in enumerate(cache) if isinstance(c, _ATTENTION)]


def model_shape(model: nn.Module, name: str, tokenizer: str = "") -> ModelShape:
    """Reads KV heads and head_dim off a one-token pass that is built but never evaluated.

    Raises:
        C2CError: if the model's layers differ in shape, which no fuser can stack.
    """
    cache = make_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=cache)
    layers = attention_layers(cache)
    shapes = {(c.keys.shape[1], c.keys.shape[3], c.values.shape[3]) for c in _pick(cache, layers)}
    if len(shapes) != 1 or len({d for _, *dims in shapes for d in dims}) != 1:
        raise C2CError(
            f"{name}: its layers hold keys and values of different shapes; not supported"
        )
    heads, head_dim, _ = shapes.pop()
    return ModelShape(name, len(cache), heads, head_dim, tokenizer)


def length(cache: Cache) -> int:
    """Positions that every layer holds."""
    return min((c.offset for c in _pick(cache, attention_layers(cache))), default=0)


def trim(cache: Cache, n: int) -> bool:
    """Rolls back to the first `n` positions; False if a layer can't (state-space layers).

    Some layers may hold more than others: those that a pass had reached when it was interrupted.
    """
    longest = max((c.offset for c in _pick(cache, attention_layers(cache))), default=0)
    if longest <= n:
        return True
    if not all(c.is_trimmable() for c in cache):
        return False
    for c in cache:
        c.trim(max(getattr(c, "offset", longest) - n, 0))
    return True


def read(cache: Cache, layers: Sequence[int], start: int, stop: int) -> StackedKV:
    """Keys and values of `layers` (repeats allowed) at positions [start, stop), dequantised."""
    pairs = {i: _positions(cache[i], start, stop) for i in set(layers)}
    return StackedKV(*(mx.stack([pairs[i][kind] for i in layers]) for kind in (0, 1)))


def append(cache: Cache, layer: int, keys: mx.array, values: mx.array) -> None:
    """Adds positions to one layer; keys and values are [B, H, N, D]."""
    cache[layer].update_and_fetch(keys, values)


def replace(cache: Cache, layer: int, keys: mx.array, values: mx.array) -> None:
    """Puts keys and values [B, H, N, D] in the place of one layer's last N positions."""
    cache[layer].trim(keys.shape[2])
    append(cache, layer, keys, values)


def copy_state(source: Cache, target: Cache) -> None:
    """Hands the state of layers without keys and values over; the arrays are shared."""
    for s, t in zip(source, target, strict=True):
        if not isinstance(s, _ATTENTION):
            t.state = tree_map(lambda x: x, s.state)  # never the list that the source writes into


def merge(caches: Sequence[Cache]) -> Cache:
    """One batch of several caches, whatever their lengths; they stay as they are."""
    rows = (mergeable(cache) for cache in caches)
    return [layers[0].merge(list(layers)) for layers in zip(*rows, strict=True)]


def mergeable(cache: Cache) -> Cache:
    """The same cache, for mlx-lm to make a batch of it and others; padding then stays padding."""
    return [PaddedCache(c) if type(c) is KVCache else c for c in cache]


def arrays(cache: Cache) -> list[Any]:
    """What to evaluate so that the cache holds numbers, not a graph."""
    return [c.state for c in cache if not c.empty()]


def rope_of(model: nn.Module, layer: int, name: str) -> Any:
    """The rotary embedding of one layer: a callable (x [B, H, N, D], offset) -> rotated x.

    Raises:
        C2CError: if the layer has none that can be found.
    """
    for path, module in model.layers[layer].named_modules():
        if path.rsplit(".", 1)[-1] in ("rope", "rotary_emb"):
            return module
    raise C2CError(f"{name}: layer {layer} has no rotary embedding; train with rotated_keys: true")


class _Given:
    """One layer for one pass: it takes keys and values that are known already.

    What the model computes for the same positions is dropped.
    """

    def __init__(self, layer: Any, keys: mx.array, values: mx.array) -> None:
        self._layer, self._keys, self._values = layer, keys, values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """mlx-lm's cache protocol."""
        return self._layer.update_and_fetch(self._keys, self._values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def giving(cache: Cache, given: StackedKV) -> Cache:
    """The cache for one pass over N positions whose keys and values are `given`.

    Args:
        cache: grows by N positions in the pass.
        given: over the attention layers, [L, B, H, N, D].
    """
    layers = list(cache)
    for i, keys, values in zip(attention_layers(cache), *given, strict=True):
        layers[i] = _Given(cache[i], keys, values)
    return layers


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
        self._ropes: list[Any] = []
        self._rope_of: list[int] = []  # per layer, into `_ropes`
        for layer in layers:
            rope = rope_of(model, layer, name)
            alike = (i for i, known in enumerate(self._ropes) if _alike(rope, known))
            self._rope_of.append(next(alike, len(self._ropes)))
            if self._rope_of[-1] == len(self._ropes):
                self._ropes.append(rope)

    def put_on(self, x: mx.array, offset: Any, rows: Sequence[int] | None = None) -> mx.array:
        """Rotates [S, B, H, N, D], which stands at positions offset, offset + 1, ...

        Args:
            x: keys, or what is to be added to keys.
            offset: the position of the first of the N, an int or [B].
            rows: the S rows as indices into the L layers; None: all of them.
        """
        return self._each(lambda rope, x, offset: rope(x, offset=offset), x, offset, rows)

    def take_off(self, x: mx.array, offset: Any) -> mx.array:
        """Undoes the rotation of keys [L, B, H, N, D] at positions offset, offset + 1, ..."""
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
            turned = turn(self._ropes[number], part.flatten(0, 1), at)
            parts.append(turned.reshape(part.shape))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)[mx.array(np.argsort(order))]


def unrotate(rope: Any, keys: mx.array, start: Any) -> mx.array:
    """Takes the rotation off keys [B, H, N, D] that stand at positions start, start + 1, ...

    Rotating by the angle of position -p undoes position p. Running backwards through the sequence
    gives just these angles, so this works for every RoPE variant without knowing its frequencies.
    """
    n = keys.shape[2]
    return rope(keys[:, :, ::-1], offset=-(start + n - 1))[:, :, ::-1]


def _alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules of one kind have equal settings and equal arrays."""
    if type(a) is not type(b) or vars(a) != vars(b):
        return False
    ours: list[Any] = tree_flatten(dict(a))  # type: ignore[assignment]
    theirs: list[Any] = tree_flatten(dict(b))  # type: ignore[assignment]
    return [name for name, _ in ours] == [name for name, _ in theirs] and all(
        bool(mx.array_equal(x, y)) for (_, x), (_, y) in zip(ours, theirs, strict=True)
    )


def hide(cache: Cache, positions: Sequence[int]) -> None:
    """Makes positions padding; the cache may not have come to them yet."""
    if not positions:
        return
    for i in attention_layers(cache):
        if not isinstance(cache[i], PaddedCache):
            cache[i] = PaddedCache(cache[i])
        cache[i].hidden = sorted({*cache[i].hidden, *positions})


def _pick(cache: Cache, layers: Sequence[int]) -> list[Any]:
    return [cache[i] for i in layers]


def _positions(c: Any, start: int, stop: int) -> tuple[mx.array, mx.array]:
    if isinstance(c, RotatingKVCache):
        if c.offset > c.max_size:
            raise C2CError("a sliding-window cache has dropped positions; use kv.make_cache")
        keys, values = (c._temporal_order(x)[..., : c.offset, :] for x in (c.keys, c.values))
    else:
        keys, values = c.keys_and_values()
    if isinstance(c, QuantizedKVCache):
        part = [[x[..., start:stop, :] for x in kv] for kv in (keys, values)]
        k, v = (
            mx.dequantize(w, scales, biases, group_size=c.group_size, bits=c.bits)
            for w, scales, biases in part
        )
        return k, v
    return keys[..., start:stop, :], values[..., start:stop, :]
