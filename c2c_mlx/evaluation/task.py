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
    choices: tuple[str, ...] = ()  # of multiple choice; of a fact, every text that is right
    group: str = ""  # scores are reported per group, too
    cut: bool = False  # the reference was cut at a limit: that it ends there says nothing


@dataclass(frozen=True)
class Answer:
    """What a mode made of an item; an item that failed has an empty one.

    Attributes:
        text: what was written.
        ids: its tokens, the end of the turn included.
        nats: -log p of each continuation that the task asked for.
        tokens: of the first continuation, as the receiver spells it.
    """

    text: str = ""
    ids: Sequence[int] = ()
    nats: Sequence[float] = ()
    tokens: int = 0

    @property
    def nll(self) -> dict[str, float]:
        """The score of that name: nats per token *of the receiver*, whoever answers."""
        return {"nll": self.nats[0] / self.tokens} if self.nats else {}


class Task(ABC):
    """A family of items: what is asked of a mode, and how that is scored."""

    kind: ClassVar[str]
    scores: tuple[str, ...]  # the one that counts first
    modes: ClassVar[tuple[str, ...]] = MODES  # those that make sense, in their order
    writes = True  # whether modes have to write an answer
    max_tokens = 64  # of an answer, unless the user says otherwise

    def asked(self, item: Item) -> Item:
        """The item with the user's message as the models read it."""
        return item

    def continuations(self, item: Item, tokenizer: Any, own: Answer | None) -> list[list[int]]:
        """Answers whose probability is asked for, as token ids of the answering model.

        Args:
            item: the item.
            tokenizer: the answering model's.
            own: the receiver's own answer, which may be the one at hand; None if it failed.
        """
        return []

    @abstractmethod
    def score(self, item: Item, answer: Answer, own: Answer | None) -> dict[str, float]:
        """The item's scores; those that an empty answer can't have are left out."""

    def corpus(self, items: Sequence[Item], texts: Sequence[str]) -> dict[str, float]:
        """Scores that are more than a mean over items."""
        return {}
