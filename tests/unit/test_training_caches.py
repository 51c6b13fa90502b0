"""Batches with padding in the middle: every row is what it is alone, and gradients flow."""

from __future__ import annotations

from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache

from c2c_mlx import LanguageModel
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.training.batch import pad
from c2c_mlx.training.caches import training_cache
from c2c_mlx.training.loss import prefill


def assert_close(found: mx.array, expected: mx.array) -> None:
    assert found.shape == expected.shape
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5).item()


@pytest.fixture(params=["qwen3", "llama", "gemma2", "dynamic", "gemma3"])
def model(
    request: pytest.FixtureRequest,
    receiver: LanguageModel,
    sharer: LanguageModel,
    gemma2: LanguageModel,
    dynamic: LanguageModel,
    gemma: nn.Module,
) -> nn.Module:
    loaded = {"qwen3": receiver, "llama": sharer, "gemma2": gemma2, "dynamic": dynamic}
    return loaded[request.param].model if request.param in loaded else gemma


OPENING = list(range(1, 7))
PROMPTS = [OPENING + [20 + i * 3 + j for j in range(n)] for i, n in enumerate((12, 5, 9))]
GOING_ON = np.array([[100, 101, 102], [110, 111, 112], [120, 121, 122]])


@pytest.mark.parametrize("most_prefix", [0, 3, 6, 99])
def test_padded_rows_equal_rows_alone(model: nn.Module, most_prefix: int) -> None:
    prompts = pad(PROMPTS, most_prefix)
    assert prompts.prefix == min(most_prefix, 6)
    cache = prefill(model, prompts, {})
    first = model(mx.array(GOING_ON[:, :2]), cache=cache)
    second = model(mx.array(GOING_ON[:, 2:]), cache=cache)
    together = mx.concatenate([first, second], axis=1)
    for row, prompt in enumerate(PROMPTS):
        alone = kv.make_cache(model)
        ids = [*prompt, *GOING_ON[row].tolist()]
        logits = model(mx.array([ids]), cache=alone)
        assert_close(together[row], logits[0, -3:])
        columns = mx.array(prompts.columns(np.arange(len(prompt)), row))
        layers = list(range(len(model.layers)))
        held = kv.read(alone, layers, 0, len(prompt))
        whole = [mx.stack([c.state[kind][row] for c in cache]) for kind in (0, 1)]
        for ours, theirs in zip(whole, held, strict=True):
            assert_close(ours[:, :, columns], theirs[:, 0])


@pytest.mark.parametrize("most_prefix", [0, 4, 6])
def test_padding_of_a_prompts_own_counts_and_is_hidden(model: nn.Module, most_prefix: int) -> None:
    rows = [
        [~0, 2, ~3, ~3, 5, 6, *prompt[6:8], *[~0] * i, *prompt[8:]]
        for i, prompt in enumerate(PROMPTS)
    ]
    prompts = pad(rows, most_prefix)
    cache = prefill(model, prompts, {})
    together = model(mx.array(GOING_ON), cache=cache)
    for row, ids in enumerate(rows):
        alone = Reader(model)
        alone.extend(ids)
        columns = mx.array(prompts.columns(np.arange(len(ids)), row))
        held = kv.read(alone.cache, list(range(len(model.layers))), 0, len(ids))
        for kind in (0, 1):
            ours = mx.stack([c.state[kind][row] for c in cache])
            assert_close(ours[:, :, columns], held[kind][:, 0])
        assert_close(together[row], model(mx.array(GOING_ON[row : row + 1]), cache=alone.cache)[0])


def test_rows_of_one_length_need_no_padding(model: nn.Module) -> None:
    rows = [[*OPENING, i, i + 1] for i in (30, 40)]
    prompts = pad(rows, 4)
    cache = prefill(model, prompts, {})
    assert cache[0].padding is None
    logits = model(mx.array([[50], [50]]), cache=cache)
    for row, ids in enumerate(rows):
        assert_close(logits[row, -1], model(mx.array([[*ids, 50]]))[0, -1])


def test_a_shared_prefix_is_run_once(model: nn.Module) -> None:
    memo: dict[tuple[int, ...], Any] = {}
    once = prefill(model, pad(PROMPTS, 6), memo)
    assert list(memo) == [tuple(OPENING)]
    kept = memo[tuple(OPENING)]
    again = prefill(model, pad(PROMPTS[::-1], 6), memo)
    assert memo[tuple(OPENING)] is kept
    assert_close(once[0].keys[0], again[0].keys[2])
    prefill(model, pad(PROMPTS, 3), memo)
    assert list(memo) == [tuple(OPENING[:3])]


def test_a_copied_cache_leaves_its_source_alone(model: nn.Module) -> None:
    cache = prefill(model, pad(PROMPTS, 6), {})
    columns = cache[0].columns
    copied = [c.copy() for c in cache]
    model(mx.array(GOING_ON), cache=copied)
    assert (cache[0].columns, copied[0].columns) == (columns, columns + 3)


def test_gradients_flow_through_a_training_cache(model: nn.Module) -> None:
    cache = prefill(model, pad(PROMPTS, 6), {})
    shape = cache[1].keys.shape

    def loss(added: mx.array) -> mx.array:
        fused = [c.copy() for c in cache]
        fused[1] = cache[1].copy(cache[1].keys + added, cache[1].values)
        return model(mx.array(GOING_ON), cache=fused).square().mean()

    gradient = mx.grad(loss)(mx.zeros(shape))
    padded = np.zeros(shape[2], bool)
    padded[6 : 6 + 7] = True  # row 1 is 7 ids shorter than row 0
    assert mx.abs(gradient[1][:, mx.array(np.flatnonzero(padded))]).max().item() == 0
    assert mx.abs(gradient[0]).max().item() > 0


def test_training_refuses_a_model_with_other_layers() -> None:
    class Hybrid(nn.Module):
        layers = [None, None]

        def make_cache(self) -> list[Any]:
            return [KVCache(), ArraysCache(2)]

    with pytest.raises(C2CError, match="all attention"):
        training_cache(Hybrid(), None, 0)
