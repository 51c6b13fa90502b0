"""A question's cache with examples before it, and what of it stays when they are taken away."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation.choice import LEAD
from c2c_mlx.evaluation.modes import Reading
from c2c_mlx.evaluation.task import Item, Messages
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.reader import Reader, common_prefix
from c2c_mlx.fusion.rope import Rotation
from c2c_mlx.models.load import LanguageModel
from c2c_mlx.text.rendering import render
from c2c_mlx.text.thoughts import begins_thinking
from c2c_mlx.text.tokens import tokenize


def draw(items: Sequence[Item], shots: int, seed: int) -> tuple[list[Item], list[Item]]:
    """So many of the items as examples, the same ones for every question; and the others.

    Raises:
        C2CError: if no question would be left.
    """
    if not 0 < shots < len(items):
        raise C2CError(f"--shots {shots}: there are {len(items)} items, examples and questions")
    chosen = {*np.random.default_rng(seed).permutation(len(items))[:shots].tolist()}
    examples = [item for i, item in enumerate(items) if i in chosen]
    return examples, [item for i, item in enumerate(items) if i not in chosen]


@dataclass(frozen=True)
class Caches:
    """Three caches from which a question can be answered, each without the prompt's last id.

    Attributes:
        alone: the question alone, n - 1 positions.
        few_shot: the examples and the question.
        enriched: n - 1 positions, those of the question computed behind the examples, which then
            were dropped (paper, section 3.1).
        last: the prompt's last id.
        prompt_tokens: n.
        few_shot_tokens: n and the examples'.
        is_thinking: whether the prompt ends within thoughts.
    """

    alone: kv.Cache
    few_shot: kv.Cache
    enriched: kv.Cache
    last: int
    prompt_tokens: int
    few_shot_tokens: int
    is_thinking: bool

    def reading(self, lm: LanguageModel, cache: kv.Cache) -> Reading:
        """One of the caches, or a mixture, to be answered from."""
        return Reading(lm, cache, self.last, self.prompt_tokens, self.is_thinking)

    def mixed(self, layers: Sequence[int]) -> kv.Cache:
        """The question's own cache, enriched in some layers alone."""
        return [e if i in layers else a for i, (a, e) in enumerate(self.pairs)]

    @property
    def pairs(self) -> list[tuple[object, object]]:
        """Each layer's own cache and its enriched one."""
        return list(zip(self.alone, self.enriched, strict=True))


class Enriching:
    """Computes the three caches of one question after the other; what they share is read once.

    Args:
        lm: the model.
        examples: before every question.

    Raises:
        C2CError: if a layer of the model has no rotary embedding.
    """

    def __init__(self, lm: LanguageModel, examples: Sequence[Item]) -> None:
        self.lm, self.examples = lm, examples
        self._alone, self._few_shot = Reader(lm.model), Reader(lm.model)
        self.layers = kv.attention_layers(self._alone.cache)
        self._rotation = Rotation(lm.model, self.layers, lm.name)

    def __call__(self, item: Item) -> Caches:
        """The caches of one question.

        Raises:
            C2CError: if the model's template writes the question otherwise behind examples.
        """
        tokenizer = self.lm.tokenizer
        ids, behind = (
            tokenize(render(messages, tokenizer), tokenizer)
            for messages in (item.messages, with_examples(item, self.examples))
        )
        if len(behind) >= self.lm.context_length:
            raise C2CError(f"--shots: {len(behind)} tokens are more than {self.lm.name} reads")
        kept = len(ids) - common_prefix(ids[::-1], behind[::-1])
        if common_prefix(ids, behind) < kept or kept == len(ids):
            raise C2CError(
                f"{self.lm.name}: its template writes a question otherwise when examples stand "
                "before it, so its positions can't be told apart"
            )
        self._alone.extend(ids[:-1])
        self._few_shot.extend(behind[:-1])
        alone, few_shot = (copy.deepcopy(r.cache) for r in (self._alone, self._few_shot))
        start = len(behind) - len(ids) + kept
        enriched = copy.deepcopy(alone)
        kv.trim(enriched, kept)
        keys, values = kv.read(few_shot, self.layers, start, len(behind) - 1)
        # The question's keys go back to where it stands without the examples.
        bare = self._rotation.take_off(keys.astype(mx.float32), start)
        moved = self._rotation.put_on(bare, kept).astype(keys.dtype)
        for at, layer in enumerate(self.layers):
            kv.append(enriched, layer, moved[at], values[at])
        mx.eval(kv.arrays(alone), kv.arrays(few_shot), kv.arrays(enriched))
        is_thinking = begins_thinking(tokenizer, ids)
        return Caches(alone, few_shot, enriched, ids[-1], len(ids), len(behind), is_thinking)


def with_examples(item: Item, examples: Sequence[Item]) -> Messages:
    """The item's messages, with examples as turns before them, behind a system prompt."""
    opening = [m for m in item.messages if m["role"] == "system"]
    said = []
    for example in examples:
        answer = f"{LEAD} {example.reference}" if example.choices else example.reference
        said += [m for m in example.messages if m["role"] != "system"]
        said.append({"role": "assistant", "content": answer})
    return [*opening, *said, *(m for m in item.messages if m["role"] != "system")]
