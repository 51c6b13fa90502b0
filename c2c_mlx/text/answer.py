"""An answer, aligned while it is being written to how a sharer reads it along."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from c2c_mlx.text.alignment import TokenAlignment
from c2c_mlx.text.rendering import Ints, Message, Tokenizer, fast_tokenizer, render
from c2c_mlx.text.tokens import Strategy, align_ids, encode, end_ids


class AnswerAlignment:
    """Aligns an answer, while it is being written, to how the sharer reads it.

    Both models go on from the ends of their prompts. Under *span* the sharer reads the text so far
    in its own tokens, so the tokens that feed the answer's end may still change.

    Args:
        messages: the conversation that is being answered.
        prompt: its alignment by `align_chat`.
        receiver_tokenizer: the answering model's.
        sharer_tokenizer: the reading model's.
        strategy: the one that `prompt` was made with.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        prompt: TokenAlignment,
        receiver_tokenizer: Tokenizer,
        sharer_tokenizer: Tokenizer,
        *,
        strategy: Strategy = "span",
    ) -> None:
        self.prompt, self.strategy = prompt, strategy
        self._receiver, self._sharer = receiver_tokenizer, sharer_tokenizer
        self._number = len(messages)
        self._end_of_turn = end_ids(receiver_tokenizer)
        self._ids: list[int] = []
        self._stops: list[int] = []  # how long the text was with each token
        self._lead = _lead(messages, sharer_tokenizer) if strategy == "span" else ""

    def add(self, ids: Sequence[int]) -> TokenAlignment:
        """The alignment of the prompt and all of the answer, `ids` being what is new in it."""
        for token in ids:
            self._ids.append(token)
            self._stops.append(len(self._text()))
        tail, index = self._read()
        message = [-1 if token in self._end_of_turn else self._number for token in self._ids]
        return TokenAlignment(
            [*self.prompt.receiver_ids, *self._ids],
            [*self.prompt.sharer_ids, *tail],
            np.maximum.accumulate(np.append(self.prompt.index, index)).astype(np.int32),
            np.append(self.prompt.message, message).astype(np.int32),
        )

    def _read(self) -> tuple[list[int], Ints]:
        """The sharer's ids for the answer, and which position feeds each of the answer's tokens."""
        end = len(self.prompt.sharer_ids)
        if self.strategy != "span":
            tail = self._ids
            if self.strategy != "same":
                tail = align_ids(self._ids, self._receiver, self._sharer, self.strategy)
            return list(tail), np.arange(end, end + len(tail))
        text = self._text().rstrip("\ufffd")  # a character of which pieces are still to come
        tail, first, _ = encode(self._lead + text, self._sharer)
        # A text with pieces of a character may be longer than it is with the whole character.
        stops = np.minimum.accumulate([*self._stops, len(text)][::-1])[::-1][:-1]
        last = stops + len(self._lead) - 1
        return tail, end + np.searchsorted(first, last, side="right") - 1

    def _text(self) -> str:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(fast_tokenizer(self._receiver).decode(self._ids, **options))


def _lead(messages: Sequence[Message], tokenizer: Tokenizer) -> str:
    """What the template writes between the generation prompt and the answer's text."""
    prompt = render(messages, tokenizer)
    answered = [*messages, {"role": "assistant", "content": "x"}]
    rest = render(answered, tokenizer, add_generation_prompt=False).removeprefix(prompt)
    lead, found, _ = rest.partition("x")
    return lead if found and not lead.strip() else ""
