"""A run's description -> its trainer: models, chats and their answers, fuser, checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx

from c2c_mlx import atomic
from c2c_mlx.config import FuserConfig, Provenance, TrainConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fusers import disk, store
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.fit import check_models
from c2c_mlx.fusion.fuser import Fuser, parameters
from c2c_mlx.models import memory
from c2c_mlx.models.load import LanguageModel, find_folder, load_model, open_model
from c2c_mlx.models.sizes import ModelSize
from c2c_mlx.progress import Progress
from c2c_mlx.training import checkpoints, distil, fits, prefills, shrink
from c2c_mlx.training.answering import answered
from c2c_mlx.training.caches import check_layers
from c2c_mlx.training.dataset import Dataset, Source, refusals
from c2c_mlx.training.distil import Distiller
from c2c_mlx.training.files import SESSIONS, TRAIN, VALID, ChatRow, answers_for, read_source
from c2c_mlx.training.holdout import hold_out
from c2c_mlx.training.run import RunConfig
from c2c_mlx.training.start import first_examples, fuser_config, measure_inputs, new_fuser
from c2c_mlx.training.trainer import Trainer

TWIN = "twin"  # the control's folder, in its run's
_ASKED = "sessions"  # what was asked in the app, likewise: who chats on asks more


class Watcher(Protocol):
    """Who is told while a run is put together."""

    def say(self, line: str) -> None:
        """A line that a person should read."""

    def loading(self, progress: Progress) -> None:
        """Downloads and conversions."""

    def count(self, what: str, done: int, total: int) -> None:
        """Something else that takes long."""


def assemble(
    run: RunConfig,
    watcher: Watcher,
    *,
    resume: bool,
    source: str,
    dry: bool = False,
    deadline: float | None = None,
    models: tuple[LanguageModel, LanguageModel] | None = None,
) -> Trainer:
    """Makes everything that a run needs, in the calling thread.

    Args:
        run: what to train.
        watcher: told how far this is.
        resume: whether to continue from the latest checkpoint in `run.out`.
        source: where the fuser comes from, for its card: a command.
        dry: nothing will be trained: no folder is made, but where answers have to be kept, and only
            so many are given that one knows how long it takes; see `Trainer.answering`.
        deadline: on the clock of `time.monotonic`, for the whole run; of the time until then no
            more than a third is for answers, and chats that are left without one are left out.
        models: receiver and sharer, if they are loaded already.

    Raises:
        C2CError: if something named is not there or does not fit, a run is in `run.out` already, or
            there is none to resume, or one with other settings.
    """
    out = run.folder
    _claim(out, resume, make=False)
    if resume:
        run = replace(run, train=_as_it_was(run.train, out, run.given))
    # Weight, to learn from, to measure on.
    data = [(weight, *_read(run, name, watcher.say, resume)) for name, weight in run.sources]
    names = [name for name, _ in run.sources]
    asked = data[names.index(SESSIONS)][1] if SESSIONS in names else []
    data = [part for part in data if part[1] or part[2]]
    if not any(rows for _, rows, _ in data):
        raise C2CError(
            "no chat is left to learn from: --answer-with receiver takes no answers of other "
            "models; leave it out, or give other --data"
        )
    if not any(valid for *_, valid in data):
        rest, kept_out = hold_out([rows for _, rows, _ in data], run.train.seed)
        data = [(w, rows, []) for (w, *_), rows in zip(data, rest, strict=True)]
        data[0][2].extend(kept_out)
        watcher.say(
            f"no {VALID}: {len(kept_out)} chats are kept out of training, to be measured on"
            if kept_out
            else f"no {VALID}, and too few different chats to keep some out: nothing is measured"
        )
    if run.train.prefill_cache:
        prefills.place(run.train.prefill_cache)  # said before models are loaded, if it can't be
    _claim(out, resume, make=not dry or bool(run.answer_with))
    group = mx.distributed.init()
    if asked and not (resume or dry) and group.rank() == 0:
        lines = [json.dumps({"messages": row.messages}) + "\n" for row in asked]
        atomic.write_text(out / _ASKED / TRAIN, "".join(lines))
    receiver, sharer, fuser, teacher, need = _load(run, watcher, models)
    alignment = fuser.config.alignment
    rows = [row for _, *parts in data for part in parts for row in part]
    tokenizers = receiver.tokenizer, sharer.tokenizer
    lengths = fits.longest(rows, *tokenizers, alignment, run.answer_tokens)
    fitted = fits.fit(run.train, (*run.given, *(fits.CHOSEN if resume else ())), lengths, need)
    watcher.say(str(fitted.need))
    watcher.say(fitted.why)
    config = fitted.config
    fuser.train()
    c2c = C2C(receiver.model, sharer.model, fuser)
    for rank in range(group.size()):
        # One process after the other: the first answers, the others read its answers.
        if rank == group.rank():
            found = answered(
                replace(run, train=config),
                [rows for _, rows, _ in data],
                [row for *_, rows in data for row in rows],
                (receiver, sharer),
                lambda done, total: watcher.count("answering prompts", done, total),
                watcher.say,
                resume=resume or rank > 0,
                dry=dry,
                deadline=deadline,
                room=fitted.need.limit - fitted.need.weights,
            )
        mx.eval(mx.distributed.all_sum(mx.array(0), group=group))
    weights = [w or float(len(rows)) for w, rows, _ in data]
    pairs = zip(found.parts, weights, strict=True)
    sources, valid = [Source(rows, weight) for rows, weight in pairs if rows], found.valid
    if not sources:
        raise C2CError(
            "--time is over before any prompt was answered: give it more"
            if deadline
            else "no chat is left to learn from: no prompt could be answered, as said above"
        )
    heard = fuser.config.fuse_response and not teacher
    train = Dataset(sources, *tokenizers, alignment, config.max_tokens, heard)
    examples = [e for e in map(train.example, valid) if e is not None]
    left_out = len(valid) - len(examples) - len(train.refused)
    before = (teacher or fuser).provenance  # of what it begins with; a new one has none
    licences = before.data_licence, run.licence
    provenance = Provenance(
        source=source,
        data=tuple(dict.fromkeys((*before.data, *names))),
        licence=before.licence,
        data_licence="; ".join(dict.fromkeys(filter(None, licences))),
    )
    parts = (c2c, train, examples, config, out, provenance, watcher.say, receiver.stop_strings)
    trainer = Distiller(*parts, teacher=teacher) if teacher else Trainer(*parts)
    trainer.fitted, trainer.answering = fitted, found.seconds
    if resume:
        trainer.resume(checkpoints.all_of(out)[-1])
        watcher.say(f"resumed at step {trainer.step}")
    elif isinstance(trainer, Distiller):
        _shrink(trainer, watcher)
    elif not run.fuser and fuser.config.normalise:
        first = first_examples(train, config.batch_size * config.accumulate, config.seed)
        measure_inputs(c2c, first, config.batch_size)
    size = sum(p.size for p in parameters(fuser).values())
    watcher.say(
        f"{sum(len(s.rows) for s in sources)} chats, {len(examples)} for validation, "
        f"{size / 1e6:.2f} M parameters, {config.iters} steps"
    )
    if train.refused:
        watcher.say(refusals(train.refused))
    if left_out:
        watcher.say(f"{left_out} of the chats for validation are longer than {config.max_tokens}")
    return trainer


def assemble_twin(trainer: Trainer, run: RunConfig, watcher: Watcher) -> Trainer:
    """Makes what a run's control needs: the same start and batches, and nothing to read.

    It goes on where it stopped, if it was begun.

    Args:
        trainer: of the run, which is finished.
        run: what was trained; its `train` may have been made to fit.
        watcher: told how far this is.

    Raises:
        C2CError: if one was begun with other settings.
    """
    main, out = trainer.c2c, trainer.folder / TWIN
    if run.fuser:
        fuser = _begun(run.fuser, watcher, main.fuser.config.fuse_response)
    else:
        fuser = new_fuser(main.fuser.config, trainer.config.gates, trainer.config.seed)
        if fuser.config.normalise:  # measured once, and never changed by training
            for name in ("input_mean", "input_scale", "output_scale"):
                setattr(fuser, name, getattr(main.fuser, name))
    fuser.train()
    config, there = replace(trainer.config, zero_sharer=True), checkpoints.all_of(out)
    if there:
        config = _as_it_was(config, out, run.given)
    c2c = C2C(main.receiver, main.sharer, fuser)
    about, stops = trainer.provenance, trainer.stop_strings
    twin = Trainer(c2c, trainer.train, trainer.valid, config, out, about, watcher.say, stops)
    twin.fitted = trainer.fitted
    if there:
        twin.resume(there[-1])
    out.mkdir(parents=True, exist_ok=True)
    return twin


def _shrink(trainer: Distiller, watcher: Watcher) -> None:
    """Begins a small fuser from the big one's weights, and says how near that is."""
    c, big = trainer.config, trainer.teacher.fuser
    first = first_examples(trainer.train, c.batch_size * c.accumulate, c.seed)
    parts = shrink.read(trainer.c2c, trainer.prefills, first, c.batch_size)
    shrink.begin(trainer.c2c.fuser, big, parts, partial(watcher.count, "shrinking"))
    if found := trainer.errors():
        watcher.say(f"before it learns: {distil.told(found)}")


def _begun(name: str, watcher: Watcher, fuse_response: bool) -> Fuser:
    """A fuser to start from, in the precision that it learns in, and for what it learns."""
    fuser = disk.load(store.find_folder(name, watcher.loading, watcher.say))
    fuser.dequantise()
    fuser.set_dtype(mx.float32)  # it may be half precision; AdamW's steps are smaller
    fuser.config = replace(fuser.config, fuse_response=fuse_response)
    return fuser


def _read(
    run: RunConfig, name: str, say: Callable[[str], None], resume: bool
) -> tuple[list[ChatRow], list[ChatRow]]:
    kept = run.folder / _ASKED
    place = str(kept) if resume and name == SESSIONS and kept.exists() else name
    parts = read_source(place, bool(run.answer_with), run.fields, run.rows or None)
    if run.answer_with != "receiver":
        return parts
    train, valid = (answers_for(part, run.receiver) for part in parts)
    if left_out := sum(map(len, parts)) - len(train) - len(valid):
        say(
            f"--data {name}: {left_out} chats are left out: another model answered them ('by'), "
            "and no 'answer_to' says what to"
        )
    return train, valid


def _claim(out: Path, resume: bool, make: bool) -> None:
    """Makes the run's folder; a run that is there is continued or left alone, never overwritten."""
    checkpoints.check_alone(out)
    has_run = bool(checkpoints.all_of(out))
    if resume and not has_run:
        raise C2CError(f"--resume: no checkpoint in {out}; leave --resume out to start a run")
    if not resume and (has_run or (out / disk.CONFIG).exists()):
        raise C2CError(f"--out {out}: a run or fuser is there; --resume it, or name another folder")
    if not make:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise C2CError(f"--out {out}: cannot make the folder ({e.strerror})") from None


def _as_it_was(config: TrainConfig, out: Path, given: Sequence[str]) -> TrainConfig:
    """That of a run that is continued, with what was chosen for it but for what is given now."""
    there = checkpoints.settings_in(checkpoints.all_of(out)[-1])
    chosen = {name: there[name] for name in fits.CHOSEN if name in there and name not in given}
    return replace(config, **chosen)


Needed = Callable[[TrainConfig, fits.Lengths], memory.Need]


def _load(
    run: RunConfig, watcher: Watcher, models: tuple[LanguageModel, LanguageModel] | None
) -> tuple[LanguageModel, LanguageModel, Fuser, Fuser | None, Needed]:
    """Both models, the fuser that learns and perhaps the one that it learns from.

    And what a run of them needs of memory, if they can be loaded.
    """
    folder: Path | None = None
    if run.fuser:
        folder = store.find_folder(run.fuser, watcher.loading, watcher.say)
    names = run.receiver, run.sharer
    r, s = (find_folder(name, watcher.loading) for name in names)
    for place, name in zip((r, s), names, strict=True):  # before any weight is read
        check_layers(open_model(place)[0], name)
    wanted: FuserConfig
    big: FuserConfig | None = None
    if folder:
        wanted, _ = disk.read_description(folder)
        wanted = replace(wanted, fuse_response=wanted.fuse_response or run.fuse_response)
        if run.shrink:
            big, wanted = wanted, shrink.smaller(wanted, run.shrink)
    else:
        wanted = fuser_config(run, memory.shape(r, run.receiver), memory.shape(s, run.sharer))
    sizes = ModelSize.read(r), ModelSize.read(s)
    need = partial(memory.training, *sizes, wanted, teacher=big)
    need(run.train)  # refuses what can't be loaded
    receiver, sharer = models or (load_model(name, progress=watcher.loading) for name in names)
    if folder is None:
        wanted = fuser_config(run, receiver.shape, sharer.shape)
        return receiver, sharer, new_fuser(wanted, run.train.gates, run.train.seed), None, need
    check_models(wanted, receiver.shape, sharer.shape)
    if not run.shrink:
        fuser = _begun(run.fuser, watcher, wanted.fuse_response)
        return receiver, sharer, fuser, None, need
    teacher = disk.load(folder)
    teacher.dequantise()
    if not teacher.gates.any():
        raise C2CError(f"{run.fuser}: every gate is shut, so there is nothing to imitate")
    return receiver, sharer, new_fuser(wanted, "open", run.train.seed), teacher, need
