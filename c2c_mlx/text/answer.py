"""An answer, aligned while it is being written to how a sharer reads it along."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from c2c_mlx.text.alignment import TokenAlignment
from c2c_mlx.text.rendering import Tokenizer
from c2c_mlx.text.tokens import Strategy, along, end_ids


class AnswerAlignment:
    """Aligns an answer, while it is being written, to how the sharer reads it.

    Both models go on from the ends of their prompts, the sharer with one id for each of the
    receiver's (`tokens.along`): so it knows no character that the receiver has yet to write, and
    what feeds a token stays what it was when the token was written.

    Args:
        prompt: the conversation that is being answered, aligned by `align_chat`.
        receiver_tokenizer: the answering model's.
        sharer_tokenizer: the reading model's.
        strategy: the one that `prompt` was made with.
    """

    def __init__(
        self,
        prompt: TokenAlignment,
        receiver_tokenizer: Tokenizer,
        sharer_tokenizer: Tokenizer,
        *,
        strategy: Strategy = "span",
    ) -> None:
        self.prompt, self.strategy = prompt, strategy
        self._receiver, self._sharer = receiver_tokenizer, sharer_tokenizer
        self._number = int(prompt.message.max(initial=-1)) + 1
        self._end_of_turn = end_ids(receiver_tokenizer)
        self._ids: list[int] = []
        self._heard: list[int] = []  # the sharer's, one for each

    def add(self, ids: Sequence[int]) -> TokenAlignment:
        """The alignment of the prompt and all of the answer, `ids` being what is new in it."""
        self._ids += ids
        self._heard += along(ids, self._receiver, self._sharer, self.strategy)
        index = len(self.prompt.sharer_ids) + np.arange(len(self._heard))
        message = [-1 if token in self._end_of_turn else self._number for token in self._ids]
        return TokenAlignment(
            [*self.prompt.receiver_ids, *self._ids],
            [*self.prompt.sharer_ids, *self._heard],
            np.append(self.prompt.index, index).astype(np.int32),
            np.append(self.prompt.message, message).astype(np.int32),
        )
