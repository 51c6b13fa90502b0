"""The recipe `reading`: a fuser that lends understanding and knowledge, not translations alone.

`python -m c2c_mlx.training.recipes.make_reading DATA OUT` reads a folder with translation, german,
trivia and english, and writes OUT/PART/train.jsonl and valid.jsonl for each part of the mixture,
and what was dropped (OUT/dropped). Answers are the receiver's own, given once and kept in
OUT/answers.jsonl, so that an interrupted run continues. `measured` is what it is measured with.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from c2c_mlx.atomic import write_text
from c2c_mlx.training.recipes import frames, names, pack

Row = dict[str, Any]
Parts = dict[str, list[Row]]

TOKENS = {"reading": 40, "questions": 40, "english": 20}
VALID = {
    "reading": 64,
    "translation": 32,
    "sentences": 32,
    "english": 32,
    "trivia": 32,
    "conversations": 16,
}
WAVES = 2  # each of other texts, drawn and cleaned by itself: one more leaves these as they are
# Of the rows that could be made in a wave; answers take the receiver a quarter of a second each.
TAKEN = {"reading": 4200, "translation": 3000, "english": 868, "trivia": 1500}
FRAMED = 1800  # per language, in a frame that needs the content
BARE = 300  # per language, questions and statements as they are
TRANSLATIONS = 1600  # per language, in a dozen phrasings
SENTENCES = 5000  # per language, in the plainest three of these: more text, less variety
ENGLISH = 900
TWINS = 400  # prompts of `reading` in English
TRIVIA = 1500
CONVERSATIONS = 400
RECURS = 4  # an answer that begins like this many others says nothing about its sentence

_PHRASINGS = (
    re.compile(r"^Translate to English: (.*)$", re.S),
    re.compile(r"^What does this mean in English\?\n(.*)$", re.S),
    re.compile(r"^(.*)\n\nSay that in English\.$", re.S),
)
# Answered by the receiver as if it were meant, with "I'm sorry for your loss".
_PERSONAL = re.compile(r"\b(?:I|me|my|mine|myself|you|your|yours)\b")
_REFUSAL = re.compile(
    r"\b(?:I'm sorry|I am sorry|I apologi[sz]e|as an AI|as a (?:language|digital|chat)|I'm an AI|"
    r"I am an AI|AI (?:assistant|language)|I'm here to help|I don't have (?:personal|the ability|"
    r"enough|any)|I do not have|could you please|please provide|I'm (?:not able|unable)|"
    r"chatbot|"
    r"(?:I'm|I am) (?:happy|ready|glad) to|digital assistant|"
    r"SmolLM|Hugging Face|creative AI|(?:How|What) can I (?:help|assist)|"
    r"classic (?:example|trope)|logical fallacy|metaphorical|idiomatic)",
    re.I,
)


class Sentence(NamedTuple):
    """A foreign sentence and its English twin."""

    text: str
    english: str
    lang: str


def sentences(path: Path) -> list[Sentence]:
    """The pairs of a translation file, without the phrasing around them."""
    found = []
    for row in _lines(path):
        asked, said = (m["content"] for m in row["messages"])
        text = next(m[1] for p in _PHRASINGS if (m := p.match(asked)))
        found.append(Sentence(text.replace("\u202f", " ").strip(), said, row["lang"]))
    return found


def build(data: Path, wave: int = 0, used: Collection[str] = ()) -> tuple[Parts, Parts]:
    """All parts but the conversations, unanswered: to train on, and for validation.

    A row's `of` is the English text that it is made of; none that is in `used` is taken.
    """
    draw = random.Random(wave)
    held = {
        s.english for p in ("translation", "german") for s in sentences(data / p / "valid.jsonl")
    }
    pool: dict[str, list[Sentence]] = {"fr": [], "zh": []}
    seen: set[str] = held.union(used)
    for s in sentences(data / "translation" / "train.jsonl"):
        if s.english not in seen and s.text not in seen:
            seen |= {s.english, s.text}
            pool[s.lang].append(s)
    parts: Parts = {"reading": [], "translation": []}
    taken: set[str] = set()
    for lang, found in pool.items():
        draw.shuffle(found)
        questions = [s for s in found if s.english.endswith("?") and _words(s) >= 4]
        told = [s for s in found if is_told(s)]
        bare = questions[: BARE * 3 // 4] + told[: BARE // 4]
        framed = told[BARE // 4 :][:FRAMED]
        taken |= {s.text for s in bare + framed}
        rest = [s for s in found if s.text not in taken and _words(s) >= 4]
        parts["reading"] += [
            _row(s.text, answer_to=s.english, lang=lang, of=s.english) for s in bare
        ]
        for n, s in enumerate(framed):
            parts["reading"].append(_framed(frames.TRAINED[n % len(frames.TRAINED)], s, draw))
        for n, s in enumerate(rest[:TRANSLATIONS]):
            asked = _phrase(frames.TRANSLATE[n % len(frames.TRANSLATE)], s, draw, own=0.4)
            parts["translation"].append(_row(asked, s.english, lang=lang, of=s.english))
        taken |= {s.text for s in rest[:TRANSLATIONS]}
    prompts = [row["prompt"] for row in _lines(data / "english" / "prompts.jsonl")]
    short = [p for p in dict.fromkeys(prompts) if len(p) <= 240 and p not in seen]
    draw.shuffle(short)
    parts["english"] = [_row(p, own=True, of=p) for p in short[:ENGLISH]]
    parts["trivia"] = _trivia(data / "trivia" / "train.jsonl", draw, seen)
    for rows in parts.values():
        draw.shuffle(rows)
    valid = {name: rows[: VALID[name]] for name, rows in parts.items()}
    train = {name: rows[VALID[name] :][: TAKEN[name]] for name, rows in parts.items()}
    for some, held_out in ((train, False), (valid, True)):
        short_questions = names.asked(held_out) if wave == WAVES - 1 else []
        some["questions"] = [
            _row(text, answer_to=to, lang=lang, of=to) for lang, text, to in short_questions
        ]
        draw.shuffle(some["questions"])
    if wave == WAVES - 1:
        left = ([s for s in found if s.text not in taken][:SENTENCES] for found in pool.values())
        plain = [
            _row(frames.TRANSLATE[n % 3].en.format(s.text), s.english, lang=s.lang, of=s.english)
            for n, both in enumerate(zip(*left, strict=False))
            for s in both
        ]
        valid["sentences"] = plain[: VALID["sentences"]]
        train["sentences"] = plain[VALID["sentences"] :]
    return train, valid


def waves(data: Path) -> Iterator[tuple[Parts, Parts]]:
    """What `build` gives, wave after wave."""
    used: set[str] = set()
    for wave in range(WAVES):
        drawn = build(data, wave, used)
        used |= texts(drawn)
        yield drawn


def texts(drawn: tuple[Parts, Parts]) -> set[str]:
    """The English texts that a wave is made of."""
    return {row["of"] for parts in drawn for rows in parts.values() for row in rows}


def conversations(parts: Parts, seed: int, count: int) -> list[Row]:
    """Two and three turns of answered rows: foreign after English, English after foreign.

    The last turn wants the answer that it has as a first one: the receiver's own, to the English
    twin, or to the turn itself if that is English.
    """
    draw = random.Random(seed)
    reading = [r for r in parts["reading"] if len(r["messages"][0]["content"]) < 90]
    english = [r for r in parts["english"] if len(r["messages"][0]["content"]) < 90]
    kinds = [reading, english, parts["translation"]]
    rows = []
    for n in range(count):
        # The last turn: foreign, English, or a translation that is asked for.
        last = (0, 1, 0, 1, 2)[n % 5]
        before = [0 if last == 1 else 1] if n % 3 else [1, 0] if last else [0, 1]
        turns = [draw.choice(kinds[kind]) for kind in before]
        seen: list[dict[str, str]] = []
        for turn in turns:
            asked, said = turn["messages"]
            seen += [asked, {**said, "content": first_sentence(said["content"])}]
        end = draw.choice(kinds[last])
        more: Row = {key: end[key] for key in ("own", "cut", "lang") if key in end}
        rows.append({"messages": [*seen, *end["messages"]], **more})
    return rows


def informative(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Answered rows that are worth learning from, and those that are dropped.

    Dropped: refusals, answers that go round in circles, and those whose beginning many rows share,
    whatever their sentences say.
    """
    # What is asked in two languages has one answer.
    once = {json.dumps(row.get("answer_to", n)): row for n, row in enumerate(rows)}.values()
    beginnings = Counter(b for row in once if (b := _beginning(row)))
    whole = Counter(_said(row).lower() for row in once)
    kept: list[Row] = []
    dropped: list[Row] = []
    for row in rows:
        said = _said(row)
        generic = beginnings[_beginning(row)] >= RECURS or whole[said.lower()] > 1
        bad = len(said) < 2 or _REFUSAL.search(said) is not None or generic or _circles(said)
        bad = bad or any(c > "\u2fff" for c in said)  # not English, or half a character
        (dropped if bad else kept).append(row)
    return kept, dropped


def is_told(s: Sentence, words: int = 6) -> bool:
    """A statement about others, long enough to say something."""
    return not s.english.endswith("?") and _words(s) >= words and not _PERSONAL.search(s.english)


def first_sentence(text: str) -> str:
    """Up to a full stop, for what only leads up to the last turn."""
    found = re.match(r"(.{12,}?[.!?])(?:\s|$)", text, re.S)
    return found[1] if found else text


def _twin(row: Row) -> Row:
    messages = [{"role": "user", "content": row["answer_to"]}, row["messages"][-1]]
    cut = {"cut": True} if row.get("cut") else {}
    return {"messages": messages, "own": True, **cut}


def _framed(frame: frames.Frame, s: Sentence, draw: random.Random) -> Row:
    return _row(
        _phrase(frame, s, draw, own=0.35),
        answer_to=frame.en.format(s.english),
        lang=s.lang,
        of=s.english,
    )


def _phrase(frame: frames.Frame, s: Sentence, draw: random.Random, own: float) -> str:
    """The frame around the sentence, sometimes in the sentence's own language."""
    native: str = getattr(frame, s.lang)
    return (native if draw.random() < own else frame.en).format(s.text)


def _trivia(path: Path, draw: random.Random, used: Collection[str]) -> list[Row]:
    """Questions that can be asked without their choices; the answer is the right choice's text."""
    rows = []
    for item in _lines(path):
        right = item["choices"][item["answer"]]
        if item["question"] in used:
            continue
        if len(item["question"]) <= 160 and sum(map(len, item["choices"])) <= 120:
            if not re.search(r"\b(?:of these|of the above|none)\b", right, re.I):
                rows.append((item["question"], right))
    draw.shuffle(rows)
    plain = re.compile(r"\b(?:these|the following|none|above)\b", re.I)
    good = [(q, a) for q, a in rows if len(q) <= 120 and len(a) <= 40 and not plain.search(q + a)]
    return [
        _row(frames.QUIZ[n % len(frames.QUIZ)].format(question), right, of=question)
        for n, (question, right) in enumerate(good[:TRIVIA])
    ]


def _row(asked: str, said: str | None = None, **more: Any) -> Row:
    messages = [{"role": "user", "content": asked}]
    if said is not None:
        messages.append({"role": "assistant", "content": said})
    return {"messages": messages, **more}


def _words(s: Sentence) -> int:
    return len(s.english.split())


def _said(row: Row) -> str:
    said: str = row["messages"][-1]["content"]
    return said


def _beginning(row: Row) -> str:
    """The first six words."""
    words = re.findall(r"\w+", _said(row).lower())
    return " ".join(words[:6]) if len(words) >= 6 else ""


def _circles(text: str) -> bool:
    """Whether three words in a row come three times."""
    words = re.findall(r"\w+", text.lower())
    threes = Counter(zip(words, words[1:], words[2:], strict=False))
    return max(threes.values(), default=0) >= 3


def _lines(path: Path) -> Iterable[Any]:
    return [json.loads(x) for x in path.read_text(encoding="utf-8").split("\n") if x.strip()]


def write(path: Path, rows: list[Row]) -> None:
    """JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def answer(rows: list[Row], lm: Any, path: Path, max_tokens: int) -> list[Row]:
    """The rows with the receiver's answers; those that have one come back as they are."""
    from c2c_mlx.training.answers import answer_rows
    from c2c_mlx.training.files import ChatRow

    def asked(row: Row) -> ChatRow:
        to = row.get("answer_to")
        if isinstance(to, str):
            to = [{"role": "user", "content": to}]
        return ChatRow(row["messages"], own=row.get("own", False), answer_to=to)

    def progress(done: int, total: int) -> None:
        print(f"{done} of {total} answers", file=sys.stderr, flush=True)

    chats = answer_rows([asked(r) for r in rows], lm, path, max_tokens, False, progress)
    found = []
    for row, chat in zip(rows, chats, strict=True):
        new = {**row, "messages": chat.messages}
        if chat.cut:
            new["cut"] = True
        found.append(new)
    return found


def main(argv: list[str] | None = None) -> int:
    """Builds, answers, drops what is generic, and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--receiver", default="smollm2-135m")
    args = parser.parse_args(argv)
    from c2c_mlx.models.load import load_model

    lm = load_model(args.receiver)
    kept_answers = args.out / "answers.jsonl"
    made: dict[str, Parts] = {"train": {}, "valid": {}}
    for wave, drawn in enumerate(waves(args.data)):
        for split, parts, seed in (("train", drawn[0], 1), ("valid", drawn[1], 2)):
            for name in TOKENS:
                parts[name] = answer(parts[name], lm, kept_answers, TOKENS[name])
            # The same in English is the receiver's own to answer: the language tells them apart.
            twins = parts["reading"][: TWINS if split == "train" else VALID["english"] // 2]
            parts["english"] += [_twin(row) for row in twins]
            dropped = []
            for name in ("reading", "questions"):
                parts[name], more = informative(parts[name])
                dropped += more
            count = CONVERSATIONS if split == "train" else VALID["conversations"]
            parts["conversations"] = conversations(parts, 2 * wave + seed, count)
            for name, rows in {**parts, "dropped": dropped}.items():
                made[split].setdefault(name, []).extend(rows)
    for split, parts in made.items():
        for name, rows in parts.items():
            write(args.out / name / f"{split}.jsonl", rows)
        print(split, {name: len(rows) for name, rows in parts.items()})
    print(pack.pack(args.out, args.out / "packed", args.receiver), "bytes for the package")
    return 0


if __name__ == "__main__":
    sys.exit(main())
