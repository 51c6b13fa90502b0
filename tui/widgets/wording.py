"""Markdown of which every word is drawn: Textual's widget leaves out what it has no block for."""

from __future__ import annotations

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore


def parser() -> MarkdownIt:
    """Textual's own parser, but that tags and references are text, and lines end where they end."""
    markdown = MarkdownIt("gfm-like", {"html": False}).disable("reference")
    markdown.core.ruler.push("lines", _keep_lines)
    return markdown


def _keep_lines(state: StateCore) -> None:
    for token in state.tokens:
        for child in token.children or ():
            if child.type == "softbreak":  # drawn as a space
                child.type = "hardbreak"
