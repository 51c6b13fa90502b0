"""c2c-chat in a terminal: what a user can do, and who does it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from textual.app import App, SystemCommand
from textual.screen import Screen

from c2c_mlx.config import Pair, SamplingConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.events import MODES, Mode
from c2c_mlx.tui import clipboard, export, history, keys, session_file, themes, votes
from c2c_mlx.tui.backend import Backend
from c2c_mlx.tui.conversation import NAMES, RIVALS, Answer, Conversation, Turn
from c2c_mlx.tui.follower import Follower
from c2c_mlx.tui.screens.help import Help
from c2c_mlx.tui.screens.main import MainScreen
from c2c_mlx.tui.screens.menu import Menu
from c2c_mlx.tui.screens.sessions import Sessions
from c2c_mlx.tui.screens.settings import Settings
from c2c_mlx.tui.session_file import SessionFile
from c2c_mlx.tui.state import State
from c2c_mlx.tui.training import Training
from c2c_mlx.tui.voting import Voting
from c2c_mlx.tui.widgets.gate_view import GateView

Kept = TypeVar("Kept")


class ChatApp(App[None]):
    """The conversation, and what is done with it by keys.

    Args:
        backend: answers; started after the first paint.
        conversation: empty, or one that is taken up again.
        modes: who answers, one after the other.
        file: where the conversation is saved; None: neither it nor its questions, votes and the
            theme outlive the app.
    """

    CSS_PATH = "app.tcss"
    TITLE = "c2c-chat"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-columns"), (160, "-wide")]
    VERTICAL_BREAKPOINTS = [(0, "-short"), (30, "-tall")]
    BINDINGS = keys.bindings(keys.APP, is_priority=True)
    _OF_THE_APP = keys.actions()

    def __init__(
        self,
        backend: Backend,
        conversation: Conversation,
        modes: Sequence[Mode],
        file: SessionFile | None = None,
    ) -> None:
        super().__init__()
        self.backend, self.file = backend, file
        self.state = State(conversation, list(modes))
        self.main = MainScreen(modes)
        self.voting = Voting(
            self.state,
            self.main,
            reveal=lambda turn: self.follower.reveal(turn),
            keep=lambda vote: self._keep(votes.cast, vote),
        )
        self.training = Training(
            backend,
            self.state,
            self.main,
            load_again=self._load_again,
            ask=self._ask,
            turn_round=self._turn_round,
        )
        self.follower = Follower(
            backend,
            self.state,
            self.main,
            save=self.save,
            complain=self.complain,
            ask_for_vote=self.voting.ask,
            trained=self.training.follow,
            idle=self.training.settle,
        )
        for theme in (themes.DARK, themes.LIGHT):
            self.register_theme(theme)
        chosen = themes.chosen() if file else themes.DARK.name
        self.theme = chosen if chosen in self.available_themes else themes.DARK.name

    def get_default_screen(self) -> MainScreen:
        """The conversation."""
        return self.main

    async def on_ready(self) -> None:
        """The first frame has been painted: shows what there is, then lets the models load."""
        sys.setswitchinterval(0.001)  # a key must not wait 5 ms for each turn of the interpreter
        self.main.show_pair(self.state.conversation.pair)
        self.main.prompt.focus()
        if self.file:
            self.main.prompt.remember(*history.load())
            self.theme_changed_signal.subscribe(
                self, lambda theme: self._keep(themes.choose, theme.name)
            )
        if self.state.conversation.turns:
            await self.main.show_conversation(self.state.conversation)
            self._tell_backend()
        self.backend.start()
        self.run_worker(self.follower.follow())

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Below a dialog the app's keys do nothing; it has keys of its own."""
        return len(self.screen_stack) < 2 or action not in self._OF_THE_APP

    def complain(self, message: str) -> None:
        """An error as a notice: what is wrong and what to do."""
        if self.is_running:
            self.notify(message, severity="error", timeout=12, markup=False)
        else:
            print(f"c2c-chat: {message}", file=sys.stderr)

    def save(self) -> None:
        """Writes the conversation, if it is to outlive the app; a full disk is a notice."""
        if self.file and self.state.conversation.turns:
            self._keep(self.file.save, self.state.conversation)

    def _keep(self, write: Callable[[Kept], None], what: Kept) -> None:
        if self.file:
            try:
                write(what)
            except C2CError as e:
                self.complain(str(e))

    def can_act(self) -> bool:
        """Whether the conversation may be changed; says why if not."""
        if self.state.is_busy:
            waits = "the question waits for the models to be loaded"
            why = "an answer is being given: Esc stops it" if self.state.loaded else waits
            self.notify(why, severity="warning")
        return not self.state.is_busy

    # --- asking -----------------------------------------------------------------------------

    async def action_send(self) -> None:
        """Asks what stands in the prompt."""
        question, state = self.main.prompt.text.strip("\n"), self.state
        if not question.strip() or not self.can_act():
            return
        if not state.in_order(state.modes):
            self.notify("nobody here can answer: Ctrl+O has the receiver answer", severity="error")
            return
        state.is_busy = True
        if self.main.prompt.is_editing:
            await self._take_back()
        self.main.prompt.finish()
        self.main.prompt.remember(question)
        self._keep(history.add, question)
        state.attempt = 0
        modes = state.in_order(state.modes)  # by the number of turns, without the one taken back
        await self._ask(state.conversation.begin(question, modes, state.gates), modes)

    async def _ask(self, turn: Turn, modes: Sequence[Mode]) -> None:
        """Has the modes answer a turn's latest take."""
        self.state.is_busy = True
        self.save()
        self.main.say("asking" if self.state.loaded else "asking as soon as the models are loaded")
        await self.main.begin(turn, modes)
        self.backend.ask(turn.question, tuple(modes), self.state.attempt)

    async def _take_back(self) -> None:
        """Forgets the last turn, where it was remembered and where it was only shown."""
        turn = self.state.conversation.turns.pop()
        self.backend.undo([mode for mode, answer in turn.answers.items() if answer.is_kept])
        await self.main.drop_turn(turn)

    async def action_again(self) -> None:
        """Asks the last question again; the answers that there were stay in the conversation."""
        state, turn = self.state, self.state.turn
        if turn is None or not self.can_act():
            return
        self._leave_editing()
        talk, answers = state.conversation, turn.answers
        modes, last = state.in_order(state.modes), turn.latest
        if last.gates != state.gates and "c2c" in modes:
            # Gates are all that shall differ: the same seed, and nobody whom they do not concern.
            now = talk.take((), state.gates, state.attempt)
            if (now.sampling, now.system) == (last.sampling, last.system):
                modes = [m for m in modes if m == "c2c" or not answers.get(m, Answer()).is_whole]
            self.main.go_to("c2c")
        else:
            state.attempt += 1
            if talk.sampling.temp == 0:
                self.notify("greedy decoding says the same again; F2 sets a temperature")
        self.backend.undo([m for m in modes if answers.get(m, Answer()).is_kept])
        turn.takes.append(talk.take(modes, state.gates, state.attempt))
        await self._ask(turn, modes)

    async def action_quit(self) -> None:
        """Leaves, once the prompt has done with the keys that were typed before."""
        self.main.prompt.call_later(self.exit)

    def action_stop(self) -> None:
        """Stops the answer; else leaves the editing; else goes back to the prompt."""
        if self.state.is_busy:
            self.backend.stop()
            waits = "stops as soon as the models are loaded"
            self.main.say("stopping" if self.state.loaded else waits)
        elif self.main.prompt.is_editing:
            self.main.prompt.finish()
            self.main.say("ready")
        self.main.go_back()

    def action_edit(self) -> None:
        """Brings the last question back to be changed; sending it replaces its turn."""
        if self.state.turn is None or not self.can_act():
            return
        self.main.prompt.begin_editing(self.state.turn.question)
        self.main.go_back()
        self.main.say("editing the last message: Enter asks it anew, Esc leaves it as it was")

    def _leave_editing(self) -> None:
        """Puts back what was being typed before."""
        if self.main.prompt.is_editing:
            self.main.prompt.finish()

    # --- conversations ----------------------------------------------------------------------

    async def action_new(self) -> None:
        """Begins another conversation; the last one is saved already."""
        if not self.can_act():
            return
        await self._begin_with(self.state.conversation.pair)
        self.main.say("ready")

    async def _begin_with(self, pair: Pair) -> None:
        """Begins a conversation in a file of its own."""
        old = self.state.conversation
        if self.file:
            self.file.close()
        await self._take_up(Conversation(pair, old.sampling, old.system))
        self.main.go_back()

    async def _turn_round(self, pair: Pair) -> None:
        if self.can_act():  # an answer may have begun behind the dialog
            await self._begin_with(pair)

    async def _take_up(self, talk: Conversation) -> None:
        """Goes on with a conversation, with its pair, its settings and its gates."""
        self._leave_editing()
        before = self.state.conversation.pair
        self.state.conversation, self.state.attempt = talk, 0
        await self.main.show_conversation(talk)
        self.follower.show_context()
        if talk.pair != before:
            self.main.show_pair(talk.pair)
            self.state.loaded, self.state.gates = None, ()
            self.backend.reload(talk.pair)
        self._tell_backend()

    def _tell_backend(self) -> None:
        talk = self.state.conversation
        self.backend.configure(talk.sampling, talk.system)
        self.follower.restore_gates()
        self.backend.restore({mode: talk.history(mode) for mode in MODES}, self.state.gates)

    def action_sessions(self) -> None:
        """Saved conversations to choose from."""
        if self.can_act():
            file = self.file or SessionFile()
            self.push_screen(Sessions(file, self.state.conversation), self._chosen)

    async def _chosen(self, name: str | None) -> None:
        if name is None or (self.file and name == self.file.name) or not self.can_act():
            return
        try:
            talk = self.file.load(name) if self.file else session_file.read(name)
        except C2CError as e:
            self.complain(str(e))
            return
        await self._take_up(talk)

    def action_reload(self) -> None:
        """Loads the models again, after a download that failed."""
        if self.can_act():
            self._load_again()

    def _load_again(self) -> None:
        self.state.loaded = None
        self.backend.reload(self.state.conversation.pair)
        self._tell_backend()

    def action_train(self) -> None:
        """Offers to train a fuser, goes on with it, or stops it."""
        self.training.toggle()

    def action_export(self) -> None:
        """Writes the conversation into the current folder, for people and for programs."""
        talk = self.state.conversation
        if not talk.turns:
            self.notify("there is nothing to export yet", severity="warning")
            return
        try:
            paths = export.write(talk, Path.cwd())
        except C2CError as e:
            self.complain(str(e))
            return
        self.notify("\n".join(map(str, paths)), title="Exported", markup=False)

    # --- panes, gates, screens --------------------------------------------------------------

    def action_pane(self, mode: Mode) -> None:
        """Adds or takes away a pane, and the mode with it."""
        modes = self.state.modes
        if mode in modes:
            modes.remove(mode)
        else:
            modes.append(mode)
        self.main.show_pane(mode, mode in modes)
        self.main.go_to(mode if mode in modes else "c2c")

    def on_gate_view_surgery(self, event: GateView.Surgery) -> None:
        """Closes or opens gates; an answer that is being given keeps the old ones."""
        loaded = self.state.loaded
        if loaded is not None and loaded.links:
            self.follower.set_gates(event.gates)
            if self.state.is_busy:
                self.notify("from the next answer on")

    def action_owed(self) -> None:
        """Tints C2C's words by what they owe to the sharer; the first time, it is computed."""
        state = self.state
        state.is_weighing = not state.is_weighing
        self.main.panes["c2c"].show_owed(state.is_weighing)
        if state.is_weighing:
            self.main.say("C2C's words are tinted by what they owe to the sharer; F9 ends it")
            if not state.is_busy:
                self.backend.weigh()
        elif not state.is_busy:
            self.main.say("ready")

    def action_help(self) -> None:
        """Keys, and what the numbers mean."""
        self.push_screen(Help())

    def action_menu(self) -> None:
        """What F1 to F9 do, for keyboards on which they need Fn."""

        async def chosen(action: str | None) -> None:
            if action is not None:
                await self.run_action(action)

        self.push_screen(Menu(), chosen)

    def action_settings(self) -> None:
        """System prompt and sampling."""
        talk = self.state.conversation
        self.push_screen(Settings(talk.sampling, talk.system), self._set)

    def _set(self, settings: tuple[SamplingConfig, str | None] | None) -> None:
        if settings is not None:
            self.state.conversation.sampling, self.state.conversation.system = settings
            self.backend.configure(*settings)

    def action_copy(self, mode: Mode) -> None:
        """Copies a mode's latest answer."""
        answers = [t.answers[mode] for t in self.state.conversation.turns if mode in t.answers]
        if not answers or not answers[-1].is_kept:
            self.notify(f"{NAMES[mode]} has said nothing yet", severity="warning")
            return
        self.notify(f"copied {NAMES[mode]}'s answer ({clipboard.copy(answers[-1].text, self)})")

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The command palette: Textual's own, and everything in the list of keys."""
        yield from super().get_system_commands(screen)
        for key in keys.APP:
            if key.action not in ("quit", "command_palette"):  # Textual has these
                yield SystemCommand(key.name, key.help, partial(self.run_action, key.action))

    # --- votes ------------------------------------------------------------------------------

    def action_blind(self) -> None:
        """Hides which answer is whose until there is a vote."""
        if self.can_act():
            self.state.is_blind = not self.state.is_blind
            for mode in RIVALS:
                self.main.panes[mode].say("blind" if self.state.is_blind else "")
            if self.state.is_blind:
                self.notify("blind: you vote before you see whose answer is whose; F7 ends it")

    def action_votes(self) -> None:
        """What the blind votes come to."""
        self.voting.tell()

    def on_main_screen_uncovered(self) -> None:
        """A ballot that waited can be shown."""
        self.voting.open()
