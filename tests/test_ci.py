"""CI runs what a contributor runs: every command of the workflow is one that exists here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
JOB: dict[str, Any] = WORKFLOW["jobs"]["test"]


def test_it_runs_on_apple_silicon_and_on_linux() -> None:
    systems = JOB["strategy"]["matrix"]["os"]
    assert any(re.fullmatch(r"macos-(1[5-9]|[2-9]\d)", system) for system in systems)
    assert any(system.startswith("ubuntu-") for system in systems)


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    runs = [step["run"] for step in JOB["steps"] if "run" in step]
    runs += (ROOT / ".ci" / "run").read_text().splitlines()
    called = {word for run in runs for word in re.findall(r"^make ([\w-]+)", run)}
    assert {"test", "rehearse-fast", "check", "doctor"} <= called <= targets


def test_the_cache_holds_the_pair_where_commands_look_for_it() -> None:
    (cache,) = [step for step in JOB["steps"] if step.get("uses", "").startswith("actions/cache@")]
    assert JOB["env"]["C2C_MLX_HOME"] and "C2C_MLX_HOME" in cache["with"]["path"]
    names = re.findall(r"'([^']+)'", cache["with"]["key"])
    assert names and all(any(ROOT.glob(name)) for name in names)
