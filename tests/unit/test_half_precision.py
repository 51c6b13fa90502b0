"""Models and fusers in every precision that a Mac holds them in: nothing is promoted or drifts.

Tolerances are a few units in the last place of the dtype (2^-8 relative for bfloat16, 2^-11 for
float16), for sums of tens of products that are rounded in another order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from c2c_mlx import C2C, ChatSession, Fuser, LanguageModel, device
from c2c_mlx.config import FuserConfig, SamplingConfig
from c2c_mlx.events import MODES, Finished
from c2c_mlx.fusers import disk
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.talk import relay
from c2c_mlx.text.alignment import align_chat

TOLERANCE = {mx.float32: 1e-5, mx.bfloat16: 2**-5, mx.float16: 2**-8}
MODELS = ["float32", "bfloat16", "float16", "4-bit"]
FUSERS = ["float32", "bfloat16", "float16", "8-bit", "4-bit"]
TABLE = [(models, fuser) for models in MODELS for fuser in FUSERS]
MIXED = [("bfloat16", "float32"), ("float16", "bfloat16"), ("4-bit", "8-bit"), ("4-bit", "4-bit")]
CHAT = [
    {"role": "user", "content": "Who wrote it?"},
    {"role": "assistant", "content": "Nobody knows."},
    {"role": "user", "content": "And when was it?"},
]

Make = Callable[..., C2C]


@pytest.fixture(autouse=True)
def as_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.REHEARSE, "gpu")


def held_as(lm: LanguageModel, precision: str) -> LanguageModel:
    """A copy of a tiny model in another precision."""
    lm = copy.copy(lm)
    lm.model = copy.deepcopy(lm.model)
    if precision == "4-bit":
        lm.model.set_dtype(mx.bfloat16)
        nn.quantize(lm.model, 32, 4, class_predicate=fits_a_group)
    else:
        lm.model.set_dtype(getattr(mx, precision))
    mx.eval(lm.model.parameters())
    return lm


def fits_a_group(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


@pytest.fixture
def pair(
    receiver: LanguageModel, sharer: LanguageModel, request: pytest.FixtureRequest
) -> tuple[LanguageModel, LanguageModel]:
    return held_as(receiver, request.param), held_as(sharer, request.param)


@pytest.fixture
def loaded(tmp_path: Any) -> Callable[..., Fuser]:
    """Makes a fuser's folder in a precision, and loads it as on a Mac."""

    def make(
        receiver: LanguageModel,
        sharer: LanguageModel,
        precision: str,
        gate: float = 1.0,
        **options: Any,
    ) -> Fuser:
        mx.random.seed(2)
        layer_map = tuple((i, i + 2) for i in range(4))
        config = FuserConfig(receiver.shape, sharer.shape, layer_map, 64, 64, **options)
        fuser = Fuser(config)
        fuser.gate_logit = mx.full(fuser.gate_logit.shape, gate)
        if precision.endswith("bit"):
            fuser.quantise(8 if precision == "8-bit" else 4)
            disk.save(fuser, tmp_path / "fuser", mx.bfloat16)
        else:
            disk.save(fuser, tmp_path / "fuser", getattr(mx, precision))
        return disk.load(tmp_path / "fuser")

    return make


def dtypes(cache: kv.Cache) -> set[mx.Dtype]:
    return {array.dtype for c in cache for array in (c.keys, c.values)}


def largest_difference(a: kv.Cache, b: kv.Cache) -> float:
    """Relative to the largest number."""
    n = kv.length(a)
    assert n == kv.length(b)
    found = []
    for layer in kv.attention_layers(a):
        for x, y in zip(kv.read_layer(a, layer, 0, n), kv.read_layer(b, layer, 0, n), strict=True):
            x, y = x.astype(mx.float32), y.astype(mx.float32)
            found.append((mx.abs(x - y).max() / mx.abs(y).max()).item())
    return max(found)


OPTIONS: list[dict[str, Any]] = [
    {"message_gate": True, "positions": "messages"},
    {"rotated_keys": False, "normalise": True},
    {"alignment": "first"},
]
CASES = [(*case, {}) for case in TABLE] + [(*case, o) for case in MIXED[:3] for o in OPTIONS]


@pytest.mark.parametrize(("pair", "precision", "options"), CASES, indirect=["pair"])
def test_a_fused_cache_has_the_own_caches_precision(
    pair: Any, loaded: Any, precision: str, options: dict[str, Any]
) -> None:
    receiver, sharer = pair
    fuser = loaded(receiver, sharer, precision, **options)
    if "message_gate" in options:
        fuser.message_head.bias = mx.full(fuser.message_head.bias.shape, 4.0)
    link = C2C(receiver.model, sharer.model, fuser)
    own_dtype = kv.dtype_of(receiver.model)
    assert fuser.gate_logit.dtype == mx.float32
    alignment = fuser.config.alignment
    grown, scratch = FusedCache(link), FusedCache(link)
    for n in (1, 3):
        text = align_chat(CHAT[:n], receiver.tokenizer, sharer.tokenizer, strategy=alignment)
        cache = grown.extend([text])
    assert dtypes(cache) == dtypes(grown.own.cache) == {own_dtype}
    changed = largest_difference(cache, grown.own.cache)
    assert 0.05 < changed < 100
    # A conversation equals a prefill of all of it from scratch.
    assert largest_difference(cache, scratch.extend([text])) < TOLERANCE[own_dtype]
    stats = grown.stats()
    assert stats is not None and np.isfinite(stats.relative_change).all()


@pytest.mark.parametrize(("pair", "precision"), TABLE, indirect=["pair"])
def test_shut_gates_are_the_receiver_bit_for_bit(pair: Any, loaded: Any, precision: str) -> None:
    """Gates of slices, and a message gate below a half."""
    receiver, sharer = pair
    text = align_chat(CHAT, receiver.tokenizer, sharer.tokenizer)
    alone = Reader(receiver.model)
    alone.extend(text.receiver_ids[:-1])
    shut = loaded(receiver, sharer, precision, gate=-1.0)
    silenced = loaded(receiver, sharer, precision, message_gate=True)
    silenced.message_head.bias = mx.full(silenced.message_head.bias.shape, -9.0)
    half = loaded(receiver, sharer, precision)
    for layer in range(4):
        half.set_gate(0, layer, layer == 2)
        half.set_gate(1, layer, layer == 2)
    for fuser in (shut, silenced):
        cache = FusedCache(C2C(receiver.model, sharer.model, fuser)).extend([text])
        assert largest_difference(cache, alone.cache) == 0
        assert dtypes(cache) == dtypes(alone.cache)
    cache = FusedCache(C2C(receiver.model, sharer.model, half)).extend([text])
    n = kv.length(cache)
    for layer in range(4):
        pairs = zip(
            kv.read_layer(cache, layer, 0, n), kv.read_layer(alone.cache, layer, 0, n), strict=True
        )
        assert all(mx.array_equal(a, b).item() for a, b in pairs) == (layer != 2)


@pytest.mark.parametrize(("pair", "precision"), MIXED, indirect=["pair"])
def test_the_four_modes_answer_for_turns_and_python_gives_the_same_ids(
    pair: Any, loaded: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "BACKGROUND_TOKENS", 6)  # a random model ends no text by itself
    receiver, sharer = pair
    fuser = loaded(receiver, sharer, precision)
    session = ChatSession(receiver, sharer, fuser, sampling=SamplingConfig(max_tokens=6))
    for mode in MODES:
        for question in ("Who wrote it?", "And when?"):
            *_, last = session.ask(question, mode)
            assert isinstance(last, Finished) and last.figures.generated_tokens > 0
    messages = [{"role": "user", "content": "Who wrote it?"}]
    said = session.messages("c2c")[1]["content"]
    text = align_chat(messages, receiver.tokenizer, sharer.tokenizer)
    link = C2C(receiver.model, sharer.model, fuser)
    cache = link.prefill(text.receiver_ids, text.sharer_ids, text.index.tolist())
    ids, token = [], text.receiver_ids[-1]
    for _ in range(6):
        token = int(receiver.model(mx.array([[token]]), cache=cache)[0, -1].argmax().item())
        if token in receiver.tokenizer.eos_token_ids:
            break
        ids.append(token)
    assert receiver.tokenizer.decode(ids).strip() == said
    assert dtypes(cache) == {kv.dtype_of(receiver.model)}


@pytest.mark.parametrize("pair", ["bfloat16", "float16"], indirect=True)
def test_an_answer_fused_as_it_is_written_stays_in_precision(pair: Any, loaded: Any) -> None:
    receiver, sharer = pair
    fuser = loaded(receiver, sharer, "float32", fuse_response=True)
    session = ChatSession(receiver, sharer, fuser, sampling=SamplingConfig(max_tokens=5))
    *_, last = session.ask("Who wrote it?", "c2c")
    assert isinstance(last, Finished)
    assert session._fused is not None
    assert dtypes(session._fused.cache) == {kv.dtype_of(receiver.model)}
