"""Tokens one by one: strategies that look at no text, and what special tokens map to."""

import gc

import numpy as np
import pytest
from chat_tokenizers import CHATML, PLAIN, SENTENCES, byte_level, said, user, wrapped
from transformers import PreTrainedTokenizerFast

from c2c_mlx.errors import C2CError
from c2c_mlx.text.alignment import align_chat
from c2c_mlx.text.tokens import _COUNTERPARTS, align_ids


def test_the_same_ids_for_both():
    receiver, sharer = wrapped("bytes", CHATML), wrapped("trimmed", PLAIN)
    aligned = align_chat([user("the été dog")], receiver, sharer, strategy="same")
    assert aligned.index.tolist() == list(range(len(aligned.receiver_ids)))
    assert aligned.sharer_ids == aligned.receiver_ids
    assert said(aligned, receiver, 0) == "the été dog"


@pytest.mark.parametrize("strategy", ["first", "longest"])
@pytest.mark.parametrize("padding", [True, False])
def test_messages_token_by_token_between_each_ones_template(strategy, padding):
    receiver, sharer = wrapped("bytes", CHATML), wrapped("trimmed", PLAIN)
    messages = [user("the été dog"), {"role": "assistant", "content": "dog"}, user("été")]
    aligned = align_chat(messages, receiver, sharer, strategy=strategy, padding=padding)
    assert said(aligned, receiver, 0) == "the été dog"
    for number in range(3):
        at = np.flatnonzero(aligned.message == number)
        ids = [aligned.receiver_ids[i] for i in at]
        read = [aligned.sharer_ids[i] for i in aligned.index[at]]
        assert read == align_ids(ids, receiver, sharer, strategy)
        assert min(read) >= 0
        if padding:
            assert np.array_equal(aligned.index[at], at)
    template = [i for i, m in zip(aligned.receiver_ids, aligned.message, strict=True) if m < 0]
    plain = align_chat(messages, receiver, sharer)
    own = [i for i, m in zip(plain.receiver_ids, plain.message, strict=True) if m < 0]
    assert [i for i in template if i >= 0] == own
    assert (min(aligned.receiver_ids + aligned.sharer_ids) < 0) == padding
    assert aligned.receiver_ids[-1] >= 0
    assert np.all(np.diff(aligned.index) >= 0)


def test_first_and_longest_choose_among_several_sharer_tokens():
    receiver, sharer = wrapped("bytes", CHATML), wrapped("trimmed", PLAIN)
    ids = receiver("Armee Dialekt Sprache", add_special_tokens=False)["input_ids"]
    first, longest = (align_ids(ids, receiver, sharer, s) for s in ("first", "longest"))
    for token, one, other in zip(ids, first, longest, strict=True):
        split = sharer(receiver.decode([token]), add_special_tokens=False)["input_ids"]
        assert one == split[0]
        assert other == max(split, key=lambda t: len(sharer.decode([t])))
    assert first != longest


def test_special_tokens_map_by_role_and_then_by_string():
    receiver, sharer = wrapped("bytes", CHATML), wrapped("fallback", PLAIN)
    bos, eos, pad = receiver.bos_token_id, receiver.eos_token_id, receiver.pad_token_id
    # the sharer has no pad token: its eos stands in
    expected = [sharer.bos_token_id, sharer.eos_token_id, sharer.eos_token_id]
    assert align_ids([bos, eos, pad], receiver, sharer) == expected


def test_counterparts_are_remembered_no_longer_than_the_tokenizers():
    gc.collect()
    before = len(_COUNTERPARTS)
    receiver = PreTrainedTokenizerFast(tokenizer_object=byte_level(300, SENTENCES, False))
    align_ids([40, 41], receiver, wrapped("bytes", CHATML))
    assert len(_COUNTERPARTS) == before + 1
    del receiver
    gc.collect()
    assert len(_COUNTERPARTS) == before


def test_unknown_strategies_are_named():
    tokenizer = wrapped("bytes", CHATML)
    with pytest.raises(C2CError, match="span, first, longest, same"):
        align_chat([user("hi")], tokenizer, tokenizer, strategy="best")
    with pytest.raises(C2CError, match="first or longest"):
        align_ids([1], tokenizer, tokenizer, "span")
