"""What there is for a pair without a fuser: to train one, or to turn the pair round."""

from __future__ import annotations

from rich.table import Table
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Footer, Static

from c2c_mlx.events import Loaded
from c2c_mlx.tui import keys

REVERSE = "reverse"


class Offer(ModalScreen[float | str | None]):
    """Dismissed with the seconds to train for, `REVERSE`, or None.

    Args:
        loaded: the pair, with what is known about it.
    """

    BINDINGS = keys.bindings(keys.OFFER)

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self.loaded = loaded

    def compose(self) -> ComposeResult:
        """What can be chosen, by its keys."""
        loaded = self.loaded
        table = Table.grid(padding=(0, 2))
        for key in keys.OFFER[:-1]:
            if key.action != "reverse":
                table.add_row(keys.shown(key.keys), key.name, key.help)
            elif loaded.reverse:
                whose = f"{loaded.sharers[0]} ← {loaded.receiver}, by the fuser {loaded.reverse}"
                table.add_row(keys.shown(key.keys), key.name, whose)
        with Vertical(id="offer", classes="window") as window:
            window.border_title = "no fuser for this pair: train one?"
            window.border_subtitle = keys.hint(keys.OFFER[-1:])
            yield Static(
                "Both models stay as they are; the fuser between them learns, in this app, while "
                "the other panes go on answering. First the data is read and ten steps are tried; "
                "then the plan says how many steps, how long, how much memory. Ctrl+S stops, "
                "leaving the app does, too; what was learned is kept and goes on with Ctrl+S.\n",
                markup=False,
            )
            yield Static(table)
        yield Footer()

    def action_train(self, seconds: float) -> None:
        """For so long."""
        self.dismiss(seconds)

    def action_reverse(self) -> None:
        """The receiver is read, the sharer answers."""
        if self.loaded.reverse:
            self.dismiss(REVERSE)
