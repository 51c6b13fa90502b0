"""A blind vote: two answers, nobody says whose."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Footer, Markdown

from c2c_mlx.tui import keys
from c2c_mlx.tui.votes import Choice
from c2c_mlx.tui.widgets import wording
from c2c_mlx.tui.widgets.harmless import harmless


class Ballot(ModalScreen[Choice | None]):
    """Dismissed with the better mode, `tie`, or None for no vote.

    Args:
        c2c: C2C's answer.
        relay: the relay's.
        swapped: whether the relay's stands on the left.
    """

    BINDINGS = keys.bindings(keys.BALLOT)

    def __init__(self, c2c: str, relay: str, swapped: bool) -> None:
        super().__init__()
        candidates: list[tuple[Choice, str]] = [("c2c", c2c), ("relay", relay)]
        self.candidates = candidates[::-1] if swapped else candidates

    def compose(self) -> ComposeResult:
        """A left, B right."""
        with Vertical(id="ballot", classes="window") as window:
            window.border_title = "which answer is better?"
            window.border_subtitle = keys.hint(keys.BALLOT)
            with Horizontal(classes="answers"):
                for name, (_, text) in zip("AB", self.candidates, strict=True):
                    with VerticalScroll(classes="candidate") as candidate:
                        candidate.border_title = name
                        yield Markdown(
                            harmless(text), parser_factory=wording.parser, open_links=False
                        )
        yield Footer()

    def action_vote(self, which: int) -> None:
        """A is 0, B is 1."""
        self.dismiss(self.candidates[which][0])
