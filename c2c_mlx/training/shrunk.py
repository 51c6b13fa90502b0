"""What a fuser that was made small is worth beside the big one, on chats it did not learn from."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx

from c2c_mlx import atomic
from c2c_mlx.fusers import disk
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.fuser import count
from c2c_mlx.training import checkpoints, measure, verdict
from c2c_mlx.training.dataset import Example
from c2c_mlx.training.distil import Distiller, errors

FILE = "shrunk.json"
_TIMED = 8  # prompts, each read by both in turns

Comparison = dict[str, Any]


def compare(trainer: Distiller) -> Comparison:
    """Compares the fuser in a finished run's folder with the one that it was made from.

    Returns:
        Of "big" and "small" the parameters, the share of a first token and the loss; the loss of
        the "receiver" alone; the "error" of the fused caches; and the difference of the losses in
        nats per token with its 95 % interval. What can't be measured is null.
    """
    big, chats, size = trainer.teacher, trainer.valid, trainer.config.batch_size
    small = C2C(big.receiver, big.sharer, disk.load(trainer.folder))
    both = {"big": big, "small": small}
    found: Comparison = {"chats": len(chats)}
    shares = _shares(both, chats)
    for name, c2c in both.items():
        parameters = count(c2c.fuser.config)
        found[name] = {"parameters": parameters, "first_token": shares.get(name), "loss": None}
    found |= {"receiver": None, "error": None, "difference": None}
    if chats:
        losses = {}
        for name, c2c in both.items():
            losses[name], tokens = measure.losses(c2c, trainer.prefills, chats, size)
            found[name]["loss"] = sum(losses[name]["valid"]) / sum(tokens)
        found["receiver"] = sum(losses["big"]["receiver"]) / sum(tokens)
        pair = losses["small"]["valid"], losses["big"]["valid"]
        found["difference"] = verdict.difference(*pair, tokens, trainer.config.seed)
        found["error"] = errors(big, small, trainer.prefills, chats, size)
    return found


def write(folder: Path, found: Comparison) -> None:
    """Writes what `compare` found beside the fuser.

    Raises:
        C2CError: if it can't be written.
    """
    with checkpoints.writing(folder / FILE), atomic.overwriting(folder / FILE) as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def lines(found: Comparison) -> list[str]:
    """The same for people."""
    big, small = found["big"], found["small"]
    sizes = [x["parameters"] for x in (big, small)]
    told = [
        f"size: {sizes[1] / 1e6:.2f} of {sizes[0] / 1e6:.2f} million parameters "
        f"({sizes[1] / sizes[0]:.1%})"
    ]
    if not found["chats"]:
        return [*told, "there were no chats to measure it on"]
    parts = [
        f"{kind} {error:.1%} ({found['error'][f'cache_{kind}']:.1%} of the cache)"
        for kind in ("keys", "values")
        if (error := found["error"].get(kind)) is not None
    ]
    told.append(f"error of what it adds: {', '.join(parts)}")
    told.append(
        f"share of a first token: {small['first_token']:.1%}, before {big['first_token']:.1%}"
    )
    low, high = found["difference"]["ci95"]
    told.append(
        f"loss on {found['chats']} chats that it did not learn from: {small['loss']:.3f}, before "
        f"{big['loss']:.3f} ({found['difference']['mean']:+.3f} [{low:+.3f}, {high:+.3f}]), "
        f"receiver alone {found['receiver']:.3f}"
    )
    return told


def _shares(both: dict[str, C2C], chats: list[Example]) -> dict[str, float]:
    """The median share of a first token that fusing takes, one prompt at a time."""
    found: dict[str, list[float]] = {}
    for example in chats[:1] + chats[:: -(-len(chats) // _TIMED) or 1]:
        for name, c2c in both.items():
            began = time.perf_counter()
            reading = FusedCache(c2c)
            cache = reading.extend([example])
            logits = c2c.receiver(mx.array([example.receiver_ids[-1:]]), cache=cache)
            mx.eval(logits, kv.arrays(cache))
            seconds = time.perf_counter() - began
            found.setdefault(name, []).append(reading.fusions[-1].fuse_s / seconds)
    return {name: statistics.median(each[1:]) for name, each in found.items()}  # the first warms up
