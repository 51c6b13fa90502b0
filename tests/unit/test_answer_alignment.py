"""Answers: aligned while they are being written, and as the ids that training scores."""

import numpy as np
import pytest
from chat_tokenizers import (
    CHATML,
    PLAIN,
    SENTENCES,
    THINK,
    TRIM,
    byte_level,
    common,
    conversations,
    tokenizers,
    user,
    wrapped,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from c2c_mlx.models.load import PLAIN_TEMPLATE
from c2c_mlx.text.alignment import align_chat
from c2c_mlx.text.answer import AnswerAlignment
from c2c_mlx.text.rendering import render
from c2c_mlx.text.tokens import response_ids, text_ids, tokenize

# As Mistral's 0.2 and as TinyLlama's: what stands before an answer is ordinary text.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
ROLES = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@settings(deadline=None)
@given(
    conversations,
    tokenizers,
    tokenizers,
    st.sampled_from(["span", "first", "longest", "same"]),
    st.lists(st.integers(0, 199), max_size=12),
)
def test_the_alignment_of_a_growing_answer_is_total_and_monotone(
    messages, receiver, sharer, strategy, ids
):
    prompt = align_chat(messages, receiver, sharer, strategy=strategy)
    growing = AnswerAlignment(prompt, receiver, sharer, strategy=strategy)
    n, aligned = len(prompt.receiver_ids), growing.add([])
    assert aligned.receiver_ids == prompt.receiver_ids
    for at, token in enumerate(ids, 1):
        aligned = growing.add([token])
        assert aligned.receiver_ids == prompt.receiver_ids + ids[:at]
        assert common(aligned.sharer_ids, prompt.sharer_ids) == len(prompt.sharer_ids)
        assert aligned.index.dtype == aligned.message.dtype == np.int32
        assert aligned.index.shape == aligned.message.shape == (n + at,)
        np.testing.assert_array_equal(aligned.index[:n], prompt.index)
        assert np.all(np.diff(aligned.index) >= 0)
        assert np.all(aligned.index < len(aligned.sharer_ids))
        assert set(aligned.message[n:].tolist()) <= {prompt.message.max(initial=-1) + 1, -1}
    again = AnswerAlignment(prompt, receiver, sharer, strategy=strategy).add(ids)
    assert again.sharer_ids == aligned.sharer_ids
    np.testing.assert_array_equal(again.index, aligned.index)


@settings(deadline=None)
@given(
    st.sampled_from(["bytes", "trimmed"]),
    st.sampled_from(["span", "first", "longest"]),
    st.sampled_from([*SENTENCES, "世界 🚀🎉", "👩‍💻 🇫🇷 e\u0301", "x"]),
)
def test_what_feeds_a_token_stays_as_the_answer_goes_on(kind, strategy, answer):
    receiver, sharer = wrapped("bytes", CHATML), wrapped(kind, PLAIN)
    prompt = align_chat([user("What do you know?")], receiver, sharer, strategy=strategy)
    growing = AnswerAlignment(prompt, receiver, sharer, strategy=strategy)
    before = growing.add([])
    for token in receiver(answer, add_special_tokens=False)["input_ids"]:
        aligned = growing.add([token])
        assert aligned.sharer_ids[:-1] == before.sharer_ids
        np.testing.assert_array_equal(aligned.index[:-1], before.index)
        assert aligned.index[-1] == len(before.sharer_ids)
        before = aligned


def test_an_end_of_turn_is_no_part_of_the_answer():
    receiver, sharer = wrapped("bytes", CHATML), wrapped("trimmed", PLAIN)
    prompt = align_chat([user("hi")], receiver, sharer)
    growing = AnswerAlignment(prompt, receiver, sharer)
    ids = receiver("a dog<|im_end|>", add_special_tokens=False)["input_ids"]
    assert growing.add(ids).message.tolist()[-3:] == [1, 1, -1]


ANSWER = {"role": "assistant", "content": "a dog"}


@pytest.mark.parametrize(
    "template, expected",
    [
        (CHATML, "a dog<|im_end|>"),
        (PLAIN, " a dog\n<|im_end|>"),  # the template ends no turn: eos is added
        (TRIM, "a dog<|im_end|>"),
        (THINK, "a dog<|im_end|>"),  # the full rendering lacks the prompt's empty thoughts
    ],
)
def test_the_response_ends_with_one_end_of_turn(template, expected):
    tokenizer = wrapped("bytes", template)
    assert tokenizer.decode(response_ids([user("hi"), ANSWER], tokenizer)) == expected


@pytest.mark.parametrize("template", [CHATML, PLAIN, TRIM, THINK])
def test_the_text_of_a_response_is_without_what_ends_it(template):
    tokenizer = wrapped("bytes", template)
    ids = text_ids([user("hi"), ANSWER], tokenizer)
    assert tokenizer.decode(ids).strip() == "a dog"
    assert response_ids([user("hi"), ANSWER], tokenizer)[: len(ids)] == ids
    assert len(text_ids([user("hi"), ANSWER | {"content": ""}], tokenizer)) == 1


def test_an_end_of_turn_that_is_not_the_eos_token_ends_the_response():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(300, SENTENCES, False),
        chat_template=CHATML,
        eos_token="<|endoftext|>",
    )
    ids = response_ids([user("hi"), ANSWER], tokenizer)
    assert tokenizer.decode(ids) == "a dog<|im_end|>"


def test_mlx_lm_wrapped_tokenizers_give_the_same():
    tokenizer_utils = pytest.importorskip("mlx_lm.tokenizer_utils")
    bare = [wrapped("bytes", THINK), wrapped("trimmed", PLAIN)]
    wraps = [tokenizer_utils.TokenizerWrapper(tokenizer) for tokenizer in bare]
    messages = [user("the dog"), ANSWER, user("the fox")]
    for strategy in ("span", "first"):
        one = align_chat(messages, *bare, strategy=strategy)
        other = align_chat(messages, *wraps, strategy=strategy)
        assert one.receiver_ids == other.receiver_ids
        assert one.sharer_ids == other.sharer_ids
        np.testing.assert_array_equal(one.index, other.index)
    assert response_ids(messages[:2], bare[0]) == response_ids(messages[:2], wraps[0])


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, INST, ROLES])
def test_an_answer_is_spelled_as_behind_its_prompt(template):
    tokenizer = wrapped("prepended", template)
    messages = [user("Which city?"), {"role": "assistant", "content": "Two models"}]
    before = tokenize(render(messages[:1], tokenizer), tokenizer)
    whole = tokenize(render(messages, tokenizer, add_generation_prompt=False), tokenizer)
    for ids in (text_ids(messages, tokenizer), response_ids(messages, tokenizer)[:-1]):
        assert ids and [*before, *ids] == whole[: len(before) + len(ids)]
