"""A conversation over several turns, in four modes with a history each."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

from c2c_mlx.config import Order, SamplingConfig
from c2c_mlx.errors import C2CError, NoFuserError
from c2c_mlx.events import (
    Crossed,
    Event,
    Finished,
    GateReport,
    Gates,
    Mode,
    Prefilling,
    RelayedText,
    Text,
)
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.fuser import Fuser
from c2c_mlx.fusion.reader import Reader, common_prefix
from c2c_mlx.models.load import LanguageModel
from c2c_mlx.talk import gate_report, links, relay
from c2c_mlx.talk.cost import Cost
from c2c_mlx.talk.crossed import Crossing, Decoded, watched
from c2c_mlx.talk.decode import Piece, decode
from c2c_mlx.text.alignment import TokenAlignment
from c2c_mlx.text.answer import AnswerAlignment
from c2c_mlx.text.rendering import render
from c2c_mlx.text.thoughts import begins_thinking
from c2c_mlx.text.tokens import tokenize

Messages = list[dict[str, str]]


class _Stopped(Exception):
    """Leaves the reading of a prompt when the user wants no answer any more."""


class ChatSession:
    """A receiver, its sharers with a fuser each, and one conversation per mode.

    Every mode has its own history and its own caches, so a turn costs only its new tokens.

    Args:
        receiver: the model that answers.
        sharer: the model that is read; None: only `receiver` mode works.
        fuser: made for the two; None: `c2c` mode does not work.
        others: more sharers for `c2c` mode, each with its fuser into the receiver. One model may be
            there twice, with fusers of its own.
        order: of several sharers, see `FusedCache`.
        fuse_response: the sharers read along while the receiver writes, and every new token is
            fused; else the prompt alone is, unless a fuser was made for this.
        sampling: the same for every mode.
        system: a system prompt, or None for whatever the models' templates say.
        on_prefill: told how far the reading of a prompt is, about once per 512 positions.

    Raises:
        C2CError: if a fuser was not made for its models.
    """

    def __init__(
        self,
        receiver: LanguageModel,
        sharer: LanguageModel | None = None,
        fuser: Fuser | None = None,
        *,
        others: Sequence[tuple[LanguageModel, Fuser]] = (),
        order: Order = "sequential",
        fuse_response: bool = False,
        sampling: SamplingConfig | None = None,
        system: str | None = None,
        on_prefill: Callable[[Prefilling], None] = lambda event: None,
    ) -> None:
        self.receiver, self.sharer = receiver, sharer
        self.sampling = sampling or SamplingConfig()
        self.system = system
        self.on_prefill = on_prefill
        pairs = [(sharer, fuser), *others] if sharer is not None and fuser is not None else []
        self.links = [links.link(receiver, lm, of_pair) for lm, of_pair in pairs]
        made_for_it = any(link.fuser.config.fuse_response for link in self.links)
        self.fuse_response = fuse_response or made_for_it
        self.sharers = [lm for lm, _ in pairs] or [lm for lm in (sharer,) if lm]
        self._readers: dict[str, Reader] = {}  # of the modes that fuse nothing
        self._fused = FusedCache(*self.links, order=order) if self.links else None
        self._crossing: Crossing | None = None  # made when somebody asks what crossed
        self.reset()

    def reset(self) -> None:
        """Forgets every mode's conversation; models and settings stay.

        So do the caches: the next conversation begins with the same template, which is not read
        again, and what differs is dropped then.
        """
        self.history: dict[Mode, Messages] = {}
        self._background: Messages = []  # the relay's other conversation, with the sharer
        self._decoded = Decoded([])
        if self._fused:
            self._fused.fuse_anew()

    def undo(self, mode: Mode) -> None:
        """Forgets the mode's last turn; its caches are rolled back when they are next used."""
        del self.history.get(mode, [])[-(4 if mode == "relay" else 2) :]
        if mode == "relay":
            del self._background[-2:]
        if mode == "c2c" and self._fused and self._fused.last:
            # Asked again, the turn is fused again: otherwise there would be nothing to tell of it.
            self._fused.fuse_anew(self._fused.fusions[0].start)

    def restore(self, mode: Mode, turns: Sequence[tuple[str, str, str]]) -> None:
        """Takes up a conversation that another session had.

        Args:
            mode: whose history is replaced.
            turns: question, relayed text (the relay's alone) and answer of each.
        """
        history: Messages = []
        for question, relayed, answer in turns:
            asked = [{"role": "user", "content": question}]
            history += relay.with_background(question, relayed) if mode == "relay" else asked
            history.append({"role": "assistant", "content": answer})
        self.history[mode] = history
        if mode == "relay":
            self._background = [m for i, m in enumerate(history) if i % 4 < 2]

    @property
    def gates(self) -> tuple[Gates, ...]:
        """Each fuser's gates as plain values."""
        found = (link.fuser.gates.tolist() for link in self.links)
        return tuple((tuple(keys), tuple(values)) for keys, values in found)

    def set_gates(self, wanted: Sequence[Gates]) -> None:
        """Opens and closes gates of each fuser; a kind that is not fused stays closed.

        What has been fused so far was fused with other gates, so it is fused anew in the next turn.
        """
        for link, own in zip(self.links, wanted, strict=True):
            for kind, at in np.argwhere(link.fuser.gates != np.array(own)).tolist():
                if kind in link.fuser.kinds:
                    link.fuser.set_gate(kind, at, own[kind][at])
        if self._fused:
            self._fused.fuse_anew()
        if self._crossing:
            self._crossing.fuse_anew()

    def messages(self, mode: Mode) -> Messages:
        """The mode's conversation so far, the system prompt first if there is one."""
        return [*self._opening(), *self.history.get(mode, [])]

    def gate_reports(self, *, of_last_token: bool = False) -> list[GateReport]:
        """How the latest C2C turn changed the receiver's cache; computed when asked for.

        Args:
            of_last_token: leaves out everything before it, for a look while an answer is fused.

        Returns:
            One per sharer by which something was changed.
        """
        if self._fused is None or self._fused.last is None:
            return []
        texts, since = self._fused.texts, self._fused.last.stop - 1 if of_last_token else 0
        with self._whole_caches():
            found = [(at, self._fused.stats(at, since)) for at in range(len(texts))]
        return [
            gate_report.report(
                stats, texts[at], self.receiver.tokenizer, self.sharers[at].tokenizer, at
            )
            for at, stats in found
            if stats
        ]

    def crossed(self, *, over_receiver: bool = False) -> Crossed | None:
        """What each token of the latest C2C answer owes to the sharer; computed when asked for.

        Args:
            over_receiver: also compares with the receiver alone, which costs one more pass.

        Returns:
            None if there is no answer, or gates were changed after it.
        """
        if self._fused is None or self._fused.last is None or not self._decoded.has_answer:
            return None
        self._crossing = self._crossing or Crossing(self._fused)
        with self._whole_caches():
            return self._crossing.of(self._decoded, self.receiver.tokenizer, over_receiver)

    def stop(self) -> None:
        """Ends the turn after the next token, or the next chunk of a prompt; from any thread."""
        self._stopping = True

    def ask(self, question: str, mode: Mode = "c2c") -> Generator[Event, None, None]:
        """One turn. However it ends, what has been said of the answer stays in the history.

        Args:
            question: the user's message.
            mode: who answers, and from what.

        Yields:
            The turn's events, `Finished` last (none, if the generator is closed).

        Raises:
            C2CError: for an empty message, a mode that this session can't do, or a conversation
                that no longer fits a model's context; the history is then as it was before.
        """
        if not question.strip():
            raise C2CError("the message is empty: type a question")
        mx.reset_peak_memory()
        self._stopping = False
        cost, said, relayed = Cost(), "", ""
        turn = [{"role": "user", "content": question}]
        background = list(self._background)
        try:
            with self._whole_caches():
                if mode == "relay":
                    for piece in self._relay(question, cost):
                        relayed += piece.text
                        yield piece
                    if self._stopping:
                        raise _Stopped
                    turn = relay.with_background(question, relayed.strip())
                for text in self._answer([*self.messages(mode), *turn], mode, cost):
                    said += text.text
                    yield text
        except _Stopped:
            pass
        finally:
            if said.strip():
                turn.append({"role": "assistant", "content": said.strip()})
                self.history.setdefault(mode, []).extend(turn)
            else:
                self._background = background
        n_open = sum(int(link.fuser.gates.sum()) for link in self.links) if mode == "c2c" else 0
        reason = "stopped" if self._stopping else cost.reason
        yield Finished(mode, said.strip(), relayed.strip(), reason, cost.figures(n_open))

    @contextmanager
    def _whole_caches(self) -> Iterator[None]:
        """Gives up all caches where the device fails, those of other modes as well."""
        try:
            yield
        except (RuntimeError, MemoryError):
            # On a GPU what failed counts as computed, and is told of late: no cache can be trusted.
            self._readers, self._crossing, self._decoded = {}, None, Decoded([])
            if self._fused:
                self._fused = FusedCache(*self.links, order=self._fused.order)
            raise

    def _relay(self, question: str, cost: Cost) -> Iterator[RelayedText]:
        """The sharer's part of a relay."""
        self._background.append(relay.background_message(question))
        sampling = replace(self.sampling, max_tokens=relay.BACKGROUND_TOKENS)
        sharer, text = self._other, ""
        asked = relay.prompt(sharer, [*self._opening(), *self._background])
        stops = relay.stop_strings(sharer)
        for piece in self._plain(sharer, asked, "relay", sampling, cost, stops):
            text += piece.text
            cost.relayed += 1
            yield RelayedText("relay", piece.text)
            if self._stopping:
                break
        self._background.append({"role": "assistant", "content": text.strip()})

    def _answer(self, messages: Messages, mode: Mode, cost: Cost) -> Iterator[Text]:
        """The answering model's part of any mode."""
        lm = self._other if mode == "sharer" else self.receiver
        pieces = (
            self._from_fused(messages, cost)
            if mode == "c2c"
            else self._plain(lm, messages, mode, self.sampling, cost)
        )
        for piece in pieces:
            if self._stopping:
                break
            cost.thoughts += piece.is_thought
            if not piece.is_thought:
                cost.first = cost.first or time.perf_counter()
            cost.generated += 1
            yield Text(mode, piece.text)

    def _plain(
        self,
        lm: LanguageModel,
        messages: Messages,
        mode: Mode,
        sampling: SamplingConfig,
        cost: Cost,
        stops: Sequence[str] | None = None,
    ) -> Iterator[Piece]:
        """One model reads and writes; `stops`, where they are given, stand for its own."""
        ids = tokenize(render(messages, lm.tokenizer), lm.tokenizer)
        sampling = links.fitting(lm, ids, sampling)
        reader = self._readers.setdefault(f"{mode} {lm.name}", Reader(lm.model))
        cost.prompt_tokens = len(ids)
        cost.new_prompt_tokens = len(ids) - common_prefix(reader.ids, ids)
        tic = time.perf_counter()
        reader.extend(ids[:-1], self._report(mode))
        seconds = time.perf_counter() - tic
        if lm is self.receiver:
            cost.receiver_s += seconds
        else:
            cost.sharer_s += seconds
        stops = lm.stop_strings if stops is None else stops
        written: list[int] = []
        try:
            for piece in self._decode(lm, lm.model, reader.cache, ids, sampling, stops, cost):
                written.append(piece.token)
                yield piece
        finally:
            reader.settle([*ids, *written])

    def _from_fused(self, messages: Messages, cost: Cost) -> Iterator[Piece]:
        """Both models read, the receiver writes."""
        if self._fused is None:
            raise NoFuserError(self.receiver.name, self._other.name)
        lm, tic = self.receiver, time.perf_counter()
        prompts = links.align_to_each(messages, lm, self.links, self.sharers)
        cost.align_s = time.perf_counter() - tic
        ids = prompts[0].receiver_ids
        sampling = links.fitting(lm, ids, self.sampling)
        for sharer, prompt in zip(self.sharers, prompts, strict=True):
            with_answer = links.fitting(sharer, prompt.sharer_ids, sampling)
            sampling = with_answer if self.fuse_response else sampling  # it reads the answer, too
        cache = self._fused.extend(prompts, self._report("c2c"))
        fusion = self._fused.last
        assert fusion is not None
        cost.prompt_tokens = len(ids)
        cost.new_prompt_tokens = fusion.stop - fusion.start + 1
        cost.sharer_s, cost.receiver_s = fusion.sharer_s, fusion.receiver_s
        cost.fuse_s = fusion.fuse_s
        self._decoded = decoded = Decoded(ids, self.fuse_response, watched(self._fused))
        model: Any = decoded.states
        if self.fuse_response:
            model = self._fused.answering(self._alignments(prompts))
        try:
            for piece in self._decode(lm, model, cache, ids, sampling, lm.stop_strings, cost):
                decoded.add(*piece)
                yield piece
        finally:
            decoded.cut(cost.generated)

    def _alignments(self, prompts: Sequence[TokenAlignment]) -> list[AnswerAlignment]:
        """How each sharer will read along what is answered to the prompts."""
        return [
            AnswerAlignment(
                prompt,
                self.receiver.tokenizer,
                sharer.tokenizer,
                strategy=link.fuser.config.alignment,
            )
            for sharer, prompt, link in zip(self.sharers, prompts, self.links, strict=True)
        ]

    def _decode(
        self,
        lm: LanguageModel,
        model: Any,
        cache: kv.Cache,
        ids: Sequence[int],
        sampling: SamplingConfig,
        stops: Sequence[str],
        cost: Cost,
    ) -> Iterator[Piece]:
        """`decode` from a cache that holds all of `ids` but the last; notes why it ended."""
        thinking, room = begins_thinking(lm.tokenizer, ids), lm.context_length - len(ids)
        cost.reason = yield from decode(
            model, lm.tokenizer, cache, ids[-1:], sampling, stops, thinking, room
        )

    @property
    def _other(self) -> LanguageModel:
        if self.sharer is None:
            raise C2CError("this mode needs a sharer: name one with --sharer")
        if self.sharer.is_elsewhere:
            raise C2CError(
                f"sharer {self.sharer.name} is read from afar, and writes nothing here: take "
                "--mode c2c or receiver"
            )
        return self.sharer

    def _opening(self) -> Messages:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _report(self, mode: Mode) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            self.on_prefill(Prefilling(mode, done, total))
            if self._stopping:
                raise _Stopped

        return report
