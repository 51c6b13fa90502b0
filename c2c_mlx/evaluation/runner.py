"""Runs items through modes, and keeps what is done on disk, so that a run can be cut any time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation.modes import Modes, Reading, Written, nats, write
from c2c_mlx.evaluation.owed import Owed, owed
from c2c_mlx.evaluation.task import Answer, Item, Task

CROSSING = ("c2c", "c2c-shuffled")  # modes in which something can cross

Record = dict[str, Any]  # what a mode made of an item, as it stands in the result
Progress = Callable[[str, int, int], None]  # mode, items done, of how many


class Log:
    """The records of a run, appended to a file as they come.

    Args:
        path: JSON lines, the run's settings first; None: nothing is kept.
        settings: what a run must share with an earlier one to continue it.

    Raises:
        C2CError: if the file belongs to a run with other settings, or can't be written.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.records: dict[str, dict[str, Record]] = {}  # mode, item
        if path is None:
            return
        try:
            there = path.read_bytes() if path.exists() else b""
            # A killed run may leave half a line, and of its last character half as well.
            whole = there[: there.rfind(b"\n") + 1]
            if not whole:
                self._write([settings], "w")
                return
            found, *records = map(dict, map(json.loads, whole.decode().split("\n")[:-1]))
            self._hold(records)
            if whole != there:
                os.truncate(path, len(whole))
        except OSError as e:
            raise C2CError(f"{path}: cannot keep results there ({e.strerror})") from None
        except (ValueError, KeyError, TypeError):
            raise C2CError(f"{path}: not the records of an unfinished run; move it away") from None
        if other := [key for key in settings if found.get(key) != settings[key]]:
            raise C2CError(
                f"{path}: an unfinished run with another {other[0]} ({found.get(other[0])}, not "
                f"{settings[other[0]]}); repeat its arguments, or delete the file"
            )

    def append(self, records: Sequence[Record]) -> None:
        """Keeps records; they are on the disk when this returns."""
        self._hold(records)
        if self.path is not None:
            try:
                self._write(records, "a")
            except OSError as e:
                raise C2CError(f"{self.path}: cannot keep results ({e.strerror})") from None

    def remove(self) -> None:
        """Deletes the file, once the result is written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)  # the same command may have ended beside this one

    def _hold(self, records: Sequence[Record]) -> None:
        for record in records:
            self.records.setdefault(record["mode"], {})[record["id"]] = record

    def _write(self, rows: Sequence[Any], how: str) -> None:
        assert self.path is not None
        with self.path.open(how, encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())


def run(
    task: Task,
    items: Sequence[Item],
    names: Sequence[str],
    modes: Modes,
    log: Log,
    *,
    batch_size: int,
    alone: int,
    progress: Progress,
    crossed: bool = False,
) -> None:
    """Asks every item in every mode, but for what the log has already.

    Args:
        task: scores the answers.
        items: the same for every mode.
        names: the modes; the receiver is asked in any case if its answers are the reference.
        modes: asks them.
        log: gets the records.
        batch_size: items at a time.
        alone: so many of the first items are asked one by one, from scratch, and timed.
        progress: called after every batch.
        crossed: whether records of C2C say what each token of the answer owes to the sharers.
    """
    for mode in names:
        done = log.records.setdefault(mode, {})
        timed = [[item] for item in items[:alone] if item.id not in done]
        rest = [item for item in items[alone:] if item.id not in done]
        batches = [rest[at : at + batch_size] for at in range(0, len(rest), batch_size)]
        for number, batch in enumerate([*timed, *batches]):
            is_timed = number < len(timed)
            if is_timed:
                modes.forget()
            log.append(_ask(task, batch, mode, modes, log, is_timed, crossed))
            progress(mode, len(done), len(items))


def all_failed(records: Mapping[str, Mapping[str, Record]]) -> list[str]:
    """Why each record came to nothing; empty if a single one did not."""
    found = [record.get("error") for of_mode in records.values() for record in of_mode.values()]
    errors = [error for error in found if error is not None]
    return errors if len(errors) == len(found) else []


def _ask(
    task: Task,
    batch: list[Item],
    mode: str,
    modes: Modes,
    log: Log,
    timed: bool,
    crossed: bool,
) -> list[Record]:
    """The records of one batch."""
    began = time.perf_counter()
    found = dict(zip([item.id for item in batch], modes.read(mode, batch), strict=True))
    good = {name: reading for name, reading in found.items() if isinstance(reading, Reading)}
    written = dict.fromkeys(good, Written())
    if task.writes:
        written = dict(zip(good, write(list(good.values()), modes.max_tokens), strict=True))
    answers = {name: Answer(w.text, w.ids) for name, w in written.items()}
    owns = answers if mode == "receiver" else _answers(log.records.get("receiver", {}), batch)
    here = [item for item in batch if item.id in good]

    def continuations(tokenizer: Any) -> list[list[list[int]]]:
        return [task.continuations(item, tokenizer, owns.get(item.id)) for item in here]

    if here:
        weighed = nats(list(good.values()), continuations(good[here[0].id].lm.tokenizer))
        as_receiver = continuations(modes.receiver.tokenizer)
        for item, of, wanted in zip(here, weighed, as_receiver, strict=True):
            tokens = len(wanted[0]) if wanted else 0
            answers[item.id] = replace(answers[item.id], nats=of, tokens=tokens)
    now = time.perf_counter()
    owes = _owed(modes, here, good, written) if crossed and mode in CROSSING else {}

    records = []
    for item in batch:
        answer, own = answers.get(item.id, Answer()), owns.get(item.id)
        record: Record = {"mode": mode, "id": item.id, "text": answer.text}
        record |= {"ids": list(answer.ids), "scores": task.score(item, answer, own)}
        if answer.nats:
            record["nats"] = list(answer.nats)
        if item.id in good:
            reading, w = good[item.id], written[item.id]
            record |= {"prompt_tokens": reading.prompt_tokens, "generated_tokens": len(w.ids)}
            if item.id in owes:
                record["crossed"] = owes[item.id]
            if reading.relayed:
                record["relayed_text"] = reading.relayed.text
                record["relayed_tokens"] = len(reading.relayed.ids)
            if timed:
                record["first_token_s"] = (w.first or now) - began
                record["total_s"] = (w.last or now) - began
        else:
            record["error"] = str(found[item.id])
        records.append(record)
    return records


def _owed(
    modes: Modes,
    items: Sequence[Item],
    readings: Mapping[str, Reading],
    written: Mapping[str, Written],
) -> dict[str, Owed]:
    """What the answers owe to the sharers; the prompts are read once more, with silent ones."""
    silent = zip(items, modes.read("c2c-zeroed", items), strict=True)
    found = {item.id: reading for item, reading in silent if isinstance(reading, Reading)}
    names = list(found)
    owes = owed([readings[n] for n in names], list(found.values()), [written[n] for n in names])
    return dict(zip(names, owes, strict=True))


def _answers(records: Mapping[str, Record], items: Sequence[Item]) -> dict[str, Answer]:
    there = {item.id: records[item.id] for item in items if item.id in records}
    return {name: Answer(r["text"], r["ids"]) for name, r in there.items() if "error" not in r}
