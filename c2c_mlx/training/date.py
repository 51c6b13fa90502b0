"""Templates that tell the date tell the same one every day. No MLX here."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from c2c_mlx.text.rendering import Tokenizer, fast_tokenizer

# The day that Llama's own template takes where it cannot know the date.
DAY = datetime(2024, 7, 26)
_CODES = "aAbBdeHIjmMpSyY"


def on_a_fixed_day(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, whose chat template takes `DAY` for today.

    Llama 3 and others write the date into every prompt (`strftime_now`). A run that is resumed, and
    a prefill that was kept, must not depend on the day. transformers hands no functions to
    templates, so a macro of that name stands before the template and hides the function.
    """
    fast = fast_tokenizer(tokenizer)
    template = fast.get_chat_template() if getattr(fast, "chat_template", None) else ""
    return _OnAFixedDay(tokenizer, _macro() + template) if "strftime_now" in template else tokenizer


class _OnAFixedDay:
    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self._wrapped, self._template = tokenizer, template

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped.apply_chat_template(*args, chat_template=self._template, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def _macro() -> str:
    """`strftime_now` in Jinja: each code of the format replaced by what it is on that day."""
    codes = "".join(f"|replace('%{c}', '{DAY.strftime(f'%{c}')}')" for c in _CODES)
    unpadded = f"|replace('%-d', '{DAY.day}')|replace('%-m', '{DAY.month}')"
    return (
        f"{{%- macro strftime_now(format) -%}}{{{{ format{unpadded}{codes} }}}}{{%- endmacro -%}}"
    )
