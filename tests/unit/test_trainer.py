"""The training loop with two tiny models: losses, and what it reports and writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
import pytest
from trainers import POSITIONS, RECIPE, Make, loss_of, run, weights

from c2c_mlx import Fuser, LanguageModel
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.project import inputs
from c2c_mlx.text.tokens import end_ids
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training.batch import collate, pad
from c2c_mlx.training.checkpoints import all_of
from c2c_mlx.training.dataset import Example
from c2c_mlx.training.measure import by_length, decode
from c2c_mlx.training.plot import read_reports
from c2c_mlx.training.start import measure_inputs

# --- losses


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("rotated_keys", [False, True])
@pytest.mark.parametrize("message_gate", [False, True])
def test_a_batch_loses_what_its_rows_lose(
    make: Make,
    examples: list[Example],
    tmp_path: Path,
    positions: str,
    rotated_keys: bool,
    message_gate: bool,
) -> None:
    trainer = make(
        tmp_path, positions=positions, rotated_keys=rotated_keys, message_gate=message_gate
    )
    batch = collate(examples[:4], positions)
    assert batch.receiver.padding.any() and batch.sharer.padding.any() and not batch.mask.all()
    alone = [loss_of(trainer, collate([e], positions)) for e in examples[:4]]
    assert loss_of(trainer, batch) == pytest.approx(sum(alone), rel=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
def test_nothing_is_learned_from_positions_below_zero(
    make: Make,
    examples: list[Example],
    tmp_path: Path,
    positions: str,
    unsigned: Callable[[], None],
) -> None:
    """Where padding stands; on Metal such a position is one far away."""
    batch = collate(examples[:4], positions)
    options = {"positions": positions, "rotated_keys": False}
    expected = loss_of(make(tmp_path / "signed", **options), batch)
    unsigned()
    assert loss_of(make(tmp_path / "unsigned", **options), batch) == pytest.approx(expected)


@pytest.mark.parametrize("positions", POSITIONS[1:])  # of "all", the first id feeds something
@pytest.mark.parametrize("rotated_keys", [False, True])
def test_what_the_sharers_prompts_share_is_read_once(
    make: Make, examples: list[Example], tmp_path: Path, positions: str, rotated_keys: bool
) -> None:
    trainer = make(tmp_path, positions=positions, rotated_keys=rotated_keys)
    batch = collate(examples[:4], positions)
    block = batch.sharer
    assert block.prefix > 0 and block.padding.any()
    rows = [
        [*ids[: block.prefix], *ids[block.prefix + n :]]
        for ids, n in zip(block.ids.tolist(), block.padding, strict=True)
    ]
    apart = replace(batch, sharer=pad(rows, 0))  # what feeds anything stands where it stood
    assert loss_of(trainer, batch) == pytest.approx(loss_of(trainer, apart), rel=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_loss_is_what_a_prefilled_cache_gives(
    make: Make, examples: list[Example], tmp_path: Path, positions: str
) -> None:
    """Training and inference fuse alike."""
    trainer, e = make(tmp_path, positions=positions, message_gate=True), examples[3]
    trainer.c2c.fuser.eval()
    prefix = FusedCache(trainer.c2c)
    cache = prefix.extend([e])
    ids = [e.receiver_ids[-1], *e.response_ids[:-1]]
    logits = trainer.c2c.receiver(mx.array([ids]), cache=cache)[0]
    logits_dtype, logits = logits.dtype, logits.astype(mx.float32)
    chosen = logits[mx.arange(len(ids)), mx.array(e.response_ids)]
    expected = (mx.logsumexp(logits, axis=-1) - chosen).sum().item()
    # A fuser is float32 while it is trained, and the receiver's dtype when it is used.
    near = 1e-5 if logits_dtype == mx.float32 else 5e-3
    assert loss_of(trainer, collate([e], positions)) == pytest.approx(expected, rel=near)


@pytest.mark.parametrize(
    "options", [{}, RECIPE | {"message_gate_weight": 10.0}], ids=["", "recipe"]
)
def test_accumulated_batches_step_like_one(
    make: Make, examples: list[Example], tmp_path: Path, options: dict[str, Any]
) -> None:
    one, parts = make(tmp_path / "one", **options), make(tmp_path / "parts", **options)
    rows = sorted(examples[:6], key=lambda e: len(e.receiver_ids))
    losses = [
        one.train_step([rows]),
        parts.train_step([rows[:1], rows[1:4], rows[4:]]),
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(weights(one).values(), weights(parts).values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_recomputed_layers_change_no_number(
    make: Make, examples: list[Example], tmp_path: Path
) -> None:
    kept, recomputed = make(tmp_path / "a"), make(tmp_path / "b", grad_checkpoint=True)
    layers = list(recomputed.c2c.receiver.layers)
    losses = [trainer.train_step([examples[:6]]) for trainer in (kept, recomputed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert list(recomputed.c2c.receiver.layers) == layers
    for key, value in weights(kept).items():
        np.testing.assert_allclose(weights(recomputed)[key], value, rtol=1e-3, atol=1e-5)


def test_the_loss_goes_down(make: Make, examples: list[Example], tmp_path: Path) -> None:
    trainer = make(tmp_path, iters=30, warmup=0)
    losses = [trainer.train_step([examples]) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.2


def test_message_gates_learn_which_answers_are_the_receivers_own(
    make: Make, examples: list[Example], tmp_path: Path
) -> None:
    trainer = make(tmp_path, message_gate=True, message_gate_weight=10.0, warmup=0, iters=25)
    for _ in range(25):
        trainer.train_step([examples])
    batch = collate(examples, "all")
    prefills = trainer.prefills(batch)
    _, change = step_loss.fuse(trainer.c2c, prefills.own, prefills.sharer, batch)
    assert change is not None and change.message_weight is not None
    gate = np.array(change.message_weight).mean(axis=(0, 2, 3, 4))
    assert batch.own.any() and gate[batch.own].max() < gate[~batch.own].min()


def test_labels_open_and_shut_while_a_fuser_learns(
    make: Make, examples: list[Example], tmp_path: Path
) -> None:
    trainer = make(tmp_path, message_gate=True)
    fuser, batch = trainer.c2c.fuser, collate(examples, "all")
    fuser.message_head.bias = mx.full(fuser.message_head.bias.shape, -20.0)
    prefills = trainer.prefills(batch)
    for learns in (True, False):
        fuser.train(learns)
        fused, _ = step_loss.fuse(trainer.c2c, prefills.own, prefills.sharer, batch)
        changed = [
            mx.abs(a.values - b.values).astype(mx.float32).max(axis=(1, 2, 3))
            for a, b in zip(fused, prefills.own, strict=True)
            if a.values is not None
        ]
        is_changed = np.array(mx.stack(changed).max(axis=0)) > 0  # [B]
        np.testing.assert_array_equal(is_changed, ~batch.own & learns)


# --- what a run reports and leaves


def test_reports_and_files(make: Make, tmp_path: Path) -> None:
    trainer = make(tmp_path, report_every=2, eval_every=4)
    reports = run(trainer)
    assert [r["step"] for r in reports] == [2, 4, 6]
    assert ["valid_loss" in r for r in reports] == [False, True, True]
    assert read_reports(tmp_path / "metrics.jsonl") == reports
    assert trainer.measured == reports[-1]
    assert trainer.best == min(r["valid_loss"] for r in reports[1:])
    best = Fuser.load(tmp_path / "best")
    assert best.config == trainer.c2c.fuser.config
    assert reports[-1]["gates_open"] == 8  # keys and values of 4 layers
    assert reports[-1]["tokens"] == trainer.tokens > 0


def test_a_run_ends_with_a_verdict(make: Make, examples: list[Example], tmp_path: Path) -> None:
    trainer = make(tmp_path, iters=2)
    trainer.valid = examples
    report = run(trainer)[-1]
    found = json.loads((tmp_path / "verdict.json").read_text())
    assert found == trainer.verdict
    assert (found["chats"], found["tokens"]) == (11, sum(len(e.response_ids) for e in examples))
    names = {"valid_loss": "valid_loss"}
    names |= {f"{n}_loss": f"valid_{n}_loss" for n in ("receiver", "shuffled", "zeroed")}
    assert [found[name] for name in names] == [report[name] for name in names.values()]
    assert len({found[name] for name in names}) == 4
    difference = found["valid_loss"] - found["zeroed_loss"]
    assert found["vs_zeroed"]["mean"] == pytest.approx(difference, rel=1e-6)
    provenance = Fuser.load(tmp_path).provenance
    assert provenance.verdict == found["verdict"] and "on 11 chats" in provenance.verdict
    assert f"Verdict: {found['verdict']}" in (tmp_path / "README.md").read_text()


def test_a_second_run_leaves_the_first_one_its_folder(make: Make, tmp_path: Path) -> None:
    first, second = make(tmp_path), make(tmp_path)
    steps = first.steps(lambda: False)
    next(steps)
    with pytest.raises(C2CError, match="a run is going on there"):
        second.run()
    assert second.step == 0
    steps.close()  # as the end of a process does
    second.run(stopped=lambda: second.step == 1)
    assert second.step == 1


def test_a_stopped_run_has_no_verdict_and_the_resumed_one_that_of_a_whole(
    make: Make, tmp_path: Path
) -> None:
    whole = make(tmp_path / "whole")
    whole.run()
    cut = make(tmp_path / "cut")
    cut.run(stopped=lambda: cut.step == 3)
    assert cut.verdict == {} and not (tmp_path / "cut" / "verdict.json").exists()
    resumed = make(tmp_path / "cut")
    resumed.resume(all_of(tmp_path / "cut")[-1])
    resumed.run()
    assert resumed.verdict == whole.verdict


def test_without_validation_there_is_a_fuser_and_no_best(make: Make, tmp_path: Path) -> None:
    trainer = make(tmp_path, iters=5, eval_every=2)
    trainer.valid = []
    steps = []

    def look(step: int, loss: float) -> None:
        there = (tmp_path / "config.json").exists()
        steps.append(Fuser.load(tmp_path).provenance.steps if there else None)

    trainer.run(on_step=look)
    assert steps == [None, None, 2, 2, 4]  # what was there when each step ended
    assert Fuser.load(tmp_path).provenance.steps == 5
    assert not (tmp_path / "best").exists()
    assert "there are no chats" in json.loads((tmp_path / "verdict.json").read_text())["verdict"]


def test_a_fuser_that_is_closed_loses_what_the_receiver_alone_loses(
    make: Make, tmp_path: Path
) -> None:
    trainer = make(tmp_path, gates="learned")  # a fresh one is closed
    measured = trainer.evaluate()
    assert measured["valid_loss"] == measured["valid_receiver_loss"]
    assert measured["valid_shuffled_loss"] == measured["valid_receiver_loss"]
    opened = make(tmp_path).evaluate()
    assert opened["valid_receiver_loss"] == measured["valid_receiver_loss"]
    assert len(set(opened.values())) == 3


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_sharers_are_shuffled_over_all_chats(make: Make, tmp_path: Path, batch_size: int) -> None:
    """Not within a batch: of one chat, as the last of four by threes, it would be its own."""
    measured = make(tmp_path, batch_size=batch_size).evaluate()
    assert measured["valid_shuffled_loss"] != measured["valid_loss"]
    expected = make(tmp_path).evaluate()
    assert measured == {name: pytest.approx(loss, rel=1e-5) for name, loss in expected.items()}


def test_a_shuffled_sharer_is_read_without_the_receiver(
    make: Make, examples: list[Example], tmp_path: Path
) -> None:
    trainer, batch = make(tmp_path), collate(examples, "all")
    expected = trainer.prefills(batch).sharer
    trainer.c2c.receiver = None
    for found, wanted in zip(trainer.prefills.sharer(batch), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_single_chat_has_no_other_sharer(make: Make, tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.valid = trainer.valid[:1]
    assert set(run(trainer)[-1]) & {"valid_loss", "valid_shuffled_loss"} == {"valid_loss"}


def test_the_control_does_not_read_the_sharer(make: Make, tmp_path: Path) -> None:
    trainer = make(tmp_path, zero_sharer=True)
    report = run(trainer)[-1]
    assert report["valid_loss"] == pytest.approx(report["valid_shuffled_loss"], rel=1e-6)
    assert report["valid_loss"] != report["valid_receiver_loss"]


def test_gates_learn_and_are_annealed(make: Make, tmp_path: Path) -> None:
    trainer = make(tmp_path, gates="learned", anneal_steps=3, report_every=1)
    assert trainer.temperature == 1.0
    temperatures = [r["temperature"] for r in run(trainer)]
    assert temperatures == pytest.approx([0.1, 0.01, 0.001, 0.001, 0.001, 0.001])
    assert (weights(trainer)["gate_logit"] != 0).all()


def test_open_gates_stay_open_and_untrained(make: Make, tmp_path: Path) -> None:
    trainer = make(tmp_path, normalise=True)
    before = weights(trainer)
    run(trainer)
    after = weights(trainer)
    assert trainer.temperature is None
    fixed = {k for k in before if np.array_equal(before[k], after[k])}
    assert fixed == {"gate_logit", "input_mean", "input_scale", "output_scale"}


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_learning_rate_warms_up_and_decays(make: Make, tmp_path: Path, schedule: str) -> None:
    trainer = make(tmp_path, schedule=schedule, report_every=1, iters=8)
    rates = [r["learning_rate"] for r in run(trainer)]
    peak = 3e-3
    assert max(rates) == pytest.approx(peak)
    assert rates.index(max(rates)) <= 2
    assert rates[-1] < peak / 5


# --- the normalisation


def test_measured_inputs_have_mean_zero_and_deviation_one(
    make: Make, examples: list[Example], tmp_path: Path
) -> None:
    trainer = make(tmp_path, normalise=True, positions="messages", rotated_keys=False)
    c2c = trainer.c2c
    measure_inputs(c2c, examples, 3)
    columns = []
    for e in examples:
        batch = collate([e], "messages")
        prefills = trainer.prefills(batch)
        part = kv.read(prefills.own, c2c.receiver_layers, batch.start, batch.stop)
        own = c2c.fuser_view(part, step_loss.first_position(batch))
        slices = [(kind, layer) for kind in (0, 1) for layer in range(4)]
        x = inputs(prefills.sharer, own, slices)
        columns.append(
            np.array(x.astype(mx.float32)).reshape(8, -1, x.shape[-1])[:, batch.messages[0] >= 0]
        )
    x = np.concatenate(columns, axis=1)
    mean, scale, output = (
        np.array(getattr(c2c.fuser, name)).reshape(8, -1)
        for name in ("input_mean", "input_scale", "output_scale")
    )
    seen = (x - mean[:, None]) * scale[:, None]
    # In half precision keys lose their RoPE to a rounding, which batches place elsewhere.
    near = 1e-3 if kv.dtype_of(c2c.receiver) == mx.float32 else 1e-2
    np.testing.assert_allclose(seen.mean(axis=1), 0, atol=near)
    np.testing.assert_allclose(seen.std(axis=1), 1, atol=near)
    np.testing.assert_allclose(output, x.std(axis=1)[:, 24:], rtol=near)


def test_nothing_to_measure_is_refused(make: Make, tmp_path: Path) -> None:
    nothing = Example([1, 2, 3], [4], np.zeros(3, np.int32), np.full(3, -1, np.int32), [7])
    trainer = make(tmp_path, normalise=True, positions="messages")
    with pytest.raises(C2CError, match="no message to fuse"):
        measure_inputs(trainer.c2c, [nothing], 2)


def test_a_chat_with_nothing_to_fuse_can_be_in_a_batch(
    make: Make, examples: list[Example], tmp_path: Path
) -> None:
    nothing = Example([1, 2, 3], [4], np.zeros(3, np.int32), np.full(3, -1, np.int32), [7])
    trainer = make(tmp_path, positions="messages", message_gate=True)
    alone = [loss_of(trainer, collate([e], "messages")) for e in (nothing, examples[0])]
    both = collate([nothing, examples[0]], "messages")
    assert loss_of(trainer, both) == pytest.approx(sum(alone), rel=1e-5)
    kept = str(tmp_path / "kept")
    for _ in range(2):  # computed, then read
        keeping = make(tmp_path, positions="messages", message_gate=True, prefill_cache=kept)
        assert loss_of(keeping, both) == pytest.approx(sum(alone), rel=1e-3)


def test_answers_are_those_of_a_prefill_from_scratch(
    make: Make, examples: list[Example], receiver: LanguageModel, tmp_path: Path
) -> None:
    """In a batch of several lengths, and where prefills are kept on disk as well."""
    for name in ("", str(tmp_path / "kept")):
        trainer = make(tmp_path / "run", prefill_cache=name, batch_size=4)
        fuser = trainer.c2c.fuser
        fuser.proj_out.weight = 30 * fuser.proj_out.weight
        found = trainer.answers(9, 5)
        assert {len(texts) for texts in found.values()} == {min(9, len(trainer.valid))}
        n = len(trainer.valid)
        chats = by_length([trainer.valid[i * n // min(9, n)] for i in range(min(9, n))])
        for e, c2c, alone in zip(chats, found["valid"], found["receiver"], strict=True):
            fused = trainer.c2c.prefill(e.receiver_ids, e.sharer_ids, e.index, e.message)
            own = kv.make_cache(receiver.model)
            receiver.model(mx.array(e.receiver_ids[:-1])[None], cache=own)
            for text, cache in ((c2c, fused), (alone, own)):
                last = np.array(e.receiver_ids[-1:])
                [ids] = decode(receiver.model, cache, last, end_ids(receiver.tokenizer), 5)
                assert receiver.tokenizer.decode(ids).strip() == text
        assert found["valid"] != found["receiver"]
