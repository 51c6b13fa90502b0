"""What crossed in an answer: against a pass from scratch, and where nothing can have crossed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from chat_sessions import thinker

from c2c_mlx import ChatSession, Fuser, LanguageModel, device
from c2c_mlx.config import FuserConfig, SamplingConfig
from c2c_mlx.evaluation import runner
from c2c_mlx.evaluation.modes import Modes
from c2c_mlx.evaluation.reference import Reference
from c2c_mlx.evaluation.task import C2C_MODES, Item
from c2c_mlx.events import Crossed, Finished
from c2c_mlx.fusion import kv
from c2c_mlx.talk import crossed
from c2c_mlx.text.words import token_texts, words
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training.batch import Batch, collate
from c2c_mlx.training.dataset import make_example
from c2c_mlx.training.files import ChatRow

# Nats. A model in bfloat16 rounds what it says of a token, and its fuser trains in float32.
NEAR = 2e-4 if device.is_dense() else 0.1

SAMPLING = SamplingConfig(max_tokens=9, temp=1.0, seed=5)
MakeSession = Callable[..., ChatSession]
responds = pytest.mark.parametrize("fuse_response", [False, True])


@pytest.fixture(scope="module")
def fuser(receiver: LanguageModel, sharer: LanguageModel) -> Fuser:
    mx.random.seed(1)
    layers = tuple((i, i + 2) for i in range(4))
    fuser = Fuser(FuserConfig(receiver.shape, sharer.shape, layers, 24, 20, rotated_keys=False))
    fuser.gate_logit = mx.ones_like(fuser.gate_logit)
    fuser.proj_out.bias = 3 * fuser.proj_out.bias  # so that something is to be seen
    fuser.eval()
    return fuser


@pytest.fixture
def make(receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser) -> MakeSession:
    def make(fuser: Fuser = fuser, **options: Any) -> ChatSession:
        return ChatSession(receiver, sharer, fuser, **({"sampling": SAMPLING} | options))

    return make


def ask(session: ChatSession, question: str) -> Finished:
    *_, finished = session.ask(question)
    assert isinstance(finished, Finished)
    return finished


def told(session: ChatSession, **options: Any) -> Crossed:
    found = session.crossed(**options)
    assert found is not None
    return found


def log_probabilities(receiver: nn.Module, batch: Batch, cache: kv.Cache) -> mx.array:
    logits = receiver(mx.array(batch.inputs), cache=cache)[0]
    return nn.log_softmax(logits.astype(mx.float32), axis=-1)


def test_it_is_what_a_zeroed_sharer_of_training_loses(make: MakeSession) -> None:
    session = make()
    ask(session, "Who wrote it?")
    ids = list(session._decoded.ids)
    row = ChatRow(
        [{"role": "user", "content": "Who wrote it?"}, {"role": "assistant", "content": "x"}]
    )
    tokenizers = (session.receiver.tokenizer, session.sharers[0].tokenizer)
    example = replace(make_example(row, *tokenizers, "span"), response_ids=ids)
    c2c = session.links[0]
    batch = collate([example], c2c.fuser.config.positions)
    own = step_loss.prefill(c2c.receiver, batch.receiver, {})
    cache = step_loss.prefill(c2c.sharer, batch.sharer, {})
    found = []
    for sharer in (step_loss.read_sharer(c2c, cache, batch), step_loss.zeroed(c2c, batch)):
        fused, _ = step_loss.fuse(c2c, own, sharer, batch)
        logs = log_probabilities(c2c.receiver, batch, fused)
        found.append(np.array(logs)[np.arange(len(ids)), ids])
    logs = log_probabilities(c2c.receiver, batch, own)
    alone = np.array(logs)[np.arange(len(ids)), ids]
    crossed_ = told(session, over_receiver=True)
    np.testing.assert_allclose(crossed_.nats, found[0] - found[1], atol=NEAR)
    np.testing.assert_allclose(crossed_.over_receiver, found[0] - alone, atol=NEAR)
    assert max(map(abs, crossed_.nats)) > 0.05


@responds
def test_one_figure_per_token_and_their_texts_are_the_answer(
    make: MakeSession, fuse_response: bool
) -> None:
    session = make(fuse_response=fuse_response)
    assert session.crossed() is None
    for question in ("Who wrote it?", "And when?"):
        finished = ask(session, question)
        found = told(session)
        assert len(found.tokens) == len(found.nats) == finished.figures.generated_tokens
        assert "".join(found.tokens).strip() == finished.text
        assert any(found.nats) and found.over_receiver == ()
        assert told(session) == found


@responds
def test_thoughts_owe_nothing(make: MakeSession, fuse_response: bool) -> None:
    whole = make(fuse_response=fuse_response, sampling=replace(SAMPLING, max_tokens=20))
    end, session = ask(whole, "Who wrote it?").text[5:8], make(fuse_response=fuse_response)
    session.receiver = replace(
        session.receiver, tokenizer=thinker(session.receiver, "assistant", end)
    )
    finished, found = ask(session, "Who wrote it?"), told(session, over_receiver=True)
    assert finished.text and "".join(found.tokens).strip() == finished.text
    thoughts = finished.figures.generated_tokens - len(found.nats)
    assert thoughts >= 1 and len(found.tokens) == len(found.nats) == len(found.over_receiver)
    n = len(found.nats)
    assert found.nats == pytest.approx(told(whole).nats[thoughts : thoughts + n], abs=1e-4)


@responds
def test_a_later_turn_owes_what_it_owes_in_a_fresh_session(
    make: MakeSession, fuse_response: bool
) -> None:
    session, fresh = make(fuse_response=fuse_response), make(fuse_response=fuse_response)
    ask(session, "Who wrote it?")
    told(session, over_receiver=True)
    fresh.history["c2c"] = list(session.history["c2c"])
    assert ask(session, "And when?").text == ask(fresh, "And when?").text
    a, b = (told(s, over_receiver=True) for s in (session, fresh))
    np.testing.assert_allclose(a.nats, b.nats, atol=NEAR)
    np.testing.assert_allclose(a.over_receiver, b.over_receiver, atol=NEAR)


@responds
def test_a_sharer_owes_itself_nothing(
    make: MakeSession, fuser: Fuser, fuse_response: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both caches go through other code; with one sharer they must come to the same."""
    monkeypatch.setattr(crossed.Crossing, "_same", lambda self, n: False)
    monkeypatch.delattr(crossed.Silent, "read_sharer")
    # Under span, what feeds an answer's end may still change while it is being written.
    other = Fuser(replace(fuser.config, alignment="first"))
    other.update(fuser.parameters())
    other.eval()
    session = make(other, fuse_response=fuse_response)
    for question in ("Who wrote it?", "And when?"):
        ask(session, question)
        np.testing.assert_allclose(told(session).nats, 0, atol=NEAR)


@responds
def test_a_hybrids_answer_is_weighed_from_its_prompt(
    receiver: LanguageModel,
    sharer: LanguageModel,
    lfm2: nn.Module,
    fuse_response: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As above, where the own cache has state that moved on with a fused answer."""
    monkeypatch.setattr(crossed.Crossing, "_same", lambda self, n: False)
    monkeypatch.delattr(crossed.Silent, "read_sharer")
    lm = replace(receiver, model=lfm2)
    config = FuserConfig(lm.shape, sharer.shape, ((1, 2), (3, 4)), 24, 20, alignment="first")
    mx.random.seed(1)
    fuser = Fuser(config)
    fuser.gate_logit = mx.ones_like(fuser.gate_logit)
    fuser.eval()
    session = ChatSession(lm, sharer, fuser, sampling=SAMPLING, fuse_response=fuse_response)
    for question in ("Who wrote it?", "And when?"):
        ask(session, question)
        np.testing.assert_allclose(told(session).nats, 0, atol=NEAR)


@responds
def test_exactly_nothing_crosses_shut_gates(make: MakeSession, fuse_response: bool) -> None:
    session = make(fuse_response=fuse_response)
    before = session.gates
    shut = tuple((False,) * 4 for _ in range(2))
    session.set_gates([shut])  # type: ignore[list-item]
    ask(session, "Who wrote it?")
    assert set(told(session).nats) == {0.0}
    session.set_gates(before)
    assert session.crossed() is None
    ask(session, "And when?")
    assert any(told(session).nats)


def test_exactly_nothing_crosses_a_shut_message_gate(make: MakeSession, fuser: Fuser) -> None:
    gated = Fuser(replace(fuser.config, message_gate=True))
    gated.gate_logit = mx.ones_like(gated.gate_logit)
    gated.message_head.bias = mx.full(gated.message_head.bias.shape, -50.0)
    gated.eval()
    session = make(gated)
    ask(session, "Who wrote it?")
    assert set(told(session).nats) == {0.0}


class Counted:
    """A model that counts the positions that pass through it, but for looks at its shape."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self.positions = model, 0

    def __call__(self, ids: mx.array, cache: kv.Cache) -> mx.array:
        if kv.length(cache) or ids.shape[1] > 1:
            self.positions += ids.shape[1]
        return self._model(ids, cache=cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@responds
def test_it_costs_one_pass_over_the_answer(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser, fuse_response: bool
) -> None:
    counted: Any = Counted(receiver.model)
    lm = replace(receiver, model=counted)
    session = ChatSession(lm, sharer, fuser, sampling=SAMPLING, fuse_response=fuse_response)
    for question in ("Who wrote it?", "And when?"):
        n = ask(session, question).figures.generated_tokens
        counted.positions = 0
        told(session)
        assert counted.positions == n


def test_what_stands_below_the_fused_layers_is_not_computed_again(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser, monkeypatch: pytest.MonkeyPatch
) -> None:
    upper = Fuser(replace(fuser.config, layer_map=((2, 3), (3, 5))))
    upper.gate_logit = mx.ones_like(upper.gate_logit)
    upper.eval()
    session = ChatSession(receiver, sharer, upper, sampling=SAMPLING)
    ask(session, "Who wrote it?")
    told(session)  # makes its caches, with a look at the model
    layers, computed = [id(layer) for layer in receiver.model.layers], []
    block = type(receiver.model.layers[0])
    compute = block.__call__

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        computed.append(layers.index(id(self)))
        return compute(self, *args, **options)

    monkeypatch.setattr(block, "__call__", noted)
    found = told(session)
    assert computed == [2, 3]
    session._decoded.states = None
    np.testing.assert_allclose(found.nats, told(session).nats, atol=NEAR)
    assert computed == [2, 3, 0, 1, 2, 3] and any(found.nats)


def test_a_stopped_answer_is_told_as_far_as_it_was_shown(make: MakeSession) -> None:
    session = make()
    answer = session.ask("Who wrote it?")
    next(answer), next(answer)
    session.stop()
    *_, finished = answer
    assert isinstance(finished, Finished) and finished.reason == "stopped"
    assert len(told(session).nats) == finished.figures.generated_tokens == 2


def test_long_answers_are_weighed_in_parts(
    make: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make()
    ask(session, "Who wrote it?")
    whole = told(session).nats
    monkeypatch.setattr(crossed, "PART", 2)
    np.testing.assert_allclose(told(session).nats, whole, atol=NEAR)


@pytest.mark.parametrize("text", ["Ça, c'est 東京 🗼!", " a\n\nb  c", "", "🗼"])
def test_token_texts_are_the_text(receiver: LanguageModel, text: str) -> None:
    tokenizer = receiver.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(token_texts(ids, tokenizer)) == tokenizer.decode(ids)


def test_words_get_what_their_tokens_have() -> None:
    tokens = [(" does", 1.0), ("n't", 2.0), (" s", 0.5), ("wim", 4.0), (".", 8.0), ("", 16.0)]
    assert words(tokens) == [("doesn't", 3.0), ("swim", 4.5), (".", 8.0)]
    assert words([]) == []


@pytest.mark.parametrize("gate", [1.0, -1.0])
def test_an_evaluation_notes_what_a_chat_says(
    receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser, gate: float
) -> None:
    other = Fuser(fuser.config)
    other.update(fuser.parameters())
    other.gate_logit = mx.full(other.gate_logit.shape, gate)
    other.eval()
    items = [
        Item(str(i), [{"role": "user", "content": f"who wrote it {'and ' * i}"}], "x")
        for i in range(3)
    ]
    modes = Modes(receiver, [sharer], [other], "sequential", items, 0, SAMPLING.max_tokens)
    log, names = runner.Log(None, {}), ["receiver", *C2C_MODES]
    runner.run(
        Reference(),
        items,
        names,
        modes,
        log,
        batch_size=2,
        alone=1,
        progress=lambda mode, done, total: None,
        crossed=True,
    )
    greedy = replace(SAMPLING, temp=0.0)
    session = ChatSession(receiver, sharer, other, sampling=greedy)
    for item in items:
        session.reset()
        ask(session, item.messages[0]["content"])
        noted = log.records["c2c"][item.id]["crossed"]
        np.testing.assert_allclose([n for _, n in noted], told(session).nats, atol=3e-4)
        assert any(n for _, n in noted) == (gate > 0)
        assert "crossed" not in log.records["c2c-zeroed"][item.id]
        assert len(log.records["c2c-shuffled"][item.id]["crossed"]) > 0
