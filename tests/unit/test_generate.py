"""C2C on token ids: what a fused cache is, and that a growing one equals one made from scratch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import lfm2
from mlx_lm.models.cache import KVCache

from c2c_mlx import C2C, Fuser, LanguageModel, device
from c2c_mlx.config import FuserConfig, ModelShape, Order, SamplingConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import gates, kv, rope
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.fuser import pass_width
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.talk.decode import decode
from c2c_mlx.text.alignment import TokenAlignment

POSITIONS = ["all", "from_first_message", "messages"]
MakeC2C = Callable[..., C2C]
Prompt = tuple[list[int], list[int], np.ndarray, np.ndarray]


@pytest.fixture(params=["qwen3", "gemma3"])
def make(
    request: pytest.FixtureRequest,
    receiver: LanguageModel,
    sharer: LanguageModel,
    gemma: nn.Module,
    make_fuser: Callable[..., Fuser],
) -> MakeC2C:
    """C2C from the tiny Llama to the tiny Qwen3 or the tiny Gemma 3."""
    answering = receiver.model if request.param == "qwen3" else gemma

    def make(gate: float = 1.0, **options: Any) -> C2C:
        fuser = make_fuser(answering, sharer.model, gate, **options)
        return C2C(answering, sharer.model, fuser)

    return make


def prompt(*turns: Sequence[int]) -> Prompt:
    """As of a chat: two ids of opening, then each message's text followed by two template ids.

    The sharer's template is one id longer, and its tokens are half as many.
    """
    ids, other, index, messages = [1, 2], [3, 4, 5], [0, 0], [-1, -1]
    for number, text in enumerate(turns):
        first = len(other)
        other += [t + 7 for t in text[::2]]
        ids += text
        index += [first + i // 2 for i in range(len(text))]
        messages += [number] * len(text)
        ids, other = [*ids, 6, 7 + number % 2], [*other, 8, 9, 10 + number % 2]
        index += [index[-1]] * 2
        messages += [-1, -1]
    return ids, other, np.array(index, np.int32), np.array(messages, np.int32)


FIRST, ANSWER, SECOND = list(range(20, 31)), list(range(50, 58)), list(range(80, 89))


def greedy(model: nn.Module, last: list[int], cache: kv.Cache, n: int = 6) -> list[int]:
    steps = generate_step(mx.array(last), model, max_tokens=n, prompt_cache=cache)
    return [int(token) for token, _ in steps]


def contents(cache: kv.Cache) -> kv.StackedKV:
    return kv.read(cache, kv.attention_layers(cache), 0, kv.length(cache))


def assert_same(found: kv.Cache, expected: kv.Cache, tolerance: float = 0.0) -> None:
    assert kv.length(found) == kv.length(expected)
    for a, b in zip(contents(found), contents(expected), strict=True):
        assert mx.abs(a - b).max().item() <= tolerance


def differs(found: kv.Cache, expected: kv.Cache) -> bool:
    pairs = zip(contents(found), contents(expected), strict=True)
    return any(mx.abs(a - b).max().item() > 1e-3 for a, b in pairs)


def open_message_gates(c2c: C2C) -> None:
    c2c.fuser.message_head.bias = mx.full(c2c.fuser.message_head.bias.shape, 3.0)


def scratch(c2c: C2C, chat: Prompt) -> kv.Cache:
    return FusedCache(c2c).extend([aligned(chat)])


@pytest.mark.parametrize("positions", POSITIONS)
def test_closed_gates_give_the_receiver_alone(make: MakeC2C, positions: str) -> None:
    c2c, chat = make(gate=-1.0, positions=positions), prompt(FIRST, ANSWER, SECOND)
    alone = Reader(c2c.receiver)
    alone.extend(chat[0][:-1])
    fused = scratch(c2c, chat)
    assert_same(fused, alone.cache)
    last = chat[0][-1:]
    assert greedy(c2c.receiver, last, fused) == greedy(c2c.receiver, last, alone.cache)


@pytest.mark.parametrize("positions", POSITIONS)
def test_open_gates_change_just_the_mapped_layers_and_positions(
    make: MakeC2C, positions: str
) -> None:
    c2c, chat = make(positions=positions), prompt(FIRST, ANSWER)
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
    make: MakeC2C, positions: str, message_gate: bool, rotated_keys: bool
) -> None:
    c2c = make(positions=positions, message_gate=message_gate, rotated_keys=rotated_keys)
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
    make: MakeC2C, positions: str, message_gate: bool, after: Prompt
) -> None:
    c2c = make(positions=positions, message_gate=message_gate)
    if message_gate:
        c2c.fuser.message_head.bias = mx.full(c2c.fuser.message_head.bias.shape, 3.0)
    growing = FusedCache(c2c)
    growing.extend([aligned(prompt(FIRST, ANSWER, SECOND))])
    assert_same(growing.extend([aligned(after)]), scratch(c2c, after), 1e-5)


def test_the_sharer_alone_changes(make: MakeC2C) -> None:
    c2c, (ids, other, index, messages) = make(), prompt(FIRST, ANSWER)
    growing = FusedCache(c2c)
    growing.extend([aligned((ids, other, index, messages))])
    changed = ids, [*other[:9], 77, *other[10:]], index, messages
    assert_same(growing.extend([aligned(changed)]), scratch(c2c, changed), 1e-5)
    assert growing.last is not None and 0 < growing.last.start < len(ids) - 1


def test_the_same_prompt_again_costs_nothing(make: MakeC2C) -> None:
    c2c, chat = make(), prompt(FIRST)
    growing = FusedCache(c2c)
    growing.extend([aligned(chat)])
    before = scratch(c2c, chat)
    assert_same(growing.extend([aligned(chat)]), before)
    assert growing.last is not None
    assert (growing.last.start, growing.last.sharer_tokens) == (len(chat[0]) - 1, 0)
    assert growing.stats() is None


@pytest.mark.parametrize("reached", [2, 8, 11])
def test_an_interruption_at_any_layer_does_no_harm(
    make: MakeC2C, reached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C does: within the sharer's pass, the receiver's, and the fused cache's layers."""
    c2c = make()
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
    make: MakeC2C, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "prefill_chunk", lambda: 4)
    c2c, chat = make(), prompt(FIRST, ANSWER)
    seen: list[tuple[int, int]] = []
    FusedCache(c2c).extend([aligned(chat)], lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {seen[-1][0]}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[0][0] == 4


def test_chunked_prefill_equals_one_pass(make: MakeC2C, monkeypatch: pytest.MonkeyPatch) -> None:
    c2c, chat = make(), prompt(FIRST, ANSWER)
    whole = scratch(c2c, chat)
    monkeypatch.setattr(device, "prefill_chunk", lambda: 3)
    assert_same(scratch(c2c, chat), whole, 1e-5)


def test_prefill_is_the_plain_form(make: MakeC2C) -> None:
    c2c = make()
    ids, other, index, _ = prompt(FIRST)
    fused = scratch(c2c, (ids, other, index, np.zeros(len(ids), np.int32)))
    assert_same(c2c.prefill(ids, other, index), fused)
    assert_same(c2c.prefill(ids, other, index[:-1]), fused)  # the last id is fed by nothing
    itself, same = np.arange(len(ids)), make(alignment="same")
    assert_same(same.prefill(ids), same.prefill(ids, ids, itself))


def test_prefill_knows_messages_as_a_conversation_does(make: MakeC2C) -> None:
    """With a fuser that fuses messages alone and gates each of them."""
    c2c, chat = make(positions="messages", message_gate=True), prompt(FIRST, ANSWER)
    open_message_gates(c2c)
    assert_same(c2c.prefill(*chat), scratch(c2c, chat))
    assert differs(c2c.prefill(*chat), c2c.prefill(*chat[:3]))
    with pytest.raises(C2CError, match="messages must have"):
        c2c.prefill(*chat[:3], messages=[0])


@pytest.mark.parametrize("message_gate", [False, True])
@pytest.mark.parametrize("rotated_keys", [False, True])
def test_a_long_prompt_is_fused_in_parts(
    make: MakeC2C, message_gate: bool, rotated_keys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in less memory; a message's gate is decided when all of its parts have voted."""
    c2c = make(message_gate=message_gate, rotated_keys=rotated_keys, intermediate_dim=2000)
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
    monkeypatch.setattr(device, "fuser_pass", lambda: 7 * width)
    parts, little = fused()
    assert_same(parts, whole, 1e-5)
    assert little < much / 2


def test_prefill_asks_for_the_sharers_ids_of_two_tokenizers(make: MakeC2C) -> None:
    with pytest.raises(C2CError, match="tokenizers of their own: prefill needs sharer_ids") as e:
        make().prefill([5, 6, 7])
    assert "\n" not in str(e.value)
    same = make(alignment="same")
    assert kv.length(same.prefill([5, 6, 7])) == 2


def test_a_prompt_of_one_id_leaves_the_cache_empty(make: MakeC2C) -> None:
    c2c = make(alignment="same")
    cache = c2c.prefill([5])
    assert kv.length(cache) == 0
    assert len(greedy(c2c.receiver, [5], cache)) == 6


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


def test_read_sharer_picks_the_feeding_positions_of_the_mapped_layers(make: MakeC2C) -> None:
    c2c = make()
    reader = Reader(c2c.sharer)
    reader.extend(list(range(30, 45)))
    index = np.array([[3, 3, 7, 12]])
    keys, values = c2c.read_sharer(reader.cache, index)
    for at, (_, layer) in enumerate(c2c.fuser.config.layer_map):
        held = reader.cache[layer]
        assert mx.array_equal(keys[at], held.keys[:, :, mx.array(index[0])])
        assert mx.array_equal(values[at], held.values[:, :, mx.array(index[0])])


def test_bare_keys_do_not_know_their_position(make: MakeC2C) -> None:
    """One id at the first layer has the same key everywhere, once RoPE is taken off."""
    c2c = make(rotated_keys=False, layer_map=((0, 0),))
    reader = Reader(c2c.sharer)
    reader.extend([33] * 12)
    keys, _ = c2c.read_sharer(reader.cache, np.array([[2, 9, 5]]))
    assert mx.abs(keys - keys[..., :1, :]).max().item() < 1e-5
    turned = make(layer_map=((0, 0),)).read_sharer(reader.cache, np.array([[2, 9, 5]]))[0]
    assert mx.abs(turned - turned[..., :1, :]).max().item() > 0.1


def test_message_gate_below_a_half_adds_nothing(make: MakeC2C) -> None:
    c2c, chat = make(message_gate=True, positions="messages"), prompt(FIRST, ANSWER)
    head = c2c.fuser.message_head
    alone = Reader(c2c.receiver)
    alone.extend(chat[0][:-1])
    head.weight = mx.zeros_like(head.weight)
    head.bias = mx.full(head.bias.shape, -0.01)
    assert_same(scratch(c2c, chat), alone.cache)
    head.bias = mx.full(head.bias.shape, 0.01)
    assert differs(scratch(c2c, chat), alone.cache)


def test_stats_describe_the_last_extension(make: MakeC2C) -> None:
    c2c, chat = make(), prompt(FIRST, ANSWER)
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
        moved = np.array(mx.linalg.norm(a - b, axis=-1))[c2c.receiver_layers, 0]
        np.testing.assert_allclose(stats.change[kind], moved, atol=1e-4)
    assert (stats.weight[0, 1] == 0).all() and (stats.relative_change[0, 1] == 0).all()
    assert (stats.weight[1] > 0).all() and (stats.weight <= 1).all()
    assert (stats.relative_change[1] > 0).all()


def test_means_are_over_the_positions_that_are_fused(
    make: MakeC2C, receiver: LanguageModel, sharer: LanguageModel
) -> None:
    c2c, chat = make(positions="messages"), prompt(FIRST, ANSWER)
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
    told = gates.report(stats, aligned(chat), receiver.tokenizer, sharer.tokenizer)
    np.testing.assert_allclose(told.weights, stats.mean_weight, atol=1e-4)


def test_refuses_models_of_other_shapes(make: MakeC2C) -> None:
    c2c = make()
    config = c2c.fuser.config
    wrong = FuserConfig(ModelShape("other", 9, 1, 8), config.sharer, config.layer_map)
    with pytest.raises(C2CError, match=r"the fuser's receiver is other \(9 layers"):
        C2C(c2c.receiver, c2c.sharer, Fuser(wrong))
    with pytest.raises(C2CError, match="the fuser's sharer is"):
        C2C(c2c.receiver, c2c.receiver, c2c.fuser)


def test_refuses_an_empty_prompt_and_an_index_that_does_not_fit(make: MakeC2C) -> None:
    c2c = make()
    with pytest.raises(C2CError, match="empty"):
        c2c.prefill([])
    for sharer_ids, index in (
        ([1, 2], [0, 2, 0]),
        ([1, 2], [0, -1, 0]),
        ([1, 2], [0]),
        ([1], None),
    ):
        with pytest.raises(C2CError, match="index must name"):
            c2c.prefill([5, 6, 7], sharer_ids, index)


# --- several sharers


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


def aligned(chat: Prompt) -> TokenAlignment:
    ids, other, index, messages = chat
    return TokenAlignment(ids, other, index, messages)


def shifted(prompt: TokenAlignment) -> TokenAlignment:
    """As another sharer with longer text would read it."""
    return replace(prompt, sharer_ids=[9, *prompt.sharer_ids], index=prompt.index + 1)


def for_each(chat: Prompt) -> list[TokenAlignment]:
    prompt = aligned(chat)
    return [prompt, shifted(prompt), prompt]


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
    assert list(growing.last.texts) == prompts
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
        assert mx.abs(both[kind] - parts).max().item() < 1e-4
        assert mx.abs(both[kind] - fused("parallel", 1, 0)[kind]).max().item() < 1e-4
        assert mx.abs(both[kind] - fused("sequential", 0, 1)[kind]).max().item() > 1e-3


def test_sharers_of_different_receivers_are_refused(
    several: list[C2C], gemma: nn.Module, make_fuser: Any
) -> None:
    other = C2C(gemma, several[0].sharer, make_fuser(gemma, several[0].sharer))
    for links in ([several[0], other], []):
        with pytest.raises(C2CError, match="one receiver"):
            FusedCache(*links)


# --- fusing the response


class Follow:
    """An answer of which two ids at a time become one of the sharer's, which then still changes."""

    def __init__(self, prompt: TokenAlignment) -> None:
        self.prompt, self.ids = prompt, []

    def add(self, ids: Sequence[int]) -> TokenAlignment:
        self.ids += ids
        pairs = [self.ids[i : i + 2] for i in range(0, len(self.ids), 2)]
        end, number = len(self.prompt.sharer_ids), self.prompt.message.max() + 1
        index = [end + i // 2 for i in range(len(self.ids))]
        return TokenAlignment(
            [*self.prompt.receiver_ids, *self.ids],
            [*self.prompt.sharer_ids, *(sum(pair) % 500 for pair in pairs)],
            np.append(self.prompt.index, index).astype(np.int32),
            np.append(self.prompt.message, [number] * len(self.ids)).astype(np.int32),
        )


def assert_same_stats(grown: FusedCache, fresh: FusedCache, text: TokenAlignment) -> None:
    """A turn's stats, and those of its last position, are what a prefill of its text tells."""
    fresh.extend([text])
    for since in (0, len(text.receiver_ids) - 2):
        found, expected = grown.stats(since=since), fresh.stats(since=since)
        assert found is not None and expected is not None
        assert found.start == expected.start >= since
        for name in ("weight", "own", "change"):
            a, b = getattr(found, name), getattr(expected, name)
            np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)
        assert found.change.any()


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("message_gate", [False, True])
def test_a_fused_answer_equals_a_prefill_of_it(
    make: MakeC2C, positions: str, message_gate: bool
) -> None:
    c2c = make(positions=positions, message_gate=message_gate)
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


def test_ids_of_an_answer_are_fused_together_as_one_by_one(make: MakeC2C) -> None:
    c2c, start = make(), aligned(prompt(FIRST))
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


@pytest.mark.parametrize("several_ids", [False, True])
def test_closed_gates_leave_an_answer_alone(make: MakeC2C, several_ids: bool) -> None:
    c2c, start = make(gate=-1.0), aligned(prompt(FIRST))
    ids, last = start.receiver_ids, start.receiver_ids[-3 if several_ids else -1 :]
    reader = FusedCache(c2c)
    begun = replace(start, receiver_ids=ids[: len(ids) - len(last) + 1])
    cache = reader.extend([begun])
    model = reader.answering([Follow(start)])
    alone = Reader(c2c.receiver)
    alone.extend(ids[: -len(last)])
    assert greedy(model, last, cache) == greedy(c2c.receiver, last, alone.cache)


def test_several_sharers_fuse_an_answer(several: list[C2C]) -> None:
    prompts = for_each(prompt(FIRST))
    reader = FusedCache(*several)
    cache = reader.extend(prompts)
    answers = [Follow(p) for p in prompts]
    greedy(reader.answering(answers), prompts[0].receiver_ids[-1:], cache)
    whole = [answer.add([5]) for answer in answers]
    assert_same(reader.cache, FusedCache(*several).extend(whole), 1e-4)
    assert [reader.stats(i) is not None for i in range(3)] == [True] * 3


@pytest.fixture
def hybrid(sharer: LanguageModel, make_fuser: Any) -> C2C:
    """Into a tiny LFM2; its layers 0 and 2 are convolutions, whose state can't be rolled back."""
    args = lfm2.ModelArgs(
        model_type="lfm2",
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        norm_eps=1e-5,
        conv_bias=False,
        conv_L_cache=3,
        block_dim=32,
        block_multiple_of=8,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        block_ff_dim=64,
        full_attn_idxs=[1, 3],
    )
    mx.random.seed(5)
    model = lfm2.Model(args)
    mx.eval(model.parameters())
    return C2C(model, sharer.model, make_fuser(model, sharer.model, layer_map=((1, 2), (3, 4))))


def test_a_hybrid_receiver_turn_by_turn(hybrid: C2C) -> None:
    growing = FusedCache(hybrid)
    for turns in ((FIRST,), (FIRST, ANSWER, SECOND), (FIRST, ANSWER)):
        chat = prompt(*turns)
        cache, expected = growing.extend([aligned(chat)]), scratch(hybrid, chat)
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


def test_a_changed_fuser_fuses_anew_what_was_read(make: MakeC2C) -> None:
    c2c, chat = make(), prompt(FIRST, ANSWER)
    growing = FusedCache(c2c)
    growing.extend([aligned(chat)])
    c2c.fuser.set_gate(1, 0, False)
    growing.fuse_anew()
    assert_same(growing.extend([aligned(chat)]), scratch(c2c, chat), 1e-5)
    assert growing.last is not None and (growing.last.start, growing.last.sharer_tokens) == (0, 0)


# --- decoding


def pieces_of(
    lm: LanguageModel, stop_strings: Sequence[str], n: int
) -> Generator[tuple[int, str], None, str]:
    reader = Reader(lm.model)
    reader.extend([10, 11, 12])
    sampling = SamplingConfig(max_tokens=n, temp=1.5, seed=4)
    return decode(lm.model, lm.tokenizer, reader.cache, [13], sampling, stop_strings)


def written(lm: LanguageModel, stop_strings: Sequence[str] = ()) -> list[str]:
    return [piece for _, piece in pieces_of(lm, stop_strings, 24)]


def ended(
    lm: LanguageModel, stop_strings: Sequence[str] = (), n: int = 24
) -> tuple[list[int], str]:
    """All ids, and the reason why there are no more."""
    tokens, pieces = [], pieces_of(lm, stop_strings, n)
    while True:
        try:
            tokens.append(next(pieces)[0])
        except StopIteration as end:
            return tokens, end.value


def test_decoding_is_repeatable_and_whole(receiver: LanguageModel) -> None:
    once = written(receiver)
    assert once == written(receiver)
    assert len("".join(once)) > 10


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("start", [3, 8])
def test_no_part_of_a_stop_string_is_ever_shown(
    receiver: LanguageModel, start: int, length: int
) -> None:
    text = "".join(written(receiver))
    stop = text[start : start + length]
    pieces = written(receiver, ["never written", stop])
    assert "".join(pieces) == text[: text.index(stop)]
    assert len(pieces) < 24


def test_why_an_answer_ended(receiver: LanguageModel) -> None:
    text = "".join(written(receiver))

    def reason(n: int, stop_strings: Sequence[str] = ()) -> str:
        return ended(receiver, stop_strings, n)[1]

    assert reason(24) == "length"
    assert reason(24, [text]) == "stop"  # complete with the last token that is allowed
    eos, tokens = receiver.tokenizer.eos_token_ids, ended(receiver)[0]
    end = tokens[9]
    receiver.tokenizer.eos_token_ids = {end}
    try:
        at = tokens.index(end) + 1
        assert (reason(at - 1), reason(at), reason(24)) == ("length", "stop", "stop")
    finally:
        receiver.tokenizer.eos_token_ids = eos


def test_the_beginning_of_a_stop_string_comes_out_at_the_end(receiver: LanguageModel) -> None:
    text = "".join(written(receiver))
    pieces = written(receiver, [text[-2:] + "and what never comes"])
    assert "".join(pieces) == text
    assert pieces[-1].endswith(text[-2:])


def test_settle_keeps_what_was_written_for_the_next_turn(receiver: LanguageModel) -> None:
    reader, ids = Reader(receiver.model), [10, 11, 12, 13]
    reader.extend(ids[:-1])
    sampling = SamplingConfig(max_tokens=9)
    tokens = []
    for token, _ in decode(receiver.model, receiver.tokenizer, reader.cache, ids[-1:], sampling):
        tokens.append(token)
        if len(tokens) == 4:
            break
    reader.settle([*ids, *tokens])
    assert reader.ids == [*ids, *tokens][: len(reader.ids)]
    assert kv.length(reader.cache) == len(reader.ids) >= len(ids) + 3
    longer = [*ids, *tokens, 44, 45]
    again = Reader(receiver.model)
    again.extend(longer)
    reader.extend(longer)
    assert_same(reader.cache, again.cache, 1e-5)
