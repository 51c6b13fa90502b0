"""A sharer on another machine: what it is, its tokenizer, and its cache as it is read there.

The other side is a `c2c-serve --share`. It is asked by HTTP and answers with safetensors: for every
slice that it has read, keys and values of the layers that the fuser reads, in its own precision.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from c2c_mlx import device
from c2c_mlx.atomic import appearing
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.reader import Progress, Reader, common_prefix
from c2c_mlx.models.paths import cache_home, installing
from c2c_mlx.progress import Report, silent

API_KEY = "C2C_API_KEY"
PATIENCE_S = 30.0  # without a byte
TURN_S = 600.0  # before the first one of a cache: others may be there first
FILES = (  # what decides which tokens a model reads, and what its layers are
    *("config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "chat_template.json", "special_tokens_map.json"),
)
MOST_BYTES = 1 << 29  # of a file, or of a slice's keys and values
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

_Pair = tuple[np.ndarray, np.ndarray]  # keys and values of a slice, [L, H, n, D]


class RemoteError(C2CError):
    """Something is wrong with the other machine, or on the way there."""


def is_url(name: str) -> bool:
    """Whether a model argument is a place on another machine."""
    return name.startswith(("http://", "https://"))


def name_of(model: str) -> str:
    """What a model argument means: itself, or what the machine at the address shares.

    Raises:
        RemoteError: if that machine shares no model.
    """
    return Remote(model).name if is_url(model) else model


class Remote:
    """A `c2c-serve --share`.

    Args:
        url: its address, without a path.

    Raises:
        RemoteError: if it can't be reached, or shares no model.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            about = json.loads(self.get("/v1/caches"))
            self.name, self.files = str(about["name"]), dict(about["files"])
            self.dtype, self.weights = DTYPES[about["dtype"]], str(about["weights"])
            digests = all(len(bytes.fromhex(digest)) == 32 for digest in self.files.values())
        except (KeyError, TypeError, ValueError):
            raise self.error("it shares no model") from None
        if not digests or "config.json" not in self.files or not {*self.files} <= {*FILES}:
            raise self.error("it shares no model")

    def error(self, reason: str) -> RemoteError:
        """What to say when something is wrong with it."""
        return RemoteError(f"sharer {self.url}: {reason}; see to it, or take --mode receiver")

    def open(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        """Asks; the answer is still to be read.

        Raises:
            RemoteError: if it does not answer, or says no.
        """
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            connection = kind(parts.hostname or "", parts.port, timeout=PATIENCE_S)
            try:
                connection.request(method, path, data, headers)
                sock = connection.sock  # which the response may take along
                sock.settimeout(TURN_S if data else PATIENCE_S)
                response = connection.getresponse()
                sock.settimeout(PATIENCE_S)
                if connection.sock:  # whoever answers may keep it open; the response has its own
                    connection.sock.close()
            except Exception:
                connection.close()
                raise
            if response.status == 200:
                return response
            with response:
                told = response.read(1 << 16)
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise self.error(_reason(e)) from None
        try:
            reason = str(json.loads(told)["error"]["message"])
        except (KeyError, TypeError, ValueError):
            reason = f"it answers {response.status}"
        raise self.error(reason[:200])

    def get(self, path: str) -> bytes:
        """A whole answer.

        Raises:
            RemoteError: if there is none.
        """
        with self.open("GET", path) as response:
            try:
                data = response.read(MOST_BYTES + 1)
            except (OSError, http.client.HTTPException) as e:
                raise self.error(_reason(e)) from None
        if len(data) > MOST_BYTES:
            raise self.error("it sends too much")
        return data

    def folder(self, report: Report = silent) -> Path:
        """Its configuration and tokenizer, which come along once.

        Args:
            report: told when another process fetches them.

        Raises:
            RemoteError: if they can't be had, or are not what it said they would be.
            C2CError: if the cache folder can't be written.
        """
        wanted = hashlib.sha256(json.dumps(sorted(self.files.items())).encode()).hexdigest()
        folder = cache_home() / "remote" / wanted
        if not folder.is_dir():
            with installing(folder, report) as is_missing:
                if is_missing:
                    self._fetch(folder)
        return folder

    def _fetch(self, folder: Path) -> None:
        with appearing(folder) as unfinished:
            for name, digest in self.files.items():
                data = self.get(f"/v1/caches/{name}")
                if hashlib.sha256(data).hexdigest() != digest:
                    raise self.error(f"its {name} is not what it said it would be")
                (unfinished / name).write_bytes(data)


def is_of_one(folder: Path) -> bool:
    """Whether a folder is what `Remote.folder` keeps of a model."""
    return folder.parent == cache_home() / "remote"


def classes(folder: Path) -> tuple[Any, Any]:
    """mlx-lm's class of a model, and its arguments.

    Raises:
        C2CError: if mlx-lm knows no such model.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # No public name leads to these classes: `load_model(strict=False)` does without weights,
        # but sanitises them, which some models (Gemma 3's, with pictures) can't do to none.
        kind, arguments = mlx_lm.utils._get_classes(config)
        return kind, arguments.from_dict(config)
    except Exception as e:  # whatever a wrong field leads to inside mlx-lm
        raise C2CError(f"{folder}: mlx-lm knows no such model ({_reason(e)})") from None


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
            self.came.put(self.remote.error(_reason(e)))
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


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it says nothing for too long"
    if isinstance(error, http.client.IncompleteRead):
        return "it ended too early"
    if isinstance(error, SafetensorError | KeyError | IndexError):
        return "it sends what is no safetensors of keys and values"
    text = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
    return text or type(error).__name__
