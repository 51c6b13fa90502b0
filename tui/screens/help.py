"""The help: keys, and what the numbers mean."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Markdown

TEXT = """\
| key | what |
| --- | --- |
| Enter, Ctrl+J | send; a new line |
| Up, Down | earlier questions |
| Esc | stop the answer; back to the prompt |
| Ctrl+R, F3 | ask again; edit the last message |
| Ctrl+N, F6 | new conversation; saved ones |
| Ctrl+O | the receiver alone as a third pane |
| Ctrl+G, F8 | go to the gates; hide them |
| F2 | system prompt, temperature, limit, seed |
| F4, F5 | copy C2C's answer; export Markdown and JSON |
| F7 | blind mode: vote before you see whose answer is whose |
| Ctrl+T | the next tab, on a narrow terminal |
| Ctrl+P, Ctrl+Q | everything, themes too; quit |

**Among the gates**: arrows move; Space, K or V close and open a gate; A all of them; R restores the
fuser; W other view; M weights or changes; Z one column per token; X keys or values.

**Gate** (`●` open, `○` closed): learned, one per layer for keys and one for values. Part of the
fuser, the same for every prompt. A closed one lets nothing of the sharer in.

**Weight** (0 to 1): how much of the projection is let in *for this prompt*, a mean over heads. It
is 0 where nothing was added.

**Change**: the size of what was added, against the size of the receiver's own keys or values. A
high weight can mean a small change, and the other way round.

Both answers use the same sampler, seed and stop rules, and are made one after the other, so that
neither slows the other down.
"""


class Help(ModalScreen[None]):
    """A window over the conversation."""

    BINDINGS = [("escape,f1,q", "dismiss", "Close")]

    def compose(self) -> ComposeResult:
        """The text, scrolling."""
        with Vertical(classes="window") as window:
            window.border_title = "help"
            window.border_subtitle = "Esc closes"
            with VerticalScroll():
                yield Markdown(TEXT, open_links=False)
