"""Training for answers that are fused while they are written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
import pytest
from chat_sessions import with_template
from trainers import POSITIONS, Make, loss_of, run

from c2c_mlx import Fuser, LanguageModel
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.text.answer import AnswerAlignment
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training.batch import collate
from c2c_mlx.training.dataset import Dataset, Example


@pytest.fixture(params=["span", "first", "longest", "same"])
def alignment(request: pytest.FixtureRequest) -> Any:
    return request.param


def rounding(trainer: Any, half: float) -> float:
    return 1e-5 if kv.dtype_of(trainer.c2c.receiver) == mx.float32 else half


@pytest.fixture
def heard(
    dataset: Dataset, receiver: LanguageModel, sharer: LanguageModel, alignment: Any
) -> Dataset:
    """The same chats, whose answers are read along, beside a longer template."""
    wordy = with_template(sharer, "read this. " + str(sharer.tokenizer.chat_template)).tokenizer
    return Dataset(dataset.sources, receiver.tokenizer, wordy, alignment, 64, fuse_response=True)


@pytest.fixture
def chats(heard: Dataset) -> list[Example]:
    return [e for e in map(heard.example, heard.sources[0].rows) if e is not None]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("rotated_keys", [False, True])
def test_a_loss_is_that_of_an_answer_that_is_fused(
    make: Make,
    heard: Dataset,
    chats: list[Example],
    alignment: Any,
    tmp_path: Path,
    positions: str,
    rotated_keys: bool,
) -> None:
    """Training and inference fuse alike, and see the same ids."""
    trainer, e = make(tmp_path, positions=positions, rotated_keys=rotated_keys), chats[3]
    assert (min(e.receiver_ids) < 0) == (alignment in ("first", "longest")), "padding"
    answer = AnswerAlignment(e, heard.receiver, heard.sharer, strategy=alignment)
    trainer.c2c.fuser.eval()
    reader = FusedCache(trainer.c2c)
    cache = reader.extend([e])
    model = reader.answering([answer])
    expected, ids = 0.0, [e.receiver_ids[-1], *e.response_ids[:-1]]
    for token, target in zip(ids, e.response_ids, strict=True):
        logits = model(mx.array([[token]]), cache)[0, 0].astype(mx.float32)
        expected += (mx.logsumexp(logits) - logits[target]).item()
    loss = loss_of(trainer, collate([e], positions))
    # A fuser is float32 while it is trained, and the receiver's dtype when it is used.
    assert loss == pytest.approx(expected, rel=rounding(trainer, 2e-2))
    assert loss != pytest.approx(loss_of(trainer, collate([replace(e, heard=None)], positions)))


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_batch_loses_what_its_rows_lose(
    make: Make, chats: list[Example], tmp_path: Path, positions: str
) -> None:
    trainer = make(tmp_path, positions=positions, message_gate=True)
    batch = collate(chats[:4], positions)
    assert batch.receiver.padding.any() and batch.sharer.padding.any() and not batch.mask.all()
    alone = [loss_of(trainer, collate([e], positions)) for e in chats[:4]]
    assert loss_of(trainer, batch) == pytest.approx(sum(alone), rel=rounding(trainer, 1e-3))


@pytest.mark.parametrize("positions", POSITIONS)
def test_kept_prefills_are_the_computed_ones(
    make: Make, chats: list[Example], tmp_path: Path, positions: str
) -> None:
    kept = str(tmp_path / "kept")
    keeping = make(tmp_path / "b", prefill_cache=kept, positions=positions)
    for rows in (chats[:6], chats[6:]):
        keeping.prefills(collate(rows, positions))
    reading = make(tmp_path / "c", prefill_cache=kept, positions=positions)
    reading.c2c.sharer = None  # it must not be needed
    batch = collate(chats[3:9], positions)
    expected = loss_of(make(tmp_path / "a", positions=positions), batch)
    assert loss_of(reading, batch) == pytest.approx(expected, rel=1e-3)


def test_nothing_of_an_answer_is_known_before_it_is_said(
    make: Make, chats: list[Example], tmp_path: Path
) -> None:
    trainer = make(tmp_path, positions="all")
    e = max(chats, key=lambda e: len(e.response_ids))
    at = len(e.response_ids) - 2  # the last id that is read
    other = replace(e, response_ids=[*e.response_ids[:at], 30, e.response_ids[-1]])
    assert e.heard is not None
    other = replace(other, heard=[*e.heard[:-1], 31])
    losses = []
    for example in (e, other):
        batch = collate([example], "all")
        prefills = trainer.prefills(batch)
        cache, _ = step_loss.fuse(trainer.c2c, prefills.own, prefills.sharer, batch)
        ids = mx.array(batch.inputs)
        scored = trainer.prefills.receiver.losses(
            ids, cache, batch.targets, batch.mask, prefills.state
        )
        losses.append(np.array(scored)[0])
    assert at > 1 and losses[0][:at] == pytest.approx(losses[1][:at], rel=1e-6)
    assert losses[0][at + 1] != pytest.approx(losses[1][at + 1], rel=1e-6)


def test_a_run_learns_and_says_what_its_fuser_is_for(
    make: Make, heard: Dataset, chats: list[Example], alignment: Any, tmp_path: Path
) -> None:
    made_for_it = {"fuse_response": True, "alignment": alignment, "rotated_keys": False}
    trainer = make(tmp_path, iters=40, learning_rate=3e-3, eval_every=40, answers=4, **made_for_it)
    trainer.train, trainer.valid = heard, chats
    before = trainer.evaluate()["valid_loss"]
    *_, last = run(trainer)
    assert last["valid_loss"] < before - 0.1
    assert trainer.verdict["answers"] is None, "batches of answers fuse prompts alone"
    assert Fuser.load(tmp_path).config.fuse_response
