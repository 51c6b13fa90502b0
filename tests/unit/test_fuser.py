"""The fuser by itself: which slices take part, and what the gates do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from c2c_mlx import device
from c2c_mlx.config import FuserConfig, ModelShape
from c2c_mlx.fusion.fuser import Fuser
from c2c_mlx.fusion.project import KV, gelu, soft_gates

LAYERS, BATCH, LENGTH = 3, 2, 5
RECEIVER, SHARER = ModelShape("r", 4, 2, 8), ModelShape("s", 5, 3, 4)
LAYER_MAP = ((0, 1), (2, 3), (3, 3))


def make(gate: float = 1.0, **options: Any) -> Fuser:
    mx.random.seed(2)
    options = {"hidden_dim": 12, "intermediate_dim": 10, "dropout": 0.0} | options
    fuser = Fuser(FuserConfig(RECEIVER, SHARER, LAYER_MAP, **options))
    fuser.gate_logit = mx.full(fuser.gate_logit.shape, gate)
    fuser.eval()
    return fuser


def caches(seed: int = 0) -> dict[str, KV]:
    mx.random.seed(seed)

    def kv(shape: ModelShape) -> KV:
        size = (LAYERS, BATCH, shape.kv_heads, LENGTH, shape.head_dim)
        return mx.random.normal(size), mx.random.normal(size)

    return {"sharer": kv(SHARER), "receiver": kv(RECEIVER)}


def same(a: KV, b: KV) -> bool:
    return all(mx.array_equal(x, y).item() for x, y in zip(a, b, strict=True))


def assert_close(found: mx.array, expected: mx.array) -> None:
    assert found.shape == expected.shape
    assert mx.abs(found - expected).max().item() < 1e-5


# --- slices


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_added_outside_of_messages(training: bool) -> None:
    fuser, given = make(), caches()
    fuser.train(training)
    whole = fuser.change(**given).delta
    delta = fuser.change(**given, messages=np.array([[0, 0, -1, 1, -1], [-1, 3, 3, 3, 3]])).delta
    assert mx.abs(delta[:, 0, :, mx.array([2, 4])]).max().item() == 0
    assert mx.abs(delta[:, 1, :, 0]).max().item() == 0
    if not training:
        assert_close(delta[:, 1, :, 1:], whole[:, 1, :, 1:])


def test_a_fresh_fuser_is_the_identity() -> None:
    fuser = Fuser(FuserConfig(RECEIVER, SHARER, LAYER_MAP, hidden_dim=12, intermediate_dim=10))
    fuser.eval()
    given = caches()
    assert not fuser.gates.any()
    assert fuser.change(**given).slices == []
    assert same(fuser(**given), given["receiver"])


def test_open_slices_do_not_depend_on_closed_ones() -> None:
    fuser, given = make(), caches()
    whole = fuser(**given)
    for open_slices in ([(0, 1)], [(1, 0), (1, 2)], [(0, 0), (0, 2), (1, 1)]):
        for kind in (0, 1):
            for layer in range(LAYERS):
                fuser.set_gate(kind, layer, (kind, layer) in open_slices)
        assert np.argwhere(fuser.gates).tolist() == [list(s) for s in open_slices]
        change = fuser.change(**given)
        assert change.slices == open_slices
        fused = fuser(**given)
        for kind in (0, 1):
            for layer in range(LAYERS):
                part, own = fused[kind][layer], given["receiver"][kind][layer]
                if (kind, layer) in open_slices:
                    assert_close(part, whole[kind][layer])
                    delta = change.delta[open_slices.index((kind, layer))]
                    assert_close(part, own + delta)
                else:
                    assert mx.array_equal(part, own)


def test_layers_and_kinds_do_not_mix() -> None:
    fuser, given = make(), caches()
    before = fuser(**given)
    keys, values = given["sharer"]
    after = fuser(sharer=(keys.at[1].add(1.0), values), receiver=given["receiver"])
    assert not mx.allclose(after[0][1], before[0][1])
    assert mx.array_equal(after[0][mx.array([0, 2])], before[0][mx.array([0, 2])])
    assert mx.array_equal(after[1], before[1])


def test_positions_and_rows_do_not_mix() -> None:
    fuser, given = make(), caches()
    whole = fuser(**given)
    part = {side: tuple(x[:, 1:, :, 2:4] for x in kv) for side, kv in given.items()}
    for a, b in zip(fuser(**part), whole, strict=True):
        assert_close(a, b[:, 1:, :, 2:4])


@pytest.mark.parametrize(("kinds", "row"), [("keys", 0), ("values", 1)])
def test_a_kind_that_is_not_fused_is_left_alone(kinds: str, row: int) -> None:
    fuser, given = make(kinds=kinds), caches()
    fused = fuser(**given)
    assert mx.array_equal(fused[1 - row], given["receiver"][1 - row])
    assert not mx.allclose(fused[row], given["receiver"][row])
    assert fuser.gates[row].all() and not fuser.gates[1 - row].any()
    fuser.set_gate(row, 1, False)
    assert fuser.gates[row].tolist() == [True, False, True]


def test_changed_parameters_are_noticed() -> None:
    fuser, given = make(), caches()
    before = fuser(**given)
    assert same(fuser(**given), before)
    fuser.proj_out.bias = fuser.proj_out.bias + 1.0
    assert not same(fuser(**given), before)
    fuser.gate_logit = mx.zeros_like(fuser.gate_logit)  # at zero a gate is closed
    assert same(fuser(**given), given["receiver"])


def test_gates_written_in_place_are_noticed() -> None:
    fuser, given = make(), caches()
    before = fuser(**given)
    fuser.gate_logit[1, 2] = -1.0
    after = fuser(**given)
    assert mx.array_equal(after[1][2], given["receiver"][1][2])
    fuser.gate_logit[1, 2] = 3.0
    assert same(fuser(**given), before)


def test_every_parameter_is_used() -> None:
    fuser, given = make(message_gate=True, depth=4), caches()

    def loss(parameters: Any) -> mx.array:
        fuser.update(parameters)
        return sum((x**2).sum() for x in fuser(**given))

    fuser.train()
    gradients = mx.grad(loss)(fuser.trainable_parameters())
    for name, gradient in tree_flatten(gradients):
        assert gradient.shape[:2] == (2, LAYERS)
        assert mx.abs(gradient).max().item() > 0, name


def test_shapes_of_a_change() -> None:
    change = make(message_gate=True).change(**caches())
    assert change.delta.shape == (6, BATCH, 2, LENGTH, 8)
    assert change.weight.shape == (6, BATCH, 2, LENGTH, 1)
    assert change.message_weight is not None
    assert change.message_weight.shape == (1, BATCH, 1, LENGTH, 1)
    assert 0 < change.weight.min().item() and change.weight.max().item() < 1
    assert make().change(**caches()).message_weight is None


def test_gelu_keeps_nothing_but_its_input_for_the_gradient() -> None:
    x = mx.random.normal((1 << 20,))

    def loss(x: mx.array, f: Callable[[mx.array], mx.array]) -> mx.array:
        for _ in range(8):
            x = f(x)
        return x.sum()

    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.grad(loss)(x, gelu))
    assert mx.get_peak_memory() - before < 80 * x.nbytes  # with all that is between: 163


# --- gates in training


def test_soft_gates_harden_as_the_temperature_falls() -> None:
    mx.random.seed(0)
    uniform, logit = mx.random.uniform(shape=(1000,)), mx.array(0.7)
    warm, cold = soft_gates(logit, uniform, 1.0), soft_gates(logit, uniform, 1e-4)
    assert ((warm > 0.01) & (warm < 0.99)).mean().item() > 0.9
    assert ((cold < 0.01) | (cold > 0.99)).mean().item() > 0.99
    assert mx.array_equal(warm > 0.5, cold > 0.5)
    for extreme in (0.0, 1 - 2**-24):
        gate = soft_gates(logit, mx.array(extreme), 1.0)
        assert 0 <= gate.item() <= 1


def test_a_gate_opens_as_often_as_its_logit_says() -> None:
    """One Gumbel variate x: the gate is open where x > -logit, with probability 1 - exp(-e^l)."""
    mx.random.seed(0)
    for logit in (-1.0, 0.0, 1.0):
        gates = soft_gates(mx.array(logit), mx.random.uniform(shape=(20000,)), 1e-3)
        expected = 1 - np.exp(-np.exp(logit))
        assert (gates > 0.5).mean().item() == pytest.approx(expected, abs=0.015)


def test_closed_slices_take_part_in_training() -> None:
    fuser, given = make(gate=-1.0), caches()
    fuser.train()
    assert len(fuser.change(**given).slices) == 6
    assert not same(fuser(**given), given["receiver"])
    mx.random.seed(5)
    once = fuser(**given)
    assert not same(fuser(**given), once)  # other noise
    mx.random.seed(5)
    assert same(fuser(**given), once)


def test_without_a_temperature_training_has_hard_gates() -> None:
    fuser, given = make(), caches()
    fuser.set_gate(0, 1, False)
    expected = fuser(**given)
    fuser.train()
    fuser.temperature = None
    assert same(fuser(**given), expected)


def test_dropout_in_training_only() -> None:
    plain, given = make(), caches()
    dropping = make(dropout=0.5)
    assert same(dropping(**given), plain(**given))
    dropping.train()
    dropping.temperature = None
    assert not same(dropping(**given), plain(**given))
    assert not same(dropping(**given), dropping(**given))


# --- message gate


MESSAGES = np.array([[0, 0, 1, 1, -1], [-1, 3, 3, 3, 3]])


def test_one_weight_per_message() -> None:
    change = make(message_gate=True).change(**caches(), messages=MESSAGES)
    assert change.message_weight is not None
    weight = np.array(change.message_weight)[:, :, 0, :, 0]
    for row, numbers in enumerate(MESSAGES):
        for number in set(numbers.tolist()) - {-1}:
            inside = weight[:, row, numbers == number]
            np.testing.assert_allclose(inside, inside[:, :1].repeat(inside.shape[1], axis=1))
    assert (weight[:, 0, 0] != weight[:, 0, 2]).all()


def test_a_message_does_not_see_the_others() -> None:
    fuser, given = make(message_gate=True), caches()
    whole = fuser.change(**given, messages=MESSAGES).message_weight
    part = {side: tuple(x[:, :1, :, 2:4] for x in kv) for side, kv in given.items()}
    alone = fuser.change(**part).message_weight
    assert whole is not None and alone is not None
    assert_close(whole[:, :1, :, 2:4], alone)


def test_a_message_gate_below_a_half_is_closed_at_inference_only() -> None:
    fuser, given = make(message_gate=True), caches()
    fuser.message_head.weight = mx.zeros_like(fuser.message_head.weight)
    fuser.message_head.bias = mx.full(fuser.message_head.bias.shape, -0.1)
    assert same(fuser(**given), given["receiver"])
    fuser.train()
    fuser.temperature = None
    assert not same(fuser(**given), given["receiver"])


# --- normalisation


def test_normalisation_of_nothing_changes_nothing() -> None:
    given = caches()
    assert same(make(normalise=True)(**given), make()(**given))


def test_inputs_are_normalised_and_outputs_scaled() -> None:
    fuser, plain, given = make(normalise=True), make(), caches()
    mean = 3.0
    fuser.input_mean = mx.full(fuser.input_mean.shape, mean)
    fuser.input_scale = mx.full(fuser.input_scale.shape, 0.5)
    fuser.output_scale = mx.full(fuser.output_scale.shape, 7.0)
    moved = {side: tuple(2 * x + mean for x in kv) for side, kv in given.items()}
    assert_close(fuser.change(**moved).delta / 7, plain.change(**given).delta)


def test_the_normalisation_is_not_trained() -> None:
    names = {name for name, _ in tree_flatten(make(normalise=True).trainable_parameters())}
    everything = {name for name, _ in tree_flatten(make(normalise=True).parameters())}
    assert everything - names == {"input_mean", "input_scale", "output_scale"}


# --- quantised weights

WIDE = {"hidden_dim": 64, "intermediate_dim": 128}
WIDE_PAIR = ModelShape("r", 4, 2, 64), ModelShape("s", 5, 1, 64)


def wide(gates: list[list[float]], receiver: ModelShape = WIDE_PAIR[0], **options: Any) -> Fuser:
    mx.random.seed(2)
    fuser = Fuser(FuserConfig(receiver, WIDE_PAIR[1], LAYER_MAP, **WIDE, **options))
    fuser.gate_logit = mx.array(gates)
    fuser.eval()
    return fuser


def wide_caches(receiver: ModelShape = WIDE_PAIR[0]) -> dict[str, KV]:
    def kv(shape: ModelShape) -> KV:
        size = (LAYERS, BATCH, shape.kv_heads, LENGTH, shape.head_dim)
        return mx.random.normal(size), mx.random.normal(size)

    mx.random.seed(0)
    return {"sharer": kv(WIDE_PAIR[1]), "receiver": kv(receiver)}


@pytest.mark.parametrize("gates", [[[1.0] * 3] * 2, [[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]]])
@pytest.mark.parametrize("options", [{}, {"normalise": True}])
@pytest.mark.parametrize(("bits", "near"), [(8, 0.01), (4, 0.2)])
def test_quantised_is_as_its_dense_copy(
    gates: list[list[float]], options: dict[str, Any], bits: Literal[4, 8], near: float
) -> None:
    fuser, given = wide(gates, **options), wide_caches()
    original = fuser.change(**given).delta
    fuser.quantise(bits)
    assert fuser.config.bits == bits
    packed = fuser.change(**given)
    fuser.dequantise()
    assert fuser.config.bits == 0
    dense = fuser.change(**given)
    assert packed.slices == dense.slices
    assert_close(packed.delta, dense.delta)
    error = mx.linalg.norm(dense.delta - original) / mx.linalg.norm(original)
    assert 0 < error.item() < near


def test_weights_that_do_not_divide_into_groups_stay_dense() -> None:
    odd = ModelShape("r", 4, 2, 24)
    fuser, given = wide([[1.0] * 3] * 2, odd), wide_caches(odd)
    fuser.quantise(8)
    packed = [name for name, w in tree_flatten(fuser.parameters()) if w.dtype == mx.uint32]
    assert "mlp1.w1.packed" in packed
    assert not [name for name in packed if name.startswith("proj_in")]
    before = fuser.change(**given).delta
    fuser.dequantise()
    assert_close(before, fuser.change(**given).delta)


# --- speed changes no number


@pytest.mark.parametrize("closed", [(), ((0, 1), (1, 0))])
@pytest.mark.parametrize("bits", [0, 8])
def test_slices_in_groups_are_as_all_at_once(
    monkeypatch: pytest.MonkeyPatch, closed: tuple[tuple[int, int], ...], bits: Literal[0, 8]
) -> None:
    fuser = make(message_gate=True, normalise=True, hidden_dim=64, intermediate_dim=64)
    for kind, layer in closed:
        fuser.set_gate(kind, layer, False)
    if bits:
        fuser.quantise(bits)
    given, found = caches(), []
    for slices in (99, 4, 1):
        room = slices * 4 * BATCH * LENGTH * 64 + slices
        monkeypatch.setattr(device, "cached_bytes", lambda room=room: room)
        found.append(fuser.change(**given))
    for change in found[1:]:
        assert change.slices == found[0].slices
        for name in ("delta", "weight", "message_weight"):
            assert_close(getattr(change, name), getattr(found[0], name))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_gelu_is_the_exact_one_and_so_is_its_slope(
    monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype
) -> None:
    x = mx.concatenate([mx.linspace(-9, 9, 4001), mx.array([-6e4, -99.0, 0.0, 99.0, 6e4])])
    x = x.astype(dtype)
    wide = np.array(x.astype(mx.float32)).astype(float)
    below = 0.5 * (1 + np.array([math.erf(v / math.sqrt(2)) for v in wide]))
    slope = below + wide * np.exp(-0.5 * wide**2) / math.sqrt(2 * math.pi)
    monkeypatch.setattr(device, "has_slow_erf", lambda: True)
    near = {mx.float32: 2e-7, mx.bfloat16: 4e-3, mx.float16: 5e-4}[dtype]
    for found, exact in (
        (gelu(x), wide * below),
        (mx.grad(lambda x: gelu(x).sum())(x), slope),
    ):
        assert found.dtype == dtype
        off = np.abs(np.array(found.astype(mx.float32)) - exact)
        assert (off <= 2e-6 + near * np.abs(exact)).all()
