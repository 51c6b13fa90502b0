"""The embedded pair's own checks, where it is in the cache."""

from __future__ import annotations

from functools import cached_property

import c2c_mlx.blas  # noqa: F401

from c2c_mlx.config import SamplingConfig
from c2c_mlx.doctor.check import Found, Proof
from c2c_mlx.doctor.conversation import equals_receiver, grown_by_turns
from c2c_mlx.events import Finished, Mode
from c2c_mlx.fusers import disk, store
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.models import registry
from c2c_mlx.models.embedded.install import is_installed
from c2c_mlx.models.load import LanguageModel, load_model
from c2c_mlx.talk.session import ChatSession
from c2c_mlx.text.alignment import TokenAlignment, align_chat

_QUESTION, _WORD = "What is the capital of France?", "Paris"
_ROOM = 10  # 0.7 tolerances were found in float32 on a CPU, 21 spacings in half precision
_TURNS = (
    "Translate to English: Il pleut depuis ce matin, et personne n'a de parapluie.",
    "It has been raining since this morning, and nobody has an umbrella.",
    "Translate to English: Je voudrais un café et deux croissants, s'il vous plaît.",
    "I would like a coffee and two croissants, please.",
    "Translate to English: Demain nous irons ensemble au marché.",
)


class EmbeddedPair:
    """Both models and their fuser, loaded when a check first needs them."""

    @staticmethod
    def is_here() -> bool:
        """Whether both models are in the cache folder."""
        return all(map(is_installed, registry.default_pair()))

    @cached_property
    def models(self) -> tuple[LanguageModel, LanguageModel]:
        """Receiver and sharer."""
        receiver, sharer = map(load_model, registry.default_pair())
        return receiver, sharer

    @cached_property
    def link(self) -> C2C:
        """The two and the fuser that is shipped for them."""
        receiver, sharer = self.models
        folder = store.find_for_pair(*registry.default_pair(), None)
        return C2C(receiver.model, sharer.model, disk.load(folder))

    def proofs(self) -> list[Proof]:
        """Its conversation, its answers, and last, for it shuts gates, a shut fuser."""
        return [
            Proof("answers, embedded pair", self._answers),
            Proof("conversation, embedded pair", self._grown),
            Proof("shut gates, embedded pair", self._shut),
        ]

    def timed(self) -> tuple[C2C, TokenAlignment]:
        """What `speed.measure` wants."""
        return self.link, self.prompt(2)

    def prompt(self, turn: int) -> TokenAlignment:
        """The conversation up to the question of a turn."""
        roles = ("user", "assistant")
        messages = [
            {"role": roles[i % 2], "content": text} for i, text in enumerate(_TURNS[: 2 * turn + 1])
        ]
        tokenizers = (model.tokenizer for model in self.models)
        return align_chat(messages, *tokenizers, strategy=self.link.fuser.config.alignment)

    def _answers(self) -> Found:
        modes: tuple[Mode, ...] = ("receiver", "c2c")
        session = ChatSession(*self.models, self.link.fuser, sampling=SamplingConfig(max_tokens=12))
        texts = [
            event.text
            for mode in modes
            for event in session.ask(_QUESTION, mode)
            if isinstance(event, Finished)
        ]
        wrong = [text for text in texts if _WORD not in text]
        note = f"{_QUESTION} {wrong[0] if wrong else texts[-1]}"
        return Found(float(len(wrong)), 0.0, note)

    def _grown(self) -> Found:
        turns = [self.prompt(turn) for turn in range(3)]
        return grown_by_turns(self.link, turns, room=_ROOM)

    def _shut(self) -> Found:
        fuser = self.link.fuser
        gate_logit = fuser.gate_logit
        fuser.gate_logit = -abs(gate_logit) - 1
        try:
            return equals_receiver(self.link, self.prompt(1))
        finally:
            fuser.gate_logit = gate_logit
