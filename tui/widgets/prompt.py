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
        self._recalled = ""  # the question that stands there, maybe edited; empty: a new one
        self._typed: dict[str, str] = {}  # by the question that it was when it was leafed away
        # What stood there, and both of these, before another text was given to be edited.
        self._before: tuple[str, str, dict[str, str]] | None = None

    def remember(self, *questions: str) -> None:
        """Puts questions at the end of the history, each of which is in it once."""
        self.asked = [q for q in self.asked if q not in questions] + list(dict.fromkeys(questions))

    def show(self, text: str) -> None:
        """Replaces what stands there, cursor at the end."""
        self.text = text
        self.move_cursor(self.document.end)

    @property
    def is_editing(self) -> bool:
        """Whether what stands there takes the place of something."""
        return self._before is not None

    def begin_editing(self, text: str) -> None:
        """Shows a text to be edited; `finish` brings back what was being typed."""
        self._before = self._before or (self.text, self._recalled, self._typed)
        self._recalled, self._typed = "", {}
        self.show(text)

    def finish(self) -> None:
        """Done with what stands there: shows what was being typed before it was recalled."""
        draft = self._typed.get("", "") if self._recalled else ""
        before, self._before = self._before or (draft, "", {}), None
        text, self._recalled, self._typed = before
        self.show(text)

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
        """One row up; on the first row one question back."""
        is_first = self.navigator.is_first_wrapped_line(self.cursor_location)
        if select or not is_first or self._recalled == [*self.asked, ""][0]:
            super().action_cursor_up(select)
        else:
            self._leaf(-1)

    def action_cursor_down(self, select: bool = False) -> None:
        """One row down; on the last row one question on."""
        is_last = self.navigator.is_last_wrapped_line(self.cursor_location)
        if select or not is_last or not self._recalled:
            super().action_cursor_down(select)
        else:
            self._leaf(1)

    def _leaf(self, step: int) -> None:
        self._typed[self._recalled] = self.text
        places = [*self.asked, ""]
        self._recalled = places[places.index(self._recalled) + step]
        self.show(self._typed.get(self._recalled, self._recalled))
