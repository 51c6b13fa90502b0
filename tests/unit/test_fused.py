"""The caches of a conversation through C2C, turn by turn."""

from __future__ import annotations

import contextlib
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache
from prompts import (
    ANSWER,
    FIRST,
    POSITIONS,
    SECOND,
    MakeC2C,
    Prompt,
    aligned,
    assert_same,
    contents,
    differs,
    greedy,
    open_message_gates,
    prompt,
    scratch,
)

from c2c_mlx import LanguageModel, device
from c2c_mlx.doctor.check import error, tolerance
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.fuser import pass_width
from c2c_mlx.fusion.reader import Reader, common_prefix
from c2c_mlx.talk import gate_report


@pytest.mark.parametrize("positions", POSITIONS)
def test_closed_gates_give_the_receiver_alone(make_c2c: MakeC2C, positions: str) -> None:
    c2c, chat = make_c2c(gate=-1.0, positions=positions), prompt(FIRST, ANSWER, SECOND)
    alone = Reader(c2c.receiver)
    alone.extend(chat[0][:-1])
    fused = scratch(c2c, chat)
    assert_same(fused, alone.cache)
    last = chat[0][-1:]
    assert greedy(c2c.receiver, last, fused) == greedy(c2c.receiver, last, alone.cache)


@pytest.mark.parametrize("positions", POSITIONS)
def test_open_gates_change_just_the_mapped_layers_and_positions(
    make_c2c: MakeC2C, positions: str
) -> None:
    c2c, chat = make_c2c(positions=positions), prompt(FIRST, ANSWER)
    alone = Reader(c2c.receiver)
    alone.extend(chat[0][:-1])
    a, b = contents(scratch(c2c, chat)), contents(alone.cache)
    fused = {
        "all": np.ones(len(chat[0]) - 1, bool),
        "from_first_message": np.arange(len(chat[0]) - 1) >= 2,
        "messages": chat[3][:-1] >= 0,
    }[positions]
    for x, y in zip(a, b, strict=True):
        changed = np.array(mx.abs(x - y).max(axis=(1, 2, 4)) > 1e-6)  # [layers, positions]
        assert not changed[0].any()
        assert (changed[1:] == fused).all()


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("message_gate", [False, True])
@pytest.mark.parametrize("rotated_keys", [False, True])
def test_turn_by_turn_equals_from_scratch(
    make_c2c: MakeC2C, positions: str, message_gate: bool, rotated_keys: bool
) -> None:
    c2c = make_c2c(positions=positions, message_gate=message_gate, rotated_keys=rotated_keys)
    if message_gate:
        c2c.fuser.message_head.bias = mx.full(c2c.fuser.message_head.bias.shape, 3.0)
    growing, turns = FusedCache(c2c), [FIRST, ANSWER, SECOND, FIRST[:3], ANSWER[2:]]
    for n in (1, 3, 5):
        chat = prompt(*turns[:n])
        cache = growing.extend([aligned(chat)])
        assert_same(cache, scratch(c2c, chat), 1e-5)
        greedy(c2c.receiver, chat[0][-1:], cache)  # what decoding leaves behind is in nobody's way
    assert growing.last is not None and growing.last.start > 0


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("message_gate", [False, True])
@pytest.mark.parametrize(
    "after",
    [
        prompt(FIRST),
        prompt(FIRST, [50, 51, 99, 53], SECOND),
        prompt(FIRST[:5], ANSWER),
        prompt([*FIRST, 99, 98]),
        prompt([99], ANSWER, SECOND),
    ],
    ids=["taken back", "answer changed", "shortened", "grown", "first changed"],
)
def test_an_earlier_message_changes(
    make_c2c: MakeC2C, positions: str, message_gate: bool, after: Prompt
) -> None:
    c2c = make_c2c(positions=positions, message_gate=message_gate)
    if message_gate:
        c2c.fuser.message_head.bias = mx.full(c2c.fuser.message_head.bias.shape, 3.0)
    growing = FusedCache(c2c)
    growing.extend([aligned(prompt(FIRST, ANSWER, SECOND))])
    assert_same(growing.extend([aligned(after)]), scratch(c2c, after), 1e-5)


def test_another_conversation_begins_as_a_longer_message_does(make_c2c: MakeC2C) -> None:
    c2c = make_c2c(positions="messages", message_gate=True)
    open_message_gates(c2c)
    first, (longer, shorter) = FusedCache(c2c), (prompt([*FIRST, 99, 98]), prompt(FIRST))
    first.extend([aligned(longer)])
    n = common_prefix(longer[0], shorter[0])
    assert n == int(np.flatnonzero(shorter[3] >= 0)[-1]) + 1
    other = first.fork(n)
    assert other is not None and other.own.ids == shorter[0][:n]
    assert_same(other.extend([aligned(shorter)]), scratch(c2c, shorter), 1e-5)


def test_the_sharer_alone_changes(make_c2c: MakeC2C) -> None:
    c2c, (ids, other, index, messages) = make_c2c(), prompt(FIRST, ANSWER)
    growing = FusedCache(c2c)
    growing.extend([aligned((ids, other, index, messages))])
    changed = ids, [*other[:9], 77, *other[10:]], index, messages
    assert_same(growing.extend([aligned(changed)]), scratch(c2c, changed), 1e-5)
    assert growing.last is not None and 0 < growing.last.start < len(ids) - 1


def test_the_same_prompt_again_costs_nothing(make_c2c: MakeC2C) -> None:
    c2c, chat = make_c2c(), prompt(FIRST)
    growing = FusedCache(c2c)
    growing.extend([aligned(chat)])
    before = scratch(c2c, chat)
    assert_same(growing.extend([aligned(chat)]), before)
    assert growing.last is not None
    assert (growing.last.start, growing.last.sharer_tokens) == (len(chat[0]) - 1, 0)
    assert growing.stats() is None


@pytest.mark.parametrize("reached", [2, 8, 11])
def test_an_interruption_at_any_layer_does_no_harm(
    make_c2c: MakeC2C, reached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C does: within the sharer's pass, the receiver's, and the fused cache's layers."""
    c2c = make_c2c()
    growing = FusedCache(c2c)
    growing.extend([aligned(prompt(FIRST, ANSWER))])
    update, calls = KVCache.update_and_fetch, iter(range(1000))

    def interrupted(self: KVCache, keys: mx.array, values: mx.array) -> Any:
        if next(calls) == reached:
            raise KeyboardInterrupt
        return update(self, keys, values)

    monkeypatch.setattr(KVCache, "update_and_fetch", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        growing.extend([aligned(prompt(FIRST, ANSWER, SECOND))])
    monkeypatch.undo()
    for chat in (prompt(FIRST, ANSWER, SECOND, FIRST), prompt(FIRST[:4])):
        assert_same(growing.extend([aligned(chat)]), scratch(c2c, chat), 1e-4)


def test_progress_counts_both_prefills_to_the_end(
    make_c2c: MakeC2C, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "prefill_chunk", lambda: 4)
    c2c, chat = make_c2c(), prompt(FIRST, ANSWER)
    seen: list[tuple[int, int]] = []
    FusedCache(c2c).extend([aligned(chat)], lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {seen[-1][0]}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[0][0] == 4


def test_chunked_prefill_equals_one_pass(
    make_c2c: MakeC2C, monkeypatch: pytest.MonkeyPatch
) -> None:
    c2c, chat = make_c2c(), prompt(FIRST, ANSWER)
    whole = scratch(c2c, chat)
    monkeypatch.setattr(device, "prefill_chunk", lambda: 3)
    assert_same(scratch(c2c, chat), whole, 1e-5)


@pytest.mark.parametrize("message_gate", [False, True])
@pytest.mark.parametrize("rotated_keys", [False, True])
def test_a_long_prompt_is_fused_in_parts(
    make_c2c: MakeC2C, message_gate: bool, rotated_keys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in less memory; a message's gate is decided when all of its parts have voted."""
    c2c = make_c2c(message_gate=message_gate, rotated_keys=rotated_keys, intermediate_dim=2000)
    if message_gate:
        open_message_gates(c2c)
    chat = prompt(FIRST * 12, ANSWER * 20)

    def fused() -> tuple[kv.Cache, int]:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        return scratch(c2c, chat), mx.get_peak_memory() - before

    whole, much = fused()
    width = 4 * pass_width(c2c.fuser.config)
    monkeypatch.setattr(device, "fuser_pass", lambda weights: 7 * width)
    parts, little = fused()
    assert_same(parts, whole, 1e-5)
    assert little < much / 2


def test_message_gate_below_a_half_adds_nothing(make_c2c: MakeC2C) -> None:
    c2c, chat = make_c2c(message_gate=True, positions="messages"), prompt(FIRST, ANSWER)
    head = c2c.fuser.message_head
    alone = Reader(c2c.receiver)
    alone.extend(chat[0][:-1])
    head.weight = mx.zeros_like(head.weight)
    head.bias = mx.full(head.bias.shape, -0.01)
    assert_same(scratch(c2c, chat), alone.cache)
    head.bias = mx.full(head.bias.shape, 0.01)
    assert differs(scratch(c2c, chat), alone.cache)


def test_stats_describe_the_last_extension(make_c2c: MakeC2C) -> None:
    c2c, chat = make_c2c(), prompt(FIRST, ANSWER)
    c2c.fuser.set_gate(0, 1, False)
    growing = FusedCache(c2c)
    assert growing.stats() is None
    fused, alone = growing.extend([aligned(chat)]), Reader(c2c.receiver)
    alone.extend(chat[0][:-1])
    stats = growing.stats()
    assert stats is not None
    assert stats.layers == c2c.fuser.config.layer_map and stats.start == 0
    assert stats.gates.tolist() == c2c.fuser.gates.tolist()
    for kind, (a, b) in enumerate(zip(contents(fused), contents(alone.cache), strict=True)):
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        moved = mx.linalg.norm(a - b, axis=-1)[mx.array(c2c.receiver_layers), 0]
        # The sum was rounded to the cache's dtype, what is told of the change was not.
        assert error(mx.array(stats.change[kind]), moved) < 10 * tolerance(fused[0].keys.dtype)
    assert (stats.weight[0, 1] == 0).all() and (stats.relative_change[0, 1] == 0).all()
    assert (stats.weight[1] > 0).all() and (stats.weight <= 1).all()
    assert (stats.relative_change[1] > 0).all()


def test_means_are_over_the_positions_that_are_fused(
    make_c2c: MakeC2C, receiver: LanguageModel, sharer: LanguageModel
) -> None:
    c2c, chat = make_c2c(positions="messages"), prompt(FIRST, ANSWER)
    growing = FusedCache(c2c)
    growing.extend([aligned(chat)])
    stats = growing.stats()
    assert stats is not None
    inside = chat[3][:-1] >= 0
    assert 0 < inside.sum() < len(inside) and (stats.weight[..., ~inside] == 0).all()
    weight = stats.weight[..., inside].mean(axis=(2, 3))
    np.testing.assert_allclose(stats.mean_weight, weight, rtol=1e-5)
    moved, own = (np.linalg.norm(x[..., inside], axis=-1) for x in (stats.change, stats.own))
    np.testing.assert_allclose(stats.relative_change, moved / own, rtol=1e-5)
    told = gate_report.report(stats, aligned(chat), receiver.tokenizer, sharer.tokenizer)
    np.testing.assert_allclose(told.weights, stats.mean_weight, atol=1e-4)


def test_a_changed_fuser_fuses_anew_what_was_read(make_c2c: MakeC2C) -> None:
    c2c, chat = make_c2c(), prompt(FIRST, ANSWER)
    growing = FusedCache(c2c)
    growing.extend([aligned(chat)])
    c2c.fuser.set_gate(1, 0, False)
    growing.fuse_anew()
    assert_same(growing.extend([aligned(chat)]), scratch(c2c, chat), 1e-5)
    assert growing.last is not None and (growing.last.start, growing.last.sharer_tokens) == (0, 0)
