"""The help: keys, and what the numbers mean."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from textual.app import ComposeResult
from textual.containers import Container, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Markdown, Static

from c2c_mlx.tui import keys
from c2c_mlx.tui.keys import Key

TEXT = """\
**Gate** (● open, ○ closed): learned, one per layer for keys and one for values. Part of the fuser,
the same for every prompt. A closed one lets nothing of the sharer in.

**Weight** (0 to 1): how much of the projection is let in *for this prompt*, a mean over heads. It
is 0 where nothing was added.

**Change**: the size of what was added, against the size of the receiver's own keys or values. A
high weight can mean a small change, and the other way round.

**Owed** (F9): how much likelier a word is than with a silent sharer, in nats (n: e^n times).
Underlined from 1 nat on, bold from 3; blue where the sharer made it likelier, orange where less.

All answers use the same sampler, seed and stop rules. They are made one after the other, so that
none slows another down.
"""


class Help(ModalScreen[None]):
    """A window over the conversation."""

    BINDINGS = keys.bindings(keys.HELP)

    def compose(self) -> ComposeResult:
        """Keys, then words."""
        with Vertical(id="help", classes="window") as window:
            window.border_title = "help"
            window.border_subtitle = keys.hint(keys.HELP)
            with VerticalScroll():
                with Container(classes="columns"):
                    yield Static(_table([*keys.PROMPT, *keys.APP]))
                    yield Static(_table(keys.GATES, "among the gates"))
                yield Markdown(TEXT, open_links=False)


def _table(of: Sequence[Key], title: str = "") -> Table:
    table = Table.grid(padding=(0, 2))
    if title:
        table.add_row(title)
    for names, what in keys.rows(of):
        table.add_row(names, what)
    return table
