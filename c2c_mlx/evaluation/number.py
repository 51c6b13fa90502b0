"""Problems whose answer is a number."""

from __future__ import annotations

import re

from c2c_mlx.evaluation.task import Answer, Item, Task

# The published prompt, so that numbers can be compared.
PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $ANSWER (without quotes) where $ANSWER is the answer to the problem.\n\n"
    "{question}\n\n"
    "Please think step by step and explain your reasoning. Remember to put your answer on its own "
    'line after "Answer:", and you do not need to use a \\boxed command.'
)

_CUE = re.compile(r"(?i:answer(?: is)?)\s*:?|####|\\boxed\{")
_MARKUP = re.compile(r"\\[()\[\]$]|[*_`]")
_NUMBER = re.compile(r"[\s$€£]*(-?[\s$]*[\d,]*\.?\d+)")


class Number(Task):
    """Accuracy, and how many answers name no number."""

    kind = "number"
    scores = ("accuracy", "invalid")
    max_tokens = 512

    def score(self, item: Item, answer: Answer, own: Answer | None) -> dict[str, float]:
        """1 or 0."""
        named = extract(answer.text)
        right = named is not None and named == extract(f"#### {item.reference}")
        return {"accuracy": float(right), "invalid": float(named is None)}


def extract(text: str) -> float | None:
    """The number behind the last "Answer:", "answer is", "####" or TeX box; None without one."""
    found, text = None, _MARKUP.sub("", text)
    for cue in _CUE.finditer(text):
        if number := _NUMBER.match(text, cue.end()):
            found = float(re.sub(r"[\s$,]", "", number[1]))
    return found
