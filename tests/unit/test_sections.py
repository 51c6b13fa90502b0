"""A frozen model run in sections gives what the whole model gives, and else is run whole."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama

from c2c_mlx.fusion import kv
from c2c_mlx.training import sections
from c2c_mlx.training.batch import pad
from c2c_mlx.training.loss import prefill
from c2c_mlx.training.sections import Sections

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 300,
}
# Embedding scales, soft caps, scaled logits, sliding windows, learned positions, tied and untied.
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZE
    | {
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma2": SIZE
    | {
        "num_key_value_heads": 2,  # mlx-lm's takes no padded batch with fewer than heads
        "rms_norm_eps": 1e-5,
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": SIZE
    | {"query_pre_attn_scalar": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "cohere": {k: v for k, v in SIZE.items() if k != "head_dim"} | {"logit_scale": 0.3},
    "granite": {k: v for k, v in SIZE.items() if k != "head_dim"}
    | {
        "rms_norm_eps": 1e-5,
        "logits_scaling": 4.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 5.0,
        "residual_multiplier": 0.2,
        "max_position_embeddings": 64,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 1e4,
    },
    "gpt2": {
        "n_ctx": 64,
        "n_embd": 32,
        "n_head": 2,
        "n_layer": 4,
        "n_positions": 64,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 300,
    },
}
FIRST = 2
PROMPTS = pad([[*range(1, 7), *range(20 + i, 32 + i - 3 * i)] for i in range(3)], 6)
GOING_ON = np.array([[100, 101, 102], [110, 111, 112], [120, 121, 122]])
TARGETS = np.array([[101, 102, 103], [111, 112, 0], [121, 0, 0]])
MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    module = import_module(f"mlx_lm.models.{request.param}")
    mx.random.seed(5)
    made: nn.Module = module.Model(
        module.ModelArgs(model_type=request.param, **MODELS[request.param])
    )
    if hasattr(made, "tie_word_embeddings"):
        made.sanitize({})
    mx.eval(made.parameters())
    return made


def whole(model: nn.Module, cache: kv.Cache) -> mx.array:
    logits = model(mx.array(GOING_ON), cache=[c.copy() for c in cache])
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), mx.array(TARGETS))
    return losses * mx.array(MASK.astype(np.float32))


def changed(cache: kv.Cache, added: mx.array) -> kv.Cache:
    """The cache with a change in layer FIRST."""
    copies = [c.copy() for c in cache]
    copies[FIRST].keys = copies[FIRST].keys + added
    return copies


@pytest.mark.parametrize("tokens", [2, 99])
@pytest.mark.parametrize("recompute", [False, True])
def test_sections_lose_what_the_whole_model_loses(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, tokens: int, recompute: bool
) -> None:
    monkeypatch.setattr(sections, "_CHUNK", 4 * 300 * tokens)
    layers = list(model.layers)
    parts = Sections(model, FIRST)
    assert parts.first == FIRST and parts._has_head
    cache = prefill(model, PROMPTS, {})
    state = parts.state(mx.array(GOING_ON), cache)
    assert cache[0].columns == PROMPTS.ids.shape[1]
    bare = [c.copy() for c in cache]
    for c in bare[:FIRST]:
        c.keys = c.values = None

    def in_sections(added: mx.array) -> mx.array:
        held = changed(bare, added)
        return parts.losses(mx.array(GOING_ON), held, TARGETS, MASK, state, recompute)

    nothing = mx.zeros(cache[FIRST].keys.shape)
    found, expected = in_sections(nothing), whole(model, cache)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-5, atol=1e-6)
    weight = mx.arange(9).reshape(3, 3) + 1.0  # every token's own part of the gradient
    ours = mx.grad(lambda x: (in_sections(x) * weight).sum())(nothing)
    theirs = mx.grad(lambda x: (whole(model, changed(cache, x)) * weight).sum())(nothing)
    assert mx.abs(theirs).max().item() > 1e-4
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-3, atol=1e-6)
    assert list(model.layers) == layers


@pytest.mark.parametrize("tokens", [2, 99])
def test_what_nothing_learns_from_has_no_gradient(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(sections, "_CHUNK", 4 * 300 * tokens)
    parts, cache = Sections(model, FIRST), prefill(model, PROMPTS, {})
    vjp, calls = mx.vjp, []

    def counted(*given: Any) -> Any:
        calls.append(given)
        return vjp(*given)

    monkeypatch.setattr(mx, "vjp", counted)

    def losses(learning: bool) -> np.ndarray:
        held = [c.copy() for c in cache]
        return np.array(parts.losses(mx.array(GOING_ON), held, TARGETS, MASK, learning=learning))

    measured = losses(learning=False)
    assert not calls
    np.testing.assert_array_equal(measured, losses(learning=True))
    assert len(calls) == (3 if tokens == 2 else 1)


def test_a_model_that_cannot_be_divided_is_run_whole() -> None:
    """Its layers hand on more than a state, and its head looks at the ids as well."""

    class Layer(llama.TransformerBlock):  # type: ignore[misc]
        def __call__(self, h: mx.array, mask: Any = None, cache: Any = None) -> Any:
            return super().__call__(h, mask, cache), h.mean()

    class Inner(llama.LlamaModel):  # type: ignore[misc]
        def __call__(self, inputs: mx.array, cache: Any = None, *rest: Any) -> mx.array:
            h, mean = self.embed_tokens(inputs), mx.array(0.0)
            for layer, c in zip(self.layers, cache, strict=True):
                h, said = layer(h, c.make_mask(inputs.shape[1]), c)
                mean = mean + said
            return self.norm(h + mean)

    class Model(llama.Model):  # type: ignore[misc]
        def __call__(self, inputs: mx.array, cache: Any = None, *rest: Any) -> mx.array:
            return super().__call__(inputs, cache) * (1 + inputs[..., None] % 2)

    mx.random.seed(5)
    args = llama.ModelArgs(model_type="llama", **MODELS["llama"] | {"layer_types": None})
    model = Model(args)
    model.model = Inner(args)
    model.model.layers = [Layer(args) for _ in range(4)]
    mx.eval(model.parameters())
    parts = Sections(model, FIRST)
    assert parts.first == 0 and not parts._has_head
    cache = prefill(model, PROMPTS, {})
    assert parts.state(mx.array(GOING_ON), cache) is None
    found = parts.losses(mx.array(GOING_ON), [c.copy() for c in cache], TARGETS, MASK)
    np.testing.assert_allclose(np.array(found), np.array(whole(model, cache)), rtol=1e-6)
