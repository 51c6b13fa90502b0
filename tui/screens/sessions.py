"""Saved conversations to choose from."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option


class Sessions(ModalScreen[str | None]):
    """A list, the latest first; dismissed with a name, or None."""

    BINDINGS = [("escape", "dismiss(None)", "Close")]

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def compose(self) -> ComposeResult:
        """The list, or why there is none."""
        with Vertical(classes="window") as window:
            window.border_title = "sessions"
            window.border_subtitle = "Enter opens, Esc closes"
            if self.names:
                yield OptionList(*(Option(name, id=name) for name in self.names), markup=False)
            else:
                yield Static("nothing has been saved yet: ask something first")

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """The chosen one."""
        self.dismiss(event.option.id)
