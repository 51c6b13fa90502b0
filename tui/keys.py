"""Every key of the app, in one list: bindings, hints, the help, the palette and README's table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from textual.binding import Binding, BindingType


@dataclass(frozen=True)
class Key:
    """What a key does.

    Attributes:
        keys: Textual's names with commas between, the one to be shown first; empty: the command
            palette alone has it.
        action: as Textual calls it.
        name: one or two words, for the footer and the palette.
        help: a sentence; neighbours with the same one share a row.
        in_footer: whether the line at the bottom shows it, as far as there is room.
    """

    keys: str
    action: str
    name: str
    help: str
    in_footer: bool = True


# In the footer's order, so what an 80-column terminal has no room for comes last.
APP = (
    Key("escape", "stop", "Stop", "stop the answer; leave the editing; back to the prompt"),
    Key("ctrl+r", "again", "Again", "ask again; with other gates: the answers before and after"),
    Key("ctrl+n", "new", "New", "new conversation; the last one stays saved"),
    Key("ctrl+g", "screen.gates", "Gates", "go to the gates, and back"),
    Key("ctrl+l", "menu", "More", "what F1 to F9 do, without Fn: Ctrl+L, then the digit"),
    Key("ctrl+q", "quit", "Quit", "leave; the conversation is saved"),
    Key("f1", "help", "Help", "keys, and what the numbers mean"),
    Key("f2", "settings", "Settings", "system prompt, temperature, limit of tokens, seed"),
    Key("f3", "edit", "Edit", "edit the last message; sending it replaces its turn"),
    Key("f4", "copy('c2c')", "Copy", "copy C2C's latest answer"),
    Key("f5", "export", "Export", "write Markdown and JSON into the current folder"),
    Key("f6", "sessions", "Sessions", "saved conversations: open, rename, delete"),
    Key("f7", "blind", "Blind", "vote before you see whose answer is whose"),
    Key("f8", "screen.hide_gates", "Hide gates", "hide the gates, or show them again"),
    Key("ctrl+o", "pane('receiver')", "Receiver", "the receiver alone as another pane"),
    Key("f9", "owed", "Owed", "tint C2C's words by what they owe to the sharer, or stop it", False),
    Key("ctrl+s", "train", "Train", "train this pair's fuser, stop, go on", False),
    Key("ctrl+t", "screen.next_tab", "Next tab", "the next pane, on a narrow terminal", False),
    Key("ctrl+p", "command_palette", "Palette", "everything there is, themes too", False),
    Key("", "pane('sharer')", "Sharer", "the sharer alone as another pane"),
    Key("", "copy('relay')", "Copy relay", "copy the relay's latest answer"),
    Key("", "copy('receiver')", "Copy receiver", "copy the receiver's latest answer"),
    Key("", "votes", "Votes", "what the blind votes come to"),
    Key("", "reload", "Load again", "after a download that failed"),
)
PROMPT = (
    Key("enter", "app.send", "Send", "send", False),
    Key("ctrl+j,shift+enter,alt+enter", "new_line", "New line", "a new line", False),
    Key("up", "cursor_up", "Earlier", "earlier questions, later ones", False),
    Key("down", "cursor_down", "Later", "earlier questions, later ones", False),
)
GATES = (
    Key("space", "gate", "Close/open", "close or open the selected gate"),
    Key("k", "gate(0)", "Keys", "close or open the layer's gate of keys, of values", False),
    Key("v", "gate(1)", "Values", "close or open the layer's gate of keys, of values", False),
    Key("a", "every_gate", "All", "close every gate, or open all"),
    Key("r", "restore", "Restore", "restore the fuser's own gates"),
    Key("w", "next_view", "View", "bars, a heat map over tokens, one over turns"),
    Key("m", "next_measure", "Measure", "weights or changes, in a heat map"),
    Key("z", "zoom", "Zoom", "a column per token, or all tokens", False),
    Key("x", "other_kind", "K/V", "keys or values", False),
    Key("s", "next_sharer", "Sharer", "the next sharer, where there are several", False),
    Key("up", "move(-1, 0)", "Up", "move the cursor", False),
    Key("down", "move(1, 0)", "Down", "move the cursor", False),
    Key("left", "move(0, -1)", "Left", "move the cursor", False),
    Key("right", "move(0, 1)", "Right", "move the cursor", False),
    Key("pageup", "move(-10, 0)", "Up", "move the cursor", False),
    Key("pagedown", "move(10, 0)", "Down", "move the cursor", False),
    Key("home", "move(-9999, 0)", "First", "move the cursor", False),
    Key("end", "move(9999, 0)", "Last", "move the cursor", False),
)
# Those of dialogs stand on the dialogs themselves.
BALLOT = (
    Key("a", "vote(0)", "A is better", "vote for the left one"),
    Key("b", "vote(1)", "B is better", "vote for the right one"),
    Key("t", "dismiss('tie')", "as good", "vote for neither"),
    Key("escape", "dismiss(None)", "no vote", "see whose is whose, and do not vote"),
)
SETTINGS = (
    Key("ctrl+s", "take", "saves", "take them over"),
    Key("escape", "dismiss(None)", "cancels", "leave them as they were"),
)
SESSIONS = (
    Key("enter", "open", "opens", "go on with it"),
    Key("r", "rename", "renames", "another title"),
    Key("d", "delete", "deletes", "delete it; asked for twice"),
    Key("escape", "leave", "closes", "leave the renaming; close the list"),
)
OFFER = (
    Key("1", "train(180)", "3 minutes", "to see it move"),
    Key("2", "train(900)", "15 minutes", "a first answer to whether there is anything to gain"),
    Key("3", "train(3600)", "an hour", "of use between small models, if there is"),
    Key("4", "train(28800)", "a night", "eight hours, for larger models or for more"),
    Key("r", "reverse", "turn round", "the same two models, the other way round"),
    Key("escape", "dismiss(None)", "closes", "as it was"),
)
HELP = (Key("escape,f1,q", "dismiss", "closes", "back to the conversation"),)

_SHOWN = {"escape": "Esc", "pageup": "PgUp", "pagedown": "PgDn"}


def bindings(keys: Sequence[Key], is_priority: bool = False) -> list[BindingType]:
    """For a widget's or a screen's `BINDINGS`.

    Args:
        keys: those that are bound.
        is_priority: whether they work whatever has the focus; Esc never does.
    """
    return [
        Binding(
            k.keys, k.action, k.name, show=k.in_footer, priority=is_priority and k.keys != "escape"
        )
        for k in keys
        if k.keys
    ]


def actions() -> set[str]:
    """The names of the app's actions, without what they are called with.

    Those of the screen are not among them: below a dialog there is no such screen to ask.
    """
    return {key.action.partition("(")[0] for key in APP} - {"quit"}


def numbered() -> list[tuple[str, Key]]:
    """The digit and the key of everything on F1 to F9, for keyboards that want Fn for those."""
    return [(k.keys[1:], k) for k in APP if k.keys[:1] == "f" and k.keys[1:].isdigit()]


def shown(key: str) -> str:
    """A key as people write it: 'ctrl+r' -> 'Ctrl+R'."""
    return _SHOWN.get(key, "+".join(part.capitalize() for part in key.split("+")))


def hint(keys: Sequence[Key]) -> str:
    """'Ctrl+S saves · Esc cancels', for the border of a dialog."""
    return " · ".join(f"{shown(key.keys.split(',')[0])} {key.name}" for key in keys)


def rows(keys: Sequence[Key]) -> Iterator[tuple[str, str]]:
    """Keys and what they do, those with the same help in one row."""
    digits = {key.keys: digit for digit, key in numbered()}
    for text, group in groupby((key for key in keys if key.keys), lambda key: key.help):
        names = [name for key in group for name in key.keys.split(",")]
        names = [shown(name) for name in names] + [
            f"Ctrl+L {digits[name]}" for name in names if name in digits
        ]
        yield ", ".join(names), text


def markdown() -> str:
    """The table of the README."""
    titled = (("", PROMPT), ("", APP), ("among the gates: ", GATES))
    lines = [f"| {names} | {title}{text} |" for title, keys in titled for names, text in rows(keys)]
    return "\n".join(["| key | what |", "| --- | --- |", *lines])
