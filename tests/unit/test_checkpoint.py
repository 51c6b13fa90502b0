"""Fuser folders: what is written is read back, and nothing else is accepted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import pytest
from mlx.utils import tree_unflatten

from c2c_mlx import Fuser, device
from c2c_mlx.config import FuserConfig, ModelShape, Provenance
from c2c_mlx.errors import C2CError
from c2c_mlx.fusers import disk
from c2c_mlx.fusion import fit
from c2c_mlx.fusion.fuser import parameters, skeleton

CONFIG = FuserConfig(
    ModelShape("org/receiver", 4, 2, 16, "a" * 64),
    ModelShape("sharer", 6, 3, 8, "b" * 64),
    ((0, 2), (1, 3), (3, 5)),
    hidden_dim=12,
    intermediate_dim=10,
    depth=4,
)


def make(level: float = 0.5, config: FuserConfig = CONFIG) -> Fuser:
    fuser = Fuser(config)
    fuser.gate_logit = mx.full(fuser.gate_logit.shape, level)
    fuser.provenance = Provenance("a command", 7, ("x.jsonl",), "Apache-2.0", {"loss": 1.5})
    return fuser


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make().save(tmp_path / "fuser")
    return tmp_path / "fuser"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / "config.json").read_text())
    change(data)
    (folder / "config.json").write_text(json.dumps(data))


def rewrite_weights(folder: Path, change: Callable[[dict[str, mx.array]], Any]) -> None:
    weights = mx.load(str(folder / "fuser.safetensors"))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(folder / "fuser.safetensors"), weights)


def refused(folder: Path) -> str:
    with pytest.raises(C2CError) as e:
        Fuser.load(folder)
    message = str(e.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, normalise=True, message_gate=True),
        replace(CONFIG, kinds="values", activation="silu", rotated_keys=False),
    ],
)
def test_round_trip(tmp_path: Path, config: FuserConfig) -> None:
    fuser = make(config=config)
    fuser.save(tmp_path / "deep" / "fuser")
    loaded = Fuser.load(tmp_path / "deep" / "fuser")
    assert loaded.config == config
    assert loaded.provenance == fuser.provenance
    assert not loaded.training
    ours, theirs = parameters(fuser), parameters(loaded)
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
    assert loaded.trainable_parameters().keys() == fuser.trainable_parameters().keys()


def test_half_precision_file(tmp_path: Path) -> None:
    fuser = make(config=replace(CONFIG, normalise=True))
    fuser.input_scale = (
        fuser.input_scale * 1e6
    )  # a channel that hardly moves; float16 ends at 65504
    disk.save(fuser, tmp_path / "half", mx.float16)
    stored = mx.load(str(tmp_path / "half" / "fuser.safetensors"))
    exact = {"gate_logit", "input_mean", "input_scale", "output_scale"}
    assert {name for name, w in stored.items() if w.dtype == mx.float32} == exact
    assert {w.dtype for name, w in stored.items() if name not in exact} == {mx.float16}
    loaded = Fuser.load(tmp_path / "half")
    assert loaded.mlp1.w1.dtype == (mx.float32 if device.is_dense() else mx.float16)
    assert mx.array_equal(loaded.input_scale, fuser.input_scale)


def test_weights_are_read_before_anything_is_computed_from_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = mx.isfinite

    def from_memory(w: mx.array) -> mx.array:
        (folder / "fuser.safetensors").write_bytes(b"")  # reading it from now on would fail
        return compute(w)

    monkeypatch.setattr(mx, "isfinite", from_memory)
    assert Fuser.load(folder).gates.all()


def test_saving_over_the_folder_that_was_loaded(folder: Path) -> None:
    loaded = Fuser.load(folder)
    make(level=-0.5).save(folder)
    assert loaded.gates.all()
    assert not Fuser.load(folder).gates.any()


def test_other_files_stay(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("{}")
    make().save(folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "fuser.safetensors",
        "metrics.jsonl",
    ]


def test_model_card(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    for line in ("library_name: mlx", "- c2c", "- org/receiver", "license: apache-2.0"):
        assert line in front.splitlines()
    assert "0-1 from 2-3, 3 from 5" in body
    assert "--sharer sharer --receiver org/receiver" in body
    assert "loss: 1.5" in body


def test_model_card_of_folders_and_odd_names(tmp_path: Path) -> None:
    shape = replace(CONFIG.receiver, name='/home/me/my "model"\n---\nlicense: mit')
    fuser = make(config=replace(CONFIG, receiver=shape))
    fuser.provenance = Provenance(licence="Gemma Terms of Use")
    fuser.save(tmp_path / "fuser")
    front = (tmp_path / "fuser" / "README.md").read_text().split("---\n")[1]
    assert "/home/me" not in front
    assert "license: mit" not in front.splitlines()
    assert "license_name: Gemma Terms of Use" in front.splitlines()


def test_metrics_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    fuser = make()
    fuser.provenance = Provenance(metrics={"loss": float("nan"), "steps": 2.0})
    fuser.save(tmp_path / "fuser")
    assert Fuser.load(tmp_path / "fuser").provenance.metrics == {"steps": 2.0}


# What load refuses.


def test_no_folder(tmp_path: Path) -> None:
    assert "no such fuser folder" in refused(tmp_path / "none")


@pytest.mark.parametrize("name", ["config.json", "fuser.safetensors"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"{name} is missing" in refused(folder)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\xff", '{"format_version": NaN}', ""])
def test_broken_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "not valid JSON" in refused(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format_version=2), "made by a newer c2c-mlx"),
        (lambda d: d.pop("format_version"), "format_version"),
        (lambda d: d.update(format_version=True), "format_version"),
        (lambda d: d.update(hiden_dim=3), "unknown key 'hiden_dim'"),
        (lambda d: d["sharer"].update(colour="red"), "unknown key 'colour'"),
        (lambda d: d["provenance"].update(mood="good"), "unknown key 'mood'"),
        (lambda d: d.pop("layer_map"), "'layer_map' is missing"),
        (lambda d: d.update(layer_map=[[0, 99]]), "outside"),
        (lambda d: d.update(depth="3"), "depth"),
        (lambda d: d.update(hidden_dim=13), "should have shape"),
        (lambda d: d.update(hidden_dim=10**7), "should have shape"),
        (lambda d: d.update(hidden_dim=10**30), "does not fit"),
        (lambda d: d.update(depth=10**9), "does not fit"),
        (lambda d: d.update(message_gate=True), "'message_head.bias' is missing"),
    ],
)
def test_wrong_description(
    folder: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    rewrite(folder, change)
    assert words in refused(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("mlp1.w1"), "'mlp1.w1' is missing"),
        (lambda w: w.update(extra=mx.zeros(1)), "unexpected tensor 'extra'"),
        (lambda w: w.update(gate_logit=mx.zeros((2, 4))), "should have shape (2, 3), not (2, 4)"),
        (lambda w: w.update(gate_logit=mx.zeros((2, 3), mx.int32)), "floats, not I32"),
        (lambda w: w.update(gate_logit=mx.full((2, 3), mx.nan)), "'gate_logit'"),
        (lambda w: w.update(gate_logit=mx.full((2, 3), mx.inf)), "NaN or infinite"),
    ],
)
def test_wrong_weights(
    folder: Path, change: Callable[[dict[str, mx.array]], Any], words: str
) -> None:
    rewrite_weights(folder, change)
    assert words in refused(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated_weights(folder: Path, keep: int) -> None:
    data = (folder / "fuser.safetensors").read_bytes()
    (folder / "fuser.safetensors").write_bytes(data[:keep])
    assert "no valid safetensors file" in refused(folder)


def test_offsets_that_reach_before_or_into_other_tensors(folder: Path) -> None:
    data = (folder / "fuser.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for offsets in ([-24, 0], [0, 24], [1 << 62, (1 << 62) + 24]):
        header["gate_logit"]["data_offsets"] = offsets
        head = json.dumps(header).encode()
        crafted = len(head).to_bytes(8, "little") + head + data[8 + length :]
        (folder / "fuser.safetensors").write_bytes(crafted)
        assert "no valid safetensors file" in refused(folder)


# Saving is all or nothing.


def test_not_finite_is_not_saved(folder: Path) -> None:
    fuser = make()
    fuser.mlp1.norm[0, 0, 0] = mx.nan
    with pytest.raises(C2CError, match="mlp1.norm"):
        fuser.save(folder)
    fuser.mlp1.norm[0, 0, 0] = 1e6  # beyond float16
    with pytest.raises(C2CError, match="mlp1.norm"):
        disk.save(fuser, folder, mx.float16)
    assert Fuser.load(folder).gates.all()


def test_a_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(path: str, weights: Any) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("[write] Unable to write 9 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", fail)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(C2CError, match="can't be written") as e:
            make(level=-0.5).save(target)
        assert "\n" not in str(e.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "fuser").write_text("mine")
    with pytest.raises(C2CError, match="can't be written"):
        make().save(tmp_path / "fuser")
    assert (tmp_path / "fuser").read_text() == "mine"


class Killed(BaseException):
    """Stands for kill -9: no handler of ours may tidy up after it."""


@pytest.mark.parametrize("is_new", [False, True])
def test_killed_at_any_instant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    """After every single step of a save, the folder holds the old fuser or the new one."""
    folder = tmp_path / "fuser"
    steps_before_the_end = 0
    for fatal in range(100):
        if folder.exists():
            shutil.rmtree(folder)
        if not is_new:
            make(level=0.5).save(folder)
        if killed := save_killed_at(fatal, folder, monkeypatch):
            steps_before_the_end += 1
        if (folder / "config.json").exists() or (folder / ".saved").exists() or not is_new:
            loaded = Fuser.load(folder)
            is_fresh = loaded.config.depth == 3
            assert is_fresh != loaded.gates.any()  # the two files belong together
        make(level=1.5).save(folder)
        assert sorted(os.listdir(folder)) == ["README.md", "config.json", "fuser.safetensors"]
        if not killed:
            break
    assert steps_before_the_end >= 8


def save_killed_at(fatal: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    count = 0

    def step(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == fatal:
                raise Killed
            count += 1
            return real(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for owner, name in (
            (os, "rename"),
            (os, "replace"),
            (os, "fsync"),
            (Path, "rmdir"),
            (Path, "write_text"),
            (mx, "save_safetensors"),
        ):
            patch.setattr(owner, name, step(getattr(owner, name)))
        # A dead process removes nothing, but what stands in the way of a save still has to go.
        real_rmtree = shutil.rmtree
        patch.setattr(
            shutil, "rmtree", lambda path, **kw: None if count == fatal else real_rmtree(path, **kw)
        )
        try:
            make(level=-0.5, config=replace(CONFIG, depth=3)).save(folder)
        except Killed:
            return True
    return False


# The two models.


def test_models_that_fit() -> None:
    fit.check_models(CONFIG, CONFIG.receiver, CONFIG.sharer)
    unknown = replace(CONFIG.receiver, tokenizer="", name="a folder")
    fit.check_models(CONFIG, unknown, CONFIG.sharer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": 5}, ["org/receiver (4 layers", "mine (5 layers"]),
        ({"kv_heads": 5}, ["2 KV heads x 16", "5 KV heads x 16"]),
        ({"head_dim": 32}, ["2 KV heads x 16", "2 KV heads x 32"]),
        ({"tokenizer": "c" * 64}, ["org/receiver with tokenizer aaaaaaaa", "mine", "cccccccc"]),
    ],
)
def test_models_that_do_not_fit(change: dict[str, Any], words: list[str]) -> None:
    receiver = replace(CONFIG.receiver, name="mine", **change)
    with pytest.raises(C2CError) as e:
        fit.check_models(CONFIG, receiver, CONFIG.sharer)
    assert all(word in str(e.value) for word in words)
    with pytest.raises(C2CError, match="sharer"):
        fit.check_models(CONFIG, CONFIG.receiver, replace(CONFIG.sharer, name="mine", **change))


def test_skeletons_compute_nothing() -> None:
    """A file may ask for 100 GB; comparing shapes must not need them."""
    huge = replace(CONFIG, hidden_dim=10**5, intermediate_dim=10**5)
    shapes = parameters(skeleton(huge, 20, "here"))
    assert shapes["mlp1.w1"].shape == (2, 3, 10**5, 10**5)
    assert tree_unflatten(list(shapes.items())).keys() == make().parameters().keys()


# Quantised fusers.


@pytest.mark.parametrize(("bits", "share"), [(8, 0.56), (4, 0.32)])
def test_quantised_round_trip(tmp_path: Path, bits: Any, share: float) -> None:
    shapes = {"hidden_dim": 128, "intermediate_dim": 128, "layer_map": ((0, 2), (1, 3))}
    sizes = {m: replace(getattr(CONFIG, m), head_dim=64) for m in ("receiver", "sharer")}
    fuser = make(config=replace(CONFIG, **sizes, **shapes))
    disk.save(fuser, tmp_path / "dense", mx.float16)
    fuser.quantise(bits)
    disk.save(fuser, tmp_path / "packed", mx.float16)
    packed, dense = (
        (tmp_path / name / "fuser.safetensors").stat().st_size for name in ("packed", "dense")
    )
    assert packed < share * dense
    config, provenance = disk.read_description(tmp_path / "packed")
    assert (config.bits, provenance) == (bits, fuser.provenance)
    loaded = Fuser.load(tmp_path / "packed")
    fuser.dequantise()
    if device.is_dense():
        assert loaded.config.bits == 0
        assert {w.dtype for w in parameters(loaded).values()} == {mx.float32}
    loaded.dequantise()
    for name, w in parameters(fuser).items():
        assert mx.allclose(parameters(loaded)[name], w, atol=1e-3), name


def test_packed_numbers_must_be_packed(tmp_path: Path) -> None:
    fuser = make(config=replace(CONFIG, hidden_dim=64, intermediate_dim=64))
    fuser.quantise(8)
    fuser.save(tmp_path / "fuser")
    folder = tmp_path / "fuser"
    rewrite_weights(folder, lambda w: w.update({k: v.astype(mx.float32) for k, v in w.items()}))
    assert "should hold packed numbers, not F32" in refused(folder)
    rewrite(folder, lambda d: d.update(bits=0))
    assert "is missing" in refused(folder)
    rewrite(folder, lambda d: d.update(bits=3))
    assert "'bits' must be one of 0, 4, 8" in refused(folder)
