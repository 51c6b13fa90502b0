"""Keys and values of mlx-lm's prompt caches: read, appended, rolled back, hidden, injected.

With `padded`, the only file that knows mlx-lm's cache classes. A *layer* here is an index into the
cache list. Layers without keys and values of every position (state-space layers of hybrids, and
classes that nobody here knows) are *state*: skipped by `attention_layers`, carried along, never
rolled back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from c2c_mlx.config import ModelShape
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion.padded import PaddedCache

Cache = list[Any]  # an mlx-lm prompt cache: one cache object per layer


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
    return [i for i, c in enumerate(cache) if isinstance(c, KVCache)]


def model_shape(model: nn.Module, name: str, tokenizer: str = "") -> ModelShape:
    """Reads KV heads and head_dim off a one-token pass that is built but never evaluated.

    Raises:
        C2CError: if the model's layers differ in shape, which no fuser can stack, or hold none.
    """
    cache = _one_position(model)
    layers = attention_layers(cache)
    if not layers:
        raise C2CError(f"{name}: it has no attention layers, so there is no KV cache to fuse")
    shapes = {(c.keys.shape[1], c.keys.shape[3], c.values.shape[3]) for c in _pick(cache, layers)}
    if len(shapes) != 1 or len({d for _, *dims in shapes for d in dims}) != 1:
        raise C2CError(
            f"{name}: its layers hold keys and values of different shapes; not supported"
        )
    heads, head_dim, _ = shapes.pop()
    return ModelShape(name, len(cache), heads, head_dim, tokenizer)


def has_state(cache: Cache) -> bool:
    """Whether a layer can't be rolled back."""
    return len(attention_layers(cache)) < len(cache)


def dtype_of(model: nn.Module) -> mx.Dtype:
    """In which precision a model holds its keys and values; as `model_shape`, without a pass.

    Raises:
        C2CError: if no layer holds any.
    """
    cache = _one_position(model)
    layers = attention_layers(cache)
    if not layers:
        raise C2CError("this model has no attention layers: there is no KV cache to fuse")
    dtype: mx.Dtype = cache[layers[0]].keys.dtype
    return dtype


def length(cache: Cache) -> int:
    """Positions that every attention layer holds."""
    return min((c.offset for c in _pick(cache, attention_layers(cache))), default=0)


def trim(cache: Cache, n: int) -> None:
    """Rolls the attention layers back to the first `n` positions.

    Some may hold more than others: those that a pass had reached when it was interrupted.
    """
    for c in _pick(cache, attention_layers(cache)):
        c.trim(max(c.offset - n, 0))


def first(cache: Cache, n: int) -> Cache:
    """Another cache of the first `n` positions; arrays are shared until one of the two writes."""
    other = copy.deepcopy(cache)
    trim(other, n)
    for layer in _pick(other, attention_layers(other)):
        if layer.keys is not None:
            layer.keys, layer.values = (
                layer.keys_and_values()
            )  # no room that others made for theirs
    return other


def nbytes(cache: Cache) -> int:
    """Bytes that a cache takes, room for coming positions included."""
    return sum(c.nbytes for c in cache)


def position_nbytes(model: nn.Module) -> int:
    """Bytes of one position's keys and values; as `model_shape`, without a pass."""
    cache = _one_position(model)
    pairs = ((c.keys, c.values) for c in _pick(cache, attention_layers(cache)))
    return sum(x.nbytes // x.shape[2] for pair in pairs for x in pair)


def read(cache: Cache, layers: Sequence[int], start: int, stop: int) -> StackedKV:
    """Keys and values of `layers` (repeats allowed) at positions [start, stop)."""
    pairs = {i: read_layer(cache, i, start, stop) for i in set(layers)}
    return StackedKV(*(mx.stack([pairs[i][kind] for i in layers]) for kind in (0, 1)))


def read_layer(cache: Cache, layer: int, start: int, stop: int) -> tuple[mx.array, mx.array]:
    """Keys and values of one layer at positions [start, stop), [B, H, N, D]."""
    keys, values = cache[layer].keys_and_values()
    return keys[..., start:stop, :], values[..., start:stop, :]


def append(cache: Cache, layer: int, keys: mx.array, values: mx.array) -> None:
    """Adds positions to one layer; keys and values are [B, H, N, D]."""
    cache[layer].update_and_fetch(keys, values)


def copy_state(source: Cache, target: Cache) -> None:
    """Hands the state of layers without keys and values over; the arrays are shared."""
    for s, t in zip(source, target, strict=True):
        if not isinstance(s, KVCache):
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


class _Injected:
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


def injecting(cache: Cache, known: Mapping[int, tuple[mx.array, mx.array]]) -> Cache:
    """The cache for one pass over N positions whose keys and values are known.

    Args:
        cache: grows by N positions in the pass.
        known: per attention layer keys and values [B, H, N, D].
    """
    layers = list(cache)
    for i, (keys, values) in known.items():
        layers[i] = _Injected(cache[i], keys, values)
    return layers


def hide(cache: Cache, positions: Sequence[int]) -> None:
    """Makes positions padding; the cache may not have come to them yet."""
    if not positions:
        return
    for i in attention_layers(cache):
        if not isinstance(cache[i], PaddedCache):
            cache[i] = PaddedCache(cache[i])
        cache[i].hidden = sorted({*cache[i].hidden, *positions})


def _one_position(model: nn.Module) -> Cache:
    cache = make_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=cache)
    return cache


def _pick(cache: Cache, layers: Sequence[int]) -> list[Any]:
    return [cache[i] for i in layers]
