"""Names, folders and hub ids -> models; every way it goes wrong is one line."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import c2c_mlx.blas  # noqa: F401

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import pytest
from huggingface_hub import errors
from mlx.utils import tree_flatten

from c2c_mlx import device
from c2c_mlx.errors import C2CError
from c2c_mlx.models import hub, load, registry
from c2c_mlx.models.embedded import install
from c2c_mlx.models.load import LanguageModel, load_model
from c2c_mlx.progress import Progress

TINY = Path(__file__).parents[1] / "golden" / "data" / "e2e" / "qwen3_llama" / "sharer"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3?"},
]

Extend = Callable[[str], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama that may be damaged."""
    copy = tmp_path / "tiny"
    shutil.copytree(TINY, copy, copy_function=shutil.copy)
    for path in (copy, *copy.iterdir()):
        path.chmod(0o755)
    return copy


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(name: str | Path, match: str) -> None:
    with pytest.raises(C2CError, match=match) as e:
        load_model(name)
    assert "\n" not in str(e.value)


# --- what a loaded model is


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return load_model(TINY)


def test_a_folder_loads(tiny: LanguageModel) -> None:
    assert (tiny.name, tiny.path) == (str(TINY), TINY)
    assert tiny.context_length == 512
    assert (tiny.shape.layers, tiny.shape.kv_heads, tiny.shape.head_dim) == (6, 3, 8)
    assert tiny.shape.tokenizer == tiny.fingerprint
    assert tiny.has_own_template and tiny.stop_strings == ()
    answer = mlx_lm.generate(tiny.model, tiny.tokenizer, [3, 4, 5], max_tokens=2)
    assert isinstance(answer, str)


def test_loading_is_quiet_and_reports(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[Progress] = []
    load_model(TINY, progress=seen.append)
    assert capfd.readouterr() == ("", "")
    assert [(p.done, p.total) for p in seen] == [(0, 2), (1, 2), (2, 2)]


def test_quantised_weights_are_dense_float32_on_the_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = mlx_lm.utils.load_model(folder)
    expected = {name: w.shape for name, w in tree_flatten(model.parameters())}
    model, config = mlx_lm.utils.quantize_model(
        model, config, 32, 8, quant_predicate=lambda path, module: "down_proj" in path
    )
    model.set_dtype(mx.bfloat16)
    mlx_lm.utils.save_model(folder, model)
    mlx_lm.utils.save_config(config, folder / "config.json")

    monkeypatch.delenv(device.REHEARSE, raising=False)
    previous = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        weights = dict(tree_flatten(load_model(folder).model.parameters()))
    finally:
        mx.set_default_device(previous)
    assert {name: w.shape for name, w in weights.items()} == expected
    assert {w.dtype for w in weights.values()} == {mx.float32}


def test_fingerprint_changes_with_the_vocabulary(folder: Path, tiny: LanguageModel) -> None:
    same = load_model(folder)
    assert same.fingerprint == tiny.fingerprint and len(tiny.fingerprint) == 64
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second, *_ = (t for t in vocab if len(t) == 1)
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load_model(folder).fingerprint != tiny.fingerprint


@pytest.mark.parametrize(
    ("args", "config", "length"),
    [
        ({"max_position_embeddings": 8192}, {"max_position_embeddings": 4096}, 8192),
        ({"n_positions": 1024}, {}, 1024),
        ({}, {"max_position_embeddings": 8192}, 8192),  # gemma: its dataclass leaves it out
        ({}, {"text_config": {"max_position_embeddings": 131072}}, 131072),
        ({"n_layer": 2}, {}, 1 << 20),  # nothing is said of a limit
    ],
)
def test_context_length(args: dict[str, int], config: dict[str, Any], length: int) -> None:
    model = nn.Module()
    model.layers, model.args = [nn.Linear(1, 1)], SimpleNamespace(**args)
    assert load.context_length(model, config) == length


def test_a_dataclass_knows_what_a_config_leaves_out(gemma: nn.Module) -> None:
    assert load.context_length(gemma, {}) == 32768
    outer = nn.Module()  # as mlx-lm nests models that also see
    outer.language_model = gemma
    outer.layers, outer.args = gemma.layers, SimpleNamespace(text_config={})
    assert load.context_length(outer, {}) == 32768


def test_published_fusers_find_their_models_unquantised() -> None:
    published = [entry for entry in registry.fusers() if entry.hub]
    assert published
    for entry in published:
        for alias in (entry.receiver, entry.sharer):
            copy = registry.find_model(registry.unquantised(alias) or "")
            original = registry.find_model(alias)
            assert copy and original and copy.base == original.base
            assert copy.hub and not copy.hub.endswith("bit")
    assert registry.unquantised("smollm2-135m") is None


# --- base models


@pytest.fixture
def base_model(folder: Path) -> LanguageModel:
    (folder / "chat_template.jinja").unlink()
    return load_model(folder)


def test_a_base_model_gets_the_plain_template(base_model: LanguageModel) -> None:
    assert not base_model.has_own_template
    assert base_model.stop_strings == ("\nQuestion:", "\n\n")
    text = base_model.tokenizer.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )
    assert text == "Be brief.\n\nQuestion: 2+2?\nAnswer: 4\nQuestion: 3+3?\nAnswer:"


def test_a_template_may_lie_in_a_file_of_its_own(folder: Path, tiny: LanguageModel) -> None:
    template = folder / "chat_template.jinja"
    apart = {"chat_template": template.read_text(encoding="utf-8")}
    (folder / "chat_template.json").write_text(json.dumps(apart), encoding="utf-8")
    template.unlink()
    model = load_model(folder)
    assert model.has_own_template and not model.stop_strings
    ours, theirs = (
        lm.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True) for lm in (model, tiny)
    )
    assert ours == theirs


def test_the_plain_template_begins_with_bos(base_model: LanguageModel) -> None:
    base_model.tokenizer.bos_token = "<|im_start|>"
    ids = base_model.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    bos = base_model.tokenizer.bos_token_id
    assert ids[0] == bos and ids.count(bos) == 1


def test_an_answer_extends_the_prompt(base_model: LanguageModel) -> None:
    render = base_model.tokenizer.apply_chat_template
    prompt = render(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert render(CHAT[:3], tokenize=False).startswith(prompt + " 4")


# --- names


def test_an_unknown_name_lists_the_known_ones() -> None:
    refused("nonsense", "unknown model 'nonsense': give one of smollm2-135m, gemma3-270m, qwen")
    refused("./no/such/folder", "unknown model './no/such/folder'")


def test_a_file_is_not_looked_for_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "qwen.gguf").touch()
    refused("models/qwen.gguf", "models/qwen.gguf is a file")
    with pytest.raises(C2CError, match="is a file"):
        load.check_name("models/qwen.gguf")


def test_every_alias_leads_somewhere() -> None:
    for alias in registry.aliases():
        entry = registry.find_model(alias)
        assert entry and entry.description and entry.licence
        assert (entry.hub is None) != (entry.embedded is None)
        assert entry.hub is None or hub.is_hub_id(entry.hub)
    assert registry.find_model("nonsense") is None


def test_the_default_pair_is_embedded() -> None:
    for alias in registry.default_pair():
        entry = registry.find_model(alias)
        assert entry and entry.embedded


def test_fusers_are_found_by_their_pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = "+".join(registry.default_pair())
    registry.fusers()  # reads the real registry before it is moved away
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path)
    assert registry.find_fuser(*registry.default_pair()) is None
    (tmp_path / name).mkdir()
    assert registry.find_fuser(*registry.default_pair()) == name
    assert registry.fusers()[0].shipped == tmp_path / name
    assert registry.find_fuser("llama", "qwen") is None


@pytest.mark.parametrize(
    ("receiver", "sharer", "name"),
    [
        ("qwen", "llama", "qwen+llama"),
        ("Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B-Instruct", "qwen+llama"),
        ("mlx-community/Qwen3-0.6B-8bit", "~/models/Qwen3-4B-bf16/", "qwen+qwen3-4b"),
        ("qwen", "Qwen/Qwen3-4B-Base", "qwen+qwen3-4b-base"),
        ("qwen-bf16", "llama-bf16", "qwen+llama"),
        ("qwen3-8b", "mlx-community/Qwen2.5-7B-Instruct-4bit", "qwen3-8b+qwen2.5-7b"),
    ],
)
def test_a_fuser_fits_every_copy_of_its_models(receiver: str, sharer: str, name: str) -> None:
    assert registry.find_fuser(receiver, sharer) == name


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Extend]:
    """Adds tables to the registry."""
    file = tmp_path / "registry.toml"
    text = registry._FILE.read_text(encoding="utf-8")

    def add(tables: str) -> None:
        file.write_text(text + tables, encoding="utf-8")
        registry._document.cache_clear()

    monkeypatch.setattr(registry, "_FILE", file)
    yield add
    registry._document.cache_clear()


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ("[models.mine]\nhub = 'org/mine'\nbase = 'org/mine'\ndescription = ''", "'licence'"),
        ("[models.mine]\nbase = 'org/m'\ndescription = ''\nlicence = ''", "'hub' is missing"),
        ("[fusers.mine]\nreceiver = 'qwen'\nsharer = 'llama'", "[fusers.mine]: key 'folder'"),
        ("[fusers.mine]\nfoldre = 'mine'", "unknown key 'foldre'"),
        ("[models", "not TOML"),
    ],
)
def test_a_mistake_in_the_registry_names_its_table(
    own_registry: Extend, tables: str, words: str
) -> None:
    own_registry(tables)
    with pytest.raises(C2CError) as e:
        registry.find_fuser("qwen", "llama-8bit")
    assert words in str(e.value) and "registry.toml" in str(e.value) and "\n" not in str(e.value)


def test_a_fuser_may_name_any_copy(own_registry: Extend) -> None:
    table = "folder = 'mine'\nhub = 'org/mine'\nreceiver = '{}'\nsharer = '{}'\n"
    one, other = table.format("qwen-bf16", "org/base"), table.format("qwen-bf16", "llama-bf16")
    own_registry(f"[fusers.one]\n{one}[fusers.other]\n{other}")
    assert registry.find_fuser("qwen-bf16", "org/base") == "one"
    assert registry.find_fuser("qwen", "org/base") == "one"
    assert registry.find_fuser("qwen", "org/another") is None
    assert registry.find_fuser("qwen-bf16", "llama-bf16") == "other"
    assert registry.find_fuser("qwen", "llama") == "qwen+llama"


def test_the_published_fusers() -> None:
    entries = [entry for entry in registry.fusers() if entry.hub]
    assert {entry.hub for entry in entries} == {"nics-efc/C2C_Fuser"}
    assert len({entry.folder for entry in entries}) == 7
    for entry in entries:
        assert entry.name == f"{entry.receiver}+{entry.sharer}"
        assert registry.find_model(entry.receiver) and registry.find_model(entry.sharer)


def test_an_alias_is_installed_or_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "install", lambda alias, source, report: Path("installed", alias))
    monkeypatch.setattr(hub, "fetch", lambda hub_id, *a, **k: Path("fetched", hub_id))
    assert load.find_folder("gemma3-270m") == Path("installed/gemma3-270m")
    assert load.find_folder("qwen") == Path("fetched/mlx-community/Qwen3-0.6B-4bit")
    assert load.find_folder("org/name") == Path("fetched/org/name")


# --- damaged folders


def test_a_folder_without_config(tmp_path: Path) -> None:
    refused(tmp_path, "is no model folder: it has no config.json")


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_damaged_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no_such_architecture"},
        {"model_file": "evil.py"},
        {"hidden_size": 64},
        {"num_hidden_layers": 7},
        {"num_hidden_layers": "six"},
    ],
)
def test_a_config_that_does_not_fit(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "evil.py").write_text("raise SystemExit('code from a model folder ran')")
    edit_json(folder / "config.json", **changes)
    refused(folder, "mlx-lm cannot load this model")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "is incomplete: model.*safetensors is missing")


def test_a_missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model-00002-of-00002.safetensors is missing")


def cut_off(data: bytes) -> bytes:
    return data[: len(data) // 2]


def with_hostile_offsets(data: bytes) -> bytes:
    """Offsets beyond the end of the file, which `mx.load` believes."""
    header = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[1000000,1000016]}}'
    return struct.pack("<Q", len(header)) + header + bytes(16)


@pytest.mark.parametrize("damage", [cut_off, with_hostile_offsets, lambda data: b"junk"])
def test_damaged_weights(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(folder, "is no valid safetensors file")


def test_a_damaged_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:1000])
    refused(folder, "cannot read the tokenizer")


def test_a_missing_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    refused(folder, "cannot read the tokenizer")


def test_a_tokenizers_code_never_runs(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('code from a model folder ran')")
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map=auto_map)
    try:
        load_model(folder)
    except C2CError as e:
        assert "\n" not in str(e)


# --- the hub


class Response:
    """As much of an HTTP response as the hub's errors look at."""

    status_code = 403
    headers: dict[str, str] = {}
    request = None

    def json(self) -> dict[str, str]:
        return {}


def hub_error(kind: type[Exception]) -> Exception:
    if issubclass(kind, errors.HfHubHTTPError):
        return kind("line one\nline two", response=Response())  # type: ignore[call-arg]
    if kind is errors.IncompleteSnapshotError:
        return kind("incomplete", snapshot_path="x")  # type: ignore[call-arg]
    return kind("line one\nline two")


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (errors.LocalEntryNotFoundError, "could not fetch org/name.*`c2c-chat` with no arguments"),
        (errors.IncompleteSnapshotError, "cached copy of org/name is incomplete"),
        (errors.GatedRepoError, "gated: accept its terms at .*/org/name"),
        (errors.RepositoryNotFoundError, "the hub has no org/name"),
        (errors.HfHubHTTPError, r"refuses the download of org/name \(line one\)"),
        (errors.XetDownloadError, r"broke off \(line one\)"),
        (OSError, "cannot write org/name .* HF_HOME"),
    ],
)
def test_each_failure_of_the_hub_has_its_line(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], line: str
) -> None:
    def snapshot_download(*, local_files_only: bool = False, **kwargs: Any) -> str:
        raise errors.LocalEntryNotFoundError("") if local_files_only else hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    refused("org/name", line)


def test_really_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    refused("org/name", "could not fetch org/name: the hub cannot be reached")


def test_a_whole_cached_copy_needs_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot_download(**kwargs: Any) -> str:
        calls.append(kwargs)
        return str(TINY)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load.find_folder("org/name") == TINY
    assert [c.get("local_files_only") for c in calls] == [True]
    assert not any(pattern.endswith(".py") for pattern in calls[0]["allow_patterns"])


def test_a_cached_copy_without_weights_is_completed(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (folder / "model.safetensors").unlink()
    seen: list[Progress] = []

    def snapshot_download(*, local_files_only: bool = False, **kwargs: Any) -> str:
        if local_files_only:
            return str(folder)
        received = kwargs["tqdm_class"](desc="Downloading bytes", total=0)
        written = kwargs["tqdm_class"](desc="Reconstructing (incomplete total...)", total=0)
        written.total += 100
        for step in (60, 40):
            received.update(step)
            written.update(step)
        return str(TINY)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load.find_folder("org/name", seen.append) == TINY
    what = "downloading org/name"
    assert seen == [Progress(what, 60, 100), Progress(what, 100, 100)]


# --- the embedded pair


@pytest.mark.pair
@pytest.mark.slow
@pytest.mark.parametrize("alias", ["smollm2-135m", "gemma3-270m"])
def test_the_embedded_pair_knows_the_capital_of_france(alias: str) -> None:
    if not install.is_installed(alias):
        pytest.skip(f"{alias} is not in the cache; `c2c-chat` puts it there")
    lm = load_model(alias)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = lm.tokenizer.apply_chat_template(question, add_generation_prompt=True)
    assert "Paris" in mlx_lm.generate(lm.model, lm.tokenizer, ids, max_tokens=8)
