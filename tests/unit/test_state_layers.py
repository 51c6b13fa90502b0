"""Models with layers that can't be rolled back: state-space models and hybrids."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import lfm2, mamba2
from prompts import ANSWER, FIRST, SECOND, Follow, aligned, assert_same, greedy, prompt
from prompts import scratch as from_scratch

from c2c_mlx import C2C, LanguageModel
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.reader import Reader


@pytest.fixture
def hybrid(lfm2: nn.Module, sharer: LanguageModel, make_fuser: Any) -> C2C:
    """Into a tiny LFM2; its layers 0 and 2 are convolutions, whose state can't be rolled back."""
    return C2C(lfm2, sharer.model, make_fuser(lfm2, sharer.model, layer_map=((1, 2), (3, 4))))


def test_a_hybrid_receiver_turn_by_turn(hybrid: C2C) -> None:
    growing = FusedCache(hybrid)
    for turns in ((FIRST,), (FIRST, ANSWER, SECOND), (FIRST, ANSWER)):
        chat = prompt(*turns)
        cache, expected = growing.extend([aligned(chat)]), from_scratch(hybrid, chat)
        assert_same(cache, expected, 1e-4)
        last = chat[0][-1:]
        assert greedy(hybrid.receiver, last, cache) == greedy(hybrid.receiver, last, expected)


def test_a_hybrid_receiver_with_a_fused_answer(hybrid: C2C) -> None:
    start = aligned(prompt(FIRST))
    reader = FusedCache(hybrid)
    cache = reader.extend([start])
    answer = Follow(start)
    receiver = reader.answering([answer])
    ids = [start.receiver_ids[-1], 30, 31]
    for i in ids:
        receiver(mx.array([[i]]), cache)
    whole = answer.add([5])
    assert_same(reader.cache, FusedCache(hybrid).extend([whole]), 1e-4)


@pytest.fixture
def mamba() -> nn.Module:
    """A model that has no attention layer at all."""
    args = mamba2.ModelArgs(
        model_type="mamba2",
        num_heads=4,
        head_dim=8,
        vocab_size=512,
        hidden_size=16,
        intermediate_size=32,
        state_size=8,
        num_hidden_layers=2,
        layer_norm_epsilon=1e-5,
        conv_kernel=3,
        n_groups=1,
        use_bias=False,
        use_conv_bias=False,
        tie_word_embeddings=True,
        time_step_limit=(0.0, float("inf")),
        time_step_rank="auto",
    )
    mx.random.seed(6)
    model = mamba2.Model(args)
    mx.eval(model.parameters())
    return model


def next_logits(reader: Reader, last: int) -> mx.array:
    return reader.model(mx.array([[last]]), cache=copy.deepcopy(reader.cache))[0, -1]


def test_a_model_without_attention_reads_every_turn_right(mamba: nn.Module) -> None:
    """Its cache has no positions to tell how far it is: decoding took it somewhere unknown."""
    grown, ids = Reader(mamba), [*FIRST]
    grown.extend(ids)
    for turn in (ANSWER, SECOND, FIRST[:5]):
        written = greedy(mamba, [5], grown.cache, 4)
        grown.settle([*ids, 5, *written])
        ids = [*ids, *turn]
        grown.extend(ids)
        scratch = Reader(mamba)
        scratch.extend(ids)
        assert mx.abs(next_logits(grown, 9) - next_logits(scratch, 9)).max().item() < 1e-4
    shorter = ids[:7]
    grown.extend(shorter)
    scratch = Reader(mamba)
    scratch.extend(shorter)
    assert mx.abs(next_logits(grown, 9) - next_logits(scratch, 9)).max().item() < 1e-4


def test_a_model_without_attention_can_neither_share_nor_receive(mamba: nn.Module) -> None:
    with pytest.raises(C2CError, match="no attention layers"):
        kv.model_shape(mamba, "mamba")


def test_an_interruption_before_the_first_attention_layer_does_no_harm(
    hybrid: C2C, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The convolutions' state is ahead by then, and no attention layer tells."""
    reader = Reader(hybrid.receiver)
    reader.extend([*FIRST, *ANSWER])
    monkeypatch.setattr(
        lfm2.Attention, "__call__", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with contextlib.suppress(KeyboardInterrupt):
        reader.extend([*FIRST, *ANSWER, *SECOND])
    monkeypatch.undo()
    scratch = Reader(hybrid.receiver)
    for ids in ([*FIRST, *ANSWER, *SECOND], [*FIRST, *ANSWER, *SECOND, 7]):
        reader.extend(ids)
        scratch.extend(ids)
        assert mx.abs(next_logits(reader, 9) - next_logits(scratch, 9)).max().item() < 1e-4


def test_the_same_prompt_again_after_an_answer(hybrid: C2C) -> None:
    """Decoding moved the fused cache's state on, though nothing new is to be fused."""
    growing, text = FusedCache(hybrid), aligned(prompt(FIRST))
    last = text.receiver_ids[-1:]
    first = greedy(hybrid.receiver, last, growing.extend([text]))
    assert greedy(hybrid.receiver, last, growing.extend([text])) == first


def test_layers_that_hold_no_keys_are_not_fused(
    hybrid: C2C, sharer: LanguageModel, make_fuser: Any
) -> None:
    fuser = make_fuser(hybrid.receiver, sharer.model, layer_map=((0, 2), (1, 3)))
    with pytest.raises(C2CError, match="layer 0 of a model is no attention layer"):
        C2C(hybrid.receiver, sharer.model, fuser)
