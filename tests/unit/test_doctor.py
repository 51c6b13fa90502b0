"""The doctor: that its goldens are the reference's, that it passes here, and that it can fail."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import pytest

from c2c_mlx import device
from c2c_mlx.commands import doctor
from c2c_mlx.doctor import arithmetic, conversation, projector
from c2c_mlx.doctor.check import Found, Proof, error, run, tolerance, worst
from c2c_mlx.doctor.pair import EmbeddedPair
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fuser import parameters

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "projector" / "p1"

# Each as it might go wrong on a new device, or in a new version of a library.
TANH_GELU = """
import c2c_mlx.blas, mlx.nn as nn
from c2c_mlx.fusion import project
project.ACTIVATIONS["gelu"] = nn.gelu_approx
"""
LOST_ROPE = """
import c2c_mlx.blas, mlx.core as mx
rope = mx.fast.rope
def lost(x, *a, **k):  # its gradient turns the wrong way
    turn = mx.custom_function(lambda x: rope(x, *a, **k))
    turn.vjp(lambda x, cotangent, output: rope(cotangent, *a, **k))
    return turn(x)
mx.fast.rope = lost
"""


def examine(home: Path, *arguments: str, before: str = "", **environment: str) -> Any:
    """A run of the command in a process of its own, without models unless `home` has them."""
    code = f"{before}\nimport sys\nfrom c2c_mlx.commands.doctor import main\nsys.exit(main())"
    variables = os.environ | {"C2C_MLX_HOME": str(home), "HF_HOME": str(home)} | environment
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=variables
    )


def test_the_goldens_are_those_of_the_reference() -> None:
    sys.path.insert(0, str(GOLDEN.parents[2]))  # its goldens.py
    from goldens import KINDS, arrays, fuser_of

    fuser, golden = projector.load()
    reference = fuser_of(fuser.config, arrays("projector/p1/projector.safetensors"))
    ours, theirs = parameters(fuser), parameters(reference)
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
    io = arrays("projector/p1/io.safetensors")
    for row, kind in enumerate(KINDS):
        for name, side in (("source", "sharer"), ("target", "receiver"), ("output", "fused")):
            assert mx.array_equal(golden[f"{side}.{kind}s"][0], io[f"{name}_{kind}"])
        assert mx.array_equal(golden["weight"][row], io[f"last_norm_{kind}_scalar"])


@pytest.mark.parametrize("rehearsed", ["", "gpu"])
def test_all_is_well_here(rehearsed: str, tmp_path: Path) -> None:
    done = examine(tmp_path, "--json", C2C_MLX_REHEARSE=rehearsed)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)  # nothing else there
    assert report["ok"] and not report["failed"] and done.stderr == ""
    assert report["device"]["decisions"] == (rehearsed or "cpu")
    assert {"python", "mlx", "mlx-lm", "c2c-mlx", "system"} <= report["versions"].keys()
    assert report["models"] == [] and report["fusers"][0]["name"] == "smollm2-135m+gemma3-270m"
    assert len(report["checks"]) == 22 and all(check["passed"] for check in report["checks"])
    speed = report["speed"]
    assert min(value for value in speed.values() if isinstance(value, float)) > 0
    assert "not in the cache" in report["not_examined"][0]


def test_the_table_is_for_people(tmp_path: Path) -> None:
    done = examine(tmp_path, COLUMNS="80", C2C_MLX_REHEARSE="m1")
    assert done.returncode == 0, done.stderr
    assert "rehearsing m1" in done.stdout
    assert len(re.findall(r" pass +\d\.\de", done.stdout)) == 22
    assert "all 22 checks passed" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout  # no colours where no terminal is


def test_a_wrong_rotation_is_found_and_named(tmp_path: Path) -> None:
    done = examine(tmp_path, "--json", before=LOST_ROPE)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    wrong = [check for check in report["checks"] if not check["passed"]]
    families = {check["name"].partition(",")[0] for check in wrong}
    assert families == {"un-rotated keys"}
    assert not report["ok"] and report["failed"] == [check["name"] for check in wrong]
    assert all(check["error"] > check["tolerance"] for check in wrong)


def test_a_wrong_activation_is_found_and_how_to_report_it_said(tmp_path: Path) -> None:
    done = examine(tmp_path, before=TANH_GELU)
    assert done.returncode == 1, done.stderr
    assert "FAIL projector, float32: against the reference" in done.stdout
    said = " ".join(done.stdout.split())
    assert "1 of 22 checks failed" in said
    assert "open an issue with what `c2c-doctor --json` prints" in said


@pytest.mark.parametrize("arguments", [["--yaml"], ["model"]])
def test_a_mistake_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        doctor.main(arguments)
    assert e.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_unknown_device_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(device.REHEARSE, "tpu")
    assert doctor.main([]) == 2
    assert capsys.readouterr().err == "c2c-doctor: C2C_MLX_REHEARSE=tpu: must be gpu or m1\n"


def found(proofs: list[Proof]) -> dict[str, bool]:
    return {check.name: check.passed for check in run(proofs, lambda *told: None)}


def test_packed_products_that_are_off_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda *a, **k: exact(*a, **k) * 1.1)
    wrong = {name for name, passed in found(arithmetic.proofs()).items() if not passed}
    dtypes = ("float32", "bfloat16", "float16")
    assert wrong == {f"quantised {what}, {d}" for what in ("products", "fuser") for d in dtypes}


def test_attention_that_loses_its_window_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel might for one token, while it is right for several."""
    exact = mx.fast.scaled_dot_product_attention

    def short_sighted(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        if q.shape[2] == 1 and k.shape[2] > 1:
            k, v, options = k[..., 1:, :], v[..., 1:, :], options | {"mask": None}
        return exact(q, k, v, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", short_sighted)
    passed = found(conversation.proofs())
    assert not any(ok for name, ok in passed.items() if name.startswith("conversation"))


def test_a_cache_that_is_promoted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = kv.append

    def promoted(cache: kv.Cache, layer: int, keys: mx.array, values: mx.array) -> None:
        exact(cache, layer, keys.astype(mx.float32), values.astype(mx.float32))

    monkeypatch.setattr(kv, "append", promoted)
    (half,) = [p for p in conversation.proofs() if p.name == "conversation, float16"]
    assert half.run().note == "the fused cache became float32"


def test_a_check_that_breaks_or_finds_no_number_has_failed() -> None:
    def broken() -> Found:
        raise RuntimeError("no such\nkernel")

    proofs = [
        Proof("broken", broken),
        Proof("nan", lambda: Found(math.nan, 1.0)),
        Proof("far", lambda: Found(math.inf, 1.0)),
        Proof("well", lambda: Found(0.5, 1.0)),
    ]
    told: list[tuple[str, int, int]] = []
    checks = list(run(proofs, lambda *report: told.append(report)))
    assert [check.passed for check in checks] == [False, False, False, True]
    assert checks[0].note == "RuntimeError: no such kernel"
    assert json.dumps([check.error for check in checks]) == "[null, null, null, 0.5]"
    assert told == [(proof.name, i, 4) for i, proof in enumerate(proofs)]


def test_errors_are_relative_and_never_lose_a_nan() -> None:
    right = mx.array([1.0, -4.0])
    assert error(mx.array([1.0, -3.0]), right) == 0.25
    assert error(mx.array([1.0, math.nan]), right) == math.inf
    assert math.isnan(worst([1.0, math.nan, 2.0]))
    assert tolerance(mx.bfloat16) == 8 * 2**-7 and tolerance(mx.float16) == 8 * 2**-10


@pytest.mark.pair
@pytest.mark.slow
def test_the_embedded_pair_takes_part() -> None:
    pair = EmbeddedPair()
    if not pair.is_here():
        pytest.skip("the embedded pair is not in the cache; `c2c-chat` puts it there")
    assert found(pair.proofs()) == {
        "answers, embedded pair": True,
        "conversation, embedded pair": True,
        "shut gates, embedded pair": True,
    }
    assert pair.link.fuser.gates.any()  # opened again
