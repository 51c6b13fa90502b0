"""A page of answers: the same prompts in several languages, every mode's answer, nothing picked.

python benchmarks/answers.py docs/answers.md [--fuser FUSER]

Greedy, so everybody gets the same. The prompts were written down before the fuser was trained. What
stands in the page under the heading LIMITS was written by a person, and stays.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

from c2c_mlx import atomic
from c2c_mlx.commands import pair
from c2c_mlx.commands.status import Status
from c2c_mlx.evaluation.modes import Modes, Reading, write
from c2c_mlx.evaluation.task import Item
from c2c_mlx.talk import relay

MODES = ("receiver", "sharer", "relay", "c2c")
TOKENS = 48
LIMITS = "## What it cannot do\n"

# What is asked, and what that is in English.
PROMPTS = {
    "French": (
        ("Quelle est la capitale de l'Italie ?", "What is the capital of Italy?"),
        ("Pourquoi les chats dorment-ils autant ?", "Why do cats sleep so much?"),
        (
            "Écris un titre pour ceci : La vieille dame a donné toutes ses économies à l'école du "
            "village.",
            "Write a title for this: The old lady gave all her savings to the village school.",
        ),
        (
            "Traduis en anglais : Le train de nuit part à vingt heures.",
            "Translate to English: The night train leaves at eight in the evening.",
        ),
        (
            "Donne-moi trois conseils pour bien dormir.",
            "Give me three pieces of advice for sleeping well.",
        ),
    ),
    "Chinese": (
        ("太阳系中最大的行星是哪一颗？", "Which is the largest planet of the solar system?"),
        (
            "接下来会发生什么？小男孩打开了那个旧箱子。",
            "What happens next? The little boy opened the old box.",
        ),
        (
            "翻译成英语：明天我要和朋友去爬山。",
            "Translate to English: Tomorrow I will climb a mountain with a friend.",
        ),
        ("怎样才能保持健康？", "How does one stay healthy?"),
        ("为什么海水是咸的？", "Why is sea water salty?"),
    ),
    "German": (
        ("Wer hat Romeo und Julia geschrieben?", "Who wrote Romeo and Juliet?"),
        (
            "Fasse das zusammen: Der Bauer verkaufte sein Pferd, weil er Geld für ein neues Dach "
            "brauchte.",
            "Summarize this: The farmer sold his horse because he needed money for a new roof.",
        ),
        (
            "Übersetze ins Englische: Meine Schwester arbeitet in einem Krankenhaus.",
            "Translate to English: My sister works in a hospital.",
        ),
        ("Wie koche ich Nudeln?", "How do I cook noodles?"),
    ),
    "Spanish": (
        (
            "¿Cuál es el océano más grande del mundo?",
            "What is the largest ocean in the world?",
        ),
        ("¿Por qué es importante el agua?", "Why is water important?"),
        (
            "Escribe una frase que continúe esta: El perro salió corriendo hacia la puerta.",
            "Write a sentence that continues this one: The dog ran out towards the door.",
        ),
        (
            "Traduce al inglés: Mañana vamos a visitar a mis abuelos.",
            "Translate to English: Tomorrow we are going to visit my grandparents.",
        ),
    ),
    "Italian": (
        ("Qual è la capitale della Germania?", "What is the capital of Germany?"),
        ("Come si prepara una buona pizza?", "How does one make a good pizza?"),
        (
            "Traduci in inglese: Il gatto dorme sotto il tavolo.",
            "Translate to English: The cat sleeps under the table.",
        ),
    ),
    "Portuguese": (
        ("Que língua se fala no Brasil?", "Which language is spoken in Brazil?"),
        (
            "Escreva um título para isto: Os pescadores voltaram para casa sem nenhum peixe.",
            "Write a title for this: The fishermen came home without a single fish.",
        ),
        ("Por que as folhas caem no outono?", "Why do leaves fall in autumn?"),
    ),
    "Japanese": (
        ("日本の首都はどこですか？", "What is the capital of Japan?"),
        (
            "この文を英語に訳してください：彼女は毎朝公園を走ります。",
            "Please translate this sentence into English: She runs in the park every morning.",
        ),
        (
            "友達が病気です。何をしてあげればいいですか？",
            "My friend is ill. What can I do for them?",
        ),
    ),
    "English": (
        ("What is the capital of France?", ""),
        ("Quiz: Which planet is known as the Red Planet?", ""),
        ("Write a short poem about the sea.", ""),
    ),
}


def answers(modes: Modes, items: list[Item]) -> dict[str, list[str]]:
    """Per mode the answers, in order; a relay's begins with what the sharer wrote."""
    found = {}
    for mode in MODES:
        readings = modes.read(mode, items)
        good = [r for r in readings if isinstance(r, Reading)]
        written = iter(write(good, modes.max_tokens))
        found[mode] = [
            told(next(written).text, r) if isinstance(r, Reading) else f"*({r})*" for r in readings
        ]
        print(f"{mode}: {len(items)} answers", file=sys.stderr, flush=True)
    return found


def told(text: str, reading: Reading) -> str:
    """An answer as a table's cell holds it."""
    answer = cell(text) or "*(nothing)*"
    if not reading.relayed:
        return answer
    wrote, tokens = cell(reading.relayed.text), len(reading.relayed.ids)
    wrote = wrote or f"nothing: {relay.why_nothing(tokens)}"
    return f"*(the sharer wrote: {wrote})*<br>{answer}"


def cell(text: str) -> str:
    """Any text in one cell, as it is."""
    for plain, shown in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("*", "\\*")):
        text = text.replace(plain, shown)
    return "<br>".join(line for line in text.splitlines() if line.strip())


def page(found: dict[str, list[str]], about: str, limits: str) -> str:
    """All of the Markdown."""
    parts, n = [f"# Answers\n\n{about}"], 0
    for language, prompts in PROMPTS.items():
        parts.append(f"## {language}")
        for prompt, english in prompts:
            asked = f"**{cell(prompt)}**" + (f"<br>({cell(english)})" if english else "")
            rows = "".join(f"| {mode} | {found[mode][n]} |\n" for mode in MODES)
            parts.append(f"{asked}\n\n| | |\n| --- | --- |\n{rows}".rstrip())
            n += 1
    return "\n\n".join([*parts, limits])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    pair.add_arguments(parser)
    args = parser.parse_args()
    who = pair.parse(args)
    folders = pair.find_fusers(who)
    prompts = [prompt for of in PROMPTS.values() for prompt, _ in of]
    items = [
        Item(str(n), [{"role": "user", "content": prompt}]) for n, prompt in enumerate(prompts)
    ]
    with closing(Status(sys.stderr)) as status:
        loaded = pair.load(who, folders, len(folders), status, batch=len(items))
    modes = Modes(
        loaded.receiver, loaded.sharers, loaded.fusers, who.order, items, seed=0, max_tokens=TOKENS
    )
    named = "".join(f" --fuser {fuser}" for fuser in who.fusers)
    about = (
        f"{len(items)} prompts in {len(PROMPTS)} languages, and what {who.receiver} answers alone "
        f"(receiver), {who.sharers[0]} alone (sharer), the receiver behind a text of the sharer "
        f"(relay), and the receiver with the sharer's cache (c2c). Greedy, at most {TOKENS} "
        "tokens. The prompts were written before the fuser was trained, and no answer was picked "
        f"or mended: `python benchmarks/answers.py docs/answers.md{named}` makes this page."
    )
    old = args.page.read_text(encoding="utf-8") if args.page.exists() else ""
    limits = LIMITS + old.partition(LIMITS)[2]
    atomic.write_text(args.page, page(answers(modes, items), about, limits))


if __name__ == "__main__":
    main()
