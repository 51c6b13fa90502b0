"""The six modes with two tiny models: batches against one by one, and what the controls feed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import pytest
from chat_sessions import thinker

from c2c_mlx import ChatSession, Fuser, LanguageModel, load_model
from c2c_mlx.config import FuserConfig, SamplingConfig
from c2c_mlx.errors import C2CError, NoFuserError
from c2c_mlx.evaluation import modes as modes_module
from c2c_mlx.evaluation.choice import LEAD, Choice
from c2c_mlx.evaluation.modes import Modes, Reading, derangement, nats, write
from c2c_mlx.evaluation.owed import owed
from c2c_mlx.evaluation.task import C2C_MODES, MODES, Item
from c2c_mlx.events import MODES as CHAT_MODES
from c2c_mlx.events import Finished, Mode
from c2c_mlx.fusion import kv
from c2c_mlx.talk import relay
from c2c_mlx.talk.decode import decode
from c2c_mlx.text.tokens import response_ids
from c2c_mlx.text.words import token_texts
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training.batch import collate
from c2c_mlx.training.dataset import Example, make_example
from c2c_mlx.training.files import ChatRow
from c2c_mlx.training.sections import Sections

TOKENS = 9
ITEMS = [
    Item(str(i), [{"role": "user", "content": "who wrote " + "it and " * i + str(i)}], "he did" * i)
    for i in range(1, 6)
]
Make = Callable[..., Modes]


@pytest.fixture(autouse=True)
def short_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models never end their turn."""
    monkeypatch.setattr(relay, "BACKGROUND_TOKENS", 12)


@pytest.fixture(scope="module")
def fuser(receiver: LanguageModel, sharer: LanguageModel) -> Fuser:
    mx.random.seed(1)
    layers = tuple((i, i + 2) for i in range(4))
    config = FuserConfig(receiver.shape, sharer.shape, layers, 24, 20, rotated_keys=False)
    fuser = Fuser(config)
    fuser.gate_logit = mx.ones_like(fuser.gate_logit)
    fuser.eval()
    return fuser


@pytest.fixture
def make(receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser) -> Make:
    def make(fuser: Fuser | None = fuser, items: Sequence[Item] = ITEMS) -> Modes:
        return Modes(receiver, [sharer], [fuser] if fuser else [], "sequential", items, 0, TOKENS)

    return make


def readings(modes: Modes, mode: str, items: Sequence[Item] = ITEMS) -> list[Reading]:
    found = modes.read(mode, items)
    assert all(isinstance(r, Reading) for r in found), found
    return [r for r in found if isinstance(r, Reading)]


def reference(item: Item, lm: LanguageModel) -> list[int]:
    return response_ids(
        [*item.messages, {"role": "assistant", "content": item.reference}], lm.tokenizer
    )


@pytest.mark.parametrize("mode", CHAT_MODES)
def test_a_batch_writes_what_a_chat_writes(make: Make, mode: Mode) -> None:
    modes = make()
    sampling = SamplingConfig(max_tokens=TOKENS)
    session = ChatSession(modes.receiver, modes.sharers[0], modes.links[0].fuser, sampling=sampling)
    found = readings(modes, mode)
    for item, reading, w in zip(ITEMS, found, write(found, TOKENS), strict=True):
        session.reset()
        finished = next(
            e for e in session.ask(item.messages[0]["content"], mode) if isinstance(e, Finished)
        )
        assert w.text == finished.text
        assert len(w.ids) == finished.figures.generated_tokens
        assert reading.prompt_tokens == finished.figures.prompt_tokens
        assert (reading.relayed.text if reading.relayed else "") == finished.relayed_text


@pytest.mark.parametrize("mode", ["receiver", "relay", "c2c"])
def test_thoughts_are_no_part_of_what_is_written(make: Make, mode: Mode) -> None:
    modes, sampling = make(), SamplingConfig(max_tokens=TOKENS)
    end = write(readings(modes, "receiver", ITEMS[:1]), 24)[0].text[5:8]
    able = [
        replace(lm, tokenizer=thinker(lm, "assistant", end))
        for lm in (modes.receiver, modes.sharers[0])
    ]
    thinking = Modes(*able[:1], able[1:], [modes.links[0].fuser], "sequential", ITEMS, 0, TOKENS)
    session = ChatSession(*able, modes.links[0].fuser, sampling=sampling)
    found, ended = readings(thinking, mode, ITEMS[:2]), 0
    for item, reading, w in zip(ITEMS, found, write(found, TOKENS), strict=False):
        session.reset()
        *_, finished = session.ask(item.messages[0]["content"], mode)
        assert isinstance(finished, Finished) and w.text == finished.text
        assert len(w.ids) == finished.figures.generated_tokens
        assert (reading.relayed.text if reading.relayed else "") == finished.relayed_text
        ended += bool(w.text)
        if mode == "c2c":
            silent = readings(thinking, "c2c-zeroed", [item])
            (owes,) = owed([reading], silent, [w])
            crossed = session.crossed()
            assert crossed is None or [text for text, _ in owes] == list(
                token_texts(w.ids[w.thoughts :], modes.receiver.tokenizer)
            )
    assert ended or mode != "receiver"


def test_thoughts_that_a_model_opens_by_itself(make: Make) -> None:
    modes = make()
    (reading,) = readings(modes, "receiver", ITEMS[:1])
    text = write([reading], 24)[0].text
    lm = replace(modes.receiver, tokenizer=thinker(modes.receiver, text[:3], text[9:12]))
    (w,) = write([replace(reading, lm=lm)], TOKENS)
    sampling, last = SamplingConfig(max_tokens=TOKENS), [reading.last]
    pieces = list(decode(lm.model, lm.tokenizer, reading.cache, last, sampling))
    assert w.ids == [piece.token for piece in pieces]
    assert w.thoughts == sum(piece.is_thought for piece in pieces) > 1
    assert w.text == "".join(piece.text for piece in pieces).strip() != ""


@pytest.fixture(scope="module")
def wordy(sharer: LanguageModel) -> LanguageModel:
    """The sharer with a longer template, beside which the receiver's is padded."""
    other = load_model(sharer.path)
    other.tokenizer.chat_template = "read this. " + str(sharer.tokenizer.chat_template)
    return other


@pytest.mark.parametrize("strategy", ["first", "longest", "span"])
def test_padding_beside_a_longer_template_is_padding_in_a_batch_too(
    receiver: LanguageModel, wordy: LanguageModel, fuser: Fuser, strategy: str
) -> None:
    mx.random.seed(2)
    other = Fuser(replace(fuser.config, alignment=strategy, rotated_keys=True))
    other.gate_logit = mx.ones_like(other.gate_logit)
    other.eval()
    modes = Modes(receiver, [wordy], [other], "sequential", ITEMS, 0, TOKENS)
    sampling = SamplingConfig(max_tokens=TOKENS)
    session = ChatSession(receiver, wordy, other, sampling=sampling)
    found = readings(modes, "c2c")
    asked = [[reference(item, receiver)] for item in ITEMS]
    everything = zip(ITEMS, found, write(found, TOKENS), asked, nats(found, asked), strict=True)
    for item, reading, w, wanted, weighed in everything:
        session.reset()
        *_, finished = session.ask(item.messages[0]["content"], "c2c")
        assert isinstance(finished, Finished) and w.text == finished.text
        ids = mx.array([[reading.last, *wanted[0][:-1]]])
        logits = receiver.model(ids, cache=reading.cache)[0].astype(mx.float32)
        logs = nn.log_softmax(logits, axis=-1)
        alone = -logs[mx.arange(len(wanted[0])), mx.array(wanted[0])].sum().item()
        assert weighed == pytest.approx([alone], rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_weighs_like_one_by_one(make: Make, mode: str) -> None:
    found = readings(make(), mode)
    asked = [
        [(ids := reference(i, r.lm)), [*ids[:-1], 5], [*ids[:-1], 6], ids[:2], [7, *ids]]
        for i, r in zip(ITEMS, found, strict=True)
    ]
    together = nats(found, asked)
    for reading, wanted, of in zip(found, asked, together, strict=True):
        alone = [nats([reading], [[ids]])[0][0] for ids in wanted]
        assert of == pytest.approx(alone, rel=1e-4)


def test_weighing_goes_in_parts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    found = readings(make(), "receiver")
    asked = [[reference(i, r.lm)] for i, r in zip(ITEMS, found, strict=True)]
    whole = nats(found, asked)
    monkeypatch.setattr(modes_module, "LOGITS", 20)
    for a, b in zip(nats(found, asked), whole, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert nats(found[:2], [[], []]) == [[], []] and nats([], []) == [] and write([], 5) == []


@pytest.mark.parametrize("mode", C2C_MODES)
def test_controls_lose_what_training_says_they_lose(make: Make, mode: str) -> None:
    """Evaluation and training agree on who is fed by what."""
    modes = make()
    c2c, tokenizers = modes.links[0], (modes.receiver.tokenizer, modes.sharers[0].tokenizer)
    found = readings(modes, mode)
    asked = [[reference(item, modes.receiver)] for item in ITEMS]
    for item, (weighed,) in zip(ITEMS, nats(found, asked), strict=True):

        def example(item: Item) -> Example:
            said = {"role": "assistant", "content": item.reference}
            return make_example(ChatRow([*item.messages, said]), *tokenizers, "span")

        fed = example(item)
        if mode == "c2c-shuffled":
            fed = fed.with_sharer_of(example(modes.partners[item.id]))
        batch = collate([fed], c2c.fuser.config.positions)
        own = step_loss.prefill(c2c.receiver, batch.receiver, {})
        cache = step_loss.prefill(c2c.sharer, batch.sharer, {})
        sharer = step_loss.read_sharer(c2c, cache, batch)
        if mode == "c2c-zeroed":
            sharer = step_loss.zeroed(c2c, batch)
        fused, _ = step_loss.fuse(c2c, own, sharer, batch)
        expected = step_loss.response_loss(Sections(c2c.receiver), fused, batch).item()
        # A fuser is float32 while it is trained, and the receiver's dtype when it is used.
        near = 1e-4 if kv.dtype_of(c2c.receiver) == mx.float32 else 5e-3
        assert weighed == pytest.approx(expected, rel=near)


def test_the_controls_are_no_c2c(make: Make) -> None:
    modes = make()
    asked = [[reference(item, modes.receiver)] for item in ITEMS]
    found = {mode: nats(readings(modes, mode), asked)[2][0] for mode in C2C_MODES}
    assert len({round(n, 3) for n in found.values()}) == 3


def test_readings_outlive_the_next_reading_and_their_own_answers(make: Make) -> None:
    modes = make()
    first = readings(modes, "c2c", ITEMS[:2])
    once = [w.ids for w in write(first, TOKENS)]
    readings(modes, "c2c", ITEMS[2:])
    assert [w.ids for w in write(first, TOKENS)] == once
    modes.forget()
    assert [w.ids for w in write(readings(modes, "c2c", ITEMS[:2]), TOKENS)] == once


def test_an_item_that_is_too_long_fails_alone(make: Make) -> None:
    long = Item("long", [{"role": "user", "content": "so " * 4000}], "x")
    items = [ITEMS[0], long, ITEMS[1]]
    modes = make(items=items)
    for mode in MODES:
        found = modes.read(mode, items)
        assert isinstance(found[1], C2CError) and "reads at most" in str(found[1])
        others = [found[0], found[2]]
        if mode != "c2c-shuffled":  # there, one of the others is fed by the long one
            assert all(isinstance(r, Reading) for r in others)
        else:
            assert sum(isinstance(r, Reading) for r in others) == 1


def test_letters_are_compared_behind_the_beginning_of_an_answer(make: Make) -> None:
    modes, item = make(), Item("1", ITEMS[0].messages, "B", tuple("abcd"))
    for lm in (modes.receiver, modes.sharers[0]):
        assert lm is not None
        asked = Choice("logits").continuations(item, lm.tokenizer, None)
        assert [lm.tokenizer.decode(ids).strip() for ids in asked] == [
            f"{LEAD} {letter}" for letter in "ABCD"
        ]
    assert Choice("generate").continuations(item, modes.receiver.tokenizer, None) == []


def test_without_a_fuser_the_c2c_modes_say_so(make: Make) -> None:
    modes = make(fuser=None)
    found = modes.read("c2c", ITEMS[:1])
    assert isinstance(found[0], NoFuserError)


@pytest.mark.parametrize("n", [2, 3, 10, 101])
def test_everybody_is_fed_by_another_one(n: int) -> None:
    items = [Item(str(i), []) for i in range(n)]
    partners = derangement(items, 3)
    assert (
        sorted(p.id for p in partners.values()) == sorted(partners) == sorted(i.id for i in items)
    )
    assert all(own != partner.id for own, partner in partners.items())
    assert partners == derangement(items, 3)
    assert n < 10 or partners != derangement(items, 4)
    assert derangement(items[:1], 3) == {}
