"""The commands that README.md shows are commands that exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = {
    "c2c-chat": "chat",
    "c2c-train": "train",
    "c2c-eval": "evaluate",
    "c2c-serve": "serve",
    "c2c-study": "study",
    "c2c-weights": "weights",
    "c2c-doctor": "doctor",
}


def blocks(text: str) -> list[str]:
    """What stands in fenced sh blocks."""
    return re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Every c2c-* call in a fenced sh block, as arguments; pipes into one count as well."""
    found = []
    for block in blocks(README):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>")
            lexer.whitespace_split = True
            calls: list[list[str]] = [[]]
            for word in lexer:
                if set(word) <= set("|;&<>"):
                    calls.append([])
                else:
                    calls[-1].append(word)
            found += [call for call in calls if call and call[0].startswith("c2c-")]
    return found


def test_readme_shows_every_command() -> None:
    assert {call[0] for call in commands()} == set(MODULES)


@pytest.mark.parametrize("call", commands(), ids=shlex.join)
def test_readme_command_is_accepted(call: list[str]) -> None:
    parser = importlib.import_module(f"c2c_mlx.commands.{MODULES[call[0]]}")._parser()
    parser.parse_args(call[1:])  # SystemExit on a flag that does not exist


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/serving.md"])
def test_no_command_of_a_page_has_a_comment(page: str) -> None:
    # To zsh, typed into or pasted to, it is arguments, and an apostrophe in it an open quote.
    for block in blocks((ROOT / page).read_text(encoding="utf-8")):
        assert not re.search(r"(^|\s)#", block)


@pytest.mark.parametrize("module", MODULES.values())
def test_no_example_of_a_command_has_a_comment(module: str) -> None:
    parser = importlib.import_module(f"c2c_mlx.commands.{module}")._parser()
    assert not re.search(r"\s#", parser.format_help())


@pytest.mark.pair
def test_readme_example_answers(capsys: pytest.CaptureFixture[str]) -> None:
    from c2c_mlx.commands import chat
    from c2c_mlx.models import registry
    from c2c_mlx.models.embedded import install

    if not install.is_installed(registry.default_pair()[0]):
        pytest.skip("the embedded pair is not in the cache; `c2c-chat` puts it there")
    question = "What is the capital of France?"
    code = chat.main(["--mode", "receiver", "--max-tokens", "12", "--prompt", question])
    assert code == 0
    assert "Paris" in capsys.readouterr().out
