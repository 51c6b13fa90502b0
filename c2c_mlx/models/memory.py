"""How much memory a pair, its fuser and a conversation will need, before anything is loaded.

Estimates, from the headers and descriptions of files alone. Weights are known to the byte; what
runs beside them (caches, scores, the fuser's pass) is counted where it is largest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import c2c_mlx.blas  # noqa: F401

from safetensors import SafetensorError, safe_open

from c2c_mlx import device
from c2c_mlx.config import FuserConfig, ModelShape, TrainConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion.fuser import parameters, pass_width, skeleton
from c2c_mlx.models import untrusted

CONTEXT = 4096  # positions that a conversation is taken to reach

_ITEM_SIZE = {"F64": 8, "I64": 8, "F32": 4, "U32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


@dataclass(frozen=True)
class Need:
    """Estimated bytes, and what the device allows."""

    receiver: int
    sharer: int
    fuser: int
    working: int  # caches and intermediate results for `tokens` positions
    tokens: int
    limit: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.receiver + self.sharer + self.fuser + self.working

    def record(self) -> dict[str, float | int]:
        """For `--json`, in GB."""
        names = ("receiver", "sharer", "fuser", "working", "total", "limit")
        sizes = {f"{name}_gb": round(getattr(self, name) / 1e9, 3) for name in names}
        return sizes | {"tokens": self.tokens}

    def __str__(self) -> str:
        names = [name for name in ("receiver", "sharer", "fuser") if getattr(self, name)]
        parts = [f"{name} {getattr(self, name) / 1e9:.2f}" for name in names]
        parts.append(f"{self.tokens} tokens {self.working / 1e9:.2f}")
        text = f"memory: {' + '.join(parts)} = about {self.total / 1e9:.1f} GB"
        text += f" of {self.limit / 1e9:.1f} GB"
        return text if self.total <= self.limit else text + "; so many tokens will not fit"


def preflight(
    receiver: Path,
    sharers: Sequence[Path] = (),
    fusers: Sequence[tuple[FuserConfig, int]] = (),
    *,
    bits: Literal[0, 4, 8] = 0,
    tokens: int = CONTEXT,
) -> Need:
    """What a conversation will need.

    Args:
        receiver: its folder.
        sharers: the folders of those that take part; one that stands there twice is loaded once.
        fusers: their descriptions, and the bytes of their files.
        bits: to which the fusers will be rounded, see `fusers.disk.load`.
        tokens: length of the conversation; the models' own limits are kept.

    Raises:
        C2CError: if not even the weights fit, with a way to need less; or if a file can't be read.
    """
    models = [_Model.read(folder) for folder in (receiver, *dict.fromkeys(sharers))]
    tokens = min([tokens, *(m.context for m in models if m.context)])
    caches = sum(m.cache_per_token for m in models) * tokens
    passes = [m.scores(device.prefill_chunk(), tokens) for m in models]
    if fusers:
        caches += models[0].cache_per_token * tokens  # the fused cache
    fuser_bytes = 0
    for config, size in fusers:
        passes.append(min(_floats(pass_width(config) * tokens), device.fuser_pass()))
        if device.is_dense():
            fuser_bytes += 4 * _parameters(replace(config, bits=0))
        elif bits and not config.bits:
            fuser_bytes += _bytes(replace(config, bits=bits))
        else:
            fuser_bytes += size
    weights = [m.weights for m in models]
    return _checked(
        Need(
            weights[0],
            sum(weights[1:]),
            fuser_bytes,
            caches + max(passes),
            tokens,
            device.memory_limit(),
        )
    )


def training(receiver: Path, sharer: Path, fuser: FuserConfig, config: TrainConfig) -> Need:
    """What a training run will need, up to a batch of the longest items that `config` allows.

    Raises:
        C2CError: as `preflight` does.
    """
    models = _Model.read(receiver), _Model.read(sharer)
    rows = config.batch_size * config.max_tokens
    # In float32: the weights, their gradient, and the optimiser's two moments.
    fuser_bytes = 4 * 4 * _parameters(fuser)
    # What the backward pass keeps: every intermediate of the fuser and of the receiver's layers.
    kept = 4 * rows * (2 * _per_position(fuser) + models[0].kept_per_token)
    working = kept + sum(m.cache_per_token for m in models) * rows
    return _checked(
        Need(
            models[0].weights, models[1].weights, fuser_bytes, working, rows, device.memory_limit()
        )
    )


def shape(model: Path) -> ModelShape:
    """What a fuser will depend on, as far as a model's config.json tells."""
    return _Model.read(model).shape


def _checked(need: Need) -> Need:
    weights = {name: getattr(need, name) for name in ("receiver", "sharer", "fuser")}
    if sum(weights.values()) <= need.limit:
        return need
    largest = max(weights, key=lambda name: weights[name])
    advice = (
        "a smaller one"
        if device.is_dense()
        else "a smaller one, or a copy of fewer bits (...-4bit)"
    )
    if largest == "fuser" and not device.is_dense():
        advice = "a smaller one; a chat can round it to fewer bits (--fuser-bits 4)"
    raise C2CError(f"{need}: they cannot be loaded; the {largest} is the largest: take {advice}")


@dataclass(frozen=True)
class _Model:
    """What of a model counts; sizes in bytes."""

    weights: int
    context: int  # tokens that it was made for; 0: not told
    shape: ModelShape  # of a model whose layers are all attention
    kept_per_token: int  # numbers that a backward pass keeps
    heads: int
    width: int  # the widest intermediate result of a position

    @classmethod
    def read(cls, folder: Path) -> _Model:
        document = untrusted.read_json(folder, "config.json")
        if not isinstance(document, dict):
            raise C2CError(f"{folder}: config.json must hold an object")
        config = document.get("text_config") or document

        def number(*names: str) -> int:
            found = (config.get(name) for name in names)
            return next((n for n in found if isinstance(n, int) and n > 0), 0)

        hidden, layers = number("hidden_size", "n_embd"), number("num_hidden_layers", "n_layer")
        heads = number("num_attention_heads", "n_head")
        kv_heads = number("num_key_value_heads") or heads
        head_dim = number("head_dim") or hidden // max(heads, 1)
        inner = number("intermediate_size") or 4 * hidden
        return cls(
            _weights(folder, document),
            number("max_position_embeddings", "n_positions"),
            ModelShape(folder.name, max(layers, 1), max(kv_heads, 1), max(head_dim, 1)),
            layers * (8 * hidden + 4 * inner) + 3 * number("vocab_size"),
            heads,
            max(inner, hidden),
        )

    @property
    def cache_per_token(self) -> int:
        """Of one position's keys and values, over all layers."""
        return _floats(2 * self.shape.layers * self.shape.width)

    def scores(self, new: int, total: int) -> int:
        """Of one layer's pass over `new` positions that see `total`."""
        return _floats(new * (2 * self.heads * total + 4 * self.width))


def _weights(folder: Path, config: dict[str, Any]) -> int:
    """Bytes of a model's weights once they are loaded."""
    quantised = config.get("quantization") or config.get("quantization_config") or {}
    total = 0
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
                found = {n: (s.get_dtype(), math.prod(s.get_shape())) for n, s in slices.items()}
        except (SafetensorError, OSError) as e:
            raise C2CError(f"{path} is no valid safetensors file ({e}); fetch it again") from None
        if not device.is_dense():
            total += sum(count * _ITEM_SIZE.get(dtype, 1) for dtype, count in found.values())
            continue
        for name, (_, count) in found.items():
            layer, _, part = name.rpartition(".")
            if f"{layer}.scales" not in found:
                total += 4 * count
            elif part == "weight":
                own = quantised.get(layer)
                bits = (own if isinstance(own, dict) else quantised).get("bits", 4)
                total += 4 * count * 32 // bits
    return total


def _parameters(config: FuserConfig) -> int:
    fuser = skeleton(config, 10**6, "the fuser")
    return sum(p.size for p in parameters(fuser).values())


def _bytes(config: FuserConfig) -> int:
    fuser = skeleton(config, 10**6, "the fuser")
    return sum(p.nbytes for p in parameters(fuser).values())


def _per_position(config: FuserConfig) -> int:
    """Numbers that one position passes through, over all slices."""
    width = config.sharer.width + config.receiver.width
    blocks = (config.depth) * (3 * config.hidden_dim + 2 * config.intermediate_dim)
    slices = len(config.fused_kinds) * len(config.layer_map)
    return slices * (2 * width + blocks + 2 * config.receiver.width)


def _floats(count: int) -> int:
    """Bytes of this many activations."""
    return count * (4 if device.is_dense() else 2)
