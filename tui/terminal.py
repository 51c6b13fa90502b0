"""The terminal, which may be closed at any moment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from textual.drivers.linux_driver import LinuxDriver


class Terminal(LinuxDriver):
    """Textual's, but that its writer outlives what it writes to.

    Otherwise nobody would empty the writer's queue, and the app, which fills it, could not end.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._file = cast(Any, Lasting(cast(TextIO, self._file)))


class Lasting:
    """A file that can be written to whatever becomes of it: once it fails, it is /dev/null."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        """Writes, or drops it."""
        with self._going_on():
            self._file.write(text)

    def flush(self) -> None:
        """Has what was written be seen, if anybody can."""
        with self._going_on():
            self._file.flush()

    def fileno(self) -> int:
        """The file's handle."""
        return self._file.fileno()

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._file.fileno())
            os.close(nowhere)
