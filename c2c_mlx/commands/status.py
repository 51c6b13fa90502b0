"""What a person at a terminal sees while something takes long."""

from __future__ import annotations

import os
from typing import Any

from c2c_mlx.events import Prefilling
from c2c_mlx.progress import Progress


class Status:
    """One line on a terminal that says what takes so long; silent anywhere else."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.on = stream.isatty()
        self.shown = 0

    def loading(self, p: Progress) -> None:
        """Downloads, conversions and loading."""
        self._show(f"{p.what} {100 * p.done // p.total} %" if p.total else p.what)

    def reading(self, p: Prefilling) -> None:
        """The prefill of a long prompt; short ones are over before they could be read."""
        if p.total > 1024:
            self._show(f"{p.mode}: reading {p.done} of {p.total} tokens")
            if p.done >= p.total:
                self.close()

    def close(self) -> None:
        """Clears the line."""
        if self.shown:
            self.stream.write("\r" + " " * self.shown + "\r")
            self.stream.flush()
            self.shown = 0

    def _show(self, text: str) -> None:
        if self.on:
            text = text[: os.get_terminal_size(self.stream.fileno()).columns - 1]
            self.stream.write("\r" + text.ljust(self.shown))
            self.stream.flush()
            self.shown = len(text)
