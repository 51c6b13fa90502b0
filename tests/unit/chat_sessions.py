"""Sessions of the two tiny models, for the tests of conversations."""

from __future__ import annotations

from collections.abc import Callable

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx

from c2c_mlx import ChatSession, Fuser, LanguageModel
from c2c_mlx.config import FuserConfig, SamplingConfig
from c2c_mlx.events import Event, Finished, Mode

SAMPLING = SamplingConfig(max_tokens=7, temp=1.0, seed=5)
MakeSession = Callable[..., ChatSession]


def open_fuser(receiver: LanguageModel, sharer: LanguageModel) -> Fuser:
    """Into all four layers, every gate open."""
    mx.random.seed(1)
    layers = tuple((i, i + 2) for i in range(4))
    fuser = Fuser(FuserConfig(receiver.shape, sharer.shape, layers, 24, 20))
    fuser.gate_logit = mx.ones_like(fuser.gate_logit)
    fuser.eval()
    return fuser


def ask(session: ChatSession, question: str, mode: Mode) -> tuple[list[Event], Finished]:
    events = list(session.ask(question, mode))
    finished = events[-1]
    assert isinstance(finished, Finished)
    return events, finished
