"""Hidden states at one place of a model: kept in some passes, so that another can begin there.

Below its first fused layer a receiver computes the same numbers whatever its cache is fused with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn

from c2c_mlx.fusion import kv
from c2c_mlx.fusion.stand_ins import Caught, Passed, place_of_layers, standing_in


class States:
    """A model whose hidden states in front of one layer are kept, pass by pass.

    Args:
        model: an mlx-lm model; this object is called in its place.
        layer: what stands below it need not be computed again.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.model, self.layer = model, layer
        self._kept: list[mx.array] = []  # [B, n, E] of each pass
        place = place_of_layers(model) if hasattr(model, "layers") else None
        self._layers: list[Any] = place[2] if place else []

    def __call__(self, ids: mx.array, cache: kv.Cache) -> mx.array:
        """A pass of the model, with a look at what leaves the layer below."""
        layers = self._layers
        # Where a list of layers is not one per cache, no layer's place in it is known.
        if not self.layer or len(layers) != len(cache):
            logits: mx.array = self.model(ids, cache=cache)
            return logits
        caught = Caught(layers[self.layer - 1])
        with standing_in(layers, [*layers[: self.layer - 1], caught, *layers[self.layer :]]):
            logits = self.model(ids, cache=cache)
        if isinstance(caught.output, mx.array):
            self._kept.append(caught.output)
        return logits

    def forget(self) -> None:
        """Gives up all that was kept."""
        self._kept = []

    def take(self, n: int) -> mx.array | None:
        """The states of the last `n` positions, [B, n, E]; all that were kept are given up.

        None if fewer were kept.
        """
        kept, self._kept = self._kept, []
        states = mx.concatenate(kept, axis=1)[:, -n:] if kept else None
        return states if states is not None and states.shape[1] == n else None

    def go_on(self, states: mx.array, ids: mx.array, cache: kv.Cache, held: kv.Cache) -> mx.array:
        """The model's pass over ids of which the states are known.

        Args:
            states: [B, n, E] in front of the layer.
            ids: [B, n].
            cache: grows by n positions, in the layers below by those of `held`.
            held: another cache of the same ids, these included.

        Returns:
            Logits [B, n, V].
        """
        begin = kv.length(cache)
        layers = self._layers
        below = [Passed(layer, states) for layer in layers[: self.layer]]
        with standing_in(layers, [*below, *layers[self.layer :]]):
            logits: mx.array = self.model(ids, cache=cache)
        for i in kv.attention_layers(cache):
            if i < self.layer:  # for the masks of the next pass
                kv.append(cache, i, *kv.read_layer(held, i, begin, begin + ids.shape[1]))
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
            return self.go_on(kept[:, at:done], ids, cache, held)

        return model
