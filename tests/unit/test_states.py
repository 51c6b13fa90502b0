"""Passes that begin above the layers whose states were kept: the same numbers, for less."""

from __future__ import annotations

import copy
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from c2c_mlx import LanguageModel, device
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.states import States

NEAR = 1e-4 if device.is_dense() else 0.1
PROMPT, ANSWER = list(range(20, 50)), [7, 300, 41, 5, 90, 211]


@pytest.fixture(params=["qwen3", "gemma3", "lfm2"])
def model(
    request: pytest.FixtureRequest, receiver: LanguageModel, gemma: nn.Module, lfm2: nn.Module
) -> nn.Module:
    if request.param == "qwen3":
        return receiver.model
    if request.param == "gemma3":
        return gemma
    return lfm2


def read(model: nn.Module, ids: list[int]) -> kv.Cache:
    cache = kv.make_cache(model)
    model(mx.array([ids]), cache=cache)
    mx.eval(kv.arrays(cache))
    return cache


def changed(cache: kv.Cache, since: int) -> kv.Cache:
    """A copy, as if it had been fused with something else from layer `since` on."""
    other = copy.deepcopy(cache)
    for layer in kv.attention_layers(other):
        if layer >= since:
            keys, values = kv.read_layer(other, layer, 0, len(PROMPT))
            kv.trim([other[layer]], 0)
            kv.append(other, layer, keys * 0.5, values - 0.3)
    return other


def assert_close(a: mx.array, b: mx.array) -> None:
    np.testing.assert_allclose(*(np.array(x.astype(mx.float32)) for x in (a, b)), atol=NEAR)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_pass_above_is_the_pass_over_all_layers(
    model: nn.Module, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = read(model, PROMPT)
    one, other = (changed(held, layer) for _ in range(2))
    states = States(model, layer)
    for token in ANSWER:
        logits = states(mx.array([[token]]), cache=held)
        mx.eval(logits)
    assert_close(logits, model(mx.array([ANSWER]), cache=read(model, PROMPT))[:, -1:])
    expected = model(mx.array([ANSWER[:-1]]), cache=one)

    computed = 0
    block = type(model.layers[0])
    compute = block.__call__

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal computed
        computed += 1
        return compute(self, *args, **options)

    monkeypatch.setattr(block, "__call__", counted)
    above = states.above(held)
    found = [above(mx.array([part]), cache=other) for part in (ANSWER[:2], ANSWER[2:5])]
    assert computed == 2 * (len(model.layers) - layer)
    assert_close(mx.concatenate(found, axis=1), expected)
    for i in kv.attention_layers(other):
        for a, b in zip(
            *(kv.read_layer(c, i, 0, len(PROMPT) + 5) for c in (one, other)), strict=True
        ):
            assert_close(a, b)


def test_who_has_no_list_of_layers_computes_all_of_them(receiver: LanguageModel) -> None:
    class Closed:
        def __call__(self, ids: mx.array, cache: kv.Cache) -> mx.array:
            return receiver.model(ids, cache=cache)

    held = read(receiver.model, PROMPT)
    one, other = (changed(held, 2) for _ in range(2))
    states = States(Closed(), 2)  # type: ignore[arg-type]
    states(mx.array([ANSWER]), cache=held)
    expected = receiver.model(mx.array([ANSWER]), cache=one)
    assert_close(states.above(held)(mx.array([ANSWER]), other), expected)
