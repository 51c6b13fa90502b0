"""A checkpoint of the smallest published size, converted, loaded, and run between two models.

It is made up here: 28 layers of 0.5B -> 0.6B, hidden 1024, 478 M random numbers in bfloat16. The
two models are random, too; shapes are those of Qwen2.5-0.5B-Instruct and Qwen3-0.6B.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
from mlx_lm.models import qwen2, qwen3

from c2c_mlx import Fuser
from c2c_mlx.config import FuserConfig, ModelShape
from c2c_mlx.fusers import disk
from c2c_mlx.fusers.published import reference_name
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.fuser import parameters
from c2c_mlx.fusion.layers import last_aligned
from c2c_mlx.text.alignment import TokenAlignment

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))
from torch_files import dumps, tensor, write_zip  # noqa: E402

RECEIVER = ModelShape("Qwen/Qwen3-0.6B", 28, 8, 128)
SHARER = ModelShape("Qwen/Qwen2.5-0.5B-Instruct", 24, 2, 64)
CONFIG = FuserConfig(RECEIVER, SHARER, tuple(last_aligned(28, 24)))
TOKENS, RUNS = 256, 2


def write_checkpoint(folder: Path) -> None:
    """The published layout, without torch."""
    final = folder / "final"
    final.mkdir(parents=True)
    model = {"base_model": RECEIVER.name, "teacher_model": SHARER.name, "is_do_alignment": False}
    (folder / "config.json").write_text(json.dumps({"model": model}))
    pairs = {str(r): [[s, r]] for r, s in CONFIG.layer_map}
    (final / "projector_config.json").write_text(json.dumps({"0": {"1": pairs}}))
    arguments = {
        **{"source_dim": SHARER.head_dim, "source_num_heads": SHARER.kv_heads},
        **{"target_dim": RECEIVER.head_dim, "target_num_heads": RECEIVER.kv_heads},
        **{"hidden_dim": 1024, "intermediate_dim": 1024, "num_layers": 3},
    }
    described = json.dumps({"class": "C2CProjector", "init_args": arguments})
    shapes = {
        reference_name(name, kind): w.shape[2:]
        for name, w in parameters(Fuser(CONFIG)).items()
        for kind in ("key", "value")
    }
    made = {
        name: tensor(str(i), shape, kind="BFloat16Storage")
        for i, (name, shape) in enumerate(shapes.items())
    }
    random = np.random.default_rng(0)
    for layer, _ in CONFIG.layer_map:
        raw = {}
        for i, (name, shape) in enumerate(shapes.items()):
            numbers = random.standard_normal(shape, np.float32) * 0.02 + name.endswith("gate_logit")
            raw[str(i)] = (numbers.view("<u4") >> 16).astype("<u2").tobytes()
        write_zip(final / f"projector_{layer}.pt", dumps(made), raw)
        (final / f"projector_{layer}.json").write_text(described)


def convert(source: Path, target: Path) -> None:
    """The command, in a process of its own: its peak memory is the operating system's figure."""
    command = [sys.executable, "-m", "c2c_mlx.commands.weights", "convert", source, target]
    tic = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - tic
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    size = (target / disk.WEIGHTS).stat().st_size
    print(f"convert: {seconds:.1f} s, peak {peak / 1e9:.2f} GB for a file of {size / 1e9:.2f} GB")
    print(f"         peak / file {peak / size:.2f}")


def random_model(module: Any, **options: Any) -> Any:
    model = module.Model(module.ModelArgs(rms_norm_eps=1e-6, vocab_size=151936, **options))
    mx.eval(model.parameters())
    return model


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "checkpoint", Path(scratch) / "fuser"
        write_checkpoint(source)
        convert(source, target)
        tic = time.perf_counter()
        fuser = Fuser.load(target)
        count = sum(w.size for w in parameters(fuser).values())
        print(f"load: {time.perf_counter() - tic:.1f} s, {count / 1e6:.0f} M parameters")
    receiver = random_model(
        qwen3,
        model_type="qwen3",
        hidden_size=1024,
        num_hidden_layers=28,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    sharer = random_model(
        qwen2,
        model_type="qwen2",
        hidden_size=896,
        num_hidden_layers=24,
        intermediate_size=4864,
        num_attention_heads=14,
        num_key_value_heads=2,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    measure(C2C(receiver, sharer, fuser))


def measure(c2c: C2C) -> None:
    """Prefills, fusing and the first token, of the fastest of RUNS."""
    ids = np.random.default_rng(0).integers(1000, 40000, TOKENS).tolist()
    best: tuple[float, ...] = (np.inf,)
    for _ in range(RUNS):
        fused = FusedCache(c2c)
        tic = time.perf_counter()
        cache = fused.extend(
            [TokenAlignment(ids, ids, np.arange(TOKENS), np.zeros(TOKENS, np.int32))]
        )
        mx.eval(c2c.receiver(mx.array(ids[-1:])[None], cache=cache))
        total = time.perf_counter() - tic
        assert fused.last is not None
        parts = fused.last.sharer_s, fused.last.receiver_s, fused.last.fuse_s
        best = min(best, (total, *parts))
    total, sharer_s, receiver_s, fuse_s = best
    print(
        f"{TOKENS} tokens to the first token: {total:.2f} s = sharer {sharer_s:.2f} + receiver "
        f"{receiver_s:.2f} + fuser {fuse_s:.2f} + token; the fuser's share {fuse_s / total:.0%}"
    )


if __name__ == "__main__":
    main()
