"""Two tokenizers, one text: which sharer token feeds which receiver token.

Both models render the same messages with their own chat templates; `rendering` says where in each
of the two the messages' text went.

Tokenizers are passed in (mlx-lm's `TokenizerWrapper` or a fast transformers tokenizer). Nothing
here imports a model library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from c2c_mlx.errors import C2CError
from c2c_mlx.text.rendering import (
    Ints,
    Message,
    Refused,
    Tokenizer,
    bases,
    fast_tokenizer,
    locate,
)
from c2c_mlx.text.rendering import render as render
from c2c_mlx.text.tokens import Strategy, align_ids, encode, role_id


@dataclass(frozen=True)
class TokenAlignment:
    """Two prompts and how the sharer's feeds the receiver's.

    Attributes:
        receiver_ids: The whole receiver prompt, template included.
        sharer_ids: The whole sharer prompt.
        index: int32 `[len(receiver_ids)]`, the position in `sharer_ids` that feeds each receiver
            position; never decreases.
        message: int32 `[len(receiver_ids)]`, the number of the message that the position's text
            belongs to, -1 for template text.
    """

    receiver_ids: list[int]
    sharer_ids: list[int]
    index: npt.NDArray[np.int32]
    message: npt.NDArray[np.int32]

    def with_sharer_of(self, other: TokenAlignment) -> Self:
        """The same chat fed by another chat's sharer: a control."""
        scale = (len(other.sharer_ids) - 1) / max(len(self.sharer_ids) - 1, 1)
        index = np.round(self.index * scale).astype(self.index.dtype)
        return replace(self, sharer_ids=other.sharer_ids, index=index)


def align_chat(
    messages: Sequence[Message],
    receiver_tokenizer: Tokenizer,
    sharer_tokenizer: Tokenizer,
    *,
    strategy: Strategy = "span",
    add_generation_prompt: bool = True,
    padding: bool = True,
) -> TokenAlignment:
    """Render one conversation for both models and align the two prompts.

    Strategies: *span*, each model reads its own tokenisation and a receiver token takes the sharer
    token that covers its last character (template tokens before the messages take the first
    sharer token, those after a message that message's last); *first* and *longest*, as the
    reference aligns chats: the sharer reads its own template, and the receiver's messages token by
    token (see `align_ids`); *same*, both read the same ids.

    Args:
        messages: The conversation.
        receiver_tokenizer: The answering model's.
        sharer_tokenizer: The reading model's.
        strategy: One of the four.
        add_generation_prompt: Whether the prompts ask for an answer.
        padding: Whether *first* and *longest* pad the shorter of two sections of template text, so
            that both models' positions are the same. An id below zero is padding: `~id` stands
            there, and no position attends to it.

    Raises:
        C2CError: A template refuses the messages, a tokenizer gives no character offsets, or
            *first* and *longest* find the messages in different orders.
    """
    if strategy not in get_args(Strategy):
        names = ", ".join(get_args(Strategy))
        raise C2CError(f"unknown alignment strategy {strategy!r}; choose one of: {names}")
    receiver = _prompt(messages, receiver_tokenizer, add_generation_prompt)
    coordinates = receiver.coordinates[receiver.last]
    message = _message_of(messages, coordinates)
    if strategy == "same":
        identity = np.arange(len(receiver.ids), dtype=np.int32)
        return TokenAlignment(receiver.ids, list(receiver.ids), identity, message)

    sharer = _prompt(messages, sharer_tokenizer, add_generation_prompt)
    if strategy != "span":
        others = _message_of(messages, sharer.coordinates[sharer.last])
        order = _order(message, len(messages))
        sections = zip(
            [*order, -1],
            _sections(receiver.ids, message, order),
            _sections(sharer.ids, others, order),
            strict=True,
        )
        tokenizers = (receiver_tokenizer, sharer_tokenizer)
        return _by_sections(list(sections), *tokenizers, strategy, padding)
    if not sharer.ids:  # an index needs something to point at
        filler = role_id(fast_tokenizer(sharer_tokenizer), "bos") or 0
        zero = np.zeros(1, dtype=np.int64)
        sharer = _Prompt([filler], zero, zero, zero - 1)
    # A position of the template stands where the message text before it ended; before all
    # messages that is -1, which picks the appended 0.
    index = np.append(_sharer_positions(messages, sharer), 0)[_filled(receiver.coordinates)]
    return TokenAlignment(
        receiver.ids, sharer.ids, _rising(index[receiver.last]).astype(np.int32), message
    )


def _filled(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Of those below zero each one becomes what stands before it; -1 where nothing does.

    Not their maximum so far: some templates move the system prompt into the last user message.
    """
    return values[np.maximum.accumulate(np.where(values >= 0, np.arange(len(values)), 0))]


def _rising(index: Ints) -> Ints:
    """An index that never decreases, and has as many as possible of the same positions.

    Where only one of two templates moves a message, either that one gives way or those passed over.
    """
    up, down = np.maximum.accumulate(index), np.minimum.accumulate(index[::-1])[::-1]
    return up if (up != index).sum() <= (down != index).sum() else down


_Section: TypeAlias = tuple[list[int], list[int]]  # template text, then a message; ids


def _order(message: npt.NDArray[np.int32], count: int) -> list[int]:
    """The messages as a prompt has them; one without text comes after the one before it."""
    at = 0
    first = [at := int(np.append(np.flatnonzero(message == n), at)[0]) for n in range(count)]
    return sorted(range(count), key=first.__getitem__)


def _sections(
    ids: list[int], message: npt.NDArray[np.int32], order: Sequence[int]
) -> list[_Section]:
    """The prompt cut before and after each message; the last section has none.

    Raises:
        Refused: The messages are not in this order.
    """
    sections, at = [], 0
    for number in order:
        own = np.flatnonzero(message == number)
        start, stop = (int(own[0]), int(own[-1]) + 1) if len(own) else (at, at)
        if start < at:
            raise Refused(
                "the two chat templates bring the messages into different orders, as with a "
                "system prompt that one of them moves into the last question: leave it out, or "
                "take a fuser whose alignment is span"
            )
        sections.append((ids[at:start], ids[start:stop]))
        at = stop
    return [*sections, (ids[at:], [])]


def _by_sections(
    sections: Sequence[tuple[int, _Section, _Section]],
    receiver: Tokenizer,
    sharer: Tokenizer,
    strategy: Literal["first", "longest"],
    padding: bool,
) -> TokenAlignment:
    """Template text beside template text, then each message token by token."""
    pads = [~(role_id(fast_tokenizer(t), "pad") or 0) for t in (receiver, sharer)]
    ids: list[int] = []
    read: list[int] = []
    index: list[int] = []
    message: list[int] = []
    for number, (own, text), (other, _) in sections:
        length = max(len(own), len(other)) if padding else 0
        template = own if number < 0 else own + pads[:1] * (length - len(own))
        start = len(read)
        read += other + pads[1:] * (length - len(other))
        ids += template
        index += np.clip(np.arange(start, start + len(template)), 0, max(len(read) - 1, 0)).tolist()
        message += [-1] * len(template)
        index += range(len(read), len(read) + len(text))
        read += align_ids(text, receiver, sharer, strategy)
        ids += text
        message += [number] * len(text)
    fed = np.maximum.accumulate(np.array(index, dtype=np.int32)) if index else np.zeros(0, np.int32)
    return TokenAlignment(ids, read or [~pads[1]], fed, np.array(message, dtype=np.int32))


def message_groups(message: npt.NDArray[np.int32], positions: str) -> npt.NDArray[np.int32]:
    """Which positions are fused, and with which message, `[len(message)]`.

    Args:
        message: `TokenAlignment.message`.
        positions: the fuser's field of that name.

    Returns:
        The message that a position is fused with, -1 where nothing is fused. Template text goes
        with the message before it.
    """
    if positions == "messages":
        return message
    filled = _filled(message)
    return np.maximum(filled, 0) if positions == "all" else filled


@dataclass(frozen=True)
class _Prompt:
    """A rendered and tokenised conversation.

    Attributes:
        ids: The prompt's token ids.
        first: `[len(ids)]`, each token's first character; never decreases.
        last: `[len(ids)]`, each token's last character; never decreases.
        coordinates: Of `rendering.Rendering`.
    """

    ids: list[int]
    first: Ints
    last: Ints
    coordinates: Ints


def _prompt(messages: Sequence[Message], tokenizer: Tokenizer, generation: bool) -> _Prompt:
    rendering = locate(messages, tokenizer, generation)
    return _Prompt(*encode(rendering.text, tokenizer), rendering.coordinates)


def _sharer_positions(messages: Sequence[Message], sharer: _Prompt) -> Ints:
    """For each coordinate the sharer token that covers it, `[all cores' characters]`.

    Text that the sharer's template dropped takes the token before it, or the first of all.
    """
    covered = np.flatnonzero(sharer.coordinates >= 0)
    tokens = np.full(bases(messages)[-1], -1, dtype=np.int64)
    # Of several byte pieces of a character, this is the one that has read it all.
    tokens[sharer.coordinates[covered]] = np.searchsorted(sharer.first, covered, side="right") - 1
    return np.maximum(_filled(tokens), 0)


def _message_of(messages: Sequence[Message], coordinates: Ints) -> npt.NDArray[np.int32]:
    number = np.searchsorted(bases(messages), coordinates, side="right") - 1
    return np.where(coordinates < 0, -1, number).astype(np.int32)
