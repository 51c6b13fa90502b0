"""Saved conversations: a list with a look into each, to open, rename or delete."""

from __future__ import annotations

import asyncio

from textual import events
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from c2c_mlx.errors import C2CError
from c2c_mlx.tui import keys, session_file
from c2c_mlx.tui.conversation import Conversation
from c2c_mlx.tui.session_file import SessionFile, Summary
from c2c_mlx.tui.widgets.harmless import harmless

NOTHING = "nothing has been saved yet: ask something first"


class Sessions(ModalScreen[str | None]):
    """A list, the latest first; dismissed with a name, or None.

    Args:
        file: of the conversation that is open here.
        talk: that conversation.
    """

    BINDINGS = keys.bindings([key for key in keys.SESSIONS if key.action != "open"])

    def __init__(self, file: SessionFile, talk: Conversation) -> None:
        super().__init__()
        self.file, self.talk = file, talk
        self.summaries: dict[str, Summary] = {}
        self._doomed = ""  # asked once whether it is to be deleted
        self._list = OptionList(markup=False)
        self._preview = Static("", markup=False)
        self._title = Input(placeholder="another title; Enter keeps it", compact=True)
        self._title.display = False

    def compose(self) -> ComposeResult:
        """The list on the left, on the right what is under its cursor."""
        with Vertical(id="sessions", classes="window") as window:
            window.border_title = "sessions"
            window.border_subtitle = keys.hint(keys.SESSIONS)
            with Horizontal(classes="columns"):
                yield self._list
                with VerticalScroll(can_focus=False):
                    yield self._preview
            yield self._title

    async def on_mount(self) -> None:
        """Names are there at once; titles as soon as the files have been read."""
        names = session_file.names()
        self._list.add_options(Option(name, id=name) for name in names)
        self._preview.update("" if names else NOTHING)
        self._list.highlighted = 0 if names else None
        self._list.focus()
        self.run_worker(self._read(names))

    async def _read(self, names: list[str]) -> None:
        for name in names:
            found = await asyncio.to_thread(session_file.summary, name)
            if name in self._names():
                self._show(found)

    def _names(self) -> list[str]:
        return [str(option.id) for option in self._list.options]

    def _show(self, found: Summary) -> None:
        self.summaries[found.name] = found
        mark = "●" if found.name == self.file.name else " "  # the one that is open here
        prompt = f"{mark} {found.when:%d %b %H:%M}  {harmless(found.title)}"
        self._list.replace_option_prompt(found.name, prompt)
        if found.name == self._chosen():
            self._look()

    def _chosen(self) -> str:
        at = self._list.highlighted
        return "" if at is None else str(self._list.get_option_at_index(at).id)

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """A look into it."""
        self._look()

    def _look(self) -> None:
        self._doomed = ""
        found = self.summaries.get(self._chosen())
        self._preview.update(harmless(found.preview) if found else "")

    def on_key(self, event: events.Key) -> None:
        """Spares what was to be deleted, at any other key."""
        if self._doomed and event.key != "d":
            self._look()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """The chosen one."""
        self.dismiss(event.option.id)

    def action_leave(self) -> None:
        """Leaves the renaming, else the list."""
        if self._title.display:
            self._title.display = False
            self._list.focus()
        else:
            self.dismiss(None)

    def action_rename(self) -> None:
        """Asks for another title."""
        if found := self.summaries.get(self._chosen()):
            self._title.value = found.title
            self._title.display = True
            self._title.focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Keeps the title."""
        name, title = self._chosen(), event.value.strip()
        self.action_leave()
        if not title:
            return
        try:
            if name == self.file.name:
                self.talk.title = title
                self.file.save(self.talk)
            else:
                self.file.rename(name, title)
        except C2CError as e:
            self.notify(str(e), severity="error", markup=False)
        self._show(session_file.summary(name))

    def action_delete(self) -> None:
        """Deletes the session under the cursor, at the second time of asking."""
        name = self._chosen()
        if not name:
            return
        if name != self._doomed:
            self._doomed = name
            self._preview.update("D once more deletes it for good; any other key does not")
            return
        try:
            self.file.delete(name)
        except C2CError as e:
            self.notify(str(e), severity="error", markup=False)
            return
        self._list.remove_option(name)
        self.summaries.pop(name, None)
        if not self._list.option_count:
            self._preview.update(NOTHING)
