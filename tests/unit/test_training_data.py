"""Chats on disk, batches laid out with padding behind what is shared, and streams that resume."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import numpy as np
import pytest

from c2c_mlx import LanguageModel
from c2c_mlx.errors import C2CError
from c2c_mlx.training import data
from c2c_mlx.training.data import (
    Chat,
    Dataset,
    Example,
    Source,
    collate,
    make_example,
    pad,
    read_rows,
)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# --- reading


def write(path: Path, *rows: Any) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_both_forms_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train.jsonl",
        {"messages": [{"role": "system", "content": "s"}, user("q"), assistant("a")], "id": 3},
        "",
        {"prompt": "2 + 2?", "completion": "4"},
    )
    rows = read_rows(path)
    assert rows == [
        Chat([{"role": "system", "content": "s"}, user("q"), assistant("a")]),
        Chat([user("2 + 2?"), assistant("4")]),
    ]
    assert [row.where for row in rows] == [f"{path}, line 1", f"{path}, line 3"]


@pytest.mark.parametrize("odd", ["\u2028", "\u0085", "\x0c", "\r\n", "a\tb"])
def test_a_text_may_hold_any_character(tmp_path: Path, odd: str) -> None:
    row = json.dumps({"prompt": f"a{odd}b", "completion": "c"}, ensure_ascii=False)
    path = tmp_path / "train.jsonl"
    path.write_bytes(f"{row}\r\n{row}".encode())
    assert read_rows(path) == [Chat([user(f"a{odd}b"), assistant("c")])] * 2


def test_rows_without_an_answer_are_let_through_on_request(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train.jsonl",
        {"prompt": "q"},
        {"messages": [user("q")]},
        {"messages": [user("q"), assistant("a"), user("r")]},
        {"prompt": "q", "completion": "a"},
    )
    lasts = [row.messages[-1]["role"] for row in read_rows(path, unanswered=True)]
    assert lasts == ["user", "user", "user", "assistant"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "needs 'messages'"),
        ({}, "needs 'messages'"),
        ({"messages": "hi"}, "needs 'messages'"),
        ({"messages": [{"role": "user"}]}, "needs 'messages'"),
        ({"messages": [{"role": "user", "content": 3}, assistant("a")]}, "needs 'messages'"),
        ({"messages": []}, "the last message must be the assistant's"),
        ({"messages": [assistant("a")]}, "after at least one more"),
        ({"messages": [user("q")]}, "the last message must be the assistant's"),
        ({"prompt": "q"}, "--answer-with"),
        ({"prompt": "q", "completion": 4}, "needs a 'completion'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    good = {"prompt": "q", "completion": "a"}
    path = write(tmp_path / "train.jsonl", good, "", row, good)
    with pytest.raises(C2CError) as e:
        read_rows(path)
    assert str(e.value).startswith(f"{path}, line 3: ")
    assert message in str(e.value)


def test_a_file_that_cannot_be_read_or_is_empty(tmp_path: Path) -> None:
    with pytest.raises(C2CError, match="cannot read .*missing.jsonl: No such file"):
        read_rows(tmp_path / "missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(C2CError, match=r"cannot read .*latin\.jsonl"):
        read_rows(tmp_path / "latin.jsonl")
    with pytest.raises(C2CError, match=r"empty\.jsonl is empty"):
        read_rows(write(tmp_path / "empty.jsonl", ""))


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
        fused = data.message_groups(e.message[:-1], positions)
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
    # the fused columns are one block behind the shared prefix; no index leaves the sharer's block
    assert batch.start >= batch.receiver.prefix
    assert 0 <= batch.index.min() and batch.index.max() < batch.sharer.ids.shape[1]
    assert batch.receiver.prefix == (0 if positions == "all" else 2)


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
    chat = Chat([user("Who wrote it?"), assistant("Ann.")])
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
    chat = Chat([user("Who wrote it?"), assistant("Ann and")], own=True)
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
    monkeypatch.setattr(data, "WINDOW", 3)
    many = [Chat([user(f"n {i} " + "and " * (i % 5)), assistant(f"{i}")]) for i in range(23)]
    few = [Chat([user(f"m {i}"), assistant(f"{100 + i}")]) for i in range(4)]
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


def test_long_chats_are_left_out_and_counted(
    receiver: LanguageModel, sharer: LanguageModel
) -> None:
    rows = [Chat([user("hi"), assistant("a")]), Chat([user("hi " * 99), assistant("a")])]
    dataset = Dataset([Source(rows, 1.0)], receiver.tokenizer, sharer.tokenizer, "span", 40)
    (_, batch), *_ = islice(dataset.batches(8, 0), 1)
    assert (len(batch), dataset.skipped) == (1, 1)
    hopeless = Dataset([Source(rows[1:], 1.0)], receiver.tokenizer, sharer.tokenizer, "span", 40)
    with pytest.raises(C2CError, match=r"longer than 40 tokens"):
        next(hopeless.batches(8, 0))
