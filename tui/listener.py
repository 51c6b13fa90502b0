"""The half of the app that listens: what the models say, put on the screen and kept."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from textual.app import App

from c2c_mlx import events
from c2c_mlx.errors import C2CError
from c2c_mlx.events import EngineEvent, Gates, Loaded, Mode
from c2c_mlx.progress import Progress
from c2c_mlx.tui import conversation, history, race, themes, votes
from c2c_mlx.tui.backend import Backend
from c2c_mlx.tui.conversation import NAMES, Answer, Conversation, Turn
from c2c_mlx.tui.screens.ballot import Ballot
from c2c_mlx.tui.screens.main import MainScreen

Kept = TypeVar("Kept")
UPDATES_PER_SECOND = 30
RIVALS: tuple[Mode, Mode] = ("c2c", "relay")


class Listener(App[None]):
    """Shows what the models say, as they say it, and keeps it.

    Args:
        backend: answers; started after the first paint.
        conversation: empty, or one that is taken up again.
        modes: who answers, one after the other.
        is_kept: whether the conversation, its questions, votes and the theme outlive the app.
    """

    def __init__(
        self,
        backend: Backend,
        conversation: Conversation,
        modes: Sequence[Mode],
        is_kept: bool = True,
    ) -> None:
        super().__init__()
        self.backend, self.conversation, self.is_kept = backend, conversation, is_kept
        self.modes = list(modes)
        self.main = MainScreen(modes)
        self.loaded: Loaded | None = None
        self.gates: tuple[Gates, ...] = ()  # each fuser's
        self.memory_gb = 0.0
        self.is_busy = self.is_blind = False
        for theme in (themes.DARK, themes.LIGHT):
            self.register_theme(theme)
        chosen = themes.chosen() if is_kept else themes.DARK.name
        self.theme = chosen if chosen in self.available_themes else themes.DARK.name

    def get_default_screen(self) -> MainScreen:
        """The conversation."""
        return self.main

    async def on_ready(self) -> None:
        """The first frame has been painted: shows what there is, then lets the models load."""
        sys.setswitchinterval(0.001)  # a key must not wait 5 ms for each turn of the interpreter
        self.main.show_pair(self.conversation.pair)
        self.main.prompt.focus()
        if self.is_kept:
            self.main.prompt.remember(*history.load())
            self.theme_changed_signal.subscribe(
                self, lambda theme: self.keep(themes.choose, theme.name)
            )
        if self.conversation.turns:
            await self.main.show_conversation(self.conversation)
        self.backend.start()
        self.run_worker(self._follow())

    @property
    def turn(self) -> Turn | None:
        """The latest turn."""
        return self.conversation.turns[-1] if self.conversation.turns else None

    def complain(self, message: str) -> None:
        """An error as a notice: what is wrong and what to do."""
        self.notify(message, severity="error", timeout=12, markup=False)

    def keep(self, write: Callable[[Kept], None], what: Kept) -> None:
        """Writes something for the next start, if anything is to be; a full disk is a notice."""
        if self.is_kept:
            try:
                write(what)
            except C2CError as e:
                self.complain(str(e))

    # --- what the models say ----------------------------------------------------------------

    async def _follow(self) -> None:
        """Shows it as it comes; a task of its own, so that keys never wait for a drawing."""
        while True:
            pieces: dict[tuple[Mode, bool], str] = {}
            for event in self.backend.drain():
                if isinstance(event, events.Text | events.RelayedText):
                    key = (event.mode, isinstance(event, events.RelayedText))
                    pieces[key] = pieces.get(key, "") + event.text
                    continue
                await self._write(pieces)
                pieces = {}
                await self._take(event)
            await self._write(pieces)
            await asyncio.sleep(1 / UPDATES_PER_SECOND)

    async def _write(self, pieces: Mapping[tuple[Mode, bool], str]) -> None:
        """Adds what came since the last update, in one go per text."""
        for (mode, is_relayed), text in pieces.items():
            if self.turn is None:
                continue
            answer = self.turn.answers.setdefault(mode, Answer())
            if is_relayed:
                answer.relayed_text += text
            else:
                answer.text += text
            self.main.run_in(mode, "the sharer writes" if is_relayed else "writing")
            if not self.is_blind:
                await self.main.write(mode, text, is_relayed)

    async def _take(self, event: EngineEvent) -> None:
        match event:
            case Progress():
                self.main.show_progress(event)
            case events.Loaded():
                self._show_loaded(event)
            case events.Prefilling():
                far = f" {event.done} of {event.total} tokens" if event.total else ""
                self.main.run_in(event.mode, f"reading{far}")
            case events.Finished() if self.turn:
                self._finish(event, self.turn)
            case events.GateReport() if self.turn:
                self.turn.reports = (*self.turn.reports, event)
            case events.LiveGates():
                self.main.gate_panel.view.show_live(event.report)
            case events.GatesSet():
                self._show_gates(event.gates)
            case events.Failed():
                self.complain(event.message)
                self.main.fail(event)
            case events.TurnOver():
                self.memory_gb = event.memory_gb or self.memory_gb
                await self._end_turn()

    def _show_loaded(self, loaded: Loaded) -> None:
        self.loaded, self.memory_gb = loaded, loaded.memory_gb
        self.main.end_progress()
        self.main.gate_panel.view.show_loaded(loaded)
        self._show_gates(loaded.gates)
        self.main.panes["c2c"].say("" if loaded.links else "no fuser")
        self.main.say("" if self.is_busy else f"ready · {loaded.needs}".rstrip(" ·"))
        self._show_context()
        last = self.turn
        if last and last.gates != loaded.gates and _shapes(last.gates) == _shapes(loaded.gates):
            self.backend.set_gates(last.gates)  # taken up as it was left

    def _show_gates(self, gates: tuple[Gates, ...]) -> None:
        self.gates = gates
        self.main.gate_panel.view.show_gates(gates)
        if self.loaded is not None:
            self.main.show_fuser(self.loaded, gates, self.memory_gb)

    def _show_context(self) -> None:
        latest = {m: a for t in self.conversation.turns for m, a in t.answers.items() if a.is_kept}
        self.main.show_context(self.loaded, list(latest.values()))

    def _finish(self, event: events.Finished, turn: Turn) -> None:
        turn.finish(event)
        if self.is_blind:
            self.main.panes[event.mode].say("hidden until you vote")
        else:
            self.main.finish(event.mode, turn.answers[event.mode], event.figures)
        self._show_context()

    async def _end_turn(self) -> None:
        self.is_busy = False
        self.main.end_turn()
        turn = self.turn
        if turn is None:
            return
        c2c, relay = (turn.answers.get(m, Answer()) for m in RIVALS)
        if self.is_blind and c2c.is_kept and relay.is_kept:
            self.push_screen(Ballot(c2c.text, relay.text, random.random() < 0.5), self._voted)
        else:
            await self._reveal(turn)
        self.keep(conversation.save, self.conversation)

    async def _reveal(self, turn: Turn) -> None:
        """Shows what a blind turn kept back, the gates, and who was faster."""
        if self.is_blind:
            await self.main.reveal(turn.answers)
        self.main.show_reports([t.reports for t in self.conversation.turns])
        self._show_gates(self.gates)
        c2c, relay = (turn.answers.get(m, Answer()) for m in RIVALS)
        is_race = c2c.is_kept and relay.is_kept and "stopped" not in (c2c.reason, relay.reason)
        if is_race and c2c.figures and relay.figures:
            self.main.say(race.verdict(c2c.figures, relay.figures))
        elif turn.answers:
            self.main.say("ready")

    async def _voted(self, choice: votes.Choice | None) -> None:
        if self.turn is not None:
            await self._reveal(self.turn)
        if choice is None or self.loaded is None:
            return
        pair = votes.pair(self.loaded)
        self.keep(votes.cast, votes.Vote(choice, *pair, modified=self.gates != self.loaded.gates))
        said = "a tie" if choice == "tie" else f"you preferred {NAMES[choice]}"
        self.notify(f"{said}\n{votes.summary(*pair)}", title="Vote", markup=False)


def _shapes(gates: tuple[Gates, ...]) -> list[tuple[int, int]]:
    return [(len(keys), len(values)) for keys, values in gates]
