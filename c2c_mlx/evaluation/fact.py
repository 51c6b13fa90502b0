"""Questions of fact: whether what is written says it, in any of the ways that are accepted."""

from __future__ import annotations

import re
import unicodedata

from c2c_mlx.evaluation.task import Answer, Item, Task

# Scripts that put no space between words: what is accepted may stand anywhere in them.
_UNSPACED = (
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Burmese, Khmer
    r"\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
)


class Fact(Task):
    """Accuracy of written answers; the texts that are accepted are the item's choices."""

    kind = "fact"
    scores = ("accuracy",)

    def score(self, item: Item, answer: Answer, own: Answer | None) -> dict[str, float]:
        """1 or 0."""
        return {"accuracy": float(any(says(answer.text, fact) for fact in item.choices))}


def says(text: str, fact: str) -> bool:
    """Whether a text holds another one as whole words, in whatever case."""
    text, fact = (unicodedata.normalize("NFKC", x).casefold() for x in (text, fact.strip()))
    before, after = (
        "" if re.match(_UNSPACED, end) else edge
        for end, edge in ((fact[0], r"(?<!\w)"), (fact[-1], r"(?!\w)"))
    )
    return re.search(before + re.escape(fact) + after, text) is not None
