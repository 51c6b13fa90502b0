"""What is asked: rows of files, and benchmarks of the hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation import files, hub_tasks
from c2c_mlx.evaluation.agreement import Agreement
from c2c_mlx.evaluation.choice import Choice
from c2c_mlx.evaluation.fact import Fact
from c2c_mlx.evaluation.reference import Reference
from c2c_mlx.models.load import load_model

TINY = Path(__file__).parents[1] / "golden" / "data" / "e2e" / "qwen3_llama"

# --- files


def written(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
ASKED = {"messages": [{"role": "user", "content": "hi"}]}
MULTIPLE = {"question": "who?", "choices": ["a", "b", "c"], "answer": 1, "subject": "s"}


@pytest.mark.parametrize(
    ("row", "kind", "reference", "group"),
    [
        (CHAT | {"lang": "fr"}, Reference, "ho", "fr"),
        ({"prompt": "hi", "completion": "ho"}, Reference, "ho", ""),
        ({"prompt": "hi", "completion": "ho", "messages": []}, Reference, "ho", ""),
        ({"instruction": "hi", "input": "", "output": "ho"}, Reference, "ho", ""),
        (ASKED, Agreement, "", ""),
        ({"prompt": "hi"}, Agreement, "", ""),
        ({"prompt": "hi", "accept": ["ho", "7"], "lang": "fr"}, Fact, "ho | 7", "fr"),
        (CHAT | {"accept": ["he"]}, Fact, "he", ""),
        (MULTIPLE, Choice, "B", "s"),
        (MULTIPLE | {"answer": "C"}, Choice, "C", "s"),
    ],
)
def test_rows_say_which_task_they_are(
    tmp_path: Path, row: Any, kind: type, reference: str, group: str
) -> None:
    task, items = files.read(written(tmp_path / "f", row, "", row), "generate")
    assert type(task) is kind
    assert [(i.id, i.reference, i.group) for i in items] == [
        ("1", reference, group),
        ("3", reference, group),
    ]
    assert items[0].messages[-1]["role"] == "user"
    if kind is not Choice:
        assert items[0].messages == [{"role": "user", "content": "hi"}]


def test_a_cut_reference_says_nothing_of_its_end(tmp_path: Path) -> None:
    task, (whole, cut) = files.read(written(tmp_path / "f", CHAT, CHAT | {"cut": True}), "generate")
    assert (whole.cut, cut.cut) == (False, True)
    tokenizer = load_model(str(TINY / "receiver")).tokenizer
    ended, begun = (task.continuations(item, tokenizer, None)[0] for item in (whole, cut))
    assert ended[: len(begun)] == begun and len(begun) < len(ended)
    assert tokenizer.decode(begun) == "ho"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "is empty"),
        (["{"], "line 1: not JSON"),
        (["1"], "line 1: not a JSON object"),
        (["[1]"], "is one array"),
        ([{"text": "x"}], "'completion'.*, or 'choices' with"),
        ([CHAT, MULTIPLE], "line 2: a row of kind choice among rows of kind chat"),
        ([CHAT, ASKED], "line 2: a row of kind agreement among rows of kind chat"),
        ([MULTIPLE | {"answer": 3}], "'answer' must be 0 to 2"),
        ([MULTIPLE | {"answer": True}], "'answer' must be 0 to 2"),
        ([MULTIPLE | {"answer": "D"}], "'answer' must be 0 to 2"),
        ([MULTIPLE | {"choices": ["a"]}], "1 choices"),
        ([MULTIPLE | {"choices": "abc"}], "'choices' must be a list"),
        ([MULTIPLE | {"question": " "}], "'question' must be a text"),
        ([{"prompt": "a", "accept": "b"}], "'accept' must be a list"),
        ([{"prompt": "a", "accept": []}], "'accept' must be a list"),
        ([{"prompt": "a", "accept": ["b", " "]}], "'accept' must be a list"),
        ([CHAT, {"prompt": "a", "accept": ["b"]}], "a row of kind fact among"),
        ([{"prompt": 5}], "no chat can be made"),
        ([{"prompt": "a", "completion": 1}], "must be texts"),
        ([{"prompt": "a", "completion": " "}], "the reference answer is empty"),
        ([{"prompt": ""}], "a message of the user"),
        ([{"messages": []}], "a message of the user"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "a message of the user"),
        ([{"messages": [{"role": "user"}]}], "each with role and content"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(C2CError, match=words) as e:
        files.read(written(tmp_path / "rows.jsonl", *rows), "generate")
    assert "rows.jsonl" in str(e.value)


def test_line_ends_of_unicode_are_no_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False), encoding="utf-8")
    assert len(files.read(path, "generate")[1]) == 1


# --- benchmarks


def test_mmlu_redux_mends_what_its_authors_found() -> None:
    row = {"question": "q?", "choices": ["w", "x", "y", "z"], "answer": 1, "error_type": "ok"}
    item = hub_tasks.mmlu_redux(row, "anatomy/0", "anatomy")
    assert item is not None
    assert (item.reference, item.group, item.id) == ("B", "anatomy", "anatomy/0")
    assert item.choices == ("w", "x", "y", "z")
    wrong = row | {"error_type": "wrong_groundtruth"}
    mended = [wrong | {"correct_answer": x} for x in ("3", "D", None)]
    found = [hub_tasks.mmlu_redux(m, "n", "") for m in mended]
    assert [i and i.reference for i in found] == ["D", "D", "B"]
    for left_out in (
        row | {"error_type": "no_correct_answer"},
        row | {"error_type": "expert"},
        wrong | {"correct_answer": "none of them"},
    ):
        assert hub_tasks.mmlu_redux(left_out, "n", "") is None


def test_other_benchmarks() -> None:
    labelled = {"text": ["ice", "fire"], "label": ["1", "2"]}
    arc = hub_tasks.arc({"question": "hot?", "choices": labelled, "answerKey": "2"}, "n", "")
    assert arc.reference == "B" and arc.choices == ("ice", "fire")
    row = {"question_stem": "hot?", "choices": labelled | {"label": ["A", "B"]}, "answerKey": "A"}
    assert hub_tasks.openbookqa(row, "n", "").reference == "A"
    row = {"question": "热？", "A": "冰", "B": "火", "C": "水", "D": "土", "answer": "B"}
    ceval = hub_tasks.ceval(row, "n", "logic")
    assert (ceval.reference, ceval.choices, ceval.group) == ("B", ("冰", "火", "水", "土"), "logic")
    row = {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
    gsm8k = hub_tasks.gsm8k(row, "n", "")
    assert gsm8k.reference == "4" and "How many?" in gsm8k.messages[0]["content"]


def test_a_benchmark_without_datasets_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(C2CError, match=r"pip install 'c2c-mlx\[datasets\]'"):
        hub_tasks.read("gsm8k", "generate")


def test_a_benchmark_that_the_hub_has_otherwise_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No split of that name in one subset; and one without a question that can be asked."""
    rows = {"algebra": [{"error_type": "expert", "answer": 0}] * 2}

    def load_dataset(hub: str, subset: str, split: str) -> Any:
        if subset not in rows:
            raise ValueError(f'Unknown split "{split}". Should be one of ["train"].')
        return rows[subset]

    names = ["algebra", "law"]
    fake = SimpleNamespace(get_dataset_config_names=lambda hub: names, load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(C2CError, match=r'law, test from the hub \(Unknown split "test"'):
        hub_tasks.read("mmlu-redux", "generate")
    names.remove("law")
    with pytest.raises(C2CError, match="no question of edinburgh-dawg/mmlu-redux-2.0"):
        hub_tasks.read("mmlu-redux", "generate")


def test_chat_scores_without_sacrebleu_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(C2CError, match=r"pip install 'c2c-mlx\[eval\]'"):
        Reference()
