"""kill -9 at random moments of a run of two tiny models: is the end the same, bit for bit?

python benchmarks/kill.py [KILLS]
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

TINY = Path(__file__).parents[1] / "tests" / "golden" / "data" / "e2e" / "qwen3_llama"
TRAIN = "import sys; from c2c_mlx.commands.train import main; sys.exit(main())"
STEPS = 300


def command(data: Path, out: Path, resume: bool) -> list[str]:
    """A run with everything in it that a resumed run could get wrong."""
    models = ["--sharer", str(TINY / "sharer"), "--receiver", str(TINY / "receiver")]
    run = ["--data", str(data), "--out", str(out), "--preset", "tiny", "--gates", "learned"]
    run += ["--iters", str(STEPS), "--save-every", "10", "--batch-size", "4", "--report-every", "1"]
    return [sys.executable, "-c", TRAIN, *models, *run, *(["--resume"] if resume else [])]


def main() -> None:
    kills, seed = int(sys.argv[1]) if len(sys.argv) > 1 else 20, 0
    random.seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        data, whole, cut = (Path(folder) / name for name in ("data", "whole", "cut"))
        data.mkdir()
        rows = [{"prompt": f"say {i}", "completion": "so " * (i % 5)} for i in range(1, 40)]
        (data / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        subprocess.run(command(data, whole, False), check=True, capture_output=True)
        landed = 0
        while landed < kills:
            started = any((cut / "checkpoints").glob("[0-9]*"))
            if (cut / "checkpoints" / f"{STEPS:07d}").exists():  # the other kills need a new run
                assert_same(cut, whole)
                cut, started = Path(folder) / f"cut{landed}", False
            steps, fraction = random.randrange(1, 40), random.random()
            process = subprocess.Popen(
                command(data, cut, started), stderr=subprocess.PIPE, text=True
            )
            assert process.stderr is not None
            began = time.monotonic()
            for line in process.stderr:
                if not line.startswith("step "):
                    continue
                steps, a_step, began = steps - 1, time.monotonic() - began, time.monotonic()
                if steps == 0:
                    time.sleep(fraction * a_step)
                    process.kill()
                    landed += 1
                    print(f"kill {landed} of {kills}, after {line.split()[1]}", flush=True)
            process.wait()
        started = any((cut / "checkpoints").glob("[0-9]*"))
        subprocess.run(command(data, cut, started), check=True, capture_output=True)
        assert_same(cut, whole)
    print(f"{kills} kills: the final weights are bit-identical to those of an uninterrupted run")


def assert_same(one: Path, other: Path) -> None:
    a, b = (load_file(run / "fuser.safetensors") for run in (one, other))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a), "weights differ"


if __name__ == "__main__":
    main()
