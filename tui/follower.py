"""Follows what the models say: keeps it in the conversation and its file, and shows it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from c2c_mlx import events
from c2c_mlx.events import EngineEvent, Gates, Loaded, Mode
from c2c_mlx.progress import Progress
from c2c_mlx.tui import race
from c2c_mlx.tui.backend import Backend
from c2c_mlx.tui.conversation import Turn
from c2c_mlx.tui.screens.main import MainScreen
from c2c_mlx.tui.state import State

UPDATES_PER_SECOND = 30


class Follower:
    """Between the backend's events and the screen.

    Args:
        backend: whose events are followed.
        state: changed by what they say.
        screen: shows it.
        save: writes the conversation; called when an answer has ended.
        complain: shows an error.
        ask_for_vote: called at the end of a blind turn, instead of showing whose answer is whose.
        trained: told what is said of training.
        idle: called when a turn is over, and all of it is shown.
    """

    def __init__(
        self,
        backend: Backend,
        state: State,
        screen: MainScreen,
        *,
        save: Callable[[], None],
        complain: Callable[[str], None],
        ask_for_vote: Callable[[Turn], None],
        trained: Callable[[events.Training], Awaitable[None]],
        idle: Callable[[], Awaitable[None]],
    ) -> None:
        self.backend, self.state, self.screen = backend, state, screen
        self._save, self._complain, self._ask_for_vote = save, complain, ask_for_vote
        self._trained, self._idle = trained, idle

    async def follow(self) -> None:
        """Shows it as it comes; a task of its own, so that keys never wait for a drawing."""
        while True:
            for event in self._together(self.take_in()):
                await self._show(event)
            await asyncio.sleep(1 / UPDATES_PER_SECOND)

    def take_in(self) -> list[EngineEvent]:
        """Keeps what came since the last call, before anything of it is shown.

        Without a pause between hearing and keeping: whenever the app ends, nothing that had been
        said is lost in between.
        """
        heard = self.backend.drain()
        for event in heard:
            self.state.conversation.record(event)
        if any(isinstance(event, events.Finished | events.TurnOver) for event in heard):
            self._save()
        return heard

    @staticmethod
    def _together(heard: Sequence[EngineEvent]) -> list[EngineEvent]:
        """The same events, neighbouring pieces of a text in one."""
        joined: list[EngineEvent] = []
        for event in heard:
            last = joined[-1] if joined else None
            if isinstance(event, events.Text | events.RelayedText) and (
                type(last) is type(event) and last.mode == event.mode
            ):
                joined[-1] = type(event)(event.mode, last.text + event.text)
            else:
                joined.append(event)
        return joined

    async def _show(self, event: EngineEvent) -> None:
        match event:
            case Progress():
                self.screen.show_progress(event)
            case events.Loaded():
                self._show_loaded(event)
            case events.Prefilling():
                far = f" {event.done} of {event.total} tokens" if event.total else ""
                self.screen.run_in(event.mode, f"reading{far}")
            case events.RelayedText():
                await self._write(event.mode, event.text, is_relayed=True)
            case events.Text():
                await self._write(event.mode, event.text, is_relayed=False)
            case events.Finished():
                self._finish(event.mode)
            case events.LiveGates():
                self.screen.gate_panel.view.show_live(event.report)
            case events.Crossed():
                self.screen.panes["c2c"].weigh(event)
                self.screen.panes["c2c"].show_owed(self.state.is_weighing)
            case (
                events.TrainingBegun()
                | events.TrainingStep()
                | events.Trial()
                | events.TrainingOver()
            ):
                await self._trained(event)
            case events.Failed():
                self._complain(event.message)
                self.screen.fail(event)
            case events.TurnOver():
                self.state.memory_gb = event.memory_gb or self.state.memory_gb
                await self._end_turn()
                await self._idle()

    async def _write(self, mode: Mode, text: str, is_relayed: bool) -> None:
        self.screen.run_in(mode, "the sharer writes" if is_relayed else "writing")
        if not self.state.is_blind:
            await self.screen.write(mode, text, is_relayed)

    # --- loading, gates ---------------------------------------------------------------------

    def _show_loaded(self, loaded: Loaded) -> None:
        state, turn = self.state, self.state.turn
        state.loaded, state.memory_gb = loaded, loaded.memory_gb
        self.screen.end_progress()
        self.screen.gate_panel.view.show_loaded(loaded)
        self.show_gates(events.fitting(state.gates, loaded.gates))
        self.screen.show_missing(loaded)
        self.screen.say("" if state.is_busy else _ready(loaded))
        self.show_context()
        if state.is_busy and turn:
            turn.latest.gates = state.gates  # asked before anybody knew them, or whether they fit

    def restore_gates(self) -> None:
        """Takes over the gates of the conversation's last turn; once it is known, if they fit."""
        gates, loaded = self.state.gates, self.state.loaded
        if self.state.turn:
            gates = self.state.turn.latest.gates
        self.show_gates(events.fitting(gates, loaded.gates) if loaded else gates)

    def set_gates(self, gates: tuple[Gates, ...]) -> None:
        """Opens and closes gates; what is asked from now on is answered with these."""
        self.show_gates(gates)  # at once: the models take them over when they have time
        self.backend.set_gates(gates)

    def show_gates(self, gates: tuple[Gates, ...]) -> None:
        """Takes over the gates that the fusers have, or will have when they are loaded."""
        self.state.gates = gates
        if self.state.loaded is not None:
            self.screen.gate_panel.view.show_gates(gates)
            self.screen.show_fuser(self.state.loaded, gates, self.state.memory_gb)

    def show_context(self) -> None:
        """How full the receiver's context is."""
        talk = self.state.conversation
        latest = {m: a for t in talk.turns for m, a in t.answers.items() if a.is_kept}
        self.screen.show_context(self.state.loaded, list(latest.values()))

    # --- the end of answers -----------------------------------------------------------------

    def _finish(self, mode: Mode) -> None:
        if self.state.turn is None:
            return
        if self.state.is_blind:
            self.screen.panes[mode].say("hidden until you vote")
        else:
            self.screen.finish(mode, self.state.turn.answers[mode])
        self.show_context()

    async def _end_turn(self) -> None:
        self.state.is_busy = False
        self.screen.end_turn()
        turn = self.state.turn
        if turn is None:
            return
        if self.state.is_blind and turn.latest.rivals():
            self._ask_for_vote(turn)
        else:
            await self.reveal(turn)

    async def reveal(self, turn: Turn) -> None:
        """Shows what a blind turn kept back, the gates, and who was faster."""
        if self.state.is_blind:
            await self.screen.reveal(turn.latest.answers)
        if self.state.is_weighing and "c2c" in turn.latest.answers:
            self.backend.weigh()
        self.screen.show_reports([t.reports for t in self.state.conversation.turns])
        self.show_gates(self.state.gates)
        if both := turn.latest.rivals():
            c2c, relay = (answer.figures for answer in both)
            assert c2c and relay  # they are whole
            self.screen.say(race.verdict(c2c, relay))
        elif compared := turn.comparison("c2c"):
            words = " and then ".join(turn.gates_in_words(take) for take in compared)
            self.screen.say(f"C2C with {words}: compare the two answers")
        else:
            self.screen.say("ready")


def _ready(loaded: Loaded) -> str:
    if loaded.unfinished:
        return f"ready · its training stopped at {loaded.unfinished}: Ctrl+S goes on"
    return f"ready · {loaded.needs}".rstrip(" ·")
