"""One list of keys: what is bound, shown, offered and written down is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from textual.binding import Binding

from c2c_mlx.tui import keys
from c2c_mlx.tui.app import ChatApp
from c2c_mlx.tui.preview import app, until
from c2c_mlx.tui.screens.ballot import Ballot
from c2c_mlx.tui.screens.help import Help
from c2c_mlx.tui.screens.main import MainScreen
from c2c_mlx.tui.screens.offer import Offer
from c2c_mlx.tui.screens.sessions import Sessions
from c2c_mlx.tui.screens.settings import Settings
from c2c_mlx.tui.widgets.gate_view import GateView
from c2c_mlx.tui.widgets.prompt import Prompt

README = Path(__file__).parents[2] / "README.md"
WHERE = {
    ChatApp: keys.APP,
    Prompt: keys.PROMPT,
    GateView: keys.GATES,
    Ballot: keys.BALLOT,
    Settings: keys.SETTINGS,
    Sessions: keys.SESSIONS,
    Offer: keys.OFFER,
    Help: keys.HELP,
}


@pytest.mark.parametrize("where", WHERE, ids=lambda where: where.__name__)
def test_what_is_bound_is_what_is_listed_and_can_be_done(where: type) -> None:
    listed = {(k.keys, k.action) for k in WHERE[where] if k.keys and k.action != "open"}
    bound = {(b.key, b.action) for b in where.BINDINGS if isinstance(b, Binding)}
    assert bound == listed and len(where.BINDINGS) == len(listed)
    for _, action in listed:
        name = action.partition("(")[0]
        namespace, _, name = name.rpartition(".")
        owner = {"app": ChatApp, "screen": MainScreen}.get(namespace, where)
        assert hasattr(owner, f"action_{name}"), action
    single = [name for pressed, _ in listed for name in pressed.split(",")]
    assert len(single) == len(set(single))


def test_the_readme_shows_the_list() -> None:
    assert keys.markdown() in README.read_text(encoding="utf-8")


def test_every_f_key_has_a_second_one_without_fn() -> None:
    rows = [names for names, _ in keys.rows(keys.APP) if names.startswith("F")]
    assert [names.split(", ") for names in rows] == [[f"F{n}", f"Ctrl+L {n}"] for n in range(1, 10)]


async def test_the_help_shows_the_list(shows) -> None:
    chat = app(float("inf"))
    async with chat.run_test(size=(160, 60)) as pilot:
        await pilot.press("f1")
        listed = [*keys.rows([*keys.PROMPT, *keys.APP]), *keys.rows(keys.GATES)]
        await shows(chat, *(names for names, _ in listed if len(names) < 30))
        await shows(chat, *(text[:30] for _, text in listed))


async def test_the_palette_offers_all_of_it() -> None:
    chat = app(float("inf"))
    async with chat.run_test():
        offered = {(c.title, c.help) for c in chat.get_system_commands(chat.main)}
        own = {(k.name, k.help) for k in keys.APP if k.action not in ("quit", "command_palette")}
        assert own <= offered


@pytest.mark.parametrize(("width", "n"), [(80, 7), (200, 15)])
async def test_the_footer_begins_as_the_list_does(screen, width: int, n: int) -> None:
    chat = app(float("inf"))
    async with chat.run_test(size=(width, 40)):
        await until(lambda: " Stop " in screen(chat).splitlines()[-1])
        footer = screen(chat).splitlines()[-1]
        places = [footer.find(f" {key.name} ") for key in keys.APP[:n]]
        assert places == sorted(places) and places[0] > 0


@pytest.mark.parametrize(("digit", "shown"), [("2", "limit of tokens"), ("6", "sessions")])
async def test_a_digit_stands_for_an_f_key(shows, digit: str, shown: str) -> None:
    chat = app(float("inf"))
    async with chat.run_test(size=(120, 40)) as pilot:
        await pilot.press("ctrl+l")
        await shows(chat, *(key.help for _, key in keys.numbered()))
        await pilot.press(digit)
        await shows(chat, shown)
        assert len(chat.screen_stack) == 2
        await pilot.press("escape")
        assert chat.screen is chat.main
