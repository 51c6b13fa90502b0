"""Chats with a reference answer: how likely it is, and how close the written answer comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation.task import Answer, Item, Task
from c2c_mlx.text.tokens import response_ids, text_ids


class Reference(Task):
    """NLL of the reference, and chrF and BLEU (sacrebleu) of the greedy answer.

    Raises:
        C2CError: if sacrebleu is not installed.
    """

    kind = "chat"
    scores = ("chrf", "bleu", "nll")

    def __init__(self) -> None:
        try:
            from sacrebleu.metrics.bleu import BLEU
            from sacrebleu.metrics.chrf import CHRF
        except ImportError:
            raise C2CError("chrF and BLEU need sacrebleu: pip install 'c2c-mlx[eval]'") from None
        self._chrf, self._bleu = CHRF(), BLEU()
        self._sentence_bleu = BLEU(effective_order=True)  # short sentences have no 4-grams

    def continuations(self, item: Item, tokenizer: Any, own: Answer | None) -> list[list[int]]:
        """The reference, to the end of the turn unless it was cut before that."""
        said = {"role": "assistant", "content": item.reference}
        ids = text_ids if item.cut else response_ids
        return [ids([*item.messages, said], tokenizer)]

    def score(self, item: Item, answer: Answer, own: Answer | None) -> dict[str, float]:
        """Scores of a sentence, 0 to 100, and the NLL."""
        return answer.nll | {
            "chrf": self._chrf.sentence_score(answer.text, [item.reference]).score,
            "bleu": self._sentence_bleu.sentence_score(answer.text, [item.reference]).score,
        }

    def corpus(self, items: Sequence[Item], texts: Sequence[str]) -> dict[str, float]:
        """Corpus chrF and BLEU, as they are usually reported."""
        references = [[item.reference for item in items]]
        return {
            "chrf": self._chrf.corpus_score(list(texts), references).score,
            "bleu": self._bleu.corpus_score(list(texts), references).score,
        }
