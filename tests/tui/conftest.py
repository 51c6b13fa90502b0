"""The app on a recording, with a home of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from c2c_mlx.tui import preview
from c2c_mlx.tui.app import ChatApp


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("C2C_MLX_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def seen(app: ChatApp) -> str:
    """What stands on the screen."""
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())


@pytest.fixture
def screen() -> Callable[[ChatApp], str]:
    return seen


@pytest.fixture
def shows() -> Callable[..., object]:
    async def shows(app: ChatApp, *texts: str, without: str = "\0") -> None:
        """Waits until all of these stand on the screen, and one no more."""

        def is_so() -> bool:
            now = seen(app)
            return all(text in now for text in texts) and without not in now

        try:
            await preview.until(is_so)
        except TimeoutError:
            missing = [text for text in texts if text not in seen(app)]
            pytest.fail(f"not on the screen: {missing}, or still: {without}\n{seen(app)}")

    return shows
