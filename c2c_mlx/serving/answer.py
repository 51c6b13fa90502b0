"""One answer while it is written: tokens in, text that is certain out."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
from mlx_lm.generate import TextStateMachine
from mlx_lm.sample_utils import Sampler, apply_top_p
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from c2c_mlx.config import SamplingConfig
from c2c_mlx.events import Reason
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.models.load import LanguageModel
from c2c_mlx.serving.job import Piece, Token
from c2c_mlx.talk.crossed import Decoded
from c2c_mlx.talk.decode import parts_of

_BYTES: dict[str, int] = {character: byte for byte, character in bytes_to_unicode().items()}
_LEAST_LOGPROB = -9999.0  # stands for -inf, which JSON has not
_GREEDY_BELOW = 1e-5  # a temperature that float32 could not divide by


class Answer:
    """Text and tokens of one answer.

    Args:
        lm: who writes.
        choice: which one, of several answers to one prompt.
        stop: text that ends the answer; it and all behind it are dropped.
        top_logprobs: how many of the likeliest tokens to tell beside each one; None: tell nothing.
        decoded: notes what is needed to say what crossed; None: nobody asks.
        limit: tokens that it may have, thoughts aside; None: who decodes says when it ends.
        is_thinking: whether the prompt ends within thoughts, which are no part of the answer.
    """

    def __init__(
        self,
        lm: LanguageModel,
        choice: int = 0,
        stop: Sequence[str] = (),
        top_logprobs: int | None = None,
        decoded: Decoded | None = None,
        limit: int | None = None,
        is_thinking: bool = False,
    ) -> None:
        self.choice = choice
        self.ids: list[int] = []  # the end of the turn included
        self.text = ""  # that is certain
        self.reason: Reason | None = None  # of the end
        self.error: Exception | None = None  # why there is no end
        self.reader: Reader | None = None  # what has read the prompt and the answer
        self.decoded = decoded
        self._left = limit
        self._top = top_logprobs
        self._tokenizer = lm.tokenizer
        self._detokenizer = lm.tokenizer.detokenizer
        parts = parts_of(lm.tokenizer, stop)
        self._state = parts.make_state("thoughts" if is_thinking else "normal")
        self._written = 0  # characters, those included that might become a stop string
        self._untold: deque[tuple[int, Token]] = deque()  # where the token's text begins

    @property
    def is_thinking(self) -> bool:
        """Whether it is within thoughts."""
        return bool(self._state[0] == "thoughts")

    def add(self, token: int, logprobs: mx.array, finish: Reason | None) -> Piece:
        """Takes the next token.

        Args:
            token: its id.
            logprobs: [V] over the vocabulary.
            finish: why it is the last one, if it is: "stop" for the end of the turn, which is no
                text.

        Returns:
            What is certain now and was not before.
        """
        self.ids.append(token)
        was_thinking = self.is_thinking
        if finish != "stop":
            self._detokenizer.add_token(token)
            if self._top is not None and not was_thinking:
                self._untold.append(
                    (self._written, weigh(self._tokenizer, token, logprobs, self._top))
                )
        if finish:
            self._detokenizer.finalize()
        segment = self._detokenizer.last_segment
        self._state, segments = TextStateMachine.split(self._state, segment)
        text = "".join(part for state, part in segments if state == "normal")
        is_thought = was_thinking or self.is_thinking  # a mark is no part of the answer
        if self._left is not None and not is_thought:
            self._left -= 1
            finish = finish or (None if self._left else "length")
        if self._state[0] is None:
            self.reason = "stop"
        elif finish:
            self._state, rest, state = TextStateMachine.flush(self._state)
            text, self.reason = text + (rest if state == "normal" else ""), finish
        self.text += text
        if self.is_thinking:
            while self._untold and self._untold[-1][0] >= len(self.text):
                self._untold.pop()  # the mark that has opened the thoughts
            self._written = len(self.text)
        else:
            self._written = len(self.text) + len(self._state[3])  # what is held back
        if self.decoded:
            self.decoded.add(token, text, logprobs[token], is_thought)
        return Piece(self.choice, text, tuple(self._told()))

    def _told(self) -> list[Token]:
        """The tokens whose text has begun to be certain, each once."""
        is_whole = self.reason is not None and self._state[0] is not None
        told = []
        while self._untold and (is_whole or self._untold[0][0] < len(self.text)):
            told.append(self._untold.popleft()[1])
        return told


def sampler(sampling: SamplingConfig, choice: int = 0) -> Sampler | None:
    """A sampler with random numbers of its own, so that it does not matter who else is sampled.

    Returns:
        A function logprobs [1, V] -> ids [1]; None: greedy.
    """
    if sampling.temp < _GREEDY_BELOW:
        return None
    numbers = np.random.default_rng((sampling.seed, choice))

    def sample(logprobs: mx.array) -> mx.array:
        if sampling.top_p < 1:
            logprobs = apply_top_p(logprobs, sampling.top_p)
        key = mx.random.key(int(numbers.integers(2**63)))
        return mx.random.categorical(logprobs / sampling.temp, key=key)

    return sample


def weigh(tokenizer: Any, token: int, logprobs: mx.array, top: int) -> Token:
    """How likely a token was, with so many of the likeliest ones; logprobs are [V]."""
    values = np.array(logprobs)
    likeliest = np.argpartition(values, -top)[-top:] if top else np.zeros(0, int)
    likeliest = likeliest[np.argsort(-values[likeliest], kind="stable")]

    def tell(token: int, top: tuple[Token, ...] = ()) -> Token:
        data = token_bytes(tokenizer, token)
        value = max(float(values[token]), _LEAST_LOGPROB)
        return Token(data.decode("utf-8", "replace"), tuple(data), value, top)

    return tell(token, tuple(map(tell, likeliest.tolist())))


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """What a token adds to the text; a piece of a character is not UTF-8 by itself."""
    word = tokenizer.convert_ids_to_tokens(token) or ""  # a model may know more ids than it does
    detokenizer = tokenizer.detokenizer
    if isinstance(detokenizer, SPMStreamingDetokenizer):
        piece = re.fullmatch("<0x([0-9A-F]{2})>", word)
        return bytes.fromhex(piece[1]) if piece else word.replace("\u2581", " ").encode()
    if isinstance(detokenizer, BPEStreamingDetokenizer) and _BYTES.keys() >= set(word):
        return bytes(_BYTES[character] for character in word)
    return str(tokenizer.decode([token])).encode()
