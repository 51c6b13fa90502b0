"""c2c-weights as a person or a script meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch_files import write_checkpoint

from c2c_mlx import atomic
from c2c_mlx.commands import one_line, run, weights
from c2c_mlx.errors import C2CError

SHIPPED = "smollm2-135m+gemma3-270m"


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "c2c_mlx.commands.weights", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_convert_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write_checkpoint(tmp_path / "source"), tmp_path / "fuser"
    assert weights.main(["convert", str(source), str(target)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{target}: org/sharer -> org/receiver\n"
    assert err == ""

    assert weights.main(["show", str(target)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in (
        "org/receiver (2 layers, 2 KV heads x 16), tokenizer unknown",
        "0-1 from 1-2",
        "alignment same, fused positions all",
        "converted from source",
        "4 of 4 open",
    ):
        assert text in out
    assert out.splitlines()[-3:-1] == ["  keys    ██", "  values  ██"]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert weights.main(["list"]) == 0
    out = capsys.readouterr().out
    assert "* smollm2-135m" in out
    assert "\nfusers" in out
    assert "  qwen-bf16 " in out and "not quantised" in out


def test_show_names_the_models_that_a_published_fuser_was_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint(tmp_path / "source")
    description = json.loads((source / "config.json").read_text())
    description["model"]["base_model"] = "Qwen/Qwen3-0.6B"
    description["model"]["teacher_model"] = "meta-llama/Llama-3.2-1B-Instruct"
    (source / "config.json").write_text(json.dumps(description))
    assert weights.main(["convert", str(source), str(tmp_path / "fuser")]) == 0
    assert weights.main(["show", str(tmp_path / "fuser")]) == 0
    assert "not quantised, --receiver qwen-bf16 --sharer llama-bf16" in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["show", "nowhere"], ["convert", str(tmp_path / "x"), str(tmp_path / "y")]):
        assert weights.main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("c2c-weights: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["melt"], ["show"], ["convert", "one"]])
def test_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as e:
        weights.main(arguments)
    assert e.value.code == 2


def test_help_imports_neither_mlx_nor_textual() -> None:
    program = (
        "import sys; from c2c_mlx.commands import weights\n"
        "try: weights.main(['--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "bad = {m.partition('.')[0] for m in sys.modules} & {'mlx', 'mlx_lm', 'textual', 'numpy'}\n"
        "assert not bad, bad"
    )
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "examples:" in result.stdout
    assert time.perf_counter() - started < 3  # 0.1 s on an idle machine


def test_a_process_ends_with_the_exit_code() -> None:
    result = call("show", "nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1


def test_a_reader_that_goes_away() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "c2c_mlx.commands.weights", "list"]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


# The wrapper that all commands share.


def raising(error: BaseException) -> int:
    def body() -> int:
        raise error

    return run(body, "program")


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: None, "program") == 0
    assert run(lambda: 3, "program") == 3
    assert raising(KeyboardInterrupt()) == 130
    assert raising(C2CError("two\nlines \x1b[31m")) == 2
    assert capsys.readouterr().err == "program: two lines  [31m\n"
    assert weights.main(["verify", "a prompt, not a fuser " * 20]) == 2
    assert capsys.readouterr().err.startswith("c2c-weights: File name too long: a prompt, not a")
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())


def test_one_line() -> None:
    assert one_line("  é\tü\u202ex\x07y\n") == "  é ü x y"


@pytest.mark.parametrize(("bits", "share"), [("8", "0.5"), ("4", "0.")])
def test_quantize(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: str, share: str
) -> None:
    target = tmp_path / "quantised"
    (target / atomic.STAGING).mkdir(parents=True)  # of a save that was killed
    assert weights.main(["quantize", SHIPPED, str(target), "--bits", bits]) == 0
    out = capsys.readouterr().out
    assert f"({share}" in out
    difference = re.search(r"what it adds to random caches differs by (.*)%", out)
    assert difference is not None and 0.01 < float(difference[1]) < 20
    assert weights.main(["verify", str(target)]) == 0
    assert weights.main(["show", str(target)]) == 0
    assert f"{bits} bits" in capsys.readouterr().out
    assert weights.main(["quantize", str(target), str(tmp_path / "again")]) == 2
    assert "is quantised already" in capsys.readouterr().err
    assert weights.main(["quantize", SHIPPED, str(target)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_what_was_saved_counts_before_it_is_in_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "fuser"
    assert weights.main(["quantize", SHIPPED, str(target)]) == 0
    assert weights.main(["verify", str(target)]) == 0
    told = capsys.readouterr().out.rpartition("sha256")[2]
    (target / atomic.STAGED).mkdir()
    for file in ("config.json", "fuser.safetensors", "README.md"):
        (target / file).rename(target / atomic.STAGED / file)  # as a loss of power may leave it
    assert weights.main(["verify", str(target)]) == 0 == weights.main(["show", str(target)])
    assert told and told in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Mac has no full device")
def test_output_onto_a_full_disk_is_one_line() -> None:
    command = [sys.executable, "-m", "c2c_mlx.commands.weights", "list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "c2c-weights: No space left on device: make room there\n"
