"""The inference thread with two tiny models: its events, its end, and what a stop leaves."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from chat_sessions import open_fuser, thinker

from c2c_mlx import ChatSession, Fuser, LanguageModel, device
from c2c_mlx.config import Pair, SamplingConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.events import (
    Crossed,
    EngineEvent,
    Event,
    Failed,
    Finished,
    GateReport,
    LiveGates,
    Loaded,
    Mode,
    Prefilling,
    RelayedText,
    Text,
    TurnOver,
)
from c2c_mlx.models import memory
from c2c_mlx.progress import Progress
from c2c_mlx.talk.engine import InferenceThread, explain

SAMPLING = SamplingConfig(max_tokens=12)
ALL = ("c2c", "relay", "receiver")
Open = Callable[..., InferenceThread]


@pytest.fixture
def open_engine(tiny_pair: Pair) -> Iterator[Open]:
    engines = []

    def open_engine(pair: Pair = tiny_pair, sampling: SamplingConfig = SAMPLING) -> InferenceThread:
        engines.append(InferenceThread(pair, sampling))
        engines[-1].start()
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.close()
        engine.join(timeout=30)
        assert not engine.is_alive()


def until(engine: InferenceThread, last: type[EngineEvent]) -> list[EngineEvent]:
    seen: list[EngineEvent] = []
    while not seen or not isinstance(seen[-1], last):
        seen.append(engine.events.get(timeout=30))
    return seen


def answers(seen: list[EngineEvent]) -> dict[str, Finished]:
    return {e.mode: e for e in seen if isinstance(e, Finished)}


def test_a_turn_is_one_answer_after_the_other(open_engine: Open) -> None:
    engine = open_engine()
    engine.ask("Who wrote it?", ALL)  # before anything is loaded
    loaded = until(engine, Loaded)[-1]
    assert isinstance(loaded, Loaded) and loaded.links and loaded.receiver_layers == 4
    assert loaded.needs.startswith("memory: receiver ")
    seen = until(engine, TurnOver)
    order = list(dict.fromkeys(e.mode for e in seen if isinstance(e, Text | RelayedText)))
    assert order == list(ALL) == list(answers(seen))
    (report,) = (e for e in seen if isinstance(e, GateReport))
    (link,) = loaded.links
    assert report.layers == link.layers and report.gates == link.gates
    assert len(report.tokens) == len(report.token_weights[0][0]) > 10
    assert all(0 < w < 1 for kind in report.weights for w in kind)
    assert all(c > 0 for kind in report.changes for c in kind)


def test_a_fuser_of_values_alone_says_so(
    open_engine: Open,
    receiver: LanguageModel,
    sharer: LanguageModel,
    tiny_pair: Pair,
    tmp_path: Path,
) -> None:
    open_fuser(receiver, sharer, kinds="values").save(tmp_path)
    engine = open_engine(replace(tiny_pair, fusers=(str(tmp_path),)))
    loaded = until(engine, Loaded)[-1]
    assert isinstance(loaded, Loaded)
    (link,) = loaded.links
    assert (link.kinds, link.gates) == ((1,), ((False,) * 4, (True,) * 4))


def test_two_sharers_feed_an_answer_while_it_is_written(open_engine: Open, tiny_pair: Pair) -> None:
    twice = replace(tiny_pair, sharers=tiny_pair.sharers * 2, fusers=tiny_pair.fusers * 2)
    engine = open_engine(replace(twice, fuse_response=True, order="parallel"))
    engine.ask("Who wrote it?", ["c2c"])
    loaded = until(engine, Loaded)[-1]
    assert isinstance(loaded, Loaded)
    assert len(loaded.links) == 2 and loaded.links[0] == loaded.links[1]
    seen = until(engine, TurnOver)
    written = sum(isinstance(e, Text) for e in seen)
    live = [e.report for e in seen if isinstance(e, LiveGates)]
    assert [r.sharer for r in live] == [0, 1] * written
    whole = [e for e in seen if isinstance(e, GateReport)]
    assert [r.sharer for r in whole] == [0, 1]
    assert len(whole[0].tokens) > answers(seen)["c2c"].figures.prompt_tokens


def test_in_a_race_no_figures_of_gates_are_computed_before_an_answer_has_ended(
    open_engine: Open, tiny_pair: Pair
) -> None:
    engine = open_engine(replace(tiny_pair, fuse_response=True))
    engine.ask("Who wrote it?", ["relay", "c2c"])
    until(engine, Loaded)
    seen = until(engine, TurnOver)
    assert not any(isinstance(e, LiveGates) for e in seen)
    kinds = [type(e) for e in seen if getattr(e, "mode", "c2c") == "c2c"]
    assert kinds.index(GateReport) > kinds.index(Finished)


def test_every_rival_is_warm_before_the_first_question(open_engine: Open) -> None:
    engine = open_engine()
    seen = until(engine, Loaded)
    assert "warming up" in [e.what for e in seen if isinstance(e, Progress)]
    assert not any(isinstance(e, Prefilling | Text) for e in seen)  # nothing that one would see
    engine.ask("Who wrote it?", ["c2c", "relay"])
    for ended in answers(until(engine, TurnOver)).values():  # and no cache was begun for anybody
        assert ended.figures.new_prompt_tokens == ended.figures.prompt_tokens


def test_warming_up_takes_two_tokens_of_thoughts_too(
    receiver: LanguageModel, sharer: LanguageModel, tiny_pair: Pair
) -> None:
    said = []

    class Session(ChatSession):
        def ask(self, question: str, mode: Mode = "c2c") -> Generator[Event, None, None]:
            for event in super().ask(question, mode):
                said.append(mode)
                yield event

    able = [replace(lm, tokenizer=thinker(lm, "assistant", "<no>")) for lm in (receiver, sharer)]
    session = Session(*able, Fuser.load(tiny_pair.fusers[0]))
    InferenceThread(tiny_pair, SAMPLING)._warm_up(session)
    assert said == ["receiver"] * 2 + ["sharer"] * 2 + ["c2c"] * 2


def test_with_every_gate_closed_c2c_says_what_the_receiver_says(open_engine: Open) -> None:
    engine = open_engine()
    loaded = until(engine, Loaded)[-1]
    assert isinstance(loaded, Loaded)
    engine.ask("Who wrote it?", ALL)
    said = answers(until(engine, TurnOver))
    assert said["c2c"].text != said["receiver"].text
    engine.undo(ALL)
    engine.set_gates([((False,) * 4, (False,) * 4)])
    engine.ask("Who wrote it?", ALL)
    seen = until(engine, TurnOver)
    pieces = {m: [e.text for e in seen if isinstance(e, Text) and e.mode == m] for m in ALL}
    assert pieces["c2c"] == pieces["receiver"] and answers(seen)["c2c"].figures.gates_open == 0
    assert not any(isinstance(e, GateReport) for e in seen)
    engine.undo(ALL)
    engine.set_gates(loaded.gates)
    engine.ask("Who wrote it?", ALL)
    again = answers(until(engine, TurnOver))
    assert [again[m].text for m in ALL] == [said[m].text for m in ALL]


def test_an_undone_turn_leaves_no_trace(open_engine: Open) -> None:
    engine = open_engine()
    texts = []
    for _ in range(2):
        engine.ask("Who wrote it?", ALL)
        engine.ask("And when?", ALL)
        until(engine, TurnOver)
        texts.append([a.text for a in answers(until(engine, TurnOver)).values()])
        engine.undo(ALL)
        engine.undo(ALL)
    assert texts[0] == texts[1]


def test_a_restored_conversation_goes_on_as_the_first_would_have(open_engine: Open) -> None:
    first, second = open_engine(), open_engine()
    first.ask("Who wrote it?", ALL)
    said = answers(until(first, TurnOver))
    second.restore({m: [("Who wrote it?", a.relayed_text, a.text)] for m, a in said.items()}, ())
    after = []
    for engine in (first, second):
        engine.ask("And when?", ALL)
        after.append([a.text for a in answers(until(engine, TurnOver)).values()])
    assert after[0] == after[1]


def test_a_conversation_is_restored_with_its_gates_before_it_is_asked(open_engine: Open) -> None:
    engine = open_engine()
    found = []
    for gates in ([((False,) * 4, (False,) * 4)], [((False,) * 5, (False,) * 5)]):
        engine.restore({}, gates)
        engine.ask("Who wrote it?", ["c2c"])
        found.append(answers(until(engine, TurnOver))["c2c"].figures.gates_open)
    assert found == [0, 8]  # those of another fuser leave this one as it was loaded


def test_a_stop_ends_the_answer_and_skips_the_others(open_engine: Open) -> None:
    engine = open_engine(sampling=SamplingConfig(max_tokens=400, temp=1.0))
    engine.ask("Who wrote it?", ["receiver", "relay"])
    until(engine, Text)
    engine.stop()
    seen = until(engine, TurnOver)
    assert [a.reason for a in answers(seen).values()] == ["stopped"]
    engine.ask("And when?", ["receiver"])
    assert answers(until(engine, TurnOver))["receiver"].reason != "stopped"


def test_a_stop_before_it_was_asked_does_not_stop_it(open_engine: Open) -> None:
    engine = open_engine()
    engine.stop()
    engine.ask("Who wrote it?", ["receiver"])
    assert answers(until(engine, TurnOver))["receiver"].reason != "stopped"


def test_another_attempt_has_another_seed(open_engine: Open) -> None:
    engine = open_engine(sampling=SamplingConfig(max_tokens=12, temp=1.0))
    texts = []
    for attempt in (0, 1, 0):
        engine.ask("Who wrote it?", ["receiver"], attempt)
        texts.append(answers(until(engine, TurnOver))["receiver"].text)
        engine.undo(["receiver"])
    assert texts[0] == texts[2] != texts[1]


def test_without_a_fuser_the_other_modes_answer(open_engine: Open, tiny_pair: Pair) -> None:
    engine = open_engine(Pair(tiny_pair.receiver, tiny_pair.sharers))
    seen = until(engine, Loaded)
    loaded = seen[-1]
    assert isinstance(loaded, Loaded) and not any(isinstance(e, Failed) for e in seen)
    assert loaded.missing.startswith("no fuser is known") and "--mode" not in loaded.missing
    engine.ask("Who wrote it?", ALL)
    seen = until(engine, TurnOver)
    assert set(answers(seen)) == {"relay", "receiver"}
    assert [e.mode for e in seen if isinstance(e, Failed)] == ["c2c"]


def test_what_does_not_fit_costs_the_modes_that_need_it(
    open_engine: Open, tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = memory.preflight(Path(tiny_pair.receiver)).receiver
    monkeypatch.setattr(device, "memory_limit", lambda: needed + 1)
    engine = open_engine()
    seen = until(engine, Loaded)
    loaded = seen[-1]
    assert isinstance(loaded, Loaded) and (loaded.sharers, loaded.links) == ((), ())
    assert "cannot be loaded" in loaded.missing
    engine.ask("Who wrote it?", ["receiver"])
    assert answers(until(engine, TurnOver))["receiver"].text


def test_without_a_receiver_every_question_is_refused(open_engine: Open) -> None:
    engine = open_engine(Pair("no/such/folder", ("either",)))
    engine.ask("Who wrote it?", ALL)
    seen = until(engine, TurnOver)
    assert len([e for e in seen if isinstance(e, Failed)]) == 2
    assert not answers(seen)


def test_closing_while_it_loads_or_answers_ends_the_thread(open_engine: Open) -> None:
    open_engine()  # closed by the fixture, in the middle of whatever it does
    busy = open_engine(sampling=SamplingConfig(max_tokens=400, temp=1.0))
    busy.ask("Who wrote it?", ALL)
    until(busy, Text)
    busy.close()
    busy.join(timeout=30)
    assert busy not in threading.enumerate()


def test_an_interpreter_ends_cleanly_behind_it(tiny_pair: Pair) -> None:
    code = (
        "from c2c_mlx.talk.engine import *\n"
        "from c2c_mlx.events import Text\n"
        f"e = InferenceThread({tiny_pair!r}, SamplingConfig(max_tokens=400))\n"
        "e.start(); e.ask('Who?', ['c2c'])\n"
        "while not isinstance(e.events.get(timeout=60), Text): pass\n"
        "e.close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_error_becomes_one_line() -> None:
    assert explain(C2CError("do this")) == "do this"
    assert explain(RuntimeError("[malloc] Unable to allocate\n3 bytes")).startswith("out of memory")
    stopped = "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002)"
    assert explain(RuntimeError(stopped)).startswith("macOS interrupted the GPU ([METAL]")
    assert "\n" not in explain(ValueError("a\nb"))


def test_what_crossed_is_said_when_it_is_asked_for(open_engine: Open) -> None:
    engine = open_engine()
    engine.weigh()  # nobody has answered yet: nothing is said
    engine.ask("Who wrote it?", ("c2c",))
    engine.weigh()
    seen = until(engine, Crossed)
    crossed, finished = seen[-1], answers(seen)["c2c"]
    assert isinstance(crossed, Crossed) and len(crossed.nats) == finished.figures.generated_tokens
    assert "".join(crossed.tokens).strip() == finished.text
    assert [type(e) for e in seen].count(Crossed) == 1
