"""One mode's conversation: questions, relayed texts, answers, what they cost."""

from __future__ import annotations

from dataclasses import replace

from rich.text import Text as RichText
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Collapsible, Markdown, Static

from c2c_mlx.events import Crossed, Mode
from c2c_mlx.talk import relay
from c2c_mlx.tui import owed, race
from c2c_mlx.tui.conversation import NAMES, Answer, Turn
from c2c_mlx.tui.widgets import wording
from c2c_mlx.tui.widgets.harmless import harmless
from c2c_mlx.tui.widgets.training import TrainingView

SIDE_BY_SIDE = 46  # columns of a turn, from which two answers stand beside each other


class AnswerText(Markdown):
    """Markdown that grows; links are shown, never opened.

    Not by Markdown's own stream: stopping one may append while the last append is still at work.
    """

    def __init__(self, classes: str) -> None:
        super().__init__(classes=classes, parser_factory=wording.parser, open_links=False)

    async def write(self, text: str) -> None:
        """Adds a piece, and returns when it is drawn: one piece at a time; none, if it is gone."""
        if text and self.is_attached:  # while the app ends, it may have left the screen
            await self.append(harmless(text))


class TakeView(Vertical):
    """One mode's answer: what was relayed for it, its text, what it cost."""

    def __init__(self, mode: Mode, title: str = "") -> None:
        super().__init__(classes="take")
        self.mode = mode
        self._title = Static(title, classes="take-title", markup=False)
        self._title.display = bool(title)
        self._relayed = AnswerText("relayed")
        self._fold = Collapsible(
            self._relayed, title="the sharer writes for the receiver", collapsed=False
        )
        self._fold.display = False  # until there is something in it
        self._answer = AnswerText("answer")
        self._owed = Static("", classes="owed", markup=False)
        self._owed.display = False  # until it is known, and wanted
        self._crossed: Crossed | None = None
        self._cost = Static("", classes="cost", markup=False)
        self._begun = False

    def compose(self) -> ComposeResult:
        """The parts from top to bottom; the fold of the relayed text shows in the relay alone."""
        yield self._title
        yield self._fold
        yield self._answer
        yield self._owed
        yield self._cost

    async def write_relayed(self, text: str) -> None:
        """Adds to what the sharer wrote."""
        if text:
            self._fold.display = True
            await self._relayed.write(text)

    async def write(self, text: str) -> None:
        """Adds to the answer."""
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        await self._answer.write(text)

    async def show(self, answer: Answer) -> None:
        """Fills an empty view with an answer from a file."""
        await self.write_relayed(answer.relayed_text)
        await self.write(answer.text)
        self.finish(answer)

    def finish(self, answer: Answer) -> None:
        """Says how it ended and what it cost."""
        if self.mode == "relay" and answer.figures:
            n, wrote = answer.figures.relayed_tokens, "nothing"
            if answer.relayed_text:
                wrote = f"{n} tokens"
            elif answer.reason != "stopped":
                wrote = f"nothing: {relay.why_nothing(n)}"
            self._fold.title, self._fold.display = f"the sharer wrote {wrote}", True
        ended = {"stopped": "stopped · ", "length": "at the limit of tokens · "}
        if answer.figures:
            said = "" if answer.is_kept else "no answer, so not part of the conversation · "
            self.note(said + ended.get(answer.reason, "") + race.cost(answer.figures))
        elif not answer.reason:
            self.note("it did not come to its end" if answer.is_kept else "no answer was given")

    def weigh(self, crossed: Crossed) -> None:
        """Takes in what its words owe to the sharer."""
        self._crossed = replace(crossed, tokens=tuple(map(harmless, crossed.tokens)))

    def show_owed(self, is_shown: bool) -> None:
        """Shows the words tinted in the place of the answer, as far as that is known."""
        is_shown = is_shown and self._crossed is not None
        if is_shown and self._crossed:
            is_dark = self.app.current_theme.dark
            text = owed.tinted(self._crossed, is_dark)
            self._owed.update(text + "\n" + owed.legend(is_dark))
        self._owed.display, self._answer.display = is_shown, not is_shown

    def note(self, text: str) -> None:
        """The line below the answer."""
        self._cost.update(text)


class TurnView(Vertical):
    """One question and one mode's answer to it; two, after gates were closed or opened."""

    def __init__(self, turn: Turn, mode: Mode) -> None:
        super().__init__(classes="turn")
        self.turn, self.mode = turn, mode
        self._question = Static(RichText(harmless(turn.question)), classes="question")
        self._takes = Horizontal(*self._views(), classes="takes")

    def compose(self) -> ComposeResult:
        """The question above, the answers side by side."""
        yield self._question
        yield self._takes

    def _views(self) -> list[TakeView]:
        """One for the latest take, beside one for the take before if the two are to be compared."""
        compared = self.turn.comparison(self.mode)
        before, after = map(self.turn.gates_in_words, compared) if compared else ("", "")
        self.take = TakeView(self.mode, f"after: {after}" if compared else "")
        self._earlier = TakeView(self.mode, f"before: {before}") if compared else None
        if self._earlier is None:
            return [self.take]
        self._earlier.add_class("-before")
        return [self._earlier, self.take]

    async def begin_again(self) -> None:
        """Makes room for another take."""
        await self._takes.remove_children()
        await self._takes.mount(*self._views())

    async def show_earlier(self) -> None:
        """Fills the view of the take before."""
        compared = self.turn.comparison(self.mode)
        if self._earlier and compared:
            await self._earlier.show(compared[0].answers[self.mode])

    def on_resize(self) -> None:
        """Side by side, or one above the other where a column would hold a few words only."""
        self.set_class(self.size.width < SIDE_BY_SIDE, "-stacked")


class AnswerPane(Vertical):
    """A mode's whole conversation, with its name and state on the border."""

    def __init__(self, mode: Mode) -> None:
        super().__init__(id=mode, classes="pane")
        self.mode = mode
        self.border_title = NAMES[mode]
        self.turn: TurnView | None = None
        self._purpose = Static(_PURPOSE[mode], classes="purpose", markup=False)
        self._turns = Vertical(self._purpose, classes="turns")
        self._scroll = VerticalScroll(self._turns, classes="scroll")
        self.training = TrainingView()

    def compose(self) -> ComposeResult:
        """Turns are mounted as they come; only C2C's pane ever shows its training."""
        yield self._scroll
        yield self.training

    def say(self, state: str) -> None:
        """What the mode is doing, on the border."""
        self.border_subtitle = state

    def advise(self, text: str) -> None:
        """Says above the turns why the mode cannot answer and what to do; empty: it can."""
        self._purpose.update(text or _PURPOSE[self.mode])
        self._purpose.set_class(bool(text), "-missing")

    async def begin(self, turn: Turn) -> TakeView:
        """Makes room for a turn's latest take, and scrolls with it from now on."""
        if self.turn is None or self.turn.turn is not turn:
            self.turn = TurnView(turn, self.mode)
            await self._turns.mount(self.turn)
        else:
            await self.turn.begin_again()
        await self.turn.show_earlier()
        self.set_class(turn.comparison(self.mode) is not None, "-comparing")
        self._scroll.anchor()
        return self.turn.take

    def weigh(self, crossed: Crossed) -> None:
        """Hands it to the answer that it is about."""
        text = harmless("".join(crossed.tokens))
        for view in reversed(list(self.query(TurnView))):
            answer = view.turn.answers.get(self.mode)
            if answer and answer.reason and harmless(answer.text).strip() == text.strip():
                view.take.weigh(crossed)
                return

    def show_owed(self, is_shown: bool) -> None:
        """Tints the words of all answers of which it is known, or stops it."""
        for view in self.query(TakeView):
            view.show_owed(is_shown)

    async def drop(self, turn: Turn) -> None:
        """Takes a turn away, if it is here."""
        for view in self.query(TurnView):
            if view.turn is turn:
                await view.remove()
        views = list(self.query(TurnView))
        self.turn = views[-1] if views else None
        self.set_class(
            self.turn is not None and self.turn.turn.comparison(self.mode) is not None, "-comparing"
        )

    async def clear(self) -> None:
        """Takes all turns away."""
        await self.query(TurnView).remove()
        self.turn = None
        self.remove_class("-comparing")
        self.say("")


_PURPOSE: dict[Mode, str] = {
    "c2c": "The receiver answers from its cache with the sharer's fused into it.",
    "relay": "The sharer writes a text, the receiver reads it and answers.",
    "receiver": "The receiver answers alone.",
    "sharer": "The sharer answers alone.",
}
