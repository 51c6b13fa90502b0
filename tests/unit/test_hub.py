"""Commands against a hub: a real server, real downloads, real uploads."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import pytest
from hub_server import Hub
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import close_session, validate_repo_id
from torch_files import write_checkpoint

from c2c_mlx import Fuser
from c2c_mlx.commands import chat, weights
from c2c_mlx.doctor import machine
from c2c_mlx.errors import C2CError
from c2c_mlx.fusers import disk, store
from c2c_mlx.models.hub import check_data_set, fetch, is_hub_id
from c2c_mlx.models.load import find_folder

Call = Callable[..., tuple[int, str, str]]

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "e2e" / "qwen3_llama"
PUBLISHED = "nics-efc/C2C_Fuser"
FOLDER = "qwen3_0.6b+llam3.2_1b_Fuser"  # of the registry's qwen+llama
SHIPPED = "smollm2-135m+gemma3-270m"
COMMANDS = {"chat": chat.main, "weights": weights.main}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def call(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Call:
    """Runs a command whose hub is `hub` and whose caches are in `home`: code, stdout, stderr."""
    # What the environment sets at start; `test_chat_...` sets it there.
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub" / "hub"))
    monkeypatch.setenv("C2C_MLX_HOME", str(home / "c2c"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")

    def call(command: str, *arguments: str, offline: bool = False) -> tuple[int, str, str]:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        code = COMMANDS[command](arguments)
        return code, *capfd.readouterr()

    return call


def refused(done: tuple[int, str, str], words: str) -> None:
    code, out, err = done
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert words in err


def in_cache(home: Path) -> set[str]:
    """What stands in our cache, lock files aside."""
    paths = (home / "c2c").rglob("*")
    return {str(p.relative_to(home / "c2c")) for p in paths if p.is_file() and p.suffix != ".lock"}


WHOLE = {f"fusers/qwen+llama/{name}" for name in ("README.md", "config.json", "fuser.safetensors")}


def test_chat_finds_fetches_converts_and_keeps_the_published_fuser(
    hub: Hub, home: Path, call: Call
) -> None:
    hub.add("mlx-community/Qwen3-0.6B-4bit", GOLDEN / "receiver")
    hub.add("mlx-community/Llama-3.2-1B-Instruct-4bit", GOLDEN / "sharer")
    hub.add(PUBLISHED, GOLDEN / "fuser", under=FOLDER)
    hub.repositories[PUBLISHED][f"{FOLDER}/final/optimizer.pt"] = b"not ours"
    hub.repositories[PUBLISHED]["another_Fuser/final/projector_0.pt"] = b"not ours"
    arguments = ("--sharer", "llama", "--receiver", "qwen", "--json", "--prompt", "hello")
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home / "hub")}
    program = "import sys; from c2c_mlx.commands.chat import main; sys.exit(main())"
    first = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--max-tokens", "3"],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["gates_open"] > 0
    assert f"fetched {PUBLISHED}/{FOLDER}" in first.stderr
    assert "converted it, kept it in" in first.stderr
    assert not {path for path in hub.fetched() if "optimizer" in path or "another" in path}
    assert in_cache(home) == WHOLE

    hub.requests.clear()
    code, out, err = call("chat", *arguments, "--max-tokens", "3", offline=True)
    assert (code, err) == (0, "")
    assert hub.requests == []
    assert json.loads(out)["text"] == json.loads(first.stdout)["text"]


def test_pull_list_show_and_remove(hub: Hub, home: Path, call: Call) -> None:
    hub.add(PUBLISHED, write_checkpoint(home / "source"), under=FOLDER)
    folder = home / "c2c/fusers/qwen+llama"
    assert call("weights", "pull", "qwen+llama")[:2] == (0, f"{folder}\n")
    assert Fuser.load(folder).provenance.source == f"converted from {PUBLISHED}/{FOLDER}"
    assert "was there" in call("weights", "pull", "qwen+llama", offline=True)[2]
    _, listed, _ = call("weights", "list")
    (line,) = [line for line in listed.splitlines() if line.startswith("* qwen+llama ")]
    assert "kB" in line
    code, removed, _ = call("weights", "remove", "qwen+llama")
    assert code == 0 and removed.startswith("qwen+llama: deleted, ")
    assert in_cache(home) == set()
    refused(call("weights", "remove", "qwen+llama"), "not in the cache")


@pytest.mark.parametrize("name", ["", ".", "..", "qwen", "no+such"])
def test_what_is_no_fuser_removes_none(hub: Hub, home: Path, call: Call, name: str) -> None:
    hub.add(PUBLISHED, write_checkpoint(home / "source"), under=FOLDER)
    assert call("weights", "pull", "qwen+llama")[0] == 0
    assert call("weights", "remove", name)[0] == 2
    assert in_cache(home) == WHOLE


def test_push_and_pull_again(hub: Hub, home: Path, call: Call) -> None:
    code, out, _ = call("weights", "push", SHIPPED, "me/mine", "--dry-run")
    assert code == 0 and "library_name: mlx" in out
    assert hub.requests == []

    code, out, err = call("weights", "push", SHIPPED, "me/mine")
    assert code == 0, err
    assert out.splitlines()[-1].startswith(f"{hub.address}/me/mine/commit/")
    assert set(hub.repositories["me/mine"]) == {"README.md", "config.json", "fuser.safetensors"}
    card = hub.repositories["me/mine"]["README.md"].decode()
    assert "base_model:\n- HuggingFaceTB/SmolLM2-135M-Instruct\n- google/gemma-3-270m\n" in card

    assert call("weights", "pull", "me/mine")[0] == 0
    pulled = home / "c2c/fusers/me--mine/fuser.safetensors"
    assert pulled.read_bytes() == hub.repositories["me/mine"]["fuser.safetensors"]
    assert "all finite" in call("weights", "verify", "me/mine", offline=True)[1]


def test_what_is_pushed_does_not_tell_where_things_lie(
    hub: Hub, tmp_path: Path, call: Call
) -> None:
    disk.copy(store.find_folder(SHIPPED), tmp_path)
    config, provenance = disk.read_description(tmp_path)
    config = replace(config, receiver=replace(config.receiver, name="/home/alice/models/mine/"))
    command = (
        "c2c-train --receiver /home/alice/models/mine/ --sharer http://alice.lan:8009 "
        "--data '~/my chats/alice/short' --out=../alice/run --fuser org/start --lr 1e-3"
    )
    data = ("~/my chats/alice/short", "org/chats@main", "package:reading/trivia", "a/alice/long")
    provenance = replace(provenance, source=command, data=data)
    disk.write_description(tmp_path, config, provenance)
    assert call("weights", "push", str(tmp_path), "me/mine")[0] == 0
    for name in ("README.md", "config.json"):
        text = hub.repositories["me/mine"][name].decode()
        assert "alice" not in text and "receiver mine --sharer ADDRESS --data short" in text
        assert "--out=run --fuser org/start --lr 1e-3" in text
        for kept in ("org/chats@main", "package:reading/trivia", "long"):
            assert kept in text
    assert disk.read_description(tmp_path)[1].source == command  # here it stays


def test_a_model_without_its_tokenizer_is_fetched_anew(hub: Hub, home: Path, call: Call) -> None:
    hub.add("me/model", GOLDEN / "receiver")
    fetch("me/model", ("config.json", "model*.safetensors"))  # as another program may have done
    assert (find_folder("me/model") / "tokenizer.json").exists()
    hub.requests.clear()
    find_folder("me/model")
    assert hub.requests == []


def test_the_doctor_fetches_nothing(hub: Hub, home: Path, call: Call) -> None:
    hub.add(PUBLISHED, write_checkpoint(home / "source"), under=FOLDER)
    assert call("weights", "pull", "qwen+llama")[0] == 0
    pair = ("receiver", "Qwen3-0.6B-4bit"), ("sharer", "Llama-3.2-1B-Instruct-4bit")
    for model, name in pair:
        hub.add(f"mlx-community/{name}", GOLDEN / model)
        fetch(f"mlx-community/{name}", ("config.json",))  # no more than a look at it
    hub.requests.clear()
    assert machine.models() == []
    assert [fuser["fits"] for fuser in machine.fusers()] == ["", ""]
    assert hub.requests == []
    for alias in ("qwen", "llama"):
        find_folder(alias)
    hub.requests.clear()
    assert [model["name"] for model in machine.models()] == ["qwen", "llama"]
    assert {fuser["name"]: bool(fuser["fits"]) for fuser in machine.fusers()} == {
        SHIPPED: False,
        "qwen+llama": True,
    }
    assert hub.requests == []
    torn = find_folder("qwen") / "model.safetensors.index.json"
    torn.write_text('{"weight_map": {')
    assert "damaged" in machine.models()[0]["fits"]


def test_what_is_not_there(hub: Hub, home: Path, call: Call) -> None:
    pull = ("weights", "pull", "qwen+llama")
    refused(call(*pull), f"the hub has no {PUBLISHED}: check the")
    hub.repositories[PUBLISHED] = {"README.md": b"moved"}
    refused(call(*pull), f"no fuser in {PUBLISHED}/{FOLDER}")
    hub.repositories[PUBLISHED] = {f"{FOLDER}/config.json": b"{}"}
    hub.gated.add(PUBLISHED)
    refused(call(*pull), "gated: accept its terms at")
    refused(call(*pull, offline=True), "cannot be reached")
    assert not list((home / "c2c/fusers").glob("[!.]*"))


def test_a_download_that_breaks_off_goes_on(hub: Hub, home: Path, call: Call) -> None:
    hub.add(PUBLISHED, write_checkpoint(home / "source"), under=FOLDER)
    hub.cut = f"{FOLDER}/final/projector_1.pt"
    refused(call("weights", "pull", "qwen+llama"), "run this again")
    hub.cut = None
    hub.requests.clear()
    assert call("weights", "pull", "qwen+llama")[0] == 0
    assert f"{FOLDER}/final/projector_0.pt" not in hub.fetched()
    assert in_cache(home) == WHOLE


def test_a_disk_too_full_to_convert_keeps_the_download(
    hub: Hub, home: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    hub.add(PUBLISHED, write_checkpoint(home / "source"), under=FOLDER)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(call("weights", "pull", "qwen+llama"), "No space left on device")
    hub.requests.clear()
    assert call("weights", "pull", "qwen+llama")[0] == 0
    assert not [path for path in hub.fetched() if path.endswith(".pt")]
    assert in_cache(home) == WHOLE


def test_a_damaged_download_is_dropped(hub: Hub, home: Path, call: Call) -> None:
    hub.add(PUBLISHED, write_checkpoint(home / "source"), under=FOLDER)
    path = f"{FOLDER}/final/projector_1.pt"
    hub.repositories[PUBLISHED][path] = hub.repositories[PUBLISHED][path][:500]
    refused(call("weights", "pull", "qwen+llama"), "projector_1.pt")
    assert in_cache(home) == set()


def test_pushing_without_leave(hub: Hub, call: Call) -> None:
    hub.readers_only = True
    push = ("weights", "push", SHIPPED, "me/mine")
    refused(call(*push), "hf auth login")
    refused(call(*push, offline=True), "needs the hub: unset HF_HUB_OFFLINE")


@pytest.mark.parametrize(
    "ask", [lambda: fetch("a/b", ("config.json",)), lambda: check_data_set("a/b")]
)
@pytest.mark.parametrize(
    "proxy", ["socks5://127.0.0.1:9", "socks5h://127.0.0.1:9", "socks://127.0.0.1:9"]
)
def test_a_socks_proxy_is_gone_through_or_named(
    ask: Callable[[], object], proxy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    close_session()  # a new one reads the environment
    try:
        with pytest.raises(C2CError, match="ALL_PROXY|cannot be reached"):
            ask()
    finally:
        close_session()


@pytest.mark.parametrize(
    "name",
    [
        *("me/fuser", "a-b/c_d.e", "o/n", "a1/_b", "m/x.gitt", "runs/long--2", "org/model-"),
        *("a/b..c", "me/foo.git", "o-/n", ".o/n", "o/.n", "o/n.", "a--b/c", "o/" + "n" * 97),
    ],
)
def test_a_hub_id_is_what_the_hub_takes(name: str) -> None:
    try:
        validate_repo_id(name)
        is_taken = True
    except HFValidationError:
        is_taken = False
    assert is_hub_id(name) == is_taken
