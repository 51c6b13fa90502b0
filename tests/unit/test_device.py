"""What a device means, and a Mac's decisions rehearsed on whatever is here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx_lm.utils
import pytest
from mlx_lm.models import lfm2_moe
from mlx_lm.utils import quantize_model, save_config, save_model

from c2c_mlx import LanguageModel, device, load_model
from c2c_mlx.errors import C2CError
from c2c_mlx.models.load import open_model

DTYPES = (mx.float32, mx.bfloat16, mx.float16)


@pytest.mark.parametrize(
    ("rehearsed", "held"),
    [
        ("", (mx.float32, mx.float32, mx.float32)),
        ("gpu", (mx.float32, mx.bfloat16, mx.float16)),
        ("m1", (mx.float32, mx.float16, mx.float16)),
    ],
)
def test_the_precision_of_a_model(
    rehearsed: str, held: tuple[mx.Dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu, 0))
    monkeypatch.setenv(device.REHEARSE, rehearsed)
    assert tuple(device.dtype_of(dtype) for dtype in DTYPES) == held
    assert device.is_dense() == (not rehearsed)


def test_an_unknown_rehearsal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.REHEARSE, "tpu")
    with pytest.raises(C2CError, match="must be gpu or m1"):
        device.kind()


@pytest.mark.parametrize("rehearsed", ["gpu", "m1"])
@pytest.mark.parametrize("stored", [mx.float32, mx.bfloat16])
def test_a_quantised_model_stays_quantised(
    receiver: LanguageModel,
    rehearsed: str,
    stored: mx.Dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside packed weights, float32 (as in the embedded pair's files) becomes half precision."""
    model, config = mlx_lm.utils.load_model(receiver.path)
    model.set_dtype(stored)
    model, config = quantize_model(model, config, group_size=32, bits=4)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    for file in receiver.path.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv(device.REHEARSE, rehearsed)
    layer = load_model(tmp_path).model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == mx.uint32
    assert layer.scales.dtype == (mx.float16 if rehearsed == "m1" else mx.bfloat16)


def test_what_has_to_keep_its_precision_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mlx-lm's model says; which experts are asked hangs on differences of such biases."""
    arguments = {
        "model_type": "lfm2_moe",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "use_expert_bias": True,
        "num_dense_layers": 0,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "layer_types": ["full_attention", "conv"],
    }
    model = lfm2_moe.Model(lfm2_moe.ModelArgs.from_dict(arguments))
    model, config = quantize_model(model, arguments, group_size=64, bits=4)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    monkeypatch.setenv(device.REHEARSE, "gpu")
    layer = open_model(tmp_path)[0].layers[0].feed_forward
    assert layer.switch_mlp.gate_proj.scales.dtype == mx.bfloat16
    assert layer.expert_bias.dtype == mx.float32


def test_nothing_raises_the_wired_limit(
    receiver: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways of mlx-lm to generate ask this function, which a load has replaced."""
    library = import_module("mlx_lm.generate")
    raised: list[int] = []
    monkeypatch.setattr(mx, "set_wired_limit", raised.append)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1 << 33})
    with library.wired_limit(receiver.model):
        library.BatchGenerator(receiver.model).close()
    assert raised == []


def test_buffers_kept_for_reuse_are_bounded(receiver: LanguageModel) -> None:
    before = mx.set_cache_limit(device.buffer_limit())
    assert before == device.buffer_limit() <= device.memory_limit() // 8


def test_memory_is_taken_as_it_is_needed() -> None:
    """Sixty-four numbers of 8 MB each, of which two need to be there at a time."""
    x = mx.ones(1 << 21)
    mx.eval(x)
    limit = mx.set_memory_limit(1 << 40)
    held = mx.get_active_memory()
    with device.at_most(held + (1 << 24)):
        mx.reset_peak_memory()
        mx.eval(sum(mx.exp(x * i).sum() for i in range(64)))
        assert mx.get_peak_memory() < held + (1 << 26)
    assert mx.set_memory_limit(limit) == 1 << 40


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (RuntimeError("[metal::malloc] Unable to allocate 17179869184 bytes."), True),
        (
            RuntimeError("[metal::malloc] Attempting to allocate 9 bytes, greater than"),
            True,
        ),
        (RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (8)"), True),
        (RuntimeError("cudaMallocAsync(&data, size) failed: out of memory"), True),
        (RuntimeError("[matmul] Last dimension of first input must match"), False),
        (ValueError("out of memory"), False),
        (MemoryError("std::bad_alloc"), True),
        (MemoryError(), True),  # Python's own
    ],
)
def test_what_mlx_raises_when_the_memory_is_full(error: Exception, full: bool) -> None:
    assert device.is_out_of_memory(error) == full
    assert not device.is_interrupted(error)


@pytest.mark.parametrize(
    "why",
    [
        "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
        "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)",
        "Discarded (victim of GPU error/recovery) "
        "(00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)",
        "Internal Error (0000000e:Internal Error)",
    ],
)
def test_what_mlx_raises_when_macos_interrupts_the_gpu(why: str) -> None:
    error = RuntimeError(f"[METAL] Command buffer execution failed: {why}.")
    assert device.is_interrupted(error) and not device.is_out_of_memory(error)


@pytest.mark.parametrize(
    ("rehearsed", "small", "large"), [("", 1 << 27, 1 << 29), ("gpu", 1 << 28, 1 << 28)]
)
def test_a_large_fuser_has_room_for_many_positions(
    rehearsed: str, small: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu, 0))
    monkeypatch.setenv(device.REHEARSE, rehearsed)
    found = [device.fuser_pass(weights) for weights in (0, 1 << 20, 1 << 31)]
    assert found == [small, small, large]


def test_what_two_streams_compute_is_evaluated_together() -> None:
    x = mx.arange(6.0)
    with mx.stream(device.second_stream()):
        beside = x + 1
    both = x * 2, beside
    mx.eval(both)
    assert [y.tolist() for y in both] == [[0, 2, 4, 6, 8, 10], [1, 2, 3, 4, 5, 6]]
    assert (both[0] + both[1]).tolist() == [1, 4, 7, 10, 13, 16]
