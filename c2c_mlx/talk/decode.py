"""Decoding from a prefilled cache, the same for every mode: mlx-lm's own, with stop strings."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
from mlx_lm.generate import stream_generate
from mlx_lm.sample_utils import make_sampler

from c2c_mlx import device
from c2c_mlx.config import SamplingConfig
from c2c_mlx.events import Reason
from c2c_mlx.fusion import kv


def decode(
    model: Any,
    tokenizer: Any,
    cache: kv.Cache,
    last_ids: Sequence[int],
    sampling: SamplingConfig,
    stop_strings: Sequence[str] = (),
) -> Generator[tuple[int, str, mx.array], None, Reason]:
    """mlx-lm's own decoding from a prefilled cache, the same for every mode.

    Args:
        model: an mlx-lm model, or what `FusedCache.answering` gives.
        tokenizer: its mlx-lm tokenizer.
        cache: a prompt cache; it grows in place.
        last_ids: what of the prompt is not in the cache, at least one id.
        sampling: temperature, nucleus, seed, and the most tokens to generate.
        stop_strings: text that ends an answer; it and all behind it are dropped.

    Yields:
        (token id, text that is now certain, log-probability of the token). The text is empty while
        it might become a stop string. The last id that is yielded may be the end-of-turn token.

    Returns:
        "stop" if the answer ended by itself or at a stop string, "length" if it was cut.
    """
    mx.random.seed(sampling.seed)
    text, shown = "", 0
    for response in stream_generate(
        model,
        tokenizer,
        mx.array(list(last_ids)),
        max_tokens=sampling.max_tokens,
        sampler=make_sampler(temp=sampling.temp, top_p=sampling.top_p),
        prompt_cache=cache,
        prefill_step_size=device.prefill_chunk(),
    ):
        text += response.text
        stop = min((at for s in stop_strings if (at := text.find(s)) >= 0), default=-1)
        certain = stop if stop >= 0 else len(text) - _held_back(text, stop_strings)
        if response.finish_reason and stop < 0:
            certain = len(text)
        yield response.token, text[shown:certain], response.logprobs[response.token]
        shown = max(shown, certain)
        if stop >= 0:
            return "stop"
    return "stop" if response.finish_reason == "stop" else "length"


def _held_back(text: str, stop_strings: Sequence[str]) -> int:
    """Length of the longest tail of `text` that a stop string begins with."""
    return max(
        (n for s in stop_strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0
    )
