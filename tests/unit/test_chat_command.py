"""c2c-chat as a user meets it: what it prints, and what a mistake costs."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from c2c_mlx.commands import chat, evaluate, train, weights
from c2c_mlx.talk import decode

TINY = Path(__file__).parents[1] / "golden" / "data" / "e2e" / "qwen3_llama"
PAIR = ["--sharer", str(TINY / "sharer"), "--receiver", str(TINY / "receiver")]


@pytest.fixture
def call(capsys, monkeypatch):
    def call(*arguments: str, stdin: str = "", main=chat.main) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "-"], "the prompt is empty"),
        (["--prompt", "hi", "--mode", "telepathy"], "must be of c2c, relay"),
        (["--prompt", "hi", "--temp", "-1"], "temp must not be negative"),
        (["--prompt", "hi", "--receiver", "nobody"], "unknown model 'nobody'"),
        (["--prompt", "hi", "--fuser", "no/such/folder"], "no fuser 'no/such/folder'"),
        (["--prompt", "hi", "--fuser", "~nobody99/x"], "no fuser '~nobody99/x'"),
        (["--prompt", "hi", *PAIR], "c2c-train --sharer"),
        (["--prompt", "hi " * 3000, "--mode", "receiver", *PAIR], "reads at most"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(call, arguments, words):
    code, out, err = call(*arguments)
    assert code == 2
    assert words in err and err.startswith("c2c-chat: ") and err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize("main", [chat.main, evaluate.main, train.main, weights.main])
@pytest.mark.parametrize("arguments", [["--nonsense"], ["--seed", "many"], ["show"]])
def test_a_mistake_among_the_arguments_is_one_line(capsys, main, arguments):
    with pytest.raises(SystemExit) as e:
        raise SystemExit(main(arguments))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("c2c-") and err.count("\n") == 1


def test_a_folder_without_config_is_one_line(call, tmp_path):
    code, _, err = call("--prompt", "hi", "--mode", "receiver", "--receiver", str(tmp_path))
    assert code == 2 and "config.json" in err and err.count("\n") == 1


def test_a_fuser_for_another_pair_names_both_sides(call, tmp_path):
    from c2c_mlx import Fuser
    from c2c_mlx.config import FuserConfig, ModelShape

    shapes = ModelShape("other", 3, 2, 8), ModelShape("another", 3, 2, 8)
    Fuser(FuserConfig(*shapes, ((0, 0),), hidden_dim=4, intermediate_dim=4)).save(tmp_path / "f")
    code, _, err = call("--prompt", "hi", *PAIR, "--fuser", str(tmp_path / "f"))
    assert code == 2 and "other (3 layers" in err and err.count("\n") == 1


def test_json_has_an_object_per_mode_and_nothing_else(call):
    modes = ["relay", "receiver", "sharer"]
    code, out, _ = call(
        *PAIR, "--mode", ",".join(modes), "--json", "--max-tokens", "4", stdin="the quick"
    )
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["mode"] for r in records] == modes
    wanted = {"text", "prompt_tokens", "generated_tokens", "first_token_s", "total_s"}
    assert all(wanted <= r.keys() for r in records)
    assert "relayed_text" in records[0] and "relayed_text" not in records[1]


@pytest.fixture
def mute(tmp_path):
    """A folder of the sharer, of which any token ends a turn."""
    folder = Path(shutil.copytree(TINY / "sharer", tmp_path / "mute"))
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"eos_token_id": list(range(512))}))
    return str(folder)


def test_a_relay_without_a_text_says_why(call, mute, tmp_path):
    pair = ["--sharer", mute, "--receiver", str(TINY / "receiver"), "--mode", "relay"]
    why = "the sharer wrote nothing: it ended at once"
    code, out, err = call(*pair, "--max-tokens", "4", "--prompt", "Who?")
    assert code == 0 and err == f"c2c-chat: relay: {why}\n" and why not in out
    _, out, err = call(*pair, "--max-tokens", "4", "--json", "--prompt", "Who?")
    assert json.loads(out)["relayed_text"] == "" and why in err
    _, out, _ = call("--plain", *pair, "--max-tokens", "4", stdin="Who?")
    assert f"({why})\n" in out
    (tmp_path / "task.jsonl").write_text('{"prompt": "Who?"}\n')
    pair += ["--task", str(tmp_path / "task.jsonl"), "--max-tokens", "4"]
    code, out, err = call(*pair, main=evaluate.main)
    assert code == 0, err
    assert "relay's text is empty for 1 of 1 items: 1 x it ended at once." in out


def test_a_conversation_line_by_line(call, tmp_path):
    saved = tmp_path / "chat.json"
    lines = ["Who wrote it?", "/mode sharer", "And when?", "/nonsense", f"/save {saved}", "/help"]
    code, out, err = call(
        "--plain", *PAIR, "--mode", "receiver,relay", "--max-tokens", "4", stdin="\n".join(lines)
    )
    assert code == 0 and "/sharer; /help says" in err
    assert out.count("s to the first token") == 3 and "[relay]\n(sharer: " in out
    assert "/nonsense is no command" in out and "/reset" in out
    history = json.loads(saved.read_text())
    assert [len(history[mode]) for mode in ("receiver", "relay", "sharer")] == [2, 4, 2]


def test_the_home_of_nobody_is_a_folder_like_any_other(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ["Who wrote it?", "/save ~nobody99/chat.json", "And when?"]
    code, out, _ = call(
        *("--plain", *PAIR, "--mode", "sharer", "--max-tokens", "4"), stdin="\n".join(lines)
    )
    assert code == 0 and out.count("s to the first token") == 2
    assert len(json.loads((tmp_path / "~nobody99/chat.json").read_text())["sharer"]) == 2


@pytest.mark.parametrize(
    ("begun", "wanted"), [("receiver", "sharer,receiver"), ("receiver,relay", "sharer,c2c")]
)
def test_a_mode_whose_models_were_not_loaded_is_refused(call, begun, wanted):
    lines = [f"/mode {wanted}", "Who wrote it?"]
    pair = [*PAIR, "--mode", begun, "--max-tokens", "2"]
    code, out, _ = call("--plain", *pair, stdin="\n".join(lines))
    assert code == 0 and f"was not loaded: start again with --mode {wanted}\n" in out
    assert out.count("s to the first token") == len(begun.split(","))  # as before


def test_a_byte_that_is_no_utf_8_costs_its_line_alone(call, monkeypatch):
    lines = io.BytesIO(b"/help\ncaf\xe9\n/nonsense\n")
    monkeypatch.setattr(io, "StringIO", lambda _: io.TextIOWrapper(lines, "utf-8"))
    code, out, _ = call("--plain", *PAIR, "--mode", "receiver")
    assert code == 0 and out.index("/reset") < out.index("> this line is not UTF-8 text\n")
    assert "/nonsense is no command" in out


@pytest.mark.parametrize("flag", ["--prompt", "--system"])
def test_an_argument_that_is_no_utf_8_is_one_line(call, flag):
    code, out, err = call("--prompt", "Who?", *PAIR, flag, "caf\udce9")
    assert code == 2 and "is not UTF-8 text" in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("[malloc] Unable to allocate 7 bytes.", "out of memory ([malloc]"),
        ("[METAL] Command buffer execution failed: Internal Error", "macOS interrupted the GPU ("),
    ],
)
def test_a_failing_device_is_told_and_the_conversation_goes_on(call, monkeypatch, error, words):
    class Full:
        """A machine that fails at the first answer, as if it had no memory for it."""

        answers, is_full = decode.stream_generate, True

        def __call__(self, *args, **options):
            if self.is_full:
                self.is_full = False
                raise RuntimeError(error)
            return type(self).answers(*args, **options)

    monkeypatch.setattr(decode, "stream_generate", Full())
    pair = [*PAIR, "--mode", "receiver", "--max-tokens", "2"]
    code, out, _ = call("--plain", *pair, stdin="Who wrote it?\nAnd when?")
    assert code == 0 and out.startswith(f"> {words}")
    assert out.count("s to the first token") == 1


@pytest.fixture
def on_terminal(monkeypatch):
    screen, line = pty.openpty()

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return line

    def on_terminal(*arguments: str, typed: str = "") -> tuple[int, str, str]:
        for name, text in (("stdin", typed), ("stdout", ""), ("stderr", "")):
            monkeypatch.setattr(sys, name, Screen(text))
        return chat.main(list(arguments)), sys.stdout.getvalue(), sys.stderr.getvalue()

    yield on_terminal
    os.close(screen)
    os.close(line)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plain", "--json"], "--json is for single answers"),
        (["--json"], "--json is for single answers"),
        (["--crossed"], "in the app F9"),
    ],
)
def test_what_has_no_meaning_is_refused(on_terminal, arguments, words):
    code, out, err = on_terminal(*arguments)
    assert code == 2 and words in err and err.count("\n") == 1 and out == ""


def test_a_terminal_that_can_show_no_app_has_a_conversation_line_by_line(on_terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    pair = [*PAIR, "--mode", "receiver", "--max-tokens", "2"]
    code, out, _ = on_terminal(*pair, typed="Who?\n")
    assert code == 0 and "s to the first token" in out


def test_ctrl_c_stops_all_answers_and_the_conversation_goes_on(monkeypatch, tmp_path):
    class Terminal(io.StringIO):
        """Ctrl-C is pressed at the first piece of the first answer."""

        begun = pressed = False

        def write(self, text: str) -> int:
            if self.begun and text and not self.pressed:
                self.pressed = True
                signal.raise_signal(signal.SIGINT)
            self.begun = self.begun or "[sharer]" in text
            return super().write(text)

    saved = tmp_path / "chat.json"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Who wrote it?\n/save {saved}\n"))
    monkeypatch.setattr("sys.stdout", screen := Terminal())
    code = chat.main(["--plain", *PAIR, "--mode", "sharer,receiver", "--max-tokens", "9"])
    assert code == 0 and screen.pressed
    assert "(stopped)" in screen.getvalue() and "[receiver]" not in screen.getvalue()
    assert set(json.loads(saved.read_text())) <= {"sharer"}


def test_training_ends_with_a_fuser_that_chat_uses_and_resumes(call, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    row = {"prompt": "the quick", "completion": "brown fox"}
    (data / "train.jsonl").write_text((json.dumps(row) + "\n") * 20)
    common = [
        *PAIR,
        "--data",
        str(data),
        "--out",
        str(out),
        "--preset",
        "tiny",
        "--save-every",
        "2",
    ]
    assert call(*common, "--iters", "2", main=train.main)[0] == 0
    reports = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "tokens", "gates_open", "tokens_per_s"} <= reports[0].keys()
    assert call(*common, "--iters", "4", main=train.main)[0] == 2  # a run is never overwritten
    assert call(*common, "--iters", "4", "--resume", main=train.main)[0] == 0
    code, text, _ = call(*PAIR, "--fuser", str(out), "--prompt", "the quick", "--json")
    assert code == 0 and json.loads(text)["gates_open"] > 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "is empty"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "a"}', "--answer-with has rows"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the last message must be"),
    ],
)
def test_a_broken_data_file_is_named(call, tmp_path, line, words):
    (tmp_path / "train.jsonl").write_text(line)
    code, _, err = call(
        *PAIR, "--data", str(tmp_path), "--out", str(tmp_path / "run"), main=train.main
    )
    assert code == 2 and words in err and err.count("\n") == 1


@pytest.fixture
def with_fuser(tiny_pair):
    return [*PAIR, "--fuser", tiny_pair.fusers[0], "--max-tokens", "6", "--prompt", "who wrote it"]


def test_crossed_is_one_figure_per_token_of_c2c(call, with_fuser):
    code, out, _ = call(*with_fuser, "--mode", "c2c,receiver", "--json", "--crossed")
    c2c, receiver = map(json.loads, out.splitlines())
    assert code == 0 and "crossed" not in receiver
    texts, nats = zip(*c2c["crossed"], strict=True)
    assert len(texts) == c2c["generated_tokens"] and "".join(texts).strip() == c2c["text"]
    assert any(nats) and all(isinstance(n, float) for n in nats)
    code, out, _ = call(*with_fuser, "--json")
    assert "crossed" not in json.loads(out)


def test_crossed_marks_words(call, with_fuser, monkeypatch):
    plain = call(*with_fuser)[1]
    monkeypatch.setattr(chat, "MARKED_NATS", 0.0)
    marked = call(*with_fuser, "--crossed")[1]
    assert re.search(r"\[[+-]\d+\.\d\]", marked)
    assert re.sub(r"\[[+-]\d+\.\d\]", "", marked) == plain
    monkeypatch.setattr(chat, "MARKED_NATS", 99.0)
    assert call(*with_fuser, "--crossed")[1] == plain
