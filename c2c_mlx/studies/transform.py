"""How well can one model's cache be mapped into the other's? (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation import scoring
from c2c_mlx.evaluation.modes import check_room
from c2c_mlx.evaluation.report import table
from c2c_mlx.evaluation.task import Item
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.layers import last_aligned
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.fusion.rope import Rotation, rope_of
from c2c_mlx.studies import mapping
from c2c_mlx.studies.study import NO_REFERENCE, Result, Work, interval, naming
from c2c_mlx.text.alignment import TokenAlignment, align_chat
from c2c_mlx.text.tokens import response_ids

METHODS = ("least squares", "network", "mean")  # the mean of the target: knows nothing
QUANTITIES = ("keys", "values", "attention")
POINTS = 200  # of each kind in a picture
LEAST = 20  # items


@dataclass(frozen=True)
class _Sample:
    """What one item gives.

    Attributes:
        source: [2, Ls, N, Hs*Ds] the sharer's keys (without RoPE) and values, at N positions of
            messages.
        target: [2, Lr, N, Hr*Dr] the receiver's.
        own: the receiver's cache over all of the prompt but its last id.
        positions: [N] of the receiver.
        inputs: per layer how its attention is called at the answer's tokens.
    """

    source: np.ndarray
    target: np.ndarray
    own: kv.Cache
    positions: list[int]
    inputs: dict[int, _Call]


def run(work: Work) -> Result:
    """Maps are fitted on four fifths of the items, and judged on the last fifth.

    Raises:
        C2CError: if there are too few items, or a layer of a model has no rotary embedding.
    """
    if len(work.items) < LEAST:
        raise C2CError(f"--task: {len(work.items)} items to study; there must be {LEAST} or more")
    pair = _Pair(work)
    order = np.random.default_rng(work.seed).permutation(len(work.items)).tolist()
    cut = len(order) // 5
    shown = {0, len(pair.layer_map) // 2, len(pair.layer_map) - 1}
    done = work.log.records.get("layers", {})
    missing = [at for at in range(len(pair.layer_map)) if str(at) not in done]
    if missing:
        texts = [pair.aligned(item) for item in work.items]
        samples = []
        for number, at in enumerate(order, 1):
            samples.append(pair.sample(work.items[at], texts[at]))
            work.progress("reading", number, len(order))
        held_out, learnt = samples[:cut], samples[cut:]
        for at in missing:
            found = pair.judge(at, learnt, held_out, at in shown)
            work.log.append([{"mode": "layers", "id": str(at)} | found])
            work.progress("mapping", at + 1, len(pair.layer_map))
    layers = [work.log.records["layers"][str(at)] for at in range(len(pair.layer_map))]
    errors = {
        method: {
            quantity: scoring.mean(
                np.mean([of["errors"][method][quantity] for of in layers], axis=0).tolist(),
                work.seed,
            )
            for quantity in QUANTITIES
        }
        for method in METHODS
    }
    keep = ("receiver_layer", "sharer_layer", "errors", "points")
    return {
        "positions": layers[0]["positions"],
        "items": [len(order) - cut, cut],
        "errors": errors,
        "layers": [{key: of[key] for key in keep if key in of} for of in layers],
    }


class _Pair:
    """Two models, and what can be mapped between them."""

    def __init__(self, work: Work) -> None:
        self.receiver, self.sharer, self.task = work.receiver, work.sharers[0], work.task
        self.seed = work.seed
        self.models = (self.receiver.model, self.sharer.model)
        self.readers = [Reader(model) for model in self.models]
        self.layers = [kv.attention_layers(reader.cache) for reader in self.readers]
        self.layer_map = last_aligned(*(len(layers) for layers in self.layers))
        names = (self.receiver.name, self.sharer.name)
        self.rotations = [Rotation(*of) for of in zip(self.models, self.layers, names, strict=True)]
        self.attentions = [_attention(self.models[0], layer) for layer in self.layers[0]]

    def aligned(self, item: Item) -> TokenAlignment:
        """An item's prompt, for both models.

        Raises:
            C2CError: if one of them cannot read it, no message can be found in it, or nobody said
                what its answer is.
        """
        if not item.reference:
            raise C2CError(NO_REFERENCE)
        tokenizers = (self.receiver.tokenizer, self.sharer.tokenizer)
        text = align_chat(item.messages, *tokenizers, strategy="span", padding=False)
        with naming(item):
            check_room(self.receiver, text.receiver_ids)
            check_room(self.sharer, text.sharer_ids)
            if not (text.message[:-1] >= 0).any():
                raise C2CError("no position of a message can be told apart")
        return text

    def sample(self, item: Item, text: TokenAlignment) -> _Sample:
        """Lets both models read an item, and the receiver its answer."""
        positions = np.flatnonzero(text.message[:-1] >= 0)
        feeding = text.index[positions]
        self.readers[0].extend(text.receiver_ids[:-1])
        self.readers[1].extend(text.sharer_ids[: int(feeding.max()) + 1])
        target, source = self._bare(0, positions), self._bare(1, feeding)
        own = kv.make_cache(self.models[0])
        n = len(text.receiver_ids) - 1
        for layer in self.layers[0]:
            kv.append(own, layer, *kv.read_layer(self.readers[0].cache, layer, 0, n))
        mx.eval(kv.arrays(own))
        said = {"role": "assistant", "content": item.reference}
        answer = response_ids([*item.messages, said], self.receiver.tokenizer)
        ids = mx.array([[text.receiver_ids[-1], *answer[:-1]]])
        inputs = _inputs(self.models[0], self.layers[0], ids, self.readers[0].cache)
        kv.trim(self.readers[0].cache, n)
        return _Sample(source, target, own, positions.tolist(), inputs)

    def _bare(self, number: int, positions: np.ndarray) -> np.ndarray:
        """[2, L, N, H*D] keys without RoPE, and values."""
        n = int(positions.max()) + 1
        keys, values = kv.read(self.readers[number].cache, self.layers[number], 0, n)
        keys = self.rotations[number].take_off(keys.astype(mx.float32), 0)
        both = mx.stack([keys, values.astype(mx.float32)])[..., mx.array(positions), :]
        return np.array(both[:, :, 0].transpose(0, 1, 3, 2, 4).flatten(3))

    def judge(
        self, at: int, learnt: Sequence[_Sample], held_out: Sequence[_Sample], with_points: bool
    ) -> Result:
        """Fits the maps of one layer, keys and values, and measures them item by item."""
        r, s = self.layer_map[at]
        kept_out = np.concatenate(
            [np.full(len(x.positions), i >= len(learnt) * 3 // 4) for i, x in enumerate(learnt)]
        )
        maps: dict[str, list[mapping.Map]] = {method: [] for method in METHODS}
        middles = []
        for kind in (0, 1):
            x = np.concatenate([sample.source[kind, s] for sample in learnt])
            y = np.concatenate([sample.target[kind, r] for sample in learnt])
            middle = y.mean(axis=0)
            middles.append(middle)
            maps["least squares"].append(mapping.least_squares(x, y, kept_out))
            maps["network"].append(mapping.network(x, y, kept_out, self.seed))
            maps["mean"].append(mapping.constant(middle))
        errors: dict[str, dict[str, list[float]]] = {
            method: {quantity: [] for quantity in QUANTITIES} for method in METHODS
        }
        points: Result = {"keys": {}, "values": {}}
        for sample in held_out:
            clean = self._attend(r, sample, None)
            for method, of_kinds in maps.items():
                mapped = [of(sample.source[kind, s]) for kind, of in enumerate(of_kinds)]
                for kind, name in enumerate(("keys", "values")):
                    target = sample.target[kind, r]
                    off = mapping.error(mapped[kind], target, middles[kind])
                    errors[method][name].append(off)
                attended = self._attend(r, sample, mapped)
                errors[method]["attention"].append(mapping.error(attended, clean))
        found: Result = {
            "receiver_layer": self.layers[0][r],
            "sharer_layer": self.layers[1][s],
            "errors": errors,
            "positions": [len(kept_out), sum(len(x.positions) for x in held_out)],
        }
        if with_points:
            for kind, name in enumerate(("keys", "values")):
                target, source = (
                    np.concatenate([part for part in parts])[:POINTS]
                    for parts in (
                        [x.target[kind, r] for x in held_out],
                        [x.source[kind, s] for x in held_out],
                    )
                )
                points[name] = _points(source, maps["least squares"][kind](source), target)
            found["points"] = points
        return found

    def _attend(self, at: int, sample: _Sample, mapped: Sequence[np.ndarray] | None) -> np.ndarray:
        """A layer's attention output at the answer's tokens, keys and values mapped or its own."""
        layer = self.layers[0][at]
        keys, values = kv.read_layer(sample.own, layer, 0, kv.length(sample.own))
        if mapped is not None:
            heads, dim = keys.shape[1], keys.shape[3]
            low, high = min(sample.positions), max(sample.positions) + 1
            inside = mx.array([p - low for p in sample.positions])
            rows = [
                mx.array(x.astype(np.float32)).reshape(1, -1, heads, dim).transpose(0, 2, 1, 3)
                for x in mapped
            ]
            spread = mx.zeros((1, heads, high - low, dim))
            spread[:, :, inside] = rows[0]
            rotated = rope_of(self.models[0], layer, self.receiver.name)(spread, offset=low)
            places = mx.array(sample.positions)
            keys, values = mx.array(keys), mx.array(values)
            keys[:, :, places] = rotated[:, :, inside].astype(keys.dtype)
            values[:, :, places] = rows[1].astype(values.dtype)
        cache = kv.make_cache(self.models[0])[layer]
        cache.update_and_fetch(keys, values)
        attention = getattr(self.models[0].layers[layer], self.attentions[at])
        return np.array(sample.inputs[layer].again(attention, cache).astype(mx.float32))


@dataclass(frozen=True)
class _Call:
    """How a model calls an attention layer: x, mask and cache, and what else its family hands on.

    Attributes:
        args: the cache is the third, if it is not an option.
        options: by name.
    """

    args: tuple[Any, ...]
    options: dict[str, Any]

    def again(self, attention: Any, cache: Any) -> mx.array:
        """The same call with another cache: [B, T, D]."""
        args, options = list(self.args), dict(self.options)
        if len(args) > 2:
            args[2] = cache
        else:
            options["cache"] = cache
        out = attention(*args, **options)
        # Families whose layers share keys hand these on as well.
        return out[0] if isinstance(out, tuple) else out


class _Watched:
    """An attention layer that notes how it is called."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.call: _Call | None = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.call = _Call(args, options)
        return self.attention(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)


def _attention(model: nn.Module, layer: int) -> str:
    """The name of a layer's attention: the part that has the rotary embedding.

    Raises:
        C2CError: if it is built in another way.
    """
    for path, _ in model.layers[layer].named_modules():
        owner, _, name = path.rpartition(".")
        if name in ("rope", "rotary_emb") and owner and "." not in owner:
            return owner
    raise C2CError(f"layer {layer} of the receiver: its attention can't be told apart")


def _inputs(
    model: nn.Module, layers: Sequence[int], ids: mx.array, cache: kv.Cache
) -> dict[int, _Call]:
    """How each layer's attention is called in a pass; the cache grows by the ids."""
    watched = {}
    names = {layer: _attention(model, layer) for layer in layers}
    try:
        for layer, name in names.items():
            watched[layer] = _Watched(getattr(model.layers[layer], name))
            setattr(model.layers[layer], name, watched[layer])
        logits = model(ids, cache=cache)
        found = {layer: of.call for layer, of in watched.items() if of.call is not None}
        mx.eval(logits, [call.args[0] for call in found.values()])
    finally:
        for layer, of in watched.items():
            setattr(model.layers[layer], names[layer], of.attention)
    return found


def _points(source: np.ndarray, mapped: np.ndarray, target: np.ndarray) -> Result:
    """Rows in the plane in which the target varies most."""
    middle, directions = mapping.plane(target)
    found = {}
    for name, rows in (("source", source), ("mapped", mapped), ("target", target)):
        flat = (mapping.fitted(rows, target.shape[1]) - middle) @ directions
        found[name] = np.round(flat, 3).tolist()
    return found


def report(result: Result) -> str:
    """One row per method, and the best and the worst layers."""
    rows = [
        [method, *(interval(of[quantity], 3, "") for quantity in QUANTITIES)]
        for method, of in result["errors"].items()
    ]
    heads = ["map", *(f"error of {quantity} [95 %]" for quantity in QUANTITIES)]

    def attention(of: Result) -> float:
        return float(np.mean(of["errors"]["least squares"]["attention"]))

    ordered = sorted(result["layers"], key=attention)
    several = [*ordered[:3], *ordered[-3:]] if len(ordered) > 6 else ordered
    per_layer = [
        [f"{of['receiver_layer']} <- {of['sharer_layer']}"]
        + [f"{np.mean(of['errors']['least squares'][q]):.3f}" for q in QUANTITIES]
        for of in several
    ]
    (learnt, held_out), (rows_learnt, rows_held_out) = result["items"], result["positions"]
    return (
        f"Maps were fitted on {rows_learnt} positions of {learnt} items and judged on "
        f"{rows_held_out} positions of {held_out} others, keys without RoPE. An error of keys or "
        "values is the squared distance to the target over the target's squared distance to its "
        "mean: 0 is perfect, 1 is worth nothing. That of attention is the squared change of a "
        "layer's attention output at the answer's tokens, over its square. *mean* knows nothing of "
        f"the sharer.\n\n{table(heads, rows)}\n\nLeast squares, best and worst layers:\n\n"
        f"{table(['layer', *QUANTITIES], per_layer)}\n"
    )


def draw(result: Result, figure: Any) -> None:
    """Source, mapped and target of three layers, and the errors over the layers."""
    shown = [of for of in result["layers"] if "points" in of]
    panels = figure.subplots(2, len(shown) + 1)
    colours = {"source": "#999999", "mapped": "#e69f00", "target": "#0072b2"}
    for row, kind in enumerate(("keys", "values")):
        for axes, of in zip(panels[row], shown, strict=False):
            for name, points in of["points"][kind].items():
                axes.scatter(*zip(*points, strict=True), s=4, color=colours[name], label=name)
            axes.set_title(f"{kind} {of['receiver_layer']} <- {of['sharer_layer']}", fontsize=8)
            axes.tick_params(labelsize=6)
        axes = panels[row][-1]
        for method, style in (("least squares", "-"), ("network", "--"), ("mean", ":")):
            for quantity, colour in ((kind, "#0072b2"), ("attention", "#d55e00")):
                y = [np.mean(of["errors"][method][quantity]) for of in result["layers"]]
                x = [of["receiver_layer"] for of in result["layers"]]
                axes.plot(x, y, style, color=colour, label=f"{quantity}, {method}")
        axes.set_ylim(0, 1.5)
        axes.set_title("error over layers", fontsize=8)
        axes.legend(fontsize=5)
    panels[0][0].legend(fontsize=6)
