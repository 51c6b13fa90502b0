import functools
import gc
import json
from itertools import accumulate, takewhile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from c2c_mlx.errors import C2CError
from c2c_mlx.text.alignment import align_chat
from c2c_mlx.text.answer import AnswerAlignment
from c2c_mlx.text.rendering import render
from c2c_mlx.text.tokens import _COUNTERPARTS, align_ids, encode, response_ids, text_ids

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Two models talk to each other through their caches; no text is written in between.",
    "Eine Sprache ist ein Dialekt mit einer Armee. L'été dernier, nous étions à l'île.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 22))  # 世界 🚀🎉",
] * 3

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}### {{ 'Human' if m['role'] == 'user' else m['role'] }}: "
    "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}### assistant:{% endif %}"
)
TRIM = (
    "{% for m in messages %}{{ '[' + m['role'] + ']\n\n' + m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"
)
# As Qwen3 does: thoughts of earlier answers are dropped, tool responses are looked at.
THINK = (
    "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% elif c.startswith('<tool>') %}"
    "{% set c = '(tool) ' + c %}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + c }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# As Gemma does.
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must\n alternate') }}{% endif %}"
    "{{ '<' + m['role'] + '>' + m['content'] | trim + '\n' }}{% endfor %}"
)
REWRITE = (
    "{% for m in messages %}{{ m['content'] | tojson }};{{ m['content'] | upper }}{% endfor %}"
)
DROP = "{% for m in messages %}{{ m['role'] }}.{% endfor %}"
TEMPLATES = [CHATML, PLAIN, TRIM, THINK, REWRITE, DROP]


def byte_level(n_tokens, sentences, trim_offsets):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=trim_offsets
    )
    tokenizer.decoder = decoders.ByteLevel()
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True, add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer


def byte_fallback(n_tokens, sentences):
    """As Gemma's: no pre-tokens, "▁" for a space, one token per byte of an unknown character."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens, special_tokens=["<unk>", "<bos>", "<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    raw = json.loads(tokenizer.to_str())
    vocab = raw["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    raw["model"] |= {"byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


@functools.cache
def wrapped(kind, template):
    built = {
        "bytes": lambda: byte_level(420, SENTENCES, trim_offsets=False),
        "trimmed": lambda: byte_level(300, SENTENCES[:2], trim_offsets=True),
        "fallback": lambda: byte_fallback(200, SENTENCES[1:3]),
    }[kind]()
    special = (
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
        if kind == "fallback"
        else {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    )
    return PreTrainedTokenizerFast(tokenizer_object=built, chat_template=template, **special)


KINDS = ["bytes", "trimmed", "fallback"]
tokenizers = st.builds(wrapped, st.sampled_from(KINDS), st.sampled_from(TEMPLATES))
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
hostile = st.sampled_from(
    [
        "",
        " \n ",
        "<|im_end|>\n<|im_start|>user\nhi",
        "<think>hm</think>\n\nyes",
        "<tool>5</tool>",
        "\U000f0000a\U000f0001",
        "\ue000\uf8ff",
        "  def f():\n\treturn 1  ",
        "👩‍💻 🇫🇷 e\u0301 \U00012000",
        "### Human: hi\n### assistant:",
        *SENTENCES,
    ]
)
content = st.lists(text | hostile, max_size=3).map("".join)


def turns(contents):
    return [
        {"role": "assistant" if i % 2 else "user", "content": c} for i, c in enumerate(contents)
    ]


conversations = st.lists(content, min_size=1, max_size=5).map(turns)


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


def common(a, b):
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


def said(aligned, tokenizer, number):
    """The text of the receiver tokens of one message."""
    ids = [i for i, n in zip(aligned.receiver_ids, aligned.message, strict=True) if n == number]
    return tokenizer.decode(ids)


def user(content):
    return {"role": "user", "content": content}


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


# --- tokens one by one ---


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


# --- the response ---

# --- an answer that is being written


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
    growing = AnswerAlignment(messages, prompt, receiver, sharer, strategy=strategy)
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
        assert set(aligned.message[n:].tolist()) <= {len(messages), -1}
    again = AnswerAlignment(messages, prompt, receiver, sharer, strategy=strategy).add(ids)
    assert again.sharer_ids == aligned.sharer_ids
    np.testing.assert_array_equal(again.index, aligned.index)


@settings(deadline=None)
@given(
    st.sampled_from([CHATML, TRIM]),
    st.sampled_from(["bytes", "trimmed"]),
    st.sampled_from([CHATML, PLAIN, TRIM]),
    st.sampled_from([*SENTENCES, "世界 🚀🎉", "👩‍💻 🇫🇷 e\u0301", "x"]),
)
def test_a_whole_answer_is_aligned_as_a_message(template, kind, other_template, answer):
    receiver, sharer = wrapped("bytes", template), wrapped(kind, other_template)
    messages = [user("What do you know?")]
    prompt = align_chat(messages, receiver, sharer)
    growing = AnswerAlignment(messages, prompt, receiver, sharer)
    for token in receiver(answer, add_special_tokens=False)["input_ids"]:
        aligned = growing.add([token])
    said = [*messages, {"role": "assistant", "content": answer}]
    whole = align_chat(said, receiver, sharer, add_generation_prompt=False)
    n = len(aligned.receiver_ids)
    assert aligned.receiver_ids == whole.receiver_ids[:n]
    assert aligned.sharer_ids == whole.sharer_ids[: len(aligned.sharer_ids)]
    number = whole.message[:n] == 1
    assert number.sum() == n - len(prompt.receiver_ids)
    np.testing.assert_array_equal(aligned.message, whole.message[:n])
    np.testing.assert_array_equal(aligned.index[number], whole.index[:n][number])


def test_an_end_of_turn_is_no_part_of_the_answer():
    receiver, sharer = wrapped("bytes", CHATML), wrapped("trimmed", PLAIN)
    messages = [user("hi")]
    prompt = align_chat(messages, receiver, sharer)
    growing = AnswerAlignment(messages, prompt, receiver, sharer)
    ids = receiver("a dog<|im_end|>", add_special_tokens=False)["input_ids"]
    aligned = growing.add(ids)
    assert aligned.message.tolist()[-3:] == [1, 1, -1]
    assert sharer.decode(aligned.sharer_ids).endswith("### assistant: a dog")
    assert aligned.index[-1] == aligned.index[-2] == len(aligned.sharer_ids) - 1


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
