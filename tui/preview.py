"""The app without models: replays a recorded session, for a look, for pictures and for tests.

python -m c2c_mlx.tui.preview                 the app, answering as it was recorded
python -m c2c_mlx.tui.preview --svg DIR       pictures of it, exported by the app itself
python -m c2c_mlx.tui.preview --record FILE   a new recording, from the embedded pair
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from c2c_mlx import atomic, events, progress
from c2c_mlx.config import Pair, SamplingConfig, from_dict
from c2c_mlx.events import EngineEvent, Gates, Mode
from c2c_mlx.models import registry
from c2c_mlx.talk.engine import HISTORIES, InferenceThread
from c2c_mlx.tui.app import ChatApp
from c2c_mlx.tui.conversation import Conversation

RECORDING = Path(__file__).parent / "preview.json"
MODES: tuple[Mode, ...] = ("c2c", "relay", "receiver")
QUESTIONS = (
    "What is the capital of France?",
    "Translate to English: Il fait froid ce matin, mais je suis content.",
    "Give me a list of three fruits.",
)
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        *(progress.Progress, events.Loaded, events.Prefilling, events.RelayedText, events.Text),
        *(events.Finished, events.GateReport, events.LiveGates, events.TurnOver),
    )
}

Timed = tuple[float, EngineEvent]  # seconds since the question


@dataclass(frozen=True)
class Recording:
    """What an engine said: while it loaded, and to each question."""

    pair: Pair
    start: list[Timed]
    turns: dict[str, list[Timed]]

    def to_json(self) -> str:
        """One event a line."""
        lines = [{"pair": asdict(self.pair)}, *map(_line, self.start)]
        for question, answers in self.turns.items():
            lines += [{"question": question}, *map(_line, answers)]
        return "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"

    @classmethod
    def read(cls, path: Path) -> Recording:
        """Reads a recording back."""
        head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        start: list[Timed] = []
        turns: dict[str, list[Timed]] = {}
        current = start
        for line in lines:
            if "question" in line:
                current = turns[line["question"]] = []
            else:
                seconds, kind, fields = line["event"]
                current.append((seconds, from_dict(_KINDS[kind], fields, str(path))))
        return cls(from_dict(Pair, head["pair"], str(path)), start, turns)


def _line(timed: Timed) -> dict[str, Any]:
    seconds, event = timed
    return {"event": [round(seconds, 3), type(event).__name__, asdict(event)]}


class Replay:
    """An engine that says what another one said.

    Args:
        recording: what to say; a question that is not in it gets the answers of the next that is.
        speed: of the clock; infinite says everything at once.
    """

    def __init__(self, recording: Recording, speed: float = 1.0) -> None:
        self.recording, self.pair, self.speed = recording, recording.pair, speed
        self._due: list[Timed] = []
        self._asked = 0

    def start(self) -> None:
        """Loads, so to speak."""
        self._play(self.recording.start)

    def drain(self) -> list[EngineEvent]:
        """What is due by now."""
        now = time.monotonic()
        due = [event for when, event in self._due if when <= now]
        self._due = self._due[len(due) :]
        return due

    def ask(self, question: str, modes: Sequence[Mode], attempt: int = 0) -> None:
        """Plays the answers of the modes that are asked for, without gaps for the others."""
        known = list(self.recording.turns)
        if question not in known:
            question = known[self._asked % len(known)]
        self._asked += 1
        played, gap, before = [], 0.0, 0.0
        for seconds, event in self.recording.turns[question]:
            is_of_gates = isinstance(event, events.GateReport | events.LiveGates)
            mode = "c2c" if is_of_gates else getattr(event, "mode", None)
            if mode is None or mode in modes:
                played.append((seconds - gap, event))
            else:
                gap += seconds - before
            before = seconds
        self._play(played)

    def stop(self) -> None:
        """Leaves out what has not been said yet, but for the end."""
        self._due = []
        self._play([(0.0, events.TurnOver(0.0))])

    def set_gates(self, gates: Sequence[Gates]) -> None:
        """Nothing is computed here."""

    def train(self, seconds: float) -> None:
        """Nothing is computed here."""

    def stop_training(self) -> None:
        """Nothing is computed here."""

    def weigh(self) -> None:
        """Nothing is computed here."""

    def undo(self, modes: Sequence[Mode]) -> None:
        """Nothing is remembered here."""

    def restore(self, histories: HISTORIES, gates: Sequence[Gates]) -> None:
        """Nothing is remembered here."""

    def configure(self, sampling: SamplingConfig, system: str | None) -> None:
        """The answers stay what they are."""

    def reload(self, pair: Pair) -> None:
        """Loads, so to speak."""
        self._play(self.recording.start)

    def _play(self, timed: Sequence[Timed]) -> None:
        now = time.monotonic()
        self._due += [(now + seconds / self.speed, event) for seconds, event in timed]


def record(pair: Pair, questions: Sequence[str], sampling: SamplingConfig) -> Recording:
    """Asks a pair in every mode and notes what comes when."""
    engine = InferenceThread(pair, sampling)
    engine.start()
    try:
        start = _note(engine, events.Loaded)
        turns = {}
        for question in questions:
            engine.ask(question, MODES)
            turns[question] = _note(engine, events.TurnOver)
            print(f"recorded: {question}")
        return Recording(pair, start, turns)
    finally:
        engine.close()
        engine.join()


def _note(engine: InferenceThread, last: type[EngineEvent]) -> list[Timed]:
    began = time.monotonic()
    noted: list[Timed] = []
    while not noted or not isinstance(noted[-1][1], last):
        event = engine.events.get()
        if isinstance(event, events.Failed):
            raise SystemExit(event.message)
        noted.append((time.monotonic() - began, event))
    return noted


def app(speed: float = 1.0, modes: Sequence[Mode] = MODES[:2]) -> ChatApp:
    """The app on the recording that comes with it."""
    recording = Recording.read(RECORDING)
    return ChatApp(Replay(recording, speed), Conversation(recording.pair), modes)


async def take_pictures(folder: Path) -> None:
    """Writes one SVG for each way that the app can look."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = list(Recording.read(RECORDING).turns)
    for name, size, theme, keys in _PICTURES:
        chat = app(speed=float("inf"), modes=MODES if name == "three-panes" else MODES[:2])
        async with chat.run_test(size=size) as pilot:
            chat.theme = theme
            for question in questions[:2]:
                chat.main.prompt.show(question)
                await pilot.press("enter")
                await until(lambda chat=chat: not chat.state.is_busy)
            await pilot.press(*keys)
            await until(lambda chat=chat: not chat.state.is_busy)
            await pilot.pause()
            path = folder / f"{name}.svg"
            path.write_text(chat.export_screenshot(title="c2c-chat"), encoding="utf-8")
            print(path)


async def until(condition: Any, seconds: float = 60.0) -> None:
    """Waits for what the app's own tasks bring about."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the app did not get there")
        await asyncio.sleep(0.03)


# name, size, theme, keys after two turns
_PICTURES = (
    ("chat", (140, 44), "c2c-dark", ()),
    ("heat-map", (140, 44), "c2c-dark", ("ctrl+g", *["down"] * 3, "w", "m", *["right"] * 15)),
    ("light", (140, 44), "c2c-light", ("ctrl+g", "down", "v", "down", "v")),
    ("surgery", (160, 44), "c2c-dark", ("ctrl+g", "v", "down", "k", "ctrl+r")),
    ("three-panes", (200, 44), "c2c-dark", ()),
    ("narrow", (80, 24), "c2c-dark", ()),
    ("narrow-gates", (80, 24), "c2c-dark", ("ctrl+g",)),
    ("narrow-surgery", (80, 24), "c2c-dark", ("ctrl+g", "v", "ctrl+r")),
    ("more", (100, 30), "c2c-dark", ("ctrl+l",)),
    ("settings", (100, 30), "c2c-dark", ("f2",)),
    ("help", (160, 44), "c2c-dark", ("f1",)),
)


def main() -> None:
    """Looks at the arguments and does one of the three."""
    parser = argparse.ArgumentParser(
        prog="python -m c2c_mlx.tui.preview",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--svg", type=Path, metavar="DIR", help="write pictures")
    parser.add_argument("--record", type=Path, metavar="FILE", help="ask the embedded pair")
    args = parser.parse_args()
    if args.record:
        receiver, sharer = registry.default_pair()
        recording = record(Pair(receiver, (sharer,)), QUESTIONS, SamplingConfig(max_tokens=60))
        atomic.write_text(args.record, recording.to_json())
    elif args.svg:
        asyncio.run(take_pictures(args.svg))
    else:
        app().run()


if __name__ == "__main__":
    main()
