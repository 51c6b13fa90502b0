"""Thoughts of a model that thinks before it answers, whether it is asked to or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BUDGET = 2048  # tokens of them, beside those of an answer


def begins_thinking(tokenizer: Any, prompt_ids: Sequence[int]) -> bool:
    """Whether a prompt ends within thoughts: the model was made to think, asked to or not."""
    if not getattr(tokenizer, "has_thinking", False):
        return False
    # Below zero is padding, which no tokenizer knows.
    text = tokenizer.decode([token for token in prompt_ids if token >= 0][-16:])
    return bool(text.rfind(tokenizer.think_start) > text.rfind(tokenizer.think_end))
