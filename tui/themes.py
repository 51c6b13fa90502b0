"""The app's own two themes; their colours are Okabe and Ito's, which every eye tells apart."""

from __future__ import annotations

from textual.theme import Theme

DARK = Theme(
    name="c2c-dark",
    primary="#56b4e9",
    secondary="#e69f00",
    accent="#f0e442",
    warning="#e69f00",
    error="#ff7a6b",
    success="#35c69b",
    foreground="#d8dee6",
    background="#10151c",
    surface="#171d26",
    panel="#202833",
)
LIGHT = Theme(
    name="c2c-light",
    primary="#0072b2",
    secondary="#b34f00",
    accent="#8a5a00",
    warning="#b34f00",
    error="#b3261e",
    success="#00704f",
    foreground="#1c232b",
    background="#fbfbf8",
    surface="#f2f2ee",
    panel="#e6e6e0",
    dark=False,
)
