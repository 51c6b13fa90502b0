"""Conversations with several sharers, and answers that are fused while they are written."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
import pytest
from chat_sessions import SAMPLING, WORDY, MakeSession, ask, open_fuser, with_template
from chat_tokenizers import PLAIN

from c2c_mlx import ChatSession, Fuser, LanguageModel, load_model
from c2c_mlx.config import FuserConfig, Order, SamplingConfig
from c2c_mlx.events import Finished, Text
from c2c_mlx.fusers import store
from c2c_mlx.models import registry
from c2c_mlx.models.embedded import install


@pytest.fixture(scope="module")
def fuser(receiver: LanguageModel, sharer: LanguageModel) -> Fuser:
    return open_fuser(receiver, sharer)


@pytest.fixture
def make(receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser) -> MakeSession:
    def make(**options: Any) -> ChatSession:
        return ChatSession(receiver, sharer, fuser, **({"sampling": SAMPLING} | options))

    return make


@pytest.fixture(scope="module")
def second(sharer: LanguageModel, receiver: LanguageModel) -> tuple[LanguageModel, Fuser]:
    """The same sharer with another fuser."""
    mx.random.seed(2)
    fuser = Fuser(FuserConfig(receiver.shape, sharer.shape, ((0, 0), (3, 5)), 24, 20))
    fuser.gate_logit = mx.ones_like(fuser.gate_logit)
    fuser.eval()
    return sharer, fuser


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_several_sharers_answer_turn_by_turn(
    make: MakeSession, second: tuple[LanguageModel, Fuser], order: Order
) -> None:
    several: dict[str, Any] = {"others": [second], "order": order}
    session, fresh = make(**several), make(**several)
    one, both = ask(make(), "Who wrote it?", "c2c")[1], ask(session, "Who wrote it?", "c2c")[1]
    assert both.text != one.text
    assert both.figures.gates_open == one.figures.gates_open + 4
    reports = session.gate_reports()
    assert [r.sharer for r in reports] == [0, 1] and [len(r.layers) for r in reports] == [4, 2]
    fresh.history["c2c"] = [dict(m) for m in session.history["c2c"]]
    assert ask(session, "And when?", "c2c")[1].text == ask(fresh, "And when?", "c2c")[1].text


def test_sharers_of_other_alignments_feed_one_prompt(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser
) -> None:
    """Token by token alone, the receiver's would be padded to each sharer's template."""
    wordy, plain = with_template(sharer, WORDY), with_template(sharer, PLAIN)
    made = [open_fuser(receiver, sharer, alignment=a) for a in ("first", "longest")]
    others = [(plain, made[1]), (sharer, fuser)]
    session = ChatSession(receiver, wordy, made[0], others=others, sampling=SAMPLING)
    ours = ask(session, "Who wrote it?", "c2c")[1].figures.prompt_tokens
    assert ours == ask(session, "Who wrote it?", "receiver")[1].figures.prompt_tokens
    said = [[text for text, _ in report.tokens] for report in session.gate_reports()]
    assert len(said) == 3 and said[0] == said[1] == said[2]


def test_a_sharer_with_closed_gates_might_as_well_not_be_there(
    make: MakeSession, second: tuple[LanguageModel, Fuser]
) -> None:
    session = make(others=[second])
    mine = session.gates
    session.set_gates([mine[0], ((False, False), (False, False))])
    alone = ask(make(), "Who wrote it?", "c2c")[1].text
    assert ask(session, "Who wrote it?", "c2c")[1].text == alone
    assert [r.sharer for r in session.gate_reports()] == [0]
    session.set_gates(mine)
    assert session.gates == mine


@pytest.mark.parametrize("with_second", [False, True])
def test_a_fused_answer_is_told_of_and_not_read_again(
    make: MakeSession, second: tuple[LanguageModel, Fuser], with_second: bool
) -> None:
    session = make(fuse_response=True, others=[second] if with_second else [])
    live, answer = [], session.ask("Who wrote it?")
    for event in answer:
        if isinstance(event, Text):
            live.append(session.gate_reports(of_last_token=True))
    whole = session.gate_reports()
    assert len(whole) == len(live[-1]) == 1 + with_second
    assert isinstance(event, Finished)
    n = event.figures.prompt_tokens
    for before, after in itertools.pairwise(live):
        assert before[0].start < after[0].start and len(after[0].tokens) == 1
    for last, report in zip(live[-1], whole, strict=True):
        assert report.start == 0 and last.start >= n
        assert len(report.tokens) == last.start + 1
        column = [[row[last.start] for row in kind] for kind in report.token_weights]
        expected = [[row[0] for row in kind] for kind in last.token_weights]
        np.testing.assert_allclose(column, expected, atol=1e-3)
    # What was written has been read by all; the next turn begins behind it.
    again = ask(session, "And when?", "c2c")[1].figures
    assert again.new_prompt_tokens < again.prompt_tokens - n
    fresh = make(fuse_response=True, others=[second] if with_second else [])
    fresh.history["c2c"] = session.history["c2c"][:2]
    assert ask(fresh, "And when?", "c2c")[1].text == session.history["c2c"][-1]["content"]


def test_a_fuser_that_was_made_for_it_fuses_answers(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser
) -> None:
    made = Fuser(replace(fuser.config, fuse_response=True))
    made.update(fuser.parameters())
    made.eval()
    for one, expected in ((made, True), (fuser, False)):
        session = ChatSession(receiver, sharer, one, sampling=SAMPLING)
        figures = ask(session, "Who wrote it?", "c2c")[1].figures
        (report,) = session.gate_reports()
        assert (len(report.tokens) >= figures.prompt_tokens) == expected


def test_with_every_gate_closed_a_fused_answer_is_the_receivers(make: MakeSession) -> None:
    session = make(fuse_response=True)
    (keys, values), shut = session.gates[0], (False,) * 4
    session.set_gates([(shut, shut)])
    texts = [ask(session, "Who wrote it?", mode)[1].text for mode in ("c2c", "receiver")]
    assert texts[0] == texts[1]
    session.set_gates([(keys, values)])
    session.reset()
    assert ask(session, "Who wrote it?", "c2c")[1].text != texts[1]


@pytest.fixture(scope="module")
def embedded() -> tuple[LanguageModel, LanguageModel]:
    """The embedded receiver and sharer."""
    names = registry.default_pair()
    if not all(map(install.is_installed, names)):
        pytest.skip("the embedded pair is not in the cache; `c2c-chat` puts it there")
    return load_model(names[0]), load_model(names[1])


@pytest.mark.pair
@pytest.mark.slow
@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_three_sharers_of_the_embedded_models(
    embedded: tuple[LanguageModel, LanguageModel], order: Order
) -> None:
    """One model twice, with its fuser and a rounded copy of it, and the receiver as its own."""
    receiver, sharer = embedded
    folder = store.find_folder(registry.find_fuser(*registry.default_pair()) or "")
    fuser, rounded = Fuser.load(folder), Fuser.load(folder, bits=4)
    mx.random.seed(0)
    same = Fuser(FuserConfig(receiver.shape, receiver.shape, ((10, 10), (20, 20)), 32, 32))
    same.gate_logit = mx.ones_like(same.gate_logit)
    same.eval()
    others = [(sharer, rounded), (receiver, same)]
    sampling = SamplingConfig(max_tokens=12)
    session = ChatSession(receiver, sharer, fuser, others=others, order=order, sampling=sampling)
    question = "Translate to English: Le chat dort sur le canapé."
    reports = {r.sharer: r for r in (ask(session, question, "c2c"), session.gate_reports())[1]}
    assert set(reports) == {0, 1, 2}
    changed = {at for at, r in reports.items() if np.any(r.changes)}
    # In sequence the copy finds a message that has been changed, and its gate may stay shut.
    assert changed == {0, 1, 2} if order == "parallel" else changed >= {0, 2}
    assert [len(r.layers) for r in reports.values()] == [15, 15, 2]
    # In parallel it adds nearly what its original does.
    first, second = (np.array(reports[i].changes) for i in (0, 1))
    is_near = np.linalg.norm(first - second) < 0.1 * np.linalg.norm(first)
    assert is_near == (order == "parallel")
    shut = tuple(((False,) * len(k), (False,) * len(v)) for k, v in session.gates)
    session.set_gates((session.gates[0], *shut[1:]))
    session.reset()
    alone = ChatSession(receiver, sharer, fuser, sampling=sampling)
    texts = [ask(s, question, "c2c")[1].text for s in (session, alone)]
    assert texts[0] == texts[1]
