"""Chats become examples (token ids and their alignment), drawn in an order that can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from c2c_mlx.errors import C2CError
from c2c_mlx.text.alignment import TokenAlignment, align_chat
from c2c_mlx.text.rendering import Tokenizer
from c2c_mlx.text.tokens import Strategy, response_ids
from c2c_mlx.training.date import on_a_fixed_day
from c2c_mlx.training.files import ChatRow

WINDOW = 256  # batches that are sorted by length together: little padding, still shuffled


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


def make_example(
    chat: ChatRow, receiver: Tokenizer, sharer: Tokenizer, alignment: Strategy
) -> Example:
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


Position = tuple[int, int]  # window, and batch within it: where a stream of batches stands


@dataclass(frozen=True)
class Source:
    """Chats from one place, and how often they are drawn."""

    rows: list[ChatRow]
    weight: float


class Dataset:
    """Chats that become examples when a batch needs them.

    Args:
        sources: where chats are drawn from, by weight.
        receiver: the receiver's tokenizer.
        sharer: the sharer's tokenizer.
        alignment: the fuser's field of that name.
        max_tokens: longer prompts or responses are left out, and counted in `too_long`.
    """

    def __init__(
        self,
        sources: list[Source],
        receiver: Tokenizer,
        sharer: Tokenizer,
        alignment: Strategy,
        max_tokens: int,
    ) -> None:
        self.sources = sources
        self.receiver, self.sharer = on_a_fixed_day(receiver), on_a_fixed_day(sharer)
        self.alignment, self.max_tokens = alignment, max_tokens
        self.too_long: set[tuple[int, int]] = set()  # source and row, however often it was drawn

    def example(self, row: ChatRow) -> Example | None:
        """The row's example; None if it is too long."""
        example = make_example(row, self.receiver, self.sharer, self.alignment)
        parts = (example.receiver_ids, example.sharer_ids, example.response_ids)
        return None if max(map(len, parts)) > self.max_tokens else example

    def fingerprint(self) -> str:
        """A name for what is drawn: all rows, their weights, and how a chat becomes ids."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(json.dumps([source.weight, self.alignment, self.max_tokens]).encode())
            for row in source.rows:
                digest.update(json.dumps([row.messages, row.own, row.cut]).encode())
            e = make_example(source.rows[0], self.receiver, self.sharer, self.alignment)
            ids = [e.receiver_ids, e.sharer_ids, e.response_ids]
            digest.update(json.dumps(ids).encode())
        return digest.hexdigest()[:16]

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
                    else:
                        self.too_long.add((number, i))
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
