"""Text of models and users, without what a terminal would act upon."""

from __future__ import annotations

import re

# Control characters but for the line's end and the tab, other ends of lines, what turns the
# direction of writing, and halves of characters; all else is somebody's text.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """A model's text without characters that a terminal would act upon."""
    return _OBEYED.sub("�", text)
