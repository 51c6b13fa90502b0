"""The app as a person sees it, answering from a recording."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from textual.pilot import Pilot

from c2c_mlx import events
from c2c_mlx.config import SamplingConfig
from c2c_mlx.progress import Progress
from c2c_mlx.tui import session_file, themes, votes
from c2c_mlx.tui.app import ChatApp
from c2c_mlx.tui.conversation import Answer, Conversation
from c2c_mlx.tui.preview import RECORDING, Recording, Replay, app, until
from c2c_mlx.tui.session_file import SessionFile
from c2c_mlx.tui.widgets.pane import AnswerPane

FAST = float("inf")
QUESTIONS = list(Recording.read(RECORDING).turns)
SIZE = (160, 40)


async def ask(pilot: Pilot[None], question: str) -> None:
    chat = pilot.app
    assert isinstance(chat, ChatApp)
    chat.main.prompt.show(question)
    await pilot.press("enter")
    await until(lambda: not chat.state.is_busy)
    await pilot.pause()


def answer(number: int, mode: str) -> events.Finished:
    return next(
        e
        for _, e in Recording.read(RECORDING).turns[QUESTIONS[number]]
        if isinstance(e, events.Finished) and e.mode == mode
    )


def kept(speed: float = FAST, name: str = "") -> ChatApp:
    """As users have it: what outlives the app is kept."""
    recording = Recording.read(RECORDING)
    file = SessionFile()
    if name:
        talk = file.load(name)
    else:
        talk = Conversation(recording.pair)
    return ChatApp(Replay(recording, speed), talk, ["c2c", "relay"], file)


class Stage(Replay):
    """An engine that says what the test puts into it."""

    def __init__(self, *said: events.EngineEvent) -> None:
        super().__init__(Recording.read(RECORDING))
        self.said = list(said)
        self.asked: list[str] = []

    def start(self) -> None:
        self.say(*self.said)

    def ask(self, question: str, modes: object, attempt: int = 0) -> None:
        self.asked.append(question)

    def say(self, *said: events.EngineEvent) -> None:
        self._play([(0.0, event) for event in said])


def staged(*said: events.EngineEvent) -> tuple[ChatApp, Stage]:
    stage = Stage(*said)
    return ChatApp(stage, Conversation(stage.pair), ["c2c", "relay"]), stage


def loaded(**other: object) -> events.Loaded:
    recorded = Recording.read(RECORDING).start[-1][1]
    assert isinstance(recorded, events.Loaded)
    return replace(recorded, **other)  # type: ignore[arg-type]


async def test_everything_stands_there_before_a_model_is_loaded(shows) -> None:
    chat, stage = staged()
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await shows(chat, "C2C", "text relay", "gates", "Ask both", "starting")
        stage.say(Progress("downloading gemma3-270m", 30, 120))
        await shows(chat, "downloading gemma3-270m", "25%")
        await pilot.press("h", "i", "ctrl+j", "y", "o")
        assert chat.main.prompt.text == "hi\nyo" and chat.state.loaded is None
        stage.say(loaded())
        await shows(chat, "ready", "gemma3-270m · ", without="25%")
        assert chat.main.prompt.text == "hi\nyo"


async def test_a_turn_shows_both_answers_and_what_they_cost(shows) -> None:
    chat = app(FAST)
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await ask(pilot, QUESTIONS[0])
        c2c, relay = (answer(0, mode) for mode in ("c2c", "relay"))
        await shows(
            chat,
            *(c2c.text, relay.text, "the sharer wrote", "C2C against relay: first token"),
            f"{c2c.figures.first_token_s:.2f} s to first token",
            f"{relay.figures.relayed_tokens} relayed + {relay.figures.generated_tokens}",
            *("smollm2-135m ← gemma3-270m", "1.7 GB", "context ▰"),
        )


async def test_every_pane_keeps_its_conversation(shows) -> None:
    chat = app(FAST)
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await ask(pilot, QUESTIONS[0])
        await pilot.press("ctrl+o")
        await ask(pilot, QUESTIONS[1])
        await shows(chat, answer(0, "c2c").text, answer(1, "relay").text[:20], "receiver alone")
        views = {mode: len(pane.query(".turn")) for mode, pane in chat.main.panes.items()}
        assert views == {"c2c": 2, "relay": 2, "receiver": 1, "sharer": 0}


async def test_a_narrow_terminal_has_tabs_and_resizing_loses_nothing(shows) -> None:
    chat = app(FAST)
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await ask(pilot, QUESTIONS[1])
        await pilot.resize_terminal(80, 24)
        c2c, relay = answer(1, "c2c").text, answer(1, "relay").text
        await shows(chat, "Relay", c2c, without=relay)
        await pilot.press("ctrl+t")
        await shows(chat, relay, without=c2c)
        await pilot.press("ctrl+g")
        await shows(chat, "sharer's layer")
        await pilot.resize_terminal(*SIZE)
        await shows(chat, relay.split(",")[0], c2c.split(",")[0], "gates")


@pytest.mark.parametrize("key", ["ctrl+g", "escape", "f8", "f3"])
async def test_from_the_gates_a_narrow_terminal_goes_back_to_the_answers(shows, key) -> None:
    chat = app(FAST)
    async with chat.run_test(size=(80, 24), notifications=True) as pilot:
        await ask(pilot, QUESTIONS[0])
        await pilot.press("ctrl+t", "ctrl+g")
        await shows(chat, "sharer's layer")
        await until(lambda: chat.main.gate_panel.view.has_focus)
        await pilot.press(key)
        await shows(chat, answer(0, "relay").text, without="sharer's layer")
        await ask(pilot, QUESTIONS[1])
        await shows(chat, answer(1, "relay").text)


async def test_hidden_gates_have_no_tab(shows) -> None:
    chat = app(FAST)
    async with chat.run_test(size=(80, 24), notifications=True) as pilot:
        await ask(pilot, QUESTIONS[1])
        await pilot.press("f8")
        await shows(chat, answer(1, "c2c").text, without="Relay  Gates")
        await pilot.press("ctrl+t")
        await shows(chat, answer(1, "relay").text)
        await pilot.press("ctrl+t")
        await shows(chat, answer(1, "c2c").text)
        await pilot.press("ctrl+g")
        await shows(chat, "Relay  Gates", "sharer's layer")


async def test_the_gates_name_what_is_under_the_cursor(shows) -> None:
    chat = app(FAST)
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await ask(pilot, QUESTIONS[1])
        (report,) = chat.state.turn.reports
        (receiver_layer, sharer_layer), weight = report.layers[0], report.weights[1][0]
        await pilot.press("ctrl+g")
        await shows(
            chat,
            f"layer {receiver_layer} ← sharer's layer {sharer_layer}",
            f"V open · weight {weight:.2f}",
            *("gate open", "weight, 0 to 1", "change of cache"),
        )
        await pilot.press("up")
        await shows(chat, f"layer {receiver_layer - 1}: the fuser leaves it alone")
        await pilot.press("down", "w", *["right"] * 13)
        number = chat.main.gate_panel.view.token
        ours, theirs = (t.strip() for t in report.tokens[number])
        assert number == 13
        await shows(chat, f"token {report.start + number} ", ours, theirs, "layer x token")
        await pilot.press("w")
        await shows(chat, "over turns", "turn 1")


async def test_empty_bars_say_why(shows) -> None:
    chat = app(FAST)
    async with chat.run_test(size=SIZE) as pilot:
        await ask(pilot, QUESTIONS[1])
        (report,) = chat.state.turn.reports
        zeros = ((0.0,) * len(report.layers),) * 2
        chat.main.show_reports([[replace(report, weights=zeros, changes=zeros)]])
        await shows(chat, "nothing was let in this time")
        chat.main.show_reports([[]])
        await shows(chat, "ask something")
        chat.main.gate_panel.view.show_gates(((((False,) * 15,) * 2),))
        await shows(chat, "no gate is open: the receiver alone")


async def test_surgery_is_said_and_undone(shows) -> None:
    chat = app(FAST)
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await ask(pilot, QUESTIONS[0])
        await pilot.press("ctrl+g", "v", "down", "k")
        await shows(chat, "C2C (modified: 2 gates)", "○", "Ctrl+R asks again")
        assert [sum(kind) for kind in chat.state.gates[0]] == [14, 14]
        await pilot.press("a")
        await until(lambda: not any(map(any, chat.state.gates[0])))
        await pilot.press("r")
        await until(lambda: chat.state.gates == chat.state.loaded.gates)
        await shows(chat, "C2C", without="modified")
        await pilot.press("home", "space")
        await shows(chat, "layer 0 is not fused")
        await pilot.press("escape")
        assert chat.main.prompt.has_focus


async def test_surgery_while_nobody_listens_adds_up(shows) -> None:
    chat, stage = staged(loaded())
    async with chat.run_test(size=SIZE) as pilot:
        await shows(chat, "ready")
        await pilot.press(*"Who?", "enter")
        await until(lambda: stage.asked == ["Who?"])
        await pilot.press("ctrl+g", "k", "v", "down", "k", "k")
        await until(lambda: [sum(kind) for kind in chat.state.gates[0]] == [14, 14])
        view = chat.main.gate_panel.view
        view.action_gate(0)
        view.action_gate(1)  # before the app has heard of the other
        await until(lambda: [sum(kind) for kind in chat.state.gates[0]] == [13, 13])


async def test_what_is_not_fused_has_no_gates_to_open(shows) -> None:
    (link,) = loaded().links
    n = len(link.layers)
    values = replace(link, gates=((False,) * n, (True,) * n), kinds=(1,))
    chat, _ = staged(loaded(links=(values,)))
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await shows(chat, "ready")
        await pilot.press("ctrl+g", "k")
        await shows(chat, "keys are not fused")
        await pilot.press("a")
        await until(lambda: not any(map(any, chat.state.gates[0])))
        await pilot.press("a")
        await until(lambda: chat.state.gates == chat.state.loaded.gates)
        await shows(chat, "C2C", without="modified")


async def test_gates_of_another_fuser_are_not_drawn(shows) -> None:
    (link,) = loaded().links
    below = tuple((layer, 0) for layer in range(10))
    more = replace(link, layers=below + link.layers, gates=((True,) * 25,) * 2)
    chat = app(FAST)
    async with chat.run_test(size=SIZE) as pilot:
        await ask(pilot, QUESTIONS[0])
        chat.backend._play([(0.0, loaded(links=(more,)))])
        await until(lambda: chat.state.loaded.links == (more,))
        await ask(pilot, QUESTIONS[1])  # what comes is of the fuser before, too
        await pilot.press("ctrl+g", "w", "w")
        await shows(chat, "over turns")


async def test_what_is_said_while_the_app_ends_brings_nothing_down() -> None:
    """Widgets leave the screen before the models fall silent."""
    chat = app(FAST)
    async with chat.run_test(size=SIZE):
        await until(lambda: chat.state.loaded is not None)
        who, when = (chat.state.conversation.begin(q, [], ()) for q in ("Who?", "And when?"))
        await chat.main.begin(who, ["c2c", "relay"])
        panes, panel = chat.main.panes, chat.main.gate_panel
        for widget in (panes["relay"].turn, panes["relay"], panel):
            await widget.remove()
        await chat.main.write("relay", "some", is_relayed=True)
        await chat.main.write("relay", "text", is_relayed=False)
        finished = answer(0, "relay")
        chat.main.finish("relay", Answer("text", "some", "stop", finished.figures))
        await chat.main.begin(when, ["relay"])
        panel.on_gate_view_moved()


async def test_several_sharers_have_gates_of_their_own(shows) -> None:
    (link,) = loaded().links
    other = events.Link("other", "more", link.layers[:2], ((True, True), (False, True)))
    chat, stage = staged(loaded(sharers=(link.sharer, "other"), links=(link, other)))
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await shows(chat, "smollm2-135m ← gemma3-270m, other", "gates · sharer 1 of 2")
        await pilot.press("ctrl+g")
        await shows(chat, f"← gemma3-270m's layer {link.layers[0][1]}")
        await pilot.press("s", "k")
        await shows(chat, "sharer 2 of 2", "← other's layer", "C2C (modified: 1 gate)")
        assert chat.state.gates == (link.gates, ((False, True), (False, True)))
        await pilot.press("r")
        await until(lambda: chat.state.gates == (link.gates, other.gates))


async def test_gates_live_while_an_answer_is_fused(shows) -> None:
    said = [e for _, e in Recording.read(RECORDING).turns[QUESTIONS[0]]]
    (whole,) = (e for e in said if isinstance(e, events.GateReport))
    weights = tuple((0.375,) * len(whole.layers) for _ in range(2))
    token = replace(whole, weights=weights, tokens=(("cold", "kalt"),), start=77)
    chat, stage = staged(loaded())
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        chat.main.prompt.show(QUESTIONS[0])
        await pilot.press("enter")
        stage.say(events.LiveGates(token))
        await pilot.press("ctrl+g")
        await shows(chat, "gates · this token", "token 77 cold ← sharer's kalt", "weight 0.38")
        stage.say(whole, events.TurnOver(1.0))
        await shows(chat, "gates · this turn", without="kalt")


@pytest.mark.parametrize("no_color", [False, True])
async def test_a_heat_map_needs_no_colour(monkeypatch, screen, no_color) -> None:
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    chat = app(FAST)
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await ask(pilot, QUESTIONS[1])
        await pilot.press("ctrl+g", "w", "x")
        await pilot.pause()
        assert ("▓" in screen(chat)) == no_color
        assert ("▀" in screen(chat)) != no_color


async def test_a_stop_keeps_what_was_said_and_the_conversation_goes_on(shows) -> None:
    chat, stage = staged(loaded())
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        chat.main.prompt.show("Who?")
        await pilot.press("enter")
        await until(lambda: stage.asked)
        stage.say(events.Text("c2c", "It was "), events.Text("c2c", "some"))
        await shows(chat, "It was some", "writing", "waiting")
        await pilot.press("escape")
        await shows(chat, "stopped before it was asked", "It was some")
        assert not chat.state.is_busy and chat.state.conversation.history("c2c") == [
            ("Who?", "", "It was some")
        ]


async def test_while_an_answer_comes_a_question_waits_in_the_prompt(shows) -> None:
    chat, stage = staged(loaded())
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        for text in ("Who?", "And when?"):
            chat.main.prompt.show(text)
            await pilot.press("enter")
        await shows(chat, "an answer is being given")
        assert stage.asked == ["Who?"] and chat.main.prompt.text == "And when?"


async def test_before_the_models_are_loaded_a_question_waits_and_the_app_says_so(shows) -> None:
    class Loading(Stage):
        def stop(self) -> None:
            """Not heard of before it has loaded."""

    stage = Loading()
    chat = ChatApp(stage, Conversation(stage.pair), ["c2c", "relay"])
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await pilot.press(*"Who?", "enter", "ctrl+n")
        await shows(chat, "the question waits for the models", without="an answer is being given")
        await pilot.press("escape")
        await shows(chat, "stops as soon as the models are loaded")
        assert stage.asked == ["Who?"]


async def test_a_model_can_say_nothing_that_the_terminal_obeys(shows, screen) -> None:
    chat, stage = staged(loaded())
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        chat.main.prompt.show("[bold]Who[/] \x1b[2J?")
        await pilot.press("enter")
        await until(lambda: stage.asked)
        stage.say(events.RelayedText("relay", "[red]a[/]\x1b]0;x\x07"))
        stage.say(events.Text("relay", "[bold]b[/bold]\x1b[31m\x9b"))
        await shows(chat, "[bold]Who[/]", "[red]a[/]", "[bold]b[/bold]")
        assert not any(c in screen(chat) for c in "\x1b\x07\x9b")


async def test_errors_are_notices_and_the_others_answer(shows) -> None:
    chat, stage = staged(events.Failed("no fuser: train one"), loaded(links=()))
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await shows(chat, "no fuser: train one", "nothing is fused")
        chat.main.prompt.show("Who?")
        await pilot.press("enter")
        await until(lambda: stage.asked)
        stage.say(events.Failed("the conversation is too long: start anew", "c2c"))
        stage.say(events.Text("relay", "She did."), events.TurnOver(1.0))
        await shows(chat, "the conversation is too", "She did.")
        assert not chat.state.is_busy


async def test_a_relay_without_a_text_says_why(shows) -> None:
    chat, stage = staged(loaded())
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        chat.main.prompt.show("Who?")
        await pilot.press("enter")
        await until(lambda: stage.asked)
        said = answer(0, "relay")
        figures = replace(said.figures, relayed_tokens=1)
        stage.say(replace(said, relayed_text="", figures=figures), events.TurnOver(1.0))
        await shows(chat, "the sharer wrote nothing: it ended at once")


async def test_again_replaces_the_turn_and_says_when_nothing_can_change(shows) -> None:
    chat = app(FAST)
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await ask(pilot, QUESTIONS[0])
        await ask(pilot, QUESTIONS[1])
        await pilot.press("ctrl+r")
        await until(lambda: chat.state.attempt == 1 and not chat.state.is_busy)
        await shows(chat, "greedy decoding says the same again", answer(1, "c2c").text)
        assert [t.question for t in chat.state.conversation.turns] == QUESTIONS[:2]
        assert len(chat.main.panes["c2c"].query(".turn")) == 2


async def test_editing_replaces_the_turn_and_escape_leaves_it(shows) -> None:
    chat = app(FAST)
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await ask(pilot, QUESTIONS[0])
        await pilot.press("f3")
        assert chat.main.prompt.text == QUESTIONS[0]
        await pilot.press("escape")
        assert chat.main.prompt.text == "" and len(chat.state.conversation.turns) == 1
        await pilot.press("f3", "!")
        await pilot.press("enter")
        await until(lambda: chat.state.conversation.turns[-1].question.endswith("!"))
        await until(lambda: not chat.state.is_busy)
        await shows(chat, f"{QUESTIONS[0]}!")
        assert len(chat.state.conversation.turns) == 1
        await pilot.press("ctrl+n")
        await shows(chat, "ready", without=QUESTIONS[0])
        assert not chat.state.conversation.turns


async def test_the_prompt_leafs_through_earlier_questions() -> None:
    chat = app(FAST)
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        for question in QUESTIONS[:2]:
            await ask(pilot, question)
        await pilot.press("x", "up", "up", "up")
        assert chat.main.prompt.text == QUESTIONS[0]
        await pilot.press("down", "down", "down")
        assert chat.main.prompt.text == "x"


async def test_questions_and_theme_outlive_the_app(shows, home: Path) -> None:
    chat = kept()
    async with chat.run_test(size=SIZE) as pilot:
        await ask(pilot, QUESTIONS[0])
        chat.theme = "c2c-light"
        chat.main.prompt.show("Who?")
        await pilot.press("enter")  # and left before an answer came
        await until(lambda: (home / "theme.json").exists())
    again = kept()
    async with again.run_test(size=SIZE) as pilot:
        assert again.theme == "c2c-light"
        await shows(again, "ready")
        await pilot.press("up", "up")
        assert again.main.prompt.text == QUESTIONS[0]
        await pilot.press("down")
        assert again.main.prompt.text == "Who?"


async def test_a_theme_that_is_no_more_and_a_replay_leave_no_trace(home: Path) -> None:
    themes.choose("gone")
    assert kept().theme == "c2c-dark"
    before = list(home.iterdir())
    chat = app(FAST)
    async with chat.run_test(size=SIZE) as pilot:
        chat.theme = "c2c-light"
        await ask(pilot, QUESTIONS[0])
    assert list(home.iterdir()) == before and themes.chosen() == "gone"


async def test_blind_answers_are_hidden_until_the_vote(shows, screen, home) -> None:
    chat = kept()
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await pilot.press("f7")
        chat.main.prompt.show(QUESTIONS[0])
        await pilot.press("enter")
        await shows(chat, "which answer is better?", "A", "B", answer(0, "c2c").text)
        assert "to first token" not in screen(chat).replace("against", "")
        c2c_first = chat.screen.candidates[0][0] == "c2c"
        await pilot.press("a" if c2c_first else "b")
        await shows(chat, "you preferred C2C", "1 blind vote: C2C 1", answer(0, "relay").text)
    pair = votes.pair(chat.state.loaded)
    assert votes.summary(*pair) == "1 blind vote: C2C 1, text relay 0, ties 0"


async def test_sessions_are_saved_and_taken_up_again(shows, home) -> None:
    chat = kept()
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await ask(pilot, QUESTIONS[0])
        await pilot.press("ctrl+g", "v", "escape")
        await until(lambda: not all(map(all, chat.state.gates[0])))
        await ask(pilot, QUESTIONS[1])
    chat.file.close()
    talk = session_file.read(session_file.names()[0])
    assert [t.question for t in talk.turns] == QUESTIONS[:2]
    again = kept(name=talk.name)
    async with again.run_test(size=SIZE, notifications=True) as pilot:
        await shows(again, answer(0, "c2c").text, answer(1, "relay").text, "modified: 1 gate")
        await pilot.press("ctrl+n")
        await ask(pilot, QUESTIONS[2])
        await pilot.press("f6", "down", "enter")
        await shows(again, answer(0, "c2c").text)
    assert len(session_file.names()) == 2


async def test_export_writes_both_files_here(shows, home: Path) -> None:
    chat = app(FAST)
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await pilot.press("f5")
        await shows(chat, "nothing to export")
        await ask(pilot, QUESTIONS[0])
        await pilot.press("f5")
        await shows(chat, "Exported")
    (markdown,), (document,) = home.glob("*.md"), home.glob("*.json")
    assert answer(0, "c2c").text in markdown.read_text()
    assert len(json.loads(document.read_text())["turns"]) == 1


async def test_settings_are_checked_and_taken_over(shows) -> None:
    chat = app(FAST)
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await pilot.press("f2")
        await shows(chat, "temperature 0 is greedy")
        chat.screen.query_one("#temp").value = "-1"
        await pilot.press("ctrl+s")
        await shows(chat, "temp must not be negative")
        chat.screen.query_one("#temp").value = "0.5"
        chat.screen.query_one("#system").text = "Be kind."
        await pilot.press("ctrl+s")
        await until(lambda: chat.screen is chat.main)
    assert chat.state.conversation.sampling == SamplingConfig(temp=0.5)
    assert chat.state.conversation.system == "Be kind."


async def test_copying_help_and_themes(shows) -> None:
    chat = app(FAST)
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await pilot.press("f4")
        await shows(chat, "C2C has said nothing yet")
        await ask(pilot, QUESTIONS[0])
        await pilot.press("f4")
        await shows(chat, "copied C2C's answer")
        assert chat.clipboard == answer(0, "c2c").text
        await pilot.resize_terminal(160, 42)
        await pilot.press("f1")
        await shows(chat, "earlier questions", "The same for every prompt".lower())
        await pilot.press("escape")
        chat.theme = "c2c-light"
        await shows(chat, answer(0, "c2c").text)


def test_every_mode_has_a_pane() -> None:
    assert set(app(FAST).main.panes) == set(events.MODES)
    assert all(isinstance(p, AnswerPane) for p in app(FAST).main.panes.values())
