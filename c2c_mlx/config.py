"""What can be configured, checked when it is read. No MLX here: `--help` and tests load this alone.

Every dataclass refuses unknown keys and wrong types in one line, so that a typing error in a
config file is never a silent default.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from c2c_mlx.errors import C2CError

FORMAT_VERSION = 1

Order = Literal["sequential", "parallel"]

T = TypeVar("T")


def from_dict(cls: type[T], data: Any, where: str) -> T:
    """Builds the dataclass `cls` from parsed JSON or YAML.

    Args:
        cls: a dataclass of this module; nested dataclasses and tuples are converted too.
        data: the parsed document.
        where: named in the message of an error, e.g. the file.

    Raises:
        C2CError: for anything but an object, an unknown key, a missing one, or a wrong type.
    """
    if not isinstance(data, dict):
        raise C2CError(f"{where}: expected an object with fields, not {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - set(fields)):
        raise C2CError(f"{where}: unknown key '{unknown[0]}' (known: {', '.join(fields)})")
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(data)):
        raise C2CError(f"{where}: key '{missing[0]}' is missing")
    hints = get_type_hints(cls)
    values = {k: _convert(hints[k], v, f"{where}: '{k}'") for k, v in data.items()}
    try:
        return cls(**values)
    except ValueError as e:
        raise C2CError(f"{where}: {e}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin is Literal:
        if value not in get_args(hint):
            raise C2CError(f"{where} must be one of {', '.join(map(str, get_args(hint)))}")
        return value
    if origin is tuple:
        item, *rest = get_args(hint)
        length = None if rest == [...] else 1 + len(rest)
        if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
            raise C2CError(f"{where} must be a list" + (f" of {length}" if length else ""))
        if item is float and {*map(type, value)} <= {float}:
            return tuple(value)  # a saved session has a hundred thousand of them
        return tuple(_convert(item, v, where) for v in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise C2CError(f"{where} must be an object")
        return value
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise C2CError(f"{where} must be of type {hint.__name__}, not {type(value).__name__}")
    return value


@dataclass(frozen=True)
class ModelShape:
    """The part of a model that a fuser depends on."""

    name: str  # for people only: an alias, a hub id or a folder name
    layers: int  # all of them, those without keys and values as well: a layer map counts so
    kv_heads: int
    head_dim: int
    tokenizer: str = ""  # sha256 over the vocabulary; empty: unknown, not checked

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def width(self) -> int:
        """Channels of one position's keys (or values) over all heads."""
        return self.kv_heads * self.head_dim

    def __str__(self) -> str:
        return f"{self.name} ({self.layers} layers, {self.kv_heads} KV heads x {self.head_dim})"


@dataclass(frozen=True)
class FuserConfig:
    """One fuser. The defaults are those of the paper's released code (c2c, section 1).

    The fields below `dropout` go beyond the paper; `docs/experiments.md` says what each one bought.
    """

    receiver: ModelShape
    sharer: ModelShape
    layer_map: tuple[tuple[int, int], ...]  # (receiver layer, sharer layer), receiver order
    hidden_dim: int = 1024  # width of the trunk and of the dynamic weight's block
    intermediate_dim: int = 1024  # inner width of the trunk's and the projection's blocks
    depth: int = 3  # blocks on the way of the projection, and one; at least 3
    dropout: float = 0.1  # inside blocks, in training only
    alignment: Literal["same", "first", "longest", "span"] = "span"  # of the two tokenizers
    activation: Literal["gelu", "silu", "relu"] = "gelu"  # gelu is the exact one (erf)
    kinds: Literal["both", "keys", "values"] = "both"  # what is fused
    rotated_keys: bool = True  # False: the fuser sees and changes keys without RoPE
    normalise: bool = False  # inputs to zero mean and unit deviation, output to the receiver's
    # What of the prompt is fused: all of it, everything from the first message on (what stands
    # before it is the same in every chat), or the messages' own text.
    positions: Literal["all", "from_first_message", "messages"] = "all"
    message_gate: bool = False  # one more dynamic weight per message, closed below a half
    bits: Literal[0, 4, 8] = 0  # per number of a quantised weight; 0: it is not quantised
    fuse_response: bool = False  # the answer is fused, too, token by token as it is written

    def __post_init__(self) -> None:
        if self.depth < 3:
            raise ValueError(f"depth must be at least 3, not {self.depth}")
        if min(self.hidden_dim, self.intermediate_dim) < 1:
            raise ValueError("hidden_dim and intermediate_dim must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if not self.layer_map:
            raise ValueError("layer_map is empty: no layer would be fused")
        receiver_layers = [r for r, _ in self.layer_map]
        if receiver_layers != sorted(set(receiver_layers)):
            raise ValueError("layer_map must name each receiver layer once, in order")
        for r, s in self.layer_map:
            if not (0 <= r < self.receiver.layers and 0 <= s < self.sharer.layers):
                raise ValueError(f"layer_map pair ({r}, {s}) is outside of the two models' layers")

    @property
    def fused_kinds(self) -> tuple[str, ...]:
        """The leading axis of every parameter: keys before values."""
        return ("keys", "values") if self.kinds == "both" else (self.kinds,)


@dataclass(frozen=True)
class Pair:
    """Who talks, by names that `models.load_model` and `store.find_folder` understand.

    Attributes:
        receiver: answers.
        sharers: are read; the first one also answers alone, and writes for the text relay.
        fusers: one per sharer; none: what is known for it and the receiver.
        order: of several sharers, see `generate.FusedCache`.
        fuse_response: what the receiver writes is fused, too, whatever the fusers were made for.
        fuser_bits: to which the fusers are rounded when they are loaded; 0: they are not.
    """

    receiver: str
    sharers: tuple[str, ...]
    fusers: tuple[str, ...] = ()
    order: Order = "sequential"
    fuse_response: bool = False
    fuser_bits: Literal[0, 4, 8] = 0

    def __post_init__(self) -> None:
        if not self.sharers:
            raise ValueError("sharers: at least one is needed")
        if len(self.fusers) not in (0, len(self.sharers)):
            raise ValueError(
                f"{len(self.fusers)} fusers for {len(self.sharers)} sharers: name one for each, in "
                "the same order, or none"
            )

    @property
    def links(self) -> list[tuple[str, str | None]]:
        """Each sharer with the fuser that was named for it."""
        return list(zip(self.sharers, self.fusers or [None] * len(self.sharers), strict=True))


@dataclass(frozen=True)
class SamplingConfig:
    """How every mode decodes, so that modes can be compared."""

    max_tokens: int = 512
    temp: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not self.temp >= 0:  # NaN, too
            raise ValueError(f"temp must not be negative, not {self.temp}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2^64), not {self.seed}")


def _setting(default: Any, meaning: str) -> Any:
    """A field with what `--help` says of it."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are the recipe that won on the embedded pair."""

    iters: int = _setting(1000, "optimiser steps")
    batch_size: int = _setting(8, "chats per batch")
    accumulate: int = _setting(1, "batches per optimiser step, averaged by tokens")
    learning_rate: float = _setting(3e-3, "at its peak")
    schedule: Literal["cosine", "linear"] = _setting("cosine", "of the learning rate")
    warmup: int = _setting(20, "steps up to the peak")
    final_learning_rate: float = _setting(0.02, "as a fraction of the peak")
    weight_decay: float = _setting(0.01, "of AdamW")
    betas: tuple[float, float] = _setting((0.9, 0.98), "of AdamW, without bias correction")
    clip: float = _setting(1.0, "of the gradient's global norm")
    gates: Literal["learned", "open"] = _setting("open", "open: every gate open and untrained")
    initial_temperature: float = _setting(1.0, "of learned gates")
    final_temperature: float = _setting(0.001, "of learned gates")
    anneal_steps: int = _setting(1929, "from the initial to the final temperature")
    message_gate_weight: float = _setting(0.1, "of the loss that opens and shuts message gates")
    max_tokens: int = _setting(512, "longer prompts or answers are left out, and counted")
    seed: int = _setting(0, "of weights, noise and data order")
    report_every: int = _setting(10, "steps between lines of metrics.jsonl")
    eval_every: int = _setting(200, "steps between validations")
    answers: int = _setting(24, "greedy answers that the verdict compares, at most")
    save_every: int = _setting(200, "steps between checkpoints")
    keep_checkpoints: int = _setting(2, "the latest ones that stay on disk")
    grad_checkpoint: bool = _setting(False, "recompute layers: less memory, more time")
    prefill_cache: str = _setting("", "folder that keeps frozen prefills for later epochs and runs")
    prefill_cache_gb: float = _setting(20.0, "size of that folder, at most")
    zero_sharer: bool = _setting(False, "the control: the same fuser with nothing to read")

    def __post_init__(self) -> None:
        for name in (
            *("iters", "batch_size", "accumulate", "max_tokens", "anneal_steps"),
            *("report_every", "eval_every", "save_every", "keep_checkpoints"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("initial_temperature", "final_temperature", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative, not {self.warmup}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2^32), not {self.seed}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must be in (0, 1), not {self.learning_rate}")


@dataclass(frozen=True)
class Provenance:
    """Where a fuser comes from; shown by `c2c-weights show` and on its card, used by nothing."""

    source: str = ""  # a command, or the published checkpoint
    steps: int = 0
    data: tuple[str, ...] = ()
    licence: str = ""  # of the fuser itself
    metrics: dict[str, float] = field(default_factory=dict)
    verdict: str = ""  # of its training run, a sentence
    data_licence: str = ""

    def __post_init__(self) -> None:
        for name, value in self.metrics.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"metrics: {name!r} must be a number")

    @property
    def is_converted(self) -> bool:
        """Whether the authors trained the fuser, on models that are not quantised."""
        return self.source.startswith("converted from")
