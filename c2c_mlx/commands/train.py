"""c2c-train: fine-tune a fuser between two frozen models."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2c_mlx.commands import run
from c2c_mlx.config import FuserConfig, Provenance, TrainConfig, from_dict
from c2c_mlx.errors import C2CError

if TYPE_CHECKING:
    from c2c_mlx.fuser import Fuser
    from c2c_mlx.models import LanguageModel
    from c2c_mlx.training.data import Example, Source

PROGRAM = "c2c-train"
EPILOG = """\
examples:
  c2c-train --sharer gemma3-270m --receiver smollm2-135m --data chats --out runs/mine
  c2c-train --sharer qwen --receiver llama --data chats=3 --data more=1 --out runs/mine
  c2c-train ... --out runs/mine --resume          # continue exactly where it stopped
  c2c-chat --sharer gemma3-270m --receiver smollm2-135m --fuser runs/mine

DIR holds train.jsonl and optionally valid.jsonl, one object per line: {"messages": [...]}, or
{"prompt": ..., "completion": ...}. With --answer-with, rows without an answer are answered by one
of the two models first: by the receiver, and the fuser learns to leave alone what it can do by
itself; by the sharer, and the fuser learns what the sharer knows.
"""

# What a preset changes of FuserConfig; 'small' is the recipe that won on the embedded pair.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_dim": 64, "intermediate_dim": 64},
    "small": {"hidden_dim": 128, "intermediate_dim": 128},
    "paper": {},
}
RECIPE: dict[str, Any] = {
    "activation": "relu",
    "rotated_keys": False,
    "normalise": True,
    "positions": "messages",
    "message_gate": True,
    "dropout": 0.0,
}
STATISTICS = 128  # examples that the normalisation is measured on


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point: parses arguments, trains, returns an exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    command = shlex.join([PROGRAM, *(sys.argv[1:] if argv is None else argv)])
    return run(lambda: _train(args, command), PROGRAM)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train a fuser: both models frozen, next-token loss on the answers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--sharer", required=True, metavar="MODEL", help="alias, folder or hub id")
    add("--receiver", required=True, metavar="MODEL", help="alias, folder or hub id")
    add(
        "--data",
        required=True,
        action="append",
        metavar="DIR[=WEIGHT]",
        help="folder with train.jsonl and, if you like, valid.jsonl; may be given several times",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="the run's folder, and the fuser's")
    add("--answer-with", choices=("receiver", "sharer"), help="answers rows that have no answer")
    add("--answer-tokens", type=int, default=40, metavar="N", help="at most (default: 40)")
    add("--preset", choices=PRESETS, default="small", help="size of the fuser (default: small)")
    add("--fuser", metavar="DIR", help="start from this fuser instead of a fresh one")
    add("--resume", action="store_true", help="continue the run in --out exactly")
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        if field.type == "bool":
            add(flag, action="store_true", default=None)
        elif field.name not in ("betas",):
            kind = {"int": int, "float": float}.get(str(field.type), str)
            add(flag, type=kind, metavar=str(field.type)[0].upper(), help=f"({field.default})")
    return parser


def _train(args: argparse.Namespace, command: str) -> None:
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    config = from_dict(TrainConfig, given, "arguments")
    folders = [_folder(text) for text in args.data]
    _claim(args.out, args.resume)

    import c2c_mlx.blas  # noqa: F401

    import mlx.core as mx

    from c2c_mlx import checkpoint, store
    from c2c_mlx.generate import C2C
    from c2c_mlx.models import load_model
    from c2c_mlx.training.data import Dataset
    from c2c_mlx.training.trainer import Trainer, checkpoints, measure_inputs, new_fuser

    receiver, sharer = load_model(args.receiver), load_model(args.sharer)
    if args.fuser:
        fuser = checkpoint.load(store.find_folder(args.fuser))
        fuser.set_dtype(mx.float32)  # a shipped fuser is half precision; AdamW's steps are smaller
        checkpoint.check_models(fuser.config, receiver.shape, sharer.shape)
    else:
        fuser = new_fuser(_fuser_config(args.preset, receiver, sharer), config.gates, config.seed)
    c2c = C2C(receiver.model, sharer.model, fuser)
    sources, valid = _read(folders, args, receiver, sharer)
    alignment = fuser.config.alignment
    train = Dataset(sources, receiver.tokenizer, sharer.tokenizer, alignment, config.max_tokens)
    examples = [e for e in map(train.example, valid) if e is not None]
    trainer = Trainer(c2c, train, examples, config, args.out)
    if args.resume:
        trainer.resume(checkpoints(args.out)[-1])
        _say(f"resumed at step {trainer.step}")
    elif not args.fuser and fuser.config.normalise:
        measure_inputs(c2c, _first(train, config), config.batch_size)
    _say(
        f"{sum(len(s.rows) for s in sources)} chats, {len(examples)} for validation, "
        f"{_parameters(fuser) / 1e6:.2f} M parameters, {config.iters} steps"
    )
    trainer.run(lambda report: _say(_line(report, config.iters)))
    if train.skipped:
        _say(f"{train.skipped} chats were longer than {config.max_tokens} tokens and left out")
    fuser.provenance = Provenance(
        source=command,
        steps=trainer.step,
        data=tuple(path.name for path, _ in folders),
        metrics={k: v for k, v in trainer.final.items() if k.startswith("valid_")},
    )
    checkpoint.save(fuser, args.out)
    _say(
        f"fuser saved in {args.out}; chat with it: c2c-chat --fuser {args.out} "
        f"--sharer {args.sharer} --receiver {args.receiver}"
    )


def _folder(text: str) -> tuple[Path, float | None]:
    """DIR or DIR=WEIGHT."""
    name, _, weight = text.rpartition("=")
    try:
        folder, share = (Path(name), float(weight)) if name else (Path(text), None)
    except ValueError:
        folder, share = Path(text), None
    if share is not None and not share > 0:
        raise C2CError(f"--data {text}: the weight must be above zero")
    if not (folder / "train.jsonl").is_file():
        raise C2CError(
            f"--data {folder}: no train.jsonl there; see c2c-train --help for its format"
        )
    return folder, share


def _claim(out: Path, resume: bool) -> None:
    """Makes the run's folder; a run that is there is continued or left alone, never overwritten."""
    has_run = any((out / "checkpoints").glob("[0-9]*"))
    if resume and not has_run:
        raise C2CError(f"--resume: no checkpoint in {out}; leave --resume out to start a run")
    if not resume and (has_run or (out / "config.json").exists()):
        raise C2CError(f"--out {out}: a run or fuser is there; --resume it, or name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise C2CError(f"--out {out}: cannot make the folder ({e.strerror})") from None


def _fuser_config(preset: str, receiver: LanguageModel, sharer: LanguageModel) -> FuserConfig:
    from c2c_mlx.layers import k_nearest, last_aligned

    r, s = receiver.shape, sharer.shape
    if preset == "paper":
        return FuserConfig(r, s, tuple(last_aligned(r.layers, s.layers)))
    upper_half = tuple(p for p in k_nearest(r.layers, s.layers) if p[0] >= r.layers // 2)
    return FuserConfig(r, s, upper_half, **RECIPE, **PRESETS[preset])


def _read(
    folders: list[tuple[Path, float | None]],
    args: argparse.Namespace,
    receiver: LanguageModel,
    sharer: LanguageModel,
) -> tuple[list[Source], list[list[dict[str, str]]]]:
    from c2c_mlx.training.answers import answer_rows
    from c2c_mlx.training.data import Source, read_rows

    lm = {"receiver": receiver, "sharer": sharer}.get(args.answer_with)
    sources, valid = [], []
    for folder, weight in folders:
        for name in ("train.jsonl", "valid.jsonl"):
            if name == "valid.jsonl" and not (folder / name).is_file():
                continue
            rows = read_rows(folder / name, unanswered=lm is not None)
            if lm is not None:
                rows = answer_rows(
                    rows,
                    lm,
                    args.out / f"answers-{args.answer_with}.jsonl",
                    args.answer_tokens,
                    lambda done, total: _say(f"answered {done} of {total} prompts"),
                )
            if name == "train.jsonl":
                sources.append(Source(rows, weight or float(len(rows))))
            else:
                valid.extend(rows)
    return sources, valid


def _first(train: Any, config: TrainConfig) -> list[Example]:
    batches = train.batches(config.batch_size, config.seed)
    examples: list[Example] = []
    while len(examples) < min(STATISTICS, sum(len(s.rows) for s in train.sources)):
        examples.extend(next(batches)[1])
    return examples


def _parameters(fuser: Fuser) -> int:
    from c2c_mlx.checkpoint import parameters

    return sum(p.size for p in parameters(fuser).values())


def _line(report: dict[str, float | int], iters: int) -> str:
    line = (
        f"step {report['step']}/{iters}  loss {report['loss']:.3f}  "
        f"{report['tokens_per_s']:.0f} tokens/s  {report['peak_memory_gb']:.1f} GB"
    )
    if "valid_loss" in report:
        line += (
            f"  valid: c2c {report['valid_loss']:.3f}, shuffled sharer "
            f"{report['valid_shuffled_loss']:.3f}, receiver {report['valid_receiver_loss']:.3f}"
        )
    return line


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
