"""What both frozen models hold of a batch's prompts, computed once and kept on disk if wanted."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

from c2c_mlx.config import FuserConfig
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.project import KV
from c2c_mlx.text.alignment import message_groups
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training.caches import training_cache
from c2c_mlx.training.data import Batch, Example

Row = dict[str, mx.array]  # one example's part of a batch's prefills, half precision

_PREFIXES = 16  # template prefixes that are remembered; most data has one


@dataclass
class Prefills:
    """The frozen half of a step.

    Attributes:
        own: the receiver's cache over the prompts, one `TrainingCache` per layer.
        sharer: what feeds the fused columns, from `loss.read_sharer`.
    """

    own: kv.Cache
    sharer: KV


class Prefiller:
    """Runs both models over the prompts of a batch, or reads what an earlier run left.

    With a folder, everything a step sees has been rounded to half precision, whether it was read or
    just computed: a run that is resumed gets the same numbers. A batch is read only if all of its
    rows are there, so what is computed never depends on where an interrupted run stopped writing.

    Args:
        c2c: both models and the fuser.
        folder: where rows are kept, one file each; None: nothing is.
        limit_gb: rows are kept up to this size; later ones are computed each time.
        zero_sharer: the control; the sharer need not run, and is all zeros.
    """

    def __init__(self, c2c: C2C, folder: Path | None, limit_gb: float, zero_sharer: bool) -> None:
        self.c2c, self.zero_sharer = c2c, zero_sharer
        self.folder = folder / _fingerprint(c2c.fuser.config) if folder else None
        self._memos: tuple[step_loss.PrefixMemo, step_loss.PrefixMemo] = ({}, {})
        self._prefixes: dict[tuple[int, ...], kv.StackedKV] = {}
        self._room = limit_gb * 1e9
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._room -= sum(f.stat().st_size for f in self.folder.glob("*.safetensors"))

    def __call__(self, batch: Batch) -> Prefills:
        """Everything frozen that a step over this batch needs."""
        if self.folder is None or batch.start == batch.stop:
            own, sharer = self._run(batch, with_sharer=not self.zero_sharer)
            return Prefills(own, sharer)
        paths = [self.folder / f"{_key(e)}.safetensors" for e in batch.examples]
        rows = _load(paths)
        if rows is None:
            rows = _split(*self._run(batch, with_sharer=True), batch, self.c2c)
            mx.eval(rows)
            for path, row in zip(paths, rows, strict=True):
                self._keep(path, row)
        return self._join(rows, batch)

    def _run(self, batch: Batch, with_sharer: bool) -> tuple[kv.Cache, KV]:
        own = step_loss.prefill(self.c2c.receiver, batch.receiver, self._memos[0])
        if not with_sharer or batch.start == batch.stop:
            return own, step_loss.zeroed(self.c2c, batch)
        cache = step_loss.prefill(self.c2c.sharer, batch.sharer, self._memos[1])
        return own, step_loss.read_sharer(self.c2c, cache, batch)

    def _keep(self, path: Path, row: Row) -> None:
        size = sum(x.nbytes for x in row.values())
        if path.exists() or size > self._room:
            return
        partial = path.with_name(f".{path.stem}.{os.getpid()}.safetensors")
        try:
            mx.save_safetensors(str(partial), row)
            os.replace(partial, path)
        except (OSError, RuntimeError):  # a full disk: a cache is not worth a run
            partial.unlink(missing_ok=True)
            self._room = 0
        else:
            self._room -= size

    def _join(self, rows: list[Row], batch: Batch) -> Prefills:
        """Rows of any batch, laid out as this batch wants them."""
        config = self.c2c.fuser.config
        prefix, width = batch.receiver.prefix, batch.receiver.ids.shape[1]
        shared = self._prefix(batch.receiver.ids[0, :prefix])
        own: list[list[mx.array]] = [[], []]
        fed: list[list[mx.array]] = [[], []]
        for i, (row, example) in enumerate(zip(rows, batch.examples, strict=True)):
            start, stop = _fused_range(example, config.positions)
            before = None
            if start > prefix:  # other rows differ from here on; this one's template goes on
                before = self._prefix(np.array(example.receiver_ids[:start]))
            column = start + int(batch.receiver.padding[i]) - batch.start
            right = batch.stop - batch.start - column - (stop - start)
            for kind, name in enumerate(("keys", "values")):
                x = row[f"own_{name}"]
                if before is not None:
                    x = mx.concatenate([before[kind][:, 0, :, prefix:].astype(x.dtype), x], axis=2)
                own[kind].append(_pad(x, width - prefix - x.shape[2], 0))
                fed[kind].append(_pad(row[f"sharer_{name}"], column, right))
        dtype = shared.keys.dtype
        padding = mx.array(batch.receiver.padding) if batch.receiver.padding.any() else None
        stacked = []
        for kind in (0, 1):
            x = mx.stack(own[kind], axis=1).astype(dtype)  # [layers, B, Hr, N - prefix, Dr]
            head = mx.broadcast_to(shared[kind], (*x.shape[:3], prefix, x.shape[4]))
            stacked.append(mx.concatenate([head, x], axis=3))
        cache = training_cache(self.c2c.receiver, padding, prefix)
        for layer, c in enumerate(cache):
            c.keys, c.values = stacked[0][layer], stacked[1][layer]
        if self.zero_sharer:
            return Prefills(cache, step_loss.zeroed(self.c2c, batch))
        at = mx.array([self.c2c.sharer_layers.index(s) for _, s in config.layer_map])
        keys, values = (mx.stack(x, axis=1).astype(dtype)[at] for x in fed)
        return Prefills(cache, (keys, values))

    def _prefix(self, ids: np.ndarray) -> kv.StackedKV:
        """The receiver's own cache over a template's beginning, [layers, 1, Hr, len(ids), Dr]."""
        key = tuple(ids.tolist())
        if key not in self._prefixes:
            if len(self._prefixes) == _PREFIXES:
                self._prefixes.clear()
            cache = training_cache(self.c2c.receiver, None, 0)
            # One position more, so that even an empty prefix has a shape and a type.
            self.c2c.receiver(mx.array([[*key, 0]]), cache=cache)
            held = [c.keys_and_values() for c in cache]
            keys, values = (mx.stack([x[kind][:, :, : len(key)] for x in held]) for kind in (0, 1))
            mx.eval(keys, values)
            self._prefixes[key] = kv.StackedKV(keys, values)
        return self._prefixes[key]


def _fingerprint(config: FuserConfig) -> str:
    """A name for everything but the prompt that a row depends on."""
    models = [asdict(config.receiver), asdict(config.sharer)]
    parts = [models, config.layer_map, config.rotated_keys, config.positions]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _key(e: Example) -> str:
    parts = [e.receiver_ids, e.sharer_ids, e.index.tolist(), e.message.tolist()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _fused_range(example: Example, positions: str) -> tuple[int, int]:
    """[start, stop): from the first fused position to the last; two ends of the prompt if none."""
    fused = np.flatnonzero(message_groups(example.message[:-1], positions) >= 0)
    end = len(example.receiver_ids) - 1
    return (int(fused[0]), int(fused[-1]) + 1) if len(fused) else (end, end)


def _load(paths: list[Path]) -> list[Row] | None:
    """The rows, if all are there."""
    try:
        return [mx.load(str(path)) for path in paths]  # type: ignore[misc]
    except (OSError, RuntimeError):  # not there, or torn by a loss of power
        return None


def _split(own: kv.Cache, sharer: KV, batch: Batch, c2c: C2C) -> list[Row]:
    """Every row's own part, without padding and without what `_prefix` can give."""
    config = c2c.fuser.config
    distinct = mx.array([[s for _, s in config.layer_map].index(s) for s in c2c.sharer_layers])
    stacked = [mx.stack([c.keys_and_values()[kind] for c in own]) for kind in (0, 1)]
    rows = []
    for i, example in enumerate(batch.examples):
        start, stop = _fused_range(example, config.positions)
        column = start + int(batch.receiver.padding[i])
        at = column - batch.start
        row = {}
        for kind, name in enumerate(("keys", "values")):
            row[f"own_{name}"] = stacked[kind][:, i, :, column:]
            row[f"sharer_{name}"] = sharer[kind][distinct, i, :, at : at + stop - start]
        rows.append({name: mx.contiguous(x.astype(mx.float16)) for name, x in row.items()})
    return rows


def _pad(x: mx.array, left: int, right: int) -> mx.array:
    """Zeros around the positions of x [layers, H, N, D]."""
    return mx.pad(x, [(0, 0), (0, 0), (left, right), (0, 0)])
