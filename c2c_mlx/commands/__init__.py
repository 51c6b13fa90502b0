"""The commands: arguments in, exit code out.

Nothing here imports MLX or Textual at module level, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from c2c_mlx.atomic import FULL
from c2c_mlx.errors import C2CError, NoFuserError


class Parser(argparse.ArgumentParser):
    """Arguments, among which a mistake is one line as any other is, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Leaves with exit code 2."""
        self.exit(2, f"{self.prog}: {one_line(message)}; {self.prog} --help says more\n")


def run(body: Callable[[], int | None], program: str) -> int:
    """Runs a command's body and turns what escapes from it into an exit code.

    Args:
        body: does the work; returns an exit code, or None for 0.
        program: the command's name, which begins the line on stderr.

    Returns:
        0, 2 for the user's mistake, a full memory or disk, or a GPU that macOS interrupted, 130 for
        Ctrl-C.
        A bug keeps its traceback.
    """
    try:
        code = body() or 0
        sys.stdout.flush()
        return code
    except C2CError as e:
        advice = without_fuser(e) if isinstance(e, NoFuserError) else ""
        print(f"{program}: {one_line(str(e) + advice)}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as e:
        from c2c_mlx import device

        if device.is_interrupted(e):
            text = f"macOS interrupted the GPU ({e}): start again; {device.UNDISTURBED}"
        elif device.is_out_of_memory(e):
            text = f"out of memory ({str(e) or type(e).__name__}): end other programs, or take "
            text += "smaller models, batches or chats"
        else:
            raise
        print(f"{program}: {one_line(text)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG:  # a text where a name should stand
            print(f"{program}: {e.strerror}: {one_line(str(e.filename))[:40]}...", file=sys.stderr)
            return 2
        is_full = e.errno in FULL
        if not is_full and not isinstance(e, BrokenPipeError):
            raise
        # Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if is_full:
            print(f"{program}: {e.strerror}: make room there", file=sys.stderr)
        return 2 if is_full else 0  # the reader has gone (`| head`)


def without_fuser(error: NoFuserError) -> str:
    """What can be done about it on the command line."""
    return (
        f": name one with --fuser, train one with 'c2c-train --sharer {error.sharer} --receiver "
        f"{error.receiver}', or take --mode relay"
    )


def one_line(text: str) -> str:
    """The text in one line, without characters that a terminal would act upon."""
    return "".join(c if c.isprintable() else " " for c in text).rstrip()
