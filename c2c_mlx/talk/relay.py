"""The text relay, C2C's rival: the sharer writes, the receiver reads (c2c, section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from c2c_mlx.models.load import LanguageModel

Messages = list[dict[str, str]]

BACKGROUND_TOKENS = 256  # the published budget of the sharer's text, whatever the answer's is

_BACKGROUND = "Write briefly what helps to answer the following message.\n\n{question}"

# A base model continues: without examples it often writes a blank line, or one more question. The
# receiver may read English alone, so they say in English what another language asks.
_EXAMPLES = (
    ("Translate to English: Der Zug kommt bald.", "The train is coming soon."),
    (
        "Pourquoi les feuilles sont-elles vertes ?",
        "Leaves are green because they hold chlorophyll, which takes in red and blue light and "
        "reflects green.",
    ),
    (
        "How do I make tea?",
        "To make tea, boil fresh water, pour it over the leaves, wait for three to five minutes, "
        "and take the leaves out.",
    ),
)


def background_message(question: str) -> dict[str, str]:
    """What the sharer is asked in the place of the user's message."""
    return {"role": "user", "content": _BACKGROUND.format(question=question)}


def with_background(question: str, background: str) -> Messages:
    """What the receiver reads: the text as if it had been said before, then the question."""
    return [
        background_message(question),
        {"role": "assistant", "content": background},
        {"role": "user", "content": question},
    ]


def prompt(sharer: LanguageModel, messages: Sequence[dict[str, str]]) -> Messages:
    """What the sharer reads: messages that end with a `background_message`, as it needs them."""
    shown: Messages = []
    for question, background in () if sharer.has_own_template else _EXAMPLES:
        shown += with_background(question, background)[:2]
    return [*shown, *messages]


def stop_strings(sharer: LanguageModel) -> tuple[str, ...]:
    """Text that ends the sharer's; a base model's is one line, as its examples are."""
    return sharer.stop_strings if sharer.has_own_template else ("\n",)


def why_nothing(tokens: int) -> str:
    """Why a text is empty that took so many tokens."""
    if tokens > BACKGROUND_TOKENS:  # no text has so many
        return f"{tokens} tokens of thoughts, and no text behind them"
    return "it ended at once" if tokens <= 1 else "white space alone"
