"""What each token of a batch's answers owes to the sharers, see `talk.crossed`."""

from __future__ import annotations

from collections.abc import Sequence

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx

from c2c_mlx.evaluation.modes import LOGITS, Reading, Written
from c2c_mlx.fusion import kv
from c2c_mlx.talk.crossed import same_start
from c2c_mlx.text.words import token_texts

Owed = list[tuple[str, float]]  # text and nats of each token


def owed(
    readings: Sequence[Reading], silent: Sequence[Reading], written: Sequence[Written]
) -> list[Owed]:
    """How much likelier each token of each answer is than with silent sharers.

    Args:
        readings: from which the answers were written.
        silent: of the same prompts, fused with silent sharers.
        written: the answers.

    Returns:
        One list per answer, the end of the turn included, thoughts not; exactly 0 where nothing
        crossed.
    """
    found = []
    for reading, other, answer in zip(readings, silent, written, strict=True):
        ids = answer.ids
        nats = [0.0] * len(ids)
        pair, n = (reading.cache, other.cache), reading.prompt_tokens - 1
        if ids and not same_start(*pair, kv.attention_layers(reading.cache), n):
            with_sharer, without = _log_probs([reading, other], ids)
            nats = [a - b for a, b in zip(with_sharer, without, strict=True)]
        texts = token_texts(ids[answer.thoughts :], reading.lm.tokenizer)
        rounded = (round(x, 4) for x in nats[answer.thoughts :])
        found.append(list(zip(texts, rounded, strict=True)))
    return found


def _log_probs(readings: Sequence[Reading], ids: Sequence[int]) -> list[list[float]]:
    """Log-probabilities of the same answer from several caches over the same prompt."""
    cache = kv.merge([reading.cache for reading in readings])
    inputs, step = [readings[0].last, *ids[:-1]], max(LOGITS // len(readings), 1)
    found = []
    for at in range(0, len(inputs), step):
        rows = mx.array([inputs[at : at + step]] * len(readings))
        logits = readings[0].lm.model(rows, cache=cache).astype(mx.float32)
        said = mx.array(list(ids[at : at + step]))[None, :, None]
        picked = mx.take_along_axis(logits, mx.broadcast_to(said, (*rows.shape, 1)), axis=2)
        found.append(picked[..., 0] - mx.logsumexp(logits, axis=-1))
        mx.eval(found[-1])
    log_probs: list[list[float]] = mx.concatenate(found, axis=1).tolist()  # type: ignore[assignment]
    return log_probs
