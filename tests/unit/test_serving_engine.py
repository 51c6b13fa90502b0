"""Many jobs on one inference thread, over two tiny models: each as if it were alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace

import mlx.core as mx
import pytest
from chat_sessions import WORDY, thinker, with_template
from mlx.utils import tree_map
from mlx_lm.models import falcon_h1
from serving_jobs import SAMPLING, Heard, asked, load_team, running, started

from c2c_mlx import ChatSession, Fuser, LanguageModel, device, load_model
from c2c_mlx.config import FuserConfig, Pair
from c2c_mlx.errors import C2CError
from c2c_mlx.events import Finished
from c2c_mlx.fusers import disk
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.serving.answer import Answer
from c2c_mlx.serving.batch import Batch
from c2c_mlx.serving.engine import Engine, Limits
from c2c_mlx.serving.job import (
    Accepted,
    Done,
    Ended,
    Event,
    Failed,
    Full,
    Job,
    Piece,
    Sampling,
    TooLong,
    Unavailable,
    Wait,
)
from c2c_mlx.serving.reading import Prompt, Reading, Team
from c2c_mlx.talk import relay
from c2c_mlx.talk.links import link

WORDS = ["the sea", "who wrote it", "Hello!", "and what else", "x", "one more thing, please"]
CHATS = [asked(" ".join(WORDS[i % 6 :] * (1 + i % 3))) for i in range(16)]


@pytest.fixture(scope="module")
def engine(tiny_pair: Pair) -> Iterator[Engine]:
    with running(tiny_pair) as engine:
        yield engine


@pytest.fixture(scope="module")
def session(receiver: LanguageModel, sharer: LanguageModel, tiny_pair: Pair) -> ChatSession:
    return ChatSession(receiver, sharer, Fuser.load(tiny_pair.fusers[0]), sampling=SAMPLING)


def alone(session: ChatSession, messages: list[dict[str, str]], mode: str) -> str:
    session.reset()
    *_, finished = session.ask(messages[-1]["content"], mode)
    return finished.text


@pytest.mark.parametrize("mode", ["c2c", "receiver", "sharer"])
def test_sixteen_at_once_are_each_as_in_c2c_chat(engine, session, mode) -> None:
    heard = [Heard(engine, mode, messages) for messages in CHATS]
    together = [h.answers() for h in heard]
    for messages, (texts, reasons, done) in zip(CHATS, together, strict=True):
        assert texts[0].strip() == alone(session, messages, mode)
        assert reasons == ["length"] or done.completion_tokens < SAMPLING.max_tokens
        assert done.gates_open == (8 if mode == "c2c" else 0)


@pytest.mark.parametrize(
    ("model", "rows"),
    [("gemma2", 2), ("gemma2", 3), ("dynamic", 2)],  # 3: as many as KV heads
)
def test_models_that_mlx_lm_knows_no_batches_of(model, rows, request) -> None:
    lm = request.getfixturevalue(model)
    session = ChatSession(lm, sampling=SAMPLING)
    with started(Engine(lambda: Team(load_model(lm.path)), SAMPLING)) as engine:
        heard = [Heard(engine, "receiver", messages) for messages in CHATS[:rows]]
        texts = [h.answers()[0][0].strip() for h in heard]
    assert texts == [alone(session, messages, "receiver") for messages in CHATS[:rows]]


def test_padding_stays_padding_in_a_batch(receiver, sharer, tiny_pair, tmp_path) -> None:
    mx.random.seed(5)
    config = FuserConfig(
        receiver.shape, sharer.shape, ((1, 2), (2, 3)), 24, 20, alignment="longest"
    )
    fuser = Fuser(config)
    fuser.gate_logit = mx.ones_like(fuser.gate_logit)
    fuser.save(tmp_path / "fuser")

    def load() -> Team:
        team = load_team(replace(tiny_pair, fusers=(str(tmp_path / "fuser"),)))
        return replace(team, sharers=[with_template(team.sharers[0], WORDY)])

    fuser, wordy = Fuser.load(tmp_path / "fuser"), with_template(sharer, WORDY)
    session = ChatSession(receiver, wordy, fuser, sampling=SAMPLING)
    with started(Engine(load, SAMPLING)) as engine:
        heard = [Heard(engine, "c2c", messages) for messages in CHATS[:6]]
        texts = [h.answers()[0][0].strip() for h in heard]
    assert texts == [alone(session, messages, "c2c") for messages in CHATS[:6]]


@pytest.mark.parametrize("fuse_response", [False, True])
def test_thoughts_are_no_part_of_an_answer(receiver, sharer, tiny_pair, fuse_response) -> None:
    """As of models whose templates begin them, asked to or not."""
    fuser = Fuser.load(tiny_pair.fusers[0])
    options = {"sampling": SAMPLING, "fuse_response": fuse_response}
    end = alone(ChatSession(receiver, sharer, fuser, **options), CHATS[0], "c2c")[5:8]

    def able(lm: LanguageModel) -> LanguageModel:
        return replace(lm, tokenizer=thinker(lm, "assistant", end))

    def load() -> Team:
        team = load_team(tiny_pair, fuse_response=fuse_response)
        return replace(team, receiver=able(team.receiver), sharers=[able(team.sharers[0])])

    session = ChatSession(able(receiver), able(sharer), fuser, **options)
    with started(Engine(load, SAMPLING)) as engine:
        plain = Heard(engine, "c2c", CHATS[0], n=2, top_logprobs=0).all()
        heard = [Heard(engine, mode, CHATS[0]) for mode in ("receiver", "sharer")]
        texts = [h.answers()[0][0].strip() for h in heard]
        crossed = Heard(engine, "c2c", CHATS[0], crossed=True).answers()[2].crossed
    expected = [alone(session, CHATS[0], mode) for mode in ("receiver", "sharer")]
    assert [t.rstrip("\ufffd") for t in texts] == [t.rstrip("\ufffd") for t in expected]
    text, found = alone(session, CHATS[0], "c2c"), session.crossed()
    said = "".join(e.text for e in plain if isinstance(e, Piece) and e.choice == 1)
    # Behind thoughts the limit is not mlx-lm's, and a chat leaves half of a character out.
    assert text and said.strip().rstrip("\ufffd") == text.rstrip("\ufffd")
    tokens = [t for e in plain if isinstance(e, Piece) and e.choice == 1 for t in e.tokens]
    assert len(tokens) == SAMPLING.max_tokens
    assert crossed and found and len(crossed) == len(found.tokens) == SAMPLING.max_tokens
    assert found.tokens[:-1] == tuple(token for token, _ in crossed[:-1])


@pytest.mark.parametrize("mode", ["receiver", "relay", "c2c"])
def test_thoughts_that_a_model_opens_itself_have_their_own_room(
    receiver, sharer, tiny_pair, mode, monkeypatch
) -> None:
    fuser, question = Fuser.load(tiny_pair.fusers[0]), CHATS[0][0]["content"]

    def finished(limit: int, *lms: LanguageModel) -> Finished:
        monkeypatch.setattr(relay, "BACKGROUND_TOKENS", limit)
        sampling = replace(SAMPLING, max_tokens=limit)
        *_, finished = ChatSession(*lms, fuser, sampling=sampling).ask(question, mode)
        return finished

    whole = finished(60, receiver, sharer)
    written = whole.relayed_text or whole.text

    def able(lm: LanguageModel) -> LanguageModel:
        return replace(lm, tokenizer=thinker(lm, written[:3], written[40:44]))

    def load() -> Team:
        team = load_team(tiny_pair)
        return replace(team, receiver=able(team.receiver), sharers=[able(team.sharers[0])])

    expected = finished(8, able(receiver), able(sharer))
    with started(Engine(load, replace(SAMPLING, max_tokens=8))) as engine:
        (text,), _, done = Heard(engine, mode, CHATS[0]).answers()
    assert (done.relayed_tokens or done.completion_tokens) > 8  # with the thoughts
    assert text.strip() == expected.text != ""
    assert done.relayed_text == expected.relayed_text
    assert bool(done.relayed_text) == (mode == "relay")


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_served_as_it_is(tiny_pair, dtype) -> None:
    def load() -> Team:
        team = load_team(tiny_pair)
        for lm in (team.receiver, *team.sharers):
            lm.model.set_dtype(dtype)
        fuser = disk.load(tiny_pair.fusers[0])
        return replace(team, links=[link(team.receiver, team.sharers[0], fuser)])

    team = load()
    fuser = team.links[0].fuser
    session = ChatSession(team.receiver, team.sharers[0], fuser, sampling=SAMPLING)
    with started(Engine(load, SAMPLING)) as engine:
        heard = [
            Heard(engine, "c2c", messages, top_logprobs=3, sampling=Sampling(temp=t, seed=1))
            for messages in CHATS[:2]
            for t in (0.0, 1.0)
        ]
        told = [h.all() for h in heard]
        greedy = Heard(engine, "c2c", CHATS[0], crossed=True).answers()
    tokens = [t for events in told for e in events if isinstance(e, Piece) for t in e.tokens]
    assert tokens and all(-9999 < t.logprob <= 0 and len(t.top) == 3 for t in tokens)
    assert greedy[0][0].strip() == alone(session, CHATS[0], "c2c")
    assert greedy[2].crossed and all(abs(nats) < 100 for _, nats in greedy[2].crossed)


def test_a_relay_reads_what_was_written(engine) -> None:
    (text,), _, done = Heard(engine, "relay", asked("Who wrote it?")).answers()
    assert text and done.relayed_text and done.relayed_tokens > 1
    # What the receiver read is the conversation that the relayed text stands in.
    from c2c_mlx.talk.relay import with_background

    again = with_background("Who wrote it?", done.relayed_text)
    assert Heard(engine, "receiver", again).answers()[0] == [text]


def test_a_relays_answer_and_figures_are_the_receivers(tiny_pair) -> None:
    def load() -> Team:
        team = load_team(tiny_pair)
        team.sharers[0].model.args.max_position_embeddings = 220
        return team

    question = asked("Who wrote it, and when and where and why?")
    with started(Engine(load, SAMPLING)) as engine:
        once = Heard(engine, "relay", question, sampling=Sampling(max_tokens=180)).answers()[2]
        assert once.completion_tokens == 180 and once.cached_tokens == 0
        again = Heard(engine, "relay", question, sampling=Sampling(max_tokens=4)).answers()[2]
    # All of the sharer's prompt, and the receiver's, are there but for their last ids.
    assert again.cached_tokens == again.prompt_tokens - 1


def test_only_what_was_there_before_the_first_answer_is_told_as_cached(tiny_pair) -> None:
    with running(tiny_pair, fuse_response=True) as engine:
        options = {"n": 2, "sampling": Sampling(max_tokens=4)}
        assert Heard(engine, "c2c", CHATS[0], **options).answers()[2].cached_tokens == 0
        done = Heard(engine, "c2c", CHATS[0], **options).answers()[2]
        assert done.cached_tokens == done.prompt_tokens - 1


def test_sampling_is_the_jobs_own(engine) -> None:
    hot = Sampling(temp=1.0, top_p=0.9, seed=3)
    first, _, _ = Heard(engine, "c2c", CHATS[1], sampling=hot, n=3).answers()
    assert len(set(first)) == 3
    heard = [Heard(engine, "c2c", messages, sampling=hot, n=3) for messages in CHATS[:4]]
    assert [h.answers()[0] for h in heard][1] == first
    other = Sampling(temp=1.0, top_p=0.9, seed=4)
    assert Heard(engine, "c2c", CHATS[1], sampling=other).answers()[0][0] not in first


def test_a_fused_answer_is_that_of_c2c_chat(receiver, sharer, tiny_pair) -> None:
    fuser = Fuser.load(tiny_pair.fusers[0])
    session = ChatSession(receiver, sharer, fuser, sampling=SAMPLING, fuse_response=True)
    with running(tiny_pair, fuse_response=True) as engine:
        heard = [Heard(engine, "c2c", messages, n=n) for n, messages in enumerate(CHATS[:2], 1)]
        answers = [h.answers() for h in heard]
    for messages, (texts, _, _) in zip(CHATS, answers, strict=False):
        assert {text.strip() for text in texts} == {alone(session, messages, "c2c")}


@pytest.mark.parametrize("fuse_response", [False, True])
def test_what_crossed_is_what_c2c_chat_says(receiver, sharer, tiny_pair, fuse_response) -> None:
    fuser = Fuser.load(tiny_pair.fusers[0])
    options = {"sampling": SAMPLING, "fuse_response": fuse_response}
    session = ChatSession(receiver, sharer, fuser, **options)
    with running(tiny_pair, fuse_response=fuse_response) as engine:
        heard = [Heard(engine, "c2c", messages, crossed=True) for messages in CHATS[:3]]
        told = [h.answers()[2].crossed for h in heard]
        assert Heard(engine, "c2c", CHATS[0]).answers()[2].crossed is None
    for messages, crossed in zip(CHATS, told, strict=False):
        alone(session, messages, "c2c")
        found = session.crossed()
        assert found and crossed and found.tokens == tuple(text for text, _ in crossed)
        assert [nats for _, nats in crossed] == pytest.approx(found.nats, abs=1e-4)
        assert max(abs(nats) for nats in found.nats) > 1e-3


@pytest.mark.parametrize("mode", ["c2c", "receiver"])
def test_a_turn_reads_as_few_tokens_as_in_c2c_chat(tiny_pair, receiver, sharer, mode) -> None:
    sampling = replace(SAMPLING, max_tokens=4)
    fuser = Fuser.load(tiny_pair.fusers[0])
    session = ChatSession(receiver, sharer, fuser, sampling=sampling)
    told, new = [], []
    with running(tiny_pair) as engine:
        for turn in range(6):
            question = WORDS[turn]
            messages = [*session.messages(mode), *asked(question)]
            job = Heard(engine, mode, messages, sampling=Sampling(max_tokens=4))
            Heard(engine, mode, asked(f"somebody else {turn}")).answers()
            (text,), _, done = job.answers()
            *_, finished = session.ask(question, mode)
            assert text.strip() == finished.text
            told.append(done.prompt_tokens - done.cached_tokens)
            new.append(finished.figures.new_prompt_tokens)
    assert told[1:] == new[1:]  # before the first one, somebody may have had the same template
    assert max(told[1:]) < done.prompt_tokens / 2


def test_a_long_prompt_does_not_stall_an_answer(engine, monkeypatch) -> None:
    monkeypatch.setattr(device, "prefill_slice", lambda: 16)
    order: list[tuple[str, Event]] = []
    writing = Job("receiver", CHATS[0], lambda event: order.append(("short", event)))
    reading = Job(
        "c2c", asked("the sea is deep and wide " * 12), lambda e: order.append(("long", e))
    )
    writing.sampling = Sampling(max_tokens=300)
    engine.submit(writing)
    engine.submit(reading)
    Heard(engine, "c2c", CHATS[1]).answers()
    writing.gone = reading.gone = True
    of_long = [at for at, (name, _) in enumerate(order) if name == "long"]
    meanwhile = order[of_long[0] : of_long[1]]  # from its acceptance to its first token
    # Some tokens have no text of their own, so there are fewer pieces than slices of two prompts.
    assert len(meanwhile) > 10 and all(isinstance(event, Piece) for _, event in meanwhile[1:])


def test_prompts_are_read_in_their_order_but_short_ones_overtake(engine, monkeypatch) -> None:
    monkeypatch.setattr(device, "prefill_slice", lambda: 16)
    order: list[str] = []
    sampling = Sampling(max_tokens=1)

    def job(name: str, text: str) -> Job:
        def emit(event: Event) -> None:
            order.extend([name] if isinstance(event, Ended) else [])

        return Job("receiver", asked(text), emit, sampling)

    busy = Heard(engine, "sharer", CHATS[0], sampling=Sampling(max_tokens=300))
    busy.until(Piece)
    # Of the two long ones the first is first, though both are admitted before any is read.
    for name, text in (("long", "one " * 60), ("other", "two " * 60), ("short", "x")):
        engine.submit(job(name, text))
    Heard(engine, "receiver", asked("three " * 70)).answers()
    busy.job.gone = True
    assert order == ["short", "long", "other"]


def test_who_has_gone_leaves_within_a_token(engine) -> None:
    jobs = [Heard(engine, "c2c", messages) for messages in CHATS[:8]]
    jobs[0].until(Piece)
    for heard in jobs:
        heard.job.gone = True
    text = Heard(engine, "c2c", CHATS[9]).answers()[0][0]
    assert engine.status() == {"waiting": 0, "working": 0}
    assert all(not batch.rows for batch in engine._desk.batches.values())
    assert text == Heard(engine, "c2c", CHATS[9]).answers()[0][0]


def test_a_full_queue_says_when_to_come_back(tiny_pair) -> None:
    with running(tiny_pair, Limits(slots=1, queue=2)) as engine:
        first = Heard(engine, "receiver", CHATS[0], sampling=Sampling(max_tokens=300))
        first.until(Accepted)
        heard = [first]
        with pytest.raises(Full) as refused:
            for _ in range(4):  # one may have been taken up already
                heard.append(Heard(engine, "receiver", CHATS[1]))
        assert 1 <= refused.value.wait_s <= 600
        for waiting in heard:
            waiting.job.gone = True
        assert Heard(engine, "receiver", CHATS[1]).answers()[0][0]


def test_caches_stay_within_their_budget(tiny_pair) -> None:
    budget = 0.002 if device.is_dense() else 0.001  # half precision needs half
    with running(tiny_pair, Limits(cache_gb=budget)) as engine:
        short = Sampling(max_tokens=4)
        for messages in CHATS:
            Heard(engine, "c2c", messages, sampling=short).answers()
            assert engine._desk.caches.nbytes <= budget * 1e9
        assert engine._desk.caches.nbytes > 0
        with pytest.raises(TooLong, match="GB of caches"):
            Heard(engine, "c2c", asked("sea " * 80), sampling=Sampling(max_tokens=250)).answers()
        # Sixteen that fit one by one but not together wait for each other.
        heard = [Heard(engine, "c2c", messages) for messages in CHATS]
        assert all(h.answers()[0][0] for h in heard)


def test_what_cannot_be_done_is_refused_alone(engine) -> None:
    good = Heard(engine, "c2c", CHATS[0])
    with pytest.raises(TooLong, match="reads at most 512"):
        Heard(engine, "c2c", asked("sea " * 600)).answers()
    with pytest.raises(C2CError, match="at most 16 answers"):
        Heard(engine, "c2c", CHATS[0], n=17)
    assert good.answers()[0][0]


@pytest.mark.parametrize("max_tokens", [1, 24])
def test_an_answer_that_fails_fails_alone(engine, max_tokens) -> None:
    good = Heard(engine, "receiver", CHATS[0], sampling=Sampling(max_tokens=40))
    good.until(Piece)
    # More than the vocabulary has, which a client of ours can't ask for.
    options = {"top_logprobs": 10**6, "sampling": Sampling(max_tokens=max_tokens)}
    with pytest.raises(ValueError):
        Heard(engine, "receiver", CHATS[1], n=2, **options).answers()
    assert isinstance(good.until(Done, Failed), Done)
    assert not any(batch.rows for batch in engine._desk.batches.values())
    assert Heard(engine, "receiver", CHATS[1]).answers()[0][0]


@pytest.mark.parametrize("mode", ["c2c", "receiver"])
def test_where_the_device_fails_nothing_that_was_read_is_kept(tiny_pair, session, mode) -> None:
    """On a GPU what failed counts as computed, and is told one evaluation late."""
    with running(tiny_pair) as engine:
        text = Heard(engine, mode, CHATS[0]).answers()[0][0]
        busy = Heard(engine, "sharer", CHATS[2], sampling=Sampling(max_tokens=300))
        busy.until(Piece)
        desk = engine._desk

        def fail() -> None:
            for kept in desk.caches._kept:
                for layer in kept.state.cache:
                    layer.keys, layer.values = map(mx.zeros_like, (layer.keys, layer.values))
            raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")

        desk.batches[id(desk.team.receiver.model)]._generator.next = fail
        with pytest.raises(RuntimeError, match="Insufficient Memory"):
            Heard(engine, mode, CHATS[1]).answers()
        assert isinstance(busy.until(Done, Failed), Failed)
        assert not any(batch.rows for batch in desk.batches.values())
        longer = [*CHATS[0], {"role": "assistant", "content": text}, *asked("And when?")]
        assert Heard(engine, mode, longer).answers()[2].cached_tokens == 0
        assert Heard(engine, mode, CHATS[1]).answers()[0][0].strip() == alone(
            session, CHATS[1], mode
        )


def test_an_answer_that_failed_takes_no_newcomer_along(receiver) -> None:
    batch = Batch(receiver, 4)

    def begun(text: str) -> tuple[Answer, Generator[Wait, None, None]]:
        ids, reader = receiver.tokenizer.encode(text), Reader(receiver.model)
        reader.extend(ids[:-1])
        reading = Reading(Prompt(receiver, [], ids, 100), reader, "", 0)
        answer = Answer(receiver)
        steps = batch.write(reading, [answer], SAMPLING, lambda answer, piece: None)
        next(steps)
        return answer, steps

    def fail() -> None:
        raise ValueError("whatever a step may raise")

    _, failed = begun("ab cd")
    batch._generator.next = fail
    batch.step()
    answer, _newcomer = begun("ef gh")
    with pytest.raises(ValueError, match="whatever"):
        next(failed)
    for _ in range(2 * SAMPLING.max_tokens):
        batch.step()
    assert answer.reason


def test_a_thread_that_dies_tells_everybody(tiny_pair) -> None:
    def die(event: Event) -> None:
        if isinstance(event, Accepted):
            raise SystemExit

    with running(tiny_pair) as engine:
        waiting = Heard(engine, "c2c", CHATS[0], sampling=Sampling(max_tokens=300))
        waiting.until(Piece)
        deadly = Heard(engine, "receiver", CHATS[1])
        deadly.job.emit = die
        failed = waiting.until(Failed, Done)
        assert isinstance(failed, Failed) and isinstance(failed.error, Unavailable)
        engine.join(timeout=60)
        with pytest.raises(Unavailable):
            Heard(engine, "c2c", CHATS[0])


def test_a_team_says_what_it_lacks(tiny_pair) -> None:
    team = load_team(tiny_pair)
    assert team.modes == ("c2c", "relay", "receiver", "sharer")
    assert replace(team, links=()).modes == ("relay", "receiver", "sharer")
    assert replace(team, links=(), sharers=()).modes == ("receiver",)
    with pytest.raises(C2CError, match="no fuser is known"):
        replace(team, links=()).answering("c2c")


def test_a_receiver_without_plain_attention_caches_is_served(receiver, sharer, tiny_pair) -> None:
    """Falcon-H1's layers hold keys and values beside state, which nobody here can fuse."""

    def falcon() -> LanguageModel:
        args = falcon_h1.ModelArgs(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            mamba_d_ssm=64,
            mamba_d_head=16,
            mamba_n_heads=4,
            mamba_d_state=16,
        )
        mx.random.seed(7)
        model = falcon_h1.Model(args)
        model.update(tree_map(lambda p: mx.random.normal(p.shape) / 4, model.parameters()))
        mx.eval(model.parameters())
        return replace(receiver, name="falcon", model=model.eval())

    def load() -> Team:
        return Team(falcon(), load_team(tiny_pair).sharers)

    session = ChatSession(falcon(), sharer, sampling=SAMPLING)
    with started(Engine(load, SAMPLING)) as engine:
        for mode in ("receiver", "relay"):
            heard = [Heard(engine, mode, messages) for messages in CHATS[:3]]
            texts = [h.answers()[0][0].strip() for h in heard]
            assert texts == [alone(session, messages, mode) for messages in CHATS[:3]] != [""] * 3
    engine = Engine(lambda: Team(falcon(), weights="shared"), SAMPLING)
    engine.start()
    with pytest.raises(C2CError, match="no attention layers"):
        engine.served.result(timeout=60)
    engine.join(timeout=60)


def test_closed_gates_are_another_conversation(tiny_pair) -> None:
    team = load_team(tiny_pair)
    before = team.key
    team.links[0].fuser.set_gate(0, 0, False)
    assert team.key != before
    team.links[0].fuser.set_gate(0, 0, True)
    assert team.key == before
