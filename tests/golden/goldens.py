"""The golden numbers of `data/`: where they lie, and how close is close enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.utils import load_model

from c2c_mlx.config import FuserConfig
from c2c_mlx.fusers.published import reference_name
from c2c_mlx.fusion.fuser import Fuser, parameters

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-5
KINDS = ("key", "value")


def arrays(path: str) -> dict[str, mx.array]:
    return mx.load(str(DATA / path))


def document(path: str) -> Any:
    return json.loads((DATA / path).read_text(encoding="utf-8"))


def model(path: str) -> nn.Module:
    return load_model(DATA / path)[0]


def error(found: mx.array, golden: mx.array) -> float:
    """Largest deviation, relative to the largest golden number."""
    assert found.shape == golden.shape
    scale = mx.maximum(mx.abs(golden).max(), 1e-30)
    return (mx.abs(found - golden).max() / scale).item()


def assert_close(found: mx.array, golden: mx.array, what: str = "") -> None:
    deviation = error(found, golden)
    assert deviation <= TOLERANCE, f"{what}: relative error {deviation:.1e}"


def pair(tensors: dict[str, mx.array], pattern: str) -> tuple[mx.array, mx.array]:
    """Keys and values [1, ...] of one layer; `pattern` has a `{}` for the kind."""
    return tuple(tensors[pattern.format(kind)][None] for kind in KINDS)


def stacked(
    tensors: dict[str, mx.array], pattern: str, layers: list[int]
) -> tuple[mx.array, mx.array]:
    """Keys and values [L, ...]; `pattern` has `{layer}` and `{kind}`."""
    return tuple(
        mx.stack([tensors[pattern.format(layer=layer, kind=kind)] for layer in layers])
        for kind in KINDS
    )


def fuser_of(config: FuserConfig, state: dict[str, mx.array]) -> Fuser:
    """A one-layer fuser with the weights of one reference projector."""
    fuser = Fuser(config)
    names = list(parameters(fuser))
    weights = [(n, mx.stack([state[reference_name(n, k)] for k in KINDS])[:, None]) for n in names]
    fuser.update(tree_unflatten(weights))
    fuser.eval()
    return fuser
