"""Sessions of the two tiny models, for the tests of conversations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from c2c_mlx import ChatSession, Fuser, LanguageModel
from c2c_mlx.config import FuserConfig, SamplingConfig
from c2c_mlx.events import Event, Finished, Mode

SAMPLING = SamplingConfig(max_tokens=7, temp=1.0, seed=5)
MakeSession = Callable[..., ChatSession]
# More text before a message and less behind it than the tiny models' own template has.
WORDY = (
    "{% for m in messages %}{{ 'The %s says, and means: ' % m['role'] + m['content'] }}."
    "{% endfor %}"
)


def open_fuser(receiver: LanguageModel, sharer: LanguageModel, **options: Any) -> Fuser:
    """Into all four layers, every gate open."""
    mx.random.seed(1)
    layers = tuple((i, i + 2) for i in range(4))
    fuser = Fuser(FuserConfig(receiver.shape, sharer.shape, layers, 24, 20, **options))
    fuser.gate_logit = mx.ones_like(fuser.gate_logit)
    fuser.eval()
    return fuser


def ask(session: ChatSession, question: str, mode: Mode) -> tuple[list[Event], Finished]:
    events = list(session.ask(question, mode))
    finished = events[-1]
    assert isinstance(finished, Finished)
    return events, finished


def thinker(lm: LanguageModel, start: str, end: str) -> TokenizerWrapper:
    """The tokenizer of a model that thinks between two marks, as mlx-lm would find it."""
    tokenizer = copy.copy(lm.tokenizer)
    tokenizer._think_start, tokenizer._think_end = start, end
    return tokenizer


def with_template(lm: LanguageModel, template: str) -> LanguageModel:
    """The model with another chat template."""
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = template
    return replace(lm, tokenizer=tokenizer)
