"""GGUF files of the embedded pair -> model folders and tokenizers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import gguf
import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer

from c2c_mlx.models import registry
from c2c_mlx.models.embedded import build_tokenizer, convert_gguf, install

GOLDEN = Path(__file__).parents[1] / "golden" / "data"


def test_rope_rows_are_regrouped_within_each_head() -> None:
    heads, dim = 3, 8
    rows = mx.arange(heads * dim * 2).reshape(heads * dim, 2)
    ours = np.array(convert_gguf.regroup_rope_rows(rows, dim))
    for head in range(heads):
        for i in range(dim // 2):
            for part in (0, 1):
                want = np.array(rows)[head * dim + 2 * i + part]
                assert (ours[head * dim + part * (dim // 2) + i] == want).all()


@pytest.mark.parametrize(
    ("name", "table", "want"),
    [
        ("token_embd.weight", "_LLAMA_NAMES", "model.embed_tokens.weight"),
        ("blk.3.attn_q.scales", "_LLAMA_NAMES", "model.layers.3.self_attn.q_proj.scales"),
        ("blk.3.ffn_norm.weight", "_LLAMA_NAMES", "model.layers.3.post_attention_layernorm.weight"),
        (
            "blk.0.ffn_norm.weight",
            "_GEMMA_NAMES",
            "model.layers.0.pre_feedforward_layernorm.weight",
        ),
    ],
)
def test_tensor_names(name: str, table: str, want: str) -> None:
    assert convert_gguf.mlx_name(name, getattr(convert_gguf, table)) == want


def write_gguf(
    path: Path, tensors: dict[str, tuple[np.ndarray, Any]], values: dict[str, Any]
) -> None:
    writer = gguf.GGUFWriter(path, "tiny")
    for name, (tensor, kind) in tensors.items():
        data = gguf.quants.quantize(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    for key, value in values.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


KIND = gguf.GGMLQuantizationType
GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
GEMMA_VALUES = {
    "tokenizer.ggml.tokens": [*GEMMA_TOKENS, "▁", "a", "b", "▁a", "ab", "▁ab"],
    "tokenizer.ggml.token_type": [3] * 4 + [6] * 256 + [1] * 6,
}


def dequantised(weights: dict[str, mx.array], stem: str, group_size: int, bits: int) -> np.ndarray:
    parts = [weights[f"{stem}.{kind}"] for kind in ("weight", "scales", "biases")]
    return np.array(mx.dequantize(*parts, group_size=group_size, bits=bits))


def test_gemma_is_requantised_and_its_norms_lose_the_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_gguf, "_CHUNK", 48)  # 128 rows: more than one chunk, and a rest
    random = np.random.default_rng(0)
    embedding = random.normal(size=(128, 64)).astype(np.float32)
    norm = np.linspace(0.5, 2, 64, dtype=np.float32)
    q = random.normal(size=(64, 64)).astype(np.float32)
    tensors = {
        "token_embd.weight": (embedding, KIND.Q8_0),
        "output_norm.weight": (norm, KIND.F32),
        "blk.0.attn_q.weight": (q, KIND.Q5_0),
    }
    write_gguf(tmp_path / "tiny.gguf", tensors, GEMMA_VALUES)
    ticks: list[tuple[int, int]] = []
    convert_gguf.convert(tmp_path / "tiny.gguf", "gemma3", tmp_path, lambda *t: ticks.append(t))

    weights = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(weights, dict)
    assert ticks == [(1, 3), (2, 3), (3, 3)]
    np.testing.assert_array_equal(np.array(weights["model.norm.weight"]), norm - 1)
    restored = dequantised(weights, "model.embed_tokens", 64, 8)
    np.testing.assert_allclose(restored, embedding, atol=0.04)
    restored = dequantised(weights, "model.layers.0.self_attn.q_proj", 64, 6)
    np.testing.assert_allclose(restored, q, atol=0.3)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gemma3_text"
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_smollm2_keeps_its_quantisation(tmp_path: Path) -> None:
    q = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    tensors = {
        "token_embd.weight": (q, KIND.Q8_0),
        "blk.0.attn_q.weight": (q, KIND.Q4_1),
        "blk.0.attn_v.weight": (q, KIND.Q4_1),
    }
    values = {
        "tokenizer.ggml.tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"],
        "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.chat_template": "{{ messages }}",
    }
    write_gguf(tmp_path / "tiny.gguf", tensors, values)
    convert_gguf.convert(tmp_path / "tiny.gguf", "smollm2", tmp_path, lambda done, total: None)

    weights = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(weights, dict)
    q4 = gguf.quants.dequantize(gguf.quants.quantize(q, KIND.Q4_1), KIND.Q4_1)
    v = dequantised(weights, "model.layers.0.self_attn.v_proj", 32, 4)
    np.testing.assert_allclose(v, q4, atol=1e-5)
    regrouped = np.array(convert_gguf.regroup_rope_rows(mx.array(q4), 64))
    q_proj = dequantised(weights, "model.layers.0.self_attn.q_proj", 32, 4)
    np.testing.assert_allclose(q_proj, regrouped, atol=1e-5)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages }}" and settings["eos_token"] == "<|im_end|>"


# --- tokenizers


def test_every_split_into_tokens_is_a_merge_ranked_by_its_result() -> None:
    vocab = {t: i for i, t in enumerate(["c", "b", "a", "bc", "ab", "abc"])}
    assert build_tokenizer.merges_of(vocab) == [
        *(("b", "c"), ("a", "b")),
        *(("a", "bc"), ("ab", "c")),
    ]


def test_gemma_falls_back_to_bytes() -> None:
    tokenizer = build_tokenizer.gemma3_tokenizer(lambda k: GEMMA_VALUES[f"tokenizer.ggml.{k}"])
    encoding = tokenizer.encode("ab abé")
    assert encoding.tokens == ["<bos>", "ab", "▁ab", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoding.ids) == "ab abé"


@pytest.fixture(params=["smollm2-135m", "gemma3-270m"])
def real_folder(request: pytest.FixtureRequest) -> Path:
    if not install.is_installed(request.param):
        pytest.skip(f"{request.param} is not in the cache; `c2c-chat` puts it there")
    return install.model_folder(request.param)


@pytest.mark.pair
def test_real_tokenizers_are_the_golden_ones(real_folder: Path) -> None:
    golden = json.loads((GOLDEN / "aligner" / "smollm2__gemma3.json").read_text(encoding="utf-8"))
    side, ids = {
        "smollm2-135m": ("slm", "slm_ids"),
        "gemma3-270m": ("llm", "original_llm_ids"),
    }[real_folder.name]
    file = real_folder / "tokenizer.json"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == golden[side]["tokenizer_json_sha256"]
    tokenizer = Tokenizer.from_file(str(file))
    assert tokenizer.get_vocab_size() == golden[side]["vocab_len"]
    for case in golden["texts"]:
        assert tokenizer.encode(case["text"]).ids == case[ids]


@pytest.mark.pair
def test_real_weights_fit_the_config(real_folder: Path) -> None:
    config = json.loads((real_folder / "config.json").read_text())
    weights = mx.load(str(real_folder / "model.safetensors"))
    assert isinstance(weights, dict)
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    assert len(layers) == config["num_hidden_layers"]
    assert {w.dtype for w in weights.values()} == {mx.uint32, mx.float32}


# --- the registry


def test_every_embedded_model_has_a_conversion() -> None:
    entries = [registry.find_model(alias) for alias in registry.aliases()]
    embedded = [e.embedded for e in entries if e and e.embedded]
    assert len(embedded) == 2
    assert all(e.format in convert_gguf.FORMATS and len(e.sha256) == 64 for e in embedded)
