"""The one exception that a command turns into one line and exit code 2."""

from __future__ import annotations


class C2CError(Exception):
    """A mistake that the user can mend.

    The message is one line that says what is wrong and what to do next; commands print it to
    stderr without a traceback and exit with 2. Anything else that escapes is a bug of ours.
    """
