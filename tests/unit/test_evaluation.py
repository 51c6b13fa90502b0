"""Evaluation without models: scores, extraction, intervals, reports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from c2c_mlx import bootstrap
from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation import choice, content, files, number, report, result, scoring
from c2c_mlx.evaluation.agreement import Agreement
from c2c_mlx.evaluation.choice import Choice
from c2c_mlx.evaluation.fact import Fact, says
from c2c_mlx.evaluation.number import Number
from c2c_mlx.evaluation.reference import Reference
from c2c_mlx.evaluation.runner import Log
from c2c_mlx.evaluation.task import Answer, Item

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "extras" / "answers.json"


# --- what an answer names


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct answer is B", "B"),
        ("The correct answer is B.", "B"),
        ("The correct answer is: B", "B"),
        ("The correct answer is (B).", "B"),
        ("The correct answer is **B**.", "B"),
        ("The correct answer is **B. Rome**", "B"),
        ("The correct answer is B because Rome is old.", "B"),
        ("The correct answer is A because Rome is old.", "A"),
        ("The correct answer is\nB", "B"),
        ("The correct answer is option B", "B"),
        ("The correct answer is a", "A"),
        ("The correct answer is a.", "A"),
        ('The correct answer is "C".', "C"),
        ("the CORRECT ANSWER is D", "D"),
        ("The answer would be C, as Rome fell.", "C"),
        ("The correct answer is C. Option A is wrong.", "C"),
        ("The correct answer is B. The correct answer is B.", "B"),
        ("**Answer: D**", "D"),
        ("Answer:\nC", "C"),
        ("Final choice\n\nAnswer:\nC", "C"),
        ("Answer: $\\boxed{C}$", "C"),
        ("答案是B。", "B"),
        ("答案：C", "C"),
        ("A", "A"),
        (" b ", "B"),
        ("(c)", "C"),
        ("B.", "B"),
        ("B. Rome", "B"),
        ("B) Rome", "B"),
        ("(D) Rome", "D"),
        ("B: Rome", "B"),
        ("B.Rome", "B"),
        ("I think it is B.", "B"),
        ("I would choose B.", "B"),
        ("Option D", "D"),
        ("I'd go with D!", "D"),
        # Nothing is named, or not one thing.
        ("", None),
        ("  \n", None),
        ("Answer: Berlin", None),
        ("The correct answer is Berlin", None),
        ("The correct answer is Dublin.", None),
        ("The correct answer is A dog", None),
        ("The correct answer is a dog", None),
        ("The correct answer is not B", None),
        ("The correct answer is A/B/C/D", None),
        ("The correct answer is A or B", None),
        ("The correct answer is A, B", None),
        ("The correct answer is B and C.", None),
        ("The correct answer is B. The correct answer is C.", None),
        ("The correct answer is B-52", None),
        ("The correct answer is C++", None),
        ("The correct answer is C#", None),
        ("The correct answer is A.I.", None),
        ("The correct answer is A.C. Milan", None),
        ("The correct answer is D'Artagnan", None),
        ("The correct answer is B12", None),
        ("The correct answer is E", None),
        ("The correct answer is Vitamin C", None),
        ("Dublin is the capital.", None),
        ("A dog has four legs.", None),
        ("x = A + B so the result is 4", None),
        ("Because of CO2, the response: none", None),
        ("no letters here", None),
        ("I do not know.", None),
    ],
)
def test_a_letter_is_taken_where_it_is_named_and_nowhere_else(text: str, letter: str) -> None:
    assert choice.extract(text, 4) == letter


def test_ten_choices_have_ten_letters() -> None:
    assert choice.extract("The correct answer is J", 10) == "J"
    assert choice.extract("The correct answer is I", 10) == "I"
    assert choice.extract("The answer is I think Rome", 10) is None
    assert choice.extract("The correct answer is J", 4) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("So she has 6 left.\nAnswer: 6", 6),
        ("Answer: $1,234.50", 1234.5),
        ("The answer is **-7**.", -7),
        ("work 3 * 4 = 12\n#### 12", 12),
        ("Answer: 3\nWait, no.\nAnswer: 4", 4),
        ("\\boxed{18}", 18),
        ("Answer: 18.0 dollars", 18),
        ("**Answer**: 18", 18),
        ("__Answer__: 3", 3),
        ("Answer: `18`", 18),
        ("Answer: \\$18", 18),
        ("Answer: \\(-18\\)", -18),
        ("Answer:\n\\[ 18 \\]", 18),
        ("\\boxed{\\$42}", 42),
        ("There are 6 apples.", None),
        ("Answer: six", None),
        ("", None),
    ],
)
def test_a_number_is_taken_behind_its_cue(text: str, value: float | None) -> None:
    assert number.extract(text) == value


def test_the_prompt_is_the_published_one() -> None:
    for case in json.loads(GOLDEN.read_text(encoding="utf-8"))["build_prompt"]:
        if case["use_template"] and not case["use_cot"]:
            found = choice.prompt(case["question"], ["3", "4"])
            # The published one names four letters, however many choices there are.
            assert found == case["prompt"].replace("A/B/C/D", "A/B")
            break
    else:
        pytest.fail("no such case")
    assert '"The correct answer is A/B/C/D"' in choice.prompt("{braces}?", ["1", "2", "3", "4"])


# --- scores


def test_chat_scores() -> None:
    task, item = Reference(), Item("1", [], "Tom has a house with a pool.")
    right = task.score(item, Answer(item.reference, [1], [2.0], 4), None)
    assert right == {"chrf": pytest.approx(100), "bleu": pytest.approx(100), "nll": 0.5}
    close = task.score(item, Answer("Tom has a big house.", [1], [2.0], 4), None)
    assert 30 < close["chrf"] < 80 and 5 < close["bleu"] < 50
    assert task.score(item, Answer(), None) == {"chrf": 0, "bleu": 0}  # failed: wrong
    assert task.corpus([item], [item.reference]) == pytest.approx({"chrf": 100, "bleu": 100})


def test_choice_scores() -> None:
    item = Item("1", [], "B", ("one", "two", "three"))
    written, likeliest, text = map(Choice, ("generate", "logits", "text"))
    assert written.score(item, Answer("B. Rome"), None) == {"accuracy": 1, "invalid": 0}
    assert written.score(item, Answer("C"), None) == {"accuracy": 0, "invalid": 0}
    assert written.score(item, Answer("Answer: Berlin"), None) == {"accuracy": 0, "invalid": 1}
    assert written.score(item, Answer(), None) == {"accuracy": 0, "invalid": 1}
    assert likeliest.score(item, Answer(nats=[3, 1, 2]), None) == {"accuracy": 1}
    assert likeliest.score(item, Answer(nats=[1, 3, 2]), None) == {"accuracy": 0}
    assert likeliest.score(item, Answer(), None) == {"accuracy": 0}
    # Nats per byte: 4.5 / 3, 4.4 / 3 and 6 / 5.
    assert text.score(item, Answer(nats=[4.5, 4.4, 6]), None) == {"accuracy": 0}
    assert text.score(item, Answer(nats=[4.5, 4.4, 8]), None) == {"accuracy": 1}
    assert text.score(item, Answer(), None) == {"accuracy": 0}
    long = Item("1", [], "A", ("é" * 5, "e" * 9))  # bytes, not characters
    assert text.score(long, Answer(nats=[9, 8.5]), None) == {"accuracy": 1}


def test_only_letters_are_chosen_among_choices_that_are_shown() -> None:
    row = {"question": "who?", "choices": ["a", "b", "c"], "answer": 1}
    item = files.choice_item(row, "1", "", "here")
    assert item.messages == Choice("text").asked(item).messages
    for method in ("generate", "logits"):
        shown = Choice(method).asked(item)
        assert shown.messages[0]["content"] == choice.prompt("who?", ["a", "b", "c"])
        assert shown.choices == item.choices == ("a", "b", "c")


def test_number_scores() -> None:
    item = Item("1", [], "1,234")
    assert Number().score(item, Answer("Answer: $1234."), None) == {"accuracy": 1, "invalid": 0}
    assert Number().score(item, Answer("1234"), None) == {"accuracy": 0, "invalid": 1}


@pytest.mark.parametrize(
    ("text", "fact", "right"),
    [
        ("The capital is Rome.", "Rome", True),
        ("ROME", "rome ", True),
        ("Romeo lives there.", "Rome", False),
        ("It is 17.", "7", False),
        ("It is 7.", "7", True),
        ("The **blue whale**, of course", "blue whale", True),
        ("Die Straße", "STRASSE", True),
        ("意大利的首都是罗马。", "罗马", True),
        ("答案是七天", "七", True),
        ("姓𠮷田的人", "𠮷田", True),
        ("เมืองหลวงคือกรุงเทพครับ", "กรุงเทพ", True),
        ("ນະຄອນຫຼວງວຽງຈັນແມ່ນ", "ວຽງຈັນ", True),
        ("រាជធានីភ្នំពេញគឺ", "ភ្នំពេញ", True),
        ("မြို့တော်ရန်ကုန်ဖြစ်သည်", "ရန်ကုန်", True),
        ("เมืองหลวงคือกรุงเทพครับ", "เชียงใหม่", False),
        ("Il est １２ heures", "12", True),
        ("H2O (C++)", "C++", True),
        ("", "Rome", False),
    ],
)
def test_a_fact_is_said_in_whole_words(text: str, fact: str, right: bool) -> None:
    assert says(text, fact) == right


def test_fact_scores() -> None:
    item = Item("1", [], "7 | seven", ("7", "seven"))
    found = [Fact().score(item, Answer(text), None) for text in ("Seven days.", "17", "")]
    assert found == [{"accuracy": 1}, {"accuracy": 0}, {"accuracy": 0}]


def test_agreement_looks_at_sixteen_tokens() -> None:
    task, item, own = Agreement(), Item("1", []), Answer("x", range(20))
    kept = {
        "same": [*range(16), 99],
        "late": [*range(15), 99],
        "cut": range(10),
        "nothing": [],
    }
    found = {k: task.score(item, Answer("x", ids), own)["kept"] for k, ids in kept.items()}
    assert found == {"same": 1, "late": 0, "cut": 0, "nothing": 0}
    short = Answer("x", [1, 2])
    assert task.score(item, Answer("x", [1, 2]), short)["kept"] == 1
    assert task.score(item, Answer("x", [1, 2, 3]), short)["kept"] == 0
    assert task.score(item, Answer(), None)["kept"] == 0
    assert "sharer" not in task.modes


# --- intervals


def test_interval_of_coin_throws_is_the_binomial_one() -> None:
    low, high = bootstrap.interval([1.0] * 50 + [0.0] * 50, seed=0)
    assert low == pytest.approx(0.40, abs=0.011) and high == pytest.approx(0.60, abs=0.011)


def test_interval_of_normal_numbers_is_the_normal_one() -> None:
    x = np.random.default_rng(5).normal(3, 2, 400)
    half = 1.96 * x.std() / 20
    assert bootstrap.interval(x.tolist(), 1) == pytest.approx(
        [x.mean() - half, x.mean() + half], abs=0.03
    )


def test_intervals_are_repeatable_in_any_number_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(np.random.default_rng(2).random(37))
    whole = bootstrap.interval(values, 7)
    assert whole == bootstrap.interval(values, 7) != bootstrap.interval(values, 8)
    monkeypatch.setattr(bootstrap, "_CHUNK", 37 * 11)
    assert bootstrap.interval(values, 7) == whole
    assert bootstrap.interval([4.0], 0) == [4.0, 4.0]


def test_differences_are_paired() -> None:
    a = {str(i): float(i) + 1 for i in range(100)}
    b = {str(i): float(i) for i in range(100)} | {"another": 99.0}
    found = scoring.difference(a, b, 0)
    assert found == {"mean": 1.0, "ci95": [1.0, 1.0], "items": 100}
    assert scoring.difference(a, {}, 0) == {}


# --- sets of prompts


def in_sets(*nats: list[float], groups: str) -> report.Result:
    """Two prompts a set; a set's group is its letter."""
    asked = [
        {"id": str(n), "reference": "AB"[n % 2], "group": groups[n // 2]} for n in range(len(nats))
    ]
    return {"items": asked, "modes": {"c2c": {"items": [{"nats": of} for of in nats]}}}


def test_an_answer_is_weighed_against_its_mean_over_the_prompts() -> None:
    # The second answer is always likelier, and likelier by more where it is right.
    assert content.right(np.array([[9.0, 5.0], [9.5, 4.0]])).tolist() == [True, True]
    assert content.right(np.array([[9.0, 4.0], [9.0, 5.0]])).tolist() == [False, False]
    found = content.scores(
        in_sets([9, 5], [9.5, 4], [9, 4], [9, 5], [1, 2], [1, 1], groups="xyx"), "c2c"
    )
    assert found[""] == {"0": 1, "2": 0, "4": 1}
    assert found["x"] == {"0": 1, "4": 1} and found["y"] == {"2": 0}


def test_half_a_set_is_refused() -> None:
    with pytest.raises(C2CError, match="item 2: no whole set"):
        content.scores(in_sets([1, 2], [2, 1], [1, 2], groups="xx"), "c2c")
    failed = in_sets([1, 2], [2, 1], groups="x")
    del failed["modes"]["c2c"]["items"][1]["nats"]
    with pytest.raises(C2CError, match="item 0: no whole set"):
        content.scores(failed, "c2c")


# --- what is kept of a run that was cut


@pytest.mark.parametrize("torn", [3, 4, 5])  # before, inside of and behind a character of two bytes
def test_a_torn_line_costs_only_itself(tmp_path: Path, torn: int) -> None:
    path, settings = tmp_path / "partial.jsonl", {"task": "où"}
    records = [{"mode": "c2c", "id": str(i), "text": "é"} for i in range(2)]
    Log(path, settings).append(records)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"t\xc3\xa9'[:torn])
    log = Log(path, settings)
    assert log.records == {"c2c": {r["id"]: r for r in records}} and path.read_bytes() == whole
    path.write_bytes(whole + b"\xff\n")
    with pytest.raises(C2CError, match="not the records of an unfinished run"):
        Log(path, settings)


def test_the_same_command_may_end_beside_this_one(tmp_path: Path) -> None:
    logs = [Log(tmp_path / "partial.jsonl", {}) for _ in range(2)]
    for log in logs:
        log.remove()
    assert not [*tmp_path.iterdir()]


# --- reports


def made() -> report.Result:
    items = [
        Item(str(i), [{"role": "user", "content": "q"}], "B", ("a", "b"), "ab"[i % 2])
        for i in range(6)
    ]
    said = {"receiver": "ABABAB", "c2c": "BBBBBB"}
    records = {}
    for mode, letters in said.items():
        records[mode] = {
            item.id: {
                "mode": mode,
                "id": item.id,
                "text": letter,
                "scores": Choice("generate").score(item, Answer(letter), None),
                "prompt_tokens": 10,
                "generated_tokens": 2,
            }
            for item, letter in zip(items, letters, strict=True)
        }
    records["c2c"]["0"] |= {"first_token_s": 0.25, "total_s": 0.5}
    records["c2c"]["5"] = {
        "mode": "c2c",
        "id": "5",
        "text": "",
        "scores": Choice("generate").score(items[5], Answer(), None),
        "error": "too long",
    }
    about = {"task": "t", "versions": {"mlx": "1"}}
    return report.summarise(Choice("generate"), items, records, about, 0)


def test_a_result_has_what_the_contract_names() -> None:
    found = made()
    modes = found["modes"]
    assert modes["receiver"]["scores"]["accuracy"]["mean"] == 0.5
    assert modes["c2c"]["scores"]["accuracy"]["mean"] == pytest.approx(5 / 6)
    assert modes["c2c"]["scores"]["accuracy"]["vs_receiver"]["mean"] == pytest.approx(2 / 6)
    assert modes["c2c"]["scores"]["invalid"]["mean"] == pytest.approx(1 / 6)
    assert "vs_receiver" not in modes["receiver"]["scores"]["accuracy"]
    assert modes["c2c"]["latency"] == {"first_token_s": 0.25, "total_s": 0.5, "items": 1}
    assert [r["id"] for r in modes["c2c"]["items"]] == list("012345")
    assert modes["c2c"]["failed"] == {"5": "too long"}
    a, b = (modes["receiver"]["groups"][g]["scores"]["accuracy"] for g in "ab")
    assert (a["mean"], b["mean"], a["items"]) == (0, 1, 3)
    assert json.loads(json.dumps(found)) == found


def test_tables_show_groups_and_failures() -> None:
    found = made()
    text = report.tables(found, every_group=True)
    assert "| a        | c2c      | 3 | 1.000 [1.000, 1.000] | +1.000 [+1.000, +1.000] |" in text
    assert "- c2c, item 5: too long" in text
    assert "0.250" in text
    found["groups"] = [f"g{i}" for i in range(5)]
    assert "g1" not in report.tables(found, every_group=False)


def test_results_are_compared_item_by_item() -> None:
    found = result.compare((made(), "c2c"), (made(), "receiver"), 0)
    assert found["accuracy"]["all"]["difference"]["mean"] == pytest.approx(2 / 6)
    assert found["accuracy"]["b"]["difference"]["mean"] == pytest.approx(-1 / 3)
    assert "+0.333" in report.compare_table(found, ["x", "y"])
    with pytest.raises(C2CError, match="no mode relay in that result; it has receiver, c2c"):
        result.compare((made(), "relay"), (made(), "c2c"), 0)
    other = made()
    other["items"] = other["items"][:3]
    with pytest.raises(C2CError, match="different items"):
        result.compare((other, "c2c"), (made(), "c2c"), 0)


def test_a_result_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    result.write(path, {"a": 1}, "first")
    with pytest.raises(C2CError, match="is there already"):
        result.write(path, {"a": 2}, "second")
    assert (
        json.loads(path.read_text()) == {"a": 1} and path.with_suffix(".md").read_text() == "first"
    )
    (tmp_path / "s.md").write_text("notes of somebody")
    with pytest.raises(C2CError, match=r"s\.md is there already"):
        result.write(tmp_path / "s.json", {}, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.md", "s.md"]
    with pytest.raises(C2CError, match="there is no folder"):
        result.check_free(tmp_path / "no" / "r.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"modes": 1, "items": []}'])
def test_what_is_no_result_is_not_compared(tmp_path: Path, text: str) -> None:
    (tmp_path / "r").write_text(text)
    with pytest.raises(C2CError, match="not a result"):
        result.read(tmp_path / "r")
