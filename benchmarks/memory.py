"""The estimate of memory before a load, against what MLX then takes, on four cases.

    python benchmarks/memory.py [--batch N] [--grad-checkpoint] [--turned] [chat small ...]

Two pairs of figures, each of the whole process from its first load on: `Need.total` against the
most that MLX held at one time, memory in use and freed buffers that it keeps (sampled every few
milliseconds); and the same without `Need.buffers` against `mx.get_peak_memory`. Each case runs in a
process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Literal

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models import qwen2, qwen3
from mlx_lm.utils import save_config, save_model

from c2c_mlx import ChatSession, Fuser, device, load_model
from c2c_mlx.config import FuserConfig, ModelShape, SamplingConfig, TrainConfig
from c2c_mlx.fusers import disk, store
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.layers import last_aligned
from c2c_mlx.fusion.link import Link
from c2c_mlx.models import memory, registry
from c2c_mlx.models.load import find_folder, open_model
from c2c_mlx.models.sizes import ModelSize
from c2c_mlx.text.alignment import TokenAlignment
from c2c_mlx.training.dataset import Dataset, Source
from c2c_mlx.training.files import ChatRow
from c2c_mlx.training.run import RunConfig
from c2c_mlx.training.start import fuser_config, new_fuser
from c2c_mlx.training.trainer import Trainer

CASES = ("chat", "published", "small", "paper")
TOKENS = 128  # of the published size, which takes 7 GB on a CPU whatever is read


class Watch(threading.Thread):
    """Looks at what MLX holds until it is told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.held = 0
        self._over = threading.Event()

    def run(self) -> None:
        """The thread's life."""
        while not self._over.wait(0.004):
            active = mx.get_active_memory()
            self.peak = max(self.peak, active)
            self.held = max(self.held, active + mx.get_cache_memory())

    def stop(self) -> None:
        """Ends it; its figures are then complete."""
        self._over.set()
        self.join()
        self.peak = max(self.peak, mx.get_peak_memory())


def chat() -> memory.Need:
    """The embedded pair, one turn in each mode."""
    names = registry.default_pair()
    folder = store.find_folder(registry.find_fuser(*names) or "")
    receiver, sharer = map(load_model, names)
    session = ChatSession(
        receiver, sharer, disk.load(folder), sampling=SamplingConfig(max_tokens=4)
    )
    tokens = 0
    for mode in memory.MODES:
        repeats = 40 if mode == "relay" else 80  # the relay's question is there twice
        *_, finished = session.ask("The cat sat on the mat. " * repeats, mode)
        tokens = max(tokens, finished.figures.prompt_tokens)
    config = disk.measure(folder)
    folders = find_folder(names[0]), [find_folder(names[1])]
    return memory.preflight(*folders, [config], tokens=tokens)


def write_published(scratch: Path) -> None:
    """Models and a fuser of the smallest published size; all numbers are the same."""
    head = {"rms_norm_eps": 1e-6, "vocab_size": 151936, "rope_theta": 1e6}
    receiver = {
        **{"model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28},
        **{"intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8},
        **{"head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": True},
    }
    sharer = {
        **{"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24},
        **{"intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
    }
    for name, module, config in (("receiver", qwen3, receiver), ("sharer", qwen2, sharer)):
        model = module.Model(module.ModelArgs.from_dict(config | head))
        model.update(tree_map(lambda w: mx.full(w.shape, 0.01, mx.bfloat16), model.parameters()))
        save_model(scratch / name, model)
        save_config(config | head, scratch / name / "config.json")
    shapes = ModelShape("receiver", 28, 8, 128), ModelShape("sharer", 24, 2, 64)
    fuser = Fuser(FuserConfig(*shapes, tuple(last_aligned(28, 24))))
    fuser.update(tree_map(lambda w: mx.full(w.shape, 0.01, mx.bfloat16), fuser.parameters()))
    disk.save(fuser, scratch / "fuser")


def published(scratch: Path) -> memory.Need:
    """A prompt read, fused, and answered by one token."""
    models = []
    for name in ("receiver", "sharer"):
        model, _ = open_model(scratch / name)
        for _, weight in sorted(model.parameters().items()):
            mx.eval(weight)
        mx.clear_cache()
        models.append(model)
    fused = FusedCache(Link(*models, disk.load(scratch / "fuser")))
    ids = list(range(TOKENS))
    fused.extend([TokenAlignment(ids, ids, np.arange(TOKENS), np.zeros(TOKENS, np.int32))])
    mx.eval(models[0](mx.array([ids[-1:]]), cache=fused.cache))
    folders = scratch / "receiver", [scratch / "sharer"]
    config = disk.measure(scratch / "fuser")
    return memory.preflight(*folders, [config], tokens=TOKENS, modes=["c2c"])


def training(
    preset: Literal["small", "paper"], batch_size: int, lighter: bool, turned: bool
) -> memory.Need:
    """Two steps on the embedded pair, perhaps turned round, with chats of one length.

    The paper's fuser has its last eight layers only: with all thirty a step takes 12 GB.
    """
    names = registry.default_pair()
    receiver, sharer = map(load_model, names[::-1] if turned else names)
    train = TrainConfig(batch_size=batch_size, grad_checkpoint=lighter)
    fields = {}
    if preset == "paper":
        layers = last_aligned(receiver.shape.layers, sharer.shape.layers)
        fields = {"layer_map": layers[-8:]}
    run = RunConfig(
        sharer.name,
        receiver.name,
        ("none",),
        "nowhere",
        preset=preset,
        fuser_config=fields,
        train=train,
    )
    config = fuser_config(run, receiver.shape, sharer.shape)
    fuser = new_fuser(config, train.gates, 0)
    messages = [
        {"role": "user", "content": "The cat sat on the mat. " * 20},
        {"role": "assistant", "content": "It rained all day long. " * 8},
    ]
    source = Source([ChatRow(messages)], 1.0)
    tokenizers = receiver.tokenizer, sharer.tokenizer
    data = Dataset([source], *tokenizers, config.alignment, train.max_tokens)
    example = data.example(source.rows[0])
    assert example is not None
    prompt = max(len(example.receiver_ids), len(example.sharer_ids))
    sizes = ModelSize.read(receiver.path), ModelSize.read(sharer.path)
    need = memory.training(*sizes, config, train, [(prompt, len(example.response_ids))])
    with tempfile.TemporaryDirectory() as folder, device.at_most(need.in_use):  # as a run does it
        c2c = C2C(receiver.model, sharer.model, fuser)
        trainer = Trainer(c2c, data, [], train, Path(folder))
        for _ in range(2):
            mx.reset_peak_memory()
            trainer.train_step([[example] * batch_size])
            print(f"  a step: {mx.get_peak_memory() / 1e9:.2f} GB in use")
    return need


def measure(args: argparse.Namespace, case: str) -> None:
    watch = Watch()
    watch.start()
    try:
        if case == "chat":
            need = chat()
        elif case == "published":
            need = published(args.scratch)
        else:
            need = training(case, args.batch, args.grad_checkpoint, args.turned)
    finally:
        watch.stop()
    print(f"{case}: {need}")
    for what, estimate, measured in (
        ("with buffers", need.total, watch.held),
        ("in use", need.in_use, watch.peak),
    ):
        print(
            f"  {what:13} {estimate / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB: "
            f"{estimate / measured - 1:+.0%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--batch", type=int, default=6, help="of the training runs")
    parser.add_argument("--grad-checkpoint", action="store_true", help="in the training runs")
    parser.add_argument("--turned", action="store_true", help="Gemma is their receiver")
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.scratch:
        measure(args, args.cases[0])
        return
    for case in args.cases or CASES:
        with tempfile.TemporaryDirectory() as scratch:
            if case == "published":
                write_published(Path(scratch))
            command = [sys.executable, __file__, case, f"--scratch={scratch}"]
            command += [f"--batch={args.batch}"] + ["--grad-checkpoint"] * args.grad_checkpoint
            command += ["--turned"] * args.turned
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
