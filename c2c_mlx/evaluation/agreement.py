"""Prompts without an answer: how far a mode leaves what the receiver says by itself alone."""

from __future__ import annotations

from typing import Any

from c2c_mlx.evaluation.task import MODES, Answer, Item, Task

KEPT_TOKENS = 16  # as many must be the receiver's own


class Agreement(Task):
    """Whether an answer begins as the receiver's own, and the NLL of that own answer."""

    kind = "agreement"
    scores = ("kept", "nll")
    modes = tuple(m for m in MODES if m != "sharer")  # another model's words are no measure

    def continuations(self, item: Item, tokenizer: Any, own: Answer | None) -> list[list[int]]:
        """The receiver's own answer, as far as it was written."""
        return [list(own.ids)] if own and own.ids else []

    def score(self, item: Item, answer: Answer, own: Answer | None) -> dict[str, float]:
        """Kept is 1 or 0."""
        wanted = list(own.ids[:KEPT_TOKENS]) if own else []
        kept = bool(wanted) and list(answer.ids[:KEPT_TOKENS]) == wanted
        return {"kept": float(kept)} | answer.nll
