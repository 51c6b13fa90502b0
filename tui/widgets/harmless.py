"""Text of models and users, without what a terminal would act upon."""

from __future__ import annotations


def harmless(text: str) -> str:
    """A model's text without characters that a terminal would act upon."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
