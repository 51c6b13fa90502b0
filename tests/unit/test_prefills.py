"""Prefills that are kept on disk: the same numbers, up to a limit, of these very models."""

from __future__ import annotations

from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import pytest
from trainers import POSITIONS, Make, loss_of

from c2c_mlx import LanguageModel
from c2c_mlx.models.paths import size
from c2c_mlx.training.batch import Batch, collate
from c2c_mlx.training.dataset import Example
from c2c_mlx.training.prefills import _read


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("rotated_keys", [False, True])
def test_kept_prefills_are_the_computed_ones(
    make: Make, examples: list[Example], tmp_path: Path, positions: str, rotated_keys: bool
) -> None:
    options = {"positions": positions, "rotated_keys": rotated_keys}
    computed = make(tmp_path / "a", **options)
    keeping = make(tmp_path / "b", prefill_cache=str(tmp_path / "kept"), **options)
    for rows in (examples[:6], examples[6:]):
        keeping.prefills(collate(rows, positions))
    reading = make(tmp_path / "c", prefill_cache=str(tmp_path / "kept"), **options)
    reading.c2c.sharer = None  # it must not be needed
    batch = collate(examples[3:9], positions)  # batches of another epoch
    assert loss_of(reading, batch) == pytest.approx(loss_of(computed, batch), rel=1e-3)
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == len(examples)


def test_prefills_are_kept_up_to_the_limit(
    make: Make, examples: list[Example], tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    said: list[str] = []
    options = {"prefill_cache": str(kept), "prefill_cache_gb": 40e-6, "say": said.append}
    trainer = make(tmp_path, **options)
    batches = [collate(rows, "all") for rows in (examples[:2], examples[2:])]
    first = [loss_of(trainer, batch) for batch in batches]
    files = list(kept.rglob("*.safetensors"))
    assert len(files) == 2, "all of a batch, or nothing"
    assert len(said) == 1 and "--prefill-cache-gb" in said[0]
    assert [loss_of(make(tmp_path, **options), batch) for batch in batches] == first
    files[0].write_bytes(b"torn")
    assert loss_of(make(tmp_path, **options), batches[0]) == pytest.approx(first[0], rel=1e-5)


def test_a_kept_prefill_is_read_before_anything_is_computed_from_it(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    mx.save_safetensors(str(path), {"own_keys": mx.arange(5)})
    kept = _read(path)
    path.write_bytes(b"")  # a step that read it now would fail
    assert kept is not None and kept["own_keys"].tolist() == [0, 1, 2, 3, 4]


def test_a_resumed_run_keeps_what_the_whole_one_keeps(
    make: Make, examples: list[Example], tmp_path: Path
) -> None:
    batches = [collate(rows, "all") for rows in (examples[:2], examples[2:6], examples[6:7])]

    def kept(name: str, *runs: list[Batch], gb: float = 1.0) -> dict[str, int]:
        for part in runs:
            trainer = make(tmp_path, prefill_cache=str(tmp_path / name), prefill_cache_gb=gb)
            for batch in part:
                trainer.prefills(batch)
        return {f.name: f.stat().st_size for f in (tmp_path / name).rglob("*.safetensors")}

    fitting = kept("fitting", [batches[0], batches[2]])
    limit = sum(fitting.values()) / 1e9
    assert kept("whole", batches, gb=limit) == fitting
    assert kept("resumed", batches[:2], batches[2:], gb=limit) == fitting


def test_what_other_runs_keep_takes_room(
    make: Make, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is that of the folder; a recipe may name it from the home folder on."""
    monkeypatch.setenv("HOME", str(tmp_path))
    batch, options = collate(examples[:2], "all"), {"prefill_cache": "~/kept"}
    loss_of(make(tmp_path / "a", **options), batch)
    held = size(tmp_path / "kept")
    said: list[str] = []
    other = {"rotated_keys": False, "say": said.append, **options}
    loss_of(make(tmp_path / "b", prefill_cache_gb=1.5 * held / 1e9, **other), batch)
    assert size(tmp_path / "kept") == held > 0 and len(said) == 1
    loss_of(make(tmp_path / "b", prefill_cache_gb=2.5 * held / 1e9, **other), batch)
    assert size(tmp_path / "kept") > 1.9 * held and len(said) == 1


def test_a_prefill_is_the_same_alone_and_in_a_batch(
    make: Make, examples: list[Example], tmp_path: Path
) -> None:
    """Up to rounding, so runs can share a folder, and what is missing of a batch is computed."""
    together = make(tmp_path / "a", prefill_cache=str(tmp_path / "kept"))
    batch = collate(examples, "all")
    whole = loss_of(together, batch)
    for path in sorted((tmp_path / "kept").rglob("*.safetensors"))[:2]:
        path.unlink()
    parts = make(tmp_path / "b", prefill_cache=str(tmp_path / "kept"))
    assert loss_of(parts, batch) == pytest.approx(whole, rel=1e-5)
    alone = make(tmp_path / "c", prefill_cache=str(tmp_path / "alone"))
    for e in reversed(examples):
        alone.prefills(collate([e], "all"))
    alone.c2c.sharer = None  # it must not be needed
    assert loss_of(alone, batch) == pytest.approx(whole, rel=1e-5)


def test_other_weights_have_prefills_of_their_own(
    make: Make, examples: list[Example], tmp_path: Path, receiver: LanguageModel
) -> None:
    """Names alone do not say how a model was quantised."""
    batch, kept = collate(examples[:3], "all"), str(tmp_path / "kept")
    loss_of(make(tmp_path / "a", prefill_cache=kept), batch)
    other = make(tmp_path / "b", prefill_cache=kept)
    norm = other.c2c.receiver.model.norm
    weight, norm.weight = norm.weight, norm.weight * 1.5
    try:
        other = make(tmp_path / "b", prefill_cache=kept)
        expected = loss_of(make(tmp_path / "c"), batch)
        assert loss_of(other, batch) == pytest.approx(expected, rel=1e-3)
    finally:
        norm.weight = weight
    assert len(list((tmp_path / "kept").iterdir())) == 2
