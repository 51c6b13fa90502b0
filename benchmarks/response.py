"""What a token of the answer costs with and without fusing it, measured in turns in one run."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
from mlx_lm.generate import generate_step

from c2c_mlx import C2C, Fuser, load_model
from c2c_mlx.fusers import store
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.models import registry
from c2c_mlx.text.alignment import align_chat
from c2c_mlx.text.answer import AnswerAlignment

MESSAGES = [{"role": "user", "content": "Tell me three things about the sea."}]
TOKENS, RUNS = 24, 5


def seconds_per_token(model: Any, last: list[int], cache: Any) -> float:
    """Median after the first token."""
    steps = generate_step(mx.array(last), model, max_tokens=TOKENS, prompt_cache=cache)
    times = [time.perf_counter() for _ in steps]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def main() -> None:
    pair = registry.default_pair()
    receiver, sharer = map(load_model, pair)
    name = registry.find_fuser(*pair)
    assert name is not None, "the embedded pair's fuser is missing"
    fuser = Fuser.load(store.find_folder(name))
    c2c = C2C(receiver.model, sharer.model, fuser)
    readers, strategy = (receiver.tokenizer, sharer.tokenizer), fuser.config.alignment
    prompt = align_chat(MESSAGES, *readers, strategy=strategy)

    def measure(fusing: bool) -> float:
        prefix = FusedCache(c2c)
        cache = prefix.extend([prompt])
        answer = AnswerAlignment(MESSAGES, prompt, *readers, strategy=strategy)
        model = prefix.answering([answer]) if fusing else receiver.model
        return seconds_per_token(model, prompt.receiver_ids[-1:], cache)

    rounds = [(measure(fusing=False), measure(fusing=True)) for _ in range(RUNS + 1)][1:]
    plain, fused = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratio = statistics.median(b / a for a, b in rounds)
    print(f"{TOKENS} tokens, prompt alone fused: {1e3 * plain:.0f} ms a token")
    print(f"response fused, too: {1e3 * fused:.0f} ms a token, {ratio:.2f} x")


if __name__ == "__main__":
    main()
