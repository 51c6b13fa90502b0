"""A conversation for others: Markdown with every take, its settings, figures and gates; JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from c2c_mlx import atomic
from c2c_mlx.events import GateReport, Mode
from c2c_mlx.tui import race, session_file
from c2c_mlx.tui.conversation import NAMES, Answer, Conversation, Take


def to_markdown(talk: Conversation) -> str:
    """The whole conversation, gates and figures included."""
    lines = [f"# {talk.title or talk.name}", "", f"- receiver: {talk.pair.receiver}"]
    for sharer, fuser in talk.pair.links:
        lines.append(f"- sharer: {sharer}, fuser: {fuser or 'of the pair'}")
    for number, turn in enumerate(talk.turns, 1):
        lines += ["", f"## {number}. {turn.question}"]
        for n, take in enumerate(turn.takes, 1):
            if len(turn.takes) > 1:
                lines += ["", f"### Take {n}: {turn.gates_in_words(take)}"]
            lines += _take(take, talk.pair.sharers)
    return "\n".join(lines) + "\n"


def write(talk: Conversation, folder: Path) -> list[Path]:
    """Writes a conversation for people and for programs, and says where.

    Raises:
        C2CError: if the disk won't have it.
    """
    texts = {"md": to_markdown(talk), "json": session_file.to_json(talk)}
    paths = {end: folder / f"{talk.name}.{end}" for end in texts}
    for end, text in texts.items():
        atomic.write_text(paths[end], text)
    return list(paths.values())


def _settings(take: Take) -> list[str]:
    s = take.sampling
    words = f"temperature {s.temp}, top-p {s.top_p}, seed {s.seed}, limit {s.max_tokens} tokens"
    system = [f"- system prompt: {take.system}"] if take.system else []
    return ["", f"- {words}", *system]


def _take(take: Take, sharers: Sequence[str]) -> list[str]:
    lines = _settings(take)
    for mode, answer in take.answers.items():
        lines += _answer(mode, answer)
        if mode == "c2c":
            for report in take.reports:
                lines += _gate_table(report, sharers)
    if both := take.rivals():
        c2c, relay = (answer.figures for answer in both)
        assert c2c and relay  # they are whole
        lines += ["", race.verdict(c2c, relay)]
    return lines


def _answer(mode: Mode, answer: Answer) -> list[str]:
    lines = ["", f"**{NAMES[mode]}**", ""]
    if answer.relayed_text:
        lines += [*(f"> {line}" for line in answer.relayed_text.splitlines()), ""]
    lines += [answer.text or "(no answer)"]
    ended = {"stopped": "*stopped*", "": "*not ended*" if answer.is_kept else "*not given*"}
    lines += ["", ended[answer.reason]] if answer.reason in ended else []
    return lines + (["", f"*{race.cost(answer.figures)}*"] if answer.figures else [])


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
