"""A conversation as the app keeps it: turns with an answer per mode, saved, reopened, exported."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from c2c_mlx.config import Pair, SamplingConfig, from_dict
from c2c_mlx.errors import C2CError
from c2c_mlx.events import MODES, Figures, Finished, GateReport, Gates, Mode
from c2c_mlx.models import paths
from c2c_mlx.tui import race, storage

FORMAT_VERSION = 2
NAMES: dict[Mode, str] = {
    "c2c": "C2C",
    "relay": "text relay",
    "receiver": "receiver alone",
    "sharer": "sharer alone",
}


@dataclass
class Answer:
    """What one mode said; `reason` is empty while it is being said."""

    text: str = ""
    relayed_text: str = ""
    reason: str = ""
    figures: Figures | None = None

    @property
    def is_kept(self) -> bool:
        """Whether the model remembers it: nothing said is nothing remembered."""
        return bool(self.text.strip())


@dataclass
class Turn:
    """A question and who answered it how."""

    question: str
    answers: dict[Mode, Answer] = field(default_factory=dict)
    gates: tuple[Gates, ...] = ()  # each fuser's, when it was asked
    reports: tuple[GateReport, ...] = ()

    def finish(self, event: Finished) -> None:
        """Takes the final text and figures of an answer over."""
        self.answers[event.mode] = Answer(
            event.text, event.relayed_text, event.reason, event.figures
        )


@dataclass
class Conversation:
    """All turns, and with whom and how."""

    pair: Pair
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    name: str = ""

    def add(self, question: str, gates: tuple[Gates, ...]) -> Turn:
        """Begins a turn; the first one names the conversation."""
        if not self.name:
            self.name = f"{datetime.now():%Y-%m-%d-%H%M%S}-{_slug(question)}".rstrip("-")
        self.turns.append(Turn(question, gates=gates))
        return self.turns[-1]

    def history(self, mode: Mode) -> list[tuple[str, str, str]]:
        """Question, relayed text and answer of each turn that the mode remembers."""
        answered = [(t.question, t.answers[mode]) for t in self.turns if mode in t.answers]
        return [(q, a.relayed_text.strip(), a.text.strip()) for q, a in answered if a.is_kept]

    def to_json(self) -> str:
        """The whole as a document: what a session file and an export are."""
        document = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "pair": asdict(self.pair),
            "sampling": asdict(self.sampling),
            "system": self.system,
            "turns": [asdict(turn) for turn in self.turns],
        }
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n"

    def to_markdown(self) -> str:
        """The whole for people, gates and figures included."""
        lines = [f"# {self.name}", "", f"- receiver: {self.pair.receiver}"]
        for sharer, fuser in self.pair.links:
            lines.append(f"- sharer: {sharer}, fuser: {fuser or 'of the pair'}")
        s = self.sampling
        lines += [f"- temperature {s.temp:g}, top-p {s.top_p:g}, seed {s.seed}"]
        lines += [f"- system prompt: {self.system}"] if self.system else []
        for number, turn in enumerate(self.turns, 1):
            lines += ["", f"## {number}. {turn.question}"]
            for mode, answer in turn.answers.items():
                lines += ["", f"### {NAMES[mode]}", ""]
                if answer.relayed_text:
                    lines += [*_quoted(answer.relayed_text), ""]
                lines += [answer.text or "(no answer)"]
                lines += ["", f"*stopped*: {answer.reason}"] if answer.reason == "stopped" else []
                lines += ["", f"*{race.cost(answer.figures)}*"] if answer.figures else []
                if mode == "c2c":
                    for report in turn.reports:
                        lines += _gate_table(report, self.pair.sharers)
            c2c, relay = (turn.answers.get(m, Answer()).figures for m in ("c2c", "relay"))
            lines += ["", race.verdict(c2c, relay)] if c2c and relay else []
        return "\n".join(lines) + "\n"


def _gate_table(report: GateReport, sharers: Sequence[str]) -> list[str]:
    head = "| layer | sharer's | K gate | K weight | K change | V gate | V weight | V change |"
    whose = [f"Fed by {sharers[report.sharer]}:", ""] if len(sharers) > 1 else []
    rows = ["", *whose, head, "| --- " * 8 + "|"]
    for at, (receiver, sharer) in enumerate(report.layers):
        cells = [str(receiver), str(sharer)]
        for kind in (0, 1):
            cells.append("open" if report.gates[kind][at] else "closed")
            cells.append(f"{report.weights[kind][at]:.3f}")
            cells.append(f"{report.changes[kind][at]:.3f}")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _quoted(text: str) -> list[str]:
    return [f"> {line}" for line in text.splitlines()]


def _slug(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return "-".join(re.findall(r"\w+", plain)[:5])[:40]


# --- session files --------------------------------------------------------------------------


def folder() -> Path:
    """Where sessions are saved."""
    return paths.data_home() / "sessions"


def save(conversation: Conversation) -> None:
    """Writes the session file.

    Raises:
        C2CError: if the disk won't have it.
    """
    storage.write(folder() / f"{conversation.name}.json", conversation.to_json())


def names() -> list[str]:
    """All saved sessions, the latest first."""
    files = folder().glob("*.json")
    return [p.stem for p in sorted(files, key=lambda p: p.stat().st_mtime, reverse=True)]


def load(name: str = "") -> Conversation:
    """Reads a session; without a name, the latest.

    Raises:
        C2CError: if there is none, or it is damaged.
    """
    saved = names()
    if not saved:
        raise C2CError("no session has been saved yet: c2c-chat begins one")
    name = (name or saved[0]).removesuffix(".json")
    if name not in saved:
        raise C2CError(f"no session '{name}': {', '.join(saved[:5])} are the latest")
    path = folder() / f"{name}.json"
    conversation = parse(storage.read_json(path), str(path))
    conversation.name = name  # not the document's word: it becomes a path again
    return conversation


def parse(document: Any, where: str) -> Conversation:
    """A session's document, checked.

    Raises:
        C2CError: naming what is wrong with it.
    """
    try:
        if document["format_version"] != FORMAT_VERSION:
            raise C2CError(f"{where}: made by another version of c2c-mlx; upgrade c2c-mlx")
        return Conversation(
            pair=from_dict(Pair, document["pair"], where),
            sampling=from_dict(SamplingConfig, document["sampling"], where),
            system=None if document["system"] is None else str(document["system"]),
            turns=[_turn(t, where) for t in document["turns"]],
            name=str(document["name"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise C2CError(f"{where} is no session file ({type(e).__name__}: {e})") from None


def _turn(data: dict[str, Any], where: str) -> Turn:
    answers = {mode: _answer(data["answers"][mode], where) for mode in _modes(data["answers"])}
    gates = tuple(
        (tuple(map(bool, keys)), tuple(map(bool, values))) for keys, values in data["gates"]
    )
    return Turn(
        question=str(data["question"]),
        answers=answers,
        gates=gates,
        reports=tuple(from_dict(GateReport, report, where) for report in data["reports"]),
    )


def _modes(answers: dict[str, Any]) -> Sequence[Mode]:
    return [mode for mode in MODES if mode in answers]


def _answer(data: dict[str, Any], where: str) -> Answer:
    figures = data["figures"]
    return Answer(
        text=str(data["text"]),
        relayed_text=str(data["relayed_text"]),
        reason=str(data["reason"]),
        figures=None if figures is None else from_dict(Figures, figures, where),
    )
