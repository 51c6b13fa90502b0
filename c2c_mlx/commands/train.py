"""c2c-train: fine-tune a fuser between two frozen models."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from c2c_mlx.commands import Parser, run
from c2c_mlx.config import FuserConfig, ModelShape, Provenance, TrainConfig, from_dict
from c2c_mlx.errors import C2CError
from c2c_mlx.models import hub

if TYPE_CHECKING:
    from c2c_mlx.fusion.fuser import Fuser
    from c2c_mlx.models.load import LanguageModel
    from c2c_mlx.training.data import Chat, Example
    from c2c_mlx.training.display import Display

PROGRAM = "c2c-train"
EPILOG = """\
examples:
  c2c-train --config run.yaml --iters 4000        # flags override the file
  c2c-train --sharer gemma3-270m --receiver smollm2-135m --data chats --out runs/mine
  c2c-train --sharer qwen --receiver llama --data chats=3 --data more=1 --out runs/mine
  c2c-train ... --out runs/mine --resume          # continue exactly where it stopped
  c2c-train --plot runs/mine                      # draw its curves, train nothing
  mlx.launch -n 2 -- c2c-train --config run.yaml  # share each batch between two processes
  c2c-chat --sharer gemma3-270m --receiver smollm2-135m --fuser runs/mine

DATA is a hub data set or a folder with train.jsonl and, if you like, valid.jsonl: one object per
line, {"messages": [...]}, or {"prompt": ..., "completion": ...}. With --answer-with, rows without
an answer are answered by one of the two models first: by the receiver, and the fuser learns to
leave alone what it can do by itself; by the sharer, and the fuser learns what the sharer knows.

The file of --config is YAML with any of these flags as keys (answer_with, batch_size, ...), data as
a list or as DATA: WEIGHT, and fuser_config: fields of the fuser that the preset does not fix.
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
TRACKERS = ("wandb", "swanlab")
ANSWERERS = ("receiver", "sharer")
ANSWER_TOKENS = 40
STATISTICS = 128  # examples that the normalisation is measured on

# Of what a config file may hold and TrainConfig does not check.
_FILE_TYPES: dict[str, type | tuple[type, ...]] = {
    "sharer": str,
    "receiver": str,
    "data": (str, list, dict),
    "out": str,
    "answer_tokens": int,
    "fuser": str,
    "track": str,
    "fuser_config": dict,
}
_CHOICES: dict[str, Iterable[str]] = {
    "answer_with": ANSWERERS,
    "preset": PRESETS,
    "track": TRACKERS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point: parses arguments, trains, returns an exit code."""
    args = _parser().parse_args(argv)
    command = shlex.join([PROGRAM, *(sys.argv[1:] if argv is None else argv)])
    return run(lambda: _train(args, command), PROGRAM)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Train a fuser: both models frozen, next-token loss on the answers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="YAML with what is not given as a flag")
    add("--sharer", metavar="MODEL", help="alias, folder or hub id")
    add("--receiver", metavar="MODEL", help="alias, folder or hub id")
    add(
        "--data",
        action="append",
        metavar="DATA[=WEIGHT]",
        help="folder or hub data set; may be given several times",
    )
    add("--out", type=Path, metavar="DIR", help="the run's folder, and the fuser's")
    add("--answer-with", choices=ANSWERERS, help="answers rows that have no answer")
    add("--answer-tokens", type=int, metavar="N", help=f"at most (default: {ANSWER_TOKENS})")
    add("--preset", choices=PRESETS, help="size of the fuser (default: small)")
    add("--fuser", metavar="DIR", help="start from this fuser instead of a fresh one")
    add("--resume", action="store_true", help="continue the run in --out exactly")
    add("--track", choices=TRACKERS, help="also report there (needs the extra of that name)")
    add("--plot", type=Path, metavar="RUN", help="only draw a run's curves into RUN/curves.png")
    group = parser.add_argument_group("the run (defaults in brackets)")
    for field in dataclasses.fields(TrainConfig):
        flag, kind = "--" + field.name.replace("_", "-"), get_type_hints(TrainConfig)[field.name]
        meaning = field.metadata["help"]
        if kind is bool:
            group.add_argument(flag, action="store_true", default=None, help=meaning)
        elif get_origin(kind) is tuple:
            group.add_argument(
                flag, type=float, nargs=2, metavar="B", help=f"{meaning} ({field.default})"
            )
        else:
            values = get_args(kind) or None
            group.add_argument(
                flag,
                type=str if values else kind,
                choices=values,
                metavar=None if values else kind.__name__[0].upper(),
                help=f"{meaning} ({field.default})" if field.default != "" else meaning,
            )
    return parser


def _train(args: argparse.Namespace, command: str) -> None:
    if args.plot:
        from c2c_mlx.training.plot import plot

        print(plot(args.plot))
        return
    _complete(args)
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    config = from_dict(TrainConfig, given, "arguments")
    data = [
        (name, weight, *_read(name, args.answer_with is not None))
        for name, weight in map(_source, args.data)
    ]
    _claim(args.out, args.resume)

    import c2c_mlx.blas  # noqa: F401

    import mlx.core as mx

    from c2c_mlx.fusers import disk
    from c2c_mlx.fusion.c2c import C2C
    from c2c_mlx.training.data import Dataset, Source
    from c2c_mlx.training.display import Display, tracker
    from c2c_mlx.training.trainer import Trainer, checkpoints, measure_inputs

    group = mx.distributed.init()
    with Display(config.iters, group.rank() == 0) as display:
        receiver, sharer, fuser = _load(args, config, display)
        c2c = C2C(receiver.model, sharer.model, fuser)
        for rank in range(group.size()):
            # One process after the other: the first answers, the others read its answers.
            if rank == group.rank():
                answered = partial(
                    _answered, args=args, receiver=receiver, sharer=sharer, display=display
                )
                sources = [Source(answered(rows), w or float(len(rows))) for _, w, rows, _ in data]
                valid = [row for *_, rows in data for row in answered(rows)]
            mx.eval(mx.distributed.all_sum(mx.array(0), group=group))
        alignment = fuser.config.alignment
        train = Dataset(sources, receiver.tokenizer, sharer.tokenizer, alignment, config.max_tokens)
        examples = [e for e in map(train.example, valid) if e is not None]
        trainer = Trainer(c2c, train, examples, config, args.out)
        if args.resume:
            trainer.resume(checkpoints(args.out)[-1])
            display.say(f"resumed at step {trainer.step}")
        elif not args.fuser and fuser.config.normalise:
            measure_inputs(c2c, _first(train, config), config.batch_size)
        display.say(
            f"{sum(len(s.rows) for s in sources)} chats, {len(examples)} for validation, "
            f"{_parameters(fuser) / 1e6:.2f} M parameters, {config.iters} steps"
        )
        tracking = None
        if args.track and group.rank() == 0:
            tracking = tracker(args.track, args.out, dataclasses.asdict(config))

        def report(figures: dict[str, float]) -> None:
            display.report(figures)
            if tracking:
                tracking.log(figures, step=int(figures["step"]))

        trainer.run(report, display.step)
        if tracking:
            tracking.finish()
        if train.skipped:
            display.say(
                f"{train.skipped} chats were longer than {config.max_tokens} tokens and left out"
            )
        if group.rank() == 0:
            fuser.provenance = Provenance(
                source=command,
                steps=trainer.step,
                data=tuple(name for name, *_ in data),
                metrics={k: v for k, v in trainer.final.items() if k.startswith("valid_")},
            )
            disk.save(fuser, args.out)
            display.say(
                f"fuser saved in {args.out}; chat with it: c2c-chat --fuser {args.out} "
                f"--sharer {args.sharer} --receiver {args.receiver}"
            )


def _load(
    args: argparse.Namespace, config: TrainConfig, display: Display
) -> tuple[LanguageModel, LanguageModel, Fuser]:
    """Both models and a fuser, after a look at the memory that all of it will need."""
    import c2c_mlx.blas  # noqa: F401

    import mlx.core as mx

    from c2c_mlx.fusers import disk, store
    from c2c_mlx.fusion.fit import check_models
    from c2c_mlx.models import memory
    from c2c_mlx.models.load import find_folder, load_model
    from c2c_mlx.training.trainer import new_fuser

    r, s = (find_folder(name, display.fetching) for name in (args.receiver, args.sharer))
    if args.fuser is None:
        wanted = _fuser_config(args, memory.shape(r), memory.shape(s))
    else:
        folder = store.find_folder(args.fuser, display.fetching, display.say)
        wanted, _ = disk.read_description(folder)
    display.say(str(memory.training(r, s, wanted, config)))
    receiver, sharer = load_model(args.receiver), load_model(args.sharer)
    if args.fuser is None:
        wanted = _fuser_config(args, receiver.shape, sharer.shape)
        return receiver, sharer, new_fuser(wanted, config.gates, config.seed)
    fuser = disk.load(folder)
    fuser.dequantise()
    fuser.set_dtype(mx.float32)  # it may be half precision; AdamW's steps are smaller
    check_models(fuser.config, receiver.shape, sharer.shape)
    return receiver, sharer, fuser


def _complete(args: argparse.Namespace) -> None:
    """Fills what no flag gave from the file of --config, then from the defaults."""
    args.fuser_config = None
    for name, value in (_config_file(args.config, vars(args)) if args.config else {}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("sharer", "receiver", "data", "out"):
        if getattr(args, name) is None:
            raise C2CError(f"--{name} is missing; c2c-train --help has examples")
    args.out = Path(args.out)
    args.preset = args.preset or "small"
    args.answer_tokens = args.answer_tokens or ANSWER_TOKENS
    args.fuser_config = args.fuser_config or {}
    if args.fuser and args.fuser_config:
        raise C2CError("fuser_config is for a new fuser: leave it out, or --fuser")


def _config_file(path: Path, known: Iterable[str]) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise C2CError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    except yaml.YAMLError as e:
        raise C2CError(f"{path}: not YAML ({' '.join(str(e).split())})") from None
    if not isinstance(values, dict):
        raise C2CError(f"{path}: expected keys with values, such as iters: 1000")
    names = sorted(set(known) - {"config", "resume"})
    for name, value in values.items():
        if name not in names:
            raise C2CError(f"{path}: unknown key '{name}' (known: {', '.join(names)})")
        if name in _FILE_TYPES and not isinstance(value, _FILE_TYPES[name]):
            raise C2CError(f"{path}: '{name}' cannot be {value!r}")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise C2CError(f"{path}: '{name}' must be one of {', '.join(_CHOICES[name])}")
    if isinstance(data := values.get("data"), dict):
        values["data"] = [f"{folder}={weight}" for folder, weight in data.items()]
    elif isinstance(data, str):
        values["data"] = [data]
    return values


def _source(text: str) -> tuple[str, float | None]:
    """DATA or DATA=WEIGHT."""
    name, _, weight = text.rpartition("=")
    try:
        name, share = (name, float(weight)) if name else (text, None)
    except ValueError:
        name, share = text, None
    if share is not None and not share > 0:
        raise C2CError(f"--data {text}: the weight must be above zero")
    is_there = (Path(name) / "train.jsonl").is_file()
    if not is_there and (Path(name).is_dir() or not hub.is_hub_id(name)):
        raise C2CError(f"--data {name}: no train.jsonl there; see c2c-train --help for its format")
    return name, share


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


def _fuser_config(
    args: argparse.Namespace, receiver: ModelShape, sharer: ModelShape
) -> FuserConfig:
    from c2c_mlx.fusion.layers import k_nearest, last_aligned

    if args.preset == "paper":
        layer_map, recipe = last_aligned(receiver.layers, sharer.layers), {}
    else:
        nearest = k_nearest(receiver.layers, sharer.layers)
        layer_map, recipe = [p for p in nearest if p[0] >= receiver.layers // 2], RECIPE
    own = {"receiver": dataclasses.asdict(receiver), "sharer": dataclasses.asdict(sharer)}
    values = {"layer_map": layer_map, **recipe, **PRESETS[args.preset], **args.fuser_config, **own}
    wanted = from_dict(FuserConfig, values, "fuser_config")
    if wanted.bits:
        raise C2CError("fuser_config: 'bits' is for a trained fuser; c2c-weights quantize sets it")
    if wanted.fuse_response:
        raise C2CError("fuser_config: 'fuse_response' cannot be trained here: prompts alone are")
    return wanted


def _read(name: str, unanswered: bool) -> tuple[list[Chat], list[Chat]]:
    """One source's chats to learn from, and to measure on."""
    from c2c_mlx.training.data import read_hub_rows, read_rows

    if not Path(name).is_dir():
        train, valid = (read_hub_rows(name, s, unanswered) for s in ("train", "validation"))
        return train, valid
    measured = Path(name) / "valid.jsonl"
    train = read_rows(Path(name) / "train.jsonl", unanswered)
    return train, read_rows(measured, unanswered) if measured.is_file() else []


def _answered(
    rows: list[Chat],
    args: argparse.Namespace,
    receiver: LanguageModel,
    sharer: LanguageModel,
    display: Display,
) -> list[Chat]:
    from c2c_mlx.training.answers import answer_rows

    if args.answer_with is None:
        return rows
    return answer_rows(
        rows,
        receiver if args.answer_with == "receiver" else sharer,
        args.out / f"answers-{args.answer_with}.jsonl",
        args.answer_tokens,
        args.answer_with == "receiver",
        lambda done, total: display.count("answering prompts", done, total),
    )


def _first(train: Any, config: TrainConfig) -> list[Example]:
    batches = train.batches(config.batch_size, config.seed)
    examples: list[Example] = []
    while len(examples) < min(STATISTICS, sum(len(s.rows) for s in train.sources)):
        examples.extend(next(batches)[1])
    return examples


def _parameters(fuser: Fuser) -> int:
    from c2c_mlx.fusion.fuser import parameters

    return sum(p.size for p in parameters(fuser).values())
