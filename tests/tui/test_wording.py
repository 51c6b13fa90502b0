"""What a model wrote stands on the screen, line by line, in whatever pieces it came."""

from __future__ import annotations

import pytest
from textual.app import App, ComposeResult
from textual.widgets import Static

from c2c_mlx.tui.screens.ballot import Ballot
from c2c_mlx.tui.widgets.pane import AnswerText


class Answers(App[None]):
    """Two of them, without what stands around."""

    def compose(self) -> ComposeResult:
        yield AnswerText("answer")
        yield AnswerText("answer")


@pytest.mark.parametrize(
    "pieces",
    [
        ["if a<b and c>d ", "then List<String> x"],
        ["one\ntwo", "\nthree"],
        ["As [1] says.\n\n", "[1]: http://x.y"],
        ["Here is the page:\n\n", "<div>\nhello\n</div>\n", "\nThat was it."],
    ],
)
async def test_every_line_of_an_answer_is_drawn(screen, pieces: list[str]) -> None:
    text, app = "".join(pieces), Answers()
    lines = [line for line in text.splitlines() if line]
    async with app.run_test(size=(80, 40)) as pilot:
        grown, whole = app.query(AnswerText)
        for piece in pieces:
            await grown.write(piece)
        await whole.write(text)
        for answer in (grown, whole):
            blocks = answer.query("MarkdownBlock").results(Static)
            assert "\n".join(str(block.content) for block in blocks).splitlines() == lines
        await pilot.pause()
        assert all(line in screen(app) for line in lines)
        await app.push_screen(Ballot(text, "", swapped=False))
        await pilot.pause()
        assert all(line in screen(app) for line in lines)
