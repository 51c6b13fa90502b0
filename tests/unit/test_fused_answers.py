"""Answers that are fused while they are written."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import pytest
from prompts import (
    FIRST,
    POSITIONS,
    Follow,
    MakeC2C,
    aligned,
    assert_same,
    assert_same_stats,
    greedy,
    prompt,
)

from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.text.alignment import TokenAlignment


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("message_gate", [False, True])
def test_a_fused_answer_equals_a_prefill_of_it(
    make_c2c: MakeC2C, positions: str, message_gate: bool
) -> None:
    c2c = make_c2c(positions=positions, message_gate=message_gate)
    if message_gate:
        c2c.fuser.message_head.bias = mx.full(c2c.fuser.message_head.bias.shape, 3.0)
    reader, start = FusedCache(c2c), aligned(prompt(FIRST))
    cache = reader.extend([start])
    answer = Follow(start)
    said = greedy(reader.answering([answer]), start.receiver_ids[-1:], cache)
    assert answer.ids == said[: len(answer.ids)] and len(answer.ids) >= 5
    whole = answer.add([5])  # not read yet, so the caches hold all but it
    assert_same(reader.cache, FusedCache(c2c).extend([whole]), 1e-4)
    assert_same_stats(reader, FusedCache(c2c), whole)

    longer = replace(whole, receiver_ids=[*whole.receiver_ids[:-1], 6])
    reader.extend([longer])
    assert reader.last is not None and reader.last.start == reader.last.stop  # all was there


def test_ids_of_an_answer_are_fused_together_as_one_by_one(make_c2c: MakeC2C) -> None:
    c2c, start = make_c2c(), aligned(prompt(FIRST))
    ids = [start.receiver_ids[-1], 30, 31]

    def logits(*passes: list[int]) -> mx.array:
        reader = FusedCache(c2c)
        cache = reader.extend([start])
        receiver = reader.answering([Follow(start)])
        return [receiver(mx.array([part]), cache) for part in passes][-1][0, -1]

    together = logits(ids)
    assert mx.abs(together - logits(*([i] for i in ids))).max().item() < 1e-3
    # The last id's own key and value are fused, too, not just those before it.
    whole = Follow(start).add([30, 31])
    plain = c2c.receiver(mx.array([ids[-1:]]), cache=FusedCache(c2c).extend([whole]))
    assert mx.abs(together - plain[0, -1]).max().item() > 1e-2


def test_of_the_texts_of_an_answer_the_last_alone_is_kept(make_c2c: MakeC2C) -> None:
    """Each is as long as the conversation."""
    texts: list[weakref.ref[TokenAlignment]] = []

    class Noted(Follow):
        def add(self, ids: Sequence[int]) -> TokenAlignment:
            text = super().add(ids)
            texts.append(weakref.ref(text))
            return text

    reader, start = FusedCache(make_c2c()), aligned(prompt(FIRST))
    cache = reader.extend([start])
    greedy(reader.answering([Noted(start)]), start.receiver_ids[-1:], cache)
    gc.collect()
    assert len(texts) > 4 and reader.texts[0] is texts[-1]()
    assert not any(text() for text in texts[:-1])


def test_layers_below_the_fused_ones_are_computed_once(
    make_c2c: MakeC2C, monkeypatch: pytest.MonkeyPatch
) -> None:
    c2c, start = make_c2c(layer_map=((2, 3),)), aligned(prompt(FIRST))
    model = c2c.receiver
    layers, computed = [id(layer) for layer in model.layers], []
    block = type(model.layers[0])
    compute = block.__call__

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        computed.append(layers.index(id(self)))
        return compute(self, *args, **options)

    reader, answer = FusedCache(c2c), Follow(start)
    cache = reader.extend([start])
    receiver = reader.answering([answer])
    monkeypatch.setattr(block, "__call__", noted)
    for ids in (start.receiver_ids[-1:], [30, 31], [32, 33]):
        computed.clear()
        receiver(mx.array([ids]), cache)
        assert computed == [*range(len(layers)), *range(2, len(layers))]
    assert_same(cache, FusedCache(c2c).extend([answer.add([5])]), 1e-4)


@pytest.mark.parametrize("several_ids", [False, True])
def test_closed_gates_leave_an_answer_alone(make_c2c: MakeC2C, several_ids: bool) -> None:
    c2c, start = make_c2c(gate=-1.0), aligned(prompt(FIRST))
    ids, last = start.receiver_ids, start.receiver_ids[-3 if several_ids else -1 :]
    reader = FusedCache(c2c)
    begun = replace(start, receiver_ids=ids[: len(ids) - len(last) + 1])
    cache = reader.extend([begun])
    model = reader.answering([Follow(start)])
    alone = Reader(c2c.receiver)
    alone.extend(ids[: -len(last)])
    assert greedy(model, last, cache) == greedy(c2c.receiver, last, alone.cache)
