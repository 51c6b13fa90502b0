"""The recipe `reading` from a small folder: nothing leaks or is generic, all is repeatable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from c2c_mlx.evaluation.fact import says
from c2c_mlx.training.recipes import facts, frames, make_reading, measured, names
from c2c_mlx.training.recipes.make_reading import Row, build, conversations, informative, sentences


def pair(n: int, lang: str, phrasing: str = "Translate to English: {}") -> Row:
    """A row as it stands in the project's text."""
    asked = phrasing.format(f"Phrase numéro {n} en {lang}.")
    said = f"The old farmer number {n} sold horses in {lang}."
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"messages": messages, "lang": lang}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder laid out like the project's text; the first valid sentence is in train, too."""
    train = [pair(n, lang) for lang in ("fr", "zh") for n in range(300)]
    held = [pair(n, lang) for lang in ("fr", "zh") for n in (0, 900, 901)]
    quiz = [
        {"question": f"Who was {n}?", "choices": ["Ann", "Bob"], "answer": n % 2} for n in range(80)
    ]
    quiz.append({"question": "Which of these?", "choices": ["Eve", "Bob"], "answer": 0})
    write(tmp_path / "translation" / "train.jsonl", train)
    write(tmp_path / "translation" / "valid.jsonl", held)
    write(tmp_path / "german" / "valid.jsonl", [pair(n, "de") for n in (902, 903)])
    write(tmp_path / "trivia" / "train.jsonl", quiz)
    write(tmp_path / "trivia" / "valid.jsonl", [{**quiz[0], "question": "Who is it?"}] * 9)
    prompts = [{"prompt": f"Is {n} even?"} for n in range(2000)]
    write(tmp_path / "english" / "prompts.jsonl", prompts)
    return tmp_path


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_sentence_is_found_in_every_phrasing(tmp_path: Path) -> None:
    phrasings = ("Translate to English: {}", "What does this mean in English?\n{}")
    rows = [pair(1, "fr", p) for p in (*phrasings, "{}\n\nSay that in English.")]
    write(tmp_path / "f.jsonl", rows)
    assert {s.text for s in sentences(tmp_path / "f.jsonl")} == {"Phrase numéro 1 en fr."}


def test_no_held_out_sentence_or_frame_is_trained(data: Path) -> None:
    train, valid = build(data)
    everything = json.dumps([train, valid], ensure_ascii=False)
    for n in (0, 900, 901, 902, 903):
        assert f"number {n} " not in everything
    for frame in frames.HELD_OUT:
        assert frame not in {f.en for f in frames.TRAINED}
    assert "these" not in json.dumps(train["trivia"] + valid["trivia"])


def test_what_is_measured_is_not_trained(data: Path) -> None:
    used = measured.used(data)
    assert used == of(*build(data), *build(data, 1, of(*build(data))))
    read = measured.reading(data)
    assert {row["lang"] for row in read} == {
        f"{lang} {kind}" for lang in ("fr", "zh", "de") for kind in ("trained", "new")
    }
    trained = {frame.en for frame in frames.TRAINED}
    for row in read:
        assert (row["frame"] in trained) == row["lang"].endswith(" trained")
        before, after = row["frame"].split("{}")
        twin = row["answer_to"]
        assert twin[len(before) : len(twin) - len(after)] not in used
        assert row["messages"][0]["content"].startswith(f"{before}Phrase")
    plain = [row["messages"][0]["content"] for row in measured.english(data, read)]
    assert len(plain) >= measured.ENGLISH and not used & set(plain)
    assert set(plain) & {row["answer_to"] for row in read}
    assert [row["lang"] for row in measured.translation(data, 2)] == ["fr"] * 2 + ["zh"] * 2 + [
        "de"
    ] * 2
    quiz = [row["question"] for row in measured.trivia(data)]
    assert len(set(quiz)) == len(frames.QUIZ) and all("Who is it?" in q for q in quiz)


def test_no_fact_stands_in_its_question() -> None:
    asked, in_english = measured.facts()
    assert len(asked) == 4 * len(in_english) == len({row["prompt"] for row in asked})
    assert len(facts.FACTS) == 25 and len(facts.CAPITALS) == 20
    for row in asked + in_english:
        assert not [text for text in row["accept"] if says(row["prompt"], text)]


def test_no_fact_or_held_out_name_is_asked_of_a_run(data: Path) -> None:
    taught, kept = names.asked(), names.asked(held_out=True)
    assert len(taught) > 20 * len(kept) > 0
    measured_with = {row["prompt"] for rows in measured.facts() for row in rows}
    for lang, asked, english in taught + kept:
        assert not {asked, english} & measured_with
        assert lang in ("fr", "zh") and asked != english and "|" not in asked + english
    assert not {english for *_, english in taught} & {english for *_, english in kept}
    last = build(data, make_reading.WAVES - 1)
    assert [len(part["questions"]) for part in last] == [len(taught), len(kept)]
    assert not build(data)[0]["questions"]  # an earlier wave stays what it was


def test_a_set_has_all_its_answers_as_choices() -> None:
    def row(n: int, frame: str) -> Row:
        said = answered(f"Answer {n} " + "and more " * 20)["messages"]
        return {"messages": said, "answer_to": f"English {n}", "lang": "fr new", "frame": frame}

    rows = [row(n, "ab"[n % 2]) for n in range(2 * measured.SET + 1)] + [row(99, "c")]
    foreign, english = measured.content(rows)
    assert len(foreign) == len(english) == 2 * measured.SET
    for n, (asked, twin) in enumerate(zip(foreign, english, strict=True)):
        number = twin["question"].removeprefix("English ")
        assert asked["choices"][asked["answer"]].startswith(f"Answer {number} and")
        assert asked["answer"] == n % measured.SET and asked["choices"] == twin["choices"]
        assert all(len(text.split()) == measured.WORDS for text in asked["choices"])


def test_what_reading_could_give_is_the_answers_own_prompt() -> None:
    said = {"role": "assistant", "content": "It is blue."}
    asked = {"role": "user", "content": "Title: le ciel est bleu"}
    row = {"messages": [asked, said], "answer_to": "Title: the sky is blue", "lang": "fr new"}
    assert measured.reading_english([row]) == [
        {"prompt": "Title: the sky is blue", "completion": "It is blue.", "lang": "fr new"}
    ]


def test_measured_conversations_turn_from_one_language_to_the_other() -> None:
    def row(asked: str, **more: Any) -> Row:
        said = {"role": "assistant", "content": f"Answer to {asked}, at length. And more."}
        return {"messages": [{"role": "user", "content": asked}, said], **more}

    foreign = [row(f"Oui {n} ?", answer_to=f"Yes {n}?", lang="fr new") for n in range(9)]
    rows = measured.conversations(foreign, [row(f"No {n}?") for n in range(9)])
    assert {r["lang"] for r in rows} == {"fr after English", "English after fr"}
    assert {len(r["messages"]) for r in rows} == {3, 5}
    assert sum(r["lang"].startswith("English") for r in rows) == measured.TURNED
    for r in rows:
        said = [m["content"] for m in r["messages"]]
        assert [m["role"] for m in r["messages"]] == [m["role"] for m in r["answer_to"]]
        assert said[-1].startswith("Oui" if r["lang"].startswith("fr") else "No")
        assert said[-3].startswith("No" if r["lang"].startswith("fr") else "Oui")
        assert [m["content"] for m in r["answer_to"][::2]] == [
            text.replace("Oui", "Yes").replace(" ?", "?") for text in said[::2]
        ]
        assert r["messages"][1]["content"].endswith("at length.")  # what leads up is short


def test_the_parts_do_not_overlap_and_come_out_the_same_again(data: Path) -> None:
    train, valid = build(data)
    assert (train, valid) == build(data)
    for name, rows in train.items():
        assert not [row for row in rows if row in valid[name]]
    assert all(row["own"] for row in train["english"])
    assert not any("own" in row for row in train["reading"] + train["trivia"])
    assert all("Phrase" not in row["answer_to"] for row in train["reading"])


def of(*several: make_reading.Parts) -> set[str]:
    return {row["of"] for parts in several for rows in parts.values() for row in rows}


def test_a_wave_takes_other_texts_and_leaves_those_before_it_alone(data: Path) -> None:
    first = of(*build(data))
    train, valid = build(data, 1, first)
    assert train["english"] and not of(train, valid) & first
    assert of(*build(data)) == first


def test_the_last_wave_translates_what_nothing_else_took(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_reading, "FRAMED", 20)
    monkeypatch.setattr(make_reading, "TRANSLATIONS", 30)
    first, last = make_reading.waves(data)
    assert "sentences" not in first[0]
    train, valid = (parts.pop("sentences") for parts in last)
    assert {row["lang"] for row in train} == {row["lang"] for row in valid} == {"fr", "zh"}
    taken = of(*first, *last)
    for row in train + valid:
        asked, said = (m["content"] for m in row["messages"])
        assert said == row["of"] and said not in taken and not said.startswith("Phrase")
        assert any(p.match(asked) for p in make_reading._PHRASINGS)
    assert len({row["of"] for row in train + valid}) == len(train + valid)


def answered(text: str) -> Row:
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry for any misunderstanding.",
        "As an AI, no.",
        "It is red, so red, it is red, so red, it is red, so red.",
        "彼は",
        "!",
    ],
)
def test_a_generic_answer_is_dropped(text: str) -> None:
    good = answered("The farmer sells his horse at the market.")
    assert informative([answered(text), good]) == ([good], [answered(text)])


def test_answers_that_begin_alike_are_dropped() -> None:
    alike = [answered(f"The speaker feels a mix of things about {n}.") for n in range(4)]
    assert informative(alike) == ([], alike)
    assert informative(alike[:3]) == (alike[:3], [])


def test_an_answer_to_a_question_in_two_languages_is_one_answer() -> None:
    twice = [
        answered(f"The speaker feels a mix of things about {n}.") | {"answer_to": f"Who is {n}?"}
        for n in (0, 0, 1, 1, 2, 2)
    ]
    assert informative(twice) == (twice, [])


def test_conversations_mix_languages_and_keep_whose_answer_it_is() -> None:
    def row(asked: str, **more: Any) -> Row:
        return {**answered(f"Answer to {asked}, at length. And more."), **more} | {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": f"Answer to {asked}, at length. And more."},
            ]
        }

    parts = {
        "reading": [row("Oui ?", answer_to="Yes?", lang="fr", cut=True)],
        "english": [row("No?", own=True)],
        "translation": [row("Traduis : non", lang="fr")],
    }
    rows = conversations(parts, 0, 30)
    assert {len(r["messages"]) for r in rows} == {4, 6}
    for r in rows:
        asked = [m["content"] for m in r["messages"] if m["role"] == "user"]
        assert len(set(asked)) > 1
        assert r.get("own", False) == (asked[-1] == "No?")
        assert r.get("cut", False) == (asked[-1] == "Oui ?")
        assert r["messages"][1]["content"].endswith("at length.")  # what leads up is short


def test_frames_have_one_place_for_the_sentence() -> None:
    for frame in (*frames.TRAINED, *frames.TRANSLATE, *names.OF_PLACES, *names.OF_THINGS):
        assert all(text.count("{}") == 1 for text in frame)
    assert all(text.count("{}") == 1 for text in (*frames.HELD_OUT, *frames.QUIZ))
