"""One sharer's way into one receiver: its cache read by index, and the change the fuser makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fit import check_models
from c2c_mlx.fusion.fuser import Change, Fuser
from c2c_mlx.fusion.project import KV
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.fusion.rope import Rotation


class Link:
    """A receiver, a sharer, and the fuser between them.

    Args:
        receiver: the mlx-lm model that answers.
        sharer: the mlx-lm model whose cache is read.
        fuser: trained for models of these shapes. One that does not train is cast to the precision
            of the receiver's cache, in place.

    Raises:
        C2CError: if the fuser was made for models of other shapes.
    """

    def __init__(self, receiver: nn.Module, sharer: nn.Module, fuser: Fuser) -> None:
        self.receiver, self.sharer, self.fuser = receiver, sharer, fuser
        config = fuser.config
        shapes = (kv.model_shape(model, "a model") for model in (receiver, sharer))
        check_models(config, *shapes)
        self.receiver_layers = [r for r, _ in config.layer_map]
        self.sharer_layers = sorted({s for _, s in config.layer_map})
        for model, layers in ((receiver, self.receiver_layers), (sharer, self.sharer_layers)):
            if missing := sorted({*layers} - {*kv.attention_layers(kv.make_cache(model))}):
                raise C2CError(f"layer {missing[0]} of a model is no attention layer: not fused")
        if not fuser.training:
            fuser.cast(kv.dtype_of(receiver))
        self._shared = mx.array([self.sharer_layers.index(s) for _, s in config.layer_map])
        self._rotations: tuple[Rotation, Rotation] | None = None  # receiver's, sharer's
        if not config.rotated_keys:
            self._rotations = (
                Rotation(receiver, self.receiver_layers, "receiver"),
                Rotation(sharer, self.sharer_layers, "sharer"),
            )

    @property
    def reader_key(self) -> tuple[int, str]:
        """What decides how the sharer reads a chat: links that agree in it can share its cache."""
        return id(self.sharer), self.fuser.config.alignment

    def make_reader(self, layers: Sequence[int]) -> Reader:
        """An empty reader of the sharer's, of which these layers will be looked at."""
        make = getattr(self.sharer, "make_reader", None)  # a sharer elsewhere has one of its own
        reader: Reader = make(layers) if make else Reader(self.sharer)
        return reader

    def read_sharer(self, cache: kv.Cache, index: np.ndarray, offset: Any = 0) -> KV:
        """What the sharer holds for each receiver position.

        Args:
            cache: the sharer's cache.
            index: [B, N] positions in it.
            offset: added to a position in the cache to give the position that RoPE saw, an int or
                [B] (left padding is negative).

        Returns:
            Keys (without RoPE if the fuser wants them so) and values, [L, B, Hs, N, Ds].
        """
        low, high = int(index.min()), int(index.max()) + 1
        keys, values = kv.read(cache, self.sharer_layers, low, high)
        if self._rotations:
            keys = self._rotations[1].take_off(keys, offset + low)
        if index.shape[0] == 1:
            at = mx.array(index[0] - low)
            return keys[..., at, :][self._shared], values[..., at, :][self._shared]
        at = mx.array(index - low)[None, :, None, :, None]
        keys, values = (mx.take_along_axis(x, at, axis=3) for x in (keys, values))
        return keys[self._shared], values[self._shared]

    def fuser_view(self, own: kv.StackedKV, offset: Any = 0) -> KV:
        """The receiver's keys and values as the fuser wants them, [L, B, Hr, N, Dr].

        Args:
            own: the fused layers of the receiver's own cache.
            offset: the position that RoPE saw at the first of the N, an int or [B].
        """
        if self._rotations is None:
            return own.keys, own.values
        return self._rotations[0].take_off(own.keys, offset), own.values

    def change(
        self, sharer: KV, own: kv.StackedKV, messages: np.ndarray, offset: Any = 0
    ) -> Change:
        """What the fuser adds to the receiver's cache, ready to be added to rotated keys.

        Args:
            sharer: from `read_sharer`.
            own: the fused layers of the receiver's own cache, [L, B, Hr, N, Dr].
            messages: [B, N] the message of each position, -1 for template text and padding.
            offset: the position that RoPE saw at the first of the N, an int or [B].
        """
        return self.fuser.gate([self.propose(sharer, own, offset)], messages)[0]

    def propose(self, sharer: KV, own: kv.StackedKV, offset: Any = 0) -> Change:
        """As `change`, but before the message gates are decided, see `Fuser.propose`."""
        change = self.fuser.propose(sharer=sharer, receiver=self.fuser_view(own, offset))
        keys = [at for kind, at in change.slices if kind == 0]
        if self._rotations is None or not keys:
            return change
        turned = self._rotations[0].put_on(change.delta[: len(keys)], offset, keys)
        return replace(change, delta=mx.concatenate([turned, change.delta[len(keys) :]]))
