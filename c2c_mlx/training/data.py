"""Chats on disk -> examples (token ids and their alignment) -> padded batches. No MLX here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from c2c_mlx.errors import C2CError
from c2c_mlx.text.alignment import TokenAlignment, align_chat, message_groups
from c2c_mlx.text.tokens import Strategy, response_ids

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Chat:
    """One conversation to learn from; the last message is what the receiver is to say.

    Attributes:
        messages: role and content, in order.
        own: the answer is the receiver's own, so the sharer has nothing to add.
        cut: the answer was cut at a limit: that it ends there is not taught.
        where: file and line, for messages.
    """

    messages: Messages
    own: bool = False
    cut: bool = False
    where: str = field(default="", compare=False)


WINDOW = 256  # batches that are sorted by length together: little padding, still shuffled


def read_rows(path: Path, unanswered: bool = False) -> list[Chat]:
    """Reads mlx-lm's JSON lines: `messages`, or `prompt` with `completion`.

    Args:
        path: the file.
        unanswered: whether rows without an answer are let through.

    Raises:
        C2CError: naming the file and the line that can't be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028 in a text
    except (OSError, UnicodeDecodeError) as e:
        raise C2CError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    rows = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {n}"
            try:
                row = json.loads(line)
            except ValueError:
                raise C2CError(f"{where}: not JSON") from None
            rows.append(Chat(_messages(row, where, unanswered), where=where))
    if not rows:
        raise C2CError(f"{path} is empty: it needs one JSON object per line")
    return rows


def read_hub_rows(name: str, split: str, unanswered: bool = False) -> list[Chat]:
    """Reads a data set of the hub, whose rows must have the fields of `read_rows`.

    Args:
        name: its hub id.
        split: e.g. "train"; an absent "validation" gives no rows.
        unanswered: whether rows without an answer are let through.

    Raises:
        C2CError: if the `datasets` extra is missing, the data set can't be had, or a row is of
            another form.
    """
    try:
        import datasets
    except ImportError:
        raise C2CError(
            f"--data {name}: a data set of the hub needs pip install 'c2c-mlx[datasets]'"
        ) from None
    try:
        if split not in datasets.get_dataset_split_names(name):
            return []
        found = datasets.load_dataset(name, split=split)
    except Exception as e:  # whatever the hub, the network and its file formats raise
        line = " ".join(str(e).split())[:200]
        raise C2CError(f"--data {name}: cannot be loaded from the hub ({line})") from None
    wheres = [f"{name} ({split}), row {n}" for n in range(len(found))]
    return [
        Chat(_messages(row, where, unanswered), where=where)
        for row, where in zip(found, wheres, strict=True)
    ]


def _messages(row: Any, where: str, unanswered: bool) -> Messages:
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        prompt = [{"role": "user", "content": row["prompt"]}]
        if "completion" not in row and unanswered:
            return prompt
        if not isinstance(row.get("completion"), str):
            raise C2CError(f"{where}: 'prompt' needs a 'completion', or --answer-with")
        return [*prompt, {"role": "assistant", "content": row["completion"]}]
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise C2CError(f"{where}: needs 'messages' (role, content) or 'prompt' and 'completion'")
    if messages and messages[-1]["role"] == "user" and unanswered:
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise C2CError(
            f"{where}: the last message must be the assistant's, after at least one more"
        )
    return [{"role": m["role"], "content": m["content"]} for m in messages]


@dataclass(frozen=True)
class Example(TokenAlignment):
    """One chat, ready to train on: its prompt, and what is to be said.

    Attributes:
        response_ids: what the receiver is to say, the end-of-turn token included.
        own: whether the response is the receiver's own.
        where: file and line, for messages.
    """

    response_ids: list[int]
    own: bool = False
    where: str = ""


def make_example(chat: Chat, receiver: Any, sharer: Any, alignment: Strategy) -> Example:
    """Tokenises and aligns one chat; `receiver` and `sharer` are tokenizers."""
    aligned = align_chat(chat.messages[:-1], receiver, sharer, strategy=alignment, padding=False)
    response = response_ids(chat.messages, receiver)
    return Example(
        aligned.receiver_ids,
        aligned.sharer_ids,
        aligned.index,
        aligned.message,
        response[:-1] if chat.cut and len(response) > 1 else response,
        chat.own,
        chat.where,
    )


@dataclass(frozen=True)
class Padded:
    """Prompts of a batch as one block: a prefix that all share, padding, each row's own rest.

    The padding stands *behind* the shared prefix, so that the prefix (often a template's system
    prompt, most of a short prompt) is prefilled once and not per row.
    """

    ids: np.ndarray  # [B, N]
    prefix: int  # columns that are the same in every row
    padding: np.ndarray  # [B] columns of padding behind the prefix

    def columns(self, index: np.ndarray, row: int) -> np.ndarray:
        """Positions of a row's prompt -> columns of the block."""
        return np.where(index < self.prefix, index, index + self.padding[row])


def pad(prompts: Sequence[Sequence[int]], most_prefix: int) -> Padded:
    """Pads to the longest; the shared prefix ends at `most_prefix` at the latest."""
    prefix = min(most_prefix, *(len(p) for p in prompts))
    while any(list(p[:prefix]) != list(prompts[0][:prefix]) for p in prompts):
        prefix -= 1
    width = max(len(p) for p in prompts)
    padding = np.array([width - len(p) for p in prompts], dtype=np.int32)
    rows = [[*p[:prefix], *[0] * n, *p[prefix:]] for p, n in zip(prompts, padding, strict=True)]
    return Padded(np.array(rows, dtype=np.int32).reshape(len(prompts), width), prefix, padding)


@dataclass(frozen=True)
class Batch:
    """What one step needs, B rows.

    Attributes:
        examples: the rows as they came.
        receiver: all of the prompts but their last ids, N columns.
        sharer: the sharer's prompts, as far as they feed anything.
        start: the first column that is fused in any row.
        stop: one behind the last.
        index: [B, stop - start] columns of `sharer` that feed these columns.
        messages: [B, stop - start] message numbers, -1 where nothing is fused.
        inputs: [B, R] the last prompt id, then the response but its last id.
        targets: [B, R] the response, padded on the right.
        mask: [B, R] True where a target counts.
    """

    examples: Sequence[Example]
    receiver: Padded
    sharer: Padded
    start: int
    stop: int
    index: np.ndarray
    messages: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray

    @property
    def own(self) -> np.ndarray:
        """[B] True where the response is the receiver's own."""
        return np.array([e.own for e in self.examples])

    @property
    def tokens(self) -> int:
        """Targets that count."""
        return int(self.mask.sum())


def collate(examples: Sequence[Example], positions: str) -> Batch:
    """Lays the examples out as one batch; `positions` is the fuser's field of that name."""
    fused = [message_groups(e.message[:-1], positions) for e in examples]
    feeds = [e.index[:-1][m >= 0] for e, m in zip(examples, fused, strict=True)]
    starts = [int(np.argmax(m >= 0)) if (m >= 0).any() else len(m) for m in fused]
    receiver = pad([e.receiver_ids[:-1] for e in examples], min(starts))
    sharer = pad(
        [e.sharer_ids[: int(f.max(initial=0)) + 1] for e, f in zip(examples, feeds, strict=True)],
        min(int(f.min(initial=0)) for f in feeds),
    )
    width = receiver.ids.shape[1]
    messages = np.full((len(examples), width), -1, dtype=np.int32)
    index = np.zeros((len(examples), width), dtype=np.int32)
    for row, (e, m) in enumerate(zip(examples, fused, strict=True)):
        at = receiver.columns(np.arange(len(m)), row)
        messages[row, at] = m
        index[row, at] = sharer.columns(e.index[:-1], row)
    columns = np.flatnonzero((messages >= 0).any(axis=0))
    start, stop = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (width, width)
    messages, index = messages[:, start:stop], index[:, start:stop]
    low = index[messages >= 0].min(initial=np.iinfo(np.int32).max)
    index = np.where(messages >= 0, index, low)

    longest = max(len(e.response_ids) for e in examples)
    responses = [e.response_ids + [0] * (longest - len(e.response_ids)) for e in examples]
    targets = np.array(responses, dtype=np.int32)
    last = np.array([[e.receiver_ids[-1]] for e in examples], dtype=np.int32)
    mask = np.arange(longest)[None] < np.array([[len(e.response_ids)] for e in examples])
    inputs = np.concatenate([last, targets[:, :-1]], axis=1)
    return Batch(examples, receiver, sharer, start, stop, index, messages, inputs, targets, mask)


Position = tuple[int, int]  # window, and batch within it: where a stream of batches stands


@dataclass(frozen=True)
class Source:
    """Chats from one place, and how often they are drawn."""

    rows: list[Chat]
    weight: float


class Dataset:
    """Chats that become examples when a batch needs them.

    Args:
        sources: where chats are drawn from, by weight.
        receiver: the receiver's tokenizer.
        sharer: the sharer's tokenizer.
        alignment: the fuser's field of that name.
        max_tokens: longer prompts or responses are left out, and counted in `skipped`.
    """

    def __init__(
        self,
        sources: list[Source],
        receiver: Any,
        sharer: Any,
        alignment: Strategy,
        max_tokens: int,
    ) -> None:
        self.sources, self.receiver, self.sharer = sources, receiver, sharer
        self.alignment, self.max_tokens = alignment, max_tokens
        self.skipped = 0

    def example(self, row: Chat) -> Example | None:
        """The row's example; None if it is too long."""
        example = make_example(row, self.receiver, self.sharer, self.alignment)
        parts = (example.receiver_ids, example.sharer_ids, example.response_ids)
        if max(map(len, parts)) > self.max_tokens:
            self.skipped += 1
            return None
        return example

    def batches(
        self, batch_size: int, seed: int, start: Position = (0, 0)
    ) -> Iterator[tuple[Position, list[Example]]]:
        """Batches without end, in an order that `seed` fixes, from `start` on.

        Every source goes through all of its rows before it repeats one. A window of rows is sorted
        by length, so that batches need little padding, and its batches are shuffled.

        Yields:
            The position behind the batch, and the batch.

        Raises:
            C2CError: if every row is too long.
        """
        window, done = start
        size = min(WINDOW * batch_size, sum(len(s.rows) for s in self.sources))
        total = sum(s.weight for s in self.sources)
        shares = [max(round(size * s.weight / total), 1) for s in self.sources]
        while True:
            examples = []
            for number, (source, share) in enumerate(zip(self.sources, shares, strict=True)):
                for i in _order(len(source.rows), window * share, share, (seed, number)):
                    if (example := self.example(source.rows[i])) is not None:
                        examples.append(example)
            if not examples:
                raise C2CError(f"every chat is longer than {self.max_tokens} tokens (max_tokens)")
            examples.sort(key=lambda e: (len(e.receiver_ids), len(e.response_ids)))
            batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
            order = np.random.default_rng((seed, window)).permutation(len(batches))
            for at in range(done, len(order)):
                yield (window, at + 1), batches[order[at]]
            window, done = window + 1, 0


def _order(n: int, start: int, count: int, seed: tuple[int, ...]) -> list[int]:
    """Items [start, start + count) of an endless sequence of shuffled epochs over n rows."""
    rows: list[int] = []
    while len(rows) < count:
        epoch, at = divmod(start + len(rows), n)
        permutation = np.random.default_rng((*seed, epoch)).permutation(n)
        rows.extend(permutation[at : at + count - len(rows)].tolist())
    return rows
