"""What needs a GPU to be tested; skipped where MLX computes on the CPU. `c2c-doctor` names these.

No machine that this was written on has one, so none of them has run yet.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from c2c_mlx import C2C, ChatSession, Fuser, LanguageModel, device
from c2c_mlx.commands import doctor
from c2c_mlx.config import FuserConfig, SamplingConfig
from c2c_mlx.doctor import conversation
from c2c_mlx.doctor.check import error, tolerance
from c2c_mlx.events import Finished
from c2c_mlx.fusers import disk
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.text.alignment import align_chat

pytestmark = pytest.mark.metal

DTYPES = [mx.bfloat16, mx.float16]
TURNS = ["Who wrote it?", "Nobody knows.", "And when was it?"]


def held_as(lm: LanguageModel, dtype: mx.Dtype) -> LanguageModel:
    lm = copy.copy(lm)
    lm.model = copy.deepcopy(lm.model)
    lm.model.set_dtype(dtype)
    return lm


def on_cpu(compute: Callable[[], mx.array]) -> mx.array:
    """The same computation where everything else was tested."""
    with mx.stream(mx.cpu):
        found = compute()
        mx.eval(found)
    return found


@pytest.fixture
def fuser(receiver: LanguageModel, sharer: LanguageModel, tmp_path: Path) -> Path:
    """Its folder; wide enough to be packed, half of its gates shut."""
    mx.random.seed(1)
    layer_map = tuple((i, i + 2) for i in range(4))
    made = Fuser(FuserConfig(receiver.shape, sharer.shape, layer_map, 64, 64, dropout=0.0))
    made.gate_logit = mx.array([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])
    disk.save(made, tmp_path, mx.bfloat16)
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_half_precision_conversation_equals_a_prefill_from_scratch(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Path, dtype: mx.Dtype
) -> None:
    ours, theirs = held_as(receiver, dtype), held_as(sharer, dtype)
    link = C2C(ours.model, theirs.model, disk.load(fuser))
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(TURNS)
    ]
    turns = [align_chat(messages[:n], ours.tokenizer, theirs.tokenizer) for n in (1, 3)]
    found = conversation.grown_by_turns(link, turns)
    assert found.error <= found.tolerance, found.note


def test_prefills_of_both_devices_agree(receiver: LanguageModel) -> None:
    """In float32 they differ by the order of sums alone."""
    model = held_as(receiver, mx.float32).model
    ids = (mx.arange(40) * 7 % 500)[None]
    assert error(model(ids), on_cpu(lambda: model(ids))) < 1e-4


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_fuser_changes_what_the_dense_one_does(fuser: Path, bits: Any) -> None:
    packed = disk.load(fuser, bits)
    assert packed.config.bits == bits  # it stays packed where there is a GPU
    mx.random.seed(2)
    sharer, receiver = (
        mx.random.normal((2, 4, 1, m.kv_heads, 30, m.head_dim))
        for m in (packed.config.sharer, packed.config.receiver)
    )
    dense = copy.deepcopy(packed)
    dense.dequantise()
    dense.cast(mx.float32)
    ours = packed.change(sharer=(*sharer,), receiver=(*receiver,)).delta
    right = on_cpu(lambda: dense.change(sharer=(*sharer,), receiver=(*receiver,)).delta)
    assert error(ours, right) <= tolerance(mx.bfloat16)


def test_gradients_of_both_devices_agree(fuser: Path) -> None:
    model = disk.load(fuser)
    model.cast(mx.float32)
    model.train()
    model.temperature = None  # hard gates, no noise
    mx.random.seed(3)
    sharer, receiver = (
        mx.random.normal((2, 4, 2, m.kv_heads, 12, m.head_dim))
        for m in (model.config.sharer, model.config.receiver)
    )

    def loss(model: Fuser) -> mx.array:
        return mx.square(model.change(sharer=(*sharer,), receiver=(*receiver,)).delta).sum()

    gradient = nn.value_and_grad(model, loss)
    ours = dict(tree_flatten(gradient(model)[1]))
    with mx.stream(mx.cpu):
        right = dict(tree_flatten(gradient(model)[1]))
        mx.eval(right)
    assert max(error(ours[name], right[name]) for name in ours) < 1e-3


def test_a_turn_leaves_the_wired_limit_alone(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Path
) -> None:
    session = ChatSession(receiver, sharer, disk.load(fuser), sampling=SamplingConfig(max_tokens=8))
    before = mx.set_wired_limit(0)
    (end,) = [e for e in session.ask(TURNS[0], "c2c") if isinstance(e, Finished)]
    assert end.figures.generated_tokens > 0
    assert mx.set_wired_limit(before) == 0


def test_caches_of_a_half_precision_model_hold_no_float32(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Path
) -> None:
    half = held_as(receiver, mx.bfloat16)
    link = C2C(half.model, held_as(sharer, mx.float16).model, disk.load(fuser))
    prompt = align_chat([{"role": "user", "content": TURNS[0]}], half.tokenizer, sharer.tokenizer)
    cache = FusedCache(link).extend([prompt])
    held = {x.dtype for x in kv.read(cache, kv.attention_layers(cache), 0, kv.length(cache))}
    assert held == {mx.bfloat16}


def test_the_doctor_finds_all_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert not device.is_rehearsed()
    code = doctor.main(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert (code, report["failed"]) == (0, [])
