"""What a fuser of the recipe `reading` is measured with, of text that no run has seen.

`python -m c2c_mlx.training.recipes.measured DATA OUT` reads the folder that `make_reading` reads,
and writes files for `c2c-eval`: reading, content, translation, conversations, facts, trivia and
english; those whose names end in -english are the same in English, which the receiver can read. Its
answers to that are the references, and are kept in OUT/answers.jsonl.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from c2c_mlx.training.files import read_objects
from c2c_mlx.training.recipes import frames, make_reading
from c2c_mlx.training.recipes.facts import CAPITALS, FACTS
from c2c_mlx.training.recipes.make_reading import Row

LANGUAGES = ("fr", "de", "zh", "es")  # of facts
PER_FRAME = 20  # prompts that are answered; generic answers are dropped of these, too
SET = 8  # prompts of one frame, each with the answers of all
WORDS = 12  # of each of these answers
TURNED = 50  # conversations that end with a foreign turn, and as many that end in English
ENGLISH = 60
TOKENS = {"reading": 40, "english": 20, "conversations": 24}
_TRAINED = (frames.TRAINED[1].en, frames.TRAINED[4].en, frames.TRAINED[9].en)
_NEW = frames.HELD_OUT[:3]


def used(data: Path) -> set[str]:
    """The English texts that the recipe is made of."""
    return set().union(*map(make_reading.texts, make_reading.waves(data)))


def facts() -> tuple[list[Row], list[Row]]:
    """Facts and capitals in each of LANGUAGES, and in English."""
    asked = [
        {"prompt": getattr(fact, lang), "accept": list(fact.accept), "lang": f"{lang} {kind}"}
        for kind, some in (("facts", FACTS), ("capitals", CAPITALS))
        for lang in LANGUAGES
        for fact in some
    ]
    english = [
        {"prompt": fact.en, "accept": list(fact.accept), "lang": f"en {kind}"}
        for kind, some in (("facts", FACTS), ("capitals", CAPITALS))
        for fact in some
    ]
    return asked, english


def trivia(data: Path) -> list[Row]:
    """Held-out questions as the recipe asks them, so that they are told from chat.

    Bare English questions are the receiver's own to answer: there the message gate is to stay shut.
    """
    items = read_objects(data / "trivia" / "valid.jsonl")
    return [
        {**item, "question": frames.QUIZ[n % len(frames.QUIZ)].format(item["question"])}
        for n, (_, item) in enumerate(items)
    ]


def reading(data: Path, seed: int = 3) -> list[Row]:
    """Prompts that need what their sentences say, half of them in frames that are never trained.

    Returns:
        Rows to be answered, many of each `frame`; `lang` is the language, and "trained" or "new".
    """
    draw = random.Random(seed)
    rows = []
    for lang, found in _held_out(data).items():
        told = [s for s in found if make_reading.is_told(s, 4)]
        for frame in (*_TRAINED, *_NEW):
            group = f"{lang} {'new' if frame in _NEW else 'trained'}"
            for s in draw.sample(told, min(PER_FRAME, len(told))):
                asked, to = _asked(frame.format(s.text)), frame.format(s.english)
                rows.append({**asked, "answer_to": to, "lang": group, "frame": frame})
    return rows


def reading_english(answered: list[Row]) -> list[Row]:
    """The prompts that the answers of `reading` were given to: what reading could give at most."""
    return [
        {"prompt": r["answer_to"], "completion": r["messages"][-1]["content"], "lang": r["lang"]}
        for r in answered
    ]


def translation(data: Path, per_language: int) -> list[Row]:
    """Sentences to be put into English, in a phrasing that is trained."""
    return [
        {"prompt": f"Translate to English: {s.text}", "completion": s.english, "lang": lang}
        for lang, found in _held_out(data).items()
        for s in found[:per_language]
    ]


def english(data: Path, twins: list[Row], seed: int = 3) -> list[Row]:
    """English prompts that the recipe does not use, and English twins of `reading`."""
    taken = used(data)
    prompts = [row["prompt"] for _, row in read_objects(data / "english" / "prompts.jsonl")]
    rest = [p for p in dict.fromkeys(prompts) if p not in taken and len(p) <= 240]
    random.Random(seed).shuffle(rest)
    shared = twins[:: max(len(twins) // (ENGLISH // 3), 1)]
    return [_asked(p) for p in (*rest[:ENGLISH], *(r["answer_to"] for r in shared))]


def content(answered: list[Row]) -> tuple[list[Row], list[Row]]:
    """Sets of prompts that share a frame and a language; the choices of each are all its answers.

    Returns:
        Multiple choice whose right answer is the one given to the prompt's English twin, and the
        same asked in English. A set's rows follow each other.
    """
    sets: dict[tuple[str, str], list[Row]] = {}
    for row in answered:
        sets.setdefault((row["lang"], row["frame"]), []).append(row)
    foreign, english = [], []
    for (lang, _), rows in sets.items():
        if len(rows) < SET:
            continue
        answers = [row["messages"][-1]["content"] for row in rows[:SET]]
        choices = [" ".join(answer.split()[:WORDS]) for answer in answers]
        for n, row in enumerate(rows[:SET]):
            more = {"choices": choices, "answer": n, "lang": lang}
            foreign.append({"question": row["messages"][0]["content"], **more})
            english.append({"question": row["answer_to"], **more})
    return foreign, english


def conversations(foreign: list[Row], plain: list[Row], seed: int = 5) -> list[Row]:
    """Two and three turns: a foreign one after an English one, and the reverse; unanswered.

    The reference is to be the receiver's own answer to the same conversation in English.

    Args:
        foreign: answered, with their English twins.
        plain: English, answered.
        seed: of what is drawn.
    """
    draw = random.Random(seed)
    foreign, plain = (
        [r for r in rows if len(r["messages"][0]["content"]) < 90] for rows in (foreign, plain)
    )
    ends_foreign = ([plain, foreign], [foreign, plain, foreign])
    ends_english = ([foreign, plain], [plain, foreign, plain])
    rows = []
    for n in range(3 * TURNED):  # of those that end with a foreign turn some will be dropped
        kinds = (ends_foreign if n % 3 < 2 else ends_english)[n // 3 % 2]
        turns = [draw.choice(rows) for rows in kinds]
        seen: list[dict[str, str]] = []
        twin: list[dict[str, str]] = []
        for turn in turns:
            asked, said = turn["messages"]
            said = {**said, "content": make_reading.first_sentence(said["content"])}
            seen += [asked, said]
            twin += [{**asked, "content": turn.get("answer_to", asked["content"])}, said]
        lang = next(turn["lang"].split()[0] for turn in reversed(turns) if "lang" in turn)
        group = f"{lang} after English" if n % 3 < 2 else f"English after {lang}"
        rows.append({"messages": seen[:-1], "answer_to": twin[:-1], "lang": group})
    return rows


def some_of_each(rows: list[Row], count: int) -> list[Row]:
    """The first so many of every `lang`."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["lang"], []).append(row)
    return [row for some in found.values() for row in some[:count]]


def _held_out(data: Path) -> dict[str, list[make_reading.Sentence]]:
    """Per language, German included, which no run has seen a word of."""
    found: dict[str, list[make_reading.Sentence]] = {}
    for part in ("translation", "german"):
        for s in make_reading.sentences(data / part / "valid.jsonl"):
            found.setdefault(s.lang, []).append(s)
    return found


def _asked(prompt: str) -> Row:
    return {"messages": [{"role": "user", "content": prompt}]}


def main(argv: list[str] | None = None) -> int:
    """Draws, has the receiver answer what is in English, and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--receiver", default="smollm2-135m")
    parser.add_argument("--per-group", type=int, default=30, help="of each language and frame kind")
    args = parser.parse_args(argv)
    from c2c_mlx.models.load import load_model

    args.out.mkdir(parents=True, exist_ok=True)
    lm, kept = load_model(args.receiver), args.out / "answers.jsonl"

    def answered(name: str, rows: list[Row]) -> list[Row]:
        return make_reading.answer(rows, lm, kept, TOKENS[name])

    def written(**parts: list[Row]) -> None:
        for name, rows in parts.items():
            path = args.out / f"{name.replace('_', '-')}.jsonl"
            make_reading.write(path, rows)
            print(path, len(rows), flush=True)

    written(trivia=trivia(args.data), translation=translation(args.data, 2 * args.per_group))
    asked, in_english = facts()
    written(facts=asked, facts_english=in_english)
    good = make_reading.informative(answered("reading", reading(args.data)))[0]
    read = some_of_each(good, args.per_group)
    sets, in_english = content(good)
    written(reading=read, reading_english=reading_english(read))
    written(content=sets, content_english=in_english)
    plain = english(args.data, read)
    written(english=plain)
    plain = answered("english", plain)
    talked = answered("conversations", conversations(read, plain))
    ends_english = [row for row in talked if row["lang"].startswith("English")]
    ends_foreign = [row for row in talked if row not in ends_english]
    ends_foreign = make_reading.informative(ends_foreign)[0]
    written(conversations=ends_foreign[:TURNED] + ends_english[:TURNED])
    return 0


if __name__ == "__main__":
    sys.exit(main())
