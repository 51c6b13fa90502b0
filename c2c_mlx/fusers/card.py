"""The model card that stands in every fuser folder."""

from __future__ import annotations

import re
from dataclasses import replace

from c2c_mlx.config import FuserConfig, ModelShape, Provenance
from c2c_mlx.models import registry
from c2c_mlx.models.hub import is_hub_id

_WORD = re.compile(r"'[^']*'|[^\s'=]+")  # of a command, as the shell quotes


def public(config: FuserConfig, provenance: Provenance) -> tuple[FuserConfig, Provenance]:
    """Both without what only says where things lie on the machine, or in the network, of somebody.

    Of a folder the last name stays, of an address that it was one.
    """
    receiver, sharer = (
        replace(model, name=_public(model.name)) for model in (config.receiver, config.sharer)
    )
    data, source = tuple(map(_public, provenance.data)), provenance.source
    if not provenance.is_converted:  # then it is a command, as it was typed
        source = _WORD.sub(lambda word: _public(word[0]), source)
    return (
        replace(config, receiver=receiver, sharer=sharer),
        replace(provenance, data=data, source=source),
    )


def _public(name: str) -> str:
    bare = name.strip("'")
    if "://" in bare:
        return "ADDRESS"
    # `org/name` is of the hub, or looks like it.
    is_path = bare.startswith(("/", "~", ".")) or bare.count("/") > 1
    return bare.rstrip("/").rpartition("/")[2] if is_path else name


def render(config: FuserConfig, provenance: Provenance) -> str:
    """The README.md of a fuser folder: front matter for the hub, and what a person asks first."""
    receiver, sharer = config.receiver, config.sharer
    return f"""---
{_front_matter(config, provenance)}
---

# Cache-to-Cache fuser: {_plain(sharer.name)} to {_plain(receiver.name)}

Projects the KV cache of the sharer into that of the receiver (arXiv 2510.03215), so that the
receiver answers with what the sharer understood. Made with c2c-mlx.

    c2c-chat --sharer {_plain(sharer.name)} --receiver {_plain(receiver.name)} --fuser FOLDER

| | layers | KV heads | head dim |
| --- | --- | --- | --- |
| receiver {_plain(receiver.name)} | {receiver.layers} | {receiver.kv_heads} | {receiver.head_dim} |
| sharer {_plain(sharer.name)} | {sharer.layers} | {sharer.kv_heads} | {sharer.head_dim} |

- Layers (receiver from sharer): {layer_map_text(config)}
- {_size(config)}
- Tokens: {tokens_text(config)}
{_origin(provenance)}"""


def _size(config: FuserConfig) -> str:
    text = f"Hidden {config.hidden_dim}, intermediate {config.intermediate_dim}"
    text += f", depth {config.depth}"
    return text + (f", quantised to {config.bits} bits" if config.bits else "")


def tokens_text(config: FuserConfig) -> str:
    """How the models' tokens meet, and which are fused, in one line."""
    text = f"alignment {config.alignment}, fused positions {config.positions}"
    return text + (", answers as they are written, too" if config.fuse_response else "")


def layer_map_text(config: FuserConfig) -> str:
    """The layer map in one line; runs of the same step are written as ranges."""
    runs: list[list[tuple[int, int]]] = []
    for pair in config.layer_map:
        if runs and pair == (runs[-1][-1][0] + 1, runs[-1][-1][1] + 1):
            runs[-1].append(pair)
        else:
            runs.append([pair])
    return ", ".join(
        f"{run[0][0]} from {run[0][1]}"
        if len(run) == 1
        else f"{run[0][0]}-{run[-1][0]} from {run[0][1]}-{run[-1][1]}"
        for run in runs
    )


def _front_matter(config: FuserConfig, provenance: Provenance) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    licence = provenance.licence
    # The hub knows short identifiers; everything else is "other" with a name.
    is_short = re.fullmatch(r"[A-Za-z0-9.-]+", licence)
    bases = [_base(config.receiver), _base(config.sharer)]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="validation",
            dataset_name="validation",
            metric_type=_plain(metric),
            metric_value=value,
        )
        for metric, value in provenance.metrics.items()
    ]
    data = ModelCardData(
        library_name="mlx",
        tags=["c2c", "cache-to-cache", "kv-cache", "mlx"],
        base_model=bases,
        license=(licence.lower() if is_short else "other") if licence else None,
        license_name=_plain(licence) if licence and not is_short else None,
        datasets=[
            name for name in (d.partition("@")[0] for d in provenance.data) if is_hub_id(name)
        ]
        or None,
        model_name="+".join(base.rpartition("/")[2] for base in bases),
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _base(model: ModelShape) -> str:
    """The original on the hub; a folder's path says nothing to anybody else."""
    alias = registry.alias_of(model.name)
    if alias and (entry := registry.find_model(alias)):
        return entry.base
    if is_hub_id(model.name):
        return model.name
    return re.sub(r"[^\w.-]+", "-", model.name.rstrip("/").rsplit("/", 1)[-1]) or "unknown"


def _origin(provenance: Provenance) -> str:
    lines = []
    if provenance.source:
        lines.append(f"- Source: `{_plain(provenance.source)}`")
    if provenance.steps:
        lines.append(f"- Training steps: {provenance.steps}")
    if provenance.data:
        lines.append(f"- Data: {_plain(', '.join(provenance.data))}")
    if provenance.data_licence:
        lines.append(f"- Licence of the data: {_plain(provenance.data_licence)}")
    if provenance.verdict:
        lines.append(f"- Verdict: {_plain(provenance.verdict)}")
    for name, value in provenance.metrics.items():
        lines.append(f"- {_plain(name)}: {value}")
    return "".join(f"{line}\n" for line in lines)


def _plain(text: str) -> str:
    """One line without anything that a terminal or Markdown would act upon."""
    return " ".join(
        "".join(c if c.isprintable() and c not in "|`<>" else " " for c in text).split()
    )
