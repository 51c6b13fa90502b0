"""A fuser of the smallest published size against PyTorch doing the same, in turns in one run.

Needs PyTorch: `pip install torch`; with OMP_WAIT_POLICY=passive, for its threads wait by spinning
and take twice the time beside MLX's. The reference's way is one small network per layer and kind;
both sides hold the same weights in float32 and use the same number of threads. Nothing is reported
while the machine is busy, or if the two disagree.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
import torch
from torch.nn import functional

from c2c_mlx.config import FuserConfig, ModelShape
from c2c_mlx.fusion.fuser import Fuser, parameters
from c2c_mlx.fusion.layers import last_aligned

# Qwen3-0.6B reading Qwen2.5-0.5B: 478 M parameters.
RECEIVER, SHARER = ModelShape("receiver", 28, 8, 128), ModelShape("sharer", 24, 2, 64)
POSITIONS, RUNS = (64, 256), 5
TOLERANCE = 1e-4
BUSY = 0.1  # of the processors


def main() -> None:
    refuse_if_busy()
    threads = use_as_many_threads()
    mx.random.seed(0)
    fuser = Fuser(FuserConfig(RECEIVER, SHARER, tuple(last_aligned(28, 24))))
    fuser.gate_logit = mx.ones_like(fuser.gate_logit)
    mx.eval(fuser.parameters())
    fuser.eval()
    # The same memory: NumPy looks at MLX's, PyTorch at NumPy's.
    weights = {k: torch.from_numpy(np.array(v, copy=False)) for k, v in parameters(fuser).items()}
    lines = []
    for n in POSITIONS:
        sharer, receiver = (
            tuple(mx.random.normal((28, 1, s.kv_heads, n, s.head_dim)) for _ in range(2))
            for s in (SHARER, RECEIVER)
        )
        theirs = [[torch.from_numpy(np.array(x)) for x in kv] for kv in (sharer, receiver)]

        def ours(sharer: Any = sharer, receiver: Any = receiver) -> Any:
            fused = fuser(sharer=sharer, receiver=receiver)
            mx.eval(fused)
            return fused

        def reference(theirs: Any = theirs) -> Any:
            with torch.inference_mode():
                return [fuse(weights, kind, *theirs) for kind in (0, 1)]

        for a, b in zip(ours(), reference(), strict=True):
            off = float(np.abs(np.array(a) - b.numpy()).max())
            if off > TOLERANCE:
                sys.exit(f"the two are {off:.1e} apart: nothing to compare")
        rounds = [(seconds(ours), seconds(reference)) for _ in range(RUNS)]
        ms = [1e3 * statistics.median(times) for times in zip(*rounds, strict=True)]
        ratio = statistics.median(a / b for a, b in rounds)
        lines.append(f"| {n} | {threads} | {ms[0]:.0f} ms | {ms[1]:.0f} ms | {ratio:.2f} |")
    refuse_if_busy()
    print("| positions | threads | ours | PyTorch | ratio |\n| --- | --- | --- | --- | --- |")
    print("\n".join(lines))


def fuse(weights: dict[str, Any], kind: int, sharer: Any, receiver: Any) -> Any:
    """Keys or values of all layers, a layer at a time, [L, 1, Hr, N, Dr]."""
    fused = []
    for layer, target in enumerate(receiver[kind]):
        w = {name: x[kind, layer] for name, x in weights.items()}
        both = [x.transpose(1, 2).flatten(2) for x in (sharer[kind][layer], target)]
        h = block(w, "mlp1", linear(w, "proj_in", torch.cat(both, dim=-1)))
        s = torch.sigmoid(linear(w, "scalar_head", block(w, "scalar_mlp2", h)))  # [1, N, Hr]
        p = linear(w, "proj_out", block(w, "proj_mlp2.0", h))  # [1, N, Hr*Dr]
        p = p.unflatten(2, (target.shape[1], -1)).transpose(1, 2)
        gate = (w["gate_logit"] > 0).float()
        fused.append(target + gate * s.transpose(1, 2)[..., None] * p)
    return torch.stack(fused)


def linear(w: dict[str, Any], name: str, x: Any) -> Any:
    return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def block(w: dict[str, Any], name: str, x: Any) -> Any:
    norm = functional.rms_norm(x, x.shape[-1:], w[f"{name}.norm"], 1e-6)
    inner = functional.gelu(functional.linear(norm, w[f"{name}.w1"]))
    return x + functional.linear(inner, w[f"{name}.w2"])


def seconds(work: Callable[[], Any]) -> float:
    tic = time.perf_counter()
    work()
    return time.perf_counter() - tic


def use_as_many_threads() -> int:
    """Has PyTorch, which computes on the CPU, use the threads that MLX's BLAS has.

    Returns:
        Their number. Ends the program where MLX computes on a GPU: that would be no comparison.
    """
    if mx.default_device().type == mx.gpu:
        sys.exit("MLX computes on a GPU here, PyTorch on the CPU: nothing to compare")
    threads = int(os.environ.get("OPENBLAS_NUM_THREADS") or os.cpu_count() or 1)
    torch.set_num_threads(threads)
    return threads


def refuse_if_busy() -> None:
    """Ends the program if others use more than a little of the processors."""
    if (share := busy()) > BUSY:
        sys.exit(f"the machine is {share:.0%} busy: no figures; run this when it is idle")


def busy() -> float:
    """The share of the processors that is used while this process sleeps."""
    if Path("/proc/stat").exists():
        before = times()
        time.sleep(1)
        total, idle = (b - a for a, b in zip(before, times(), strict=True))
        return 1 - idle / total
    told = subprocess.run(["ps", "-A", "-o", "%cpu="], capture_output=True, text=True, check=True)
    return sum(map(float, told.stdout.split())) / 100 / (os.cpu_count() or 1)


def times() -> tuple[int, int]:
    """Ticks of all processors, and those in which nothing ran."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return sum(ticks), ticks[3] + ticks[4]


if __name__ == "__main__":
    main()
