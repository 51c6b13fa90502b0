"""A name, a folder or a hub id -> LanguageModel: one model with its tokenizer, ready to run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.tokenizer_utils import TokenizerWrapper

from c2c_mlx import device
from c2c_mlx.config import ModelShape
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.models import hub, registry, remote, remote_reader, untrusted
from c2c_mlx.models.embedded.install import install, is_installed, model_folder
from c2c_mlx.models.mended import mend
from c2c_mlx.progress import Progress as Progress
from c2c_mlx.progress import Report, silent

# For base models, which have no chat template: the form of a list of questions with answers.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}Question: {{ message['content'] }}\nAnswer:"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}\n"
    "{% endif %}{% endfor %}"
)
PLAIN_STOP = "\nQuestion:"  # a base model goes on with a question of its own

_CONTEXT = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    *("max_sequence_length", "seq_length", "max_context_length"),
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_UNBOUNDED = 1 << 20  # tokens; for models that state no limit, such as those without attention


@dataclass
class LanguageModel:
    """A loaded model, in the precision that `device` decides."""

    name: str  # as the user gave it
    path: Path  # the folder it came from
    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]  # config.json
    has_own_template: bool  # False: a base model, which got PLAIN_TEMPLATE
    is_elsewhere: bool = False  # its cache can be read from another machine; it writes nothing
    shared_as: str = ""  # what that machine calls it

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the vocabulary, id by id: equal ids mean equal text."""
        vocabulary = sorted((i, token) for token, i in self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    @cached_property
    def shape(self) -> ModelShape:
        """What a fuser depends on.

        Raises:
            C2CError: if the layers' keys and values differ in shape.
        """
        return kv.model_shape(self.model, self.shared_as or self.name, self.fingerprint)

    @property
    def context_length(self) -> int:
        """Tokens that the model was made for."""
        return context_length(self.model, self.config)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Text that ends an answer, besides the tokenizer's own end tokens."""
        # A base model does not know when it has answered: it goes on with a paragraph of its own.
        return () if self.has_own_template else (PLAIN_STOP, "\n\n")


def load_model(
    name_or_folder: str | Path, *, progress: Callable[[Progress], None] | None = None
) -> LanguageModel:
    """Loads a model by alias (`weights/registry.toml`), folder or hub id, tried in this order.

    Args:
        name_or_folder: e.g. "qwen", "~/models/mine", "mlx-community/Qwen3-0.6B-4bit".
        progress: called during a download, a conversion, and the loading itself.

    Raises:
        C2CError: if there is no such model, or it cannot be fetched, read or run.
    """
    report = progress or silent
    device.prepare()
    name = str(name_or_folder)
    folder = find_folder(name, report)
    report(Progress(f"loading {name}", 0, 2))
    is_elsewhere, shared_as = remote.is_url(name), ""
    if is_elsewhere:
        there = remote.Remote(name)
        config, shared_as = _read_json(folder / "config.json"), there.name
        model = remote_reader.skeleton(there, folder)
    else:
        model, config = open_model(folder)
        # Weights are read and converted while this thread builds the tokenizer; one by one, the
        # largest first: at once, most of them would be there in both forms.
        weights: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
        for weight in sorted(weights.values(), key=lambda w: -w.nbytes):
            mx.async_eval(weight)
    tokenizer = _load_tokenizer(folder, config)
    report(Progress(f"loading {name}", 1, 2))
    if not is_elsewhere:
        mx.eval(model.parameters())
        mx.clear_cache()  # what converting left behind is of no use to a conversation
    apart = folder / "chat_template.json"  # a processor's file, which tokenizers do not read
    if not tokenizer.has_chat_template and apart.exists():
        tokenizer.chat_template = _read_json(apart).get("chat_template")
        tokenizer.has_chat_template = bool(tokenizer.chat_template)
    own_template = tokenizer.has_chat_template
    if not own_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
        tokenizer.has_chat_template = True
    report(Progress(f"loading {name}", 2, 2))
    return LanguageModel(
        name, folder, model, tokenizer, config, own_template, is_elsewhere, shared_as
    )


def find_folder(name: str, report: Report = silent) -> Path:
    """The local folder of a model, after a download or conversion if need be.

    Raises:
        C2CError: if the name means nothing, or what it means cannot be fetched.
    """
    if remote.is_url(name):
        return remote.Remote(name).folder(report)
    if entry := registry.find_model(name):
        if entry.embedded:
            return install(entry.alias, entry.embedded, report)
        assert entry.hub is not None
        return hub.fetch(entry.hub, hub.MODEL_FILES, is_whole=_is_whole, report=report)
    if folder := _folder(name):
        return folder
    if hub.is_hub_id(name):
        return hub.fetch(name, hub.MODEL_FILES, is_whole=_is_whole, report=report)
    raise _unknown(name)


def find_here(alias: str) -> Path | None:
    """The local folder of a registry's model, without any request; None: it is not all here.

    Raises:
        C2CError: if what is here is damaged.
    """
    entry = registry.find_model(alias)
    if entry and entry.hub:
        return hub.find(entry.hub, hub.MODEL_FILES, is_whole=_is_whole)
    return model_folder(alias) if is_installed(alias) else None


def check_name(name: str) -> None:
    """Finds out whether a name means a model that can be had, at the price of a config.json.

    Raises:
        C2CError: if the name means nothing, or what it means cannot be fetched.
    """
    if remote.is_url(name):
        remote.Remote(name)
        return
    entry = registry.find_model(name)
    hub_id = entry.hub if entry else name
    if (entry and entry.embedded) or (not entry and _folder(name)):
        return
    if hub_id is None or not hub.is_hub_id(hub_id):
        raise _unknown(name)
    hub.fetch(hub_id, ("config.json",))


def _folder(name: str) -> Path | None:
    path = Path(os.path.expanduser(name))
    if path.is_file():
        raise C2CError(f"{name} is a file (GGUF?): give a folder in mlx-lm's layout, or a hub id")
    return path if path.is_dir() else None


def _unknown(name: str) -> C2CError:
    return C2CError(
        f"unknown model '{name}': give one of {', '.join(registry.aliases())}; "
        "or a folder, or a hub id such as mlx-community/Qwen3-0.6B-4bit"
    )


def open_model(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A folder's model in the precision that `device` decides, and its config.

    No weight is read before it is used, so this costs what the headers of the files cost.

    Raises:
        C2CError: if a file is missing or damaged, or mlx-lm does not know what to do with it.
    """
    config = _read_json(folder / "config.json")
    if remote.is_of_one(folder):  # weights that nobody will ever evaluate
        kind, arguments = remote.classes(folder)
        model = kind(arguments)
        model.set_dtype(device.dtype_of(mx.bfloat16))  # as the caches are that will come from it
        return model, config
    check_weights(folder)
    try:
        model, config = mlx_lm.utils.load_model(folder, lazy=True)
        mend(model)
        _cast(model)
        if device.is_dense():
            model = mlx_lm.utils.dequantize_model(model)
    except Exception as e:  # whatever a wrong field or tensor leads to inside mlx-lm
        raise C2CError(f"{folder}: mlx-lm cannot load this model ({_in_one_line(e)})") from e
    return model, config


def context_length(model: nn.Module, config: dict[str, Any]) -> int:
    """Tokens that a model was made for."""
    if not kv.attention_layers(kv.make_cache(model)):  # whatever its dataclass says
        return _UNBOUNDED
    return argument(model, config, *_CONTEXT) or _UNBOUNDED


def argument(model: nn.Module, config: dict[str, Any], *names: str) -> int:
    """What a model says of itself under one of these names; 0 if it is silent.

    mlx-lm's dataclasses know defaults that a config.json may leave out, and leave out what the
    arithmetic does not need, such as the context of a Gemma.
    """
    told: list[Any] = [getattr(m, "args", None) for m in (model, model.get("language_model", {}))]
    for source in (*map(vars, filter(None, told)), config, config.get("text_config") or {}):
        for name in names:
            if isinstance(value := source.get(name), int):
                return value
    return 0


def _cast(model: nn.Module) -> None:
    """Gives a model's floats the dtype that this device wants for them."""
    parameters: list[Any] = tree_flatten(model.parameters())  # type: ignore[assignment]
    is_packed = any(p.dtype == mx.uint32 for _, p in parameters)
    # mlx-lm's models name what has to keep its precision, such as the bias of a router.
    is_cast = getattr(model, "cast_predicate", lambda _: True)

    def held(path: str, p: mx.array) -> mx.array:
        if not mx.issubdtype(p.dtype, mx.floating) or not is_cast(path):
            return p
        # Float32 beside packed weights (the embedded pair's) would only make the caches twice as
        # large: what it multiplies has 4 to 8 bits.
        stored = mx.bfloat16 if is_packed and p.dtype == mx.float32 else p.dtype
        # Where it is read: a GPU would wait for the disk, and macOS ends work that waits for long.
        return p.astype(device.dtype_of(stored), stream=mx.cpu)

    model.update(tree_map_with_path(held, model.parameters()))


def _load_tokenizer(folder: Path, config: dict[str, Any]) -> TokenizerWrapper:
    from transformers.utils import logging

    logging.set_verbosity_error()  # its advice on stderr is not about what the user did
    try:
        return mlx_lm.utils.load_tokenizer(
            folder, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id")
        )
    except Exception as e:  # transformers and tokenizers raise anything, bare Exception included
        raise C2CError(
            f"{folder}: cannot read the tokenizer ({_in_one_line(e)}); fetch the folder again"
        ) from e


def check_weights(folder: Path) -> None:
    """Makes sure that the weights are there and whole, before MLX maps them.

    Raises:
        C2CError: if a file is missing or is no valid safetensors file.
    """
    if missing := _missing_weights(folder):
        raise C2CError(
            f"{folder} is incomplete: {missing} is missing; fetch the folder again "
            "(PyTorch weights must be converted with `mlx_lm.convert`)"
        )
    for path in folder.glob("model*.safetensors"):
        untrusted.read_header(path)


def _missing_weights(folder: Path) -> str | None:
    """The name of a weights file that should be there; None if all are."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return None if any(folder.glob("model*.safetensors")) else "model*.safetensors"
    shards = _read_json(index).get("weight_map", {}).values()
    return next((name for name in sorted(set(shards)) if not (folder / name).exists()), None)


def _is_whole(folder: Path) -> bool:
    """Whether a cached folder has all that a model needs; other programs fetch what they like."""
    has_tokenizer = any((folder / name).exists() for name in _TOKENIZERS)
    return has_tokenizer and (folder / "config.json").exists() and not _missing_weights(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise C2CError(f"{path.parent} is no model folder: it has no {path.name}") from e
    except (ValueError, OSError) as e:  # not JSON, not UTF-8, not readable
        raise C2CError(f"{path} cannot be read ({_in_one_line(e)}); fetch the folder again") from e
    if not isinstance(value, dict):
        raise C2CError(f"{path} must hold a JSON object; fetch the folder again")
    return value


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
