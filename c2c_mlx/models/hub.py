"""Folders from and to the Hugging Face hub; whatever goes wrong there is one line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from c2c_mlx.errors import C2CError
from c2c_mlx.models.paths import size
from c2c_mlx.progress import Progress, Report, silent

# Never *.py: code from a model's folder is not run, so it is not fetched either.
MODEL_FILES = (
    *("*.json", "model*.safetensors", "*.jinja"),
    *("tokenizer.model", "*.tiktoken", "*.txt"),
)
FUSER_FILES = ("config.json", "fuser.safetensors", "README.md")

# The layout of github.com/thu-nics/C2C. Beside these there may be optimiser states.
CHECKPOINT_FILES = ("config.json", "final/projector_*")

_HUB_ID = re.compile(  # what the hub's own validator takes, which is slow to import
    r"(?!.*(--|\.\.|\.git$))[A-Za-z0-9]([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII
)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `org/name`."""
    return _HUB_ID.fullmatch(name) is not None


def fetch(
    hub_id: str,
    files: Sequence[str],
    *,
    cache: Path | None = None,
    is_whole: Callable[[Path], bool] = lambda folder: True,
    report: Report = silent,
) -> Path:
    """The folder of a hub repository, from the cache without any request if it is there.

    Args:
        hub_id: `org/name`.
        files: patterns of what is wanted; the same ones on every call.
        cache: where copies are kept; None: the hub's own cache, which other programs share.
        is_whole: a look at a cached folder; False has the missing files fetched.
        report: called with bytes done, as far as the hub tells.

    Raises:
        C2CError: if it cannot be had: no network, gated, not found, or broken off halfway.
    """
    from huggingface_hub import snapshot_download

    if folder := find(hub_id, files, cache=cache, is_whole=is_whole):
        return folder
    with _in_one_line(hub_id, "download"):
        bar = _bar_class(f"downloading {hub_id}", report)
        return Path(
            snapshot_download(
                repo_id=hub_id, allow_patterns=list(files), cache_dir=cache, tqdm_class=bar
            )
        )


def find(
    hub_id: str,
    files: Sequence[str],
    *,
    cache: Path | None = None,
    is_whole: Callable[[Path], bool] = lambda folder: True,
) -> Path | None:
    """The folder of a hub repository if it is in the cache, without any request; see `fetch`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warnings are about what `fetch` says in one line
    try:
        found = snapshot_download(
            repo_id=hub_id, allow_patterns=list(files), cache_dir=cache, local_files_only=True
        )
    except LocalEntryNotFoundError:  # not there, or known to be incomplete
        return None
    folder = Path(found)
    return folder if is_whole(folder) else None


def cached_size(hub_id: str) -> int:
    """Bytes that a model takes in the hub's own cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return size(Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id, repo_type="model"))


def push(folder: Path, files: Sequence[str], hub_id: str, *, private: bool) -> str:
    """Uploads some files of a folder as one commit; makes the repository if there is none.

    Args:
        folder: where they are.
        files: their names.
        hub_id: `org/name`.
        private: of a repository that has to be made.

    Returns:
        The commit's address.

    Raises:
        C2CError: if the hub cannot be reached or does not let this user write there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    with _in_one_line(hub_id, "upload"):
        api = HfApi()
        api.create_repo(hub_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=hub_id,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message="Upload a Cache-to-Cache fuser",
        )
        return str(commit.commit_url)


def is_offline() -> bool:
    """Whether the user wants no request to be made (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def check_data_set(hub_id: str) -> None:
    """Asks the hub whether this user may read a data set.

    Args:
        hub_id: `org/name`.

    Raises:
        C2CError: if not, or the hub can't be asked.
    """
    from huggingface_hub import HfApi

    with _in_one_line(hub_id, "download", kind="datasets/"):
        HfApi().auth_check(hub_id, repo_type="dataset")


@contextmanager
def _in_one_line(hub_id: str, what: str, kind: str = "") -> Iterator[None]:
    """Says what to do about each way in which the hub fails.

    Args:
        hub_id: `org/name`.
        what: the noun for the job.
        kind: what stands before the id in the address of its page.
    """
    from httpx2 import ConnectError, HTTPError, TimeoutException
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        XetDownloadError,
    )

    try:
        yield
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
    except (ConnectError, TimeoutException) as e:
        raise C2CError(
            f"the {what} of {hub_id}: the hub cannot be reached ({_first_line(e)}); go online and "
            "run this again: finished parts are kept"
        ) from e
    except OfflineModeIsEnabled as e:
        raise C2CError(f"the {what} of {hub_id} needs the hub: unset HF_HUB_OFFLINE") from e
    except GatedRepoError as e:
        raise C2CError(
            f"{hub_id} is gated: accept its terms at https://huggingface.co/{kind}{hub_id}, "
            "then log in with `hf auth login`"
        ) from e
    except LocalTokenNotFoundError as e:
        raise C2CError(f"the {what} of {hub_id} needs an account: log in, `hf auth login`") from e
    except RepositoryNotFoundError as e:
        raise C2CError(
            f"the hub has no {hub_id}: check the spelling, or `hf auth login` if it is private"
        ) from e
    except (HTTPError, XetDownloadError) as e:
        if isinstance(e, HfHubHTTPError) and e.response.status_code in (401, 403):
            raise C2CError(
                f"the hub refuses the {what} of {hub_id} ({_first_line(e)}): log in with "
                "`hf auth login` as somebody who may"
            ) from e
        raise C2CError(
            f"the {what} of {hub_id} broke off ({_first_line(e)}); run this again: finished "
            "parts are kept"
        ) from e
    except (ImportError, ValueError) as e:
        if "proxy" not in str(e):
            raise
        names = [f"{way}_proxy" for way in ("all", "https", "http")]
        named = " ".join(name for name in os.environ if name.lower() in names)
        cure = "`pip install socksio`" if isinstance(e, ImportError) else "write socks5:// in it"
        raise C2CError(
            f"the {what} of {hub_id}: no way through the proxy of {named}: {cure}, or unset it"
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
