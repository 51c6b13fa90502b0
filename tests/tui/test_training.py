"""Training from within the app: what is offered, what is seen of it, and what comes after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from c2c_mlx import events
from c2c_mlx.config import Pair
from c2c_mlx.events import TrainingBegun, TrainingOver, TrainingStep, Trial
from c2c_mlx.talk.engine import HISTORIES
from c2c_mlx.tui.app import ChatApp
from c2c_mlx.tui.conversation import Conversation
from c2c_mlx.tui.preview import RECORDING, Recording, Replay, until
from c2c_mlx.tui.screens.offer import Offer
from c2c_mlx.tui.widgets.training import curve

SIZE = (160, 40)
PLAN = TrainingBegun("steps: 120 of 8 chats\ntime: about 15 min\nmemory: about 2.1 GB", 0, 120)


class Stage(Replay):
    """An engine that says what the test puts into it, and remembers what it was told to do."""

    def __init__(self, **loaded: object) -> None:
        super().__init__(Recording.read(RECORDING))
        recorded = self.recording.start[-1][1]
        assert isinstance(recorded, events.Loaded)
        self.known = recorded
        self.first = replace(recorded, **loaded)  # type: ignore[arg-type]
        self.told: list[object] = []
        self.restored: list[dict[str, list[str]]] = []  # each mode's questions
        self.is_slow = False  # an answer ends when the test says so
        self.ends: list[events.EngineEvent] = []  # what a training says that a reload cuts short

    def start(self) -> None:
        self.say(self.first)

    def ask(self, question: str, modes: object, attempt: int = 0) -> None:
        self.told.append((question, modes))
        if not self.is_slow:
            self.say(events.TurnOver(1.0))

    def train(self, seconds: float) -> None:
        self.told.append(seconds)

    def stop_training(self) -> None:
        self.told.append("stop")

    def reload(self, pair: Pair) -> None:
        self.told.append(pair)
        self.say(*self.ends, self.known)

    def restore(self, histories: HISTORIES, gates: Sequence[events.Gates]) -> None:
        self.restored.append({mode: [q for q, *_ in turns] for mode, turns in histories.items()})

    def say(self, *said: events.EngineEvent) -> None:
        self._play([(0.0, event) for event in said])


def staged(**loaded: object) -> tuple[ChatApp, Stage]:
    stage = Stage(**loaded)
    return ChatApp(stage, Conversation(stage.pair), ["c2c", "relay"]), stage


def without_fuser(**more: object) -> tuple[ChatApp, Stage]:
    return staged(links=(), missing="no fuser is known", **more)


async def test_a_pair_without_a_fuser_is_offered_training(shows) -> None:
    chat, stage = without_fuser(reverse="the-other-way")
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await shows(chat, "C2C cannot answer", "Ctrl+S", "the-other-way")
        await pilot.press("ctrl+s")
        await shows(chat, "train one?", "15 minutes", "a night", "by the fuser the-other-way")
        await pilot.press("escape")
        await shows(chat, "C2C cannot answer", without="train one?")
        await pilot.press("ctrl+s", "2")
        await until(lambda: stage.told == [900] and chat.state.is_training)
        await shows(chat, "Ctrl+S stops")


async def test_the_pair_is_turned_round(shows) -> None:
    chat, stage = without_fuser(reverse="the-other-way")
    pair = stage.pair
    async with chat.run_test(size=SIZE) as pilot:
        await shows(chat, "C2C cannot answer")
        await pilot.press("ctrl+s", "r")
        turned = Pair(pair.sharers[0], (pair.receiver,))
        await until(lambda: turned in stage.told)
        assert chat.state.conversation.pair == turned
        await shows(chat, "ready")


async def test_nothing_turns_round_where_no_fuser_is_known(shows) -> None:
    chat, stage = without_fuser()
    async with chat.run_test(size=SIZE) as pilot:
        await shows(chat, "C2C cannot answer", without="turn the pair round")
        await pilot.press("ctrl+s", "r")
        assert isinstance(chat.screen, Offer) and stage.told == []


async def test_training_is_seen_and_stopped_and_resizing_loses_nothing(shows) -> None:
    chat, stage = without_fuser()
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await shows(chat, "C2C cannot answer")
        await pilot.press("ctrl+s", "1")
        stage.say(PLAN)
        await shows(chat, "120 of 8 chats", "about 2.1 GB", "Ctrl+S stops, and keeps it")
        stage.say(*(TrainingStep(n, 120, 4.0 - n / 10, 300.0 - n, 20) for n in range(1, 10)))
        await shows(chat, "step 9 of 120 · loss 3.100", "20 gates open · 4 min 51 s left", "▇▆▅")
        stage.say(Trial(9, "Who?", "Ada [bold]Lovelace\x1b[2J"), Trial(12, "Who?", "Ada"))
        await shows(chat, "after step 9: Ada [bold]Lovelace�[2J", "after step 12: Ada", "“Who?”")
        await pilot.resize_terminal(80, 24)
        await shows(chat, "step 9 of 120")
        await pilot.resize_terminal(*SIZE)
        await shows(chat, "step 9 of 120", "after step 12: Ada")
        await pilot.press(*"typed", "ctrl+s")
        await until(lambda: stage.told[-1] == "stop")
        stage.known = replace(stage.known, unfinished="step 9 of 120")
        stage.say(TrainingOver(9, 120))
        await shows(chat, "stopped at step 9 of 120 · Ctrl+S goes on", "after step 12: Ada")
        await shows(chat, "its training stopped at step 9 of 120: Ctrl+S goes on")
        assert chat.main.prompt.text == "typed" and not chat.state.is_training
        await pilot.press("ctrl+s")
        await until(lambda: stage.told[-1] == 0)
        stage.say(replace(PLAN, step=9))
        await shows(chat, "step 9 of 120", "after step 12: Ada", "Ctrl+S stops")


async def test_after_training_the_fuser_is_loaded_and_the_question_asked_again(shows) -> None:
    chat, stage = without_fuser()
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await shows(chat, "C2C cannot answer")
        await pilot.press(*"Who?", "enter")
        await until(lambda: stage.told == [("Who?", ("relay",))] and not chat.state.is_busy)
        await pilot.press("ctrl+s", "1")
        tried = [Trial(n, "Who?", "Ada Lovelace wrote it. " * 12) for n in (30, 60, 90)]
        stage.say(PLAN, *tried, TrainingStep(120, 120, 2.0, 0.0, 20))
        await shows(chat, "measuring what it is worth")
        await pilot.press(*"More?", "enter")  # the others answer meanwhile
        await until(lambda: ("More?", ("relay",)) in stage.told and not chat.state.is_busy)
        stage.say(TrainingOver(120, 120, "Worth using: on 60 chats."))
        await until(lambda: stage.told[-1] == ("More?", ("c2c",)))
        assert stage.pair in stage.told
        await shows(chat, "120 steps done", "Worth using: on 60 chats.", without="cannot answer")
        await shows(chat, "step 120 of 120", without="measuring what it is worth")
        await pilot.resize_terminal(80, 24)
        await shows(chat, "Worth using: on 60 chats.")
        await pilot.resize_terminal(*SIZE)
        takes = chat.state.turn.takes
        assert [list(take.answers) for take in takes] == [["relay"], ["c2c"]]


async def test_what_is_asked_while_training_ends_is_remembered(shows) -> None:
    chat, stage = without_fuser()
    ended = next(
        e
        for _, e in next(iter(stage.recording.turns.values()))
        if isinstance(e, events.Finished) and e.mode == "relay"
    )
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await shows(chat, "C2C cannot answer")
        await pilot.press("ctrl+s", "1")
        stage.say(PLAN)
        stage.is_slow = True
        await pilot.press(*"Who?", "enter")
        await until(lambda: stage.told[-1] == ("Who?", ("relay",)))
        stage.say(TrainingOver(120, 120, "Worth using: on 60 chats."))
        await shows(chat, "120 steps done")
        await pilot.press("ctrl+s")
        await shows(chat, "is loaded when the answer is there", without="train one?")
        assert stage.pair not in stage.told
        stage.is_slow = False
        stage.say(ended, events.TurnOver(1.0))
        await until(lambda: stage.told[-1] == ("Who?", ("c2c",)))
        assert stage.told[-2] == stage.pair and stage.restored[-1]["relay"] == ["Who?"]


async def test_a_training_that_another_pair_cuts_short_is_no_more_spoken_of(shows) -> None:
    chat, stage = without_fuser()
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await shows(chat, "C2C cannot answer")
        await pilot.press("ctrl+s", "1")
        stage.say(PLAN, TrainingStep(9, 120, 3.0, 300.0, 20))
        await shows(chat, "step 9 of 120")
        stage.ends = [PLAN, TrainingOver(9, 120)]
        await chat._turn_round(other := Pair("a", ("b",)))
        await until(lambda: not chat.state.is_training and chat.state.loaded)
        await shows(chat, "ready", without="of 120")
        assert stage.told == [180, other]


async def test_loading_again_ends_a_training_and_loads_once(shows) -> None:
    chat, stage = without_fuser()
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await shows(chat, "C2C cannot answer")
        await pilot.press("ctrl+s", "1")
        stage.say(PLAN, TrainingStep(9, 120, 3.0, 300.0, 20))
        await shows(chat, "step 9 of 120")
        stage.ends = [TrainingOver(9, 120)]
        chat.action_reload()
        await shows(chat, "stopped at step 9 of 120 · Ctrl+S goes on")
        await until(lambda: not chat.state.is_training and chat.state.loaded)
        assert stage.told == [180, stage.pair]


async def test_an_error_in_training_leaves_what_was_kept_before(shows) -> None:
    chat, stage = without_fuser()
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await shows(chat, "C2C cannot answer")
        await pilot.press("ctrl+s", "1")
        stage.known = replace(stage.known, unfinished="step 9 of 120")
        stage.say(PLAN, TrainingStep(12, 120, 3.0, 300.0, 20))
        stage.say(TrainingOver(0, 0), events.Failed("the disk is full"))
        await shows(chat, "the disk is full", "its training stopped at step 9 of 120")


async def test_no_conversation_is_taken_away_from_an_answer(shows) -> None:
    chat, stage = without_fuser(reverse="the-other-way")
    stage.is_slow = True
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await shows(chat, "C2C cannot answer")
        await pilot.press(*"Who?", "enter")
        await until(lambda: chat.state.is_busy)
        await pilot.press("ctrl+s")
        await until(lambda: isinstance(chat.screen, Offer))
        await pilot.press("r")
        await until(lambda: not isinstance(chat.screen, Offer))
        await pilot.pause()
        assert stage.told == [("Who?", ("relay",))]
        assert chat.state.conversation.pair == stage.pair and chat.state.turn.question == "Who?"


async def test_a_sharer_elsewhere_is_not_asked_to_write(shows) -> None:
    chat, stage = staged(is_elsewhere=True)
    async with chat.run_test(size=SIZE) as pilot:
        await shows(chat, "the sharer is elsewhere")
        await pilot.press(*"Who?", "enter")
        await until(lambda: stage.told == [("Who?", ("c2c",))])


async def test_what_came_to_nothing_can_be_tried_again(shows) -> None:
    chat, stage = without_fuser()
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await shows(chat, "C2C cannot answer")
        await pilot.press("ctrl+s", "1")
        stage.say(TrainingOver(0, 0), events.Failed("--time: give it more"))
        await shows(chat, "give it more", without="120 steps")
        await pilot.press("ctrl+s")
        await shows(chat, "train one?")


async def test_a_pair_with_a_fuser_is_not_trained(shows) -> None:
    chat, stage = staged()
    async with chat.run_test(size=SIZE, notifications=True) as pilot:
        await shows(chat, "ready")
        await pilot.press("ctrl+s")
        await shows(chat, "there is a fuser already")
        assert stage.told == []


def test_a_curve_is_as_wide_as_there_is_room() -> None:
    assert curve([], 8) == ""
    assert curve([1.0], 8) == "▁"
    assert curve([2.0, 1.0, 0.0], 8) == "█▅▁"
    assert len(curve([float(n) for n in range(100)], 8)) == 8
