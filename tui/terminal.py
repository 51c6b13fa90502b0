"""The terminal, which may be closed at any moment, and may send any byte."""

from __future__ import annotations

import os
import selectors
from codecs import getincrementaldecoder
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from textual._xterm_parser import XTermParser
from textual.drivers.linux_driver import LinuxDriver


class Terminal(LinuxDriver):
    """Textual's, but that its writer outlives what it writes to, and its reader what it reads.

    Otherwise nobody would empty the writer's queue, and the app, which fills it, could not end; and
    a byte that is no UTF-8 would end it: Latin-1 terminals send such, and Meta as the eighth bit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._file = cast(Any, Lasting(cast(TextIO, self._file)))

    def run_input_thread(self) -> None:
        """Hands on what is typed; called by Textual, in a thread."""
        parser = XTermParser(self._debug)
        decode = getincrementaldecoder("utf-8")("replace").decode
        with selectors.SelectSelector() as selector:
            selector.register(self.fileno, selectors.EVENT_READ)
            while not self.exit_event.is_set():
                if selector.select(0.1):
                    if not (typed := os.read(self.fileno, 4096)):
                        return  # closed: nobody would end this thread, and the process waits for it
                    for message in parser.feed(text) if (text := decode(typed)) else ():
                        self.process_message(message)
                for message in parser.tick():
                    self.process_message(message)


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
