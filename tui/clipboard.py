"""Copying: pbcopy on a Mac, whose Terminal ignores OSC 52; elsewhere, or from afar, OSC 52."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from textual.app import App


def copy(text: str, app: App[Any]) -> str:
    """Puts text on the clipboard.

    Returns:
        How, for the user to know whom to blame.
    """
    is_afar = {"SSH_TTY", "SSH_CONNECTION"} & os.environ.keys()  # pbcopy is not where the user is
    if sys.platform == "darwin" and not is_afar:
        utf_8 = os.environ | {"LC_ALL": "en_US.UTF-8"}  # else pbcopy may take it for MacRoman
        try:
            subprocess.run(["pbcopy"], input=text.encode(), env=utf_8, check=True, timeout=5)
            return "pbcopy"
        except (OSError, subprocess.SubprocessError):
            pass
    app.copy_to_clipboard(text)
    return "OSC 52"
