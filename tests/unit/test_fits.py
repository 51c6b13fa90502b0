"""A run that leaves its batches open is made to fit; under a real limit of the process, too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import pytest

from c2c_mlx import LanguageModel
from c2c_mlx.config import FuserConfig, TrainConfig
from c2c_mlx.models import memory
from c2c_mlx.models.memory import Need
from c2c_mlx.models.sizes import ModelSize
from c2c_mlx.training import fits
from c2c_mlx.training.dataset import make_example
from c2c_mlx.training.files import ChatRow

TINY = Path(__file__).parents[1] / "golden" / "data" / "e2e" / "qwen3_llama"
PAIR = ["--sharer", str(TINY / "sharer"), "--receiver", str(TINY / "receiver")]
LENGTHS = [(400, 30), (90, 80), (80, 10)]

Needed = Callable[[TrainConfig, fits.Lengths], Need]


@pytest.fixture(scope="module")
def needed(receiver: LanguageModel, sharer: LanguageModel) -> Needed:
    """What a run of the tiny pair needs."""
    fuser = FuserConfig(receiver.shape, sharer.shape, ((2, 3), (3, 5)), 64, 64)
    return partial(
        memory.training, ModelSize.read(receiver.path), ModelSize.read(sharer.path), fuser
    )


def limited(needed: Needed, limit: int) -> Needed:
    """The same on a device with less memory."""
    return lambda config, shapes: replace(needed(config, shapes), limit=limit)


def total(needed: Needed, config: TrainConfig) -> int:
    return needed(config, fits.shapes(config, LENGTHS)).total


def test_each_smaller_run_needs_less_and_steps_over_as_many_chats(needed: Needed) -> None:
    config, needs = TrainConfig(), []
    while config is not None:
        needs.append(total(needed, config))
        assert config.batch_size * config.accumulate == 8
        last, config = config, fits.smaller(config)
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == len(needs) == 5
    assert (last.batch_size, last.grad_checkpoint) == (1, True)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(6, 1), (5, 1), (9, 2), (1, 4)])
def test_any_batch_is_split_into_equal_parts(batch_size: int, accumulate: int) -> None:
    config, sizes = TrainConfig(batch_size=batch_size, accumulate=accumulate), []
    while config := fits.smaller(config):
        assert config.batch_size * config.accumulate == batch_size * accumulate
        sizes.append(config.batch_size)
    assert sizes[-1] == 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("n_smaller", range(5))
def test_the_nearest_that_fits_is_taken(needed: Needed, n_smaller: int) -> None:
    wanted = config = TrainConfig()
    for _ in range(n_smaller):
        smaller = fits.smaller(config)
        assert smaller is not None
        config = smaller
    limit = total(needed, config)
    found = fits.fit(wanted, (), LENGTHS, limited(needed, limit))
    assert found.config == config and found.need.total == limit
    assert f"{config.batch_size} chats at a time" in found.why and "\n" not in found.why
    assert ("would take" in found.why) == (n_smaller > 0)


def test_the_longest_chats_go_last(needed: Needed) -> None:
    shorter = TrainConfig(batch_size=1, accumulate=8, grad_checkpoint=True, max_tokens=256)
    found = fits.fit(TrainConfig(), (), LENGTHS, limited(needed, total(needed, shorter)))
    assert found.config == shorter and "of up to 256 tokens" in found.why
    none = fits.fit(TrainConfig(), (), LENGTHS, limited(needed, found.need.weights))
    assert none.config.max_tokens == 128 and "will not fit" in str(none.need)


@pytest.mark.parametrize("given", ["batch_size", "accumulate"])
def test_what_is_given_stays_and_the_line_says_what_would_fit(needed: Needed, given: str) -> None:
    lighter = TrainConfig(grad_checkpoint=True)
    limit = total(needed, lighter)
    assert fits.fit(TrainConfig(), (given,), LENGTHS, limited(needed, limit)).config == lighter
    nothing = (given, "grad_checkpoint")
    found = fits.fit(TrainConfig(), nothing, LENGTHS, limited(needed, limit))
    assert found.config == TrainConfig() and "left open" in found.why
    assert "will not fit: --batch-size 4 --accumulate 2 will" in str(found.need)


def test_prefills_leave_room_on_their_disk(needed: Needed, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free / 1e9
    config = TrainConfig(prefill_cache=str(tmp_path / "not" / "there"), prefill_cache_gb=4 * free)
    kept = fits.fit(config, ("prefill_cache_gb",), LENGTHS, needed).config.prefill_cache_gb
    fitted = fits.fit(config, (), LENGTHS, needed).config.prefill_cache_gb
    assert kept == 4 * free and 0 < fitted < 0.75 * free
    assert fits.fit(TrainConfig(), (), LENGTHS, needed).config == TrainConfig()


def test_the_longest_chats_are_found(receiver: LanguageModel, sharer: LanguageModel) -> None:
    def chat(asked: int, answered: int) -> ChatRow:
        return ChatRow(
            [
                {"role": "user", "content": "word " * asked},
                {"role": "assistant", "content": "so " * answered},
            ]
        )

    rows = [chat(1 + i % 7, 1 + i % 5) for i in range(200)]
    rows[50], rows[150] = chat(90, 1), chat(2, 60)
    unanswered = ChatRow([{"role": "user", "content": "word " * 40}])
    tokenizers = receiver.tokenizer, sharer.tokenizer
    found = fits.longest([*rows, unanswered], *tokenizers, "span", answer_tokens=33)
    examples = [make_example(row, *tokenizers, "span") for row in rows]
    asked = [max(len(e.receiver_ids), len(e.sharer_ids)) for e in examples]
    assert found[0] == (max(asked), len(examples[50].response_ids))
    assert max(answer for _, answer in found) == max(len(e.response_ids) for e in examples)
    assert found[1][1] == 33 and len(found) < 80
    shapes = fits.shapes(TrainConfig(batch_size=2, max_tokens=100), found)
    assert shapes[0] == (100, 33)
