"""Multiple choice: by what is written, by which letter is likeliest, or by which choice's text."""

from __future__ import annotations

import os.path
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from c2c_mlx.evaluation.task import Answer, Item, Task
from c2c_mlx.text.tokens import response_ids, text_ids

Method: TypeAlias = Literal["generate", "logits", "text"]


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LEAD = "The correct answer is"

# The published prompt, so that numbers can be compared (c2c, section 7).
PROMPT = """\
Accurately answer the following question:

{question}

Choices:
{choices}

Instructions:
- Carefully read the question and all options.
- Select the single most correct answer.
- Respond ONLY in the following format: "The correct answer is {letters}".
- Do not include any explanations, additional text, or punctuation besides the answer.

The correct answer is"""


def prompt(question: str, choices: Sequence[str]) -> str:
    """The user's message."""
    lines = "".join(f"{x}. {choice}\n" for x, choice in zip(LETTERS, choices, strict=False))
    return PROMPT.format(
        question=question, choices=lines, letters="/".join(LETTERS[: len(choices)])
    )


class Choice(Task):
    """Accuracy, and for written answers how many of them name no choice.

    Args:
        method: *generate*, the letter that an answer names; *logits*, the letter that is likeliest
            behind "The correct answer is"; *text*, the choice whose text is likeliest behind the
            question alone, without letters: -log p of its tokens, as the answering model spells
            them and without the end of the turn, over its bytes in UTF-8, which no tokenizer
            changes.
    """

    kind = "choice"
    scores: tuple[str, ...] = ("accuracy", "invalid")

    def __init__(self, method: Method) -> None:
        self.method = method
        self.writes = method == "generate"
        if not self.writes:
            self.scores = ("accuracy",)  # something is always likeliest

    def asked(self, item: Item) -> Item:
        """The published prompt around the question, unless its choices are not to be seen."""
        if self.method == "text":
            return item
        *before, last = item.messages
        content = prompt(last["content"], item.choices)
        return replace(item, messages=[*before, {**last, "content": content}])

    def continuations(self, item: Item, tokenizer: Any, own: Answer | None) -> list[list[int]]:
        """The beginning of an answer with each letter in turn, or each choice's text."""
        if self.method == "generate":
            return []
        letters = LETTERS[: len(item.choices)]
        texts = item.choices if self.method == "text" else [f"{LEAD} {x}" for x in letters]
        said = [{"role": "assistant", "content": text} for text in texts]
        if self.method == "text":
            return [text_ids([*item.messages, s], tokenizer) for s in said]
        spelled = [response_ids([*item.messages, s], tokenizer) for s in said]
        # What ends any answer, the end of the turn, says nothing about the letter.
        end = len(os.path.commonprefix([ids[::-1] for ids in spelled]))
        return [ids[: len(ids) - end] for ids in spelled]

    def score(self, item: Item, answer: Answer, own: Answer | None) -> dict[str, float]:
        """1 or 0; a failed item is wrong, and so is an answer that names no choice."""
        if not self.writes:
            lengths = [len(c.encode()) if self.method == "text" else 1 for c in item.choices]
            costs = [n / max(m, 1) for n, m in zip(answer.nats, lengths, strict=False)]
            best = min(range(len(costs)), key=costs.__getitem__, default=-1)
            return {"accuracy": float(best == LETTERS.index(item.reference))}
        named = extract(answer.text, len(item.choices))
        return {"accuracy": float(named == item.reference), "invalid": float(named is None)}


# A letter that stands for itself: no part of a word, of "A/B/C/D", "A or B", "B-52", "C++", "A.I.".
# An A or I that a word follows is an article or a pronoun, unless that word goes on about it.
_ENDS = r"(?![\w'’/&+#-])(?!\.\w(?!\w))(?!,? ?(?:or|and|/|,) ?\(?[A-Z]\b)"
_NO_WORD = r"(?!(?<=[AI]) +(?!because|since|as|is\b)\w)"
_UPPER = rf"([A-Z]){_ENDS}{_NO_WORD}"
_LOWER = r"([a-z])(?=\)|[.!]?\s*$)"
_LETTER = rf"\(?(?:{_UPPER}|{_LOWER})"
_CUES = tuple(
    re.compile(cue + _LETTER)
    for cue in (
        r"(?:\b(?i:answer\b)(?i: is| would be)?|答案(?:是|为)?)\s*[:：]?\s*(?i:option |choice )?",
        r"^\s*(?=\(?\w\s*[).:]|\(?\w\W*$)",
        r"\b(?i:option|choice|it is|it's|go with|choose)\s*[:：]?\s*",
    )
)
_MARKUP = re.compile(r"\\boxed\{\s*(\w)\s*\}|[*_`$\"“”]")


def extract(text: str, choices: int) -> str | None:
    """The letter that an answer names; None if it names none, or more than one.

    Strict: a letter counts where an answer names it ("The correct answer is B", "(B) Rome", "B"),
    never as the beginning of a word.
    """
    text = _MARKUP.sub(r"\1", text)
    for cue in _CUES:
        named = {(m[1] or m[2]).upper() for m in cue.finditer(text)}
        if named:
            (letter, *others) = sorted(named)
            return letter if not others and letter in LETTERS[:choices] else None
    return None
