"""The exceptions that a command turns into one line and exit code 2."""

from __future__ import annotations


class C2CError(Exception):
    """A mistake that the user can mend.

    The message is one line that says what is wrong and what to do next; commands print it to
    stderr without a traceback and exit with 2. Anything else that escapes is a bug of ours.
    """


class NoFuserError(C2CError):
    """Mode `c2c` was asked for, and nobody knows a fuser for the pair.

    Commands and the app add what can be done about it; here it is only said.
    """

    def __init__(self, receiver: str, sharer: str) -> None:
        super().__init__(f"no fuser is known for sharer {sharer} and receiver {receiver}")
        self.receiver, self.sharer = receiver, sharer
