"""System prompt and sampling."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, Static, TextArea

from c2c_mlx.config import SamplingConfig, from_dict
from c2c_mlx.errors import C2CError
from c2c_mlx.tui import keys

_FIELDS = {
    "max_tokens": "limit of tokens",
    "temp": "temperature",
    "top_p": "top-p",
    "seed": "seed",
}


class Settings(ModalScreen[tuple[SamplingConfig, str | None] | None]):
    """A form; dismissed with the new settings, or None."""

    BINDINGS = keys.bindings(keys.SETTINGS)

    def __init__(self, sampling: SamplingConfig, system: str | None) -> None:
        super().__init__()
        self.sampling, self.system = sampling, system

    def compose(self) -> ComposeResult:
        """A field per setting, the same for every mode."""
        with Vertical(classes="window") as window:
            window.border_title = "settings, the same for every answer"
            window.border_subtitle = keys.hint(keys.SETTINGS)
            with VerticalScroll():
                with Horizontal(classes="field"):
                    yield Label("system prompt")
                    yield TextArea(self.system or "", id="system", compact=True)
                for name, title in _FIELDS.items():
                    with Horizontal(classes="field"):
                        yield Label(title)
                        yield Input(_in_full(getattr(self.sampling, name)), id=name, compact=True)
                yield Static("temperature 0 is greedy", id="problem", markup=False)
                with Horizontal(classes="buttons"):
                    yield Button("Cancel", id="cancel", compact=True)
                    yield Button("Save", id="save", variant="primary", compact=True)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Save or cancel."""
        if event.button.id == "save":
            self.action_take()
        else:
            self.dismiss(None)

    def on_input_submitted(self) -> None:
        """Enter in a field saves."""
        self.action_take()

    def action_take(self) -> None:
        """Takes the settings over, or says which one can't be."""
        values: dict[str, object] = {}
        for name in _FIELDS:
            text = self.query_one(f"#{name}", Input).value.strip()
            convert = float if name in ("temp", "top_p") else int
            try:
                values[name] = convert(text)
            except ValueError:
                values[name] = text  # not a number: refused below, by name
        try:
            sampling = from_dict(SamplingConfig, values, "settings")
        except C2CError as e:
            self.query_one("#problem", Static).update(str(e))
            return
        system = self.query_one("#system", TextArea).text.strip()
        self.dismiss((sampling, system or None))


def _in_full(value: float) -> str:
    """Every digit, for what stands in the field is taken over again: 0.7, 1, 12345678901."""
    return repr(value).removesuffix(".0")
