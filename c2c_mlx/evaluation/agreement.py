"""Prompts without an answer: how far a mode leaves what the receiver says by itself alone."""

from __future__ import annotations

from typing import Any

from c2c_mlx.evaluation.task import MODES, Answer, Item, Probe, Task

KEPT_TOKENS = 16  # as many must be the receiver's own


class Agreement(Task):
    """Whether an answer begins as the receiver's own, and the NLL of that own answer."""

    kind = "agreement"
    scores = ("kept", "nll")
    modes = tuple(m for m in MODES if m != "sharer")  # another model's words are no measure

    def probe(self, item: Item, tokenizer: Any, own: Answer | None) -> Probe | None:
        """The receiver's own answer, as far as it was written."""
        return Probe(list(own.ids), []) if own and own.ids else None

    def score(self, item: Item, answer: Answer, own: Answer | None) -> dict[str, float]:
        """Kept is 1 or 0."""
        wanted = list(own.ids[:KEPT_TOKENS]) if own else []
        scores = {"kept": float(bool(wanted) and list(answer.ids[:KEPT_TOKENS]) == wanted)}
        return scores if answer.nll is None else scores | {"nll": answer.nll}
