"""What several files here run: unusual models, the endpoint over the tiny pair, and trainers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import openai
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma2 as gemmas
from mlx_lm.models import lfm2 as hybrids
from serving_jobs import SAMPLING, running, serving
from trainers import Make

from c2c_mlx import C2C, ChatSession, Fuser, LanguageModel, device, load_model
from c2c_mlx.config import FuserConfig, Pair, TrainConfig
from c2c_mlx.serving.engine import Engine, Limits
from c2c_mlx.training.dataset import Dataset, Example, Source
from c2c_mlx.training.files import ChatRow
from c2c_mlx.training.start import new_fuser
from c2c_mlx.training.trainer import Trainer


@pytest.fixture
def lfm2() -> nn.Module:
    """4 layers, 512 ids; 0 and 2 are convolutions, whose state can't be rolled back."""
    args = hybrids.ModelArgs(
        model_type="lfm2",
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        norm_eps=1e-5,
        conv_bias=False,
        conv_L_cache=3,
        block_dim=32,
        block_multiple_of=8,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        block_ff_dim=64,
        full_attn_idxs=[1, 3],
    )
    mx.random.seed(5)
    model = hybrids.Model(args)
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="session")
def gemma2(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """2 layers, 3 KV heads x 8 for 6 heads, 512 ids; it has the tiny Qwen3's tokenizer."""
    args = gemmas.ModelArgs(
        model_type="gemma2",
        hidden_size=48,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        query_pre_attn_scalar=8,
        rms_norm_eps=1e-5,
        vocab_size=512,
    )
    mx.random.seed(4)
    model = gemmas.Model(args)
    model.set_dtype(device.dtype_of(mx.bfloat16))
    folder = tmp_path_factory.mktemp("gemma2")
    shutil.copytree(tiny / "receiver", folder, dirs_exist_ok=True, copy_function=shutil.copy)
    weights = tree_flatten(model.parameters(), destination={})
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(asdict(args) | {"eos_token_id": 2}))
    return load_model(folder)


@pytest.fixture(scope="session")
def dynamic(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """The tiny Qwen3 with a RoPE that turns less far the longer the context is, beyond 512."""
    folder = tmp_path_factory.mktemp("dynamic")
    shutil.copytree(tiny / "receiver", folder, dirs_exist_ok=True, copy_function=shutil.copy)
    config = json.loads((folder / "config.json").read_text())
    scaling = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(config | scaling))
    return load_model(folder)


@pytest.fixture
def unsigned(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it has RoPE compute as on Metal, where a position below zero is one far away."""
    rope = mx.fast.rope

    def far(x: mx.array, *args: Any, offset: Any, **options: Any) -> mx.array:
        position = mx.array(offset).reshape(-1, 1, 1, 1) + mx.arange(x.shape[2])[:, None]
        elsewhere = rope(x, *args, offset=offset + (1 << 20), **options)
        return mx.where(position < 0, elsewhere, rope(x, *args, offset=offset, **options))

    return lambda: monkeypatch.setattr(mx.fast, "rope", far)


@pytest.fixture(scope="module")
def engine(tiny_pair: Pair) -> Iterator[Engine]:
    with running(tiny_pair, Limits(slots=4, queue=64)) as engine:
        yield engine


@pytest.fixture(scope="module")
def port(engine: Engine) -> Iterator[int]:
    with serving(engine) as port:
        yield port


@pytest.fixture
def client(port: int) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


@pytest.fixture(scope="module")
def c2c_chat(receiver: LanguageModel, sharer: LanguageModel, tiny_pair: Pair) -> Callable[..., str]:
    session = ChatSession(receiver, sharer, Fuser.load(tiny_pair.fusers[0]), sampling=SAMPLING)

    def answer(question: str, mode: str = "c2c", system: str | None = None) -> str:
        session.reset()
        session.system = system
        *_, finished = session.ask(question, mode)
        return finished.text

    return answer


# --- training


@pytest.fixture(scope="module")
def dataset(receiver: LanguageModel, sharer: LanguageModel) -> Dataset:
    rows = [
        ChatRow(
            [
                {"role": "user", "content": f"say {i}" + " please" * (i % 4)},
                {"role": "assistant", "content": f"{i}" + " so" * (i % 3)},
            ],
            own=i % 4 == 0,
            where=f"chats, line {i}",
        )
        for i in range(11)
    ]
    source = Source(rows, 1.0)
    return Dataset([source], receiver.tokenizer, sharer.tokenizer, "span", 64)


@pytest.fixture(scope="module")
def examples(dataset: Dataset) -> list[Example]:
    found = map(dataset.example, dataset.sources[0].rows)
    return [e for e in found if e is not None]


@pytest.fixture
def make(
    receiver: LanguageModel, sharer: LanguageModel, dataset: Dataset, examples: list[Example]
) -> Make:
    """A trainer; fields of both configurations may be given."""

    def make(
        folder: Path, say: Callable[[str], None] = lambda line: None, **options: Any
    ) -> Trainer:
        names = FuserConfig.__dataclass_fields__
        fields = {k: options.pop(k) for k in list(options) if k in names}
        config = TrainConfig(
            **({"iters": 6, "batch_size": 3, "warmup": 2, "save_every": 3} | options)
        )
        fields = {"hidden_dim": 16, "intermediate_dim": 12, "dropout": 0.0} | fields
        layers = tuple((i, i + 2) for i in range(4))
        fuser = new_fuser(
            FuserConfig(receiver.shape, sharer.shape, layers, **fields), config.gates, config.seed
        )
        folder.mkdir(parents=True, exist_ok=True)
        c2c = C2C(receiver.model, sharer.model, fuser)
        trainer = Trainer(c2c, dataset, examples[:4], config, folder, say=say)
        fuser.temperature = trainer.temperature  # as `run` does before its first step
        return trainer

    return make
