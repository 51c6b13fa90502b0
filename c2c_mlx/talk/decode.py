"""Decoding from a prefilled cache, the same for every mode: mlx-lm's own, with stop strings."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, cast

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
from mlx_lm.generate import TextStateMachine, stream_generate
from mlx_lm.sample_utils import make_sampler

from c2c_mlx import device
from c2c_mlx.config import SamplingConfig
from c2c_mlx.events import Reason
from c2c_mlx.fusion import kv
from c2c_mlx.text import thoughts


class Piece(NamedTuple):
    """One token of an answer, or of the thoughts before it."""

    token: int  # the last one may be the end-of-turn token
    text: str  # what is now certain; empty while it might become a stop string
    log_prob: mx.array
    is_thought: bool = False


def decode(
    model: Any,
    tokenizer: Any,
    cache: kv.Cache,
    last_ids: Sequence[int],
    sampling: SamplingConfig,
    stop_strings: Sequence[str] = (),
    thinking: bool = False,
    room: int | None = None,
) -> Generator[Piece, None, Reason]:
    """mlx-lm's own decoding from a prefilled cache, the same for every mode.

    Args:
        model: an mlx-lm model, or what `FusedCache.answering` gives.
        tokenizer: its mlx-lm tokenizer.
        cache: a prompt cache; it grows in place.
        last_ids: what of the prompt is not in the cache, at least one id.
        sampling: temperature, nucleus, seed, and the most tokens to generate.
        stop_strings: text that ends an answer; it and all behind it are dropped.
        thinking: whether the prompt ends within thoughts, see `text.thoughts`. They have a budget
            of their own.
        room: tokens that the model's context has room for, thoughts included; None: for all.

    Yields:
        A piece per token; thoughts have no text.

    Returns:
        "stop" if the answer ended by itself or at a stop string, "length" if it was cut.
    """
    mx.random.seed(sampling.seed)
    state = parts_of(tokenizer, stop_strings).make_state("thoughts" if thinking else "normal")
    answered, most = 0, sampling.max_tokens + (thoughts.BUDGET if thoughts.marks(tokenizer) else 0)
    for response in stream_generate(
        in_float32(model),
        tokenizer,
        mx.array(list(last_ids)),
        max_tokens=most if room is None else min(most, room),
        sampler=make_sampler(temp=sampling.temp, top_p=sampling.top_p),
        prompt_cache=cache,
        prefill_step_size=device.prefill_chunk(),
    ):
        before = state[0]
        state, segments = TextStateMachine.split(state, response.text)
        is_thought = "thoughts" in (before, state[0])  # a mark is no part of the answer
        text = "".join(part for name, part in segments if name == "normal")
        is_stopped = state[0] is None
        answered += not is_thought
        is_cut = answered == sampling.max_tokens
        if (response.finish_reason or is_cut) and state[0] == "normal":
            state, rest, _ = TextStateMachine.flush(state)
            text += rest
        yield Piece(response.token, text, response.logprobs[response.token], is_thought)
        if is_stopped:
            return "stop"
        if is_cut and not response.finish_reason:
            return "length"
    return "stop" if response.finish_reason == "stop" else "length"


def in_float32(model: Any) -> Callable[..., mx.array]:
    """The model with logits in float32: a log-probability in half precision is 0.05 off."""

    def logits(ids: mx.array, cache: kv.Cache) -> mx.array:
        return cast(mx.array, model(ids, cache=cache)).astype(mx.float32)

    return logits


def parts_of(tokenizer: Any, stop_strings: Sequence[str]) -> TextStateMachine:
    """Tells an answer ("normal") from "thoughts", and both from what a stop string ends (None).

    A model may open its thoughts by itself, and they end in the answer.
    """
    normal: list[tuple[str, str | None]] = [(text, None) for text in stop_strings]
    within = []
    if marks := thoughts.marks(tokenizer):
        normal.append((marks[0], "thoughts"))
        within.append((marks[1], "normal"))
    return TextStateMachine({"normal": normal, "thoughts": within})
