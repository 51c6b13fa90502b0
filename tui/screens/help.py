"""The help: keys, and what the numbers mean."""

from __future__ import annotations

from rich.table import Table
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Markdown, Static

KEYS = (
    ("Enter, Ctrl+J", "send; a new line (Shift+Enter too, where the terminal tells it)"),
    ("Up, Down", "earlier questions"),
    ("Esc", "stop the answer; back to the prompt"),
    ("Ctrl+R, F3", "ask again; edit the last message"),
    ("Ctrl+N, F6", "new conversation; saved ones"),
    ("Ctrl+O", "the receiver alone as a third pane"),
    ("Ctrl+G, F8", "go to the gates; hide them"),
    ("Ctrl+T", "the next tab, on a narrow terminal"),
    ("F2", "system prompt, temperature, limit of tokens, seed"),
    ("F4, F5", "copy C2C's answer; export Markdown and JSON"),
    ("F7", "blind mode: vote before you see whose answer is whose"),
    ("Ctrl+P, Ctrl+Q", "everything there is, themes too; quit"),
    ("", ""),
    ("among the gates", "arrows move the cursor"),
    ("Space, K, V, A", "close or open: selected, keys, values, all"),
    ("R", "restore the fuser's own gates"),
    ("W, M", "other view; weights or changes"),
    ("Z, X", "a column per token; keys or values"),
    ("S", "the next sharer, where there are several"),
)
TEXT = """\
**Gate** (● open, ○ closed): learned, one per layer for keys and one for values. Part of the fuser,
the same for every prompt. A closed one lets nothing of the sharer in.

**Weight** (0 to 1): how much of the projection is let in *for this prompt*, a mean over heads. It
is 0 where nothing was added.

**Change**: the size of what was added, against the size of the receiver's own keys or values. A
high weight can mean a small change, and the other way round.

All answers use the same sampler, seed and stop rules. They are made one after the other, so that
none slows another down.
"""


class Help(ModalScreen[None]):
    """A window over the conversation."""

    BINDINGS = [("escape,f1,q", "dismiss", "Close")]

    def compose(self) -> ComposeResult:
        """Keys, then words."""
        keys = Table.grid(padding=(0, 2))
        for key, what in KEYS:
            keys.add_row(key, what)
        with Vertical(classes="window") as window:
            window.border_title = "help"
            window.border_subtitle = "Esc closes"
            with VerticalScroll():
                yield Static(keys)
                yield Markdown(TEXT, open_links=False)
