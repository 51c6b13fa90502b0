"""What of a model takes memory, read off the model itself before any of its weights is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from c2c_mlx import device
from c2c_mlx.fusion import kv
from c2c_mlx.models import remote
from c2c_mlx.models.load import argument, context_length, open_model

_GROWTH = 256  # positions by which mlx-lm's caches grow
_UNWRITTEN = (64, 80, 128)  # head_dims of which Metal never writes attention scores down


@dataclass(frozen=True)
class ModelSize:
    """Bytes, and the widths that all between the layers follows from."""

    weights: int
    loading: int  # beside the weights, while they are read
    per_position: int  # of a cache
    state: int  # of layers without keys and values, however much was read
    context: int  # tokens that it was made for
    itemsize: int  # bytes of a number between layers
    layers: int
    heads: int  # that ask
    head_dim: int
    hidden: int
    widest: int  # outputs of a linear map inside of a layer
    outputs: int  # of all linear maps of a layer, together
    vocabulary: int

    @classmethod
    def read(cls, folder: Path) -> ModelSize:
        """Measures a model by a pass that is built and never evaluated.

        Raises:
            C2CError: if the folder holds no model that can be run.
        """
        model, config = open_model(folder)
        cache = kv.make_cache(model)
        logits = model(mx.zeros((1, 1), mx.int32), cache=cache)
        attention = kv.attention_layers(cache)
        rows = [x for i in attention for x in (cache[i].keys, cache[i].values)]
        rest = [c.state for i, c in enumerate(cache) if i not in attention]
        weights = [w.nbytes for w in _arrays(model.parameters())]
        if remote.is_of_one(folder):  # they are on another machine
            weights = []
        linear = [_outputs(layer) for layer in model.layers]
        return cls(
            weights=sum(weights),
            loading=_loading(folder, weights),
            per_position=sum(x.nbytes // x.shape[2] for x in rows),
            state=sum(x.nbytes for x in _arrays(rest)),
            context=context_length(model, config),
            itemsize=logits.dtype.size,
            layers=len(model.layers),
            heads=argument(model, config, "num_attention_heads", "num_heads", "n_head", "n_heads"),
            head_dim=rows[0].shape[3] if rows else 0,
            hidden=argument(model, config, "hidden_size", "n_embd", "d_model", "dim"),
            widest=max(map(max, linear)),
            outputs=max(map(sum, linear)),
            vocabulary=logits.shape[-1],
        )

    def cache(self, positions: int) -> int:
        """Bytes of a cache that has grown to so many positions."""
        return self.per_position * (-(-positions // _GROWTH) * _GROWTH) + self.state

    def prefill(self, positions: int) -> int:
        """Bytes of one layer's pass over the last chunk of so many positions."""
        new = min(device.prefill_chunk(), positions)
        return self.itemsize * new * (self.scores(positions) + 8 * self.widest)

    def scores(self, positions: int) -> int:
        """Numbers of one position's attention to all of them, where a pass writes these down."""
        on_gpu = mx.default_device().type == mx.gpu
        return 0 if on_gpu and self.head_dim in _UNWRITTEN else self.heads * positions


def _arrays(tree: Any) -> list[mx.array]:
    found: list[Any] = tree_flatten(tree)  # type: ignore[assignment]
    return [x for _, x in found if isinstance(x, mx.array)]


def _outputs(layer: nn.Module) -> list[int]:
    """Of each linear map in a layer."""
    kinds = (nn.Linear, nn.QuantizedLinear)
    return [m.weight.shape[0] for m in layer.modules() if isinstance(m, kinds)] or [0]


def _loading(folder: Path, weights: list[int]) -> int:
    """Where weights are converted, the largest comes first, and is there more than twice."""
    files = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    if not weights or abs(files - sum(weights)) < 0.01 * files:
        return 0
    return max(round(2.3 * max(weights)) - sum(weights), 0)
