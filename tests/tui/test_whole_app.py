"""The app on two tiny models: asked, stopped, cut, asked again, saved, taken up, left."""

from __future__ import annotations

from c2c_mlx.config import Pair, SamplingConfig
from c2c_mlx.events import MODES
from c2c_mlx.talk.engine import InferenceThread
from c2c_mlx.tui import session_file
from c2c_mlx.tui.app import ChatApp
from c2c_mlx.tui.conversation import Conversation
from c2c_mlx.tui.preview import until
from c2c_mlx.tui.run import leave
from c2c_mlx.tui.session_file import SessionFile

SAMPLING = SamplingConfig(max_tokens=12)


async def test_a_conversation_with_two_models(tiny_pair: Pair, shows) -> None:
    engine = InferenceThread(tiny_pair, SAMPLING)
    chat = ChatApp(engine, Conversation(tiny_pair, SAMPLING), ["c2c", "relay"], SessionFile())
    try:
        async with chat.run_test(size=(120, 40)) as pilot:
            await pilot.press(*"Who?", "enter")  # not loaded yet
            await until(lambda: chat.state.turn is not None and not chat.state.is_busy)
            await shows(chat, "C2C against relay", "weight 0.")
            first = chat.state.turn.answers["c2c"].text
            await pilot.press("ctrl+o", "ctrl+g", "a", "ctrl+r")
            await until(lambda: len(chat.state.turn.takes) == 2 and not chat.state.is_busy)
            said = chat.state.turn.answers
            assert said["c2c"].text == said["receiver"].text != first
            assert said["c2c"].figures.gates_open == 0
            await shows(chat, "before: 8 of 8 gates open", "after: 0 of 8 gates open")
            await pilot.press("r", "ctrl+r")
            await until(lambda: len(chat.state.turn.takes) == 3 and not chat.state.is_busy)
            assert chat.state.turn.answers["c2c"].text == first
            # The gates concern C2C alone, and nobody else is asked again.
            assert [list(take.answers) for take in chat.state.turn.takes] == [
                ["c2c", "relay"],
                ["c2c", "receiver"],
                ["c2c"],
            ]
            await pilot.press("escape", *"More?", "enter")
            await pilot.press("escape")
            await until(lambda: not chat.state.is_busy)
    finally:
        leave(chat, engine)
    saved = session_file.read(session_file.names()[0])
    assert [t.question for t in saved.turns] == ["Who?", "More?"]
    assert saved == chat.state.conversation
    assert set(saved.turns[0].answers) <= set(MODES)
