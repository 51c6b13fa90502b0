"""A sharer on another machine: what it is, its tokenizer, and how it is asked.

The other side is a `c2c-serve --share`. It is asked by HTTP and answers with safetensors: for every
slice that it has read, keys and values of the layers that the fuser reads, in its own precision.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx_lm.utils
from safetensors import SafetensorError

from c2c_mlx.atomic import appearing
from c2c_mlx.errors import C2CError
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
        return RemoteError(f"sharer {self.url}: {reason}; see to it")

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
                connection.connect()
                _watch(connection.sock)
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
            raise self.error(why(e)) from None
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
                raise self.error(why(e)) from None
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
        raise C2CError(f"{folder}: mlx-lm knows no such model ({why(e)})") from None


def _watch(sock: socket.socket) -> None:
    """Has the system ask the other machine whether it is there, for it may be silent for long.

    One that has no power or sleeps is known to be gone within a minute.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = "TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE"
    for name, n in ((idle, 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), n)


def why(error: Exception) -> str:
    """What went wrong on the way, in a few words."""
    if isinstance(error, TimeoutError):
        return "it says nothing for too long"
    if isinstance(error, http.client.IncompleteRead):
        return "it ended too early"
    if isinstance(error, SafetensorError | KeyError | IndexError):
        return "it sends what is no safetensors of keys and values"
    text = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
    return text or type(error).__name__
