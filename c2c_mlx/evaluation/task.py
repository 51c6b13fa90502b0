"""What an evaluation is made of: modes, items, answers, and the tasks that score them. No MLX."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

Messages = list[dict[str, str]]

# Those of `c2c-chat`, and two controls: the sharer's cache of another item, and one of zeros.
MODES = ("receiver", "sharer", "relay", "c2c", "c2c-shuffled", "c2c-zeroed")
C2C_MODES = ("c2c", "c2c-shuffled", "c2c-zeroed")


@dataclass(frozen=True)
class Item:
    """One question, the same for every mode."""

    id: str  # unique in its task: a line number, or a benchmark's subset and row
    messages: Messages  # ends with the user's
    reference: str = ""  # the right answer; empty if the receiver's own answer is the reference
    choices: int = 0  # in multiple choice, how many there are
    group: str = ""  # scores are reported per group, too


@dataclass(frozen=True)
class Probe:
    """A continuation whose probability is asked for, and tokens that compete to follow it."""

    ids: list[int]
    options: list[int]


@dataclass(frozen=True)
class Answer:
    """What a mode made of an item; an item that failed has an empty one.

    Attributes:
        text: what was written.
        ids: its tokens, the end of the turn included.
        nll: of the probe's ids, in nats per token of the receiver, whoever answers.
        options: log-probability of each of the probe's options.
    """

    text: str = ""
    ids: Sequence[int] = ()
    nll: float | None = None
    options: Sequence[float] = ()


class Task(ABC):
    """A family of items: what is asked of a mode, and how that is scored."""

    kind: ClassVar[str]
    scores: tuple[str, ...]  # the one that counts first
    modes: ClassVar[tuple[str, ...]] = MODES  # those that make sense, in their order
    writes = True  # whether modes have to write an answer
    max_tokens = 64  # of an answer, unless the user says otherwise

    def probe(self, item: Item, tokenizer: Any, own: Answer | None) -> Probe | None:
        """What to ask of the answering model's probabilities; None: nothing.

        Args:
            item: the item.
            tokenizer: the answering model's.
            own: the receiver's own answer, which may be the one at hand; None if it failed.
        """
        return None

    @abstractmethod
    def score(self, item: Item, answer: Answer, own: Answer | None) -> dict[str, float]:
        """The item's scores; those that an empty answer can't have are left out."""

    def corpus(self, items: Sequence[Item], texts: Sequence[str]) -> dict[str, float]:
        """Scores that are more than a mean over items."""
        return {}
