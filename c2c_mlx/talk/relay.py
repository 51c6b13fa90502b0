"""The text relay, C2C's rival: the sharer writes, the receiver reads (c2c, section 6)."""

from __future__ import annotations

Messages = list[dict[str, str]]

BACKGROUND_TOKENS = 256  # the published budget of the sharer's text

_BACKGROUND = "Write briefly what helps to answer the following message.\n\n{question}"


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
