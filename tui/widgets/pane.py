"""One mode's conversation: questions, relayed texts, answers, what they cost."""

from __future__ import annotations

from rich.text import Text as RichText
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.widgets import Collapsible, Markdown, Static

from c2c_mlx.events import Mode
from c2c_mlx.talk import relay
from c2c_mlx.tui import race
from c2c_mlx.tui.conversation import NAMES, Answer


def harmless(text: str) -> str:
    """A model's text without characters that a terminal would act upon."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


class AnswerText(Markdown):
    """Markdown that grows; links are shown, never opened.

    Not by Markdown's own stream: stopping one may append while the last append is still at work.
    """

    def __init__(self, classes: str) -> None:
        super().__init__(classes=classes, open_links=False)

    async def write(self, text: str) -> None:
        """Adds a piece, and returns when it is drawn: one piece at a time."""
        if text:
            await self.append(harmless(text))


class TurnView(Vertical):
    """One question and one mode's answer to it."""

    def __init__(self, question: str, mode: Mode) -> None:
        super().__init__(classes="turn")
        self.question, self.mode = question, mode
        self._question = Static(RichText(harmless(question)), classes="question")
        self._relayed = AnswerText("relayed")
        self._fold = Collapsible(
            self._relayed, title="the sharer writes for the receiver", collapsed=False
        )
        self._fold.display = False  # until there is something in it
        self._answer = AnswerText("answer")
        self._cost = Static("", classes="cost", markup=False)
        self._begun = False

    def compose(self) -> ComposeResult:
        """The parts from top to bottom; the fold of the relayed text shows in the relay alone."""
        yield self._question
        yield self._fold
        yield self._answer
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

    def note(self, text: str) -> None:
        """The line below the answer."""
        self._cost.update(text)


class AnswerPane(Vertical):
    """A mode's whole conversation, with its name and state on the border."""

    def __init__(self, mode: Mode) -> None:
        super().__init__(id=mode, classes="pane")
        self.mode = mode
        self.border_title = NAMES[mode]
        self.turn: TurnView | None = None
        purpose = Static(_PURPOSE[mode], classes="purpose", markup=False)
        self._turns = Vertical(purpose, classes="turns")
        self._scroll = VerticalScroll(self._turns, classes="scroll")

    def compose(self) -> ComposeResult:
        """Turns are mounted as they come."""
        yield self._scroll

    def say(self, state: str) -> None:
        """What the mode is doing, on the border."""
        self.border_subtitle = state

    async def begin(self, question: str) -> TurnView:
        """Mounts a new turn and scrolls with it from now on."""
        self.turn = TurnView(question, self.mode)
        await self._turns.mount(self.turn)
        self._scroll.anchor()
        return self.turn

    async def drop_last(self) -> None:
        """Takes the last turn away."""
        if self.turn is not None:
            views = list(self.query(TurnView))
            await views[-1].remove()
            self.turn = views[-2] if len(views) > 1 else None

    async def clear(self) -> None:
        """Takes all turns away."""
        await self.query(TurnView).remove()
        self.turn = None
        self.say("")


_PURPOSE: dict[Mode, str] = {
    "c2c": "The receiver answers from its cache with the sharer's fused into it.",
    "relay": "The sharer writes a text, the receiver reads it and answers.",
    "receiver": "The receiver answers alone.",
    "sharer": "The sharer answers alone.",
}
