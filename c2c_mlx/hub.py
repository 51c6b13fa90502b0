"""Folders from the Hugging Face hub: the cached copy if it is whole, else a download."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from c2c_mlx.errors import C2CError
from c2c_mlx.progress import Progress, Report, silent

# Never *.py: code from a model's folder is not run, so it is not fetched either.
MODEL_FILES = (
    *("*.json", "model*.safetensors", "*.jinja"),
    *("tokenizer.model", "*.tiktoken", "*.txt"),
)
FUSER_FILES = ("config.json", "fuser.safetensors", "README.md")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `org/name`."""
    return _HUB_ID.fullmatch(name) is not None


def fetch(
    hub_id: str,
    files: Sequence[str],
    *,
    is_whole: Callable[[Path], bool] = lambda folder: True,
    report: Report = silent,
) -> Path:
    """The folder of a hub repository, from the cache without any request if it is there.

    Args:
        hub_id: `org/name`.
        files: patterns of what is wanted; the same ones on every call.
        is_whole: a look at a cached folder; False has the missing files fetched.
        report: called with bytes done, as far as the hub tells.

    Raises:
        C2CError: if it cannot be had: no network, gated, not found, or broken off halfway.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted: dict[str, Any] = {"repo_id": hub_id, "allow_patterns": list(files)}
    try:
        folder = Path(snapshot_download(**wanted, local_files_only=True))
        if is_whole(folder):
            return folder
    except LocalEntryNotFoundError:  # not there, or known to be incomplete
        pass
    return _download(hub_id, wanted, report)


def _download(hub_id: str, wanted: dict[str, Any], report: Report) -> Path:
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        XetDownloadError,
    )

    bar = _bar_class(f"downloading {hub_id}", report)
    try:
        return Path(snapshot_download(**wanted, tqdm_class=bar))
    except IncompleteSnapshotError as e:
        raise C2CError(
            f"the cached copy of {hub_id} is incomplete and the hub cannot be reached: go online "
            "(HF_HUB_OFFLINE unset) and run this again; what is there is kept"
        ) from e
    except LocalEntryNotFoundError as e:
        raise C2CError(
            f"could not fetch {hub_id}: the hub cannot be reached and there is no cached copy; go "
            "online, or run `c2c-chat` with no arguments: the embedded pair needs no hub"
        ) from e
    except GatedRepoError as e:
        raise C2CError(
            f"{hub_id} is gated: accept its terms at https://huggingface.co/{hub_id}, "
            "then log in with `hf auth login`"
        ) from e
    except RepositoryNotFoundError as e:
        raise C2CError(
            f"the hub has no {hub_id}: check the spelling, or `hf auth login` if it is private"
        ) from e
    except (HTTPError, XetDownloadError) as e:
        raise C2CError(
            f"the download of {hub_id} broke off ({_first_line(e)}); run this again: finished "
            "parts are kept"
        ) from e
    except OSError as e:
        raise C2CError(
            f"cannot write {hub_id} to the hub's cache ({e.strerror or _first_line(e)}): make room "
            "there, or set HF_HOME to another folder"
        ) from e


def _bar_class(what: str, report: Report) -> type:
    """A progress bar that draws nothing and reports the bytes that arrive."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            # The hub shows received and written bytes as two bars; the second is the truth.
            self.counts = str(kwargs.get("desc", "")).startswith("Reconstructing")
            self.seen = 0
            super().__init__(*args, **kwargs | {"disable": True})
            self.total = kwargs.get("total") or 0

        def update(self, n: float | None = 1) -> None:
            self.seen += int(n or 0)
            if self.counts:
                report(Progress(what, self.seen, int(self.total or 0)))

    return Bar


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
