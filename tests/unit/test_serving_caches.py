"""Caches that wait: found by their beginning, copied where conversations part, dropped in time."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from c2c_mlx import C2C, LanguageModel
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.serving.caches import Caches
from c2c_mlx.text.alignment import TokenAlignment

IDS = list(range(20, 50))


def reader(lm: LanguageModel, ids: list[int]) -> Reader:
    made = Reader(lm.model)
    made.extend(ids)
    return made


def same(a: kv.Cache, b: kv.Cache) -> bool:
    layers = kv.attention_layers(a)
    n = kv.length(a)
    pairs = zip(kv.read(a, layers, 0, n), kv.read(b, layers, 0, n), strict=True)
    return n == kv.length(b) and all(mx.allclose(x, y, atol=1e-5).item() for x, y in pairs)


def test_a_conversation_gets_its_own_caches_back(receiver: LanguageModel) -> None:
    caches, first = Caches(), reader(receiver, IDS)
    caches.put("k", first, prompt=20)
    assert caches.take("other", IDS) is None
    assert caches.take("k", [1, 2]) is None
    assert caches.take("k", [*IDS[:25], 1]) is first  # only an answer's tail is lost
    assert caches.take("k", IDS) is None  # it is somebody's now


def test_another_conversation_gets_a_copy_of_what_is_common(receiver: LanguageModel) -> None:
    caches, first = Caches(), reader(receiver, IDS)
    caches.put("k", first, prompt=20)
    other = caches.take("k", [*IDS[:12], 1, 2])
    assert isinstance(other, Reader) and other.ids == IDS[:12]
    assert other.nbytes < first.nbytes
    other.extend([*IDS[:12], 1, 2])
    assert same(other.cache, reader(receiver, [*IDS[:12], 1, 2]).cache)
    assert same(first.cache, reader(receiver, IDS).cache)
    assert caches.take("k", IDS) is first


def test_what_is_a_beginning_of_another_is_not_kept(receiver: LanguageModel) -> None:
    caches = Caches()
    caches.put("k", reader(receiver, IDS[:10]), prompt=10)
    caches.put("other", reader(receiver, IDS[:10]), prompt=10)
    before = caches.nbytes
    caches.put("k", longer := reader(receiver, IDS), prompt=20)
    assert caches.nbytes == before / 2 + longer.nbytes


def test_the_longest_unused_go_first(receiver: LanguageModel) -> None:
    caches = Caches()
    chats = [[start, *IDS] for start in (1, 2, 3)]
    for ids in chats:
        caches.put("k", reader(receiver, ids), prompt=20)
    caches.take("k", [*chats[0][:5], 9])  # a copy; the first one is used again
    caches.shrink(caches.nbytes * 2 // 3)
    assert caches.take("k", chats[1]) is None
    assert caches.take("k", chats[0]) is not None and caches.take("k", chats[2]) is not None
    caches.shrink(0)
    assert caches.nbytes == 0


def test_bytes_are_counted_once(receiver: LanguageModel) -> None:
    counted = []

    class Counted(Reader):
        @property
        def nbytes(self) -> int:
            counted.append(self)
            return super().nbytes

    caches, made = Caches(), Counted(receiver.model)
    made.extend(IDS)
    caches.put("k", made, prompt=20)
    for _ in range(3):
        caches.shrink(caches.nbytes)
    assert counted == [made] and caches.nbytes == made.nbytes


@pytest.mark.parametrize("n", [1, 11, 28])
def test_a_fork_of_a_fused_cache_is_what_reading_anew_would_give(
    receiver: LanguageModel, sharer: LanguageModel, make_fuser, n: int
) -> None:
    fuser = make_fuser(receiver.model, sharer.model)
    c2c = C2C(receiver.model, sharer.model, fuser)
    index, messages = np.arange(30, dtype=np.int32), np.zeros(30, np.int32)
    first = FusedCache(c2c)
    first.extend([TokenAlignment(IDS, IDS, index, messages)])
    other = first.fork(n)
    assert other is not None and other.nbytes < first.nbytes
    ids = [*IDS[:n], *range(100, 130)][:30]
    other.extend([TokenAlignment(ids, ids, index, messages)])
    assert other.last is not None and other.last.start == n
    anew = FusedCache(c2c)
    anew.extend([TokenAlignment(ids, ids, index, messages)])
    assert same(other.cache, anew.cache)
    again = FusedCache(c2c)
    again.extend([TokenAlignment(IDS, IDS, index, messages)])
    assert same(first.cache, again.cache)


def test_bytes_of_a_position_are_those_of_a_cache(receiver: LanguageModel) -> None:
    made = reader(receiver, list(range(256)))
    assert made.nbytes == 256 * kv.position_nbytes(receiver.model)
