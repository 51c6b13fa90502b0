"""How much memory a conversation or a training run will need, as one budget, before it begins.

Weights and caches are known to the byte. What lives for a moment (a pass over a chunk, a fuser's
pass, a training step) is counted where it is largest, with factors that `benchmarks/memory.py`
compares with what MLX then takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx

from c2c_mlx import device
from c2c_mlx.config import FuserConfig, ModelShape, TrainConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fuser import count, parameters, pass_width, skeleton
from c2c_mlx.models.load import open_model
from c2c_mlx.models.sizes import ModelSize

CONTEXT = 4096  # positions that a conversation is taken to reach
MODES = ("c2c", "relay", "receiver", "sharer")
WRITTEN, READ = 32, 8  # answers and prompts that a model is given at once, at most: mlx-lm's own


@dataclass(frozen=True)
class Need:
    """Estimated bytes, and what the device allows."""

    receiver: int
    sharer: int
    fuser: int
    caches: int  # of all modes, for `tokens` positions each
    working: int  # the most that is there for a moment beside them
    tokens: int
    limit: int
    advice: str = ""  # what would fit, should this not

    @property
    def weights(self) -> int:
        """What stays, whatever is said."""
        return self.receiver + self.sharer + self.fuser

    @property
    def buffers(self) -> int:
        """What MLX keeps of memory that was given back."""
        return min(self.working, device.buffer_limit())

    @property
    def in_use(self) -> int:
        """What is there at one time."""
        return self.weights + self.caches + self.working

    @property
    def total(self) -> int:
        """All of it."""
        return self.in_use + self.buffers

    def record(self) -> dict[str, float | int]:
        """For `--json`, in GB."""
        names = ("receiver", "sharer", "fuser", "caches", "working", "buffers", "total", "limit")
        sizes = {f"{name}_gb": round(getattr(self, name) / 1e9, 3) for name in names}
        return sizes | {"tokens": self.tokens}

    def __str__(self) -> str:
        names = [name for name in ("receiver", "sharer", "fuser") if getattr(self, name)]
        parts = [f"{name} {getattr(self, name) / 1e9:.2f}" for name in names]
        parts.append(f"caches of {self.tokens} tokens {self.caches / 1e9:.2f}")
        parts.append(f"work {(self.working + self.buffers) / 1e9:.2f}")
        text = f"memory: {' + '.join(parts)} = about {self.total / 1e9:.1f} GB"
        text += f" of {self.limit / 1e9:.1f} GB"
        if self.total <= self.limit:
            return text
        return f"{text}, which will not fit: {self.advice or 'take smaller models'}"


def preflight(
    receiver: Path,
    sharers: Sequence[Path] = (),
    fusers: Sequence[FuserConfig] = (),
    *,
    bits: Literal[0, 4, 8] = 0,
    tokens: int = CONTEXT,
    modes: Sequence[str] = MODES,
    batch: int = 0,
) -> Need:
    """What conversations will need, one in each mode, all of them of the same length.

    Args:
        receiver: its folder.
        sharers: the folders of those that take part; one that stands there twice is loaded once.
        fusers: one per sharer, or none.
        bits: to which the fusers will be rounded, see `fusers.disk.load`.
        tokens: length of a conversation; the models' own limits are kept.
        modes: that will be asked; those that need what is not there are left out.
        batch: conversations that are answered at once, beside those that are kept; see `c2c-eval`.

    Raises:
        C2CError: if not even the weights fit, with a way to need less; or if a file can't be read.
    """
    own = ModelSize.read(receiver)
    read = {folder: ModelSize.read(folder) for folder in dict.fromkeys(sharers)}
    weights = (
        own.weights,
        sum(m.weights for m in read.values()),
        sum(_fuser_bytes(config, bits, own.itemsize) for config in fusers),
    )
    models = [own, *read.values()]
    asked_to_write = [read[s] for s in sharers[:1] if {"sharer", "relay"} & {*modes}]

    def need(tokens: int) -> Need:
        caches = sum(_caches(mode, own, read, sharers, fusers, tokens) for mode in modes)
        # As they were read, and side by side.
        caches += 2 * batch * max(m.cache(tokens) for m in [own, *asked_to_write])
        passes = [m.prefill(tokens) for m in models]
        passes += [_fusing(config, bits, own.itemsize, tokens) for config in fusers]
        passes.append(max(m.loading for m in models) - caches)
        return Need(*weights, caches, max(passes), tokens, device.memory_limit())

    wanted = need(min([tokens, *(m.context for m in models)]))
    advice = [f"{fewer} tokens will" for fewer in _halves(wanted.tokens) if _fits(need(fewer))][:1]
    if fusers and not bits and not device.is_dense():
        advice.append("--fuser-bits 8 saves memory")
    return _checked(replace(wanted, advice="; ".join(advice)))


def training(
    receiver: ModelSize,
    sharer: ModelSize,
    fuser: FuserConfig,
    config: TrainConfig,
    shapes: Sequence[tuple[int, int]] = (),
    teacher: FuserConfig | None = None,
) -> Need:
    """What a training run will need.

    Args:
        receiver: the model that answers.
        sharer: the model that is read.
        fuser: the configuration of the one that learns.
        config: the run's.
        shapes: of its batches, the longest prompt and the longest answer of each in tokens; none:
            as long as `config` allows.
        teacher: the configuration of a fuser that it learns from, if it does.

    Raises:
        C2CError: as `preflight` does.
    """
    shapes = shapes or [(config.max_tokens, config.max_tokens)]
    needs = [
        _training(receiver, sharer, fuser, count(fuser), config, prompt, answer)
        for prompt, answer in shapes
    ]
    need = max(needs, key=lambda need: need.total)
    if teacher:
        # It passes before the gradient begins.
        longest = max(prompt for prompt, _ in shapes)
        passing = _fusing(teacher, 0, receiver.itemsize, config.batch_size * longest)
        need = replace(
            need,
            fuser=need.fuser + _fuser_bytes(replace(teacher, bits=0), 0, receiver.itemsize),
            working=max(need.working, passing),
        )
    return _checked(need)


def answers_at_once(model: ModelSize, room: int, positions: int) -> int:
    """How many answers a model can write at once, each to a prompt of its own; one at least.

    Args:
        model: that writes them.
        room: bytes beside its weights.
        positions: of the longest prompt and its answer.
    """
    # Those that grow, those that join them, and what both become.
    caches = 3 * model.cache(positions)
    reading = model.prefill(positions)
    counts = range(WRITTEN, 1, -1)
    return next((n for n in counts if n * caches + min(n, READ) * reading <= room), 1)


def shape(model: Path, name: str) -> ModelShape:
    """What a fuser will depend on, but for the tokenizer.

    Raises:
        C2CError: if the layers' keys and values differ in shape.
    """
    return kv.model_shape(open_model(model)[0], name)


def _fits(need: Need) -> bool:
    return need.total <= need.limit


def _checked(need: Need) -> Need:
    """Refuses what can't even be loaded."""
    if need.weights <= need.limit:
        return need
    largest = max(("receiver", "sharer", "fuser"), key=lambda name: int(getattr(need, name)))
    smaller = "a smaller one" if device.is_dense() else "a smaller one, or a copy of fewer bits"
    if largest == "fuser" and not device.is_dense():
        smaller = "a smaller one; a chat can round it to fewer bits (--fuser-bits 4)"
    advice = f"they cannot be loaded; the {largest} is the largest: take {smaller}"
    raise C2CError(str(replace(need, advice=advice)))


# --- a conversation -----------------------------------------------------------------------------


def _caches(
    mode: str,
    own: ModelSize,
    read: dict[Path, ModelSize],
    sharers: Sequence[Path],
    fusers: Sequence[FuserConfig],
    tokens: int,
) -> int:
    """Bytes that one mode's conversation holds."""
    if mode == "receiver":
        return own.cache(tokens)
    if not sharers:
        return 0
    first = read[sharers[0]].cache(tokens)
    if mode == "sharer":
        return first
    if mode == "relay":
        return own.cache(tokens) + first
    if not fusers:
        return 0
    # A sharer that is read in two ways has two caches; the receiver's is there fused, too.
    readings = {(s, f.alignment) for s, f in zip(sharers, fusers, strict=True)}
    told = sum(8 * _slices(f) * f.receiver.kv_heads for f in fusers) * tokens  # of the changes
    return 2 * own.cache(tokens) + sum(read[s].cache(tokens) for s, _ in readings) + told


def _fusing(config: FuserConfig, bits: Literal[0, 4, 8], itemsize: int, tokens: int) -> int:
    """Bytes of a fuser's pass over a chunk, and of changes that wait for a message gate."""
    at_once = itemsize * pass_width(config)
    waiting = itemsize * _slices(config) * config.receiver.width if config.message_gate else 0
    room = device.fuser_pass(_fuser_bytes(config, bits, itemsize))
    return min(at_once * tokens, max(room, at_once)) + waiting * tokens


def _fuser_bytes(config: FuserConfig, bits: Literal[0, 4, 8], itemsize: int) -> int:
    """Bytes of a fuser's weights, in the receiver's precision or packed."""
    config = replace(config, bits=0 if device.is_dense() else config.bits or bits)
    weights = parameters(skeleton(config, 10**6, "the fuser")).values()
    return sum(w.nbytes if w.dtype == mx.uint32 else itemsize * w.size for w in weights)


def _slices(config: FuserConfig) -> int:
    return len(config.fused_kinds) * len(config.layer_map)


def _halves(tokens: int) -> list[int]:
    """Shorter conversations that are still worth having."""
    return [tokens >> n for n in range(1, 8) if tokens >> n >= 256]


# --- a training run -----------------------------------------------------------------------------


def _training(
    receiver: ModelSize,
    sharer: ModelSize,
    fuser: FuserConfig,
    size: int,
    config: TrainConfig,
    prompt: int,
    answer: int,
) -> Need:
    """Of steps over batches of this shape; `size` is the fuser's parameters."""
    rows = config.batch_size
    read = prompt + answer if fuser.fuse_response else prompt
    caches = rows * (read * (receiver.per_position + sharer.per_position))
    fused = rows * (prompt + answer) * receiver.per_position
    # The gradient needs nothing of layers below the first fused one.
    layers = receiver.layers - fuser.layer_map[0][0]
    # Attention that a gradient goes through writes its scores down on every device.
    scores = receiver.heads * (prompt + answer)
    inside = 2 * receiver.outputs + 4 * receiver.hidden + 2 * scores
    inside *= 1 if config.grad_checkpoint else layers
    kept = receiver.itemsize * rows * answer * (inside + layers * receiver.hidden)
    # As they are, shifted, their exponentials and their gradient.
    logits = 4 * min(4 * rows * answer * receiver.vocabulary, device.LOGITS)
    passing = 4 * rows * read * pass_width(fuser)
    adding = 4 * size  # a batch's gradient, before it is added to the others'
    working = fused + kept + logits + passing + adding
    # In float32: the weights, their gradient, and the optimiser's two moments.
    learning = 4 * 4 * size
    loading = max(receiver.loading, sharer.loading) - caches - learning  # it comes before these
    return Need(
        *(receiver.weights, sharer.weights, learning),
        *(caches, max(working, loading), rows * (prompt + answer), device.memory_limit()),
    )
