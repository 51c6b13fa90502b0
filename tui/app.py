"""c2c-chat in a terminal: two answers side by side, and the gates between the models."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, TypeVar

from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen

from c2c_mlx import events
from c2c_mlx.config import SamplingConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.events import MODES, EngineEvent, Gates, Loaded, Mode
from c2c_mlx.progress import Progress
from c2c_mlx.tui import clipboard, conversation, history, race, storage, themes, votes
from c2c_mlx.tui.backend import Backend
from c2c_mlx.tui.conversation import NAMES, Answer, Conversation, Turn
from c2c_mlx.tui.screens.ballot import Ballot
from c2c_mlx.tui.screens.help import Help
from c2c_mlx.tui.screens.main import MainScreen
from c2c_mlx.tui.screens.sessions import Sessions
from c2c_mlx.tui.screens.settings import Settings
from c2c_mlx.tui.widgets.gate_view import GateView
from c2c_mlx.tui.widgets.prompt import Prompt

Kept = TypeVar("Kept")
UPDATES_PER_SECOND = 30
RIVALS: tuple[Mode, Mode] = ("c2c", "relay")


class ChatApp(App[None]):
    """The conversation and what can be done with it.

    Args:
        backend: answers; started after the first paint.
        conversation: empty, or one that is taken up again.
        modes: who answers, one after the other.
        is_kept: whether the conversation, its questions, votes and the theme outlive the app.
    """

    CSS_PATH = "app.tcss"
    TITLE = "c2c-chat"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-columns"), (160, "-wide")]
    VERTICAL_BREAKPOINTS = [(0, "-short"), (30, "-tall")]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop"),
        Binding("ctrl+r", "again", "Again", priority=True),
        Binding("ctrl+n", "new", "New", priority=True),
        Binding("ctrl+g", "gates", "Gates", priority=True),
        Binding("ctrl+o", "pane('receiver')", "Receiver", priority=True),
        Binding("ctrl+t", "next_tab", "Next tab", priority=True, show=False),
        Binding("f1", "help", "Help", priority=True),
        Binding("f2", "settings", "Settings", priority=True, show=False),
        Binding("f3", "edit", "Edit last", priority=True, show=False),
        Binding("f4", "copy('c2c')", "Copy C2C's answer", priority=True, show=False),
        Binding("f5", "export", "Export", priority=True, show=False),
        Binding("f6", "sessions", "Sessions", priority=True, show=False),
        Binding("f7", "blind", "Blind", priority=True, show=False),
        Binding("f8", "hide_gates", "Show/hide gates", priority=True, show=False),
        Binding("ctrl+q", "quit", "Quit", priority=True),
    ]

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
        self.gates: Gates = ((), ())
        self.memory_gb = 0.0
        self.is_busy = self.is_blind = self.is_editing = False
        self.attempt = 0  # at the last question
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

    def can_act(self) -> bool:
        """Whether the conversation may be changed; says why if not."""
        if self.is_busy:
            self.notify("an answer is being given: Esc stops it", severity="warning")
        return not self.is_busy

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
                self.turn.report = event
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
        self.main.panes["c2c"].say("" if loaded.fuser else "no fuser")
        self.main.say("" if self.is_busy else "ready")
        self._show_context()
        last = self.turn
        if last and last.gates != loaded.gates and _shape(last.gates) == _shape(loaded.gates):
            self.backend.set_gates(last.gates)  # taken up as it was left

    def _show_gates(self, gates: Gates) -> None:
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
        self.main.show_reports([t.report for t in self.conversation.turns])
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
        pair = (self.loaded.receiver, self.loaded.sharer, self.loaded.fuser)
        self.keep(votes.cast, votes.Vote(choice, *pair, modified=self.gates != self.loaded.gates))
        said = "a tie" if choice == "tie" else f"you preferred {NAMES[choice]}"
        self.notify(f"{said}\n{votes.summary(*pair)}", title="Vote", markup=False)

    # --- the conversation -------------------------------------------------------------------

    async def on_prompt_submitted(self, event: Prompt.Submitted) -> None:
        """A question."""
        question = event.text.strip("\n")
        if not question.strip() or not self.can_act():
            return
        if self.is_editing:
            await self._take_back()
        self.attempt = 0
        self.main.prompt.clear()
        self.main.prompt.remember(question)
        self.keep(history.add, question)
        await self._ask(question)

    async def _ask(self, question: str) -> None:
        self.is_busy, self.is_editing = True, False
        self.conversation.add(question, self.gates)
        self.main.say("asking" if self.loaded else "asking as soon as the models are loaded")
        await self.main.begin(question, self.modes)
        self.backend.ask(question, tuple(self.modes), self.attempt)

    async def _take_back(self) -> None:
        """Forgets the last turn, where it was remembered and where it was only shown."""
        turn = self.conversation.turns.pop()
        self.backend.undo([mode for mode, answer in turn.answers.items() if answer.is_kept])
        await self.main.drop_turn(turn.question)

    def action_stop(self) -> None:
        """Stops the answer; else leaves the editing; else goes back to the prompt."""
        if self.is_busy:
            self.backend.stop()
            self.main.say("stopping")
        elif self.is_editing:
            self.is_editing = False
            self.main.prompt.clear()
            self.main.say("ready")
        self.main.prompt.focus()

    async def action_again(self) -> None:
        """Asks the last question again."""
        if self.turn is None or not self.can_act():
            return
        if self.turn.gates == self.gates and self.conversation.sampling.temp == 0:
            self.notify("greedy decoding says the same again; F2 sets a temperature")
        question = self.turn.question
        await self._take_back()
        self.attempt += 1
        await self._ask(question)

    def action_edit(self) -> None:
        """Brings the last question back to be changed; sending it replaces its turn."""
        if self.turn is None or not self.can_act():
            return
        self.is_editing = True
        self.main.prompt.show(self.turn.question)
        self.main.prompt.focus()
        self.main.say("editing the last message: Enter asks it anew, Esc leaves it as it was")

    async def action_new(self) -> None:
        """Begins another conversation; the last one is saved already."""
        if not self.can_act():
            return
        old = self.conversation
        await self._take_up(Conversation(old.pair, old.sampling, old.system))
        self.main.prompt.focus()
        self.main.say("ready")

    async def _take_up(self, talk: Conversation) -> None:
        """Goes on with a conversation, with its pair and its settings."""
        self.conversation = talk
        self.is_editing = False
        await self.main.show_conversation(talk)
        self._show_context()
        if talk.pair != self.backend.pair:
            self.main.show_pair(talk.pair)
            self.backend.reload(talk.pair)
        self._tell_backend()

    def _tell_backend(self) -> None:
        talk = self.conversation
        self.backend.configure(talk.sampling, talk.system)
        self.backend.restore({mode: talk.history(mode) for mode in MODES})

    def action_sessions(self) -> None:
        """Saved conversations to choose from."""
        if self.can_act():
            self.push_screen(Sessions(conversation.names()), self._chosen)

    async def _chosen(self, name: str | None) -> None:
        if name is not None:
            try:
                await self._take_up(conversation.load(name))
            except C2CError as e:
                self.complain(str(e))

    def action_reload(self) -> None:
        """Loads the models again, after a download that failed."""
        if self.can_act():
            self.backend.reload(self.conversation.pair)
            self._tell_backend()

    # --- panes, gates, screens --------------------------------------------------------------

    def action_pane(self, mode: Mode) -> None:
        """Adds or takes away a pane, and the mode with it."""
        if mode in self.modes:
            self.modes.remove(mode)
        else:
            self.modes.append(mode)
        self.main.show_pane(mode, mode in self.modes)
        self.main.go_to(mode if mode in self.modes else "c2c")

    def action_gates(self) -> None:
        """Goes to the gates, and back."""
        panel = self.main.gate_panel
        panel.remove_class("-hidden")
        if panel.view.has_focus:
            self.main.prompt.focus()
        else:
            self.main.go_to("gates")
            self.call_after_refresh(panel.view.focus)

    def action_hide_gates(self) -> None:
        """Hides the gate panel, or shows it."""
        self.main.gate_panel.toggle_class("-hidden")
        self.main.prompt.focus()

    def on_gate_view_surgery(self, event: GateView.Surgery) -> None:
        """Closes or opens gates; an answer that is being given keeps the old ones."""
        if self.loaded is not None and self.loaded.fuser:
            self.backend.set_gates(self.loaded.gates if event.gates is None else event.gates)
            if self.is_busy:
                self.notify("from the next answer on")

    def action_next_tab(self) -> None:
        """The next pane, on a narrow terminal."""
        self.main.next_tab()

    def action_help(self) -> None:
        """Keys, and what the numbers mean."""
        if not isinstance(self.screen, Help):
            self.push_screen(Help())

    def action_settings(self) -> None:
        """System prompt and sampling."""
        talk = self.conversation
        self.push_screen(Settings(talk.sampling, talk.system), self._set)

    def _set(self, settings: tuple[SamplingConfig, str | None] | None) -> None:
        if settings is not None:
            self.conversation.sampling, self.conversation.system = settings
            self.backend.configure(*settings)

    def action_blind(self) -> None:
        """Hides which answer is whose until there is a vote."""
        if self.can_act():
            self.is_blind = not self.is_blind
            for mode in RIVALS:
                self.main.panes[mode].say("blind" if self.is_blind else "")
            if self.is_blind:
                self.notify("blind: you vote before you see whose answer is whose; F7 ends it")

    def action_votes(self) -> None:
        """What the blind votes come to."""
        if self.loaded is not None:
            pair = (self.loaded.receiver, self.loaded.sharer, self.loaded.fuser)
            self.notify(votes.summary(*pair), title="Votes", markup=False)

    def action_copy(self, mode: Mode) -> None:
        """Copies a mode's latest answer."""
        answers = [t.answers[mode] for t in self.conversation.turns if mode in t.answers]
        if not answers or not answers[-1].is_kept:
            self.notify(f"{NAMES[mode]} has said nothing yet", severity="warning")
            return
        how = clipboard.copy(answers[-1].text, self)
        self.notify(f"copied {NAMES[mode]}'s answer ({how})")

    def action_export(self) -> None:
        """Writes the conversation into the current folder, for people and for programs."""
        talk = self.conversation
        if not talk.turns:
            self.notify("there is nothing to export yet", severity="warning")
            return
        texts = {"md": talk.to_markdown(), "json": talk.to_json()}
        paths = {end: Path.cwd() / f"{talk.name}.{end}" for end in texts}
        try:
            for end, text in texts.items():
                storage.write(paths[end], text)
        except C2CError as e:
            self.complain(str(e))
            return
        self.notify("\n".join(map(str, paths.values())), title="Exported", markup=False)

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The command palette: everything that has no key, and most that has."""
        yield from super().get_system_commands(screen)
        for title, help_text, action in _COMMANDS:
            yield SystemCommand(title, help_text, partial(self.run_action, action))


_COMMANDS = (
    ("Ask again", "The last question once more", "again"),
    ("Edit the last message", "Sending it replaces its turn", "edit"),
    ("New conversation", "The last one stays saved", "new"),
    ("Sessions", "Take up a saved conversation", "sessions"),
    ("Export", "Markdown and JSON into the current folder", "export"),
    ("Copy C2C's answer", "The latest one", "copy('c2c')"),
    ("Copy the relay's answer", "The latest one", "copy('relay')"),
    ("Copy the receiver's answer", "The latest one", "copy('receiver')"),
    ("Settings", "System prompt, temperature, limit of tokens, seed", "settings"),
    ("Blind mode", "Vote before you see whose answer is whose", "blind"),
    ("Votes", "What the blind votes come to", "votes"),
    ("Receiver pane", "The receiver alone as a third answer", "pane('receiver')"),
    ("Sharer pane", "The sharer alone as another answer", "pane('sharer')"),
    ("Gates", "Go to the gate panel", "gates"),
    ("Hide the gates", "Or show them again", "hide_gates"),
    ("Load again", "After a download that failed", "reload"),
    ("Help", "Keys, and what the numbers mean", "help"),
)


def _shape(gates: Gates) -> tuple[int, int]:
    return len(gates[0]), len(gates[1])
