"""RoPE taken off keys and put on again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import cohere2, exaone4, granitemoehybrid
from mlx_lm.models.cache import KVCache
from mlx_lm.models.rope_utils import initialize_rope
from prompts import ANSWER, FIRST, SECOND, MakeC2C, aligned, assert_same, prompt, scratch

from c2c_mlx import LanguageModel, device
from c2c_mlx.doctor.check import error, tolerance
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv, rope
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.reader import Reader

Unsigned = Callable[[], None]
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize("name", ["receiver", "sharer", "gemma"])
@pytest.mark.parametrize("start", [0, 1, 17])
def test_unrotate_undoes_rope(
    name: str, start: int, receiver: LanguageModel, sharer: LanguageModel, gemma: nn.Module
) -> None:
    model = {"receiver": receiver.model, "sharer": sharer.model, "gemma": gemma}[name]
    keys = mx.random.normal((2, 3, 9, kv.model_shape(model, name).head_dim))
    for layer in range(len(model.layers)):
        embedding = rope.rope_of(model, layer, name)
        bare = rope.unrotate(embedding, keys, start)
        assert mx.abs(embedding(bare, offset=start) - keys).max().item() < 1e-5
        assert (
            mx.abs(rope.unrotate(embedding, embedding(keys, offset=start), start) - keys).max()
            < 1e-5
        )
        assert mx.abs(bare - keys).max().item() > 0.1


def test_bare_keys_do_not_know_their_position(make_c2c: MakeC2C) -> None:
    """One id at the first layer has the same key everywhere, once RoPE is taken off."""
    c2c = make_c2c(rotated_keys=False, layer_map=((0, 0),))
    reader = Reader(c2c.sharer)
    reader.extend([33] * 12)
    keys, _ = c2c.read_sharer(reader.cache, np.array([[2, 9, 5]]))
    assert error(keys, mx.broadcast_to(keys[..., :1, :], keys.shape)) < tolerance(keys.dtype)
    turned = make_c2c(layer_map=((0, 0),)).read_sharer(reader.cache, np.array([[2, 9, 5]]))[0]
    assert mx.abs(turned - turned[..., :1, :]).max().item() > 0.1


@pytest.mark.parametrize("start", [0, 9, 300])
@pytest.mark.parametrize(
    "variant",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "longrope", "original_max_position_embeddings": 64, **LONG},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        None,
    ],
    ids=lambda variant: variant and variant["rope_type"],
)
def test_every_variant_of_rope_is_undone(variant: dict[str, Any] | None, start: int) -> None:
    """Some scale as well (yarn by 1.14 here, longrope by 1.22), and a rotation back does again."""
    embedding = initialize_rope(16, 10000.0, False, variant, max_position_embeddings=512)
    bare = mx.random.normal((1, 2, 7, 16))
    keys = embedding(bare, offset=start)
    assert mx.abs(rope.unrotate(embedding, keys, start) - bare).max().item() < 2e-4


@pytest.mark.parametrize("name", ["cohere2", "exaone4", "granite"])
def test_a_layer_that_rotates_nothing_is_left_alone(name: str) -> None:
    """One id has the same key everywhere; Cohere's layers have a rotary embedding all the same."""
    args = SimpleNamespace(
        **{"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
        **{"attention_bias": False, "attention_multiplier": 0.25, "rms_norm_eps": 1e-5},
        **{"rope_theta": 1e4, "sliding_window_pattern": 1, "position_embedding_type": "nope"},
    )
    attention = {
        "cohere2": lambda: cohere2.Attention(args, 0),
        "exaone4": lambda: exaone4.Attention(args, is_local=False),
        "granite": lambda: granitemoehybrid.GraniteMoeHybridAttention(args),
    }[name]()
    model, cache = nn.Module(), KVCache()
    model.layers = [attention]
    attention(mx.ones((1, 9, 32)), None, cache)
    keys = cache.keys_and_values()[0]
    assert error(keys, mx.broadcast_to(keys[..., :1, :], keys.shape)) < 1e-6
    rotation = rope.Rotation(model, [0], name)
    for turn in (rotation.take_off, rotation.put_on):
        assert mx.array_equal(turn(keys[None], 5), keys[None])


def test_dynamic_rope_beyond_its_trained_length_is_refused(receiver: LanguageModel) -> None:
    """How far it turns then depends on how long the context was when a key was cached."""
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    model = copy.deepcopy(receiver.model)
    for layer in model.layers:
        layer.self_attn.rope = initialize_rope(16, 1e4, False, scaling, 64)
    rotation = rope.Rotation(model, [0, 1], "receiver")
    keys = mx.ones((2, 1, 2, 8, 16))
    rotation.take_off(keys, 56)
    for turn in (rotation.take_off, rotation.put_on):
        with pytest.raises(C2CError, match="up to position 64 alone: shorten"):
            turn(keys, 57)


@pytest.mark.parametrize("start", [0, 17, [3, 12]], ids=str)
def test_half_precision_stays(start: Any) -> None:
    start = mx.array(start) if isinstance(start, list) else start
    embedding = initialize_rope(16, 1e4, False, {"rope_type": "yarn", "factor": 4.0}, 512)
    keys = mx.random.normal((2, 3, 9, 16)).astype(mx.bfloat16)
    assert rope.unrotate(embedding, keys, start).dtype == mx.bfloat16


def test_no_position_is_below_zero(
    make_c2c: MakeC2C, unsigned: Unsigned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a prompt, in parts of one, and in a conversation that grows."""
    turns = [FIRST, ANSWER, SECOND]
    c2c, chat = make_c2c(rotated_keys=False), prompt(*turns)
    expected = scratch(c2c, chat)
    unsigned()
    assert_same(scratch(c2c, chat), expected, 1e-5)
    monkeypatch.setattr(device, "fuser_pass", lambda weights: 1)
    growing = FusedCache(c2c)
    for n in (1, 3):
        growing.extend([aligned(prompt(*turns[:n]))])
    assert_same(growing.cache, expected, 1e-5)
