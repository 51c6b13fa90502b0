"""C2C's words, tinted by what they owe to the sharer: seen without colours, too."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from textual.pilot import Pilot

from c2c_mlx import events
from c2c_mlx.tui import owed
from c2c_mlx.tui.app import ChatApp
from c2c_mlx.tui.conversation import Conversation
from c2c_mlx.tui.preview import RECORDING, Recording, Replay, until

QUESTIONS = list(Recording.read(RECORDING).turns)
Shows = Callable[..., Awaitable[None]]
CROSSED = events.Crossed(("A", " house", " by", " the", " sea", "."), (0.2, 4.0, -2.0, 0.0, 1.0, 0))


class Weighing(Replay):
    """A recording whose latest answer by C2C owes 2 nats a word."""

    def __init__(self) -> None:
        super().__init__(Recording.read(RECORDING), float("inf"))
        self.weighed, self._last = 0, QUESTIONS[0]

    def ask(self, question: str, modes: object, attempt: int = 0) -> None:
        self._last = question
        super().ask(question, modes, attempt)  # type: ignore[arg-type]

    def weigh(self) -> None:
        self.weighed += 1
        ended = (e for _, e in self.recording.turns[self._last] if isinstance(e, events.Finished))
        text = next(e.text for e in ended if e.mode == "c2c")
        tokens = tuple(f"{word} " for word in text.split(" "))
        self._play([(0.0, events.Crossed(tokens, (2.0,) * len(tokens)))])


async def ask(pilot: Pilot[None], question: str) -> None:
    chat = pilot.app
    assert isinstance(chat, ChatApp)
    chat.main.prompt.show(question)
    await pilot.press("enter")
    await until(lambda: not chat.state.is_busy)
    await pilot.pause()


async def test_a_key_tints_words_and_takes_it_back(shows: Shows) -> None:
    backend = Weighing()
    chat = ChatApp(backend, Conversation(backend.pair), ["c2c", "relay"])
    async with chat.run_test(size=(160, 40)) as pilot:
        await ask(pilot, QUESTIONS[0])
        assert backend.weighed == 0
        await pilot.press("f9")
        await shows(chat, "owed: ≥ 1 nat · ≥ 3 nats · ≤ −1 nat")
        await ask(pilot, QUESTIONS[1])  # and from now on every answer
        await until(lambda: backend.weighed == 2)
        await pilot.pause()
        tints = [view for view in chat.main.panes["c2c"].query(".owed") if view.display]
        assert len(tints) == 2
        assert not [view for view in chat.main.panes["relay"].query(".owed") if view.display]
        await pilot.press("f9")
        await shows(chat, without="owed: ")


async def test_what_comes_after_the_key_was_taken_back_stays_unseen(shows: Shows) -> None:
    backend = Weighing()
    chat = ChatApp(backend, Conversation(backend.pair), ["c2c", "relay"])
    async with chat.run_test(size=(160, 40)) as pilot:
        await ask(pilot, QUESTIONS[0])
        chat.action_owed()
        chat.action_owed()
        await pilot.pause(0.2)
        await shows(chat, without="owed: ")


@pytest.mark.parametrize("is_dark", [True, False])
def test_words_are_marked_with_and_without_colour(is_dark: bool) -> None:
    text = owed.tinted(CROSSED, is_dark)
    assert text.plain == "A house by the sea."
    styles = {text.plain[s.start : s.end]: s.style for s in text.spans}
    assert set(styles) == {"house", "by", "sea"}
    assert all(style.underline for style in styles.values())  # type: ignore[union-attr]
    assert styles["house"].bold and not styles["sea"].bold  # type: ignore[union-attr]
    colours = {word: style.color.name for word, style in styles.items()}  # type: ignore[union-attr]
    assert colours["house"] == colours["sea"] != colours["by"]
    assert owed.legend(is_dark).plain.count("nat") == 3
