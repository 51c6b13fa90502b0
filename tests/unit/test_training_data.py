"""Batches laid out with padding behind what is shared, and streams that resume."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import c2c_mlx.blas  # noqa: F401

import numpy as np
import pytest

from c2c_mlx import LanguageModel, load_model
from c2c_mlx.errors import C2CError
from c2c_mlx.text.alignment import message_groups
from c2c_mlx.text.rendering import render
from c2c_mlx.training import dataset as dataset_module
from c2c_mlx.training import fits
from c2c_mlx.training.batch import collate, pad
from c2c_mlx.training.dataset import Dataset, Example, Source, make_example, refusals
from c2c_mlx.training.date import on_a_fixed_day
from c2c_mlx.training.files import ChatRow


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# --- padding


def test_padding_stands_behind_the_shared_prefix() -> None:
    block = pad([[1, 2, 3, 4, 5], [1, 2, 9], [1, 2, 3, 8]], most_prefix=99)
    assert block.prefix == 2
    assert block.ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 0, 0, 9], [1, 2, 0, 3, 8]]
    assert block.padding.tolist() == [0, 2, 1]
    assert block.columns(np.array([0, 1, 2]), 1).tolist() == [0, 1, 4]


@pytest.mark.parametrize(
    ("prompts", "most", "prefix"),
    [
        ([[1, 2, 3], [1, 2, 3]], 2, 2),
        ([[1, 2, 3], [1, 2, 3]], 99, 3),
        ([[1, 2, 3], [4, 2, 3]], 99, 0),
        ([[1, 2, 3], [1, 2]], 99, 2),
        ([[1, 2, 3], []], 99, 0),
        ([[], []], 99, 0),
        ([[7, 8]], 1, 1),
    ],
)
def test_length_of_the_shared_prefix(prompts: list[list[int]], most: int, prefix: int) -> None:
    block = pad(prompts, most)
    assert block.prefix == prefix
    assert block.ids.shape == (len(prompts), max(map(len, prompts)))
    for row, prompt in enumerate(prompts):
        columns = block.columns(np.arange(len(prompt)), row)
        assert block.ids[row, columns].tolist() == prompt


# --- batches


def example(n: int, start: int, tokens: int, seed: int) -> Example:
    """n ids whose first 2 are the same in every row; a message from `start` on, the last 2 behind.

    Position i is fed by the sharer's 2 i + 1.
    """
    ids = np.random.default_rng(seed).integers(10, 500, 3 * n + tokens).tolist()
    index = np.minimum(2 * np.arange(n) + 1, 2 * n - 1).astype(np.int32)
    messages = np.full(n, -1, np.int32)
    messages[start : n - 2] = 0
    return Example(
        [1, 2, *ids[: n - 2]], [5, 6, 7, *ids[n : 3 * n - 3]], index, messages, ids[-tokens:]
    )


EXAMPLES = [example(9, 3, 4, 0), example(6, 2, 1, 1), example(12, 5, 3, 2)]


@pytest.mark.parametrize("positions", ["all", "from_first_message", "messages"])
def test_collate_feeds_every_position_from_where_it_should(positions: str) -> None:
    batch = collate(EXAMPLES, positions)
    width = 11  # the longest prompt but its last id
    assert batch.receiver.ids.shape == (3, width)
    assert batch.index.shape == batch.messages.shape == (3, batch.stop - batch.start)
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == (3, 4)
    assert batch.tokens == 4 + 1 + 3
    for row, e in enumerate(EXAMPLES):
        fused = message_groups(e.message[:-1], positions)
        own = batch.receiver.columns(np.arange(len(fused)), row)
        assert batch.receiver.ids[row, own].tolist() == e.receiver_ids[:-1]
        expected = {int(c): i for i, c in enumerate(own) if fused[i] >= 0}
        found = np.flatnonzero(batch.messages[row] >= 0) + batch.start
        assert found.tolist() == list(expected)
        for column, i in expected.items():
            fed_by = batch.index[row, column - batch.start]
            assert batch.sharer.ids[row, fed_by] == e.sharer_ids[e.index[i]]
            assert batch.messages[row, column - batch.start] == fused[i]
        assert batch.inputs[row, 0] == e.receiver_ids[-1]
        said = batch.targets[row][batch.mask[row]].tolist()
        assert said == e.response_ids
        assert batch.inputs[row, 1 : len(said)].tolist() == said[:-1]
    # the fused columns are one block behind the shared prefix; so is what feeds them, and no index
    # leaves the sharer's block
    assert batch.start >= batch.receiver.prefix
    assert 0 <= batch.index.min() and batch.index.max() < batch.sharer.ids.shape[1]
    assert batch.receiver.prefix == (0 if positions == "all" else 2)
    assert batch.sharer.prefix == (1 if positions == "all" else 3)
    assert batch.index.min() >= batch.sharer.prefix


def test_columns_that_are_not_fused_read_nothing_out_of_range() -> None:
    batch = collate(EXAMPLES, "messages")
    unused = batch.index[batch.messages < 0]
    assert len(unused) and (unused == batch.index[batch.messages >= 0].min()).all()


def test_a_batch_with_nothing_to_fuse() -> None:
    nothing = [Example([1, 2, 3], [4], np.zeros(3, np.int32), np.full(3, -1, np.int32), [7])]
    batch = collate(nothing, "messages")
    assert batch.start == batch.stop
    assert batch.index.shape == (1, 0)


def test_a_chat_becomes_an_example(receiver: LanguageModel, sharer: LanguageModel) -> None:
    chat = ChatRow([user("Who wrote it?"), assistant("Ann.")])
    made = make_example(chat, receiver.tokenizer, sharer.tokenizer, "span")
    prompt = receiver.tokenizer.decode(made.receiver_ids)
    assert prompt.startswith("<|im_start|>user\nWho wrote it?<|im_end|>")
    assert prompt.endswith("<|im_start|>assistant\n")
    assert receiver.tokenizer.decode(made.response_ids).startswith("Ann.<|im_end|>")
    assert len(made.index) == len(made.message) == len(made.receiver_ids)
    assert "".join(map(str, sorted(set(made.message.tolist())))) == "-10"


def test_an_answer_that_was_cut_teaches_no_end(
    receiver: LanguageModel, sharer: LanguageModel
) -> None:
    chat = ChatRow([user("Who wrote it?"), assistant("Ann and")], own=True)
    whole = make_example(chat, receiver.tokenizer, sharer.tokenizer, "span")
    cut = make_example(replace(chat, cut=True), receiver.tokenizer, sharer.tokenizer, "span")
    assert whole.own and cut.own
    assert [*cut.response_ids, receiver.tokenizer.eos_token_id] == whole.response_ids


def test_fed_by_another_chat() -> None:
    one, other = EXAMPLES[0], EXAMPLES[2]
    fed = one.with_sharer_of(other)
    assert (fed.receiver_ids, fed.response_ids) == (one.receiver_ids, one.response_ids)
    assert fed.sharer_ids == other.sharer_ids
    assert 0 <= fed.index.min() and fed.index.max() < len(other.sharer_ids)
    assert np.all(np.diff(fed.index) >= 0)


# --- streams


@pytest.fixture
def dataset(
    receiver: LanguageModel, sharer: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> Dataset:
    """Two sources, 23 rows and 4 rows of twice the weight per row; windows of 3 batches."""
    monkeypatch.setattr(dataset_module, "WINDOW", 3)
    many = [ChatRow([user(f"n {i} " + "and " * (i % 5)), assistant(f"{i}")]) for i in range(23)]
    few = [ChatRow([user(f"m {i}"), assistant(f"{100 + i}")]) for i in range(4)]
    sources = [Source(many, 2.0), Source(few, 1.0)]
    return Dataset(sources, receiver.tokenizer, sharer.tokenizer, "span", 64)


def drawn(dataset: Dataset, n: int, seed: int = 0, **start: Any) -> list[tuple[Any, list[str]]]:
    def text(e: Example) -> str:
        return dataset.receiver.decode(e.response_ids)

    stream = dataset.batches(4, seed, **start)
    return [(at, [text(e) for e in batch]) for at, batch in islice(stream, n)]


def test_a_stream_resumes_from_any_of_its_positions(dataset: Dataset) -> None:
    whole = drawn(dataset, 14)
    for n, (position, _) in enumerate(whole[:-1], 1):
        assert drawn(dataset, 14 - n, start=position) == whole[n:]


def test_the_seed_fixes_the_order(dataset: Dataset) -> None:
    assert drawn(dataset, 6) == drawn(dataset, 6)
    assert drawn(dataset, 6) != drawn(dataset, 6, seed=1)


def test_every_source_goes_through_its_rows_before_it_repeats_one(dataset: Dataset) -> None:
    # A window holds 12 rows: 8 of the one source and 4 of the other.
    rows = [row for _, batch in drawn(dataset, 3 * 23) for row in batch]
    counts = Counter(rows)
    assert len(rows) == 12 * 23
    assert sorted(counts.values()) == [8] * 23 + [23] * 4
    seen = Counter(rows[: 12 * 3])  # 24 draws of 23 rows
    assert sum(n for row, n in seen.items() if n == 2) == 2 and max(seen.values()) == 3


def test_batches_are_of_similar_length(dataset: Dataset) -> None:
    for _, batch in islice(dataset.batches(4, 0), 6):
        lengths = [len(e.receiver_ids) for e in batch]
        assert lengths == sorted(lengths)


def test_long_chats_are_left_out_and_counted_once(
    receiver: LanguageModel, sharer: LanguageModel
) -> None:
    rows = [ChatRow([user("hi"), assistant("a")]), ChatRow([user("hi " * 99), assistant("a")])]
    dataset = Dataset([Source(rows, 1.0)], receiver.tokenizer, sharer.tokenizer, "span", 40)
    batches = [batch for _, batch in islice(dataset.batches(8, 0), 5)]
    assert [len(batch) for batch in batches] == [1] * 5
    assert len(dataset.too_long) == 1
    hopeless = Dataset([Source(rows[1:], 1.0)], receiver.tokenizer, sharer.tokenizer, "span", 40)
    with pytest.raises(C2CError, match=r"longer than 40 tokens"):
        next(hopeless.batches(8, 0))


STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("strict", ["receiver", "sharer"])
def test_chats_that_a_template_refuses_are_left_out_and_told(
    receiver: LanguageModel, sharer: LanguageModel, strict: str
) -> None:
    models = {"receiver": receiver, "sharer": sharer}
    tokenizers = {name: load_model(lm.path).tokenizer for name, lm in models.items()}
    tokenizers[strict].chat_template = STRICT + tokenizers[strict].chat_template
    rows = [
        ChatRow([*[user("hi")] * (1 + (i in (0, 2))), assistant("a")], where=f"chats, line {i}")
        for i in range(5)
    ]
    dataset = Dataset([Source(rows, 1.0)], *tokenizers.values(), "span", 40)
    assert dataset.fingerprint() and dataset.example(rows[0]) is None
    assert {len(batch) for _, batch in islice(dataset.batches(8, 0), 5)} == {3}
    assert set(dataset.refused) == {"chats, line 0", "chats, line 2"} and not dataset.too_long
    line = refusals(dataset.refused)
    assert line.startswith("2 chats are left out, the first chats, line 0: the chat template of ")
    assert "(user, user): roles must alternate" in line and "\n" not in line
    assert len(fits.longest(rows, *tokenizers.values(), "span", 40)) == 3
    hopeless = Dataset([Source(rows[:1], 1.0)], *tokenizers.values(), "span", 40)
    with pytest.raises(C2CError, match="or refused; 1 chats are left out, the first chats, line 0"):
        next(hopeless.batches(8, 0))


# --- what must not depend on the day


# As Llama 3.2, SmolLM3 and Mistral write it.
DATED = {
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- endif %}{{ date_string }}": "26 Jul 2024",
    "{%- set today = strftime_now('%d %B %Y') -%}{{ today }}": "26 July 2024",
    "{%- macro now(f) %}{{ strftime_now(f) }}{% endmacro %}{{ now('%Y-%m-%d') }}": "2024-07-26",
}


@pytest.mark.parametrize("template", DATED)
def test_a_template_tells_the_same_date_every_day(
    receiver: LanguageModel, sharer: LanguageModel, template: str
) -> None:
    tokenizer = load_model(receiver.path).tokenizer  # its template is changed
    tokenizer.chat_template = template + " " + tokenizer.chat_template
    rows = [ChatRow([user("hi"), assistant("a")])]
    dataset = Dataset([Source(rows, 1.0)], tokenizer, sharer.tokenizer, "span", 99)
    example = dataset.example(rows[0])
    assert example is not None
    today = render(rows[0].messages[:-1], tokenizer)
    fixed = tokenizer.decode(example.receiver_ids)
    assert fixed.startswith(DATED[template]) and not today.startswith(DATED[template])
    assert fixed[len(DATED[template]) :] in today  # and nothing else is changed
    assert tokenizer.decode(example.response_ids).startswith("a<|im_end|>")


def test_a_template_without_a_date_is_left_alone(receiver: LanguageModel) -> None:
    assert on_a_fixed_day(receiver.tokenizer) is receiver.tokenizer


def test_a_fingerprint_tells_chats_weights_and_templates_apart(
    receiver: LanguageModel, sharer: LanguageModel
) -> None:
    rows = [ChatRow([user("hi"), assistant("a")])]
    cut = [ChatRow([user("hi"), assistant("a")], cut=True)]
    other = load_model(receiver.path).tokenizer
    other.chat_template = "Hello! " + other.chat_template

    def name(rows: list[ChatRow], weight: float = 1.0, tokenizer: Any = receiver.tokenizer) -> str:
        return Dataset(
            [Source(rows, weight)], tokenizer, sharer.tokenizer, "span", 40
        ).fingerprint()

    names = [name(rows), name(cut), name(rows, 2.0), name(rows * 2), name(rows, tokenizer=other)]
    assert len(set(names)) == 5 and name(rows) == names[0]
