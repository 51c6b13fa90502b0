"""A conversation as the app keeps it: turns, their takes, and an answer per mode in each."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from c2c_mlx import events
from c2c_mlx.config import Pair, SamplingConfig
from c2c_mlx.events import EngineEvent, Figures, GateReport, Gates, Mode

NAMES: dict[Mode, str] = {
    "c2c": "C2C",
    "relay": "text relay",
    "receiver": "receiver alone",
    "sharer": "sharer alone",
}
RIVALS: tuple[Mode, Mode] = ("c2c", "relay")
LONGEST_TITLE = 60


@dataclass
class Answer:
    """What one mode said; `reason` is empty until it has ended, and if it never did."""

    text: str = ""
    relayed_text: str = ""
    reason: str = ""
    figures: Figures | None = None

    @property
    def is_kept(self) -> bool:
        """Whether the model remembers it: nothing said is nothing remembered."""
        return bool(self.text.strip())

    @property
    def is_whole(self) -> bool:
        """Whether it can be compared with others: said, and not cut short by the user."""
        return self.is_kept and self.reason in ("stop", "length") and self.figures is not None


@dataclass
class Take:
    """Answers to a question that were made with the same settings and the same gates."""

    sampling: SamplingConfig  # with the seed of this take
    system: str | None = None
    gates: tuple[Gates, ...] = ()  # each fuser's; empty while no model is loaded
    answers: dict[Mode, Answer] = field(default_factory=dict)  # one for each mode that was asked
    reports: tuple[GateReport, ...] = ()

    def rivals(self) -> tuple[Answer, Answer] | None:
        """C2C's answer and the relay's, if both came to their end and can be compared."""
        c2c, relay = (self.answers.get(mode, Answer()) for mode in RIVALS)
        return (c2c, relay) if c2c.is_whole and relay.is_whole else None


@dataclass
class Turn:
    """A question and everything that was answered to it, the latest take last."""

    question: str
    takes: list[Take]

    @property
    def latest(self) -> Take:
        """The take that is being made, or was made last."""
        return self.takes[-1]

    @property
    def answers(self) -> dict[Mode, Answer]:
        """The latest answer of each mode that was asked: what the models remember."""
        return {mode: answer for take in self.takes for mode, answer in take.answers.items()}

    @property
    def reports(self) -> tuple[GateReport, ...]:
        """What was fused for C2C's latest answer."""
        asked = [take for take in self.takes if "c2c" in take.answers]
        return asked[-1].reports if asked else ()

    def comparison(self, mode: Mode) -> tuple[Take, Take] | None:
        """C2C's take before the latest and the latest, if other gates were open in them."""
        asked = [take for take in self.takes if mode in take.answers]
        if mode != "c2c" or len(asked) < 2 or asked[-1].gates == asked[-2].gates:
            return None
        return asked[-2], asked[-1]

    def gates_in_words(self, take: Take) -> str:
        """'28 of 30 gates open: not K15, V20', as far as the layers are known."""
        flat = [is_open for keys, values in take.gates for is_open in (*keys, *values)]
        if not flat:
            return "gates not known"
        text = f"{sum(flat)} of {len(flat)} gates open"
        layers = next((r.layers for t in self.takes for r in t.reports), ())
        if len(take.gates) > 1 or len(layers) * 2 != len(flat):
            return text
        shut = [
            f"{kind}{layers[at][0]}"
            for kind, gates in zip("KV", take.gates[0], strict=True)
            for at, is_open in enumerate(gates)
            if not is_open
        ]
        return f"{text}: not {', '.join(shut)}" if 0 < len(shut) <= 4 else text


@dataclass
class Conversation:
    """All turns, and with whom and how."""

    pair: Pair
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    name: str = ""  # of its file
    title: str = ""

    def begin(
        self, question: str, modes: Sequence[Mode], gates: tuple[Gates, ...], attempt: int = 0
    ) -> Turn:
        """Begins a turn; the first one names the conversation."""
        if not self.name:
            self.name = f"{datetime.now():%Y-%m-%d-%H%M%S}-{_slug(question)}".rstrip("-")
            self.title = shortened(question)
        self.turns.append(Turn(question, [self.take(modes, gates, attempt)]))
        return self.turns[-1]

    def take(self, modes: Iterable[Mode], gates: tuple[Gates, ...], attempt: int) -> Take:
        """With the settings of now; nothing has been answered in it yet.

        Args:
            modes: those that are asked.
            gates: each fuser's.
            attempt: added to the seed, as `InferenceThread.ask` does.
        """
        sampling = replace(self.sampling, seed=(self.sampling.seed + attempt) % 2**64)
        return Take(sampling, self.system, gates, {mode: Answer() for mode in modes})

    def record(self, event: EngineEvent) -> None:
        """Takes over what an event says of the latest take."""
        if not self.turns:
            return
        take = self.turns[-1].latest
        match event:
            case events.Text():
                take.answers.setdefault(event.mode, Answer()).text += event.text
            case events.RelayedText():
                take.answers.setdefault(event.mode, Answer()).relayed_text += event.text
            case events.Finished():
                take.answers[event.mode] = Answer(
                    event.text, event.relayed_text, event.reason, event.figures
                )
            case GateReport():
                take.reports = (*take.reports, event)

    def history(self, mode: Mode) -> list[tuple[str, str, str]]:
        """Question, relayed text and answer of each turn that the mode remembers."""
        answered = [(t.question, t.answers.get(mode, Answer())) for t in self.turns]
        return [(q, a.relayed_text.strip(), a.text.strip()) for q, a in answered if a.is_kept]


def shortened(text: str) -> str:
    """Its first line, cut for a list."""
    line = " ".join(text.strip().splitlines()[:1])
    return line if len(line) <= LONGEST_TITLE else f"{line[: LONGEST_TITLE - 1].rstrip()}…"


def _slug(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return "-".join(re.findall(r"\w+", plain)[:5])[:40]
