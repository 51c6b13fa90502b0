"""What is copied comes to the user's own clipboard, every character of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from textual.app import App

from c2c_mlx.tui import clipboard


@pytest.fixture
def mac(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Mac's folder of programs; its pbcopy writes down what it was given."""
    script = home / "pbcopy"
    script.write_text(f'#!/bin/sh\ncat > "{home}/copied"\nprintf %s "$LC_ALL" > "{home}/locale"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(home), prepend=os.pathsep)
    monkeypatch.setattr(sys, "platform", "darwin")
    for name in ("SSH_TTY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    return home


def test_a_mac_is_told_that_it_is_utf_8(mac: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    assert clipboard.copy("naïve 日本", App()) == "pbcopy"
    assert (mac / "copied").read_text(encoding="utf-8") == "naïve 日本"
    assert (mac / "locale").read_text() == "en_US.UTF-8"


@pytest.mark.parametrize("name", ["SSH_TTY", "SSH_CONNECTION"])
def test_from_afar_it_is_the_terminal_that_copies(
    mac: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "x")
    app: App[None] = App()
    assert clipboard.copy("Paris", app) == "OSC 52"
    assert app.clipboard == "Paris" and not (mac / "copied").exists()
