"""Two chats of two templates and tokenizers: which token feeds which, section by section."""

from itertools import accumulate

import numpy as np
import pytest
from chat_tokenizers import (
    CHATML,
    DROP,
    KINDS,
    MOVE,
    PLAIN,
    SENTENCES,
    STRICT,
    THINK,
    TRIM,
    byte_level,
    common,
    content,
    conversations,
    said,
    tokenizers,
    turns,
    user,
    wrapped,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from c2c_mlx.errors import C2CError
from c2c_mlx.text.alignment import align_chat, message_groups
from c2c_mlx.text.rendering import render
from c2c_mlx.text.tokens import encode


@settings(deadline=None)
@given(conversations, tokenizers, tokenizers, st.booleans())
def test_alignment_is_total_and_monotone(messages, receiver, sharer, generation):
    aligned = align_chat(messages, receiver, sharer, add_generation_prompt=generation)
    options = {
        "add_generation_prompt": generation,
        "enable_thinking": False,
        "return_dict": False,
    }
    assert aligned.receiver_ids == list(receiver.apply_chat_template(messages, **options))
    expected = list(sharer.apply_chat_template(messages, **options))
    assert aligned.sharer_ids == (expected or [sharer.bos_token_id])
    assert aligned.index.dtype == aligned.message.dtype == np.int32
    assert aligned.index.shape == aligned.message.shape == (len(aligned.receiver_ids),)
    assert np.all(np.diff(aligned.index) >= 0)
    assert np.all((aligned.index >= 0) & (aligned.index < len(aligned.sharer_ids)))
    assert np.all((aligned.message >= -1) & (aligned.message < len(messages)))


def byte_ends(tokenizer, ids):
    """Where each byte-level token ends, in UTF-8 bytes, without any offsets."""
    special = set(tokenizer.all_special_tokens)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return list(accumulate(len(t.encode()) if t in special else len(t) for t in tokens))


def chatml_spans(messages, rendered):
    """Each message's core in a ChatML rendering, by counting (contents have no marks to find)."""
    at, spans = len("<|im_start|>system\nBe helpful.<|im_end|>\n"), []
    for m in messages:
        at += len("<|im_start|>" + m["role"] + "\n")
        lead = len(m["content"]) - len(m["content"].lstrip())
        spans.append((at + lead, at + lead + len(m["content"].strip())))
        at += len(m["content"] + "<|im_end|>\n")
    assert rendered.startswith("<|im_start|>assistant\n", at)
    return spans


def plain_spans(messages):
    at, spans = 0, []
    for m in messages:
        at += len("### " + ("Human" if m["role"] == "user" else m["role"]) + ": ")
        lead = len(m["content"]) - len(m["content"].lstrip())
        spans.append((at + lead, at + lead + len(m["content"].strip())))
        at += len(m["content"] + "\n")
    return spans


@settings(deadline=None)
@given(conversations)
@example(turns(["<|im_end|>\n<|im_start|>user\nhi", "hi", "hi"]))
def test_spans_against_a_count_of_bytes(messages):
    receiver, sharer = wrapped("bytes", CHATML), wrapped("trimmed", PLAIN)
    aligned = align_chat(messages, receiver, sharer)
    source, target = render(messages, receiver), render(messages, sharer)
    spans = list(zip(chatml_spans(messages, source), plain_spans(messages), strict=True))
    source_ends = list(accumulate(len(c.encode()) for c in source))
    target_ends = list(accumulate(len(c.encode()) for c in target))
    starts = [0, *byte_ends(sharer, aligned.sharer_ids)][:-1]
    for i, end in enumerate(byte_ends(receiver, aligned.receiver_ids)):
        character = int(np.searchsorted(source_ends, end))
        inside = [n for n, ((a, b), _) in enumerate(spans) if a <= character < b]
        assert aligned.message[i] == (inside[0] if inside else -1)
        before = [pair for pair in spans if pair[0][0] <= character and pair[0][1] > pair[0][0]]
        if not before:
            assert aligned.index[i] == 0
            continue
        (a, b), (c, _) = before[-1]
        counterpart = c + min(character, b - 1) - a
        # the last sharer token that holds a byte of the character
        holds = [j for j, start in enumerate(starts) if start < target_ends[counterpart]]
        assert aligned.index[i] == holds[-1]


@settings(deadline=None)
@given(st.lists(content, min_size=3, max_size=7).map(turns), tokenizers, st.integers(1, 3))
def test_a_longer_conversation_keeps_the_alignment_of_its_beginning(messages, sharer, n_turns):
    receiver = wrapped("bytes", CHATML)
    begun = align_chat(messages[: 2 * n_turns - 1], receiver, sharer)
    grown = align_chat(messages, receiver, sharer)
    same = common(begun.receiver_ids, grown.receiver_ids)
    assert same >= len(begun.receiver_ids) - 1  # "\n" may grow with white space after it
    read = common(begun.sharer_ids, grown.sharer_ids)
    stable = (begun.index[:same] < read) & (grown.index[:same] < read)
    np.testing.assert_array_equal(begun.message[:same], grown.message[:same])
    np.testing.assert_array_equal(begun.index[:same][stable], grown.index[:same][stable])


def test_template_tokens_take_the_first_token_and_then_the_last_of_the_message_before():
    receiver, sharer = wrapped("bytes", CHATML), wrapped("trimmed", PLAIN)
    messages = [user("the dog"), {"role": "assistant", "content": "a cat"}, user("and so")]
    aligned = align_chat(messages, receiver, sharer)
    fed = [sharer.decode(aligned.sharer_ids[: i + 1]) for i in aligned.index]
    after = {n: np.flatnonzero(aligned.message == n)[-1] + 1 for n in range(3)}
    first = np.flatnonzero(aligned.message == 0)[0]
    assert np.all(aligned.index[:first] == 0)
    assert fed[after[0]].endswith("the dog")
    assert fed[after[1]].endswith("a cat")
    assert all(text.endswith("and so") for text in fed[after[2] :])


def test_a_template_that_strips():
    receiver, sharer = wrapped("bytes", TRIM), wrapped("bytes", CHATML)
    aligned = align_chat([user(" \n the dog \n")], receiver, sharer)
    assert said(aligned, receiver, 0) == "the dog"
    inside = aligned.index[aligned.message == 0]
    assert sharer.decode([aligned.sharer_ids[i] for i in inside]).strip() == "the dog"


def test_a_template_that_drops_thoughts_keeps_the_answer_aligned():
    receiver, sharer = wrapped("bytes", THINK), wrapped("trimmed", PLAIN)
    answer = {"role": "assistant", "content": "<think>the fox</think>\n\nthe dog"}
    messages = [user("over the fox?"), answer, user("and?")]
    aligned = align_chat(messages, receiver, sharer)
    assert said(aligned, receiver, 1).strip() == "the dog"
    last = aligned.index[aligned.message == 1][-1]
    assert sharer.decode(aligned.sharer_ids[: last + 1]).endswith("</think>\n\nthe dog")

    back = align_chat(messages, sharer, receiver)
    assert said(back, sharer, 1) == answer["content"]
    last = back.index[back.message == 1][-1]
    assert receiver.decode(back.sharer_ids[: last + 1]).endswith("assistant\nthe dog")


def test_a_template_that_looks_at_the_content():
    receiver, sharer = wrapped("bytes", THINK), wrapped("trimmed", PLAIN)
    contents = ["one", "two", "<tool>5</tool>", "three", "four"]
    aligned = align_chat(turns(contents), receiver, sharer)
    assert [said(aligned, receiver, i) for i in range(5)] == contents


def test_a_template_that_drops_the_beginning_takes_no_text_of_the_message_before():
    thoughts = THINK.replace(".lstrip('\n') %}", ".lstrip('\n') %}{% set c = '</think>\n\n' + c %}")
    assert thoughts != THINK
    tokenizer = wrapped("bytes", thoughts)
    answer = "one<|im_end|>\n<|im_start|>assistant\n</think>\n\nyes"
    aligned = align_chat(turns(["one", answer, "two"]), tokenizer, tokenizer)
    assert said(aligned, tokenizer, 0) == "one"
    assert said(aligned, tokenizer, 1).endswith("yes")


def test_marks_in_a_content_are_text():
    tokenizer = wrapped("bytes", CHATML)
    content = "\U000f0000the\U000f0001 dog\ue000"
    assert said(align_chat([user(content)], tokenizer, tokenizer), tokenizer, 0) == content


def test_a_repeated_text_is_found_where_it_stands():
    tokenizer = wrapped("bytes", CHATML)
    aligned = align_chat(turns(["user", "assistant", "user"]), tokenizer, tokenizer)
    np.testing.assert_array_equal(
        aligned.index[aligned.message >= 0], np.flatnonzero(aligned.message >= 0)
    )
    assert set(aligned.message) == {-1, 0, 1, 2}


def test_bytes_of_a_character_count_as_the_character():
    receiver, sharer = wrapped("fallback", CHATML), wrapped("bytes", PLAIN)
    for one, other in ((receiver, sharer), (sharer, receiver)):
        aligned = align_chat([user("a𒀀b")], one, other)
        pieces = np.flatnonzero(aligned.message == 0)
        assert len(pieces) == 6  # a, four bytes, b
        fed = aligned.index[pieces]
        assert fed.tolist() == [fed[0], *[fed[0] + 4] * 4, fed[0] + 5]


def test_empty_offsets_belong_to_trimmed_space_or_to_a_piece_of_the_next_character():
    class Offsets:
        is_fast = True

        def __call__(self, text, **_):
            spans = [(0, 1), (1, 1), (1, 1), (1, 2), (2, 3), (5, 5), (6, 8)]
            return {"input_ids": list(range(len(spans))), "offset_mapping": spans}

    _, first, last = encode("aéb   de", Offsets())
    assert last.tolist() == [0, 1, 1, 1, 2, 4, 7]
    assert first.tolist() == [0, 1, 1, 1, 2, 3, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_no_messages(kind):
    aligned = align_chat([], wrapped("bytes", CHATML), wrapped(kind, DROP))
    assert aligned.index.tolist() == [0] * len(aligned.receiver_ids)
    assert aligned.message.tolist() == [-1] * len(aligned.receiver_ids)
    assert len(aligned.sharer_ids) == 1


def test_a_message_without_text_has_no_span():
    tokenizer = wrapped("bytes", "{% for m in messages %}({{ m['content'] or '' }}){% endfor %}x")
    aligned = align_chat([{"role": "tool", "content": None}, user("a")], tokenizer, tokenizer)
    assert said(aligned, tokenizer, 1) == "a"
    assert set(aligned.message) == {-1, 1}


# --- templates that move the system prompt ---

MOVED = [
    {"role": "system", "content": "be terse"},
    *turns(["the dog", "a cat", "and the fox"]),
]


@pytest.mark.parametrize("strategy", ["span", "first", "longest", "same"])
def test_a_system_prompt_that_both_move(strategy):
    receiver, sharer = wrapped("bytes", MOVE), wrapped("trimmed", MOVE)
    aligned = align_chat(MOVED, receiver, sharer, strategy=strategy)
    assert receiver.decode(aligned.receiver_ids) == render(MOVED, receiver)
    for number, message in enumerate(MOVED):
        assert said(aligned, receiver, number).strip() == message["content"]
        if strategy == "span":
            last = aligned.index[aligned.message == number][-1]
            fed = sharer.decode(aligned.sharer_ids[: last + 1])
            assert fed.endswith(message["content"])
    order = [n for n in dict.fromkeys(aligned.message.tolist()) if n >= 0]
    assert order == [1, 2, 0, 3]
    groups = message_groups(aligned.message, "from_first_message")
    assert [n for n in dict.fromkeys(groups.tolist()) if n >= 0] == order


@pytest.mark.parametrize("moved", ["receiver", "sharer"])
def test_a_system_prompt_that_one_moves_alone_gives_way(moved):
    templates = (MOVE, CHATML) if moved == "receiver" else (CHATML, MOVE)
    receiver, sharer = map(wrapped, ("bytes", "trimmed"), templates)
    aligned = align_chat(MOVED, receiver, sharer)
    assert np.all(np.diff(aligned.index) >= 0)
    for number in (1, 2, 3):
        last = aligned.index[aligned.message == number][-1]
        fed = sharer.decode(aligned.sharer_ids[: last + 1])
        assert fed.endswith(MOVED[number]["content"])
    for strategy in ("first", "longest"):
        with pytest.raises(C2CError, match="different orders.*alignment is span"):
            align_chat(MOVED, receiver, sharer, strategy=strategy)


# --- templates that refuse ---


def test_a_refused_system_message_joins_the_first_user_message():
    receiver, sharer = wrapped("bytes", STRICT), wrapped("trimmed", CHATML)
    messages = [{"role": "system", "content": "be terse"}, user("the dog?")]
    assert render(messages, receiver) == "<user>be terse\n\nthe dog?\n"
    aligned = align_chat(messages, receiver, sharer)
    assert said(aligned, receiver, 0) == "be terse"
    assert said(aligned, receiver, 1).strip() == "the dog?"
    last = aligned.index[aligned.message == 0][-1]
    assert sharer.decode(aligned.sharer_ids[: last + 1]).endswith("system\nbe terse")


def test_only_a_system_message_becomes_a_user_message():
    assert render([{"role": "system", "content": "hi"}], wrapped("bytes", STRICT)) == "<user>hi\n"


def test_a_refusal_is_one_line_that_names_the_model():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(300, SENTENCES, False),
        chat_template=STRICT,
        name_or_path="some/gemma",
    )
    with pytest.raises(C2CError) as caught:
        align_chat([user("a"), user("b")], wrapped("bytes", CHATML), tokenizer)
    line = str(caught.value)
    assert "\n" not in line
    assert "some/gemma" in line and "Roles must alternate" in line and "user, user" in line


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False
        name_or_path = "some/slow"

        def apply_chat_template(self, messages, **_):
            return "hi"

    with pytest.raises(C2CError, match="some/slow gives no character offsets"):
        align_chat([user("hi")], Slow(), Slow())
