"""What a token of the answer costs with and without fusing it, in turns in one run; and memory.

    python benchmarks/response.py [--positions 100 1000 4000] [--tokens 24] [--runs 5]

A prompt is a sentence, repeated; of a long one all but the last chunk of the prefills is random
numbers, for a CPU reads 4,000 positions in a minute. The peak is that of a turn, reading and
fusing the prompt included, over what stays of it: the weights and all caches.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
from mlx_lm.generate import generate_step

from c2c_mlx import C2C, Fuser, device, load_model
from c2c_mlx.fusers import store
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.models import registry
from c2c_mlx.text.alignment import TokenAlignment, align_chat
from c2c_mlx.text.answer import AnswerAlignment

SENTENCE = "Tell me three things about the sea. "


def seconds_per_token(model: Any, last: list[int], cache: Any, tokens: int) -> float:
    """Median after the first token."""
    steps = generate_step(mx.array(last), model, max_tokens=tokens, prompt_cache=cache)
    times = [time.perf_counter() for _ in steps]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def make_up(reader: Reader, ids: list[int]) -> None:
    """Has a reader hold random numbers for whole chunks of the ids, but never the last."""
    n = (len(ids) - 1) // device.prefill_chunk() * device.prefill_chunk()
    like = Reader(reader.model)
    like.extend(ids[:1])
    for layer in kv.attention_layers(like.cache):
        keys, values = (
            mx.random.normal((*x.shape[:2], n, x.shape[3]), x.dtype)
            for x in kv.read_layer(like.cache, layer, 0, 1)
        )
        kv.append(reader.cache, layer, keys, values)
    mx.eval(kv.arrays(reader.cache))
    reader.ids = ids[:n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--positions", type=int, nargs="*", default=[100, 1000, 4000])
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    pair = registry.default_pair()
    receiver, sharer = map(load_model, pair)
    name = registry.find_fuser(*pair)
    assert name is not None, "the embedded pair's fuser is missing"
    fuser = Fuser.load(store.find_folder(name))
    c2c = C2C(receiver.model, sharer.model, fuser)
    readers, strategy = (receiver.tokenizer, sharer.tokenizer), fuser.config.alignment
    words = len(receiver.tokenizer.encode(SENTENCE))

    def aligned(n: int) -> TokenAlignment:
        messages = [{"role": "user", "content": SENTENCE * max(n // words, 1)}]
        return align_chat(messages, *readers, strategy=strategy)

    for n in args.positions:
        prompt = aligned(n)
        caches = FusedCache(c2c)
        if n > device.prefill_chunk():
            make_up(caches.own, prompt.receiver_ids[:-1])
            make_up(caches.sharers[0], prompt.sharer_ids)
            mx.clear_cache()

        def measure(
            fusing: bool, caches: FusedCache = caches, prompt: TokenAlignment = prompt
        ) -> float:
            caches.extend([prompt])  # rolls back what was answered before
            answer = AnswerAlignment(prompt, *readers, strategy=strategy)
            model = caches.answering([answer]) if fusing else receiver.model
            last = prompt.receiver_ids[-1:]
            return seconds_per_token(model, last, caches.cache, args.tokens)

        mx.reset_peak_memory()
        measure(fusing=True)
        peak, stays = mx.get_peak_memory(), mx.get_active_memory()
        rounds = [(measure(fusing=False), measure(fusing=True)) for _ in range(args.runs)]
        plain, fused = (statistics.median(times) for times in zip(*rounds, strict=True))
        ratio = statistics.median(b / a for a, b in rounds)
        print(
            f"{len(prompt.receiver_ids)} positions: {1e3 * plain:.0f} ms a token, fused "
            f"{1e3 * fused:.0f} ms, {ratio:.2f} x; the turn's peak {peak / 1e9:.2f} GB, "
            f"{peak / stays:.2f} x what stays of it",
            flush=True,
        )


if __name__ == "__main__":
    main()
