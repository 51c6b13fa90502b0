"""Copying: pbcopy on macOS, whose Terminal ignores OSC 52; elsewhere what Textual sends."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from textual.app import App


def copy(text: str, app: App[Any]) -> str:
    """Puts text on the clipboard.

    Returns:
        How, for the user to know whom to blame.
    """
    if sys.platform == "darwin":
        try:
            subprocess.run(["pbcopy"], input=text.encode(), check=True, timeout=5)
            return "pbcopy"
        except (OSError, subprocess.SubprocessError):
            pass
    app.copy_to_clipboard(text)
    return "OSC 52"
