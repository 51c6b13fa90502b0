"""Chats in files and in data sets of the hub, in any layout that is known. No MLX here."""

from __future__ import annotations

import json
import logging
import lzma
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from c2c_mlx.errors import C2CError
from c2c_mlx.models import hub, registry
from c2c_mlx.training import own_chats
from c2c_mlx.training.layouts import (
    Messages,
    UnknownLayout,
    chat_of,
    example,
    messages_of,
    renamed,
    said,
)
from c2c_mlx.training.recipe import FOLDER as RECIPES

TRAIN, VALID = "train.jsonl", "valid.jsonl"
PACKED = ".xz"  # what a file's name may end with, too
PACKAGE, SESSIONS = "package:", "mine:sessions"  # sources that are no folder and not on the hub


@dataclass(frozen=True)
class ChatRow:
    """One conversation to learn from; the last message is what the receiver is to say.

    Attributes:
        messages: role and content, in order.
        own: the answer is the receiver's own, so the sharer has nothing to add.
        cut: the answer was cut at a limit: that it ends there is not taught.
        by: the model that gave the answer; empty: a person, or nobody says.
        answer_to: what the answering model sees of a row without an answer, where it is not what
            the fused receiver sees: the same in another language, with a document, a better prompt.
        where: file and line, for messages.
    """

    messages: Messages
    own: bool = False
    cut: bool = False
    by: str = ""
    answer_to: Messages | None = None
    where: str = field(default="", compare=False)


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads JSON lines; lines without any text are passed over.

    Yields:
        File and line for messages, and the line's object.

    Raises:
        C2CError: if the file can't be read or is empty, or a line is no JSON object.
    """
    try:
        packed = path.read_bytes()
        text = lzma.decompress(packed) if path.suffix == PACKED else packed
        lines = text.decode("utf-8-sig").split("\n")  # not at U+2028 in a text
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as e:
        raise C2CError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    if lines[0].startswith("["):
        raise C2CError(
            f"{path} is one array: it needs one JSON object per line, which is what "
            f"`jq -c '.[]' {path.name}` makes of it"
        )
    n_rows = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise C2CError(f"{where}: not JSON") from None
        if not isinstance(row, dict):
            raise C2CError(f"{where}: not a JSON object")
        n_rows += 1
        yield where, row
    if not n_rows:
        raise C2CError(f"{path} is empty: it needs one JSON object per line")


def read_source(
    name: str,
    unanswered: bool = False,
    fields: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> tuple[list[ChatRow], list[ChatRow]]:
    """Chats to learn from, and to measure on if there are any, from a folder or the hub.

    Rows may also hold `answer_to` (text or messages), `own`, `cut` and `by`.

    Args:
        name: a folder with `train.jsonl` and perhaps `valid.jsonl`, either perhaps packed
            (`.xz`); `package:` and a folder of the recipes; `mine:sessions`, what was asked in the
            app; or a data set's hub id, perhaps with `@REVISION`.
        unanswered: whether rows without an answer are let through.
        fields: what the source calls the fields of a layout, see `layouts.renamed`.
        limit: rows of each part that are read, at most; of a data set of the hub no more than
            these are downloaded. None: all of them.

    Raises:
        C2CError: if there is no such source, or a row of it can't be read.
    """
    train, valid = (
        [_row(renamed(row, fields or {}), where, unanswered) for where, row in part]
        for part in _objects(name, limit)
    )
    return train, valid


Rows = list[tuple[str, dict[str, Any]]]  # where each is, for messages, and the row


def _objects(name: str, limit: int | None) -> tuple[Rows, Rows]:
    """A source's rows to train and to validate on, as they are."""
    if name == SESSIONS:
        return list(islice(own_chats.rows(), limit)), []
    folder = Path(os.path.expanduser(name))
    if name.startswith(PACKAGE):
        folder = RECIPES / name.removeprefix(PACKAGE)
    elif folder.is_file():
        raise C2CError(f"--data {name}: a file; give the folder that holds it as {TRAIN}")
    elif not folder.is_dir() and hub.is_hub_id(name.partition("@")[0]):
        return read_hub(name, limit)
    train, valid = (
        next((p for p in (folder / file, folder / f"{file}{PACKED}") if p.is_file()), None)
        for file in (TRAIN, VALID)
    )
    if train is None:
        raise C2CError(f"--data {name}: no {TRAIN} there; see c2c-train --help for its format")
    return (
        list(islice(read_objects(train), limit)),
        list(islice(read_objects(valid), limit)) if valid else [],
    )


def read_hub(name: str, limit: int | None = None) -> tuple[Rows, Rows]:
    """A data set's rows to train and to validate on.

    Args:
        name: its id, perhaps with `@REVISION`; or whatever else `datasets.load_dataset` takes.
        limit: rows of each part, at most; they alone are downloaded.

    Raises:
        C2CError: if there are none, or they can't be had.
    """
    try:
        import datasets
    except ImportError:
        raise C2CError(
            f"--data {name}: a data set of the hub needs pip install 'c2c-mlx[datasets]'"
        ) from None
    place, _, revision = name.partition("@")
    if on_hub := hub.is_hub_id(place):
        # What it warns of is said here in one line.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        if not hub.is_offline():  # then a data set that is kept here does
            hub.check_data_set(place)  # at once; the library tries for half a minute
    options = {"revision": revision or None, "streaming": limit is not None}
    try:
        splits = list(datasets.get_dataset_split_names(place, revision=revision or None))
        train, valid = (
            _numbered(datasets.load_dataset(place, split=split, **options), name, split, limit)
            if split in splits
            else []
            for split in ("train", "validation")
        )
    except Exception as e:  # whatever the hub, the network and its file formats raise
        if on_hub:
            hub.check_data_set(place)  # says it better, if the hub is why
        line = " ".join(str(e).split())[:200]
        raise C2CError(f"--data {name}: cannot be loaded from the hub ({line})") from None
    if not train:
        raise C2CError(
            f"--data {name}: has no rows to train on, only {', '.join(splits) or 'nothing'}; write "
            f"those that you want into a folder's {TRAIN}"
        )
    return train, valid


def _numbered(rows: Iterable[dict[str, Any]], name: str, split: str, limit: int | None) -> Rows:
    return [(f"{name} ({split}), row {n}", row) for n, row in enumerate(islice(rows, limit))]


def _row(row: Any, where: str, unanswered: bool) -> ChatRow:
    try:
        messages = chat_of(row, where)
    except UnknownLayout as e:
        advice = (
            f"where they are called otherwise, --fields names them, as in --fields {example(row)}"
        )
        raise C2CError(f"{e}; {advice}") from None
    if not messages or (len(messages) < 2 and messages[-1]["role"] != "user"):
        raise C2CError(f"{where}: the assistant's message must come after at least one more")
    role = messages[-1]["role"]
    if role != "assistant" and not (unanswered and role == "user"):
        raise C2CError(
            f"{where}: the last message must be the assistant's; --answer-with has rows that end "
            "with the user's answered"
        )
    flags = {name: row.get(name) or False for name in ("own", "cut")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise C2CError(f"{where}: '{name}' must be true or false")
    by = row.get("by") or ""
    if not isinstance(by, str):
        raise C2CError(f"{where}: 'by' must be the name of the model that answered")
    return ChatRow(messages, **flags, by=by, answer_to=_answer_to(row, where), where=where)


def answers_for(rows: list[ChatRow], receiver: str) -> list[ChatRow]:
    """Rows for a receiver: where another model's own answer stands, this one's is wanted.

    Args:
        rows: chats; an answer `by` a model is the receiver's own, or to what `answer_to` says.
        receiver: the model argument.

    Returns:
        The rows; those that another model answered without their answer. What can't be asked
        again, for nobody knows to what the answer was, is left out.
    """
    alias = registry.alias_of(receiver) or receiver
    mine = [row for row in rows if row.by in ("", alias) or row.own or row.answer_to]
    return [
        row
        if row.by in ("", alias)
        else replace(row, messages=row.messages[:-1], own=False, cut=False, by="")
        for row in mine
    ]


def _answer_to(row: dict[str, Any], where: str) -> Messages | None:
    if (given := row.get("answer_to")) is None:
        return None
    if isinstance(given, str):
        return [said("user", given)]
    messages = messages_of(given, where, "'answer_to'")
    if not messages or messages[-1]["role"] != "user":
        raise C2CError(f"{where}: 'answer_to' must end with a message of the user")
    return messages
