"""What comes from without: `kill`, a terminal that is closed, bytes that are no text."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from c2c_mlx.config import Pair
from c2c_mlx.tui import session_file
from c2c_mlx.tui.terminal import Lasting

# As a shell's child in the foreground of a terminal of its own.
CODE = (
    "import fcntl, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "from c2c_mlx.commands.chat import main\n"
    "sys.exit(main())"
)


@dataclass
class Terminal:
    """What a terminal's window holds, and its program."""

    screen: int
    line: int  # the program's end of it
    program: subprocess.Popen[bytes]

    def shows(self, text: str) -> None:
        seen = b""
        while text.encode() not in seen:
            assert select.select([self.screen], [], [], 120)[0], f"{text} never came: {seen!r}"
            seen += os.read(self.screen, 1 << 16)

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def kill(self) -> None:
        self.program.terminate()
        self.shows("\x1b[?1049l")  # back to what was there before
        assert termios.tcgetattr(self.line)[3] & termios.ICANON  # as a shell wants it

    def close(self) -> None:
        os.close(self.screen)


@pytest.fixture
def terminal(tiny_pair: Pair, home: Path) -> Iterator[Terminal]:
    screen, line = pty.openpty()
    termios.tcsetwinsize(line, (40, 160))
    arguments = ["--receiver", tiny_pair.receiver, "--sharer", tiny_pair.sharers[0]]
    arguments += ["--mode", "receiver", "--max-tokens", "400", "--temp", "1", "--seed", "2"]
    program = subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments],
        stdin=line,
        stdout=line,
        stderr=line,
        start_new_session=True,
        env=os.environ | {"TERM": "xterm-256color"},
    )
    yield Terminal(screen, line, program)
    program.kill()
    program.wait()
    os.close(line)


@pytest.mark.parametrize(
    ("end", "number"), [(Terminal.kill, signal.SIGTERM), (Terminal.close, signal.SIGHUP)]
)
def test_what_was_said_is_kept(
    terminal: Terminal, end: Callable[[Terminal], None], number: int
) -> None:
    terminal.shows("ready")
    terminal.type("Who?\r")
    terminal.shows("answers; one after the other")
    end(terminal)
    assert terminal.program.wait(timeout=60) == 128 + number
    (name,) = session_file.names()
    (turn,) = session_file.read(name).turns
    answer = turn.answers["receiver"]
    assert answer.reason == "stopped" and answer.figures


def test_a_byte_that_is_no_text_is_replaced(terminal: Terminal) -> None:
    terminal.shows("ready")
    os.write(terminal.screen, b"\xff")
    terminal.type("Who?\r")
    terminal.shows("answers; one after the other")
    terminal.kill()
    (name,) = session_file.names()
    assert [turn.question for turn in session_file.read(name).turns] == ["\ufffdWho?"]


def test_a_terminal_that_is_gone_can_still_be_written_to() -> None:
    screen, line = pty.openpty()
    os.close(screen)
    with os.fdopen(line, "w") as file:
        lasting = Lasting(file)
        for _ in range(2):
            lasting.write("x")
            lasting.flush()
