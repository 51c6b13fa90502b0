"""A sharer in another process: what a turn takes against the longer of the two prefills.

Two processes with one thread each stand for two machines. The parts are timed in turns with the
whole, so that a machine that gets busier slows down all of them.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[name] = "1"  # before MLX is there

import c2c_mlx.blas  # noqa: F401, E402

import mlx.nn as nn  # noqa: E402

from c2c_mlx import C2C, Fuser, load_model  # noqa: E402
from c2c_mlx.fusers import store  # noqa: E402
from c2c_mlx.fusion import kv  # noqa: E402
from c2c_mlx.fusion.fused import FusedCache  # noqa: E402
from c2c_mlx.fusion.reader import Reader  # noqa: E402
from c2c_mlx.models import registry  # noqa: E402
from c2c_mlx.text.alignment import align_chat  # noqa: E402

SENTENCE = "The sea covers more than two thirds of the Earth, and most of it is deep and dark. "
RUNS = 7


def main() -> None:
    receiver, sharer = registry.default_pair()
    code = "import sys; from c2c_mlx.commands.serve import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--port", "0", "--share", sharer]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            told = iter(process.stderr.readline, "")
            url = next(found[1] for line in told if (found := re.search(r"(http://\S+)/v1", line)))
            measure(receiver, url)
        finally:
            process.terminate()


def measure(receiver: str, url: str) -> None:
    lm, elsewhere = load_model(receiver), load_model(url)
    fuser = Fuser.load(store.find_for_pair(receiver, url, None))
    link = C2C(lm.model, elsewhere.model, fuser)
    ratios, parts = [], []
    for run in range(RUNS + 1):
        messages = [{"role": "user", "content": f"{run}. " + SENTENCE * 12}]
        strategy = fuser.config.alignment
        prompt = align_chat(messages, lm.tokenizer, elsewhere.tokenizer, strategy=strategy)
        fused = FusedCache(link)
        tic = time.perf_counter()
        fused.extend([prompt])
        whole = time.perf_counter() - tic
        fused.fuse_anew()
        fused.extend([prompt])
        assert fused.last is not None
        fuse = fused.last.fuse_s
        # The other side keeps what it has read: each of the parts gets a text of its own.
        own = alone(lm.model, prompt.receiver_ids[:-1])
        theirs = [prompt.sharer_ids[-1], *prompt.sharer_ids[:-1]]
        tic = time.perf_counter()
        reader = link.make_reader(link.sharer_layers)
        reader.extend(theirs)
        held = reader.cache
        there = time.perf_counter() - tic
        ratios.append(whole / (max(own, there) + fuse))
        parts.append((whole, own, there, fuse))
    layers = link.sharer_layers
    pair = kv.read(held, layers, 0, 1)
    nbytes = pair.keys.nbytes + pair.values.nbytes
    whole, own, there, fuse = (statistics.median(of) for of in zip(*parts[1:], strict=True))
    print(f"{len(prompt.receiver_ids)} tokens: {whole:.2f} s in all; alone the receiver ", end="")
    print(f"reads in {own:.2f} s, the sharer and the wire take {there:.2f} s, fusing {fuse:.2f} s")
    print(f"{statistics.median(ratios[1:]):.2f} x the longer of the two and the fusing (median)")
    print(f"{nbytes} bytes a position over the wire, {len(layers)} layers in {pair.keys.dtype}")


def alone(model: nn.Module, ids: list[int]) -> float:
    """Seconds that the receiver takes to read."""
    reader = Reader(model)
    tic = time.perf_counter()
    reader.extend(ids)
    return time.perf_counter() - tic


if __name__ == "__main__":
    main()
