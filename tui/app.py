"""c2c-chat in a terminal: two answers side by side, and the gates between the models."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual.app import SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen

from c2c_mlx.config import SamplingConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.events import MODES, Mode
from c2c_mlx.tui import clipboard, conversation, history, storage, votes
from c2c_mlx.tui.conversation import NAMES, Conversation
from c2c_mlx.tui.listener import RIVALS, Listener
from c2c_mlx.tui.screens.help import Help
from c2c_mlx.tui.screens.sessions import Sessions
from c2c_mlx.tui.screens.settings import Settings
from c2c_mlx.tui.widgets.gate_view import GateView
from c2c_mlx.tui.widgets.prompt import Prompt


class ChatApp(Listener):
    """The conversation and what a user can do with it."""

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
    is_editing = False  # the last question
    attempt = 0  # at the last question

    def can_act(self) -> bool:
        """Whether the conversation may be changed; says why if not."""
        if self.is_busy:
            self.notify("an answer is being given: Esc stops it", severity="warning")
        return not self.is_busy

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
        if self.loaded is not None and self.loaded.links:
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
            self.notify(votes.summary(*votes.pair(self.loaded)), title="Votes", markup=False)

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
