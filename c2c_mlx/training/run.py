"""What a run is made of, as a user describes it; the sizes and the recipe of a new fuser.

No MLX here: `--help` and the app's forms need this alone.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from c2c_mlx.config import TrainConfig, from_dict
from c2c_mlx.errors import C2CError
from c2c_mlx.training.layouts import check_fields

# What a preset changes of FuserConfig; 'small' is the recipe that won on the embedded pair.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_dim": 64, "intermediate_dim": 64},
    "small": {"hidden_dim": 128, "intermediate_dim": 128},
    "paper": {},
}
RECIPE: dict[str, Any] = {
    "activation": "relu",
    "rotated_keys": False,
    "normalise": True,
    "positions": "messages",
    "message_gate": True,
    "dropout": 0.0,
}


@dataclass(frozen=True)
class RunConfig:
    """One run: between whom, on what, from which start, and how.

    Attributes:
        sharer: alias, folder or hub id.
        receiver: likewise.
        data: sources as `files.read_source` knows them, each perhaps with `=WEIGHT`.
        out: the run's folder, and the fuser's.
        fields: what the data calls the fields of a layout, see `layouts.renamed`.
        rows: of each source, at most; 0: all of them.
        licence: of the data, for the fuser's card.
        answer_with: which model answers rows that have no answer; empty: none.
        answer_tokens: at most, of such an answer.
        preset: size of a new fuser.
        fuser: the fuser to start from; empty: a new one.
        shrink: share of the parameters of `fuser` that a small one has at most, which begins from
            its weights and learns to do what it does; 0: `fuser` itself learns.
        fuser_config: fields of a new fuser that the preset does not fix.
        fuse_response: whether answers are fused, too, by a new fuser or the one to start from.
        twin: whether the control is trained, too: the same with nothing to read.
        train: the training itself.
        given: fields of `train` that stay as they are; the others may be made to fit the device.
    """

    sharer: str
    receiver: str
    data: tuple[str, ...]
    out: str
    fields: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    licence: str = ""
    answer_with: Literal["", "receiver", "sharer"] = ""
    answer_tokens: int = 40
    preset: Literal["tiny", "small", "paper"] = "small"
    fuser: str = ""
    shrink: float = 0.0
    fuser_config: dict[str, Any] = field(default_factory=dict)
    fuse_response: bool = False
    twin: bool = False
    train: TrainConfig = field(default_factory=TrainConfig)
    given: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data: at least one folder or data set is needed")
        check_fields(self.fields)
        if self.rows < 0:
            raise ValueError(f"rows must not be negative, not {self.rows}")
        if self.answer_tokens < 1:
            raise ValueError(f"answer_tokens must be at least 1, not {self.answer_tokens}")
        if self.fuser and self.fuser_config:
            raise ValueError("fuser_config is for a new fuser: leave it out, or fuser")
        if not 0 <= self.shrink < 1:
            raise ValueError(f"shrink must be a share above 0 and below 1, not {self.shrink}")
        if self.shrink and not self.fuser:
            raise ValueError("shrink: name the fuser that is to be made small")
        if self.shrink and self.fuse_response:
            raise ValueError(
                "shrink: a small fuser fuses what the big one does, and learns on prompts"
            )
        if self.shrink and (self.twin or self.train.zero_sharer or self.train.gates != "open"):
            raise ValueError("shrink: a small fuser has the big one's gates, and no control")

    @property
    def folder(self) -> Path:
        """Where the run lies: `out`, without a `~`."""
        return Path(os.path.expanduser(self.out))

    @property
    def sources(self) -> list[tuple[str, float | None]]:
        """Each source's name, and its weight if one was given.

        Raises:
            C2CError: for a weight that is no number above zero.
        """
        return [named(text) for text in self.data]


TRAIN = tuple(f.name for f in fields(TrainConfig))
ARGUMENTS = (*(f.name for f in fields(RunConfig) if f.name not in ("train", "given")), *TRAIN)
BESIDE = ("track", "time")  # what a recipe may also have
TRACKERS = ("wandb", "swanlab")


def described(values: dict[str, Any]) -> RunConfig:
    """The run that arguments by their names describe, those of its training among them.

    Raises:
        C2CError: for a name that there is not, or a value that can't be.
    """
    rest = {name: value for name, value in values.items() if name not in TRAIN}
    train = {name: value for name, value in values.items() if name in TRAIN}
    return from_dict(RunConfig, rest | {"train": train}, "arguments")


def check_tracker(name: str) -> None:
    """Looks for a package that hears of a run.

    Raises:
        C2CError: if it is none that is known, or not installed.
    """
    if name not in TRACKERS:
        raise C2CError(f"'track' must be one of {', '.join(TRACKERS)}")
    if importlib.util.find_spec(name) is None:
        raise C2CError(f"--track {name}: the package is missing; pip install 'c2c-mlx[{name}]'")


def named(text: str) -> tuple[str, float | None]:
    """The source and its weight, of DATA or DATA=WEIGHT.

    Raises:
        C2CError: for a weight that is no number above zero.
    """
    name, _, number = text.rpartition("=")
    try:
        name, weight = (name, float(number)) if name else (text, None)
    except ValueError:
        name, weight = text, None
    if weight is not None and not 0 < weight < math.inf:
        raise C2CError(f"--data {text}: the weight must be a number above zero")
    return name, weight
