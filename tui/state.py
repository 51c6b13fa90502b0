"""What the app knows at any moment: read by what draws, changed by what is done and said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from c2c_mlx.events import Gates, Loaded, Mode
from c2c_mlx.tui.conversation import RIVALS, Conversation, Turn


@dataclass
class State:
    """The conversation that is open, and what it is held with.

    Attributes:
        conversation: what was asked and answered.
        modes: whose panes are shown, in the order in which they were asked for.
        loaded: the models, once they are there.
        gates: each fuser's, as they will be in the next answer.
        memory_gb: what MLX holds.
        is_busy: whether an answer is being given.
        is_blind: whether it is hidden whose answer is whose.
        is_training: whether a fuser is being trained, or about to be.
        is_weighing: whether C2C's words are tinted by what they owe to the sharer.
        attempt: at the last question.
    """

    conversation: Conversation
    modes: list[Mode]
    loaded: Loaded | None = None
    gates: tuple[Gates, ...] = ()
    memory_gb: float = 0.0
    is_busy: bool = False
    is_blind: bool = False
    is_training: bool = False
    is_weighing: bool = False
    attempt: int = 0

    @property
    def turn(self) -> Turn | None:
        """The latest turn."""
        return self.conversation.turns[-1] if self.conversation.turns else None

    def in_order(self, modes: Sequence[Mode]) -> list[Mode]:
        """Who is asked after whom: the rivals take turns in going first, and so in being cold.

        Those that the loaded models cannot do are left out.
        """
        order = [mode for mode in modes if self.can_answer(mode)]
        if (len(self.conversation.turns) + self.attempt) % 2 and set(RIVALS) <= set(order):
            first, second = (order.index(mode) for mode in RIVALS)
            order[first], order[second] = order[second], order[first]
        return order

    def can_answer(self, mode: Mode) -> bool:
        """Whether the models for it are there, as far as that is known."""
        if self.loaded is None or mode == "receiver":
            return True
        if mode == "c2c":
            return bool(self.loaded.links)
        return bool(self.loaded.sharers) and not self.loaded.is_elsewhere
