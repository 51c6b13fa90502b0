"""One GGUF file of the embedded pair -> the files of a model folder in mlx-lm's layout."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer

from c2c_mlx.models.embedded.build_tokenizer import Metadata, gemma3_tokenizer, smollm2_tokenizer

Tick = Callable[[int, int], None]  # steps done, of how many
Weights = dict[str, mx.array]

_CHUNK = 16384  # rows that are float32 at one time; Gemma's embedding has 262144

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LLAMA_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_GEMMA_NAMES = _LLAMA_NAMES | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_SMOLLM2_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "quantization": {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    },
}
_GEMMA_CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 640,
    "num_hidden_layers": 18,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "quantization": {
        "group_size": 64,
        "bits": 6,
        "model.embed_tokens": {"group_size": 64, "bits": 8},
    },
}


class _Reader(GGUFReader):  # type: ignore[misc]
    """The library's reader, four times as fast: slicing a plain array beats slicing a memmap."""

    data: np.ndarray[Any, Any]

    def _get(self, *args: Any, **kwargs: Any) -> Any:
        self.data = self.data.view(np.ndarray)
        return super()._get(*args, **kwargs)

    def tokenizer_value(self, key: str) -> Any:
        return self.fields[f"tokenizer.{key}"].contents()


def smollm2_weights(gguf_file: Path, reader: _Reader, tick: Tick) -> Weights:
    """SmolLM2's tensors, quantised just as the file has them (4-bit; the embedding 8-bit)."""
    weights: Weights = {}
    tensors = mx.load(str(gguf_file), format="gguf")
    assert isinstance(tensors, dict)
    for name, tensor in tensors.items():
        if ".attn_q." in name or ".attn_k." in name:
            tensor = regroup_rope_rows(tensor, _SMOLLM2_CONFIG["head_dim"])
        weights[mlx_name(name, _LLAMA_NAMES)] = _as_float32(tensor)
    return weights


def gemma3_weights(gguf_file: Path, reader: _Reader, tick: Tick) -> Weights:
    """Gemma's tensors; MLX has no K-quants, so they are requantised (6-bit; the embedding 8)."""
    weights: Weights = {}
    for done, tensor in enumerate(reader.tensors, start=1):
        name = mlx_name(tensor.name, _GEMMA_NAMES)
        weights |= _gemma_tensor(name, tensor.data, tensor.tensor_type)
        tick(done, len(reader.tensors))
    return weights


def mlx_name(name: str, table: dict[str, str]) -> str:
    """`blk.3.attn_q.scales` -> `model.layers.3.self_attn.q_proj.scales`."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{table[part]}.{kind}"


def regroup_rope_rows(rows: mx.array, head_dim: int) -> mx.array:
    """llama.cpp's interleaved rotary rows -> the two halves that mlx-lm rotates.

    Args:
        rows: (heads * head_dim, columns), any dtype.
        head_dim: rows per head.

    Returns:
        The same shape; in each head, (head_dim/2, 2) became (2, head_dim/2).
    """
    columns = rows.shape[-1]
    return rows.reshape(-1, head_dim // 2, 2, columns).swapaxes(1, 2).reshape(-1, columns)


def _as_float32(tensor: mx.array) -> mx.array:
    # Half precision would save a few MB and could overflow in the residual stream; and with float32
    # scales and norms a GPU computes what the CPU does, on which the shipped fuser was trained.
    return tensor.astype(mx.float32) if mx.issubdtype(tensor.dtype, mx.floating) else tensor


def _gemma_tensor(name: str, data: np.ndarray[Any, Any], kind: Any) -> Weights:
    if data.ndim == 1:
        # llama.cpp stores 1 + weight; mlx-lm adds the 1 itself.
        return {name: mx.array(dequantize(data, kind) - 1.0)}
    bits = 8 if "embed_tokens" in name else 6
    parts = zip(*_quantised_chunks(data, kind, bits), strict=True)
    stem = name.removesuffix("weight")
    suffixes = ("weight", "scales", "biases")
    joined = {stem + s: mx.concatenate(list(p)) for s, p in zip(suffixes, parts, strict=True)}
    mx.eval(joined)
    return joined


def _quantised_chunks(data: np.ndarray[Any, Any], kind: Any, bits: int) -> Iterator[list[mx.array]]:
    for start in range(0, len(data), _CHUNK):
        values = mx.array(dequantize(data[start : start + _CHUNK], kind))
        chunk = list(mx.quantize(values, group_size=64, bits=bits))
        mx.eval(chunk)
        yield chunk


@dataclass(frozen=True)
class Format:
    """How one of the two GGUF files becomes a model folder."""

    config: dict[str, Any]
    weights: Callable[[Path, _Reader, Tick], Weights]
    tokenizer: Callable[[Metadata], Tokenizer]
    special_tokens: dict[str, str]


FORMATS = {
    "smollm2": Format(
        _SMOLLM2_CONFIG,
        smollm2_weights,
        smollm2_tokenizer,
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
        },
    ),
    "gemma3": Format(
        _GEMMA_CONFIG,
        gemma3_weights,
        gemma3_tokenizer,
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    ),
}


def convert(gguf_file: Path, format_name: str, folder: Path, tick: Tick) -> None:
    """Writes config, weights and tokenizer of one model into an existing folder.

    Args:
        gguf_file: the whole file; its hash was checked, so its contents are what `FORMATS` expects.
        format_name: a key of `FORMATS`.
        folder: where mlx-lm will load from.
        tick: called with (steps done, steps in all).

    Raises:
        OSError: if the folder cannot be written, above all when the disk is full.
    """
    form = FORMATS[format_name]
    reader = _Reader(gguf_file)
    _save_weights(form.weights(gguf_file, reader, tick), folder / "model.safetensors")
    _save_tokenizer(form, reader, folder)
    _save_json(form.config, folder / "config.json")


def _save_weights(weights: Weights, path: Path) -> None:
    try:
        mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    except RuntimeError as e:  # MLX's only word for a failed write
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from e


def _save_tokenizer(form: Format, reader: _Reader, folder: Path) -> None:
    tokenizer = form.tokenizer(lambda key: reader.tokenizer_value(f"ggml.{key}"))
    # Not Tokenizer.save: on a full disk it raises a bare Exception.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": form.config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **form.special_tokens,
    }
    if "tokenizer.chat_template" in reader.fields:
        settings["chat_template"] = reader.tokenizer_value("chat_template")
    _save_json(settings, folder / "tokenizer_config.json")


def _save_json(value: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
