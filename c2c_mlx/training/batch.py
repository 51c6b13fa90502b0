"""Examples laid out as one block: padding behind the shared prefix, and who is fed by what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from c2c_mlx.text.alignment import message_groups
from c2c_mlx.training.dataset import Example


@dataclass(frozen=True)
class Padded:
    """Prompts of a batch as one block: a prefix that all share, padding, each row's own rest.

    The padding stands *behind* the shared prefix, so that the prefix (often a template's system
    prompt, most of a short prompt) is prefilled once and not per row.
    """

    ids: np.ndarray  # [B, N]; one below zero is padding of the prompt's own, see `align_chat`
    prefix: int  # columns that are the same in every row
    padding: np.ndarray  # [B] columns of padding behind the prefix

    @property
    def hidden(self) -> np.ndarray:
        """[B, N] True where a prompt has padding of its own, which counts as a position."""
        return self.ids < 0

    def columns(self, index: np.ndarray, row: int) -> np.ndarray:
        """Positions of a row's prompt -> columns of the block."""
        return np.where(index < self.prefix, index, index + self.padding[row])


def pad(prompts: Sequence[Sequence[int]], most_prefix: int) -> Padded:
    """Pads to the longest; the shared prefix ends at `most_prefix` at the latest."""
    prefix = min(most_prefix, *(len(p) for p in prompts))
    while any(list(p[:prefix]) != list(prompts[0][:prefix]) for p in prompts):
        prefix -= 1
    width = max(len(p) for p in prompts)
    padding = np.array([width - len(p) for p in prompts], dtype=np.int32)
    rows = [[*p[:prefix], *[0] * n, *p[prefix:]] for p, n in zip(prompts, padding, strict=True)]
    return Padded(np.array(rows, dtype=np.int32).reshape(len(prompts), width), prefix, padding)


@dataclass(frozen=True)
class Batch:
    """What one step needs, B rows.

    Attributes:
        examples: the rows as they came.
        receiver: all of the prompts but their last ids, N columns.
        sharer: the sharer's prompts, as far as they feed anything.
        start: the first column that is fused in any row.
        stop: one behind the last; beyond N, where `inputs` go on, if responses are fused, too.
        index: [B, stop - start] columns of `sharer` that feed these columns.
        messages: [B, stop - start] message numbers, -1 where nothing is fused.
        inputs: [B, R] the last prompt id, then the response but its last id.
        targets: [B, R] the response, padded on the right.
        mask: [B, R] True where a target counts.
    """

    examples: Sequence[Example]
    receiver: Padded
    sharer: Padded
    start: int
    stop: int
    index: np.ndarray
    messages: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray

    @property
    def own(self) -> np.ndarray:
        """[B] True where the response is the receiver's own."""
        return np.array([e.own for e in self.examples])

    @property
    def fuses_responses(self) -> bool:
        """Whether keys and values of `inputs` are fused before they are attended to."""
        return self.examples[0].heard is not None

    @property
    def tokens(self) -> int:
        """Targets that count."""
        return int(self.mask.sum())


def fused_positions(examples: Sequence[Example], positions: str) -> int:
    """How many positions of all these are fused; `positions` is the fuser's field of that name."""
    return sum(int((message_groups(e.read.message, positions) >= 0).sum()) for e in examples)


def collate(examples: Sequence[Example], positions: str) -> Batch:
    """Lays the examples out as one batch; `positions` is the fuser's field of that name."""
    read = [e.read for e in examples]
    fused = [message_groups(r.message, positions) for r in read]
    feeds = [r.index[m >= 0] for r, m in zip(read, fused, strict=True)]
    starts = [int(np.argmax(m >= 0)) if (m >= 0).any() else len(m) for m in fused]
    receiver = pad([e.receiver_ids[:-1] for e in examples], min(starts))
    sharer = pad(
        [r.sharer_ids[: int(f.max(initial=0)) + 1] for r, f in zip(read, feeds, strict=True)],
        min((int(f.min()) for f in feeds if len(f)), default=0),
    )
    longest = max(len(e.response_ids) for e in examples)
    width = receiver.ids.shape[1] + (longest if examples[0].heard is not None else 0)
    messages = np.full((len(examples), width), -1, dtype=np.int32)
    index = np.zeros((len(examples), width), dtype=np.int32)
    for row, (r, m) in enumerate(zip(read, fused, strict=True)):
        at = receiver.columns(np.arange(len(m)), row)
        messages[row, at] = m
        index[row, at] = sharer.columns(r.index, row)
    columns = np.flatnonzero((messages >= 0).any(axis=0))
    start, stop = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (width, width)
    messages, index = messages[:, start:stop], index[:, start:stop]
    low = index[messages >= 0].min(initial=np.iinfo(np.int32).max)
    index = np.where(messages >= 0, index, low)

    responses = [e.response_ids + [0] * (longest - len(e.response_ids)) for e in examples]
    targets = np.array(responses, dtype=np.int32)
    last = np.array([[e.receiver_ids[-1]] for e in examples], dtype=np.int32)
    mask = np.arange(longest)[None] < np.array([[len(e.response_ids)] for e in examples])
    inputs = np.concatenate([last, targets[:, :-1]], axis=1)
    return Batch(examples, receiver, sharer, start, stop, index, messages, inputs, targets, mask)
