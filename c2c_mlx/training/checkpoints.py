"""A run's checkpoints: whole or not there, and continued by the run that they are of alone."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from c2c_mlx import atomic
from c2c_mlx.config import FuserConfig, TrainConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fusers import disk, trained
from c2c_mlx.training.dataset import Position

Metrics = dict[str, float]  # one line of metrics.jsonl
Settings = dict[str, Any]

FOLDER = "checkpoints"
_STATE, _ARRAYS = "state.json", "state.safetensors"

# They change when something is told or kept, not what is learned: they are never compared, and
# written for a run that goes on as it was planned. `iters` does, by the schedule, but to go on for
# longer is what one resumes for: it is told. How a step's chats are split, and whether layers are
# recomputed, changes rounding; and noise, where a run has any.
_FREE = (
    *("report_every", "eval_every", "save_every", "answers"),
    *("keep_checkpoints", "prefill_cache_gb"),
)
_SPLIT = ("batch_size", "accumulate")
_TOLD = ("iters", "grad_checkpoint", *_SPLIT)


def place(receiver: str, sharer: str) -> Path:
    """Where a pair's next run goes; one that came to nothing makes room, for it may have answers.

    One that is going on may yet come to something.

    Args:
        receiver: the model argument.
        sharer: likewise.
    """
    runs = trained.runs(receiver, sharer)
    if not runs or all_of(runs[-1]) or (runs[-1] / disk.CONFIG).exists() or is_going_on(runs[-1]):
        return trained.next_run(receiver, sharer)
    return runs[-1]


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stood.

    Attributes:
        step: optimiser steps that are done.
        tokens: targets that were learned from.
        position: where the stream of batches stands.
        best: the lowest validation loss so far; infinity if there is none.
        metrics: the latest that were measured on the validation chats.
        settings: from `settings_of`.
        fuser: its parameters, in float32: rounded ones would not continue exactly.
        optimizer: AdamW's state, likewise.
    """

    step: int
    tokens: int
    position: Position
    best: float
    metrics: Metrics
    settings: Settings
    fuser: Any
    optimizer: Any


def all_of(run: Path) -> list[Path]:
    """A run's complete checkpoints, the oldest first."""
    return sorted((run / FOLDER).glob("[0-9]*"))


def write(run: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Writes a checkpoint beside the others, and removes all but the latest `keep`.

    Raises:
        OSError, RuntimeError: if the disk won't have it; the earlier ones stay.
    """
    target = run / FOLDER / f"{checkpoint.step:07d}"
    target.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "step": checkpoint.step,
        "tokens": checkpoint.tokens,
        "position": checkpoint.position,
        "best": checkpoint.best if math.isfinite(checkpoint.best) else None,
        "metrics": checkpoint.metrics,
        "settings": checkpoint.settings,
    }
    text = json.dumps(state, indent=2)
    if target.exists():  # the same step, perhaps to be gone on from with a smaller batch
        with atomic.overwriting(target / _STATE) as partial:
            partial.write_text(text, encoding="utf-8")
    else:
        with atomic.appearing(target) as folder:
            parts = {"fuser": checkpoint.fuser, "optimizer": checkpoint.optimizer}
            arrays: dict[str, mx.array] = tree_flatten(parts, destination={})  # type: ignore[assignment]
            mx.save_safetensors(str(folder / _ARRAYS), arrays)
            (folder / _STATE).write_text(text, encoding="utf-8")
    for old in all_of(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """Keeps a run's folder from other runs, until the block or the process ends.

    Raises:
        C2CError: if a run is going on in it.
    """
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
    if (folder := _locked(run, fcntl.LOCK_EX)) is None:
        raise _going_on(run)
    try:
        yield
    finally:
        os.close(folder)


def check_alone(run: Path) -> None:
    """Looks into a run's folder, which may not be there yet, before anything is written.

    Raises:
        C2CError: if a run is going on in it.
    """
    if run.is_dir() and is_going_on(run):
        raise _going_on(run)


def is_going_on(run: Path) -> bool:
    """Whether a run is going on in a folder that exists."""
    if (folder := _locked(run, fcntl.LOCK_SH)) is None:  # so several may look at once
        return True
    os.close(folder)
    return False


def _going_on(run: Path) -> C2CError:
    return C2CError(f"{run}: a run is going on there; wait for its end, or name another folder")


def _locked(run: Path, how: int) -> int | None:
    """The open folder, locked as long as it is open; None: somebody else has locked it."""
    folder = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(folder, how | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        return None
    except OSError:  # a file system without locks
        pass
    return folder


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says what to do where a file of a run can't be written.

    Raises:
        C2CError: in one line.
    """
    try:
        yield
    except (OSError, RuntimeError) as e:  # MLX's own writing raises the latter
        reason = getattr(e, "strerror", None) or str(e)
        raise C2CError(
            f"{path}: cannot be written ({reason}); earlier checkpoints are whole: make room, then "
            "--resume"
        ) from None


def read(folder: Path) -> Checkpoint:
    """Reads one of `all_of`.

    Raises:
        C2CError: if it is damaged, or another version wrote it.
    """
    try:
        state = _state(folder)
        arrays: dict[str, mx.array] = mx.load(str(folder / _ARRAYS))  # type: ignore[assignment]
        mx.eval(arrays)  # the file will go when there are newer ones
        parts = tree_unflatten(list(arrays.items()))
        return Checkpoint(
            state["step"],
            state["tokens"],
            tuple(state["position"]),
            math.inf if state["best"] is None else state["best"],
            state["metrics"],
            state["settings"],
            parts["fuser"],
            parts["optimizer"],
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
        raise _damaged(folder, e) from None


def settings_in(folder: Path) -> Settings:
    """The settings of the run of one of `all_of`, from `settings_of`.

    Raises:
        C2CError: as `read` does.
    """
    try:
        return dict(_state(folder)["settings"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise _damaged(folder, e) from None


def _state(folder: Path) -> Any:
    return json.loads((folder / _STATE).read_text(encoding="utf-8"))


def _damaged(folder: Path, error: Exception) -> C2CError:
    return C2CError(
        f"{folder}: damaged, or of another version of c2c-mlx ({error!r}); remove it to resume the "
        "one before it, or start the run again in another folder"
    )


def settings_of(
    config: TrainConfig, fuser: FuserConfig, weights: tuple[str, str], chats: str, processes: int
) -> Settings:
    """All that the numbers of a run depend on, what is told when it changes, and what is free.

    Args:
        config: the run's.
        fuser: the fuser's.
        weights: the receiver's and the sharer's, by `fingerprint.of_weights`.
        chats: `Dataset.fingerprint`.
        processes: how many share the run.
    """
    settings: Settings = {
        "weights of the receiver": weights[0],
        "weights of the sharer": weights[1],
        "chats": chats,
        "processes": processes,
    }
    described = asdict(fuser)
    names = [name for name in described if name not in ("receiver", "sharer")]
    settings |= {f"fuser_config.{name}": described[name] for name in names}
    settings |= asdict(config)
    # Kept prefills are rounded to half precision; where they are kept does not matter.
    settings["prefill_cache"] = bool(config.prefill_cache)
    as_read: Settings = json.loads(json.dumps(settings))
    return as_read


def check_same(there: Settings, here: Settings) -> list[str]:
    """Compares a checkpoint's settings with those of the run that is to continue it.

    Returns:
        Changes that are allowed, for people.

    Raises:
        C2CError: naming all that differs and may not.
    """
    names = (there.keys() | here.keys()) - {*_FREE}
    changed = {k for k in names if there.get(k) != here.get(k)}
    allowed = {*_TOLD}
    if math.prod(there.get(k, 0) for k in _SPLIT) != math.prod(here[k] for k in _SPLIT):
        allowed -= {*_SPLIT}  # a step would learn from fewer or more chats
    if refused := sorted(changed - allowed):
        parts = ", ".join(_difference(name, there, here) for name in refused)
        raise C2CError(
            f"--resume: this is not the run that stopped there ({parts}): give it what it had, or "
            "start another with another --out"
        )
    return [_difference(name, there, here) for name in sorted(changed)]


def _difference(name: str, there: Settings, here: Settings) -> str:
    if name == "chats" or name.startswith("weights"):
        return f"other {name}"
    return f"{name} was {there.get(name)}, is {here.get(name)}"
