"""The screen of the conversation: panes, gates, one line of state, the prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from textual.app import ComposeResult
from textual.binding import ActiveBinding
from textual.containers import Horizontal
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer, ProgressBar, Static, Tab, Tabs

from c2c_mlx.config import Pair
from c2c_mlx.events import MODES, Failed, GateReport, Gates, Loaded, Mode
from c2c_mlx.progress import Progress
from c2c_mlx.tui import keys, race
from c2c_mlx.tui.conversation import NAMES, Answer, Conversation, Turn
from c2c_mlx.tui.widgets.gate_panel import GatePanel
from c2c_mlx.tui.widgets.pane import AnswerPane
from c2c_mlx.tui.widgets.prompt import Prompt

TABS = {
    **{"c2c": "C2C", "relay": "Relay", "receiver": "Receiver", "sharer": "Sharer"},
    "gates": "Gates",
}


class MainScreen(Screen[None]):
    """Shows what it is told; what there is to tell is the app's business.

    Args:
        modes: whose panes are shown at first.
    """

    class Uncovered(Message):
        """The last dialog has been closed."""

    def __init__(self, modes: Sequence[Mode]) -> None:
        super().__init__()
        self.panes = {mode: AnswerPane(mode) for mode in MODES}
        self.gate_panel = GatePanel()
        self.prompt = Prompt()
        # Not Textual's Header: one whose title changes while the app ends brings it down.
        self._title = Static("", id="title", markup=False)
        self._state = Static("starting", id="state", markup=False)
        self._loading = ProgressBar(id="loading", show_eta=False)
        self._tabs = Tabs(*(Tab(name, id=f"tab-{key}") for key, name in TABS.items()))
        self._shown = tuple(modes)
        self._before_gates = "c2c"

    def compose(self) -> ComposeResult:
        """Everything is there from the first paint on; models come later."""
        yield self._title
        yield self._tabs
        with Horizontal(id="panes"):
            yield from self.panes.values()
            yield self.gate_panel
        with Horizontal(id="status"):
            yield self._state
            yield self._loading
        yield self.prompt
        yield Footer()

    @property
    def active_bindings(self) -> dict[str, ActiveBinding]:
        """In the order of the list of keys, for the footer: what has the focus first."""
        order = {key.action: at for at, key in enumerate(keys.APP)}
        found = super().active_bindings.items()
        return dict(sorted(found, key=lambda item: order.get(item[1].binding.action, -1)))

    def on_mount(self) -> None:
        """Hides the panes of modes that do not answer."""
        for mode in MODES:
            self.show_pane(mode, mode in self._shown)

    def say(self, text: str, is_error: bool = False) -> None:
        """The line between the panes and the prompt."""
        self._state.update(text)
        self._state.set_class(is_error, "-error")

    def show_pane(self, mode: Mode, is_shown: bool) -> None:
        """Shows or hides a pane, and its tab."""
        self.panes[mode].set_class(is_shown, "-shown")
        self._show_tab(mode, is_shown)

    # --- loading, the fuser -----------------------------------------------------------------

    def show_progress(self, event: Progress) -> None:
        """A download, a conversion, a load."""
        self._loading.add_class("-shown")
        self._loading.update(total=event.total or None, progress=event.done)
        self.say(event.what)

    def end_progress(self) -> None:
        """Nothing is being loaded any more."""
        self._loading.remove_class("-shown")

    def show_pair(self, pair: Pair) -> None:
        """Who talks to whom, before anything is loaded."""
        self._title.update(f"{short(pair.receiver)} ← {several(pair.sharers)}")
        self.panes["c2c"].training.hide()

    def show_fuser(self, loaded: Loaded, gates: tuple[Gates, ...], memory_gb: float) -> None:
        """Says in the header and on the pane which fuser it is, and whether it is itself."""
        n = sum(
            a != b
            for both in zip(gates, loaded.gates, strict=True)
            for ours, own in zip(*both, strict=True)
            for a, b in zip(ours, own, strict=True)
        )
        modified = f" (modified: {n} {'gate' if n == 1 else 'gates'})" if n else ""
        self.panes["c2c"].border_title = f"{NAMES['c2c']}{modified}"
        fusers = several(link.fuser for link in loaded.links)
        fuser = f"fuser {fusers}{modified}" if fusers else "no fuser"
        pair = f"{short(loaded.receiver)} ← {several(loaded.sharers) or 'no sharer'}"
        self._title.update(f"{pair} · {fuser} · {loaded.device} · {memory_gb:.1f} GB")

    def show_missing(self, loaded: Loaded) -> None:
        """Says on a pane why nobody can answer there, should that be so, and what can be done."""
        pane = self.panes["c2c"]
        pane.advise("" if loaded.links else _advice(loaded))
        pane.say("" if loaded.links else "no fuser")
        for mode in ("relay", "sharer"):
            self.panes[mode].say("the sharer is elsewhere" if loaded.is_elsewhere else "")

    def show_reports(self, reports: Sequence[Sequence[GateReport]]) -> None:
        """The gates, turn by turn."""
        self.gate_panel.view.show_reports(reports)

    def show_context(self, loaded: Loaded | None, answers: Sequence[Answer]) -> None:
        """How much of the receiver's context the longest conversation takes."""
        figures = [a.figures for a in answers if a.figures]
        used = max((f.prompt_tokens + f.generated_tokens for f in figures), default=0)
        if loaded is not None:
            total = loaded.context_length
            filled = min(-(-8 * used // total), 8)
            self.prompt.border_subtitle = f"context {'▰' * filled:▱<8} {used} of {total}"

    # --- a turn -----------------------------------------------------------------------------

    async def begin(self, turn: Turn, modes: Sequence[Mode]) -> None:
        """Puts the question, or another take of it, into the panes of those that are asked."""
        for mode in modes:
            await self.panes[mode].begin(turn)
            self.panes[mode].say("waiting")

    async def write(self, mode: Mode, text: str, is_relayed: bool) -> None:
        """Adds to an answer, or to what the sharer writes for it."""
        turn = self.panes[mode].turn
        if turn is not None:
            await (turn.take.write_relayed if is_relayed else turn.take.write)(text)

    def run_in(self, mode: Mode, doing: str) -> None:
        """Marks the pane whose turn it is."""
        pane = self.panes[mode]
        pane.say(doing)
        if not pane.has_class("-running"):
            for other in self.panes.values():
                other.set_class(other is pane, "-running")
            self.say(f"{NAMES[mode]} answers; one after the other, so that the times are true")

    def finish(self, mode: Mode, answer: Answer) -> None:
        """How an answer ended, and what it cost."""
        turn, figures = self.panes[mode].turn, answer.figures
        if turn is not None:
            turn.take.finish(answer)
        if figures and figures.generated_tokens:
            self.panes[mode].say(f"{race.seconds(figures.first_token_s)} to first token")
        else:
            self.panes[mode].say("no answer")

    def fail(self, event: Failed) -> None:
        """An answer, or a load, that came to nothing."""
        if event.mode is None:
            self.end_progress()
            self.say(event.message, is_error=True)
            return
        pane = self.panes[event.mode]
        pane.say("no answer")
        if pane.turn is not None:
            pane.turn.take.note(event.message)

    def end_turn(self) -> None:
        """Nobody answers any more."""
        for pane in self.panes.values():
            pane.remove_class("-running")
            if pane.border_subtitle == "waiting":
                pane.say("not asked")
                if pane.turn is not None:
                    pane.turn.take.note("stopped before it was asked")

    async def reveal(self, answers: Mapping[Mode, Answer]) -> None:
        """Shows what a blind turn kept back."""
        for mode, answer in answers.items():
            turn = self.panes[mode].turn
            if turn is not None:
                await turn.take.show(answer)
            self.panes[mode].say("")

    async def drop_turn(self, turn: Turn) -> None:
        """Takes a turn out of the panes that have it."""
        for pane in self.panes.values():
            await pane.drop(turn)

    async def show_conversation(self, conversation: Conversation) -> None:
        """Fills everything from a conversation, whatever was there."""
        for mode, pane in self.panes.items():
            await pane.clear()
            for turn in conversation.turns:
                if answer := turn.answers.get(mode):
                    await (await pane.begin(turn)).show(answer)
        self.prompt.remember(*(turn.question for turn in conversation.turns))
        self.show_reports([turn.reports for turn in conversation.turns])

    def on_screen_resume(self) -> None:
        """No dialog is above it any more."""
        self.post_message(self.Uncovered())

    # --- narrow terminals -------------------------------------------------------------------

    def go_to(self, tab: str) -> None:
        """The pane that is seen where there is room for one."""
        self._tabs.active = f"tab-{tab}"

    def go_back(self) -> None:
        """The prompt, and from the gates the pane that was seen before them."""
        if self._tabs.active == "tab-gates":
            self.go_to(self._before_gates)
        self.prompt.focus()

    def _show_tab(self, tab: str, is_shown: bool) -> None:
        if is_shown:
            self._tabs.show(f"tab-{tab}")
        else:
            self._tabs.hide(f"tab-{tab}")

    def action_next_tab(self) -> None:
        """The next pane, on a narrow terminal."""
        self._tabs.action_next_tab()

    def action_gates(self) -> None:
        """Goes to the gates, and back."""
        if self.gate_panel.view.has_focus:
            self.go_back()
        else:
            self._show_gates(True)
            self.go_to("gates")
            self.call_after_refresh(self.gate_panel.view.focus)

    def action_hide_gates(self) -> None:
        """Hides the gate panel, or shows it."""
        self.go_back()
        self._show_gates(self.gate_panel.has_class("-hidden"))

    def _show_gates(self, is_shown: bool) -> None:
        self.gate_panel.set_class(not is_shown, "-hidden")
        self._show_tab("gates", is_shown)

    def on_tabs_tab_activated(self, event: Tabs.TabActivated) -> None:
        """One pane is seen at a time; the others keep what they have."""
        chosen = str(event.tab.id).removeprefix("tab-")
        if chosen != "gates":
            self._before_gates = chosen
        for pane in self.query(".pane"):
            pane.set_class(pane.id == chosen, "-tab")


def short(name: str) -> str:
    """A folder or hub id by its last part."""
    return name.rstrip("/").rsplit("/", 1)[-1]


def several(names: Iterable[str]) -> str:
    """Names in short, with commas between; one that is there twice is counted."""
    counts = Counter(map(short, names))
    return ", ".join(f"{name} ×{n}" if n > 1 else name for name, n in counts.items())


def _advice(loaded: Loaded) -> str:
    """What is missing for C2C, and what can be done about it from here."""
    receiver, sharers = loaded.receiver, loaded.sharers
    lines = [f"C2C cannot answer: {loaded.missing or 'there is no fuser'}", "", "What can be done:"]
    if sharers:
        models = f"--sharer {sharers[0]} --receiver {receiver}"
        lines += [
            "· train one here, now: Ctrl+S; or, after leaving, on data of your own:",
            f"  c2c-train {models}",
            *(
                [f"· turn the pair round: Ctrl+S, R, for {loaded.reverse}"]
                if loaded.reverse
                else []
            ),
            f"· name one that you have:  c2c-chat {models} --fuser FOLDER",
            "· meanwhile the text relay answers, and Ctrl+O has the receiver answer alone",
        ]
    else:
        lines += [
            "· after a download that failed: Ctrl+P, Load again",
            "· meanwhile Ctrl+O has the receiver answer alone",
        ]
    return "\n".join(lines)
