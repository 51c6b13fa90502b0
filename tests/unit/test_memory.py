"""What a pair will need, against what it then takes; and the refusal when it can't fit."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import mamba2
from mlx_lm.utils import quantize_model, save_config, save_model

from c2c_mlx import ChatSession, LanguageModel, device, load_model
from c2c_mlx.config import TrainConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fusers import disk
from c2c_mlx.fusion.fuser import parameters
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.models import memory, untrusted
from c2c_mlx.models.load import find_folder
from c2c_mlx.models.sizes import ModelSize

VOCABULARY = 1 << 30
TINY = Path(__file__).parents[1] / "golden" / "data" / "e2e" / "qwen3_llama"


def size(model: nn.Module) -> int:
    return sum(w.nbytes for _, w in tree_flatten(model.parameters()))


@pytest.fixture
def fuser(receiver: LanguageModel, sharer: LanguageModel, make_fuser, tmp_path: Path) -> Path:
    disk.save(make_fuser(receiver.model, sharer.model), tmp_path / "fuser", mx.float16)
    return tmp_path / "fuser"


@pytest.fixture(params=["float32", "bfloat16", "4-bit"])
def folder(request: pytest.FixtureRequest, receiver: LanguageModel, tmp_path: Path) -> Path:
    """The tiny receiver as its file may hold it."""
    model, config = mlx_lm.utils.load_model(receiver.path)
    if request.param != "float32":
        model.set_dtype(mx.bfloat16)
    if request.param == "4-bit":
        model, config = quantize_model(model, config, group_size=32, bits=4)
    folder = tmp_path / "model"
    shutil.copytree(receiver.path, folder, copy_function=shutil.copy)
    for file in folder.iterdir():
        file.chmod(0o644)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


@pytest.mark.parametrize("rehearsed", ["", "gpu", "m1"])
def test_weights_and_caches_are_counted_to_the_byte(
    folder: Path, rehearsed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(device.REHEARSE, rehearsed)
    lm = load_model(folder)
    need = memory.preflight(folder, tokens=300)
    assert (need.receiver, need.sharer, need.fuser) == (size(lm.model), 0, 0)
    reader = Reader(lm.model)
    reader.extend(list(range(300)))
    assert need.caches == sum(c.keys.nbytes + c.values.nbytes for c in reader.cache)


def test_a_load_leaves_no_buffers(receiver: LanguageModel, fuser: Path) -> None:
    mx.clear_cache()
    kept: list[Any] = [load_model(receiver.path)]
    assert mx.get_cache_memory() < 4096  # scalars
    kept.append(disk.load(fuser, bits=8))
    assert mx.get_cache_memory() < 4096  # scalars


def test_a_state_has_one_size_however_much_was_read(tmp_path: Path) -> None:
    """Mamba's config on the hub says Infinity, and its state does not grow."""
    args = mamba2.ModelArgs(
        model_type="mamba2",
        num_heads=2,
        head_dim=16,
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        state_size=8,
        num_hidden_layers=2,
        layer_norm_epsilon=1e-5,
        conv_kernel=4,
        n_groups=1,
        use_bias=False,
        use_conv_bias=True,
        tie_word_embeddings=True,
        time_step_limit=(0.0, float("inf")),
        time_step_rank="auto",
    )
    save_model(tmp_path, mamba2.Model(args))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(args)))
    assert "Infinity" in (tmp_path / "config.json").read_text()
    few, many = (memory.preflight(tmp_path, tokens=n) for n in (8, 100_000))
    assert few.caches == many.caches > 0
    assert many.tokens == 100_000  # no attention, no limit


@pytest.mark.parametrize(
    ("modes", "sharers", "receivers"),
    [
        (["receiver"], 0, 1),
        (["sharer"], 1, 0),
        (["relay"], 1, 1),
        (["c2c"], 1, 2),
        (["c2c", "relay", "receiver", "sharer"], 3, 4),
    ],
)
def test_every_mode_keeps_its_own_conversation(
    receiver: LanguageModel,
    sharer: LanguageModel,
    fuser: Path,
    modes: list[str],
    sharers: int,
    receivers: int,
) -> None:
    config = disk.measure(fuser)
    own = memory.preflight(receiver.path, tokens=256, modes=["receiver"]).caches
    read = memory.preflight(sharer.path, tokens=256, modes=["receiver"]).caches
    need = memory.preflight(receiver.path, [sharer.path], [config], tokens=256, modes=modes)
    told = 8 * 2 * len(config.layer_map) * config.receiver.kv_heads * 256 * ("c2c" in modes)
    assert need.caches == sharers * read + receivers * own + told
    batch = memory.preflight(receiver.path, tokens=256, modes=["receiver"], batch=3)
    assert batch.caches == 7 * own


def test_a_batch_is_of_the_larger_of_those_that_write(
    receiver: LanguageModel, sharer: LanguageModel
) -> None:
    def caches(mode: str, batch: int) -> int:
        pair = receiver.path, [sharer.path]
        return memory.preflight(*pair, tokens=256, modes=[mode], batch=batch).caches

    def one(lm: LanguageModel) -> int:
        return memory.preflight(lm.path, tokens=256, modes=["receiver"]).caches

    small, large = one(receiver), one(sharer)
    assert small < large
    assert caches("receiver", 3) == small + 6 * small
    assert caches("sharer", 3) == large + 6 * large
    assert caches("relay", 3) == small + large + 6 * large


def test_what_does_not_fit_says_what_would(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folders = disk.measure(fuser), (receiver.path, [sharer.path])
    long, short = (memory.preflight(*folders, [config], tokens=n) for n in (512, 256))
    monkeypatch.setattr(device, "memory_limit", lambda most=short.total: most)
    assert "which will not fit: 256 tokens will" in str(memory.preflight(*folders, [config]))
    monkeypatch.setattr(device, "memory_limit", lambda most=long.total: most)
    assert "fit" not in str(memory.preflight(*folders, [config], tokens=512))


def test_more_tokens_need_more_up_to_the_models_limit(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Path
) -> None:
    few, more, most, beyond = (
        memory.preflight(receiver.path, [sharer.path], [disk.measure(fuser)], tokens=n)
        for n in (8, 64, 10**6, 10**7)
    )
    assert few.working < more.working < most.working
    assert few.caches < more.caches < most.caches
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
    mx.reset_peak_memory()
    models = [load_model(name) for name in names]
    loading = mx.get_peak_memory() / 1e9  # a turn counts its own
    session = ChatSession(*models, disk.load(folder), sampling=SamplingConfig(max_tokens=1))
    *_, finished = session.ask("The cat sat on the mat. " * 10)
    figures = finished.figures
    answering, reading = map(find_folder, names)
    need = memory.preflight(
        answering, [reading], [disk.measure(folder)], tokens=figures.prompt_tokens
    )
    in_use = need.total - need.buffers
    assert in_use / 1e9 == pytest.approx(max(loading, figures.peak_memory_gb), rel=0.15)


def test_a_gradient_has_scores_written_down_on_a_gpu_as_well(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = disk.read_description(fuser)
    own = dataclasses.replace(ModelSize.read(receiver.path), head_dim=64)
    sizes = own, ModelSize.read(sharer.path)
    on_cpu = memory.training(*sizes, config, TrainConfig())
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert own.scores(1) == 0, "a mere pass writes none"
    assert memory.training(*sizes, config, TrainConfig()).working >= on_cpu.working


def test_training_counts_the_optimiser(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Path
) -> None:
    config, _ = disk.read_description(fuser)
    sizes = ModelSize.read(receiver.path), ModelSize.read(sharer.path)
    small, large = (memory.training(*sizes, config, TrainConfig(batch_size=n)) for n in (1, 8))
    loaded = disk.load(fuser)
    assert small.fuser == 4 * 4 * sum(p.size for p in parameters(loaded).values())
    assert small.working < large.working
    shapes = [(60, 20), (50, 40), (10, 10)]
    needs = [memory.training(*sizes, config, TrainConfig(), [shape]) for shape in shapes]
    most = max(needs, key=lambda need: need.total)
    assert memory.training(*sizes, config, TrainConfig(), shapes) == most
    assert most.total < large.total and most.tokens < large.tokens


def test_too_large_a_model_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A sparse file of a quarter of a terabyte: its header is all there is on the disk."""
    folder = tmp_path / "huge"
    shutil.copytree(TINY / "receiver", folder, copy_function=shutil.copy)
    path = folder / "model.safetensors"
    table, end = {}, 0
    for name, (dtype, shape) in untrusted.read_header(path).items():
        wide = [VOCABULARY if n == 512 else n for n in shape]
        begin, end = end, end + 4 * math.prod(wide)
        assert dtype == "F32"
        table[name] = {"dtype": dtype, "shape": wide, "data_offsets": [begin, end]}
    path.unlink()
    head = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        try:
            file.truncate(8 + len(head) + end)
        except OSError:
            pytest.skip("no sparse files of this size here")
    (folder / "config.json").chmod(0o644)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": VOCABULARY}))
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
    assert done.stderr.startswith("c2c-chat: memory: receiver 274.88")
    assert done.stderr.count("\n") == 1


def test_a_damaged_model_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(TINY / "receiver", folder, copy_function=shutil.copy)
    (folder / "model.safetensors").chmod(0o644)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(C2CError, match="no valid safetensors file"):
        memory.preflight(folder)
