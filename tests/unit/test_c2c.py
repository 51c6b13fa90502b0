"""C2C on token ids: the plain form of what a conversation does."""

from __future__ import annotations

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
import pytest
from prompts import (
    ANSWER,
    FIRST,
    MakeC2C,
    assert_same,
    differs,
    greedy,
    open_message_gates,
    prompt,
    scratch,
)

from c2c_mlx import C2C, Fuser
from c2c_mlx.config import FuserConfig, ModelShape
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.reader import Reader


def test_prefill_is_the_plain_form(make_c2c: MakeC2C) -> None:
    c2c = make_c2c()
    ids, other, index, _ = prompt(FIRST)
    fused = scratch(c2c, (ids, other, index, np.zeros(len(ids), np.int32)))
    assert_same(c2c.prefill(ids, other, index), fused)
    assert_same(c2c.prefill(ids, other, index[:-1]), fused)  # the last id is fed by nothing
    itself, same = np.arange(len(ids)), make_c2c(alignment="same")
    assert_same(same.prefill(ids), same.prefill(ids, ids, itself))


def test_prefill_knows_messages_as_a_conversation_does(make_c2c: MakeC2C) -> None:
    """With a fuser that fuses messages alone and gates each of them."""
    c2c, chat = make_c2c(positions="messages", message_gate=True), prompt(FIRST, ANSWER)
    open_message_gates(c2c)
    assert_same(c2c.prefill(*chat), scratch(c2c, chat))
    assert differs(c2c.prefill(*chat), c2c.prefill(*chat[:3]))
    with pytest.raises(C2CError, match="messages must have"):
        c2c.prefill(*chat[:3], messages=[0])


def test_prefill_asks_for_the_sharers_ids_of_two_tokenizers(make_c2c: MakeC2C) -> None:
    with pytest.raises(C2CError, match="tokenizers of their own: prefill needs sharer_ids") as e:
        make_c2c().prefill([5, 6, 7])
    assert "\n" not in str(e.value)
    same = make_c2c(alignment="same")
    assert kv.length(same.prefill([5, 6, 7])) == 2


def test_a_prompt_of_one_id_leaves_the_cache_empty(make_c2c: MakeC2C) -> None:
    c2c = make_c2c(alignment="same")
    cache = c2c.prefill([5])
    assert kv.length(cache) == 0
    assert len(greedy(c2c.receiver, [5], cache)) == 6


def test_refuses_an_empty_prompt_and_an_index_that_does_not_fit(make_c2c: MakeC2C) -> None:
    c2c = make_c2c()
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


def test_refuses_models_of_other_shapes(make_c2c: MakeC2C) -> None:
    c2c = make_c2c()
    config = c2c.fuser.config
    wrong = FuserConfig(ModelShape("other", 9, 1, 8), config.sharer, config.layer_map)
    with pytest.raises(C2CError, match=r"the fuser's receiver is other \(9 layers"):
        C2C(c2c.receiver, c2c.sharer, Fuser(wrong))
    with pytest.raises(C2CError, match="the fuser's sharer is"):
        C2C(c2c.receiver, c2c.receiver, c2c.fuser)


def test_read_sharer_picks_the_feeding_positions_of_the_mapped_layers(make_c2c: MakeC2C) -> None:
    c2c = make_c2c()
    reader = Reader(c2c.sharer)
    reader.extend(list(range(30, 45)))
    index = np.array([[3, 3, 7, 12]])
    keys, values = c2c.read_sharer(reader.cache, index)
    for at, (_, layer) in enumerate(c2c.fuser.config.layer_map):
        held = reader.cache[layer]
        assert mx.array_equal(keys[at], held.keys[:, :, mx.array(index[0])])
        assert mx.array_equal(values[at], held.values[:, :, mx.array(index[0])])
