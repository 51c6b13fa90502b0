"""Cache-to-Cache between one sharer and one receiver, on token ids.

What is fused is an mlx-lm prompt cache, so decoding is mlx-lm's own.
"""

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
from c2c_mlx.fusion.fuser import KV, Change, Fuser
from c2c_mlx.fusion.reader import Reader


class C2C:
    """A receiver, a sharer, and the fuser between them.

    Args:
        receiver: the mlx-lm model that answers.
        sharer: the mlx-lm model whose cache is read.
        fuser: trained for models of these shapes.

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
        self._shared = mx.array([self.sharer_layers.index(s) for _, s in config.layer_map])
        self._rotations: tuple[kv.Rotation, kv.Rotation] | None = None  # receiver's, sharer's
        if not config.rotated_keys:
            self._rotations = (
                kv.Rotation(receiver, self.receiver_layers, "receiver"),
                kv.Rotation(sharer, self.sharer_layers, "sharer"),
            )

    @property
    def reading(self) -> tuple[int, str]:
        """What decides how the sharer reads a chat: links that agree in it can share its cache."""
        return id(self.sharer), self.fuser.config.alignment

    def prefill(
        self,
        receiver_ids: Sequence[int],
        sharer_ids: Sequence[int] | None = None,
        index: Sequence[int] | None = None,
        sections: Sequence[tuple[int, bool]] | None = None,
    ) -> kv.Cache:
        """Prefills both models and fuses every position but the last.

        Args:
            receiver_ids: the receiver's prompt, n ids.
            sharer_ids: the sharer's prompt; None: the receiver's ids.
            index: position in `sharer_ids` that feeds receiver position i; None: i itself.
            sections: (length, whether it is fused) of consecutive parts of `receiver_ids[:-1]`; the
                receiver reads a part on top of the fused parts before it. None: one part, fused.

        Returns:
            An mlx-lm prompt cache over `receiver_ids[:-1]`.

        Raises:
            C2CError: for an empty prompt, or an index or sections that do not fit the prompts.
        """
        n = len(receiver_ids) - 1
        if n < 0:
            raise C2CError("the prompt is empty: C2C needs at least one token")
        sharer_ids = receiver_ids if sharer_ids is None else sharer_ids
        feeding = np.arange(n) if index is None else np.asarray(index[:n], dtype=np.int32)
        if len(feeding) < n or (n and not 0 <= feeding.min() <= feeding.max() < len(sharer_ids)):
            raise C2CError(
                f"index must name one of the sharer's {len(sharer_ids)} positions for each of the "
                f"receiver's {n}"
            )
        sections = [(n, True)] if sections is None else sections
        if sum(length for length, _ in sections) != n or any(length < 0 for length, _ in sections):
            raise C2CError(f"sections must have {n} positions, the prompt's but its last")
        shared = Reader(self.sharer)
        shared.extend(sharer_ids[: feeding.max(initial=-1) + 1])
        prefix = Reader(self.receiver)
        for length, fused in sections:
            start, stop = len(prefix.ids), len(prefix.ids) + length
            prefix.extend(receiver_ids[:stop])
            if fused and length:
                own = kv.read(prefix.cache, self.receiver_layers, start, stop)
                sharer = self.read_sharer(shared.cache, feeding[None, start:stop])
                change = self.change(sharer, own, np.zeros((1, length), np.int32), start)
                for layer, *pair in zip(self.receiver_layers, *change.added_to(own), strict=True):
                    kv.replace(prefix.cache, layer, *pair)
                mx.eval(kv.arrays(prefix.cache))
        return prefix.cache

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
        receiver = self.fuser_view(own, offset)
        change = self.fuser.change(sharer=sharer, receiver=receiver, messages=messages)
        keys = [at for kind, at in change.slices if kind == 0]
        if self._rotations is None or not keys:
            return change
        turned = self._rotations[0].put_on(change.delta[: len(keys)], offset, keys)
        return replace(change, delta=mx.concatenate([turned, change.delta[len(keys) :]]))
