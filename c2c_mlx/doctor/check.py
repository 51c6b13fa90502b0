"""What a check finds, how far off that may be, and what becomes of a check that breaks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

DTYPES = (mx.float32, mx.bfloat16, mx.float16)

# Relative to the largest number. In float32 the order of a sum and the device's own exp decide the
# last digits, and the tests' goldens allow as much. In half precision the caches of a conversation
# of small models are 2.6 spacings of their numbers away from the same in float32, as measured on a
# CPU. Two kernels that round at other places may be twice as far from each other; 8 leaves room,
# and covers packed products, which MLX's CPU backend sums in the dtype itself (5.4 over 256).
_EXACT = 1e-5
_SPACINGS = 8
_TF32_SPACING = 2.0**-10


@dataclass(frozen=True)
class Found:
    """How far numbers are from where they should be."""

    error: float  # the largest deviation, relative to the largest number that is right
    tolerance: float
    note: str = ""


@dataclass(frozen=True)
class Proof:
    """A check that can be run."""

    name: str
    run: Callable[[], Found]


@dataclass(frozen=True)
class Check:
    """A check that was run; without an error it broke, and the note says how."""

    name: str
    passed: bool
    error: float | None
    tolerance: float | None
    note: str
    seconds: float


def run(proofs: Sequence[Proof], report: Callable[[str, int, int], None]) -> Iterator[Check]:
    """Runs one after the other; one that breaks has failed, and the others still run.

    Args:
        proofs: what to run.
        report: told the name of a check that begins, its number, and how many there are.
    """
    for number, proof in enumerate(proofs):
        report(proof.name, number, len(proofs))
        tic = time.perf_counter()
        try:
            found = proof.run()
        except Exception as e:  # whatever a kernel of a new device says
            note = " ".join(f"{type(e).__name__}: {e}".split())
            yield Check(proof.name, False, None, None, note, time.perf_counter() - tic)
            continue
        passed = found.error <= found.tolerance  # NaN is not
        error = found.error if math.isfinite(found.error) else None
        seconds = time.perf_counter() - tic
        yield Check(proof.name, passed, error, found.tolerance, found.note, seconds)


def tolerance(dtype: mx.Dtype) -> float:
    """How far off numbers of a dtype may be, relative to the largest of them."""
    if dtype == mx.float32:
        return _SPACINGS * _TF32_SPACING if rounds_products() else _EXACT
    return _SPACINGS * spacing(dtype)


def spacing(dtype: mx.Dtype) -> float:
    """From 1 to the next number of a dtype."""
    eps: Any = mx.finfo(dtype).eps
    return float(eps)


def rounds_products() -> bool:
    """Whether this device takes float32 products of numbers rounded to 10 bits (TF32).

    GPUs with matrix units do (M5, CUDA) unless `MLX_ENABLE_TF32=0` forbids it, see
    github.com/ml-explore/mlx/issues/3860.
    """
    x = mx.full((256, 256), 1 + 2.0**-12)
    return not bool(mx.array_equal(x @ mx.eye(256), x))


def error(found: mx.array, right: mx.array) -> float:
    """The largest deviation, relative to the largest right number; infinite if one is not a number.

    Both are taken to float32 first.
    """
    assert found.shape == right.shape
    found, right = found.astype(mx.float32), right.astype(mx.float32)
    if not mx.isfinite(found).all().item():  # a maximum may or may not see a NaN
        return math.inf
    scale = mx.maximum(mx.abs(right).max(), 1e-30)
    deviation: float = (mx.abs(found - right).max() / scale).item()  # type: ignore[assignment]
    return deviation


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN if one is, which Python's own maximum may lose."""
    return float(np.max([*errors]))


def name_of(dtype: mx.Dtype) -> str:
    """'float32', without MLX's prefix."""
    return str(dtype).rpartition(".")[2]
