"""Thoughts of a model that thinks before it answers, whether it is asked to or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BUDGET = 2048  # tokens of them, beside those of an answer

# GPT-OSS writes in channels, of which the last one is the answer; mlx-lm sees no thoughts there.
_CHANNELS = ["<|start|>", "<|channel|>", "<|message|>"]
_FIRST_CHANNEL, _LAST_CHANNEL = "<|start|>assistant", "<|channel|>final<|message|>"


def marks(tokenizer: Any) -> tuple[str, str] | None:
    """What begins and what ends a model's thoughts; None if it has none."""
    if getattr(tokenizer, "has_thinking", False):
        return tokenizer.think_start, tokenizer.think_end
    # Asked of every prompt: a list of all that was added to a vocabulary may take 14 ms.
    if {None, tokenizer.unk_token_id}.isdisjoint(tokenizer.convert_tokens_to_ids(_CHANNELS)):
        return _FIRST_CHANNEL, _LAST_CHANNEL
    return None


def begins_thinking(tokenizer: Any, prompt_ids: Sequence[int]) -> bool:
    """Whether a prompt ends within thoughts: the model was made to think, asked to or not."""
    own = marks(tokenizer)
    return own is not None and _ends_with(own[0], tokenizer, prompt_ids)


def has_thought(tokenizer: Any, prompt_ids: Sequence[int]) -> bool:
    """Whether a prompt ends behind thoughts, such as the empty ones that turn a model's off."""
    own = marks(tokenizer)
    return own is not None and _ends_with(own[1], tokenizer, prompt_ids)


def _ends_with(mark: str, tokenizer: Any, prompt_ids: Sequence[int]) -> bool:
    # Below zero is padding, which no tokenizer knows.
    text: str = tokenizer.decode([token for token in prompt_ids if token >= 0][-16:])
    return text.rstrip().endswith(mark)  # anywhere else it may be what the user wrote
