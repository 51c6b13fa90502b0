"""Which weights a model has: a name for every number of it, in the precision that it is held in."""

from __future__ import annotations

import hashlib

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def of_weights(model: nn.Module) -> str:
    """Equal for equal weights; another quantisation, dtype or training gives another one.

    Sums of the numbers' bits along rows and along columns: whole numbers, so that no order of
    adding changes them, read at the speed of the memory. A model elsewhere has told its own.
    """
    if told := getattr(model, "fingerprint", ""):
        return str(told)
    digest = hashlib.sha256()
    arrays: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    for name, array in sorted(arrays.items()):
        bits = array.view(_BITS[array.itemsize]).reshape(-1, array.shape[-1] if array.ndim else 1)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        for axis in (0, 1):
            digest.update(np.array(bits.sum(axis=axis)).tobytes())
    return digest.hexdigest()[:16]
