"""Chats that are kept out of training, and what a run says of its fuser after measuring on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from chat_sessions import thinker
from trainers import Make

from c2c_mlx import LanguageModel
from c2c_mlx.training import verdict
from c2c_mlx.training.files import ChatRow
from c2c_mlx.training.holdout import hold_out
from c2c_mlx.training.verdict import Verdict, judge


def chat(question: str, answer: str = "a") -> ChatRow:
    return ChatRow(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    )


def asked(rows: list[ChatRow]) -> set[str]:
    return {row.messages[0]["content"] for row in rows}


# --- rows that are kept out


def test_a_tenth_is_kept_out_and_never_more_than_64() -> None:
    rows = [chat(f"q{i}") for i in range(50)]
    [rest], out = hold_out([rows], 0)
    assert len(out) == 5 and len(rest) == 45 and asked(rest) | asked(out) == asked(rows)
    many = [chat(f"q{i}") for i in range(2000)]
    assert len(hold_out([many], 0)[1]) == 64


def test_the_seed_decides_and_the_rest_keeps_its_order() -> None:
    rows = [chat(f"q{i}") for i in range(50)]
    [rest], out = hold_out([rows], 3)
    assert hold_out([rows], 3) == ([rest], out)
    assert hold_out([rows], 4)[1] != out
    assert [row for row in rows if row in rest] == rest


def test_of_few_chats_none_is_kept_out() -> None:
    rows = [chat(f"q{i}") for i in range(19)]
    assert hold_out([rows], 0) == ([rows], [])
    same = [chat("q", str(i)) for i in range(500)]
    assert hold_out([same], 0) == ([same], [])


def test_what_is_asked_there_is_asked_nowhere_in_the_rest() -> None:
    one = [chat(f"q{i % 40}", str(i)) for i in range(80)]
    other = [chat(f"q{i}", "again") for i in range(40)]
    rest, out = hold_out([one, other], 0)
    assert len(out) == 4
    assert not asked(out) & asked([*rest[0], *rest[1]])
    assert len(rest[0]) == 72 and len(rest[1]) == 36


def test_turns_of_one_conversation_are_not_parted() -> None:
    rows = [
        ChatRow([m for t in range(turns) for m in chat(f"q{i}.{t}", f"a{t}").messages])
        for i in range(60)
        for turns in (3, 1, 2)  # in any order
    ]
    [rest], out = hold_out([rows], 0)
    assert len(out) == 6 and len(rest) == 180 - 18
    assert not asked(out) & asked(rest)


def test_no_source_is_left_without_chats() -> None:
    single = [chat("the only one")]
    rows = [chat(f"q{i}") for i in range(400)]
    for seed in range(9):
        assert hold_out([single, rows], seed)[0][0] == single


# --- the verdict


def losses(**shift: float) -> dict[str, list[float]]:
    """Of 40 chats; C2C's plus a shift that differs a little from chat to chat."""
    rng = np.random.default_rng(0)
    valid = rng.normal(8, 2, 40)
    return {"valid": valid.tolist()} | {
        name: (valid + by + rng.normal(0, 0.1, 40)).tolist() for name, by in shift.items()
    }


def judged(**shift: float) -> Verdict:
    return judge(losses(**shift), [4] * 40, 0)


def test_a_fuser_that_helps_by_what_the_sharer_read_is_worth_using() -> None:
    found = judged(receiver=2, shuffled=1, zeroed=1.5)
    assert found["verdict"].startswith("Worth using: on 40 chats that it did not learn")
    assert found["vs_receiver"]["mean"] == pytest.approx(-0.5, abs=0.02)
    low, high = found["vs_shuffled"]["ci95"]
    assert low < found["vs_shuffled"]["mean"] < high < 0
    assert found["receiver_loss"] - found["valid_loss"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        ({"receiver": 0, "shuffled": 1, "zeroed": 1}, "C2C is no better than the receiver alone"),
        ({"receiver": -1, "shuffled": 1, "zeroed": 1}, "C2C is worse than the receiver alone"),
        (
            {"receiver": 1, "shuffled": 0, "zeroed": 1},
            "no better than with another chat's",
        ),
        (
            {"receiver": 1, "shuffled": 1, "zeroed": 0},
            "no better than with a sharer that s",
        ),
        ({"receiver": 1, "shuffled": -1, "zeroed": 0}, "]) and with a sharer that"),
    ],
)
def test_a_fuser_that_does_not_help_is_not_worth_using(shift: dict[str, float], words: str) -> None:
    sentence = judged(**shift)["verdict"]
    assert sentence.startswith("Not worth using: on 40 chats") and words in sentence
    assert "\n" not in sentence


WANTED = ["the red house", "a small dog", "it is raining", "two cups of tea", "he left early"] * 2
WRONG = ["of", "perhaps", "I cannot", "no", "yes"] * 2


def said(valid: list[str], receiver: list[str]) -> Verdict:
    texts = {"wanted": WANTED, "valid": valid, "receiver": receiver, "shuffled": WRONG}
    return judge(losses(receiver=2, shuffled=1, zeroed=1), [4] * 40, 0, answers=texts)


def test_answers_are_compared_by_chrf() -> None:
    pytest.importorskip("sacrebleu")
    found = said(WANTED, WRONG)
    assert found["answers"]["chats"] == 10 and found["answers"]["chrf"]["valid"] == 100
    assert found["answers"]["vs_receiver"]["ci95"][0] > 50
    assert found["answers"]["texts"]["receiver"] == WRONG
    assert found["verdict"].startswith("Worth using")
    assert "its answers to 10 of them are closer to what was wanted than" in found["verdict"]
    assert "are no closer to" in said(WRONG, WRONG)["verdict"]


def test_worse_answers_are_not_worth_using_whatever_their_loss() -> None:
    pytest.importorskip("sacrebleu")
    found = said(WRONG, WANTED)["verdict"]
    assert found.startswith("Not worth using") and "but gives worse ones" in found


def test_where_the_receiver_thinks_no_answers_are_compared(
    make: Make, receiver: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path)
    texts = trainer.answers(2, 4)
    begins = texts["receiver"][0][:2]
    for start, found in (("<never>", texts), ("assistant", {}), (begins, {})):
        monkeypatch.setattr(trainer.train, "receiver", thinker(receiver, start, "<none>"))
        assert trainer.answers(2, 4) == found
    alone = judge(losses(receiver=2, shuffled=1, zeroed=1), [4] * 40, 0, answers={})
    for each in (alone, verdict.with_twin(alone, [1.0] * 40, 0)):
        assert "the receiver thinks before it answers" in each["verdict"]


def test_what_is_wanted_is_no_longer_than_an_answer(make: Make, tmp_path: Path) -> None:
    trainer = make(tmp_path)
    whole, cut = (trainer.answers(2, most)["wanted"] for most in (99, 1))
    assert len("".join(cut)) < len("".join(whole))
    assert all(w.startswith(c) for w, c in zip(whole, cut, strict=True)), (whole, cut)


def test_a_twin_is_taken_into_a_verdict_afterwards(tmp_path: Path) -> None:
    before = judged(receiver=2, shuffled=1, zeroed=1.5)
    assert before["twin_loss"] is None and before["vs_twin"] is None
    verdict.write(tmp_path, before)
    valid = np.array(before["each"]["valid"])
    better = verdict.with_twin(verdict.read(tmp_path), (valid + 0.8).tolist(), 0)
    assert better["vs_twin"]["mean"] == pytest.approx(-0.2)
    assert "to a twin that learned with nothing to read" in better["verdict"]
    assert better["vs_receiver"] == before["vs_receiver"]
    same = verdict.with_twin(better, (valid - 0.1).tolist(), 0)
    assert same["verdict"].startswith("Not worth using") and "than a twin that" in same["verdict"]
    assert verdict.read(tmp_path / "nowhere") == {}


def test_a_gain_that_is_sure_and_tiny_is_none() -> None:
    rng = np.random.default_rng(0)
    valid = rng.normal(8, 2, 40)
    found = {"valid": valid, "receiver": valid + 0.02, "shuffled": valid + 0.02}
    said = judge({k: v.tolist() for k, v in found.items()}, [4] * 40, 0)["verdict"]
    assert said.startswith("Not worth using") and "is hardly better than the receiver" in said


def test_a_loss_is_per_token_and_its_interval_over_chats() -> None:
    found = judge({"valid": [1.0, 9.0], "receiver": [2.0, 18.0]}, [1, 9], 0)
    assert (found["valid_loss"], found["receiver_loss"]) == (1.0, 2.0)
    assert found["vs_receiver"] == {"mean": -1.0, "ci95": [-1.0, -1.0]}
    assert (found["chats"], found["tokens"]) == (2, 10)
    assert found["shuffled_loss"] is None and found["vs_shuffled"] is None


def test_of_a_few_chats_nothing_is_said() -> None:
    seven = {name: values[:7] for name, values in losses(receiver=2, shuffled=1, zeroed=1).items()}
    assert judge(seven, [4] * 7, 0)["verdict"].startswith("Not judged: there are only 7 chats")
    none = judge({}, [], 0)
    assert none["valid_loss"] is None and "there are no chats" in none["verdict"]


def test_the_control_is_called_so() -> None:
    found = judge(losses(receiver=1, shuffled=0, zeroed=0), [4] * 40, 0, control=True)
    assert found["verdict"].startswith("The control, which reads nothing: on 40 chats")


def test_the_file_holds_it(tmp_path: Path) -> None:
    found = judged(receiver=2, shuffled=1, zeroed=1)
    verdict.write(tmp_path, found)
    assert json.loads((tmp_path / verdict.FILE).read_text()) == found
