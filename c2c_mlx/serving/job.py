"""What a client asks for and what it is told meanwhile: plain Python, the same for any dialect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from c2c_mlx.errors import C2CError
from c2c_mlx.events import Mode, Reason

Messages = list[dict[str, str]]


class TooLong(C2CError):
    """A conversation that a model's context, or the server's memory, has no room for."""


class Full(C2CError):
    """Too many wait already.

    Args:
        wait_s: when to try again.
    """

    def __init__(self, wait_s: int) -> None:
        super().__init__(f"too many requests wait already: try again in {wait_s} s")
        self.wait_s = wait_s


class Unavailable(C2CError):
    """Nobody answers here any more, or not yet."""


@dataclass(frozen=True)
class Served:
    """Who answers."""

    modes: tuple[Mode, ...]
    receiver: str
    sharers: tuple[str, ...]
    context_length: int  # of the receiver
    fuse_response: bool
    cache_gb: float  # that all conversations may take
    created: int  # when, in seconds since the epoch
    folder: str  # of the receiver
    dtype: str  # of its keys and values, where it is shared
    weights: str  # its fingerprint, where it is shared


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen; None: what the server was started with."""

    max_tokens: int | None = None
    temp: float | None = None  # 0: greedy
    top_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Token:
    """One token of an answer and how likely it was; -inf is told as -9999."""

    text: str  # as far as its bytes are characters
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[Token, ...] = ()  # the likeliest ones, themselves without any


@dataclass(frozen=True)
class Accepted:
    """The prompt fits, and will be read now."""


@dataclass(frozen=True)
class Piece:
    """Text of one answer that is certain; `tokens` only where they were asked for."""

    choice: int
    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Slice:
    """Keys and values of some positions of a cache that another machine asked for."""

    data: bytes  # safetensors


@dataclass(frozen=True)
class Ended:
    """One answer is whole."""

    choice: int
    reason: Reason


@dataclass(frozen=True)
class Done:
    """All answers are whole; what they cost. Times in seconds, 0 where a mode has no such part."""

    prompt_tokens: int
    cached_tokens: int  # of them, found read already
    completion_tokens: int  # over all answers, their ends included
    gates_open: int
    relayed_text: str
    relayed_tokens: int
    crossed: tuple[tuple[str, float], ...] | None  # per token, in nats; None: not asked for
    queued_s: float
    align_s: float
    sharer_s: float
    receiver_s: float
    fuse_s: float
    first_token_s: float  # from the arrival
    total_s: float


@dataclass(frozen=True)
class Failed:
    """No more will come; the error is the client's to mend if it is a C2CError."""

    error: Exception


Event = Accepted | Piece | Slice | Ended | Done | Failed
# What a job at work does next: a slice of a prompt, a token, or nothing before somebody else has.
Wait = Literal["read", "write", "others"]


@dataclass(eq=False)
class Job:
    """One request for answers.

    Attributes:
        mode: who answers, and from what.
        messages: the whole conversation; the client keeps it.
        emit: told every event, on the inference thread; must not block.
        sampling: the same for all answers, but that each draws its own numbers.
        n: answers to the one prompt.
        stop: text that ends an answer; it and all behind it are dropped.
        top_logprobs: how many of the likeliest tokens to tell beside each one; None: tell nothing.
        crossed: also tells what each token of the answer, the only one, owes to the sharers.
        gone: set when nobody waits for the answers any more; looked at once per token.
    """

    mode: Mode
    messages: Messages
    emit: Callable[[Event], object]
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    crossed: bool = False
    gone: bool = False

    def tell(self, event: Event) -> None:
        """Emits; who can't be told any more is taken to have gone."""
        try:
            self.emit(event)
        except Exception:
            self.gone = True


@dataclass(eq=False)
class CacheJob(Job):
    """One request for a cache instead of answers: the receiver reads, and what it holds is told.

    Attributes:
        ids: of the whole conversation; one below zero is padding.
        since: positions of it that the other side has already.
        layers: those that it wants.
        sent: slices that have left; of those that have not, only a few may wait.
    """

    ids: list[int] = field(default_factory=list)
    since: int = 0
    layers: list[int] = field(default_factory=list)
    sent: int = 0
