"""Hidden states at one place of a model: kept in some passes, so that another can begin there.

Below its first fused layer a receiver computes the same numbers whatever its cache is fused with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn

from c2c_mlx.fusion import kv


class States:
    """A model whose hidden states in front of one layer are kept, pass by pass.

    Args:
        model: an mlx-lm model; this object is called in its place.
        layer: what stands below it need not be computed again.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.model, self.layer = model, layer
        self._kept: list[mx.array] = []  # [B, n, E] of each pass

    def __call__(self, ids: mx.array, cache: kv.Cache) -> mx.array:
        """A pass of the model, with a look at what leaves the layer below."""
        # Where a list of layers is not one per cache, no layer's place in it is known.
        if not self.layer or len(getattr(self.model, "layers", ())) != len(cache):
            logits: mx.array = self.model(ids, cache=cache)
            return logits
        below = self.layer - 1
        with _replaced(self.model, {below: lambda layer: _Watched(layer, self._kept)}):
            logits = self.model(ids, cache=cache)
        return logits

    def above(self, held: kv.Cache) -> Callable[[mx.array, kv.Cache], mx.array]:
        """The model for the same ids once more, over other keys and values above.

        Args:
            held: the cache of the passes that were watched, which the layers below go on from.

        Returns:
            A function (ids [B, n], cache) -> logits, to be called with consecutive parts of the
            ids from the first one on. Where nothing could be kept, all layers are computed.
        """
        kept = mx.concatenate(self._kept, axis=1) if self._kept else mx.zeros((1, 0, 1))
        done = 0

        def model(ids: mx.array, cache: kv.Cache) -> mx.array:
            nonlocal done
            at, done = done, done + ids.shape[1]
            if done > kept.shape[1]:
                logits: mx.array = self.model(ids, cache=cache)
                return logits
            begin = kv.length(cache)
            instead: dict[int, Any] = {i: _Passed for i in range(self.layer - 1)}
            instead[self.layer - 1] = lambda layer: _Passed(layer, kept[:, at:done])
            with _replaced(self.model, instead):
                logits = self.model(ids, cache=cache)
            for i in kv.attention_layers(cache):
                if i < self.layer:  # for the masks of the next part
                    kv.append(cache, i, *kv.read_layer(held, i, begin, begin + ids.shape[1]))
            return logits

        return model


@contextmanager
def _replaced(model: Any, instead: Mapping[int, Callable[[Any], Any]]) -> Iterator[None]:
    layers = list(model.layers)
    try:
        for i, make in instead.items():
            model.layers[i] = make(layers[i])
        yield
    finally:
        model.layers[:] = layers


class _Layer:
    """Stands for a layer; what it is asked for is the layer's."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _Watched(_Layer):
    def __init__(self, layer: Any, kept: list[mx.array]) -> None:
        super().__init__(layer)
        self._kept = kept

    def __call__(self, *args: Any, **options: Any) -> Any:
        out = self._layer(*args, **options)
        if isinstance(out, mx.array):  # some models hand on more than that
            self._kept.append(out)
        return out


class _Passed(_Layer):
    """Computes nothing: hands on what it is given, or what it is known to make of it."""

    def __init__(self, layer: Any, states: mx.array | None = None) -> None:
        super().__init__(layer)
        self._states = states

    def __call__(self, h: mx.array, *args: Any, **options: Any) -> mx.array:
        return h if self._states is None else self._states
