"""Reading and extending every kind of attention cache."""

from __future__ import annotations

from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache

from c2c_mlx import LanguageModel
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv, rope
from c2c_mlx.fusion.reader import Reader

B, H, N, D = 2, 3, 10, 64


def numbers(seed: int, n: int = N) -> tuple[mx.array, mx.array]:
    mx.random.seed(seed)
    return mx.random.normal((B, H, n, D)), mx.random.normal((B, H, n, D))


def assert_close(found: mx.array, expected: mx.array, limit: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert mx.abs(found - expected).max().item() <= limit


def test_what_was_appended_is_read() -> None:
    cache = [KVCache(), KVCache()]
    held = [numbers(0), numbers(1)]
    for layer, (keys, values) in enumerate(held):
        kv.append(cache, layer, keys[:, :, :7], values[:, :, :7])
        for at in range(7, N):  # one by one, as in decoding
            kv.append(cache, layer, keys[:, :, at : at + 1], values[:, :, at : at + 1])
    assert kv.attention_layers(cache) == [0, 1]
    assert kv.length(cache) == N
    for start, stop in ((0, N), (2, 8), (9, 10)):
        found = kv.read(cache, [1, 0, 1], start, stop)
        assert found.keys.shape == found.values.shape == (3, B, H, stop - start, D)
        for row, layer in enumerate([1, 0, 1]):
            for ours, theirs in zip(found, held[layer], strict=True):
                assert_close(ours[row], theirs[:, :, start:stop], 0.0)


def test_trim_rolls_back_and_goes_on() -> None:
    cache, (keys, values), (new_keys, new_values) = [KVCache()], numbers(0), numbers(1)
    kv.append(cache, 0, keys, values)
    kv.trim(cache, 20)
    kv.trim(cache, N)
    assert kv.length(cache) == N
    kv.trim(cache, 4)
    assert kv.length(cache) == 4
    kv.append(cache, 0, new_keys[:, :, :3], new_values[:, :, :3])
    found = kv.read(cache, [0], 0, 7)
    for ours, old, new in zip(found, (keys, values), (new_keys, new_values), strict=True):
        expected = mx.concatenate([old[:, :, :4], new[:, :, :3]], axis=2)
        assert_close(ours[0], expected, 0.0)
    kv.trim(cache, 0)
    assert kv.length(cache) == 0


def test_an_empty_cache() -> None:
    cache = [KVCache(), ArraysCache(2)]
    assert kv.length(cache) == 0
    assert kv.arrays([KVCache()]) == []
    kv.trim(cache, 0)
    kv.trim(cache, 5)
    assert kv.length(cache) == kv.length([ArraysCache(2)]) == 0


def test_layers_without_keys_and_values_are_skipped_and_handed_over() -> None:
    cache, other = ([ArraysCache(2), KVCache(), ArraysCache(1), KVCache()] for _ in range(2))
    assert kv.attention_layers(cache) == [1, 3]
    held = numbers(0)
    for layer in (1, 3):
        kv.append(cache, layer, *held)
    cache[0][0], cache[0][1], cache[2][0] = mx.ones((1, 4)), mx.zeros((1, 2)), mx.full((3,), 7.0)
    assert kv.length(cache) == N
    assert_close(kv.read(cache, [3], 0, N).keys[0], held[0])
    assert kv.has_state(cache) and not kv.has_state([KVCache()])
    kv.trim(cache, 4)
    assert kv.length(cache) == 4
    assert mx.array_equal(cache[0][0], mx.ones((1, 4)))  # state stays as it is
    kv.copy_state(cache, other)
    assert other[0][0] is cache[0][0] and other[2][0] is cache[2][0]
    assert kv.length(other) == 0
    held = cache[0][0]
    other[0][0] = mx.zeros((1, 4))  # as decoding does
    assert cache[0][0] is held


def test_make_cache_never_forgets(gemma: nn.Module) -> None:
    cache = kv.make_cache(gemma)
    assert [type(c) for c in cache] == [KVCache] * 3
    ids = mx.arange(30)[None]
    logits = gemma(ids, cache=cache)
    assert_close(logits, gemma(ids, cache=gemma.make_cache()))  # the mask still has the window
    assert kv.length(cache) == 30
    assert kv.read(cache, [0, 1, 2], 0, 30).keys.shape == (3, 1, 1, 30, 16)


def test_model_shape(receiver: LanguageModel, sharer: LanguageModel, gemma: nn.Module) -> None:
    shapes = [kv.model_shape(model, "m", "t") for model in (receiver.model, sharer.model, gemma)]
    assert [(s.layers, s.kv_heads, s.head_dim) for s in shapes] == [
        (4, 2, 16),
        (6, 3, 8),
        (3, 1, 16),
    ]
    assert (shapes[0].name, shapes[0].tokenizer) == ("m", "t")


def test_a_layer_without_rope_is_refused(receiver: LanguageModel) -> None:
    class Bare(nn.Module):
        layers = [nn.Linear(2, 2)]

    with pytest.raises(C2CError, match="sharer: layer 0 has no rotary embedding"):
        rope.rope_of(Bare(), 0, "sharer")
    assert callable(rope.rope_of(receiver.model, 2, "receiver"))


# --- rotary embeddings


@pytest.mark.parametrize("name", ["receiver", "sharer", "gemma"])
@pytest.mark.parametrize("offset", [0, 17, [3, 12]], ids=str)
@pytest.mark.parametrize("rows", [None, [2], [1, 2], [0, 2, 1]], ids=str)
def test_layers_rotate_together_as_they_do_alone(
    name: str,
    offset: Any,
    rows: list[int] | None,
    receiver: LanguageModel,
    sharer: LanguageModel,
    gemma: nn.Module,
) -> None:
    """Gemma 3 has another base where it looks at all positions than in its sliding windows."""
    model = {"receiver": receiver.model, "sharer": sharer.model, "gemma": gemma}[name]
    offset = mx.array(offset) if isinstance(offset, list) else offset
    layers = [2, 0, 1]
    rotation = rope.Rotation(model, layers, name)
    shape = kv.model_shape(model, name)
    size = (len(rows or layers), B, shape.kv_heads, N, shape.head_dim)
    bare = mx.random.normal(size, key=mx.random.key(0))
    turned = rotation.put_on(bare, offset, rows)
    for x, found, row in zip(bare, turned, rows or range(3), strict=True):
        assert_close(found, rope.rope_of(model, layers[row], name)(x, offset=offset))
    if rows is None:
        assert_close(rotation.take_off(turned, offset), bare)
        assert mx.abs(turned - bare).max().item() > 0.1


# --- padding


def run(model: nn.Module, ids: list[int], hidden: list[int]) -> tuple[mx.array, kv.Cache]:
    cache = kv.make_cache(model)
    kv.hide(cache, hidden)
    logits = model(mx.array([ids]), cache=cache)
    mx.eval(logits, kv.arrays(cache))
    return logits[0], cache


@pytest.mark.parametrize("name", ["receiver", "gemma"])
def test_nobody_attends_to_padding_but_it_counts(
    name: str, receiver: LanguageModel, gemma: nn.Module
) -> None:
    model = receiver.model if name == "receiver" else gemma
    ids = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    others = [i + 100 if at in (0, 3, 4) else i for at, i in enumerate(ids)]
    seen = [at for at in range(len(ids)) if at not in (0, 3, 4)]
    (logits, cache), (same, _) = run(model, ids, [0, 3, 4]), run(model, others, [0, 3, 4])
    plain, plainly = run(model, ids, [])
    at = mx.array(seen)
    assert mx.isfinite(logits).all()
    assert mx.allclose(logits[at], same[at], atol=1e-5)
    assert not mx.allclose(logits[at], plain[at], atol=1e-3)
    # A first layer's keys depend on tokens and positions alone.
    assert mx.allclose(cache[0].keys[..., : len(ids), :], plainly[0].keys[..., : len(ids), :])
    step = mx.array([[17]])
    assert mx.allclose(
        model(step, cache=cache), model(step, cache=run(model, others, [0, 3, 4])[1]), atol=1e-5
    )


def test_padding_goes_when_the_cache_is_rolled_back(receiver: LanguageModel) -> None:
    _, cache = run(receiver.model, [5, 6, 7, 8], [1, 3])
    kv.trim(cache, 3)
    assert [c.hidden for c in cache] == [[1]] * len(cache)
    kv.hide(cache, [])
    assert kv.length(cache) == 3


def test_a_prefix_reads_padding_in_any_chunks(receiver: LanguageModel) -> None:
    ids = [5, 6, ~7, 8, ~9, ~9, 10, 11]
    whole, parts = Reader(receiver.model), Reader(receiver.model)
    whole.extend(ids)
    for n in (2, 4, 5, 8):
        parts.extend(ids[:n])
    for a, b in zip(whole.cache, parts.cache, strict=True):
        assert a.hidden == b.hidden == [2, 4, 5]
        assert mx.allclose(a.keys[..., :8, :], b.keys[..., :8, :], atol=1e-5)


BATCH = [([5, 6, 7, 8, 9, 10], [1, 3]), ([11, 12, 13], []), ([14, 15, 16, 17], [0])]


@pytest.mark.parametrize("name", ["receiver", "gemma"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 1)])
def test_padding_stays_padding_in_a_batch(
    name: str, order: tuple[int, ...], receiver: LanguageModel, gemma: nn.Module
) -> None:
    model = receiver.model if name == "receiver" else gemma
    caches = [run(model, *BATCH[i])[1] for i in order]
    batch = kv.merge(caches)
    for step in ([[20]] * len(order), [[21, 22, 23]] * len(order)):
        found = model(mx.array(step), cache=batch)
        for row, cache in zip(found, caches, strict=True):
            assert_close(row, model(mx.array(step[:1]), cache=cache)[0])


def test_a_batch_that_shrinks_and_grows_keeps_its_padding(receiver: LanguageModel) -> None:
    caches = [run(receiver.model, *of)[1] for of in BATCH]
    batch = kv.merge(caches[1:])
    receiver.model(mx.array([[20], [20]]), cache=batch)  # columns that no row ever hid
    for layer, (first, other) in enumerate(zip(batch, kv.merge(caches[:2]), strict=True)):
        first.filter([1])
        first.extend(other)
        first.filter([0, 1])
        assert [first.extract(i).hidden for i in (0, 1)] == [[0], [1, 3]], layer
    receiver.model(mx.array([[20]]), cache=caches[2])
    step = mx.array([[21]])
    for row, cache in zip(
        receiver.model(mx.array([[21], [21]]), cache=batch), (caches[2], caches[0]), strict=True
    ):
        assert_close(row, receiver.model(step, cache=cache)[0])
