"""What a turn tells the world while it runs: frozen, plain Python, safe to hand to another thread.

An answer is a sequence `RelayedText* Text* Finished`, with `Prefilling` on the way to the first of
them; every event carries its mode. `engine.InferenceThread` adds what stands around the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from c2c_mlx.progress import Progress

Mode = Literal["c2c", "relay", "receiver", "sharer"]
Reason = Literal["stop", "length", "stopped"]
MODES: tuple[Mode, ...] = ("c2c", "relay", "receiver", "sharer")
Gates = tuple[tuple[bool, ...], tuple[bool, ...]]  # keys, values; each over the fuser's layer map


@dataclass(frozen=True)
class Prefilling:
    """Progress of reading the prompt, in positions over all models that read it."""

    mode: Mode
    done: int
    total: int  # 0: not known yet


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
    be read in this turn. `generated_tokens` count thoughts, too, `tokens_per_s` does not.
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


@dataclass(frozen=True)
class Crossed:
    """What each token of a C2C answer owes to the sharer, in nats.

    Each figure is log p(token) from the fused cache, minus log p(token) from another cache.
    """

    tokens: tuple[str, ...]  # [N] their texts; together they are the answer
    nats: tuple[float, ...]  # [N] over a cache fused with a silent sharer
    over_receiver: tuple[float, ...] = ()  # [N] over the receiver's own cache, where asked for


@dataclass(frozen=True)
class GateReport:
    """How one C2C answer's fusion changed the receiver's cache; kinds are keys, then values.

    Three quantities that are not the same: a *gate* is part of the fuser and open or closed; a
    *weight* in [0, 1] depends on the prompt, and is 0 where nothing was added; a *change* is
    ||what was added|| / ||the receiver's own||. Both are means over heads.
    """

    layers: tuple[tuple[int, int], ...]  # (receiver layer, sharer layer), L of them
    gates: Gates
    weights: tuple[tuple[float, ...], ...]  # [2][L] over the positions that are fused
    changes: tuple[tuple[float, ...], ...]  # [2][L]
    tokens: tuple[tuple[str, str], ...]  # [N] the receiver's token and the sharer's that feeds it
    token_weights: tuple[tuple[tuple[float, ...], ...], ...]  # [2][L][N]
    token_changes: tuple[tuple[tuple[float, ...], ...], ...]  # [2][L][N]
    start: int  # position of the first token in the receiver's prompt
    sharer: int = 0  # which one, should there be several


@dataclass(frozen=True)
class LiveGates:
    """What became of the answer's latest token, where the answer is fused while it is written."""

    report: GateReport


@dataclass(frozen=True)
class Link:
    """A sharer's way into the receiver."""

    sharer: str
    fuser: str
    layers: tuple[tuple[int, int], ...]  # (receiver layer, sharer layer)
    gates: Gates
    kinds: tuple[int, ...] = (0, 1)  # that are fused; the gates of another stay closed


@dataclass(frozen=True)
class Loaded:
    """What there is to talk to; without sharers or links, the modes that need them are missing."""

    receiver: str
    sharers: tuple[str, ...]
    links: tuple[Link, ...]
    device: str
    memory_gb: float
    context_length: int  # of the receiver
    receiver_layers: int
    needs: str = ""  # what a long conversation will take of the device's memory, in words
    missing: str = ""  # why there are no links, in a sentence
    reverse: str = ""  # the fuser that is known for the pair turned round
    unfinished: str = ""  # where the pair's last training stopped, in words
    is_elsewhere: bool = False  # the first sharer is on another machine: it writes nothing

    @property
    def gates(self) -> tuple[Gates, ...]:
        """Of each link's fuser, as they were when it was loaded."""
        return tuple(link.gates for link in self.links)


def fitting(gates: Sequence[Gates], own: tuple[Gates, ...]) -> tuple[Gates, ...]:
    """These gates; the fusers' own, if these are of other fusers."""

    def shapes(of: Sequence[Gates]) -> list[tuple[int, int]]:
        return [(len(keys), len(values)) for keys, values in of]

    return tuple(gates) if shapes(gates) == shapes(own) else own


@dataclass(frozen=True)
class TrainingBegun:
    """A fuser for the pair is being trained, beside the conversation."""

    plan: str  # steps, time, memory, in words
    step: int  # that are done already
    steps: int


@dataclass(frozen=True)
class TrainingStep:
    """One step more."""

    step: int
    steps: int
    loss: float  # nats per token
    left_s: float
    gates_open: int


@dataclass(frozen=True)
class Trial:
    """What the fuser, as it is after so many steps, has the receiver answer to a question."""

    step: int
    question: str
    text: str


@dataclass(frozen=True)
class TrainingOver:
    """Training has ended: all steps are done, or it can go on later; what was learned is kept."""

    step: int
    steps: int  # 0: it came to nothing
    verdict: str = ""  # a sentence; only of a whole run

    @property
    def is_whole(self) -> bool:
        """Whether all steps are done."""
        return 0 < self.steps <= self.step


@dataclass(frozen=True)
class Failed:
    """A job came to nothing; the message says what is wrong and what to do."""

    message: str
    mode: Mode | None = None  # whose answer it was


@dataclass(frozen=True)
class TurnOver:
    """Every mode that was asked has answered, failed, or been stopped."""

    memory_gb: float


Training = TrainingBegun | TrainingStep | Trial | TrainingOver
EngineEvent = (
    Event | Progress | GateReport | LiveGates | Crossed | Loaded | Training | Failed | TurnOver
)
