"""What the app shows and keeps, without a screen: bins and bars, words, files."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from c2c_mlx import atomic
from c2c_mlx.config import Pair
from c2c_mlx.errors import C2CError
from c2c_mlx.events import Figures
from c2c_mlx.tui import export, gates, history, race, session_file, themes, votes
from c2c_mlx.tui.conversation import Conversation
from c2c_mlx.tui.preview import RECORDING, Recording
from c2c_mlx.tui.session_file import SessionFile
from c2c_mlx.tui.widgets.harmless import harmless


def figures(**values: float) -> Figures:
    names = dict.fromkeys(Figures.__dataclass_fields__, 0)
    return Figures(**(names | values))  # type: ignore[arg-type]


# --- gates ----------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(1, 80), st.integers(0, 299), st.booleans())
def test_columns_cover_each_token_once_and_hold_the_cursor(n, width, cursor, zoomed):
    cursor = min(cursor, max(n - 1, 0))
    bins = gates.columns(n, width, cursor, zoomed)
    assert len(bins) == min(n, width)
    assert all(a < b for a, b in bins)
    assert all(left[1] == right[0] for left, right in zip(bins, bins[1:], strict=False))
    assert n == 0 or any(a <= cursor < b for a, b in bins)
    assert zoomed or not n or (bins[0][0], bins[-1][1]) == (0, n)
    assert not zoomed or all(b - a == 1 for a, b in bins)


@given(st.integers(1, 60), st.integers(1, 20))
def test_binning_keeps_the_mean(n, width):
    values = np.random.default_rng(n).random((2, 3, n))
    bins = gates.columns(n, width, 0)
    binned = gates.binned(values, bins)
    assert binned.shape == (2, 3, len(bins))
    sizes = np.array([b - a for a, b in bins])
    assert np.allclose((binned * sizes).sum(-1), values.sum(-1))


@given(st.floats(0, 1), st.integers(1, 20))
def test_bars_have_their_width_and_show_whatever_is_there(value, width):
    for draw in (gates.bar, gates.thin_bar):
        assert len(draw(value, width)) == width
        assert (draw(value, width).strip() != "") == (value > 0)
    assert gates.bar(1, width) == "█" * width


def test_level_0_means_nothing():
    assert gates.levels(np.array([0.0, 1e-6, 0.5, 1.0, 7.0]), 1.0, 16).tolist() == [0, 1, 8, 15, 15]


@pytest.mark.parametrize("dark", [True, False])
def test_luminance_alone_orders_the_colours(dark):
    light = [gates.luminance(colour) for colour in gates.ramp(dark)]
    steps = np.diff(light) if dark else -np.diff(light)
    assert (steps > 0).all()
    assert abs(light[-1] - light[0]) > 0.6


def test_the_scale_of_changes_ends_at_a_round_number_and_says_what_is_beyond():
    assert gates.change_scale(np.array([0.034, 0.01])).label == "4.0 %"
    assert gates.change_scale(np.array([4.2])).label == "500 %"
    assert gates.change_scale(np.zeros(3)).top == 1
    one_wild_token = gates.change_scale(np.array([0.1] * 99 + [20.0]))
    assert one_wild_token.top == pytest.approx(0.1)
    assert one_wild_token.label == "10 % and more"


def test_a_token_never_acts_on_the_terminal():
    assert gates.visible(" a\n\x1b") == "␣a⏎·"


@pytest.mark.parametrize(
    "text",
    [
        "10\u00a0000\u202f€, \u3000全角\u2009",
        "👩\u200d🔬 نمی\u200cخواهم co\u00adop \u200e\u200f",
        "\U0001fae9 is newer than some Pythons\n\tand so on",
    ],
)
def test_ordinary_text_is_left_alone(text):
    assert harmless(text) == text


@pytest.mark.parametrize("c", "\x00\r\x1b\x7f\x9b\u2028\u2029\u202e\u2066\ud800")
def test_what_a_terminal_would_obey_is_replaced(c):
    assert harmless(f"a{c}b") == "a\ufffdb"


# --- words ----------------------------------------------------------------------------------


def test_the_verdict_says_what_was_measured():
    ours = figures(first_token_s=0.5, total_s=2.0, generated_tokens=7)
    theirs = figures(first_token_s=1.0, total_s=1.0, generated_tokens=8, relayed_tokens=30)
    text = race.verdict(ours, theirs)
    assert "first token 2.0x sooner (0.50 : 1.00 s)" in text
    assert "answer 2.0x slower (2.00 : 1.00 s)" in text
    assert "tokens 7 : 38" in text
    assert "equal" in race.verdict(ours, ours)


# --- files ----------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("C2C_MLX_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def talk() -> Conversation:
    """Two turns as they were recorded."""
    recording = Recording.read(RECORDING)
    talk = Conversation(recording.pair, system="Be kind.")
    for question, said in list(recording.turns.items())[:2]:
        talk.begin(question, ["c2c", "relay"], (((True,), (False,)),))
        for _, event in said:
            talk.record(event)
    return talk


def test_a_session_comes_back_as_it_was_saved(home: Path, talk: Conversation) -> None:
    file = SessionFile()
    file.save(talk)
    file.close()
    assert session_file.names() == [talk.name]
    assert session_file.read(talk.name) == talk
    assert [p.name for p in (home / "sessions").iterdir()] == [f"{talk.name}.json"]


def test_a_session_is_read_once_but_for_what_another_app_has_written_meanwhile(
    home: Path, talk: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, loads, flock = SessionFile(), json.loads, fcntl.flock
    file.save(talk)
    file.close()
    parsed: list[str] = []
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    assert file.load(talk.name) == talk and len(parsed) == 1
    file.close()

    def written(lock: int, how: int) -> None:
        talk.title = "another"
        atomic.write_text(session_file.path(talk.name), session_file.to_json(talk))
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", written)
    assert file.load(talk.name).title == "another"
    file.close()


def test_a_session_that_is_renamed_is_not_the_latest(home: Path, talk: Conversation) -> None:
    for name, second in (("older", 1), ("newer", 2)):
        atomic.write_text(session_file.path(name), session_file.to_json(talk))
        os.utime(session_file.path(name), (second, second))
    before = session_file.summary("older")
    SessionFile().rename("older", "another")
    # As one that another app deletes between a look at the folder and one at the file.
    session_file.path("gone").symlink_to("nowhere")
    assert session_file.names() == ["newer", "older"]
    assert session_file.summary("older") == replace(before, title="another")


def test_a_list_of_sessions_needs_nothing_that_was_measured(home: Path, talk: Conversation) -> None:
    document = json.loads(session_file.to_json(talk))
    for turn in document["turns"]:
        turn["takes"][0]["reports"] = "x"
    atomic.write_text(session_file.path("x"), json.dumps(document))
    assert session_file.summary("x").title == talk.title
    with pytest.raises(C2CError):
        session_file.read("x")


def test_history_leaves_out_what_the_model_does_not_remember(talk: Conversation) -> None:
    talk.turns[0].answers["relay"].text = " "
    assert [q for q, _, _ in talk.history("relay")] == [talk.turns[1].question]
    assert len(talk.history("c2c")) == 2 and talk.history("sharer") == []


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format_version": 1}', '{"format_version": 99}', "null"]
)
def test_a_damaged_session_is_one_line(home: Path, text: str) -> None:
    path = home / "sessions" / "x.json"
    atomic.write_text(path, text)
    with pytest.raises(C2CError, match="x.json"):
        SessionFile().load("x")


def test_every_field_of_a_session_is_checked(home: Path, talk: Conversation) -> None:
    document = json.loads(session_file.to_json(talk))
    for key in document:
        broken = document | {key: 7}
        if key not in ("name", "system", "title"):
            with pytest.raises(C2CError):
                session_file.parse(broken, "x.json")


def test_a_session_cannot_name_a_file_elsewhere(home: Path, talk: Conversation) -> None:
    atomic.write_text(
        home / "sessions" / "x.json", session_file.to_json(talk).replace(talk.name, "../../evil")
    )
    assert SessionFile().load("x").name == "x"
    with pytest.raises(C2CError, match="no session"):
        SessionFile().load("../x")


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic.write_text(path, "old")
    with pytest.raises(C2CError, match="cannot be written"):
        atomic.write_text(path / "below", "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_export_holds_figures_and_gates(talk: Conversation) -> None:
    text = export.to_markdown(talk)
    assert talk.turns[0].question in text and "| layer | sharer's |" in text
    assert talk.turns[0].answers["c2c"].text in text and "C2C against relay" in text
    assert json.loads(session_file.to_json(talk))["turns"][0]["takes"][0]["reports"][0]["gates"]


def test_a_vote_behind_a_torn_line_counts(home: Path) -> None:
    votes.path().parent.mkdir(parents=True, exist_ok=True)
    votes.path().write_text('{"choice": "c2')
    votes.cast(votes.Vote("c2c", "r", "s", "f", modified=False))
    assert votes.summary("r", "s", "f").startswith("1 blind vote")


def test_votes_are_counted_per_pair_and_unmodified_fuser(home: Path) -> None:
    pair = ("r", "s", "f")
    assert "no blind votes" in votes.summary(*pair)
    for choice, modified in (("c2c", False), ("tie", False), ("relay", False), ("c2c", True)):
        votes.cast(votes.Vote(choice, *pair, modified))
    with (home / "votes.jsonl").open("a") as file:
        file.write('{"choice": "c2')  # what a full disk leaves
    assert votes.summary(*pair) == "3 blind votes: C2C 1, text relay 1, ties 1"


def test_questions_come_back_once_and_no_more_than_there_is_room_for(home: Path) -> None:
    for number in range(history.LIMIT + 2):
        history.add(f"{number}?")
    history.add("7\n¿?")
    history.add("9?")
    history.add("x" * (history.LONGEST + 1))
    kept = history.load()
    assert len(kept) == history.LIMIT and kept[-2:] == ["7\n¿?", "9?"] and kept.count("9?") == 1
    assert list(home.iterdir()) == [home / "history.json"]


@pytest.mark.parametrize("text", ["", "{", "{}", "null", "7", '"x"', "[7, null, []]", "\x00"])
def test_a_damaged_file_is_no_history_and_no_choice(home: Path, text: str) -> None:
    for path in (history.path(), themes.path()):
        atomic.write_text(path, text)
    assert history.load() == []
    assert themes.chosen() in (themes.DARK.name, "x")
    history.add("Who?")
    themes.choose(themes.LIGHT.name)
    assert history.load() == ["Who?"] and themes.chosen() == themes.LIGHT.name


def test_half_a_character_in_the_history_is_replaced(home: Path) -> None:
    atomic.write_text(history.path(), '["a\\ud800"]')
    assert history.load() == ["a?"]


def test_a_pair_may_have_any_name() -> None:
    talk = Conversation(Pair("org/model", ("../folder",)))
    talk.begin("¿Qué?/../", [], ())
    assert "/" not in talk.name
