"""Several sharers into one receiver."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import pytest
from prompts import (
    ANSWER,
    FIRST,
    SECOND,
    Follow,
    assert_same,
    contents,
    for_each,
    greedy,
    prompt,
    shifted,
)

from c2c_mlx import C2C, LanguageModel
from c2c_mlx.config import Order
from c2c_mlx.doctor.check import error, tolerance
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.reader import Reader


@pytest.fixture
def several(
    receiver: LanguageModel, sharer: LanguageModel, gemma: nn.Module, make_fuser: Any
) -> list[C2C]:
    """Into the tiny Qwen3: from the Llama, from the Gemma, and from the Llama once more."""
    made = [
        (sharer.model, {"message_gate": True, "positions": "messages"}),
        (gemma, {"layer_map": ((0, 2), (3, 1)), "rotated_keys": False}),
        (sharer.model, {"layer_map": ((2, 2),), "kinds": "values", "positions": "messages"}),
    ]
    links = []
    for model, options in made:
        fuser = make_fuser(receiver.model, model, **options)
        if options.get("message_gate"):
            fuser.message_head.bias = mx.full(fuser.message_head.bias.shape, 3.0)
        links.append(C2C(receiver.model, model, fuser))
    return links


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_several_sharers_turn_by_turn(several: list[C2C], order: Order) -> None:
    growing, turns = FusedCache(*several, order=order), [FIRST, ANSWER, SECOND, FIRST[:3]]
    for n in (1, 3, 2, 4):
        prompts = for_each(prompt(*turns[:n]))
        cache = growing.extend(prompts)
        assert_same(cache, FusedCache(*several, order=order).extend(prompts), 1e-4)
        greedy(several[0].receiver, prompts[0].receiver_ids[-1:], cache)
    assert growing.last is not None and growing.last.start > 0
    stats = [growing.stats(i) for i in range(3)]
    assert [s.layers for s in stats if s] == [c.fuser.config.layer_map for c in several]
    assert list(growing.texts) == prompts
    assert all(s is not None and s.change.max() > 0 for s in stats)


def test_a_sharer_in_two_links_reads_once(several: list[C2C]) -> None:
    reader, (chat, moved, _) = FusedCache(*several), for_each(prompt(FIRST))
    reader.extend([chat, moved, chat])
    assert reader.sharers[0] is reader.sharers[2] is not reader.sharers[1]
    assert reader.last is not None
    read = sum(text.index[: reader.last.stop].max() + 1 for text in (chat, moved))
    assert reader.last.sharer_tokens == read
    with pytest.raises(C2CError, match="the same text"):
        reader.extend([chat, moved, shifted(chat)])


def test_sharers_for_which_the_receivers_prompt_is_another_one_are_refused(
    several: list[C2C],
) -> None:
    prompts = for_each(prompt(FIRST))
    longer = replace(prompts[1], receiver_ids=[1, *prompts[1].receiver_ids])
    with pytest.raises(C2CError, match="padding=False"):
        FusedCache(*several).extend([prompts[0], longer, prompts[2]])


def test_one_of_several_changes(several: list[C2C]) -> None:
    prompts = for_each(prompt(FIRST, ANSWER))
    growing = FusedCache(*several)
    growing.extend(prompts)
    prompts[1] = replace(prompts[1], sharer_ids=[*prompts[1].sharer_ids[:-6], *[77] * 6])
    assert_same(growing.extend(prompts), FusedCache(*several).extend(prompts), 1e-4)
    assert growing.last is not None and 0 < growing.last.start < len(prompts[0].receiver_ids) - 1


def test_parallel_sharers_add_up_and_sequential_ones_see_each_other(several: list[C2C]) -> None:
    prompts = for_each(prompt(FIRST, ANSWER))
    alone = Reader(several[0].receiver)
    alone.extend(prompts[0].receiver_ids[:-1])

    def fused(order: Order, *which: int) -> kv.StackedKV:
        reader = FusedCache(*(several[i] for i in which), order=order)
        return contents(reader.extend([prompts[i] for i in which]))

    both = fused("parallel", 0, 1)
    for kind, own in enumerate(contents(alone.cache)):
        parts = fused("parallel", 0)[kind] + fused("parallel", 1)[kind] - own
        allowed = tolerance(own.dtype)
        assert error(both[kind], parts) < allowed
        assert error(both[kind], fused("parallel", 1, 0)[kind]) < allowed
        assert error(both[kind], fused("sequential", 0, 1)[kind]) > 1e-3


def test_sharers_of_different_receivers_are_refused(
    several: list[C2C], gemma: nn.Module, make_fuser: Any
) -> None:
    other = C2C(gemma, several[0].sharer, make_fuser(gemma, several[0].sharer))
    for links in ([several[0], other], []):
        with pytest.raises(C2CError, match="one receiver"):
            FusedCache(*links)


def test_several_sharers_fuse_an_answer(several: list[C2C]) -> None:
    prompts = for_each(prompt(FIRST))
    reader = FusedCache(*several)
    cache = reader.extend(prompts)
    answers = [Follow(p) for p in prompts]
    greedy(reader.answering(answers), prompts[0].receiver_ids[-1:], cache)
    whole = [answer.add([5]) for answer in answers]
    assert_same(reader.cache, FusedCache(*several).extend(whole), 1e-4)
    assert [reader.stats(i) is not None for i in range(3)] == [True] * 3
