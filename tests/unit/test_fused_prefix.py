from __future__ import annotations

import itertools
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
import pytest

from c2c_mlx import C2C, LanguageModel, kv, load_model
from c2c_mlx.alignment import align_chat
from c2c_mlx.config import FuserConfig, SamplingConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fuser import Fuser
from c2c_mlx.generate import FusedPrefix, Prefix, decode
from c2c_mlx.layers import k_nearest

TINY = Path(__file__).parents[1] / "golden" / "data" / "e2e" / "qwen3_llama"


@pytest.fixture(scope="session")
def pair() -> tuple[LanguageModel, LanguageModel]:
    """A tiny Qwen3 receiver and a tiny Llama sharer, with real tokenizers."""
    return load_model(TINY / "receiver"), load_model(TINY / "sharer")


def make_fuser(pair: tuple[LanguageModel, LanguageModel], level: float = 1.0, **fields) -> Fuser:
    receiver, sharer = (lm.shape for lm in pair)
    layers = tuple(k_nearest(receiver.layers, sharer.layers))
    mx.random.seed(1)
    fuser = Fuser(
        FuserConfig(receiver, sharer, layers, hidden_dim=16, intermediate_dim=16, **fields)
    )
    fuser.gate_logit = mx.full(fuser.gate_logit.shape, level)
    fuser.eval()
    return fuser


CHAT = [
    {"role": "user", "content": "the quick brown fox"},
    {"role": "assistant", "content": "jumps over"},
    {"role": "user", "content": "the lazy dog"},
]
VARIANTS = list(
    itertools.product(("all", "from_first_message", "messages"), (True, False), (True, False))
)


def aligned(pair, messages):
    a = align_chat(messages, pair[0].tokenizer, pair[1].tokenizer)
    return a.receiver_ids, a.sharer_ids, a.index, a.message


def numbers(cache):
    layers = kv.attention_layers(cache)
    return [np.array(x) for x in kv.read(cache, layers, 0, kv.length(cache))]


@pytest.mark.parametrize("positions", ["all", "from_first_message", "messages"])
def test_closed_gates_leave_the_receiver_bit_for_bit_alone(pair, positions):
    receiver, sharer = pair
    c2c = C2C(receiver.model, sharer.model, make_fuser(pair, -1.0, positions=positions))
    ids, *feeds = aligned(pair, CHAT)
    fused = FusedPrefix(c2c).extend(ids, *feeds)
    own = Prefix(receiver.model)
    own.extend(ids[:-1])
    for a, b in zip(numbers(fused), numbers(own.cache), strict=True):
        assert np.array_equal(a, b)
    sampling = SamplingConfig(max_tokens=8)
    written = [
        [token for token, _ in decode(receiver.model, receiver.tokenizer, c, ids[-1:], sampling)]
        for c in (fused, own.cache)
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize(("positions", "rotated", "gate"), VARIANTS)
def test_a_conversation_by_turns_equals_a_prefill_from_scratch(pair, positions, rotated, gate):
    fuser = make_fuser(pair, positions=positions, rotated_keys=rotated, message_gate=gate)
    c2c = C2C(pair[0].model, pair[1].model, fuser)
    growing = FusedPrefix(c2c)
    for turns in (1, 3):
        prompt = aligned(pair, CHAT[:turns])
        cache = growing.extend(*prompt)
        assert kv.length(cache) == len(prompt[0]) - 1
        sampling = SamplingConfig(max_tokens=4)
        for _ in decode(pair[0].model, pair[0].tokenizer, cache, prompt[0][-1:], sampling):
            pass  # decoding leaves its tokens in the cache; the next turn must not see them
    cache = growing.extend(*prompt)
    scratch = FusedPrefix(c2c).extend(*prompt)
    for a, b in zip(numbers(cache), numbers(scratch), strict=True):
        assert np.allclose(a, b, atol=1e-5)


def test_an_earlier_message_that_changes_is_rolled_back(pair):
    c2c = C2C(pair[0].model, pair[1].model, make_fuser(pair))
    growing = FusedPrefix(c2c)
    growing.extend(*aligned(pair, CHAT))
    other = [{"role": "user", "content": "a slow brown fox"}, *CHAT[1:]]
    cache = growing.extend(*aligned(pair, other))
    scratch = FusedPrefix(c2c).extend(*aligned(pair, other))
    for a, b in zip(numbers(cache), numbers(scratch), strict=True):
        assert np.allclose(a, b, atol=1e-5)


def test_open_gates_change_the_messages_and_nothing_else(pair):
    c2c = C2C(pair[0].model, pair[1].model, make_fuser(pair, positions="messages"))
    ids, sharer_ids, index, message = aligned(pair, CHAT)
    prefix = FusedPrefix(c2c)
    fused = numbers(prefix.extend(ids, sharer_ids, index, message))
    own = numbers(prefix.own.cache)
    changed = (np.abs(fused[0] - own[0]) > 0).any(axis=(0, 1, 2, 4))
    assert np.array_equal(changed, message[:-1] >= 0)
    stats = prefix.stats()
    assert stats.gates.all() and (stats.relative_change > 0).all()


def test_unrotate_undoes_the_models_own_rope(pair):
    rope = kv.rope_of(pair[0].model, 0, "receiver")
    keys = mx.random.normal((2, 2, 7, pair[0].shape.head_dim))
    assert mx.allclose(kv.unrotate(rope, rope(keys, offset=5), 5), keys, atol=1e-5)


def test_a_message_gate_below_a_half_adds_nothing(pair):
    fuser = make_fuser(pair, message_gate=True)
    fuser.message_head.bias = mx.full(fuser.message_head.bias.shape, -9.0)
    c2c = C2C(pair[0].model, pair[1].model, fuser)
    prefix = FusedPrefix(c2c)
    fused = prefix.extend(*aligned(pair, CHAT))
    for a, b in zip(numbers(fused), numbers(prefix.own.cache), strict=True):
        assert np.array_equal(a, b)


def test_what_does_not_fit_is_refused(pair):
    receiver, sharer = pair
    fuser = make_fuser(pair)
    with pytest.raises(C2CError, match="receiver is"):
        C2C(sharer.model, receiver.model, fuser)
    c2c = C2C(receiver.model, sharer.model, fuser)
    with pytest.raises(C2CError, match="empty"):
        c2c.prefill([])
    with pytest.raises(C2CError, match="index"):
        c2c.prefill([1, 2, 3], [1, 2], [0, 7])


def test_a_stop_string_is_never_shown(pair):
    receiver = pair[0]
    ids = aligned(pair, CHAT)[0]

    def write(stops=()):
        prefix = Prefix(receiver.model)
        prefix.extend(ids[:-1])
        sampling = SamplingConfig(max_tokens=12)
        stream = decode(receiver.model, receiver.tokenizer, prefix.cache, ids[-1:], sampling, stops)
        return "".join(piece for _, piece in stream)

    text = write()
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    assert stop and write([stop]) == text[: text.index(stop)]
