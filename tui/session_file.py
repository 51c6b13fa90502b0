"""Session files: written whole, read with distrust, listed, and held by one app at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from c2c_mlx import atomic
from c2c_mlx.config import Pair, SamplingConfig, from_dict
from c2c_mlx.errors import C2CError
from c2c_mlx.events import MODES, Figures, GateReport, Mode
from c2c_mlx.models import paths
from c2c_mlx.tui import storage
from c2c_mlx.tui.conversation import NAMES, Answer, Conversation, Take, Turn, shortened

FORMAT_VERSION = 3


def folder() -> Path:
    """Where sessions are saved."""
    return paths.data_home() / "sessions"


def path(name: str) -> Path:
    """A session's file, which may not exist."""
    return folder() / f"{name}.json"


def _lock_path(name: str) -> Path:
    return folder() / f".{name}.lock"


def _stamp(name: str) -> tuple[int, int] | None:
    """Another one, once somebody has written the file anew."""
    try:
        found = path(name).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def names() -> list[str]:
    """All saved sessions, the latest first."""
    stamps = {p.stem: _stamp(p.stem) for p in folder().glob("[!.]*.json")}
    there = {name: stamp for name, stamp in stamps.items() if stamp}  # not just deleted elsewhere
    return sorted(there, key=lambda name: there[name][1], reverse=True)


# --- one app at a time ----------------------------------------------------------------------


class SessionFile:
    """The file of the conversation that is open here; no other app can open or delete it."""

    def __init__(self) -> None:
        self.name = ""  # of the session that is held; empty: none
        self._lock: int | None = None  # handle of a file beside it, locked
        self._turns: list[tuple[Turn, str]] = []  # written before, and nothing changes any more

    def save(self, talk: Conversation) -> None:
        """Writes the session; one that is new takes a name that no other app has taken.

        Raises:
            C2CError: if the disk won't have it.
        """
        if talk.name != self.name:
            wanted, number = talk.name, 1
            while path(talk.name).exists() or not self._hold(talk.name):
                number += 1
                talk.name = f"{wanted}-{number}"
        atomic.write_text(path(talk.name), self._document(talk))

    def load(self, name: str = "") -> Conversation:
        """Reads a session and holds it from now on; without a name, the latest.

        Raises:
            C2CError: if there is none, it is damaged, or another app has it open.
        """
        saved = names()
        if not saved:
            raise C2CError("no session has been saved yet: c2c-chat begins one")
        name = (name or saved[0]).removesuffix(".json")
        if name not in saved:
            raise C2CError(f"no session '{name}': {', '.join(saved[:5])} are the latest")
        seen = _stamp(name)
        talk = read(name)  # a damaged one is refused before the last one is let go of
        if not self._hold(name):
            raise C2CError(f"session '{name}' is open in another c2c-chat: leave it there first")
        return talk if _stamp(name) == seen else read(name)

    def rename(self, name: str, title: str) -> None:
        """Gives a session another title, and leaves it where it is among the others.

        Raises:
            C2CError: if it can't be read or written, or another app has it open.
        """
        other = SessionFile()
        try:
            talk = other.load(name)
            talk.title = title
            before = path(name).stat()
            atomic.write_text(path(name), other._document(talk))
            os.utime(path(name), ns=(before.st_atime_ns, before.st_mtime_ns))
        finally:
            other.close()

    def delete(self, name: str) -> None:
        """Deletes a session that is open nowhere.

        Raises:
            C2CError: if it is open, or can't be deleted.
        """
        if name == self.name:
            raise C2CError("this conversation is open: begin another one first (Ctrl+N)")
        other = SessionFile()
        if not other._hold(name):
            raise C2CError(f"session '{name}' is open in another c2c-chat: leave it there first")
        try:
            path(name).unlink(missing_ok=True)
        except OSError as e:
            raise C2CError(f"{path(name)} cannot be deleted ({e.strerror or e})") from None
        finally:
            other.close()

    def close(self) -> None:
        """Lets go of the session."""
        if self._lock is not None:
            with suppress(OSError):
                _lock_path(self.name).unlink()
            os.close(self._lock)  # unlocks it, as the process's death does
        self._lock, self.name, self._turns = None, "", []

    def _hold(self, name: str) -> bool:
        """Takes the lock of a session and lets go of the last one; False: another app has it."""
        if name == self.name:
            return True
        file = _lock_path(name)
        try:
            folder().mkdir(parents=True, exist_ok=True)
            lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise C2CError(f"{file} cannot be written ({e.strerror or e}): make room") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.fstat(lock).st_ino == file.stat().st_ino  # else deleted by its last holder
        except BlockingIOError:
            is_ours = False
        except OSError as e:  # gone in between; or a file system without locks, where all may write
            is_ours = not isinstance(e, FileNotFoundError)
        if not is_ours:
            os.close(lock)
            return False
        self.close()
        self._lock, self.name = lock, name
        return True

    def _document(self, talk: Conversation) -> str:
        """The file's text; only the last turn still changes, so the others are kept as text."""
        known = {id(turn): (turn, text) for turn, text in self._turns}
        self._turns = [known.get(id(t)) or (t, _compact(t)) for t in talk.turns[:-1]]
        turns = [*(text for _, text in self._turns), *map(_compact, talk.turns[-1:])]
        return f'{_compact(_head(talk))[:-1]},"turns":[{",".join(turns)}]}}\n'


# --- the format -----------------------------------------------------------------------------


def to_json(talk: Conversation) -> str:
    """The whole as a document: what a session file and an export are."""
    return _compact(_head(talk) | {"turns": talk.turns}) + "\n"


def _head(talk: Conversation) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "name": talk.name,
        "title": talk.title,
        "pair": talk.pair,
        "sampling": talk.sampling,
        "system": talk.system,
    }


def _compact(value: Any) -> str:
    """JSON of dataclasses; `vars` instead of `asdict`, which copies every number by itself."""
    return json.dumps(value, default=vars, ensure_ascii=False, separators=(",", ":"))


def read(name: str, with_reports: bool = True) -> Conversation:
    """Reads a session file, whoever has it open.

    Args:
        name: the session's.
        with_reports: leaves out what was measured of gates, nearly all of a file, if not.

    Raises:
        C2CError: if it is damaged.
    """
    talk = parse(storage.read_json(path(name)), str(path(name)), with_reports)
    talk.name = name  # not the document's word: it becomes a path again
    return talk


def parse(document: Any, where: str, with_reports: bool = True) -> Conversation:
    """A session's document, checked; see `read`.

    Raises:
        C2CError: naming what is wrong with it.
    """
    try:
        if document["format_version"] == 2:
            document = _from_version_2(document)
        if document["format_version"] != FORMAT_VERSION:
            raise C2CError(f"{where}: made by another version of c2c-mlx; upgrade c2c-mlx")
        return Conversation(
            pair=from_dict(Pair, document["pair"], where),
            sampling=from_dict(SamplingConfig, document["sampling"], where),
            system=_system(document),
            turns=[
                Turn(
                    str(turn["question"]),
                    [_take(take, where, with_reports) for take in turn["takes"]],
                )
                for turn in document["turns"]
            ],
            name=str(document["name"]),
            title=str(document["title"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise C2CError(f"{where} is no session file ({type(e).__name__}: {e})") from None


def _from_version_2(document: dict[str, Any]) -> dict[str, Any]:
    """Turns had one take, made with whatever settings the conversation had last."""
    settings = {key: document[key] for key in ("sampling", "system")}
    turns = [
        {
            "question": turn["question"],
            "takes": [{key: turn[key] for key in ("answers", "gates", "reports")} | settings],
        }
        for turn in document["turns"]
    ]
    title = shortened(turns[0]["question"]) if turns else ""
    return document | {"format_version": FORMAT_VERSION, "title": title, "turns": turns}


def _take(data: dict[str, Any], where: str, with_reports: bool) -> Take:
    reports = data["reports"] if with_reports else ()
    return Take(
        sampling=from_dict(SamplingConfig, data["sampling"], where),
        system=_system(data),
        gates=tuple(
            (tuple(map(bool, keys)), tuple(map(bool, values))) for keys, values in data["gates"]
        ),
        answers={mode: _answer(data["answers"][mode], where) for mode in _modes(data["answers"])},
        reports=tuple(from_dict(GateReport, report, where) for report in reports),
    )


def _system(data: dict[str, Any]) -> str | None:
    return None if data["system"] is None else str(data["system"])


def _modes(answers: dict[str, Any]) -> Sequence[Mode]:
    return [mode for mode in MODES if mode in answers]


def _answer(data: dict[str, Any], where: str) -> Answer:
    figures = data["figures"]
    return Answer(
        text=str(data["text"]),
        relayed_text=str(data["relayed_text"]),
        reason=str(data["reason"]),
        figures=None if figures is None else from_dict(Figures, figures, where),
    )


# --- a list of them -------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """A session as it stands in a list."""

    name: str
    title: str
    preview: str
    when: datetime


def summary(name: str) -> Summary:
    """A session's title and a look into it; of a damaged one, what is wrong with it."""
    try:
        when = datetime.fromtimestamp(path(name).stat().st_mtime)
        talk = read(name, with_reports=False)
    except (C2CError, OSError) as e:
        return Summary(name, f"{name} (damaged)", str(e), datetime.fromtimestamp(0))
    pair = talk.pair
    lines = [f"{pair.receiver} ← {', '.join(pair.sharers)}, {len(talk.turns)} turns"]
    for turn in talk.turns[-3:]:
        lines += ["", f"> {shortened(turn.question)}"]
        for mode, answer in turn.answers.items():
            lines.append(f"{NAMES[mode]}: {shortened(answer.text) or '(no answer)'}")
    return Summary(name, talk.title or name, "\n".join(lines), when)
