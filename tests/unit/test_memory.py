"""What a pair will need, against what it then takes; and the refusal when it can't fit."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from c2c_mlx import ChatSession, LanguageModel, load_model
from c2c_mlx.config import TrainConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fusers import disk
from c2c_mlx.fusion.fuser import parameters
from c2c_mlx.models import memory
from c2c_mlx.models.load import find_folder

TINY = Path(__file__).parents[1] / "golden" / "data" / "e2e" / "qwen3_llama"


def size(model: nn.Module) -> int:
    return sum(w.nbytes for _, w in tree_flatten(model.parameters()))


@pytest.fixture
def fuser(receiver: LanguageModel, sharer: LanguageModel, make_fuser, tmp_path: Path) -> Path:
    disk.save(make_fuser(receiver.model, sharer.model), tmp_path / "fuser", mx.float16)
    return tmp_path / "fuser"


def test_weights_are_counted_to_the_byte(receiver: LanguageModel, sharer: LanguageModel) -> None:
    need = memory.preflight(receiver.path, [sharer.path])
    assert (need.receiver, need.sharer) == (size(receiver.model), size(sharer.model))
    assert need.fuser == 0
    alone = memory.preflight(receiver.path)
    assert (alone.receiver, alone.sharer) == (need.receiver, 0)


def test_quantised_weights_become_dense_on_the_cpu(tmp_path: Path) -> None:
    folder = tmp_path / "quantised"
    shutil.copytree(TINY / "sharer", folder, copy_function=shutil.copy)
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").chmod(0o644)
    weights = mx.load(str(TINY / "sharer" / "model.safetensors"))
    name = "model.layers.0.mlp.gate_proj"
    dense = weights.pop(f"{name}.weight")
    width = dense.shape[1] // 32 * 32
    packed, scales, biases = mx.quantize(mx.random.normal((64, width)), group_size=32, bits=4)
    weights |= {f"{name}.weight": packed, f"{name}.scales": scales, f"{name}.biases": biases}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    before = memory.preflight(TINY / "sharer").receiver
    after = memory.preflight(folder).receiver
    if mx.default_device().type == mx.cpu:
        assert after - before == 4 * (64 * width - dense.size)
    else:
        assert after < before


def test_more_tokens_need_more_up_to_the_models_limit(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Path
) -> None:
    few, more, most, beyond = (
        memory.preflight(receiver.path, [sharer.path], [disk.measure(fuser)], tokens=n)
        for n in (8, 64, 10**6, 10**7)
    )
    assert few.working < more.working < most.working
    assert most == beyond
    assert most.tokens == min(receiver.context_length, sharer.context_length)
    assert few.fuser == more.fuser > 0
    assert json.loads(json.dumps(more.record()))["tokens"] == 64


def test_a_sharer_with_two_fusers_is_counted_once(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Path
) -> None:
    one = memory.preflight(receiver.path, [sharer.path], [disk.measure(fuser)])
    two = memory.preflight(receiver.path, [sharer.path] * 2, [disk.measure(fuser)] * 2)
    assert (two.sharer, two.working, two.fuser) == (one.sharer, one.working, 2 * one.fuser)


@pytest.mark.pair
@pytest.mark.slow
def test_the_estimate_is_near_what_the_embedded_pair_takes() -> None:
    from c2c_mlx.config import SamplingConfig
    from c2c_mlx.fusers import store
    from c2c_mlx.models import registry
    from c2c_mlx.models.embedded import install

    names = registry.default_pair()
    if not all(map(install.is_installed, names)):
        pytest.skip("the embedded pair is not in the cache; `c2c-chat` puts it there")
    folder = store.find_folder(registry.find_fuser(*names) or "")
    models = [load_model(name) for name in names]
    session = ChatSession(*models, disk.load(folder), sampling=SamplingConfig(max_tokens=1))
    *_, finished = session.ask("The cat sat on the mat. " * 10)
    figures = finished.figures
    answering, reading = map(find_folder, names)
    need = memory.preflight(
        answering, [reading], [disk.measure(folder)], tokens=figures.prompt_tokens
    )
    assert need.total / 1e9 == pytest.approx(figures.peak_memory_gb, rel=0.1)


def test_training_counts_the_optimiser(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Path
) -> None:
    config, _ = disk.read_description(fuser)
    small, large = (
        memory.training(receiver.path, sharer.path, config, TrainConfig(batch_size=n))
        for n in (1, 8)
    )
    loaded = disk.load(fuser)
    assert small.fuser == 4 * 4 * sum(p.size for p in parameters(loaded).values())
    assert small.working < large.working


def test_too_large_a_model_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A sparse file of a terabyte: its header is all there is on the disk."""
    folder = tmp_path / "huge"
    shutil.copytree(TINY / "receiver", folder, copy_function=shutil.copy)
    path = folder / "model.safetensors"
    path.unlink()
    entry = {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}
    head = json.dumps({"model.embed_tokens.weight": entry}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        try:
            file.truncate(8 + len(head) + (1 << 40))
        except OSError:
            pytest.skip("no sparse files of this size here")
    with pytest.raises(C2CError, match="receiver is the largest: take a smaller one"):
        memory.preflight(folder)
    program = "import sys; from c2c_mlx.commands.chat import main; sys.exit(main())"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            "--mode",
            "receiver",
            "--receiver",
            folder,
            "--prompt",
            "x",
        ],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("c2c-chat: memory: receiver 1099.51")
    assert done.stderr.count("\n") == 1


def test_a_damaged_model_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(TINY / "receiver", folder, copy_function=shutil.copy)
    (folder / "model.safetensors").chmod(0o644)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(C2CError, match="no valid safetensors file"):
        memory.preflight(folder)
