"""c2c-eval as a user meets it: results, interruptions, and what a mistake costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import pytest

from c2c_mlx import Fuser, LanguageModel
from c2c_mlx.commands import evaluate
from c2c_mlx.config import FuserConfig
from c2c_mlx.evaluation import hub_tasks, modes, runner
from c2c_mlx.evaluation.task import C2C_MODES, MODES
from c2c_mlx.talk import relay

TINY = Path(__file__).parents[1] / "golden" / "data" / "e2e" / "qwen3_llama"
PAIR = ["--sharer", str(TINY / "sharer"), "--receiver", str(TINY / "receiver")]
Call = Callable[..., tuple[int, str, str]]

ROWS: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {"prompt": f"the quick {i}", "completion": f"brown fox {i}", "lang": ["fr", "zh"][i % 2]}
        for i in range(6)
    ],
    "choice": [
        {"question": f"who {i}?", "choices": ["he", "she", "it"], "answer": i} for i in range(3)
    ],
    "fact": [{"prompt": f"how many {i}?", "accept": [str(i)]} for i in range(3)],
    "agreement": [{"prompt": "the lazy" + " dog" * i} for i in range(4)],
}
SCORES = {
    "chat": {"chrf", "bleu", "nll"},
    "choice": {"accuracy", "invalid"},
    "fact": {"accuracy"},
    "agreement": {"kept", "nll"},
}


@pytest.fixture(autouse=True)
def short_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models never end their turn."""
    monkeypatch.setattr(relay, "BACKGROUND_TOKENS", 12)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = evaluate.main(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def fusers(
    receiver: LanguageModel, sharer: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with an open fuser and a closed one."""
    folder = tmp_path_factory.mktemp("fusers")
    for name, gate in (("open", 1.0), ("closed", -1.0)):
        mx.random.seed(1)
        layers = tuple((i, i + 2) for i in range(4))
        fuser = Fuser(FuserConfig(receiver.shape, sharer.shape, layers, 24, 20))
        fuser.gate_logit = mx.full(fuser.gate_logit.shape, gate)
        fuser.save(folder / name)
    return folder


@pytest.fixture
def task(tmp_path: Path) -> Callable[[str], str]:
    def task(kind: str) -> str:
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
        return str(path)

    return task


@pytest.mark.parametrize("kind", ROWS)
def test_every_mode_answers_the_same_items(
    call: Call, task: Callable[[str], str], fusers: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out.json"
    code, text, err = call(
        *(*PAIR, "--task", task(kind), "--fuser", str(fusers / "open"), "--json", str(out)),
        *("--max-tokens", "4", "--batch-size", "2", "--latency", "1"),
    )
    assert code == 0, err
    result = json.loads(out.read_text())
    names = [m for m in MODES if kind != "agreement" or m != "sharer"]
    assert list(result["modes"]) == names
    for mode, found in result["modes"].items():
        assert SCORES[kind] == found["scores"].keys()
        assert [r["id"] for r in found["items"]] == [str(i + 1) for i in range(len(ROWS[kind]))]
        assert 0 < found["latency"]["first_token_s"] <= found["latency"]["total_s"]
        assert found["latency"]["items"] == 1
        assert found["failed"] == {}
        for name, score in found["scores"].items():
            values = [r["scores"][name] for r in found["items"]]
            assert score["mean"] == pytest.approx(sum(values) / len(values))
            assert score["ci95"][0] <= score["mean"] <= score["ci95"][1]
            assert ("vs_receiver" in score) == (mode != "receiver")
        assert mode in text
        if mode == "relay" and kind != "choice":  # there, the context ends
            assert max(r["relayed_tokens"] for r in found["items"]) == 12
    if kind == "chat":
        assert result["groups"] == ["fr", "zh"]
        assert result["modes"]["c2c"]["groups"]["fr"]["scores"]["chrf"]["items"] == 3
        assert "corpus" in result["modes"]["c2c"]["scores"]["chrf"]
    if kind == "agreement":
        assert result["modes"]["receiver"]["scores"]["kept"]["mean"] == 1
    assert {"versions", "device", "command", "date"} <= result.keys()
    assert "| c2c-zeroed" in out.with_suffix(".md").read_text()
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".jsonl", ".md"]


@pytest.mark.parametrize(("kind", "method"), [("chat", "generate"), ("choice", "logits")])
def test_a_closed_fuser_changes_nothing(
    call: Call, task: Callable[[str], str], fusers: Path, tmp_path: Path, kind: str, method: str
) -> None:
    out = tmp_path / "out.json"
    modes = ",".join(("receiver", *C2C_MODES))
    code, *_ = call(
        *(*PAIR, "--task", task(kind), "--fuser", str(fusers / "closed"), "--json", str(out)),
        *("--max-tokens", "4", "--mode", modes, "--method", method),
    )
    assert code == 0
    found = json.loads(out.read_text())["modes"]
    for mode in C2C_MODES:
        for a, b in zip(found[mode]["items"], found["receiver"]["items"], strict=True):
            assert (a["text"], a["ids"]) == (b["text"], b["ids"])
            assert a["scores"] == pytest.approx(b["scores"], rel=1e-5)


def answers(path: Path) -> tuple[list[str], list[float]]:
    modes = json.loads(path.read_text())["modes"]
    records = [record for of in modes.values() for record in of["items"]]
    return [r["text"] for r in records], [s for r in records for s in r["scores"].values()]


def test_an_interrupted_run_continues(
    call: Call,
    task: Callable[[str], str],
    fusers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def arguments(out: str, *more: str) -> list[str]:
        options = ("--max-tokens", "4", "--batch-size", "2", "--latency", "1")
        fuser = ("--fuser", str(fusers / "open"), "--mode", "receiver,c2c")
        return [
            *PAIR,
            "--task",
            task("chat"),
            *fuser,
            *options,
            "--json",
            str(tmp_path / out),
            *more,
        ]

    assert call(*arguments("whole.json"))[0] == 0
    partial, asked = tmp_path / "out.json.partial.jsonl", []
    append = runner.Log.append

    def interrupted(log: runner.Log, records: list[runner.Record]) -> None:
        append(log, records)
        asked.extend((r["mode"], r["id"]) for r in records)
        if len(asked) in (3, 9):
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.Log, "append", interrupted)
    code, out, err = call(*arguments("out.json"))
    assert code == 130 and out == "" and "the same command continues" in err
    assert len(partial.read_text().splitlines()) == 1 + 3
    with partial.open("a") as file:
        file.write('{"mode": "c2c", "id": "5", "te')  # cut by kill -9 or a full disk
    assert call(*arguments("out.json"))[0] == 130
    assert call(*arguments("out.json"))[0] == 0
    assert len(asked) == len(set(asked)) == 12  # nothing is asked twice
    texts, scores = answers(tmp_path / "out.json")
    assert (texts, pytest.approx(scores, rel=1e-5)) == answers(tmp_path / "whole.json")
    assert not partial.exists()
    code, _, err = call(*arguments("out.json"))
    assert code == 2 and "is there already" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--max-tokens", "5"], "another max_tokens (4, not 5)"),
        (["--seed", "1", "--limit", "5"], "another items"),
        (["--mode", "receiver"], "another modes"),
        (["--fuser", "closed"], "another fusers"),
    ],
)
def test_another_run_does_not_continue_it(
    call: Call,
    task: Callable[[str], str],
    fusers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(fusers)
    base = [*PAIR, "--task", task("chat"), "--json", str(tmp_path / "out.json"), "--max-tokens"]
    base += ["4", "--latency", "0", "--mode", "receiver,c2c"]
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_ask", interrupt)
        assert call(*base, "--fuser", "open")[0] == 130
    if "--fuser" not in changed:
        changed = [*changed, "--fuser", "open"]
    code, _, err = call(*base, *changed)
    assert code == 2 and words in err and err.count("\n") == 1


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_the_likeliest_text_is_chosen_in_every_mode(
    call: Call, task: Callable[[str], str], fusers: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    code, _, err = call(
        *(*PAIR, "--task", task("choice"), "--fuser", str(fusers / "open"), "--json", str(out)),
        *("--method", "text", "--latency", "0"),
    )
    assert code == 0, err
    result = json.loads(out.read_text())
    assert list(result["modes"]) == list(MODES)
    assert result["items"][0]["prompt"] == [{"role": "user", "content": "who 0?"}]
    for of in result["modes"].values():
        for n, (record, row) in enumerate(zip(of["items"], ROWS["choice"], strict=True)):
            cost = [x / len(c) for x, c in zip(record["nats"], row["choices"], strict=True)]
            assert record["scores"] == {"accuracy": float(cost.index(min(cost)) == n)}
            assert record["text"] == ""


def oversized(*_: Any) -> None:
    """MLX's own words on a Mac; on Linux the process is killed without any."""
    raise RuntimeError(
        "[metal::malloc] Attempting to allocate 20000000000 bytes which is greater than the "
        "maximum allowed buffer size of 9534832640 bytes."
    )


@pytest.mark.parametrize(
    ("where", "name"), [(runner, "write"), (runner, "nats"), (modes.Modes, "_read_plain")]
)
def test_want_of_memory_is_one_line_that_says_what_to_do(
    call: Call,
    task: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    name: str,
) -> None:
    monkeypatch.setattr(where, name, oversized)
    base = [*PAIR, "--task", task("chat"), "--mode", "receiver", "--json", str(tmp_path / "o")]
    code, out, err = call(*base)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "out of memory" in err and "try --batch-size 8, which continues" in err
    code, _, err = call(*base, "--batch-size", "1")
    assert code == 2 and "try smaller models" in err and err.count("\n") == 1


def test_an_interruption_is_one_line_and_the_same_command_continues(
    call: Call, task: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise RuntimeError("[METAL] Command buffer execution failed: Impacting Interactivity (e)")

    monkeypatch.setattr(runner, "write", interrupted)
    base = [*PAIR, "--task", task("chat"), "--mode", "receiver", "--json", str(tmp_path / "o")]
    code, out, err = call(*base)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "macOS interrupted the GPU: the same command continues" in err


def test_where_everything_fails_there_is_no_result(call: Call, tmp_path: Path) -> None:
    row = {"question": "so " * 4000, "choices": ["a", "b"], "answer": 0}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    arguments = ("--task", str(tmp_path / "t.jsonl"), "--json", str(tmp_path / "out.json"))
    code, out, err = call(*PAIR, *arguments, "--mode", "receiver,relay", "--max-tokens", "4")
    assert code == 2 and out == ""
    assert "every item failed in every mode, the first one because the prompt is" in err
    assert err.splitlines()[-1].startswith("c2c-eval: ") and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]  # asked anew the next time


def test_a_fuser_for_answers_is_said_to_be_used_for_prompts(
    call: Call, task: Callable[[str], str], fusers: Path, tmp_path: Path
) -> None:
    fuser = Fuser.load(fusers / "open")
    fuser.config = replace(fuser.config, fuse_response=True)
    fuser.save(tmp_path / "fuser")
    out = tmp_path / "out.json"
    arguments = ("--task", task("agreement"), "--mode", "c2c", "--max-tokens", "2", "--json")
    code, _, err = call(*PAIR, "--fuser", str(tmp_path / "fuser"), *arguments, str(out))
    assert code == 0 and "c2c-eval: the fuser was made for answers, too" in err
    assert "prompts alone are fused" in out.with_suffix(".md").read_text()


def test_an_item_that_fails_is_wrong_and_listed(call: Call, tmp_path: Path) -> None:
    rows = [*ROWS["choice"], {"question": "so " * 4000, "choices": ["a", "b"], "answer": 0}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.json"
    arguments = ("--task", str(tmp_path / "t.jsonl"), "--json", str(out), "--mode", "receiver")
    code, text, _ = call(*PAIR, *arguments, "--max-tokens", "4")
    assert code == 0 and "- receiver, item 4: the prompt is" in text
    found = json.loads(out.read_text())["modes"]["receiver"]
    assert found["scores"]["accuracy"]["items"] == 4
    assert found["items"][3]["scores"] == {"accuracy": 0, "invalid": 1}
    assert list(found["failed"]) == ["4"]


def test_a_limit_draws_the_same_items_everywhere(
    call: Call, task: Callable[[str], str], tmp_path: Path
) -> None:
    drawn = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "5")):
        out = tmp_path / f"{name}.json"
        limits = ("--limit", "3", "--seed", seed, "--max-tokens", "2", "--mode", "receiver")
        assert call(*PAIR, "--task", task("chat"), "--json", str(out), *limits)[0] == 0
        drawn.append([i["id"] for i in json.loads(out.read_text())["items"]])
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == sorted(drawn[0]) and len(drawn[0]) == 3
    a, b, c = (str(tmp_path / f"{name}.json") for name in "abc")
    code, text, _ = call("--compare", f"{a}:receiver", f"{b}:receiver")
    assert code == 0 and "+0.000 [+0.000, +0.000]" in text
    compared = tmp_path / "compared.json"
    assert call("--compare", f"{a}:receiver", f"{b}:receiver", "--json", str(compared))[0] == 0
    difference = json.loads(compared.read_text())["scores"]["chrf"]["all"]["difference"]
    assert difference["mean"] == 0 and difference["items"] == 3
    code, _, err = call("--compare", f"{a}:receiver", f"{c}:receiver")
    assert code == 2 and "different items" in err and err.count("\n") == 1
    code, _, err = call("--compare", a, b)
    assert code == 2 and "no mode c2c" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "nothing"], "neither a file nor one of mmlu-redux"),
        (["--task", "chat", "--mode", "telepathy"], "must be of receiver, sharer, relay"),
        (["--task", "chat", "--mode", ","], "must be of receiver"),
        (["--task", "agreement", "--mode", "sharer"], "the receiver's own answers"),
        (["--task", "chat", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--task", "chat", "--batch-size", "0"], "--batch-size 0"),
        (["--task", "chat", "--seed", "-1"], "--seed -1"),
        (["--task", "chat", "--limit", "1"], "needs at least two items"),
        (["--task", "chat"], "c2c-train --sharer"),
        (["--task", "chat", "--json", "no/such/place.json"], "there is no folder"),
        (["--task", "chat", "--mode", "receiver", "--receiver", "nobody"], "unknown model"),
        (["--compare", "no.json", "such.json"], "cannot read no.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    call: Call, task: Callable[[str], str], arguments: list[str], words: str
) -> None:
    arguments = [task(a) if a in ROWS else a for a in arguments]
    pair = [] if "--receiver" in arguments else PAIR
    code, out, err = call(*pair, *arguments)
    assert code == 2
    assert words in err and err.startswith("c2c-eval: ") and err.count("\n") == 1
    assert out == ""


def test_help_names_every_benchmark() -> None:
    assert all(name in evaluate.EPILOG for name in hub_tasks.BENCHMARKS)
