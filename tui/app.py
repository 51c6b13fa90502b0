"""c2c-chat in a terminal: two answers side by side, and the gates between the models."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol

from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.screen import Screen
from textual.theme import Theme
from textual.widgets import Footer, Header, ProgressBar, Static, Tab, Tabs

from c2c_mlx import events
from c2c_mlx.config import SamplingConfig
from c2c_mlx.engine import ANSWERED_TURN, InferenceThread, Pair
from c2c_mlx.errors import C2CError
from c2c_mlx.events import MODES, EngineEvent, Gates, Loaded, Mode
from c2c_mlx.progress import Progress
from c2c_mlx.tui import clipboard, conversation, race, storage, votes
from c2c_mlx.tui.conversation import NAMES, Answer, Conversation, Turn
from c2c_mlx.tui.screens.ballot import Ballot
from c2c_mlx.tui.screens.help import Help
from c2c_mlx.tui.screens.sessions import Sessions
from c2c_mlx.tui.screens.settings import Settings
from c2c_mlx.tui.widgets.gate_panel import GatePanel, GateView
from c2c_mlx.tui.widgets.pane import AnswerPane
from c2c_mlx.tui.widgets.prompt import Prompt

UPDATES_PER_SECOND = 30

THEMES = (
    Theme(
        name="c2c-dark",
        primary="#56b4e9",
        secondary="#e69f00",
        accent="#f0e442",
        warning="#e69f00",
        error="#ff7a6b",
        success="#35c69b",
        foreground="#d8dee6",
        background="#10151c",
        surface="#171d26",
        panel="#202833",
    ),
    Theme(
        name="c2c-light",
        primary="#0072b2",
        secondary="#b34f00",
        accent="#8a5a00",
        warning="#b34f00",
        error="#b3261e",
        success="#00704f",
        foreground="#1c232b",
        background="#fbfbf8",
        surface="#f2f2ee",
        panel="#e6e6e0",
        dark=False,
    ),
)


class Engine(Protocol):
    """What the app asks of whoever answers; `engine.InferenceThread` and the preview's replay."""

    def start(self) -> None: ...  # noqa: D102
    def drain(self) -> list[EngineEvent]: ...  # noqa: D102
    def ask(self, question: str, modes: Sequence[Mode], attempt: int = 0) -> None: ...  # noqa: D102
    def stop(self) -> None: ...  # noqa: D102
    def undo(self, modes: Sequence[Mode]) -> None: ...  # noqa: D102
    def restore(self, histories: Mapping[Mode, Sequence[ANSWERED_TURN]]) -> None: ...  # noqa: D102
    def set_gates(self, gates: Gates) -> None: ...  # noqa: D102
    def configure(self, sampling: SamplingConfig, system: str | None) -> None: ...  # noqa: D102
    def reload(self, pair: Pair) -> None: ...  # noqa: D102


class ChatApp(App[None]):
    """The app.

    Args:
        engine: answers; started after the first paint.
        conversation: empty, or one that is taken up again.
        modes: who answers, one after the other.
        save: keeps the conversation after each turn.
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
        Binding("f2", "settings", "Settings", show=False),
        Binding("f3", "edit", "Edit last", show=False),
        Binding("f4", "copy('c2c')", "Copy C2C's answer", show=False),
        Binding("f5", "export", "Export", show=False),
        Binding("f6", "sessions", "Sessions", show=False),
        Binding("f7", "blind", "Blind", show=False),
        Binding("f8", "hide_gates", "Show/hide gates", show=False),
        Binding("ctrl+q", "quit", "Quit", priority=True),
    ]

    def __init__(
        self,
        engine: Engine,
        conversation: Conversation,
        modes: Sequence[Mode],
        save: Callable[[Conversation], None] = conversation.save,
    ) -> None:
        super().__init__()
        self.engine = engine
        self.save = save
        self.conversation = conversation
        self.modes = list(modes)
        self.loaded: Loaded | None = None
        self.gates: Gates = ((), ())
        self.memory_gb = 0.0
        self.is_busy = self.is_blind = self.is_editing = False
        self.attempt = 0
        for theme in THEMES:
            self.register_theme(theme)
        self.theme = THEMES[0].name

    def compose(self) -> ComposeResult:
        """Everything is there from the first paint on; models come later."""
        yield Header(icon="")
        yield Tabs(*(Tab(name, id=f"tab-{key}") for key, name in _TABS.items()))
        with Horizontal(id="panes"):
            for mode in MODES:
                yield AnswerPane(mode)
            yield GatePanel()
        with Horizontal(id="status"):
            yield Static("starting", id="state", markup=False)
            yield ProgressBar(id="loading", show_eta=False)
        yield Prompt()
        yield Footer()

    async def on_mount(self) -> None:
        """Shows what there is, then lets the engine begin."""
        self.title = self._pair_title()
        for mode in MODES:
            self.pane(mode).set_class(mode in self.modes, "-shown")
        self.prompt.focus()
        if self.conversation.turns:
            await self._show_conversation()
        self.call_after_refresh(self._begin)

    def _begin(self) -> None:
        self.engine.start()
        self.run_worker(self._follow())

    async def _follow(self) -> None:
        """Shows what the engine says; a task of its own, so that keys never wait for a drawing."""
        while True:
            await self._take_events()
            await asyncio.sleep(1 / UPDATES_PER_SECOND)

    # --- parts ------------------------------------------------------------------------------

    @property
    def prompt(self) -> Prompt:
        """The line at the bottom."""
        return self.screen_stack[0].query_one(Prompt)

    @property
    def gate_panel(self) -> GatePanel:
        """The panel on the right."""
        return self.screen_stack[0].query_one(GatePanel)

    def pane(self, mode: Mode) -> AnswerPane:
        """The pane of a mode."""
        return self.screen_stack[0].query_one(f"#{mode}", AnswerPane)

    def say(self, text: str, is_error: bool = False) -> None:
        """The line between the panes and the prompt."""
        state = self.screen_stack[0].query_one("#state", Static)
        state.update(text)
        state.set_class(is_error, "-error")

    def complain(self, message: str) -> None:
        """An error as a notice: what is wrong and what to do."""
        self.notify(message, severity="error", timeout=12, markup=False)

    @property
    def turn(self) -> Turn | None:
        """The latest turn."""
        return self.conversation.turns[-1] if self.conversation.turns else None

    # --- events of the engine ---------------------------------------------------------------

    async def _take_events(self) -> None:
        pieces: dict[tuple[Mode, type], str] = {}
        for event in self.engine.drain():
            if isinstance(event, events.Text | events.RelayedText):
                key = (event.mode, type(event))
                pieces[key] = pieces.get(key, "") + event.text
                continue
            await self._write(pieces)
            pieces = {}
            await self._take(event)
        await self._write(pieces)

    async def _write(self, pieces: Mapping[tuple[Mode, type], str]) -> None:
        """Adds what came since the last update, in one go per text."""
        for (mode, kind), text in pieces.items():
            pane, turn = self.pane(mode), self.turn
            if turn is None or pane.turn is None:
                continue
            answer = turn.answers.setdefault(mode, Answer())
            is_relayed = kind is events.RelayedText
            pane.say("the sharer writes" if is_relayed else "writing")
            if is_relayed:
                answer.relayed_text += text
            else:
                answer.text += text
            if not self.is_blind:
                await (pane.turn.write_relayed if is_relayed else pane.turn.write)(text)

    async def _take(self, event: EngineEvent) -> None:
        match event:
            case Progress():
                self._show_progress(event)
            case events.Loaded():
                self._show_loaded(event)
            case events.Prefilling():
                self._run_in(event.mode)
                self.pane(event.mode).say(f"reading {event.done} of {event.total} tokens")
            case events.Finished():
                self._finish(event)
            case events.GateReport() if self.turn:
                self.turn.report = event
            case events.GatesSet():
                self._show_gates(event.gates)
            case events.Failed():
                self._fail(event)
            case events.TurnOver():
                self.memory_gb = event.memory_gb
                await self._end_turn()

    def _show_progress(self, event: Progress) -> None:
        bar = self.screen_stack[0].query_one("#loading", ProgressBar)
        bar.add_class("-shown")
        bar.update(total=event.total or None, progress=event.done)
        self.say(event.what)

    def _show_loaded(self, event: Loaded) -> None:
        self.loaded, self.memory_gb = event, event.memory_gb
        self.screen_stack[0].query_one("#loading").remove_class("-shown")
        self.gate_panel.view.show_loaded(event)
        self._show_gates(event.gates)
        self.pane("c2c").say("" if event.fuser else "no fuser")
        self.say("" if self.is_busy else "ready")
        self.title = self._pair_title()
        self._show_context()
        last = self.turn
        if last and last.gates != event.gates and _shape(last.gates) == _shape(event.gates):
            self.engine.set_gates(last.gates)  # taken up as it was left

    def _show_gates(self, gates: Gates) -> None:
        self.gates = gates
        self.gate_panel.view.show_gates(gates)
        self._show_fuser()

    def _show_fuser(self) -> None:
        """Says in the header and on the pane which fuser it is, and whether it is itself."""
        if self.loaded is None:
            return
        n = sum(
            a != b
            for ours, own in zip(self.gates, self.loaded.gates, strict=True)
            for a, b in zip(ours, own, strict=True)
        )
        modified = f" (modified: {n} {'gate' if n == 1 else 'gates'})" if n else ""
        self.pane("c2c").border_title = f"{NAMES['c2c']}{modified}"
        fuser = f"fuser {_short(self.loaded.fuser)}{modified}" if self.loaded.fuser else "no fuser"
        self.sub_title = f"{fuser} · {self.loaded.device} · {self.memory_gb:.1f} GB"

    def _run_in(self, mode: Mode) -> None:
        """Marks the pane whose turn it is."""
        for pane in self.screen_stack[0].query(AnswerPane):
            pane.set_class(pane.mode == mode, "-running")
        self.say(f"{NAMES[mode]} answers; one after the other, so that the times are true")

    def _finish(self, event: events.Finished) -> None:
        turn, pane = self.turn, self.pane(event.mode)
        if turn is None or pane.turn is None:
            return
        turn.finish(event)
        pane.figures = event.figures
        if self.is_blind:
            pane.say("hidden until you vote")
        else:
            pane.turn.finish(turn.answers[event.mode])
            pane.say(f"{race.seconds(event.figures.first_token_s)} to first token")
        self._show_context()

    def _fail(self, event: events.Failed) -> None:
        self.complain(event.message)
        if event.mode is None:
            self.screen_stack[0].query_one("#loading").remove_class("-shown")
            self.say(event.message, is_error=True)
            return
        pane = self.pane(event.mode)
        pane.say("no answer")
        if pane.turn is not None:
            pane.turn.note(event.message)

    async def _end_turn(self) -> None:
        self.is_busy = False
        for pane in self.screen_stack[0].query(AnswerPane):
            pane.remove_class("-running")
            if pane.turn is not None and str(pane.border_subtitle or "") == "waiting":
                pane.say("not asked")
                pane.turn.note("stopped before it was asked")
        turn = self.turn
        if turn is None:
            return
        c2c, relay = (turn.answers.get(m, Answer()) for m in _RIVALS)
        if self.is_blind and c2c.is_kept and relay.is_kept:
            self.push_screen(Ballot(c2c.text, relay.text, random.random() < 0.5), self._voted)
        else:
            await self._reveal()
        self._save()

    async def _reveal(self) -> None:
        """Shows what a blind turn kept back, the gates, and who was faster."""
        turn = self.turn
        if turn is None:
            return
        for mode, answer in turn.answers.items():
            view = self.pane(mode).turn
            if self.is_blind and view is not None:
                await view.show(answer)
                self.pane(mode).say("")
        self.gate_panel.view.show_reports([t.report for t in self.conversation.turns])
        self._show_fuser()
        c2c, relay = (turn.answers.get(m, Answer()) for m in _RIVALS)
        whole = "stopped" not in (c2c.reason, relay.reason)
        if c2c.figures and relay.figures and whole and c2c.is_kept and relay.is_kept:
            self.say(race.verdict(c2c.figures, relay.figures))
        else:
            self.say("ready")

    async def _voted(self, choice: votes.Choice | None) -> None:
        await self._reveal()
        if choice is None or self.loaded is None:
            return
        pair = (self.loaded.receiver, self.loaded.sharer, self.loaded.fuser)
        modified = self.gates != self.loaded.gates
        try:
            votes.cast(votes.Vote(choice, *pair, modified))
        except C2CError as e:
            self.complain(str(e))
        said = "a tie" if choice == "tie" else f"you preferred {NAMES[choice]}"
        self.notify(f"{said}\n{votes.summary(*pair)}", title="Vote", markup=False)

    def _save(self) -> None:
        try:
            self.save(self.conversation)
        except C2CError as e:
            self.complain(str(e))

    def _show_context(self) -> None:
        """How much of the receiver's context the longest conversation takes."""
        if self.loaded is None:
            return
        last = self.turn.answers.values() if self.turn else ()
        figures = [a.figures for a in last if a.figures]
        used = max((f.prompt_tokens + f.generated_tokens for f in figures), default=0)
        total = self.loaded.context_length
        filled = min(-(-8 * used // total), 8)
        self.prompt.border_subtitle = f"context {'▰' * filled:▱<8} {used} of {total}"

    def _pair_title(self) -> str:
        pair = self.conversation.pair
        return f"{_short(pair.receiver)} ← {_short(pair.sharer)}"

    # --- the conversation -------------------------------------------------------------------

    async def on_prompt_submitted(self, event: Prompt.Submitted) -> None:
        """A question: asks it, or says why not now."""
        question = event.text.strip("\n")
        if not question.strip():
            return
        if self.is_busy:
            self.notify("an answer is being given: Esc stops it", severity="warning")
            return
        if self.is_editing:
            await self._take_back()
        self.attempt = 0
        self.prompt.clear()
        self.prompt.remember(question)
        await self._ask(question)

    async def _ask(self, question: str) -> None:
        self.is_busy, self.is_editing = True, False
        self.conversation.add(question, self.gates)
        for mode in self.modes:
            await self.pane(mode).begin(question)
            self.pane(mode).say("waiting")
        self.engine.ask(question, tuple(self.modes), self.attempt)

    async def _take_back(self) -> None:
        """Forgets the last turn, in the panes that remember it and in those that do not."""
        turn = self.conversation.turns.pop()
        self.engine.undo([mode for mode, answer in turn.answers.items() if answer.is_kept])
        for mode in MODES:
            view = self.pane(mode).turn
            if view is not None and view.question == turn.question:
                await self.pane(mode).drop_last()

    def action_stop(self) -> None:
        """Stops the answer; else leaves the editing; else goes back to the prompt."""
        if self.is_busy:
            self.engine.stop()
            self.say("stopping")
        elif self.is_editing:
            self.is_editing = False
            self.prompt.clear()
            self.say("ready")
        self.prompt.focus()

    async def action_again(self) -> None:
        """Asks the last question again."""
        if self.turn is None or self.is_busy:
            return
        unchanged = self.turn.gates == self.gates and self.conversation.sampling.temp == 0
        if unchanged:
            self.notify("greedy decoding says the same again; F2 sets a temperature")
        question = self.turn.question
        await self._take_back()
        self.attempt += 1
        await self._ask(question)

    def action_edit(self) -> None:
        """Brings the last question back to be changed; sending it replaces its turn."""
        if self.turn is None or self.is_busy:
            return
        self.is_editing = True
        self.prompt.show(self.turn.question)
        self.prompt.focus()
        self.say("editing the last message: Enter asks it anew, Esc leaves it as it was")

    async def action_new(self) -> None:
        """Begins another conversation; the last one is saved already."""
        if self.is_busy:
            self.notify("an answer is being given: Esc stops it", severity="warning")
            return
        old = self.conversation
        self.conversation = Conversation(old.pair, old.sampling, old.system)
        await self._show_conversation()
        self.engine.restore({})
        self.say("ready")

    async def _show_conversation(self) -> None:
        """Fills the panes from the conversation, whatever they held."""
        for mode in MODES:
            pane = self.pane(mode)
            await pane.clear()
            for turn in self.conversation.turns:
                if answer := turn.answers.get(mode):
                    view = await pane.begin(turn.question)
                    await view.show(answer)
        self.prompt.asked.clear()
        for turn in self.conversation.turns:
            self.prompt.remember(turn.question)
        self.gate_panel.view.show_reports([t.report for t in self.conversation.turns])
        self._show_context()

    async def resume(self, name: str) -> None:
        """Takes up a saved conversation."""
        try:
            self.conversation = conversation.load(name)
        except C2CError as e:
            self.complain(str(e))
            return
        await self._show_conversation()
        if self.loaded is None or self.conversation.pair != self.engine_pair:
            self.engine.reload(self.conversation.pair)
        self.restore()

    @property
    def engine_pair(self) -> Pair:
        """What the engine has loaded, as far as the app knows."""
        return getattr(self.engine, "pair", self.conversation.pair)

    def restore(self) -> None:
        """Tells the engine of the conversation that it is to go on with."""
        self.engine.configure(self.conversation.sampling, self.conversation.system)
        self.engine.restore({mode: self.conversation.history(mode) for mode in MODES})

    # --- panes, gates, screens --------------------------------------------------------------

    def action_pane(self, mode: Mode) -> None:
        """Adds or takes away a pane, and the mode with it."""
        if mode in self.modes:
            self.modes.remove(mode)
        else:
            self.modes.append(mode)
        self.pane(mode).set_class(mode in self.modes, "-shown")

    def action_gates(self) -> None:
        """Goes to the gates, and back."""
        panel = self.gate_panel
        panel.remove_class("-hidden")
        if panel.view.has_focus:
            self.prompt.focus()
            return
        self._tabs.active = "tab-gates"
        panel.view.focus()

    def action_hide_gates(self) -> None:
        """Hides the gate panel, or shows it."""
        self.gate_panel.toggle_class("-hidden")
        self.prompt.focus()

    def on_gate_view_surgery(self, event: GateView.Surgery) -> None:
        """Closes or opens gates; an answer that is being given keeps the old ones."""
        if self.loaded is None or not self.loaded.fuser:
            return
        self.engine.set_gates(self.loaded.gates if event.gates is None else event.gates)
        if self.is_busy:
            self.notify("from the next answer on")

    @property
    def _tabs(self) -> Tabs:
        return self.screen_stack[0].query_one(Tabs)

    def on_tabs_tab_activated(self, event: Tabs.TabActivated) -> None:
        """On a narrow terminal one pane is seen at a time."""
        chosen = str(event.tab.id).removeprefix("tab-")
        for pane in self.screen_stack[0].query(".pane"):
            pane.set_class(pane.id == chosen, "-tab")

    def action_next_tab(self) -> None:
        """The next pane, on a narrow terminal."""
        self._tabs.action_next_tab()

    def action_help(self) -> None:
        """Keys, and what the numbers mean."""
        self.push_screen(Help())

    def action_settings(self) -> None:
        """System prompt and sampling."""
        settings = self.conversation.sampling, self.conversation.system
        self.push_screen(Settings(*settings), self._set)

    def _set(self, settings: tuple[SamplingConfig, str | None] | None) -> None:
        if settings is not None:
            self.conversation.sampling, self.conversation.system = settings
            self.engine.configure(*settings)

    def action_sessions(self) -> None:
        """Saved conversations."""
        if not self.is_busy:
            self.push_screen(Sessions(conversation.names()), self._chosen)

    async def _chosen(self, name: str | None) -> None:
        if name is not None:
            await self.resume(name)

    def action_blind(self) -> None:
        """Hides which answer is whose until there is a vote."""
        if self.is_busy:
            return
        self.is_blind = not self.is_blind
        if self.is_blind:
            self.notify("blind: you vote before you see whose answer is whose; F7 ends it")
        self._show_blind()

    def _show_blind(self) -> None:
        for mode in _RIVALS:
            self.pane(mode).say("blind" if self.is_blind else "")

    def action_copy(self, mode: Mode) -> None:
        """Copies a mode's latest answer."""
        answers = [t.answers[mode] for t in self.conversation.turns if mode in t.answers]
        if not answers or not answers[-1].text:
            self.notify(f"{NAMES[mode]} has said nothing yet", severity="warning")
            return
        how = clipboard.copy(answers[-1].text, self)
        self.notify(f"{NAMES[mode]}'s answer copied ({how})")

    def action_export(self) -> None:
        """Writes the conversation into the current folder, for people and for programs."""
        if not self.conversation.turns:
            self.notify("there is nothing to export yet", severity="warning")
            return
        paths = [Path.cwd() / f"{self.conversation.name}.{end}" for end in ("md", "json")]
        texts = self.conversation.to_markdown(), self.conversation.to_json()
        try:
            for path, text in zip(paths, texts, strict=True):
                storage.write(path, text)
        except C2CError as e:
            self.complain(str(e))
            return
        self.notify("\n".join(map(str, paths)), title="Exported", markup=False)

    def action_votes(self) -> None:
        """What the blind votes come to."""
        if self.loaded is not None:
            pair = (self.loaded.receiver, self.loaded.sharer, self.loaded.fuser)
            self.notify(votes.summary(*pair), title="Votes", markup=False)

    def action_reload(self) -> None:
        """Loads the models again, after a download that failed."""
        self.engine.reload(self.conversation.pair)
        self.restore()

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The command palette: everything that has no key, and most that has."""
        yield from super().get_system_commands(screen)
        for title, help_text, action in _COMMANDS:
            yield SystemCommand(title, help_text, partial(self.run_action, action))


_RIVALS: tuple[Mode, Mode] = ("c2c", "relay")
_TABS = {"c2c": "C2C", "relay": "Relay", "receiver": "Receiver", "gates": "Gates"}
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


def _short(name: str) -> str:
    """A folder or hub id by its last part."""
    return name.rstrip("/").rsplit("/", 1)[-1]


def _shape(gates: Gates) -> tuple[int, int]:
    return len(gates[0]), len(gates[1])


def run(
    pair: Pair,
    sampling: SamplingConfig,
    system: str | None,
    modes: Sequence[Mode],
    resume: str | None = None,
) -> int:
    """Opens the app; returns when the user has left and the models' thread has ended.

    Args:
        pair: who talks.
        sampling: the same for every mode.
        system: a system prompt, or None.
        modes: who answers.
        resume: a saved session to go on with, "" for the latest; its pair and settings count.

    Raises:
        C2CError: if there is no such session.
    """
    talk = Conversation(pair, sampling, system)
    if resume is not None:
        talk = conversation.load(resume)
    engine = InferenceThread(talk.pair, talk.sampling, talk.system)
    if talk.turns:
        engine.restore({mode: talk.history(mode) for mode in MODES})
    app = ChatApp(engine, talk, modes)
    try:
        app.run()
    finally:
        engine.close()
        if engine.is_alive():
            engine.join(timeout=1)
            if engine.is_alive():
                print("c2c-chat: ending what the models were doing", file=sys.stderr)
            engine.join()
    return app.return_code or 0
