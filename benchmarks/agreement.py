"""Whether c2c-chat and c2c-eval answer token for token alike, whatever the alignment and precision.

Tiny random models, a random fuser with every gate open, and two tokenizers and templates that cut
texts differently, so that fused prompts hold padding. A chat answers one prompt at a time; the
evaluation answers batches, and single prompts as well: products of a batch may be rounded in
another order, which half precision shows where two tokens are nearly as likely.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from c2c_mlx import ChatSession, Fuser, LanguageModel, device, load_model
from c2c_mlx.config import FuserConfig, SamplingConfig
from c2c_mlx.evaluation.modes import Modes, Reading, write
from c2c_mlx.evaluation.task import Item
from c2c_mlx.events import Finished
from c2c_mlx.fusers import disk
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.talk.decode import decode
from c2c_mlx.text.alignment import align_chat

TINY = Path(__file__).parents[1] / "tests" / "golden" / "data" / "e2e" / "qwen3_llama"
Alignment = Literal["first", "longest", "span"]
DTYPES = (mx.float32, mx.bfloat16, mx.float16)
BATCH, TOKENS = 16, 24
WORDS = (
    "the quick brown fox jumps over a lazy dog who wrote this and when was it that 12 345 größer "
    "où naïve 你好 世界 мир I'm don't x+y=z ... \n\n tokenizer understanding"
).split(" ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    args = parser.parse_args()
    os.environ[device.REHEARSE] = "gpu"  # nothing is made float32
    items = list(prompts(args.prompts))
    exact = True
    print("| models | alignment | padded | agree one by one | in batches of 16 | largest gap |")
    print("| --- | --- | --- | --- | --- | --- |")
    for dtype in DTYPES:
        receiver, sharer = (held_as(load_model(TINY / name), dtype) for name in NAMES)
        sharer.tokenizer = other_tokenizer()
        for alignment in get_args(Alignment):
            found = compare(receiver, sharer, fuser(receiver, sharer, alignment, dtype), items)
            print(f"| {str(dtype).split('.')[-1]} | {alignment} | {found}", flush=True)
            exact &= found.alone == len(items)
            exact &= dtype != mx.float32 or found.batched == len(items)
    sys.exit(0 if exact else 1)


NAMES = ("receiver", "sharer")


@dataclass(frozen=True)
class Found:
    """How many of all prompts got the same answer."""

    padded: int  # prompts with padding among the receiver's positions
    alone: int
    batched: int
    of: int
    gap: float  # between the two likeliest tokens where a batch first chose another one

    def __str__(self) -> str:
        gap = "" if self.batched == self.of else f"{self.gap:.1%} of the largest logit"
        return f"{self.padded} | {self.alone} of {self.of} | {self.batched} of {self.of} | {gap} |"


def compare(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser, items: list[Item]
) -> Found:
    """Every prompt in a chat, alone in an evaluation, and in its batches."""
    sampling = SamplingConfig(max_tokens=TOKENS)
    session = ChatSession(receiver, sharer, fuser, sampling=sampling)
    modes = Modes(receiver, [sharer], [fuser], "sequential", items, 0, TOKENS)
    readings = [r for r in modes.read("c2c", items) if isinstance(r, Reading)]
    assert len(readings) == len(items)
    parts = [readings[at : at + BATCH] for at in range(0, len(items), BATCH)]
    together = [w.ids for part in parts for w in write(part, TOKENS)]
    padded = alone = batched = 0
    gap = 0.0
    for item, reading, of_batch in zip(items, readings, together, strict=True):
        (single,) = write([reading], TOKENS)
        text = align_chat(
            item.messages,
            receiver.tokenizer,
            sharer.tokenizer,
            strategy=fuser.config.alignment,
        )
        padded += any(token < 0 for token in text.receiver_ids)
        cache = FusedCache(*session.links).extend([text])
        ids = [
            token
            for token, *_ in decode(
                receiver.model, receiver.tokenizer, cache, text.receiver_ids[-1:], sampling
            )
        ]
        session.reset()
        *_, said = session.ask(item.messages[0]["content"], "c2c")
        assert isinstance(said, Finished)
        is_chat = said.figures.generated_tokens == len(ids) and said.text == single.text
        alone += is_chat and ids == single.ids
        batched += ids == of_batch
        if ids != of_batch:
            gap = max(gap, first_gap(receiver, reading, ids, of_batch))
    return Found(padded, alone, batched, len(items), gap)


def first_gap(lm: LanguageModel, reading: Reading, a: list[int], b: list[int]) -> float:
    """How far apart the two choices are where they part, relative to the largest logit."""
    at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    cache = copy.deepcopy(reading.cache)
    logits = lm.model(mx.array([[reading.last, *a[:at]]]), cache=cache)[0, -1].astype(mx.float32)
    return float((mx.abs(logits[a[at]] - logits[b[at]]) / mx.abs(logits).max()).item())


def prompts(n: int) -> Iterator[Item]:
    """Texts of one to thirty words, in several scripts."""
    drawn = random.Random(0)
    for number in range(n):
        text = " ".join(drawn.choices(WORDS, k=drawn.randint(1, 30))).strip() or "the"
        yield Item(str(number), [{"role": "user", "content": text}])


def held_as(lm: LanguageModel, dtype: mx.Dtype) -> LanguageModel:
    """The model in another precision."""
    lm.model.set_dtype(dtype)
    mx.eval(lm.model.parameters())
    return lm


def other_tokenizer() -> TokenizerWrapper:
    """Fewer and other tokens than the tiny models' own, and a longer template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS[::2]), "assistant user system"], trainer)
    template = (
        "You read for somebody else.\n"
        "{% for m in messages %}### {{ m['role'] }} says:\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant says:\n{% endif %}"
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, eos_token="<|end|>"
    )
    return TokenizerWrapper(fast)


def fuser(
    receiver: LanguageModel, sharer: LanguageModel, alignment: Alignment, dtype: mx.Dtype
) -> Fuser:
    """A random one with every gate open, as it comes from its folder."""
    mx.random.seed(1)
    shapes = (kv.model_shape(lm.model, lm.name) for lm in (receiver, sharer))
    layer_map = tuple((i, i + 2) for i in range(4))
    made = Fuser(FuserConfig(*shapes, layer_map, 24, 20))
    made.config = replace(made.config, alignment=alignment)
    made.gate_logit = mx.ones_like(made.gate_logit)
    with tempfile.TemporaryDirectory() as folder:
        disk.save(made, folder, dtype)
        loaded = disk.load(folder)
        mx.eval(loaded.parameters())
        return loaded


if __name__ == "__main__":
    main()
