"""The line at the bottom: several lines if need be, with the questions of before."""

from __future__ import annotations

from textual import events
from textual.widgets import TextArea

from c2c_mlx.tui import keys

_ACTIONS = {name: key.action for key in keys.PROMPT for name in key.keys.split(",")}


class Prompt(TextArea):
    """Enter sends, ctrl+j or shift+enter begins a line, up and down leaf through the history."""

    BINDINGS = keys.bindings(keys.PROMPT)

    def __init__(self) -> None:
        super().__init__(
            id="prompt",
            compact=True,
            highlight_cursor_line=False,
            placeholder="Ask both; Enter sends, Ctrl+J begins a new line",
        )
        self.asked: list[str] = []
        self._at = 0  # in the history; its length: what is being typed
        self._draft = ""

    def remember(self, *questions: str) -> None:
        """Puts questions at the end of the history, each of which is in it once."""
        self.asked = [q for q in self.asked if q not in questions] + list(dict.fromkeys(questions))
        self._at = len(self.asked)

    def show(self, text: str) -> None:
        """Replaces what stands there, cursor at the end."""
        self.text = text
        self.move_cursor(self.document.end)

    async def _on_key(self, event: events.Key) -> None:
        """Its own keys in their turn, behind the letters that were typed before them."""
        if event.key not in _ACTIONS:
            await super()._on_key(event)
            return
        event.stop()
        event.prevent_default()
        await self.run_action(_ACTIONS[event.key])

    def action_new_line(self) -> None:
        """Begins a line."""
        self.insert("\n")

    def action_cursor_up(self, select: bool = False) -> None:
        """One line up; on the first line one question back."""
        if select or self.cursor_location[0] > 0 or self._at == 0:
            super().action_cursor_up(select)
            return
        if self._at == len(self.asked):
            self._draft = self.text
        self._at -= 1
        self.show(self.asked[self._at])

    def action_cursor_down(self, select: bool = False) -> None:
        """One line down; on the last line one question on."""
        last = self.document.line_count - 1
        if select or self.cursor_location[0] < last or self._at == len(self.asked):
            super().action_cursor_down(select)
            return
        self._at += 1
        self.show(self._draft if self._at == len(self.asked) else self.asked[self._at])
