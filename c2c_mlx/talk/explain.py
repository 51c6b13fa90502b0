"""Any error as one line for a person."""

from __future__ import annotations

from c2c_mlx.errors import C2CError


def explain(error: Exception) -> str:
    """An error as one line with the next step, whatever it was."""
    if isinstance(error, C2CError):
        return str(error)
    from c2c_mlx import device

    text = " ".join(str(error).split())[:300] or type(error).__name__
    if device.is_out_of_memory(error):
        return f"out of memory ({text}): start a new conversation, or take smaller models"
    if device.is_interrupted(error):
        return f"macOS interrupted the GPU ({text}): ask again; {device.UNDISTURBED}"
    return f"{type(error).__name__}: {text}; this is a bug, and asking again may work"
