"""A sharer on another machine as a model here: its shapes, and its cache as it is read there."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors.numpy import load

from c2c_mlx import device
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.reader import Progress, Reader, common_prefix
from c2c_mlx.models.remote import MOST_BYTES, Remote, RemoteError, classes, why

_Pair = tuple[np.ndarray, np.ndarray]  # keys and values of a slice, [L, H, n, D]


def skeleton(remote: Remote, folder: Path) -> nn.Module:
    """The model as far as it is here: shapes and rotary embeddings, and a way to its cache.

    Raises:
        C2CError: if mlx-lm knows no such model; and when anybody has it compute.
    """
    kind, arguments = classes(folder)

    class Elsewhere(kind):  # type: ignore[misc, valid-type]
        """Its weights are never evaluated: a pass over one position tells shapes alone."""

        fingerprint = remote.weights

        def __call__(self, inputs: mx.array, *args: Any, **options: Any) -> mx.array:
            if inputs.size > 1:
                raise remote.error("it is read from afar, and writes nothing here")
            logits: mx.array = super().__call__(inputs, *args, **options)
            return logits

        def make_reader(self, layers: Sequence[int]) -> Reader:
            return RemoteReader(self, remote, layers)

    model: nn.Module = Elsewhere(arguments)
    return model


class RemoteReader(Reader):
    """What a sharer elsewhere has read: `extend` asks for it, and whoever wants it waits.

    Meanwhile the receiver can read the same turn here.

    Args:
        model: from `skeleton`.
        remote: who reads.
        layers: those of which keys and values are wanted; the others stay empty.
    """

    def __init__(self, model: nn.Module, remote: Remote, layers: Sequence[int]) -> None:
        self._remote, self._layers = remote, list(layers)
        self._fetch: _Fetch | None = None
        self._say: Callable[[], None] | None = None  # how far it is
        super().__init__(model)

    @property
    def cache(self) -> kv.Cache:
        """The cache, when all of it is there.

        Raises:
            RemoteError: if the other side does not bring it.
        """
        self._arrive()
        return self._held

    @cache.setter
    def cache(self, cache: kv.Cache) -> None:
        self._held = cache

    @property
    def ids(self) -> list[int]:
        """The ids that stand in it; as `cache`."""
        self._arrive()
        return self._read

    @ids.setter
    def ids(self, ids: list[int]) -> None:
        self._read = ids

    @contextmanager
    def extending(
        self,
        ids: Sequence[int],
        progress: Progress | None = None,
        model: Callable[..., mx.array] | None = None,
    ) -> Iterator[list[Any]]:
        """Asks for what is new in `ids`, and does not wait for it: nothing is to be evaluated.

        Whoever waits calls `progress` again, as long as nothing comes.
        """
        keep = common_prefix(self.ids, ids)
        self._read = list(ids[:keep])
        kv.trim(self._held, keep)
        if keep < len(ids):
            self._fetch = _Fetch(self._remote, self._shape(), list(ids), keep, self._layers)
            self._fetch.start()
        self._say = partial(progress, len(ids) - keep, len(ids) - keep) if progress else None
        if self._say:
            self._say()
        yield []

    def wait(self, seconds: float) -> bool:
        """Whether nothing more is to come, after so many seconds at most."""
        return self._fetch is None or self._fetch.over.wait(seconds)

    def fork(self, n: int) -> Reader | None:
        """As `Reader.fork`."""
        other = RemoteReader(self.model, self._remote, self._layers)
        other._read, other._held = self.ids[:n], kv.first(self.cache, n)
        return other

    def _shape(self) -> tuple[int, int]:
        shape = kv.model_shape(self.model, self._remote.name)
        return shape.kv_heads, shape.head_dim

    def _arrive(self) -> None:
        """Takes what has been asked for; what came before an error stays."""
        while self._fetch:
            if self._say:
                self._say()  # whoever wants no answer any more raises; the rest is to come then
            try:
                came = self._fetch.came.get(timeout=0.2)
            except Empty:
                continue
            if isinstance(came, tuple):
                self._append(self._fetch.ids, *(_array(x, self._remote.dtype) for x in came))
                continue
            self._fetch = None
            if came:
                raise came
        mx.eval(kv.arrays(self._held))

    def _append(self, ids: list[int], keys: mx.array, values: mx.array) -> None:
        """What has been read of these ids goes on by one slice, [layers, heads, positions, dim]."""
        for layer, k, v in zip(self._layers, keys, values, strict=True):
            kv.append(self._held, layer, k[None], v[None])
        at = len(self._read)
        self._read += ids[at : at + keys.shape[2]]


class _Fetch(threading.Thread):
    """Brings the slices of one turn; no MLX here, for arrays belong to who made them.

    Attributes:
        over: set when nothing more is to come.
        came: keys and values as they come, then None, or what went wrong instead.
    """

    def __init__(
        self, remote: Remote, shape: tuple[int, int], ids: list[int], since: int, layers: list[int]
    ) -> None:
        super().__init__(name="remote sharer", daemon=True)
        self.remote, self.shape, self.layers = remote, shape, layers
        self.ids, self.since = ids, since
        self.over = threading.Event()
        self.came: SimpleQueue[_Pair | RemoteError | None] = SimpleQueue()

    def run(self) -> None:
        """Called by `start`."""
        try:
            body = {"ids": self.ids, "since": self.since, "layers": self.layers}
            with self.remote.open("POST", "/v1/caches", body | {"files": self.remote.files}) as r:
                self._bring(r)
            self.came.put(None)
        except RemoteError as e:
            self.came.put(e)
        except Exception as e:  # whatever nonsense leads to
            self.came.put(self.remote.error(why(e)))
        finally:
            self.over.set()

    def _bring(self, response: http.client.HTTPResponse) -> None:
        kind = np.float32 if self.remote.dtype == mx.float32 else np.uint16
        at = self.since
        while size := int.from_bytes(_exactly(response, 4)):
            if size > MOST_BYTES:
                raise self.remote.error("it sends too much")
            pair = load(_exactly(response, size))
            keys, values = pair["keys"], pair["values"]
            if not keys.size:
                continue  # it says that it is still at work
            heads, dim = self.shape
            at += keys.shape[2]
            if keys.shape != (len(self.layers), heads, keys.shape[2], dim) or at > len(self.ids):
                raise self.remote.error("it sends keys and values of other shapes")
            if values.shape != keys.shape or {keys.dtype, values.dtype} != {np.dtype(kind)}:
                raise self.remote.error("it sends keys and values of other shapes")
            self.came.put((keys, values))
        if at != len(self.ids):
            raise self.remote.error("it ended too early")


def _array(x: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The other side's numbers in the precision that this device wants for them."""
    array = mx.array(x)
    array = array if dtype == mx.float32 else array.view(dtype)
    return array.astype(device.dtype_of(dtype))


def _exactly(response: http.client.HTTPResponse, size: int) -> bytes:
    data = response.read(size)
    if len(data) < size:
        raise EOFError("it ended too early")
    return data
