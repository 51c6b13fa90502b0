"""What is on F1 to F9, by digit: for keyboards on which those need Fn."""

from __future__ import annotations

from rich.table import Table
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from c2c_mlx.tui import keys


class Menu(ModalScreen[str | None]):
    """Dismissed with an action of the app, or None."""

    BINDINGS = [
        *(Binding(digit, f"choose({digit})", key.name) for digit, key in keys.numbered()),
        Binding("escape,ctrl+l", "dismiss(None)", "closes"),
    ]

    def compose(self) -> ComposeResult:
        """A row per digit."""
        table = Table.grid(padding=(0, 2))
        for digit, key in keys.numbered():
            table.add_row(digit, f"F{digit}", key.name, key.help)
        with Vertical(classes="window") as window:
            window.border_title = "more"
            window.border_subtitle = "a digit chooses · Esc closes"
            yield Static(table)

    def action_choose(self, digit: int) -> None:
        """Closes the menu first: keys of the app do nothing below a dialog."""
        self.dismiss(dict(keys.numbered())[str(digit)].action)
