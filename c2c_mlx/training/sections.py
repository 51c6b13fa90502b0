"""A frozen model in sections: below the first fused layer, above it, and the head on what counts.

Nothing below the first fused layer depends on the fuser, so what goes on from there is computed
once. Logits are large: they exist in chunks, and their gradient is taken while a chunk is there.

mlx-lm's models know no sections. Parts of one are put in the place of others while it runs: a
layer that hands on what it gets, or an inner model that gives what is known. That leaves embedding
scales, masks and soft caps to the model. Whether it comes out right is tried once, on a few ids;
a model that gives other numbers so is run whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from c2c_mlx import device
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.stand_ins import Caught, Passed, StandIn, place_of_layers, standing_in
from c2c_mlx.training.caches import TrainingCache, training_cache

_CHUNK = device.LOGITS


class Sections:
    """A frozen model that answers.

    Args:
        model: an mlx-lm model whose layers are all attention layers.
        first: the lowest layer with a fused cache.

    Attributes:
        first: the layer that `state` is the input of; 0 if this model can't go on from there.

    Raises:
        C2CError: if a layer is not attention.
    """

    def __init__(self, model: nn.Module, first: int = 0) -> None:
        self.model, self.first = model, first
        self._place = place_of_layers(model)
        self.first = first if self._place and self._goes_on() else 0
        self._has_head = self._place is not None and self._scores()

    def state(self, ids: mx.array, cache: kv.Cache) -> mx.array | None:
        """What enters the first fused layer, [B, N, D]; None if the model is run whole.

        Args:
            ids: [B, N], which go on where the cache ends.
            cache: of the layers below, not fused; it stays as it is.
        """
        if not self.first:
            return None
        layers = list(self._layers)
        caught = Caught(layers[self.first])
        above = [Passed(layer) for layer in layers[self.first + 1 :]]
        with standing_in(self._layers, [*layers[: self.first], caught, *above]):
            self.model(ids, cache=[c.copy() for c in cache])
        return caught.inputs

    def ahead(self, ids: mx.array, cache: kv.Cache, state: mx.array | None) -> kv.Cache:
        """The cache with the receiver's own keys and values of `ids`, for these to be fused.

        Args:
            ids: [B, N], which go on where the cache ends.
            cache: as in `losses`, not fused; it stays as it is.
            state: from `state`, of these ids.
        """
        grown = _copies(cache)
        self._run(ids, grown, state)  # its logits are never computed
        for c in grown[self.first :]:
            c.ahead = ids.shape[1]
        return grown

    def losses(
        self,
        ids: mx.array,
        cache: kv.Cache,
        targets: np.ndarray,
        mask: np.ndarray,
        state: mx.array | None = None,
        recompute: bool = False,
        learning: bool = True,
    ) -> mx.array:
        """Cross-entropy of each target in nats, [B, N] float32; zero where none counts.

        Args:
            ids: [B, N], which go on where the cache ends.
            cache: with `state`, of the layers from the first fused one on; else of all.
            targets: [B, N] the ids that should come next.
            mask: [B, N] True where a target counts.
            state: from `state`, of these ids.
            recompute: whether a layer's insides are computed again for the gradient, not kept.
            learning: whether there will be a gradient.
        """
        if not self._has_head:
            logits = self._run(ids, cache, state, recompute)
            losses = nn.losses.cross_entropy(logits.astype(mx.float32), mx.array(targets))
            return losses * mx.array(mask.astype(np.float32))
        counting = np.flatnonzero(mask)
        hidden = self._hidden(ids, cache, state, recompute).flatten(0, 1)  # [B*N, D]
        if not mask.all():
            hidden = hidden[mx.array(counting)]
        score = self._score_with_gradient if learning else self._score
        losses = score(hidden, mx.array(targets.reshape(-1)[counting]))
        if mask.all():
            return losses.reshape(mask.shape)
        return mx.zeros(mask.size).at[mx.array(counting)].add(losses).reshape(mask.shape)

    def _score(self, hidden: mx.array, targets: mx.array) -> mx.array:
        """Cross-entropy [T] of targets [T] at hidden states [T, D]."""
        return mx.concatenate([losses for losses, _ in self._chunks(hidden, targets, False)])

    def _chunks(
        self, hidden: mx.array, targets: mx.array, learning: bool
    ) -> Iterator[tuple[mx.array, list[mx.array]]]:
        """Losses, and where these are learned from the hidden states' gradient, a chunk each.

        The head is frozen, so all that its logits are needed for is over before the next chunk.
        """
        step = max(_CHUNK // (4 * self._vocabulary), 1)
        before: list[mx.array] = []
        for at in range(0, hidden.shape[0], step):
            part, target = hidden[at : at + step], targets[at : at + step, None]
            if before:  # one chunk after the other
                part = mx.depends([part], before)[0]
            logits = self._head(part)
            wide = logits.astype(mx.float32)
            wide = wide - wide.max(axis=-1, keepdims=True)
            share = mx.exp(wide)  # once: it is half of what a CPU does here beside the products
            total = share.sum(axis=-1, keepdims=True)
            chosen = mx.take_along_axis(wide, target, axis=-1)
            losses, gradient = (mx.log(total) - chosen)[:, 0], []
            if learning:
                off = share / total
                off = off.at[mx.arange(off.shape[0]), target[:, 0]].subtract(1.0)
                gradient = mx.vjp(self._head, [part], [off.astype(logits.dtype)])[1]
            before = [losses, *gradient]
            yield losses, gradient

    def _score_with_gradient(self, hidden: mx.array, targets: mx.array) -> mx.array:
        """As `_score`; the gradient is computed with it, for the logits are gone when it is due."""

        @mx.custom_function
        def score(hidden: mx.array) -> tuple[mx.array, mx.array]:
            chunks = list(self._chunks(hidden, targets, True))
            gradients = [x for _, gradient in chunks for x in gradient]
            return mx.concatenate([losses for losses, _ in chunks]), mx.concatenate(gradients)

        @score.vjp
        def _(_: Any, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> mx.array:
            gradient = outputs[1]
            return cotangents[0][:, None].astype(gradient.dtype) * gradient

        losses, _ = cast(tuple[mx.array, mx.array], score(hidden))
        return losses

    # --- the model with some of its parts replaced --------------------------------------------

    @property
    def _layers(self) -> list[Any]:
        return self._place[2] if self._place else self.model.layers

    def _run(
        self, ids: mx.array, cache: kv.Cache, state: mx.array | None, recompute: bool = False
    ) -> mx.array:
        """Logits; with `state` from the first fused layer on."""
        layers = list(self._layers)
        if recompute:
            layers = [_Recomputed(layer) for layer in layers]
        if state is None:
            if not recompute:
                return cast(mx.array, self.model(ids, cache=cache))
        else:
            below = [Passed(layer, state) for layer in layers[: self.first]]
            layers = [*below, *layers[self.first :]]
            # Masks and positions are made from the first layers' lengths, which are those of all.
            cache = [*(cache[self.first].copy() for _ in below), *cache[self.first :]]
        with standing_in(self._layers, layers):
            return cast(mx.array, self.model(ids, cache=cache))

    def _hidden(
        self, ids: mx.array, cache: kv.Cache, state: mx.array | None, recompute: bool = False
    ) -> mx.array:
        """What enters the head, [B, N, D]."""
        caught = Caught(self._inner)
        with self._instead_of_inner(caught):
            self._run(ids, cache, state, recompute)  # its logits are never computed
        return caught.output

    def _head(self, hidden: mx.array) -> mx.array:
        """Logits [T, V] of hidden states [T, D]."""
        with self._instead_of_inner(Passed(self._inner, hidden[None])):
            ids = mx.zeros((1, hidden.shape[0]), mx.int32)
            return cast(mx.array, self.model(ids))[0]

    @property
    def _inner(self) -> nn.Module:
        """The module that runs the layers; the head is around it."""
        assert self._place
        parent, name, _ = self._place
        return cast(nn.Module, parent[name])

    @contextmanager
    def _instead_of_inner(self, other: Any) -> Iterator[None]:
        assert self._place
        parent, name, _ = self._place
        inner = parent[name]
        parent[name] = other  # past nn.Module's __setattr__, which takes modules alone
        try:
            yield
        finally:
            parent[name] = inner

    # --- is it right for this model? ----------------------------------------------------------

    def _goes_on(self) -> bool:
        """Whether the layers above give the same logits when they are run alone."""
        ids, cache, expected = self._tried()
        try:
            state = self.state(ids, cache)
            rest = [None] * self.first + cache[self.first :]
            return state is None or _same(self._run(ids, _copies(rest), state), expected)
        except Exception:  # a model of another build: whatever it trips over
            return False

    def _scores(self) -> bool:
        """Whether the head gives the same logits when it is run alone, on positions in any form."""
        ids, cache, expected = self._tried()
        try:
            hidden = self._hidden(ids, _copies(cache), None)
            alone = self._head(hidden[0])
            self._vocabulary = int(alone.shape[-1])
            return _same(alone[None], expected)
        except Exception:  # as above
            return False

    def _tried(self) -> tuple[mx.array, kv.Cache, mx.array]:
        ids = mx.arange(8)[None]
        cache = training_cache(self.model, None, 0)
        self.model(ids[:, :4], cache=cache)
        return ids[:, 4:], cache, self.model(ids[:, 4:], cache=_copies(cache))


def _copies(cache: kv.Cache) -> kv.Cache:
    return [c and c.copy() for c in cache]


def _same(found: mx.array, expected: mx.array) -> bool:
    return found.shape == expected.shape and bool(mx.array_equal(found, expected))


class _Recomputed(StandIn):
    """A checkpoint: its output is kept, its insides are not.

    mlx-lm's own `grad_checkpoint` follows parameters; here the gradient flows through the caches.
    """

    def __call__(self, h: mx.array, mask: Any, cache: TrainingCache) -> Any:
        def run(h: mx.array, keys: mx.array, values: mx.array) -> Any:
            return self.part(h, mask, cache=cache.copy(keys, values))

        return mx.checkpoint(run)(h, *cache.keys_and_values())
