"""An answer's words, tinted by what they owe to the sharer."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text

from c2c_mlx.events import Crossed
from c2c_mlx.text.words import spans

# Nats from which a word is marked, and with what besides its colour: none is needed to see it.
_LEVELS = ((1.0, Style(underline=True)), (3.0, Style(underline=True, bold=True)))
# Blue and orange, which no kind of colour vision confuses; on dark, and on light.
_MORE, _LESS = ("#56b4e9", "#005a8d"), ("#e69f00", "#9a4600")


def tinted(crossed: Crossed, is_dark: bool) -> Text:
    """The answer, its words in blue where the sharer made them likelier, in orange where less."""
    text = Text("".join(crossed.tokens))
    for start, end, nats in spans(list(zip(crossed.tokens, crossed.nats, strict=True))):
        if style := _style(nats, is_dark):
            text.stylize(style, start, end)
    return text


def legend(is_dark: bool) -> Text:
    """What the tints mean."""
    parts: list[str | tuple[str, Style]] = ["owed: "]
    for least, _ in _LEVELS:
        parts += [(f"≥ {least:.0f} nat{'s' * (least > 1)}", _known(least, is_dark)), " · "]
    least = _LEVELS[0][0]
    parts.append((f"≤ −{least:.0f} nat", _known(-least, is_dark)))
    return Text.assemble(*parts)


def _style(nats: float, is_dark: bool) -> Style | None:
    reached = [style for least, style in _LEVELS if abs(nats) >= least]
    if not reached:
        return None
    colours = _MORE if nats > 0 else _LESS
    return reached[-1] + Style(color=colours[0 if is_dark else 1])


def _known(nats: float, is_dark: bool) -> Style:
    return _style(nats, is_dark) or Style()
