"""Two small random models with the shapes of real ones, for checks that need no download."""

from __future__ import annotations

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.models import gemma3_text, llama

VOCABULARY = 512


def receiver(dtype: mx.Dtype, bits: int = 0) -> nn.Module:
    """A Llama: 3 layers, 2 KV heads x 64, RoPE with its frequencies spread."""
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=128,
        num_hidden_layers=3,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        rope_theta=500_000.0,
        rope_scaling=scaling,
    )
    return _made(llama.Model(args), dtype, bits, seed=1, norm=1.0)


def sharer(dtype: mx.Dtype, bits: int = 0) -> nn.Module:
    """A Gemma: 3 layers, 1 KV head x 128; the first two see 32 positions."""
    args = gemma3_text.ModelArgs(
        model_type="gemma3_text",
        hidden_size=128,
        num_hidden_layers=3,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        query_pre_attn_scalar=128,
        vocab_size=VOCABULARY,
        sliding_window=32,
        sliding_window_pattern=3,
    )
    return _made(gemma3_text.Model(args), dtype, bits, seed=2, norm=0.0)  # it adds 1


def _made(model: nn.Module, dtype: mx.Dtype, bits: int, *, seed: int, norm: float) -> nn.Module:
    """With weights that depend on the seed alone, whatever the dtype."""
    keys = iter(mx.random.split(mx.random.key(seed), 500))

    def drawn(_: str, weight: mx.array) -> mx.array:
        if weight.ndim == 1:
            return mx.full(weight.shape, norm)
        return mx.random.normal(weight.shape, key=next(keys)) / weight.shape[-1] ** 0.5

    model.update(tree_map_with_path(drawn, model.parameters()))
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    model.eval()
    return model
