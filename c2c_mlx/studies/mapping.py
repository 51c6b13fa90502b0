"""Rows of one space mapped into another: least squares, and a small network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from c2c_mlx.fusion.project import gelu

Map = Callable[[np.ndarray], np.ndarray]  # [N, in] -> [N, out]

RIDGES = (1e-6, 1e-4, 1e-2, 1.0)  # of the mean squared channel; chosen on rows that are kept out
HIDDEN, STEPS, ROWS, RATE = 256, 200, 128, 2e-3
CHECK = 25  # steps between looks at the rows that are kept out


def least_squares(x: np.ndarray, y: np.ndarray, kept_out: np.ndarray) -> Map:
    """The affine map with the least squared error; the ridge that does best on `kept_out`.

    Args:
        x: [N, in].
        y: [N, out].
        kept_out: [N] bool, rows that choose the ridge; the map is then made from all rows.
    """

    def fits(rows: np.ndarray, ridges: Sequence[float]) -> Iterator[Map]:
        a, b = x[rows].astype(np.float64), y[rows].astype(np.float64)
        middle, level = a.mean(axis=0), b.mean(axis=0)
        a, b = a - middle, b - level
        gram, product = a.T @ a, a.T @ b
        for ridge in ridges:
            more = max(ridge * np.trace(gram) / len(gram), 1e-300)
            weight = np.linalg.solve(gram + more * np.eye(len(gram)), product)
            yield partial(_affine, weight=weight, middle=middle, level=level)

    errors = [error(fit(x[kept_out]), y[kept_out]) for fit in fits(~kept_out, RIDGES)]
    best = RIDGES[int(np.argmin(errors))]
    return next(fits(np.ones(len(x), bool), [best]))


def _affine(
    new: np.ndarray, weight: np.ndarray, middle: np.ndarray, level: np.ndarray
) -> np.ndarray:
    return (new - middle) @ weight + level


def network(x: np.ndarray, y: np.ndarray, kept_out: np.ndarray, seed: int) -> Map:
    """A network of three layers, as in the paper, stopped where it does best on `kept_out`.

    Args:
        x: [N, in].
        y: [N, out].
        kept_out: [N] bool.
        seed: of its weights and of the batches.
    """
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    middle, spread = y.mean(axis=0), y.std() + 1e-6
    a, b = (mx.array((z).astype(np.float32)) for z in ((x - mean) / scale, (y - middle) / spread))
    learn, check = (mx.array(np.flatnonzero(rows)) for rows in (~kept_out, kept_out))
    mx.random.seed(seed)
    model = nn.Sequential(
        nn.Linear(x.shape[1], HIDDEN),
        gelu,
        nn.Linear(HIDDEN, HIDDEN),
        gelu,
        nn.Linear(HIDDEN, y.shape[1]),
    )
    optimiser = optim.AdamW(optim.cosine_decay(RATE, STEPS), weight_decay=0.01)
    step = nn.value_and_grad(model, lambda rows: mx.square(model(a[rows]) - b[rows]).mean())
    best: tuple[float, Any] = (float("inf"), None)
    for number in range(STEPS):
        rows = learn[mx.random.randint(0, len(learn), (ROWS,))]
        _, gradients = step(rows)
        optimiser.update(model, gradients)
        mx.eval(model.parameters(), optimiser.state)
        if (number + 1) % CHECK == 0:
            of_check: Any = mx.square(model(a[check]) - b[check]).mean().item()
            if of_check < best[0]:
                best = (of_check, model.parameters())
    if best[1] is not None:
        model.update(best[1])

    def mapped(new: np.ndarray) -> np.ndarray:
        found = np.array(model(mx.array(((new - mean) / scale).astype(np.float32))))
        return found * spread + middle

    return mapped


def constant(middle: np.ndarray) -> Map:
    """Says `middle` everywhere."""
    return lambda new: np.tile(middle, (len(new), 1))


def error(mapped: np.ndarray, target: np.ndarray, middle: np.ndarray | float = 0.0) -> float:
    """||mapped - target||^2 / ||target - middle||^2: 1 for who says `middle` everywhere."""
    return float(np.square(mapped - target).sum() / max(np.square(target - middle).sum(), 1e-12))


def plane(target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean [D] of rows [N, D] and the two directions [D, 2] in which they vary most."""
    middle = target.mean(axis=0)
    _, vectors = np.linalg.eigh((target - middle).T @ (target - middle))
    return middle, vectors[:, -2:]


def fitted(rows: np.ndarray, width: int) -> np.ndarray:
    """Rows [N, D] cut or filled up with zeros to [N, width], to be drawn in another space."""
    return np.pad(rows[:, :width], [(0, 0), (0, max(width - rows.shape[1], 0))])
