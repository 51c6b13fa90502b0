"""What both frozen models hold of a batch's prompts, computed once and kept on disk if wanted."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

from c2c_mlx import atomic
from c2c_mlx.config import TrainConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.project import KV
from c2c_mlx.text.alignment import message_groups
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training import sharer as sharers
from c2c_mlx.training.batch import Batch, collate, pad
from c2c_mlx.training.caches import training_cache
from c2c_mlx.training.dataset import Example
from c2c_mlx.training.sections import Sections

Kept = dict[str, mx.array]  # one example's part of the prefills; keys and values half precision

_FORMAT = 3
_PREFIXES = 16  # template prefixes that are remembered; most data has one


def place(folder: str | Path) -> Path:
    """Makes a folder of kept prefills.

    Raises:
        C2CError: if it can't be made.
    """
    path = Path(os.path.expanduser(folder))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise C2CError(
            f"--prefill-cache {path}: cannot make the folder ({e.strerror}); name another"
        ) from None
    return path


@dataclass
class Prefills:
    """The frozen half of a step.

    Attributes:
        own: the receiver's cache over the prompts, one `TrainingCache` per layer; those below the
            first fused one may be empty if there is a state.
        sharer: what feeds the fused columns, from `loss.read_sharer`.
        state: of the responses at the first fused layer, [B, R, D], from `Sections.state`.
    """

    own: kv.Cache
    sharer: KV
    state: mx.array | None


class Prefiller:
    """Runs both models over the prompts of a batch, or reads what an earlier run left.

    With a folder, what is missing of a batch is prefilled together (a CPU reads the weights once
    instead of once a row), and what a step sees has been rounded to half precision, whether it was
    read or just computed. Of what one batch computes, all or nothing is kept: so a resumed run
    finds or computes the very numbers that it would have gone on with. Another run's, with which a
    folder is shared, are the same up to rounding.

    A file holds what the layers from the first fused one on need: their keys and values of the
    prompt, and the response's state below them, in the model's own precision, for it has channels
    that float16 has no room for.

    Args:
        c2c: both models and the fuser.
        config: says in which folder examples are kept, one file each, if they are, and how large
            it may get, with what other runs keep there; and whether this is the control, for which
            the sharer need not run, and is all zeros.
        weights: of the receiver and the sharer, by `fingerprint.of_weights`.
        say: told once when something does not fit.

    Attributes:
        computed: chats that were not in the folder.
        spent: seconds that these took.

    Raises:
        C2CError: if the folder can't be made.
    """

    def __init__(
        self,
        c2c: C2C,
        config: TrainConfig,
        weights: tuple[str, str],
        say: Callable[[str], None],
    ) -> None:
        self.c2c, self.zero_sharer = c2c, config.zero_sharer
        self.receiver = Sections(c2c.receiver, min(c2c.receiver_layers, default=0))
        self._memos: tuple[step_loss.PrefixMemo, step_loss.PrefixMemo] = ({}, {})
        self._prefixes: dict[tuple[int, ...], kv.StackedKV] = {}
        self._say, self._told, self._limit_gb = say, False, config.prefill_cache_gb
        self.computed, self.spent = 0, 0.0
        self.folder: Path | None = None
        if config.prefill_cache:
            fuser = c2c.fuser.config
            first = self.receiver.first
            parts = [_FORMAT, *weights, fuser.layer_map, fuser.rotated_keys, fuser.positions]
            parts.append(first)
            name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
            folder = place(config.prefill_cache)
            self.folder = place(folder / name)
            held = sum(f.stat().st_size for f in folder.rglob("[!.]*.safetensors"))
            # Every process of a run keeps what it computes.
            self._room = (self._limit_gb * 1e9 - held) / mx.distributed.init().size()

    def __call__(self, batch: Batch) -> Prefills:
        """Everything frozen that a step over this batch needs."""
        if self.folder is None or batch.start == batch.stop:
            whole = self.whole(batch)
            whole.own, whole.state = self._answers(whole.own, batch)
            mx.eval(whole.state, kv.arrays(whole.own))
            return whole
        paths = [self._path(self.folder, e) for e in batch.examples]
        kept = {path: found for path in paths if (found := _read(path))}
        missing = {p: e for p, e in zip(paths, batch.examples, strict=True) if p not in kept}
        if missing:
            began = time.perf_counter()
            computed = dict(zip(missing, self._compute([*missing.values()]), strict=True))
            self._keep(computed)
            kept |= computed
            self.computed += len(missing)
            self.spent += time.perf_counter() - began
        return self._join([kept[path] for path in paths], batch)

    def missing(self, examples: list[Example]) -> float:
        """The share of these that are not in the folder; all, if there is none."""
        if self.folder is None or not examples:
            return 1.0
        return sum(not self._path(self.folder, e).exists() for e in examples) / len(examples)

    def whole(self, batch: Batch) -> Prefills:
        """The prompts alone, just computed, with the receiver's cache in all of its layers."""
        return Prefills(*self._run(batch, with_sharer=not self.zero_sharer), None)

    def sharer(self, batch: Batch, computed: bool = False) -> KV:
        """What feeds the fused columns alone: as a step over this batch reads it, or as `whole`."""
        if computed or self.folder is None or batch.start == batch.stop:
            return self._read_sharer(batch, with_sharer=not self.zero_sharer)
        return self(batch).sharer

    def _path(self, folder: Path, example: Example) -> Path:
        return folder / f"{_key(example)}.safetensors"

    def _answers(self, own: kv.Cache, batch: Batch) -> tuple[kv.Cache, mx.array | None]:
        """The receiver's cache, over the responses as well if they are fused, and their state."""
        ids = mx.array(batch.inputs)
        state = self.receiver.state(ids, own)
        return self.receiver.ahead(ids, own, state) if batch.fuses_responses else own, state

    def _run(self, batch: Batch, with_sharer: bool) -> tuple[kv.Cache, KV]:
        own = step_loss.prefill(self.c2c.receiver, batch.receiver, self._memos[0])
        return own, self._read_sharer(batch, with_sharer)

    def _read_sharer(self, batch: Batch, with_sharer: bool) -> KV:
        if not with_sharer or batch.start == batch.stop:
            return step_loss.zeroed(self.c2c, batch)
        cache = sharers.prefill(self.c2c, batch.sharer, self._memos[1])
        return step_loss.read_sharer(self.c2c, cache, batch)

    def _compute(self, examples: list[Example]) -> list[Kept]:
        """What is kept of each, prefilled together."""
        batch = collate(examples, self.c2c.fuser.config.positions)
        own, sharer = self._run(batch, with_sharer=True)
        spans = [_fused_range(e, self.c2c.fuser.config.positions) for e in examples]
        starts = [
            start + int(n) for (start, _), n in zip(spans, batch.receiver.padding, strict=True)
        ]
        # The responses' states are those over what a step will read.
        behind = mx.arange(batch.receiver.ids.shape[1]) >= mx.array(starts)[:, None]  # [B, N]
        own = [c.copy(*(_rounded(x, behind) for x in c.keys_and_values())) for c in own]
        own, state = self._answers(own, batch)
        layers = [s for _, s in self.c2c.fuser.config.layer_map]
        distinct = mx.array([layers.index(s) for s in self.c2c.sharer_layers])
        held = [c.keys_and_values() for c in own[self.receiver.first :]]
        found: list[Kept] = [{} for _ in examples]
        for kind, name in enumerate(("keys", "values")):
            stacked = mx.stack([layer[kind] for layer in held])  # [layers, B, Hr, N, Dr]
            fed = sharer[kind][distinct]
            for row, (column, (start, stop)) in enumerate(zip(starts, spans, strict=True)):
                at = column - batch.start
                end = column + _own_length(examples[row], start)
                found[row][f"own_{name}"] = _half(stacked[:, row, :, column:end])
                found[row][f"sharer_{name}"] = _half(fed[:, row, :, at : at + stop - start])
        if state is not None:
            for row, e in enumerate(examples):
                found[row]["state"] = state[row, : len(e.response_ids)]  # [R, D]
        mx.eval(found)
        mx.synchronize()  # else a GPU may tell of a failure only when all of it is on the disk
        mx.clear_cache()  # the next rows have other lengths
        return found

    def _keep(self, found: dict[Path, Kept]) -> None:
        # A smaller batch may still fit; a resumed run, which counts files, would keep it.
        if sum(x.nbytes for kept in found.values() for x in kept.values()) > self._room:
            self._tell(f"holds {self._limit_gb:g} GB; --prefill-cache-gb allows more")
            return
        try:
            for path, kept in found.items():
                with atomic.overwriting(path) as partial:
                    mx.save_safetensors(str(partial), kept)
                self._room -= path.stat().st_size
        except (OSError, RuntimeError) as e:  # a full disk: a cache is not worth a run
            self._room = 0
            self._tell(f"cannot be written ({getattr(e, 'strerror', None) or e})")

    def _tell(self, why: str) -> None:
        if not self._told:
            self._say(f"prefill cache: {why}; what is not there is computed each time")
        self._told = True

    def _join(self, kept: list[Kept], batch: Batch) -> Prefills:
        """Rows of any batch, laid out as this batch wants them."""
        config = self.c2c.fuser.config
        first, longest = self.receiver.first, batch.inputs.shape[1]
        prefix, width = batch.receiver.prefix, batch.receiver.ids.shape[1]
        ahead = longest if batch.fuses_responses else 0
        shared = self._prefix(batch.receiver.ids[0, :prefix])
        dtype = shared.keys.dtype
        own: list[list[mx.array]] = [[], []]
        fed: list[list[mx.array]] = [[], []]
        for i, (row, example) in enumerate(zip(kept, batch.examples, strict=True)):
            start, stop = _fused_range(example, config.positions)
            before = None
            if start > prefix:  # other rows differ from here on; this one's template goes on
                before = self._prefix(np.array(example.receiver_ids[:start]))
            column = start + int(batch.receiver.padding[i]) - batch.start
            if start == stop:  # nothing is fused, wherever that is
                column = 0
            right = batch.stop - batch.start - column - (stop - start)
            for kind, name in enumerate(("keys", "values")):
                x = row[f"own_{name}"].astype(dtype)
                if before is not None:
                    x = mx.concatenate([before[kind][:, 0, :, prefix:], x], axis=2)
                behind = ahead - len(example.response_ids) if ahead else 0
                own[kind].append(_pad(x, width + ahead - prefix - x.shape[2] - behind, behind))
                fed[kind].append(_pad(row[f"sharer_{name}"], column, right))
        padding = mx.array(batch.receiver.padding) if batch.receiver.padding.any() else None
        stacked = []
        for kind in (0, 1):
            x = mx.stack(own[kind], axis=1)  # [layers, B, Hr, N - prefix, Dr]
            head = mx.broadcast_to(shared[kind], (*x.shape[:3], prefix, x.shape[4]))
            stacked.append(mx.concatenate([head, x], axis=3))
        hidden = batch.receiver.hidden
        cache = training_cache(self.c2c.receiver, padding, prefix, hidden=hidden)
        for layer, c in enumerate(cache[first:]):
            c.keys, c.values, c.ahead = stacked[0][layer], stacked[1][layer], ahead
        state = None
        if first:
            rows = [
                mx.pad(row["state"], [(0, longest - len(row["state"])), (0, 0)]) for row in kept
            ]
            state = mx.stack(rows)
        if self.zero_sharer:
            return Prefills(cache, step_loss.zeroed(self.c2c, batch), state)
        at = mx.array([self.c2c.sharer_layers.index(s) for _, s in config.layer_map])
        keys, values = (mx.stack(x, axis=1).astype(mx.float32)[at] for x in fed)
        return Prefills(cache, (keys, values), state)

    def _prefix(self, ids: np.ndarray) -> kv.StackedKV:
        """The receiver's own cache over a template's beginning, [layers, 1, Hr, len(ids), Dr].

        Of the layers from the first fused one on, as in files.
        """
        key = tuple(ids.tolist())
        if key not in self._prefixes:
            if len(self._prefixes) == _PREFIXES:
                self._prefixes.clear()
            # One position more, so that even an empty prefix has a shape and a type.
            cache = step_loss.prefill(self.c2c.receiver, pad([[*key, 0]], 0), {})
            held = [c.keys_and_values() for c in cache[self.receiver.first :]]
            keys, values = (mx.stack([x[kind][:, :, : len(key)] for x in held]) for kind in (0, 1))
            mx.eval(keys, values)
            self._prefixes[key] = kv.StackedKV(keys, values)
        return self._prefixes[key]


def _key(e: Example) -> str:
    parts = [e.receiver_ids, e.response_ids, e.sharer_ids, e.index.tolist(), e.message.tolist()]
    parts += [] if e.heard is None else [e.heard]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _read(path: Path) -> Kept | None:
    try:
        kept: Kept = mx.load(str(path))  # type: ignore[assignment]
        mx.eval(kept)  # a GPU's step would wait for the disk, and macOS ends what waits for long
        return kept
    except (OSError, RuntimeError):  # not there, or torn by a loss of power
        return None


def _fused_range(example: Example, positions: str) -> tuple[int, int]:
    """[start, stop): from the first fused position to the last; two ends of the prompt if none."""
    fused = np.flatnonzero(message_groups(example.read.message, positions) >= 0)
    end = len(example.receiver_ids) - 1
    return (int(fused[0]), int(fused[-1]) + 1) if len(fused) else (end, end)


def _own_length(example: Example, start: int) -> int:
    """Positions from `start` on that the receiver's cache is kept of."""
    return len(example.read.receiver_ids) - start


def _half(x: mx.array) -> mx.array:
    return mx.contiguous(x if x.itemsize == 2 else x.astype(mx.float16))


def _rounded(x: mx.array, behind: mx.array) -> mx.array:
    """Keys or values [B, H, N, D] as files give them back: rounded where `behind` [B, N] is."""
    if x.itemsize == 2:
        return x
    return mx.where(behind[:, None, :, None], _half(x).astype(x.dtype), x)


def _pad(x: mx.array, left: int, right: int) -> mx.array:
    """Zeros around the positions of x [layers, H, N, D]."""
    return mx.pad(x, [(0, 0), (0, 0), (left, right), (0, 0)])
