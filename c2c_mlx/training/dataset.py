"""Chats become examples (token ids and their alignment), drawn in an order that can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from c2c_mlx.errors import C2CError
from c2c_mlx.text.alignment import TokenAlignment, align_chat
from c2c_mlx.text.rendering import Refused, Tokenizer
from c2c_mlx.text.tokens import Strategy, along, response_ids
from c2c_mlx.training.date import on_a_fixed_day
from c2c_mlx.training.files import ChatRow

WINDOW = 256  # batches that are sorted by length together: little padding, still shuffled


@dataclass(frozen=True)
class Example(TokenAlignment):
    """One chat, ready to train on: its prompt as a chat reads it, and what is to be said.

    Attributes:
        response_ids: what the receiver is to say, the end-of-turn token included.
        own: whether the response is the receiver's own.
        where: file and line, for messages.
        heard: the response but its last id as the sharer reads it along, an id for each; None: the
            prompt alone is fused.
    """

    response_ids: list[int]
    own: bool = False
    where: str = ""
    heard: list[int] | None = None

    @property
    def read(self) -> TokenAlignment:
        """What may be fused: the prompt but its last id, or all but the last of the whole chat."""
        if self.heard is None:
            ids, index, message = self.receiver_ids[:-1], self.index[:-1], self.message[:-1]
            return TokenAlignment(ids, self.sharer_ids, index, message)
        n, answer = len(self.heard), self.message.max(initial=-1) + 1
        return TokenAlignment(
            [*self.receiver_ids, *self.response_ids[:-1]],
            [*self.sharer_ids, *self.heard],
            np.append(self.index, len(self.sharer_ids) + np.arange(n, dtype=np.int32)),
            np.append(self.message, np.full(n, answer, dtype=np.int32)),
        )


def make_example(
    chat: ChatRow,
    receiver: Tokenizer,
    sharer: Tokenizer,
    alignment: Strategy,
    fuse_response: bool = False,
) -> Example:
    """Tokenises and aligns one chat.

    Args:
        chat: with the answer that is wanted.
        receiver: the receiver's tokenizer.
        sharer: the sharer's tokenizer.
        alignment: the fuser's field of that name.
        fuse_response: the fuser's field of that name.
    """
    aligned = align_chat(chat.messages[:-1], receiver, sharer, strategy=alignment)
    response = response_ids(chat.messages, receiver)
    response = response[:-1] if chat.cut and len(response) > 1 else response
    heard = along(response[:-1], receiver, sharer, alignment) if fuse_response else None
    return Example(
        aligned.receiver_ids,
        aligned.sharer_ids,
        aligned.index,
        aligned.message,
        response,
        chat.own,
        chat.where,
        heard,
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
        fuse_response: the fuser's field of that name.

    Attributes:
        too_long: source and row of those that were drawn, once each.
        refused: by file and line, why a chat template does not take a row; it is left out, too.
    """

    def __init__(
        self,
        sources: list[Source],
        receiver: Tokenizer,
        sharer: Tokenizer,
        alignment: Strategy,
        max_tokens: int,
        fuse_response: bool = False,
    ) -> None:
        self.sources = sources
        self.receiver, self.sharer = on_a_fixed_day(receiver), on_a_fixed_day(sharer)
        self.alignment, self.max_tokens = alignment, max_tokens
        self.fuse_response = fuse_response
        self.too_long: set[tuple[int, int]] = set()
        self.refused: dict[str, str] = {}

    def example(self, row: ChatRow) -> Example | None:
        """The row's example; None if it is too long, or a template refuses it."""
        if (example := self._made(row)) is None:
            return None
        parts = (example.receiver_ids, example.sharer_ids, example.response_ids)
        return None if max(map(len, parts)) > self.max_tokens else example

    def _made(self, row: ChatRow) -> Example | None:
        tokenizers = self.receiver, self.sharer
        try:
            return make_example(row, *tokenizers, self.alignment, self.fuse_response)
        except Refused as e:
            self.refused.setdefault(row.where, str(e))
            return None

    def fingerprint(self) -> str:
        """A name for what is drawn: all rows, their weights, and how a chat becomes ids."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(json.dumps([source.weight, self.alignment, self.max_tokens]).encode())
            for row in source.rows:
                digest.update(json.dumps([row.messages, row.own, row.cut]).encode())
            if e := next(filter(None, map(self._made, source.rows)), None):
                ids = [e.receiver_ids, e.read.sharer_ids, e.response_ids]
                digest.update(json.dumps(ids).encode())
        return digest.hexdigest()[:16]

    def some(self, n: int, seed: int) -> list[Example]:
        """About n chats at random, of each source as many as its share."""
        total = sum(s.weight for s in self.sources)
        random, found = np.random.default_rng(seed), []
        for source in self.sources:
            share = min(max(round(n * source.weight / total), 1), len(source.rows))
            found += [source.rows[i] for i in random.permutation(len(source.rows))[:share]]
        return [e for e in map(self.example, found) if e]

    def distinct(self, n: int) -> float:
        """How many different chats there are among the first n that are drawn, about."""
        total = sum(s.weight for s in self.sources)
        return sum(min(n * s.weight / total, len(s.rows)) for s in self.sources)

    def batches(
        self, batch_size: int, seed: int, start: Position = (0, 0)
    ) -> Iterator[tuple[Position, list[Example]]]:
        """Batches without end, in an order that `seed` fixes, from `start` on.

        Every source goes through all of its rows before it repeats one. A window of rows is sorted
        by length, so that batches need little padding, and its batches are shuffled.

        Yields:
            The position behind the batch, and the batch.

        Raises:
            C2CError: if every row is too long or refused.
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
                    elif source.rows[i].where not in self.refused:
                        self.too_long.add((number, i))
            if not examples:
                why = f"every chat is longer than {self.max_tokens} tokens (max_tokens)"
                raise C2CError(
                    f"{why} or refused; {refusals(self.refused)}" if self.refused else why
                )
            examples.sort(key=lambda e: (len(e.receiver_ids), len(e.response_ids)))
            batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
            order = np.random.default_rng((seed, window)).permutation(len(batches))
            for at in range(done, len(order)):
                yield (window, at + 1), batches[order[at]]
            window, done = window + 1, 0


def refusals(refused: dict[str, str]) -> str:
    """Of rows that a template refuses, by file and line: how many, where the first is, and why."""
    where, why = next(iter(refused.items()))
    return f"{len(refused)} chats are left out, the first {where}: {why}"


def _order(n: int, start: int, count: int, seed: tuple[int, ...]) -> list[int]:
    """Items [start, start + count) of an endless sequence of shuffled epochs over n rows."""
    rows: list[int] = []
    while len(rows) < count:
        epoch, at = divmod(start + len(rows), n)
        permutation = np.random.default_rng((*seed, epoch)).permutation(n)
        rows.extend(permutation[at : at + count - len(rows)].tolist())
    return rows
