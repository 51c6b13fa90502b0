"""What every study is made of: who is studied, on what, and three files at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import numpy as np

from c2c_mlx.atomic import overwriting, write_text
from c2c_mlx.config import Order
from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation import scoring
from c2c_mlx.evaluation.choice import LETTERS
from c2c_mlx.evaluation.modes import Reading, check_room, nats
from c2c_mlx.evaluation.runner import Log, Record
from c2c_mlx.evaluation.task import Answer, Item, Task
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.fuser import Fuser
from c2c_mlx.models.load import LanguageModel
from c2c_mlx.talk.links import align_to_each
from c2c_mlx.text.alignment import TokenAlignment

Result = dict[str, Any]  # what the JSON file holds
Progress = Callable[[str, int, int], None]  # what, done, of how many

NO_REFERENCE = (
    "--task: a study needs rows with a reference answer ('messages' that end with the "
    "assistant's, 'prompt' and 'completion', or multiple choice)"
)
AT_ONCE = 8  # conditions of an item that are weighed together, each with a cache of its own


@dataclass(frozen=True)
class Work:
    """One study's models, items and settings.

    Attributes:
        receiver: the model whose answers are weighed.
        sharers: none where a study looks at the receiver alone.
        fusers: one per sharer, or none.
        order: of several sharers, see `FusedCache`.
        task: scores the items.
        items: what is asked.
        log: keeps what is measured, so that a run can be cut any time.
        seed: of every draw.
        shots: examples before a question, where a study has any.
        progress: called after every item.
    """

    receiver: LanguageModel
    sharers: Sequence[LanguageModel]
    fusers: Sequence[Fuser]
    order: Order
    task: Task
    items: Sequence[Item]
    log: Log
    seed: int
    shots: int
    progress: Progress

    def missing(self, items: Sequence[Item], conditions: Sequence[str]) -> list[Item]:
        """Those of the items that the log does not have under all of the conditions."""
        found = [self.log.records.get(condition, {}) for condition in conditions]
        return [item for item in items if not all(item.id in of for of in found)]

    def aligned(self, links: Sequence[C2C]) -> dict[str, list[TokenAlignment]]:
        """Each item's prompt, per link, before any of them is read.

        Raises:
            C2CError: if one of the models cannot read one of them.
        """
        found = {}
        for item in self.items:
            prompts = align_to_each(item.messages, self.receiver, links, self.sharers)
            with naming(item):
                check_room(self.receiver, prompts[0].receiver_ids)
                for sharer, prompt in zip(self.sharers, prompts, strict=True):
                    check_room(sharer, prompt.sharer_ids)
            found[item.id] = prompts
        return found

    def scores(self, condition: str, name: str, items: Sequence[Item]) -> dict[str, float]:
        """A score of each item under a condition."""
        found = self.log.records[condition]
        return {item.id: found[item.id]["scores"][name] for item in items}

    def difference(
        self, condition: str, base: str, items: Sequence[Item], name: str = "nll"
    ) -> dict[str, Any]:
        """The mean of a condition's score minus the base's, item by item, with its interval."""
        a, b = (self.scores(c, name, items) for c in (condition, base))
        return scoring.difference(a, b, self.seed)


@contextmanager
def naming(item: Item) -> Iterator[None]:
    """Says of which item an error is."""
    try:
        yield
    except C2CError as e:
        raise C2CError(f"item {item.id}: {e}; leave it out of --task") from None


def halves(items: Sequence[Item], seed: int) -> tuple[list[Item], list[Item]]:
    """Two halves, drawn with the seed: what is chosen on one is judged on the other.

    Raises:
        C2CError: if there are too few items.
    """
    if len(items) < 4:
        raise C2CError(f"--task: {len(items)} items to study; there must be at least 4")
    chosen = {*np.random.default_rng(seed).permutation(len(items))[: len(items) // 2].tolist()}
    first = [item for i, item in enumerate(items) if i in chosen]
    return first, [item for i, item in enumerate(items) if i not in chosen]


def weigh(
    task: Task, item: Item, readings: Iterable[tuple[str, Reading]], tokenizer: Any
) -> dict[str, Answer]:
    """The probability of an item's continuations under every condition, in batches.

    Args:
        task: says which continuations there are.
        item: the item.
        readings: each condition with the receiver's cache over the same prompt's end; they are
            taken as they are weighed.
        tokenizer: the receiver's.

    Raises:
        C2CError: if the task has no reference answers.
    """
    wanted = task.continuations(item, tokenizer, None)
    if not wanted:
        raise C2CError(NO_REFERENCE)
    answers, rest = {}, iter(readings)
    while batch := dict(islice(rest, AT_ONCE)):
        found = nats(list(batch.values()), [wanted] * len(batch))
        for condition, of in zip(batch, found, strict=True):
            answers[condition] = Answer(nats=of, tokens=len(wanted[0]))
    return answers


def scored(item: Item, answer: Answer) -> dict[str, float]:
    """Nats per token of the reference; in multiple choice, of the right letter among the letters.

    There, also whether that letter is the likeliest.
    """
    if not item.choices:
        return answer.nll
    logits = -np.array(answer.nats)
    right = LETTERS.index(item.reference)
    nll = float(np.logaddexp.reduce(logits) - logits[right])
    return {"nll": nll, "accuracy": float(logits.argmax() == right)}


def records(item: Item, answers: Mapping[str, Answer]) -> list[Record]:
    """What the log keeps of an item."""
    return [
        {"mode": condition, "id": item.id, "scores": scored(item, answer)}
        for condition, answer in answers.items()
    ]


def interval(of: Mapping[str, Any], digits: int = 3, sign: str = "+") -> str:
    """A mean and its 95 % interval in words."""
    numbers = [f"{x:{sign}.{digits}f}" for x in (of["mean"], *of["ci95"])]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


# --- files --------------------------------------------------------------------------------------


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure.

    Raises:
        C2CError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise C2CError("a study draws with matplotlib: pip install 'c2c-mlx[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def write(out: Path, name: str, result: Result, report: str, picture: Any) -> None:
    """Writes `NAME.png`, `report.md` and, when these are there, `result.json`."""
    try:
        with overwriting(out / f"{name}.png") as partial:
            picture.savefig(partial, dpi=90)
    except OSError as e:
        raise C2CError(f"{out}: cannot write there ({e.strerror})") from None
    write_text(out / "report.md", report)
    write_text(out / "result.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
