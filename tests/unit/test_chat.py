"""Conversations with two tiny models: four modes, their events, and what stays when one is cut."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
import pytest
from chat_sessions import SAMPLING, WORDY, MakeSession, ask, open_fuser, thinker, with_template

from c2c_mlx import ChatSession, Fuser, LanguageModel, load_model
from c2c_mlx.commands import chat
from c2c_mlx.config import SamplingConfig
from c2c_mlx.errors import C2CError, NoFuserError
from c2c_mlx.events import MODES, Event, Finished, Mode, Prefilling, RelayedText, Text
from c2c_mlx.fusion import reader as reading
from c2c_mlx.models import registry
from c2c_mlx.models.embedded import install
from c2c_mlx.talk import relay
from c2c_mlx.text import thoughts
from c2c_mlx.text.rendering import render
from c2c_mlx.text.tokens import tokenize

modes = pytest.mark.parametrize("mode", MODES)
PUBLISHED = relay.BACKGROUND_TOKENS


@pytest.fixture(autouse=True)
def short_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models never end their turn, and the tiny receiver reads 512 positions."""
    monkeypatch.setattr(relay, "BACKGROUND_TOKENS", 20)


@pytest.fixture(scope="module")
def fuser(receiver: LanguageModel, sharer: LanguageModel) -> Fuser:
    return open_fuser(receiver, sharer)


@pytest.fixture
def make(receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser) -> MakeSession:
    def make(**options: Any) -> ChatSession:
        return ChatSession(receiver, sharer, fuser, **({"sampling": SAMPLING} | options))

    return make


@modes
def test_a_turn_is_relayed_text_then_text_then_the_end(make: MakeSession, mode: Mode) -> None:
    session = make()
    events, finished = ask(session, "Who wrote it?", mode)
    kinds = [type(e) for e in events]
    assert kinds == sorted(kinds, key=[RelayedText, Text, Finished].index)
    assert kinds.count(Finished) == 1
    assert (RelayedText in kinds) == (mode == "relay")
    assert {e.mode for e in events} == {mode}
    assert "".join(e.text for e in events if isinstance(e, Text)).strip() == finished.text
    relayed = "".join(e.text for e in events if isinstance(e, RelayedText)).strip()
    assert relayed == finished.relayed_text
    assert session.history == {mode: session.history[mode]}
    assert session.history[mode][-1] == {"role": "assistant", "content": finished.text}


@modes
def test_figures(make: MakeSession, mode: Mode) -> None:
    session = make()
    events, finished = ask(session, "Who wrote it?", mode)
    f = finished.figures
    assert f.generated_tokens == sum(isinstance(e, Text) for e in events) <= 7
    assert f.relayed_tokens == sum(isinstance(e, RelayedText) for e in events)
    assert finished.reason == ("length" if f.generated_tokens == 7 else "stop")
    assert 0 < f.first_token_s <= f.total_s
    assert f.first_token_s >= f.align_s + f.sharer_s + f.receiver_s + f.fuse_s
    assert all(value >= 0 for value in asdict(f).values())
    assert f.new_prompt_tokens == f.prompt_tokens > 10
    assert (f.gates_open > 0) == (f.align_s > 0) == (f.fuse_s > 0) == (mode == "c2c")
    assert (f.sharer_s > 0) == (mode != "receiver")
    assert (f.receiver_s > 0) == (mode != "sharer")


@modes
def test_a_second_turn_reads_only_what_is_new(make: MakeSession, mode: Mode) -> None:
    session = make()
    _, first = ask(session, "Who wrote it?", mode)
    _, second = ask(session, "And when?", mode)
    f = second.figures
    assert f.prompt_tokens > first.figures.prompt_tokens
    assert f.new_prompt_tokens < f.prompt_tokens - first.figures.prompt_tokens + 10


@pytest.mark.parametrize("mode", ["c2c", "receiver", "sharer"])
def test_a_second_turn_says_what_a_fresh_session_would(make: MakeSession, mode: Mode) -> None:
    session, fresh = make(), make()
    ask(session, "Who wrote it?", mode)
    fresh.history[mode] = [dict(m) for m in session.history[mode]]
    assert ask(session, "And when?", mode)[1].text == ask(fresh, "And when?", mode)[1].text


def test_c2c_says_something_else_than_the_receiver(make: MakeSession) -> None:
    session = make(sampling=replace(SAMPLING, temp=0.0, max_tokens=20))
    texts = [ask(session, "Who wrote it?", mode)[1].text for mode in ("c2c", "receiver")]
    assert texts[0] != texts[1]
    (report,) = session.gate_reports()
    assert np.any(report.changes)


def test_every_mode_has_its_own_conversation(make: MakeSession) -> None:
    session, alone = make(system="Be kind."), make(system="Be kind.")
    for mode in MODES:
        ask(session, f"Hello to {mode}", mode)
    for mode in MODES:
        told = session.messages(mode)
        assert told[0] == {"role": "system", "content": "Be kind."}
        assert told[-2] == {"role": "user", "content": f"Hello to {mode}"}
        assert ask(alone, f"Hello to {mode}", mode)[1].text == told[-1]["content"]
    assert [len(session.history[mode]) for mode in MODES] == [2, 4, 2, 2]


def test_the_relayed_text_is_what_the_receiver_reads(make: MakeSession) -> None:
    session = make()
    _, finished = ask(session, "Who wrote it?", "relay")
    background, relayed, question, _ = session.messages("relay")
    assert "Who wrote it?" in background["content"]
    assert relayed == {"role": "assistant", "content": finished.relayed_text}
    assert question == {"role": "user", "content": "Who wrote it?"}


def test_the_sharer_is_told_the_system_prompt(make: MakeSession) -> None:
    told, alone = (
        ask(make(system=system), "Who wrote it?", "relay")[1].relayed_text
        for system in ("Answer in verse.", None)
    )
    assert told != alone


def test_the_relayed_text_has_a_budget_of_its_own(make: MakeSession) -> None:
    assert PUBLISHED == 256
    _, finished = ask(make(), "Who wrote it?", "relay")
    assert finished.figures.relayed_tokens == 20
    assert finished.figures.generated_tokens == SAMPLING.max_tokens == 7


def test_a_base_model_relays_after_a_few_examples(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser
) -> None:
    reads = {}
    for lm in (sharer, replace(sharer, has_own_template=False)):
        totals: list[int] = []
        session = ChatSession(receiver, lm, fuser, sampling=SAMPLING)
        session.on_prefill = lambda event, totals=totals: totals.append(event.total)
        _, finished = ask(session, "Who wrote it?", "relay")
        reads[lm.has_own_template] = totals[0]
        assert "\n" not in finished.relayed_text or lm.has_own_template
        assert "chlorophyll" not in str(session.messages("relay"))  # the receiver reads none
    asked = [relay.background_message("Who wrote it?")]
    examples = relay.prompt(replace(sharer, has_own_template=False), asked)[:-1]
    assert [m["role"] for m in examples] == ["user", "assistant"] * 3
    assert all("\n" not in m["content"] for m in examples[1::2])  # so a line's end ends its own
    assert reads[False] - reads[True] == len(
        tokenize(render(examples, sharer.tokenizer, add_generation_prompt=False), sharer.tokenizer)
    )


@pytest.mark.pair
@pytest.mark.slow
def test_the_embedded_base_model_has_something_to_relay() -> None:
    """Without examples its first token was a blank line for each of these."""
    names = registry.default_pair()
    if not all(map(install.is_installed, names)):
        pytest.skip("the embedded pair is not in the cache; `c2c-chat` puts it there")
    receiver, sharer = map(load_model, names)
    session = ChatSession(receiver, sharer, sampling=SamplingConfig(max_tokens=1))
    for question in ("How do I boil an egg?", "Qui a peint la Joconde ?"):
        session.reset()
        turn = session.ask(question, "relay")
        event = next(turn)
        assert isinstance(event, RelayedText) and event.text.strip()
        turn.close()


@modes
def test_a_closed_answer_stays_and_the_conversation_goes_on(make: MakeSession, mode: Mode) -> None:
    session = make()
    turn, said = session.ask("Who wrote it?", mode), ""
    while not said.strip():
        event = next(turn)
        said += event.text if isinstance(event, Text) else ""
    turn.close()
    assert session.history[mode][-1] == {"role": "assistant", "content": said.strip()}
    before = list(session.history[mode])
    _, finished = ask(session, "And when?", mode)
    assert session.history[mode][: len(before)] == before
    assert session.history[mode][-1]["content"] == finished.text


@modes
def test_a_turn_closed_before_its_answer_leaves_no_trace(make: MakeSession, mode: Mode) -> None:
    session, untouched = make(), make()
    turn = session.ask("Forget this.", mode)
    if mode == "relay":
        assert isinstance(next(turn), RelayedText)
    turn.close()
    assert session.history == {}
    answers = [ask(s, "Who wrote it?", mode)[1] for s in (session, untouched)]
    assert answers[0].text == answers[1].text
    assert answers[0].relayed_text == answers[1].relayed_text


@pytest.mark.parametrize(
    ("mode", "call"), [("receiver", 1), ("c2c", 1), ("c2c", 2), ("relay", 1), ("relay", 2)]
)
def test_caches_that_a_gpu_failed_to_write_are_read_anew(
    make: MakeSession, monkeypatch: pytest.MonkeyPatch, mode: Mode, call: int
) -> None:
    greedy = SamplingConfig(max_tokens=7)
    session = make(sampling=greedy)
    ask(session, "Who wrote it?", mode)
    caches = [reader.cache for reader in session._readers.values()]
    if session._fused:
        caches += [session._fused.cache, session._fused.own.cache, session._fused.sharers[0].cache]

    class Metal:
        """MLX where a command buffer fails: what it did not write counts as evaluated."""

        calls = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(mx, name)

        def eval(self, *arrays: Any) -> None:
            mx.eval(*arrays)
            self.calls += 1
            if self.calls == call:
                for layer in (layer for cache in caches for layer in cache if not layer.empty()):
                    layer.keys, layer.values = (
                        mx.zeros_like(x) for x in (layer.keys, layer.values)
                    )
                raise RuntimeError(
                    "[METAL] Command buffer execution failed: Insufficient Memory "
                    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
                )

    before = list(session.history[mode])
    with monkeypatch.context() as patched:
        patched.setattr(reading, "mx", Metal())
        with pytest.raises(RuntimeError, match="Insufficient Memory"):
            ask(session, "And when?", mode)
    assert session.history[mode] == before
    assert session.crossed() is None and session.gate_reports() == []

    fresh = make(sampling=greedy)
    fresh.history[mode], fresh._background = list(before), list(session._background)
    assert ask(session, "And when?", mode)[1].text == ask(fresh, "And when?", mode)[1].text
    if mode == "c2c":
        assert session.crossed() == fresh.crossed()


@modes
def test_stop_ends_the_answer_after_the_next_token(make: MakeSession, mode: Mode) -> None:
    session = make()
    seen: list[Event] = []
    for event in session.ask("Who wrote it?", mode):
        seen.append(event)
        if isinstance(event, Text):
            session.stop()
    finished = seen[-1]
    assert isinstance(finished, Finished)
    assert finished.reason == "stopped"
    assert sum(isinstance(e, Text) for e in seen) == 1
    assert ask(session, "And when?", mode)[1].reason != "stopped"


def test_stop_while_the_sharer_writes_ends_the_turn(make: MakeSession) -> None:
    session = make()
    seen: list[Event] = []
    for event in session.ask("Who wrote it?", "relay"):
        seen.append(event)
        session.stop()
    assert [type(e) for e in seen] == [RelayedText, Finished]
    assert session.history == {}


@modes
@pytest.mark.parametrize("question", ["", " \n\t"])
def test_an_empty_message_is_refused(make: MakeSession, mode: Mode, question: str) -> None:
    session = make()
    ask(session, "Who wrote it?", mode)
    before = list(session.history[mode])
    with pytest.raises(C2CError, match="empty"):
        list(session.ask(question, mode))
    assert session.history[mode] == before


@modes
def test_what_does_not_fit_is_refused_before_anything_is_read(
    make: MakeSession, mode: Mode
) -> None:
    read: list[Prefilling] = []
    session, untouched = make(on_prefill=read.append), make()
    for s in (session, untouched):
        ask(s, "Who wrote it?", mode)
    before = list(session.history[mode])
    read.clear()
    with pytest.raises(C2CError, match=r"tokens long, but .* reads at most 512.*new conversation"):
        list(session.ask("too long " * 300, mode))
    assert session.history[mode] == before
    assert read == []
    answers = [ask(s, "And when?", mode)[1].text for s in (session, untouched)]
    assert answers[0] == answers[1]


def test_an_answer_ends_where_the_context_does(make: MakeSession) -> None:
    session = make(sampling=SamplingConfig(max_tokens=500, temp=1.0, seed=1))
    long = session.receiver.tokenizer.decode([300] * 490)
    _, finished = ask(session, long, "receiver")
    assert finished.figures.prompt_tokens + finished.figures.generated_tokens == 512
    assert finished.reason == "length"


@pytest.mark.parametrize("fuse_response", [False, True])
def test_a_sharer_that_reads_along_ends_the_answer_where_its_context_does(
    receiver: LanguageModel,
    sharer: LanguageModel,
    fuser: Fuser,
    fuse_response: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharer.model.args, "max_position_embeddings", 60)
    session = ChatSession(receiver, sharer, fuser, fuse_response=fuse_response)
    session.sampling = SamplingConfig(max_tokens=60, temp=1.0, seed=3)
    _, finished = ask(session, "Who?", "c2c")
    assert (finished.figures.generated_tokens < 59) == fuse_response


@modes
def test_prefilling_is_reported_to_the_end(make: MakeSession, mode: Mode) -> None:
    read: list[Prefilling] = []
    session = make(on_prefill=read.append)
    ask(session, "Who wrote it?", mode)
    assert {e.mode for e in read} == {mode}
    assert read[-1].done == read[-1].total > 0


def test_without_a_fuser_c2c_says_so(receiver: LanguageModel, sharer: LanguageModel) -> None:
    session = ChatSession(receiver, sharer, sampling=SAMPLING)
    with pytest.raises(NoFuserError) as e:
        list(session.ask("Who wrote it?"))
    assert (e.value.sharer, e.value.receiver) == (sharer.name, receiver.name)
    assert session.history == {}
    assert session.gate_reports() == []
    assert ask(session, "Who wrote it?", "receiver")[1].text


@pytest.mark.parametrize("mode", ["c2c", "relay", "sharer"])
def test_without_a_sharer_only_the_receiver_answers(receiver: LanguageModel, mode: Mode) -> None:
    session = ChatSession(receiver, sampling=SAMPLING)
    with pytest.raises(C2CError, match="--sharer"):
        list(session.ask("Who wrote it?", mode))
    assert session.history == {}
    assert ask(session, "Who wrote it?", "receiver")[1].text


def test_a_fuser_for_other_models_is_refused(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser
) -> None:
    with pytest.raises(C2CError):
        ChatSession(sharer, receiver, fuser)


@modes
def test_reset_forgets_everything_but_how_a_conversation_begins(
    make: MakeSession, mode: Mode
) -> None:
    read: list[Prefilling] = []
    session, fresh = make(on_prefill=read.append), make(on_prefill=read.append)
    ask(session, "Who wrote it?", mode)
    session.reset()
    assert session.history == {} and session.messages(mode) == []
    assert session.gate_reports() == []
    texts, totals = [], []
    for one in (session, fresh):
        read.clear()
        texts.append(ask(one, "And when?", mode)[1].text)
        totals.append(sum(e.total for e in read if e.done == e.total))
    assert texts[0] == texts[1] and totals[0] < totals[1]


def test_a_turn_that_is_asked_again_tells_of_its_gates_again(make: MakeSession) -> None:
    session = make()
    ask(session, "Who wrote it?", "c2c")
    _, once = ask(session, "And when?", "c2c")
    (first,) = session.gate_reports()
    session.undo("c2c")
    _, again = ask(session, "And when?", "c2c")
    (second,) = session.gate_reports()
    assert again.text == once.text
    assert second.start >= first.start > 0
    expected = np.array(first.token_changes)[..., second.start - first.start :]
    np.testing.assert_allclose(second.token_changes, expected, atol=2e-4)


def test_other_gates_fuse_anew_but_read_nothing_again(make: MakeSession) -> None:
    read: list[Prefilling] = []
    session, fresh = make(on_prefill=read.append), make(on_prefill=read.append)
    own = session.gates
    ask(session, "Who wrote it?", "c2c")
    shut = [((False,) * 4, own[0][1])]
    for one in (session, fresh):
        one.set_gates(shut)
    assert session.gate_reports() == []
    fresh.history["c2c"] = [dict(m) for m in session.history["c2c"]]
    texts, totals = [], []
    for one in (session, fresh):
        _, second = ask(one, "Who?", "c2c")
        texts.append(second.text)
        totals.append(read[-1].total)
    assert texts[0] == texts[1] and totals[0] < totals[1] - 30
    assert second.figures.new_prompt_tokens == second.figures.prompt_tokens  # fused anew
    session.set_gates(own)


def test_padding_is_no_text(receiver: LanguageModel, sharer: LanguageModel) -> None:
    """As of a published fuser that aligns token by token, into a model that could think."""
    able = replace(receiver, tokenizer=thinker(receiver, "<think>", "</think>"))
    fuser = open_fuser(receiver, sharer, alignment="first")
    session = ChatSession(able, with_template(sharer, WORDY), fuser, sampling=SAMPLING)
    assert ask(session, "Who wrote it?", "c2c")[1].text
    (report,) = session.gate_reports()
    for texts in zip(*report.tokens, strict=True):
        assert "" in texts and "Who" in "".join(texts)


@modes
def test_an_answer_that_is_all_thoughts_has_figures(
    receiver: LanguageModel,
    sharer: LanguageModel,
    fuser: Fuser,
    mode: Mode,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(thoughts, "BUDGET", 9)
    able = [replace(lm, tokenizer=thinker(lm, "assistant", "<no>")) for lm in (receiver, sharer)]
    for lm in able:
        lm.tokenizer.eos_token_ids = set()  # it goes on to think
    session = ChatSession(*able, fuser, sampling=SAMPLING)
    _, finished = ask(session, "Who wrote it?", mode)
    assert (finished.text, finished.reason) == ("", "length")
    assert (finished.figures.generated_tokens, finished.figures.tokens_per_s) == (16, 0.0)
    assert session.crossed() is None and session.history == {}
    chat._answer_once(session, "Who wrote it?", mode, None, False, False)
    out, err = capsys.readouterr()
    assert not out.strip() and err.startswith(f"c2c-chat: {mode}: ") and "thoughts" in err


def test_thoughts_are_counted_but_have_no_speed(make: MakeSession) -> None:
    whole = ask(make(sampling=replace(SAMPLING, max_tokens=20)), "Who wrote it?", "receiver")[1]
    end, session = whole.text[5:8], make()
    session.receiver = replace(
        session.receiver, tokenizer=thinker(session.receiver, "assistant", end)
    )
    events, finished = ask(session, "Who wrote it?", "receiver")
    f = finished.figures
    assert finished.text and finished.text in whole.text.partition(end)[2]
    assert f.generated_tokens == sum(isinstance(e, Text) for e in events) > SAMPLING.max_tokens
    said = f.tokens_per_s * (f.total_s - f.first_token_s)
    assert said == pytest.approx(SAMPLING.max_tokens - 1)
