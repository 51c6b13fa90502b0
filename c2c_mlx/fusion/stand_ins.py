"""Other objects in the place of a model's layers while it runs: mlx-lm's models know no hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn


class StandIn:
    """Stands for a part of a model, and has all of its attributes."""

    def __init__(self, part: Any) -> None:
        self.part = part

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)


class Passed(StandIn):
    """Computes nothing: hands on what it gets, or gives what is known."""

    def __init__(self, part: Any, known: mx.array | None = None) -> None:
        super().__init__(part)
        self.known = known

    def __call__(self, h: mx.array, *rest: Any, **options: Any) -> mx.array:
        """As the part is called."""
        return h if self.known is None else self.known


class Caught(StandIn):
    """Does what the part does, and shows what went in and what came out."""

    inputs: mx.array
    output: Any  # some models hand on more than hidden states

    def __call__(self, h: mx.array, *rest: Any, **options: Any) -> Any:
        """As the part is called."""
        self.inputs = h
        self.output = self.part(h, *rest, **options)
        return self.output


@contextmanager
def standing_in(layers: list[Any], others: Sequence[Any]) -> Iterator[None]:
    """Inside, a model's list of layers (see `place_of_layers`) holds others."""
    before = list(layers)
    layers[:] = others
    try:
        yield
    finally:
        layers[:] = before


def place_of_layers(model: nn.Module) -> tuple[nn.Module, str, list[Any]] | None:
    """The parent of the module that holds the layers, its name there, and their very list.

    `model.layers` may be a copy; None: no module within holds a list of just these.
    """
    modules = dict(model.named_modules())
    wanted = [id(layer) for layer in model.layers]
    for path, module in modules.items():
        for held in module.values():
            if path and isinstance(held, list) and [id(layer) for layer in held] == wanted:
                parent, _, name = path.rpartition(".")
                return modules[parent], name, held
    return None
