"""The app loses nothing, doubles nothing, and a key means what is in sight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from c2c_mlx import events
from c2c_mlx.config import Pair, SamplingConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.talk.engine import InferenceThread
from c2c_mlx.tui import export, session_file
from c2c_mlx.tui.app import ChatApp
from c2c_mlx.tui.conversation import Conversation
from c2c_mlx.tui.preview import RECORDING, Recording, Replay, until
from c2c_mlx.tui.run import leave, opened
from c2c_mlx.tui.screens.ballot import Ballot
from c2c_mlx.tui.session_file import SessionFile

RECORDED = Recording.read(RECORDING)
QUESTIONS = list(RECORDED.turns)
SIZE = (200, 50)
BOTH = ("c2c", "relay")


class Stage(Replay):
    """Says nothing by itself, and knows what it was asked."""

    def __init__(self, **loaded: Any) -> None:
        super().__init__(RECORDED, float("inf"))
        self.asked: list[tuple[str, tuple[str, ...], int]] = []
        self.undone: list[list[str]] = []
        self.restored: list[Any] = []  # gates
        self.is_silent = False

    def ask(self, question: str, modes: Any, attempt: int = 0) -> None:
        self.asked.append((question, tuple(modes), attempt))
        if not self.is_silent:
            super().ask(question, modes, attempt)

    def undo(self, modes: Any) -> None:
        self.undone.append(list(modes))

    def restore(self, histories: Any, gates: Any) -> None:
        self.restored.append(gates)

    def say(self, *said: events.EngineEvent) -> None:
        self._play([(0.0, event) for event in said])


def staged(file: SessionFile | None = None, modes: Any = BOTH) -> tuple[ChatApp, Stage]:
    stage = Stage()
    return ChatApp(stage, Conversation(stage.pair), modes, file), stage


@pytest.fixture
def file():
    file = SessionFile()
    yield file
    file.close()


async def ask(pilot: Pilot[None], question: str) -> None:
    chat = pilot.app
    assert isinstance(chat, ChatApp)
    await until(lambda: chat.state.loaded is not None)
    chat.main.prompt.show(question)
    await pilot.press("enter")
    await until(lambda: not chat.state.is_busy)
    await pilot.pause()


def finished(number: int, mode: str) -> events.Finished:
    said = (e for _, e in RECORDED.turns[QUESTIONS[number]] if isinstance(e, events.Finished))
    return next(e for e in said if e.mode == mode)


# --- a quit in the middle of a turn ---------------------------------------------------------


async def test_a_turn_is_saved_when_it_begins_and_at_each_answer(file: SessionFile) -> None:
    chat, stage = staged(file)
    stage.is_silent = True
    async with chat.run_test(size=SIZE) as pilot:
        chat.main.prompt.show("Who?")
        await pilot.press("enter")
        (turn,) = session_file.read(file.name).turns
        assert turn.question == "Who?" and list(turn.answers) == ["c2c", "relay"]
        stage.say(events.Text("c2c", "It was"), finished(0, "c2c"), events.Text("relay", "She"))
        await until(lambda: session_file.read(file.name).turns[0].answers["c2c"].figures)
    # The app has ended, and this is what was still said.
    stage.say(events.Text("relay", " did."))
    chat.follower.take_in()
    chat.save()
    (turn,) = session_file.read(file.name).turns
    assert turn.answers["c2c"].text == finished(0, "c2c").text
    assert (turn.answers["relay"].text, turn.answers["relay"].reason) == ("She did.", "")


async def test_a_quit_right_behind_enter_keeps_the_question(file: SessionFile) -> None:
    chat, stage = staged(file)
    stage.is_silent = True
    async with chat.run_test(size=SIZE) as pilot:
        await until(lambda: chat.state.loaded is not None)
        for key in (*"Who", "enter", "ctrl+q"):  # as a terminal delivers a burst
            chat.simulate_key(key)
        await pilot.pause()
    assert [t.question for t in session_file.read(file.name).turns] == ["Who"]


async def test_what_the_models_said_until_they_ended_is_kept(
    tiny_pair: Pair, file: SessionFile
) -> None:
    sampling = SamplingConfig(max_tokens=400, temp=1.0)
    engine = InferenceThread(tiny_pair, sampling)
    chat = ChatApp(engine, Conversation(tiny_pair, sampling), BOTH, file)
    async with chat.run_test(size=SIZE) as pilot:
        await pilot.press(*"Who?", "enter")
        await until(lambda: chat.state.turn and chat.state.turn.answers["c2c"].text)
        await pilot.press("ctrl+q")
    leave(chat, engine)
    (name,) = session_file.names()
    (turn,) = session_file.read(name).turns
    answer = turn.answers["c2c"]
    assert answer.text and (answer.reason in ("stop", "stopped", "length")) and answer.figures


# --- keys below dialogs ---------------------------------------------------------------------


async def test_keys_of_the_app_do_nothing_below_a_dialog() -> None:
    chat, stage = staged()
    async with chat.run_test(size=SIZE) as pilot:
        await ask(pilot, QUESTIONS[0])
        for opener in ("f1", "f2", "f6", "ctrl+l"):
            await pilot.press(opener)
            over = chat.screen
            assert over is not chat.main
            keys = "ctrl+r ctrl+n ctrl+g ctrl+o ctrl+t ctrl+p f2 f3 f4 f5 f6 f7 f8".split()
            await pilot.press(*keys)
            assert chat.screen is over and len(chat.screen_stack) == 2
            await pilot.press("escape")
            assert chat.screen is chat.main
        assert len(stage.asked) == 1 and len(chat.state.conversation.turns) == 1
        assert not chat.state.is_blind and chat.state.modes == list(BOTH)


async def test_one_turn_has_one_vote_and_a_key_for_another_dialog_is_none(shows) -> None:
    chat, stage = staged()
    stage.is_silent = True
    async with chat.run_test(size=SIZE) as pilot:
        await until(lambda: chat.state.loaded is not None)
        await pilot.press("f7")
        chat.main.prompt.show("Who?")
        await pilot.press("enter", "f2")
        stage.say(finished(0, "c2c"), finished(0, "relay"), events.TurnOver(1.0))
        await until(lambda: not chat.state.is_busy)
        assert not isinstance(chat.screen, Ballot)  # a word typed into the settings is no vote
        await pilot.press("escape")
        await until(lambda: isinstance(chat.screen, Ballot))
        await pilot.press("ctrl+r", "f7", "f1")
        assert isinstance(chat.screen, Ballot) and len(chat.screen_stack) == 2
        await pilot.press("t")
        await until(lambda: chat.screen is chat.main)
        assert len(stage.asked) == 1


@pytest.mark.parametrize("reason", ["stopped", "empty"])
async def test_an_answer_that_did_not_come_to_its_end_is_not_voted_on(shows, reason: str) -> None:
    chat, stage = staged()
    stage.is_silent = True
    async with chat.run_test(size=SIZE) as pilot:
        await until(lambda: chat.state.loaded is not None)
        await pilot.press("f7")
        chat.main.prompt.show("Who?")
        await pilot.press("enter")
        relay = finished(0, "relay")
        text, ended = ("half of it", "stopped") if reason == "stopped" else ("", "stop")
        cut = events.Finished("relay", text, "", ended, relay.figures)
        stage.say(finished(0, "c2c"), cut, events.TurnOver(1.0))
        await until(lambda: not chat.state.is_busy)
        await shows(chat, "Paris", without="which answer is better")
        assert chat.screen is chat.main
        assert "C2C against relay" not in export.to_markdown(chat.state.conversation)
        await shows(chat, "ready", without="C2C against relay")


# --- what a user typed or chose -------------------------------------------------------------


async def test_a_seed_keeps_all_its_digits(shows) -> None:
    chat, _ = staged()
    chat.state.conversation.sampling = SamplingConfig(temp=0.123456789, seed=12345678901234567890)
    async with chat.run_test(size=SIZE) as pilot:
        await pilot.press("f2")
        await shows(chat, "12345678901234567890")
        await pilot.press("ctrl+s")
        await until(lambda: chat.screen is chat.main)
    assert chat.state.conversation.sampling.seed == 12345678901234567890
    assert chat.state.conversation.sampling.temp == 0.123456789


async def test_editing_gives_the_draft_back(shows) -> None:
    chat, _ = staged()
    async with chat.run_test(size=SIZE) as pilot:
        await ask(pilot, QUESTIONS[0])
        prompt = chat.main.prompt
        for ending in (("escape",), ("f3", "escape"), ("ctrl+r",), ("!", "enter")):
            prompt.show("half a thought")
            await pilot.press("f3")
            assert prompt.text == chat.state.turn.question
            await pilot.press(*ending)
            await until(lambda: not chat.state.is_busy)
            assert prompt.text == "half a thought"
        assert chat.state.turn.question == f"{QUESTIONS[0]}!"


async def test_up_and_down_go_by_the_rows_that_are_seen() -> None:
    chat, _ = staged()
    long = "and so on " * 40
    async with chat.run_test(size=SIZE) as pilot:
        prompt = chat.main.prompt
        prompt.remember("Who?")
        prompt.show(long)
        await pilot.press("up")
        assert prompt.text == long
        await pilot.press("up", "up")
        assert prompt.text == "Who?"
        await pilot.press("down")
        prompt.move_cursor((0, 0))
        await pilot.press("down")
        assert prompt.text == long


async def test_what_was_edited_is_there_when_it_is_leafed_back_to() -> None:
    chat, _ = staged()
    async with chat.run_test(size=SIZE) as pilot:
        prompt = chat.main.prompt
        prompt.remember("Who?", "When?")
        await pilot.press(*"draft", "up", "!", "up", "!")
        assert prompt.text == "Who?!"
        await pilot.press("down")
        assert prompt.text == "When?!"
        await pilot.press("down", "up", "up")
        assert prompt.text == "Who?!"
        await pilot.press("enter")
        assert chat.state.turn.question == "Who?!" and prompt.text == "draft"
        await pilot.press("up", "up")
        assert prompt.text == "When?"  # nothing is edited any more


async def test_a_draft_that_was_leafed_away_outlives_everything_else(file: SessionFile) -> None:
    chat, _ = staged(file)
    async with chat.run_test(size=SIZE) as pilot:
        await ask(pilot, QUESTIONS[0])
        name, prompt = file.name, chat.main.prompt
        await pilot.press(*"draft", "up")
        await pilot.press("f3", "!", "enter")
        await until(lambda: not chat.state.is_busy)
        assert prompt.text == QUESTIONS[0]
        await pilot.press("ctrl+n")
        await until(lambda: not file.name)
        await pilot.press("f6", "enter")
        await until(lambda: file.name == name)
        await pilot.press("down", "down")
        assert prompt.text == "draft"


async def test_editing_takes_its_own_turn_back_and_no_other_of_the_same_words() -> None:
    chat, _ = staged(modes=["c2c", "relay", "receiver"])
    async with chat.run_test(size=SIZE) as pilot:
        await ask(pilot, QUESTIONS[0])
        await pilot.press("ctrl+o")
        await ask(pilot, QUESTIONS[0])
        await pilot.press("f3", "enter")
        await until(lambda: not chat.state.is_busy)
        views = {mode: len(pane.query(".turn")) for mode, pane in chat.main.panes.items()}
        assert views == {"c2c": 2, "relay": 2, "receiver": 1, "sharer": 0}


async def test_a_session_comes_back_with_its_gates(file: SessionFile) -> None:
    chat, stage = staged(file)
    async with chat.run_test(size=SIZE) as pilot:
        await ask(pilot, QUESTIONS[0])
        await pilot.press("ctrl+g", "v", "escape")
        await ask(pilot, QUESTIONS[1])
        name, cut = file.name, chat.state.gates
        await pilot.press("ctrl+n", "ctrl+g", "r", "escape")
        await until(lambda: chat.state.gates == chat.state.loaded.gates)
        await ask(pilot, QUESTIONS[2])
        await pilot.press("f6", "down", "enter")
        await until(lambda: file.name == name)
        await until(lambda: chat.state.gates == cut)
        assert stage.restored[-1] == cut != chat.state.loaded.gates


@pytest.mark.parametrize("keys", [(*"Who?", "enter"), ("ctrl+r",)])
@pytest.mark.parametrize("fits", [True, False])
async def test_gates_come_back_to_who_asks_before_the_models_are_loaded(
    keys: tuple[str, ...], fits: bool
) -> None:
    class Loading(Stage):
        def start(self) -> None:
            """Loads when the test says so."""

    stage = Loading()
    stage.is_silent = True
    loaded = RECORDED.start[-1][1]
    assert isinstance(loaded, events.Loaded)
    cut = (((False,) * (15 if fits else 7),) * 2,)
    talk = Conversation(stage.pair)
    talk.begin(QUESTIONS[0], BOTH, cut)
    for _, event in RECORDED.turns[QUESTIONS[0]]:
        talk.record(event)
    chat = ChatApp(stage, talk, BOTH)
    async with chat.run_test(size=SIZE) as pilot:
        await pilot.press(*keys)
        await until(lambda: stage.asked)
        assert stage.restored == [cut] and set(stage.asked[0][1]) == set(BOTH)
        stage.say(loaded)
        await until(lambda: chat.state.loaded is not None)
        assert chat.state.turn.latest.gates == chat.state.gates == (cut if fits else loaded.gates)


def test_a_resumed_session_takes_the_flags_that_were_given(file: SessionFile, home: Path) -> None:
    talk = Conversation(RECORDED.pair, SamplingConfig(temp=0.2, seed=3), "Be kind.")
    talk.begin("Who?", ["c2c"], ())
    file.save(talk)
    file.close()
    other = Pair("a", ("b",))
    for given, system in (({}, None), ({"temp": 0.7}, "Be brief.")):
        taken, held = opened(other, given, system, "")
        assert taken.pair == RECORDED.pair and taken.sampling.seed == 3
        assert taken.sampling.temp == given.get("temp", 0.2)
        assert taken.system == (system or "Be kind.")
        held.close()


def test_a_session_finds_its_folders_from_anywhere(
    file: SessionFile, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    for name in ("runs/mine", "gemma3-270m", "elsewhere"):
        (work / name).mkdir(parents=True)
    monkeypatch.chdir(work)
    # An alias stays one, though a folder is called like it.
    given = Pair("runs/mine", ("gemma3-270m", "org/model"), ("runs/mine", "trained/1"))
    talk, held = opened(given, {}, None, None)
    talk.begin("Who?", ["c2c"], ())
    held.save(talk)
    held.close()
    monkeypatch.chdir("elsewhere")
    mine = str(work / "runs/mine")
    assert file.load().pair == Pair(mine, ("gemma3-270m", "org/model"), (mine, "trained/1"))


async def test_an_export_says_with_what_each_answer_was_made() -> None:
    chat, _ = staged()
    async with chat.run_test(size=SIZE) as pilot:
        await ask(pilot, QUESTIONS[0])
        chat._set((SamplingConfig(temp=0.7, seed=12345678), "Be kind."))
        await ask(pilot, QUESTIONS[1])
        await pilot.press("ctrl+r")
        await until(lambda: not chat.state.is_busy)
    text = export.to_markdown(chat.state.conversation)
    assert [text.count(f"temperature {t}") for t in ("0.0", "0.7")] == [1, 2]
    assert "seed 12345678," in text and "seed 12345679," in text
    assert text.index("temperature 0.0") < text.index("Be kind.") < text.index("seed 12345679,")
    turns = json.loads(session_file.to_json(chat.state.conversation))["turns"]
    assert [[t["sampling"]["temp"] for t in turn["takes"]] for turn in turns] == [[0], [0.7, 0.7]]


# --- gate surgery ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(200, 50), (120, 40), (80, 24)])
async def test_surgery_shows_the_answers_before_and_after(shows, file, size) -> None:
    chat, stage = staged(file)
    chat.state.conversation.sampling = SamplingConfig(temp=0.7)
    async with chat.run_test(size=size) as pilot:
        await ask(pilot, QUESTIONS[0])
        await pilot.press("ctrl+g", "v", "ctrl+r")
        await until(lambda: len(stage.asked) == 2 and not chat.state.is_busy)
        # The relay has nothing to do with gates, and the seed is the same: they alone differ.
        assert stage.asked == [(QUESTIONS[0], BOTH, 0), (QUESTIONS[0], ("c2c",), 0)]
        assert stage.undone == [["c2c"]]
        await pilot.pause()
        pane = chat.main.panes["c2c"]
        before, after = pane.query(".take")
        await shows(chat, "before: 30", "after: 29 of")
        is_wide = before.region.y == after.region.y and before.region.x < after.region.x
        is_high = before.region.x == after.region.x and before.region.y < after.region.y
        assert is_wide or (size == (120, 40) and is_high)
        assert len(chat.main.panes["relay"].query(".take")) == 1
        saved = session_file.read(file.name)
    (turn,) = saved.turns
    assert [sum(map(sum, take.gates[0])) for take in turn.takes] == [30, 29]
    assert [list(take.answers) for take in turn.takes] == [["c2c", "relay"], ["c2c"]]
    assert all(take.answers["c2c"].is_whole for take in turn.takes)
    text = export.to_markdown(saved)
    assert "Take 1: 30 of 30 gates open" in text and "Take 2: 29 of 30 gates open: not V15" in text
    assert text.count("C2C against relay") == 1  # the second C2C raced nobody
    again, _ = staged()
    again.state.conversation = saved
    async with again.run_test(size=size):
        await shows(again, "before: 30", "after: 29 of")


async def test_the_rivals_take_turns_in_going_first() -> None:
    chat, stage = staged(modes=["c2c", "relay", "receiver"])
    async with chat.run_test(size=SIZE) as pilot:
        for question in (*QUESTIONS, QUESTIONS[0]):
            await ask(pilot, question)
        assert [modes.index("c2c") for _, modes, _ in stage.asked] == [0, 1, 0, 1]
        assert all(modes[2] == "receiver" for _, modes, _ in stage.asked)


# --- no fuser -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(120, 40), (80, 24)])
async def test_c2cs_own_pane_says_what_is_missing_and_what_to_do(
    shows, screen, tiny_pair: Pair, size
) -> None:
    pair = Pair(tiny_pair.receiver, tiny_pair.sharers)
    engine = InferenceThread(pair, SamplingConfig(max_tokens=8))
    chat = ChatApp(engine, Conversation(pair, SamplingConfig(max_tokens=8)), BOTH)
    try:
        async with chat.run_test(size=size, notifications=True) as pilot:
            await shows(chat, "C2C cannot answer", "c2c-train", "meanwhile", "ready")
            assert "--mode" not in screen(chat)
            await pilot.press(*"Who?", "enter")
            await until(lambda: chat.state.turn is not None and not chat.state.is_busy)
            assert list(chat.state.turn.answers) == ["relay"]
            await shows(chat, "C2C cannot answer")
            chat.state.modes.remove("relay")
            await pilot.press(*"Who?", "enter")
            await shows(chat, "nobody here can answer")
            assert chat.main.prompt.text == "Who?"
    finally:
        engine.close()
        engine.join()


# --- sessions -------------------------------------------------------------------------------


def made(question: str) -> str:
    talk, file = Conversation(RECORDED.pair), SessionFile()
    talk.begin(question, ["c2c"], ())
    file.save(talk)
    file.close()
    return talk.name


async def test_a_session_can_be_looked_into_renamed_and_deleted(shows, file) -> None:
    made("Who wrote Middlemarch,\nand when?")
    chat, _ = staged(file)
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await ask(pilot, QUESTIONS[0])
        await pilot.press("f6")
        await shows(chat, "●", "Who wrote Middlemarch,", f"> {QUESTIONS[0]}", "Paris")
        await pilot.press("d", "d")
        await shows(chat, "this conversation is open")
        await pilot.press("r", *["backspace"] * 40, *"Mine", "enter")
        await shows(chat, "Mine")
        assert chat.state.conversation.title == session_file.read(file.name).title == "Mine"
        await pilot.press("down", "r", "end", *"!", "enter")
        await shows(chat, "Middlemarch,!")
        await pilot.press("d")
        await shows(chat, "D once more deletes")
        await pilot.press("up", "down", "d")
        assert len(session_file.names()) == 2
        await pilot.press("d")
        await until(lambda: session_file.names() == [file.name])
        await pilot.press("escape")
        assert chat.screen is chat.main


async def test_a_session_that_another_app_has_open_is_left_alone(shows, file) -> None:
    name = made("Who?")
    other = SessionFile()
    other.load(name)
    for act in (lambda: file.load(name), lambda: file.rename(name, "x"), lambda: file.delete(name)):
        with pytest.raises(C2CError, match="open in another c2c-chat"):
            act()
    chat, _ = staged(file)
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await pilot.press("f6", "enter")
        await shows(chat, "in another")
        assert not chat.state.conversation.turns
    other.close()
    assert file.load(name).turns[0].question == "Who?"


def test_two_apps_never_write_to_one_new_session(file: SessionFile) -> None:
    other, talks = SessionFile(), [Conversation(RECORDED.pair) for _ in range(2)]
    for talk, its in zip(talks, (file, other), strict=True):
        talk.begin("Who?", ["c2c"], ())
        talk.name = "same"
        its.save(talk)
        its.save(talk)
    other.close()
    assert [talk.name for talk in talks] == ["same", "same-2"]
    assert sorted(session_file.names()) == ["same", "same-2"]


def test_a_session_is_written_as_it_would_be_anew(file: SessionFile) -> None:
    """Turns that nothing changes any more are kept as text."""
    talk = Conversation(RECORDED.pair)
    for n, (question, said) in enumerate(RECORDED.turns.items()):
        talk.begin(question, BOTH, ())
        for _, event in said:
            talk.record(event)
        file.save(talk)
        text = session_file.path(talk.name).read_text()
        assert text == session_file.to_json(talk) and len(json.loads(text)["turns"]) == n + 1
    talk.turns.pop()
    talk.turns[-1].takes.append(talk.take(["c2c"], (), 1))
    file.save(talk)
    assert session_file.path(talk.name).read_text() == session_file.to_json(talk)


def test_sessions_of_the_last_version_are_read(file: SessionFile) -> None:
    talk = Conversation(RECORDED.pair, SamplingConfig(temp=0.3), "Be kind.")
    talk.begin(QUESTIONS[0], BOTH, (((True,), (False,)),))
    for _, event in RECORDED.turns[QUESTIONS[0]]:
        talk.record(event)
    new = json.loads(session_file.to_json(talk))
    (take,) = new["turns"][0]["takes"]
    turn = {"question": QUESTIONS[0]} | {key: take[key] for key in ("answers", "gates", "reports")}
    old = {k: v for k, v in new.items() if k != "title"} | {"format_version": 2, "turns": [turn]}
    assert session_file.parse(old, "old.json") == talk


@pytest.mark.parametrize("between", [("r", "!", "enter"), ("q",), ("r", "escape"), ("down", "up")])
async def test_a_session_is_deleted_by_the_same_key_twice_and_no_other_way(
    shows, file: SessionFile, between: tuple[str, ...]
) -> None:
    chat, _ = staged(file)
    async with chat.run_test(size=SIZE) as pilot:
        await ask(pilot, QUESTIONS[0])
        name = file.name
        await pilot.press("ctrl+n")
        await ask(pilot, QUESTIONS[1])
        await pilot.press("f6", "end")
        await shows(chat, f"> {QUESTIONS[0]}")
        await pilot.press("d")
        await shows(chat, "D once more deletes it")
        await pilot.press(*between)
        await shows(chat, f"> {QUESTIONS[0]}", without="D once more deletes it")
        await pilot.press("d")
        await shows(chat, "D once more deletes it")
        assert name in session_file.names()
        await pilot.press("d")
        assert name not in session_file.names()
