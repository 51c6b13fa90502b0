"""The app on two tiny models: asked, stopped, cut, asked again, saved, taken up, left."""

from __future__ import annotations

from c2c_mlx.config import Pair, SamplingConfig
from c2c_mlx.events import MODES
from c2c_mlx.talk.engine import InferenceThread
from c2c_mlx.tui import conversation
from c2c_mlx.tui.app import ChatApp
from c2c_mlx.tui.conversation import Conversation
from c2c_mlx.tui.preview import until

SAMPLING = SamplingConfig(max_tokens=12)


async def test_a_conversation_with_two_models(tiny_pair: Pair, shows) -> None:
    engine = InferenceThread(tiny_pair, SAMPLING)
    chat = ChatApp(engine, Conversation(tiny_pair, SAMPLING), ["c2c", "relay"])
    try:
        async with chat.run_test(size=(120, 40)) as pilot:
            await pilot.press(*"Who?", "enter")  # not loaded yet
            await until(lambda: chat.turn is not None and not chat.is_busy)
            await shows(chat, "C2C against relay", "weight 0.")
            first = chat.turn.answers["c2c"].text
            await pilot.press("ctrl+o", "ctrl+g", "a", "ctrl+r")
            await until(lambda: chat.attempt == 1 and not chat.is_busy)
            said = chat.turn.answers
            assert said["c2c"].text == said["receiver"].text != first
            assert said["c2c"].figures.gates_open == 0
            await pilot.press("r", "ctrl+r")
            await until(lambda: chat.attempt == 2 and not chat.is_busy)
            assert chat.turn.answers["c2c"].text == first
            await pilot.press("escape", *"More?", "enter")
            await pilot.press("escape")
            await until(lambda: not chat.is_busy)
    finally:
        engine.close()
        engine.join()
    saved = conversation.load()
    assert [t.question for t in saved.turns] == ["Who?", "More?"]
    assert saved.turns[0] == chat.conversation.turns[0]
    assert set(saved.turns[0].answers) <= set(MODES)
