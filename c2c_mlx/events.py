"""What a turn tells the world while it runs: frozen, plain Python, safe to hand to another thread.

A turn is a sequence `RelayedText* Text* Finished`, with `Prefilling` on the way to the first of
them; every event carries its mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["c2c", "relay", "receiver", "sharer"]
Reason = Literal["stop", "length", "stopped"]
MODES: tuple[Mode, ...] = ("c2c", "relay", "receiver", "sharer")


@dataclass(frozen=True)
class Prefilling:
    """Progress of reading the prompt, in positions over all models that read it."""

    mode: Mode
    done: int
    total: int


@dataclass(frozen=True)
class RelayedText:
    """A piece of what the sharer writes for the receiver to read (text relay only)."""

    mode: Mode
    text: str


@dataclass(frozen=True)
class Text:
    """A piece of the answer; it may be empty while a stop string might be building up."""

    mode: Mode
    text: str


@dataclass(frozen=True)
class Figures:
    """What one answer cost; times in seconds, 0 where a mode has no such part.

    `first_token_s` runs from the question to the first token of the *answer*, so it holds the whole
    of a relay; `prompt_tokens` is the answering model's prompt, of which `new_prompt_tokens` had to
    be read in this turn.
    """

    prompt_tokens: int
    new_prompt_tokens: int
    generated_tokens: int
    relayed_tokens: int
    align_s: float
    sharer_s: float
    receiver_s: float
    fuse_s: float
    first_token_s: float
    total_s: float
    tokens_per_s: float
    peak_memory_gb: float
    gates_open: int


@dataclass(frozen=True)
class Finished:
    """The end of an answer; `length` is the limit of tokens, `stopped` the user's wish."""

    mode: Mode
    text: str
    relayed_text: str
    reason: Reason
    figures: Figures


Event = Prefilling | RelayedText | Text | Finished
