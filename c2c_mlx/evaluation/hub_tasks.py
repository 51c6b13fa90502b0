"""Benchmarks of the hub by name: one pure function per benchmark, from a row to an item."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation.choice import LETTERS, Choice, Method
from c2c_mlx.evaluation.files import choice_item
from c2c_mlx.evaluation.number import PROMPT, Number
from c2c_mlx.evaluation.task import Item, Task

Row = dict[str, Any]
ToItem = Callable[[Row, str, str], Item | None]  # row, number, group -> item; None: leave it out


def mmlu_redux(row: Row, number: str, group: str) -> Item | None:
    """MMLU-Redux: wrong answers are mended as its authors say; questions without one left out."""
    verdict, answer = row.get("error_type"), row["answer"]
    if verdict in ("no_correct_answer", "multiple_correct_answers", "expert"):
        return None
    mended = str(row.get("correct_answer") or "").strip()
    if verdict == "wrong_groundtruth" and mended:
        if mended not in ("0", "1", "2", "3", "A", "B", "C", "D"):
            return None
        answer = int(mended) if mended.isdigit() else mended
    return choice_item({**row, "answer": answer}, number, group, number)


def arc(row: Row, number: str, group: str) -> Item:
    """ARC-Challenge; some rows number their choices instead of lettering them."""
    return _labelled(row["question"], row["choices"], row["answerKey"], number)


def openbookqa(row: Row, number: str, group: str) -> Item:
    """OpenBookQA."""
    return _labelled(row["question_stem"], row["choices"], row["answerKey"], number)


def _labelled(question: str, choices: dict[str, list[str]], key: str, number: str) -> Item:
    answer = list(choices["label"]).index(key)
    row = {"question": question, "choices": list(choices["text"]), "answer": answer}
    return choice_item(row, number, "", number)


def ceval(row: Row, number: str, group: str) -> Item:
    """C-Eval."""
    choices = [row[letter] for letter in LETTERS[:4] if row.get(letter)]
    return choice_item({**row, "choices": choices}, number, group, number)


def gsm8k(row: Row, number: str, group: str) -> Item:
    """GSM8K: what counts is the number at the end of the worked answer."""
    content = PROMPT.format(question=row["question"])
    reference = row["answer"].rpartition("####")[2].strip()
    return Item(number, [{"role": "user", "content": content}], reference)


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is, and how its rows become items."""

    hub: str
    subset: str | None  # None: all of them, each one group
    split: str
    to_item: ToItem


BENCHMARKS = {
    "mmlu-redux": Benchmark("edinburgh-dawg/mmlu-redux-2.0", None, "test", mmlu_redux),
    "arc-challenge": Benchmark("allenai/ai2_arc", "ARC-Challenge", "test", arc),
    "openbookqa": Benchmark("allenai/openbookqa", "main", "test", openbookqa),
    "c-eval": Benchmark("ceval/ceval-exam", None, "val", ceval),  # its test answers are secret
    "gsm8k": Benchmark("openai/gsm8k", "main", "test", gsm8k),
}


def read(name: str, method: Method) -> tuple[Task, list[Item]]:
    """Fetches a benchmark, or takes it from the cache of `datasets`.

    Raises:
        C2CError: if `datasets` is not installed, or the benchmark can't be had.
    """
    try:
        import datasets
    except ImportError:
        raise C2CError(
            f"--task {name} comes from the hub: pip install 'c2c-mlx[datasets]'"
        ) from None
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries end in one line of ours
    b = BENCHMARKS[name]
    items, where = [], b.hub
    try:
        for subset in [b.subset] if b.subset else datasets.get_dataset_config_names(b.hub):
            group = "" if b.subset else subset
            where = f"{b.hub}, {subset}, {b.split}"
            for n, row in enumerate(datasets.load_dataset(b.hub, subset, split=b.split)):
                items.append(b.to_item(row, f"{subset}/{n}", group))
    except C2CError:
        raise
    except Exception as e:  # whatever the hub, the network or a changed data set leads to
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise C2CError(f"--task {name}: cannot load {where} from the hub ({reason})") from None
    task = Number() if b.to_item is gsm8k else Choice(method)
    found = [task.asked(item) for item in items if item is not None]
    if not found:
        raise C2CError(f"--task {name}: no question of {b.hub} can be asked; choose another task")
    return task, found
