"""Two tiny models and their fuser, from prompt ids to generated ids, against the reference."""

from __future__ import annotations

from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from goldens import DATA, arrays, assert_close, document, model
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_tokenizer

from c2c_mlx import C2C, Fuser
from c2c_mlx.fusers.published import convert
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.text.alignment import TokenAlignment
from c2c_mlx.text.answer import AnswerAlignment

CASE = "e2e/qwen3_llama"
LAYERS = range(4)


@pytest.fixture(scope="module")
def meta() -> dict[str, Any]:
    return document(f"{CASE}/meta.json")


@pytest.fixture(scope="module")
def golden() -> dict[str, mx.array]:
    return arrays(f"{CASE}/io.safetensors")


@pytest.fixture(scope="module")
def c2c(tmp_path_factory: pytest.TempPathFactory) -> C2C:
    folder = tmp_path_factory.mktemp("e2e") / "fuser"
    convert(DATA / CASE / "fuser", folder)
    return C2C(model(f"{CASE}/receiver"), model(f"{CASE}/sharer"), Fuser.load(folder))


def test_fused_cache(c2c: C2C, meta: dict[str, Any], golden: dict[str, mx.array]) -> None:
    cache = c2c.prefill(meta["input_ids"])
    assert kv.length(cache) == meta["n_prompt"] - 1
    assert_cache(cache, golden, "fused")


def test_generated_ids(c2c: C2C, meta: dict[str, Any]) -> None:
    ids = meta["input_ids"]
    cache = c2c.prefill(ids)
    assert generate(c2c.receiver, ids[-1:], cache) == meta["c2c_generated_ids"]


def test_logits_and_cache_of_the_last_prompt_token(
    c2c: C2C, meta: dict[str, Any], golden: dict[str, mx.array]
) -> None:
    cache = c2c.prefill(meta["input_ids"])
    logits = c2c.receiver(mx.array([meta["input_ids"][-1:]]), cache=cache)
    assert_close(logits[:, -1], golden["logits_last_prompt"])
    assert_cache(cache, golden, "final")


def test_logits_of_every_step(c2c: C2C, meta: dict[str, Any], golden: dict[str, mx.array]) -> None:
    cache = c2c.prefill(meta["input_ids"])
    ids = [meta["input_ids"][-1], *meta["c2c_generated_ids"][:-1]]
    steps = [c2c.receiver(mx.array([[i]]), cache=cache)[0, -1] for i in ids]
    assert_close(mx.stack(steps), golden["step_logits"])


def test_the_receiver_alone(c2c: C2C, meta: dict[str, Any]) -> None:
    cache = kv.make_cache(c2c.receiver)
    found = generate(c2c.receiver, meta["input_ids"], cache)
    assert found == meta["receiver_only_generated_ids"]


def test_a_prefill_leaves_nothing_behind(c2c: C2C, meta: dict[str, Any]) -> None:
    first = c2c.prefill(meta["input_ids"])
    c2c.prefill([1, 2, 3, 4])
    again = c2c.prefill(meta["input_ids"])
    for a, b in zip(kv.read(first, LAYERS, 0, 11), kv.read(again, LAYERS, 0, 11), strict=True):
        assert mx.array_equal(a, b)


@pytest.mark.parametrize("name", ["front", "back", "split", "response_tail3", "none"])
def test_sections(c2c: C2C, meta: dict[str, Any], name: str) -> None:
    """Some sections of a prompt are fused, some are not; later ones attend to what was fused."""
    variant = document("extras/variants/qwen3_llama/variants.json")[name]
    golden = arrays("extras/variants/qwen3_llama/io.safetensors")
    *sections, (last, _) = [(s["length"], s["sharer_mask"] > 0) for s in variant["sections"]]
    ids = meta["input_ids"]
    cache = fused_by_sections(c2c, ids[:-1], [*sections, (last - 1, False)])
    logits = c2c.receiver(mx.array([ids[-1:]]), cache=cache)[:, -1]
    assert_close(logits, golden[f"{name}.logits_last_prompt"])
    assert_cache(cache, golden, f"{name}.final")
    first = int(logits.argmax().item())
    assert [first, *generate(c2c.receiver, [first], cache, 11)] == variant["generated_ids"]


def test_fusing_the_response(c2c: C2C, meta: dict[str, Any]) -> None:
    variant = document("extras/variants/qwen3_llama/variants.json")["include_response"]
    golden = arrays("extras/variants/qwen3_llama/io.safetensors")
    ids, tokenizer = meta["input_ids"], load_tokenizer(DATA / CASE / "receiver")
    same = np.arange(len(ids), dtype=np.int32)
    prompt = TokenAlignment(ids, ids, same, 0 * same)

    def start() -> tuple[Any, kv.Cache]:
        prefix = FusedCache(c2c)
        cache = prefix.extend([prompt])
        answer = AnswerAlignment(prompt, tokenizer, tokenizer, strategy="same")
        return prefix.answering([answer]), cache

    receiver, cache = start()
    assert generate(receiver, ids[-1:], cache) == variant["generated_ids"]
    receiver, cache = start()
    given = [ids[-1], *variant["generated_ids"][:-1]]
    first = receiver(mx.array([given[:1]]), cache)[:, -1]
    assert_close(first, golden["include_response.logits_last_prompt"])
    assert_cache(cache, golden, "include_response.final")
    steps = [first[0], *(receiver(mx.array([[i]]), cache)[0, -1] for i in given[1:])]
    assert_close(mx.stack(steps), golden["include_response.step_logits"])


def fused_by_sections(c2c: C2C, ids: list[int], sections: list[tuple[int, bool]]) -> kv.Cache:
    """As the reference prefills: the receiver reads a section on top of the fused ones before it.

    A conversation of ours never does: its own cache stays as the receiver would have it alone.
    """
    own, sharer = Reader(c2c.receiver), Reader(c2c.sharer)
    sharer.extend(ids)
    for length, is_fused in sections:
        start, stop = len(own.ids), len(own.ids) + length
        own.extend(ids[:stop])
        if is_fused and length:
            part = kv.read(own.cache, c2c.receiver_layers, start, stop)
            read = c2c.read_sharer(sharer.cache, np.arange(start, stop)[None])
            change = c2c.change(read, part, np.zeros((1, length), np.int32), start)
            kv.trim(own.cache, start)  # every layer of this receiver is fused
            for layer, *pair in zip(c2c.receiver_layers, *change.added_to(part), strict=True):
                kv.append(own.cache, layer, *pair)
    return own.cache


def assert_cache(cache: kv.Cache, golden: dict[str, mx.array], name: str) -> None:
    for layer in LAYERS:
        length = golden[f"{name}.{layer}.key"].shape[2]
        found = kv.read(cache, [layer], 0, length)
        for kind, ours in zip(("key", "value"), found, strict=True):
            assert_close(ours[0], golden[f"{name}.{layer}.{kind}"], f"layer {layer} {kind}")


def generate(model: nn.Module, ids: list[int], cache: kv.Cache, n: int = 12) -> list[int]:
    steps = generate_step(mx.array(ids), model, max_tokens=n, prompt_cache=cache)
    return [token for token, _ in steps]
