"""One projector against the numbers of the authors' own code, in every precision.

`projector.safetensors` holds weights, inputs and outputs that the reference wrote in float32.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
from mlx.utils import tree_unflatten

from c2c_mlx.config import FuserConfig, from_dict
from c2c_mlx.doctor.check import DTYPES, Found, Proof, error, name_of, tolerance, worst
from c2c_mlx.fusion.fuser import Fuser
from c2c_mlx.fusion.project import KV

GOLDEN = Path(__file__).with_name("projector.safetensors")


def proofs() -> list[Proof]:
    """One per dtype."""
    return [Proof(f"projector, {name_of(d)}", partial(compare, d)) for d in DTYPES]


def compare(dtype: mx.Dtype) -> Found:
    """Fused keys and values and the dynamic weights, computed in `dtype`."""
    fuser, golden = load()
    fuser.cast(dtype)
    sharer, receiver = (pair(golden, side, dtype) for side in ("sharer", "receiver"))
    fused = fuser(sharer=sharer, receiver=receiver)
    change = fuser.change(sharer=sharer, receiver=receiver)
    right = pair(golden, "fused", mx.float32)
    errors = [error(ours, theirs) for ours, theirs in zip(fused, right, strict=True)]
    errors.append(error(change.weight, golden["weight"]))
    return Found(worst(errors), tolerance(dtype), "against the reference implementation")


def load() -> tuple[Fuser, dict[str, mx.array]]:
    """The reference's projector as a fuser of one layer, and its golden tensors."""
    found: Any = mx.load(str(GOLDEN), return_metadata=True)
    tensors, metadata = found
    fuser = Fuser(from_dict(FuserConfig, json.loads(metadata["config"]), str(GOLDEN)))
    weights = [(n.removeprefix("fuser."), x) for n, x in tensors.items() if n.startswith("fuser.")]
    fuser.update(tree_unflatten(weights))
    fuser.eval()
    return fuser, {n: x for n, x in tensors.items() if not n.startswith("fuser.")}


def pair(golden: dict[str, mx.array], side: str, dtype: mx.Dtype) -> KV:
    """Keys and values [1, B, H, N, D] of one side."""
    return golden[f"{side}.keys"].astype(dtype), golden[f"{side}.values"].astype(dtype)
