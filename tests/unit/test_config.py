"""Configuration from parsed files: nothing unknown, missing or of the wrong type gets through."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from c2c_mlx.config import (
    FuserConfig,
    ModelShape,
    Provenance,
    SamplingConfig,
    TrainConfig,
    from_dict,
)
from c2c_mlx.errors import C2CError

SHAPE = {"name": "m", "layers": 4, "kv_heads": 2, "head_dim": 16}
FUSER = {"receiver": SHAPE, "sharer": SHAPE | {"layers": 6}, "layer_map": [[0, 2], [3, 5]]}


def refused(cls: type, data: Any) -> str:
    with pytest.raises(C2CError) as e:
        from_dict(cls, data, "file.json")
    assert str(e.value).startswith("file.json: ") and "\n" not in str(e.value)
    return str(e.value)


def test_defaults_are_the_papers() -> None:
    config = from_dict(FuserConfig, FUSER, "file.json")
    assert config.receiver == ModelShape("m", 4, 2, 16)
    assert config.layer_map == ((0, 2), (3, 5))
    assert (config.hidden_dim, config.intermediate_dim, config.depth) == (1024, 1024, 3)
    assert (config.kinds, config.rotated_keys, config.positions) == ("both", True, "all")
    assert config.fused_kinds == ("keys", "values")


@pytest.mark.parametrize("betas", [[0.5, True], [0.5, "x"], [None, 0.5]])
def test_every_number_of_a_list_is_one(betas: list[Any]) -> None:
    assert "must be of type float" in refused(TrainConfig, {"betas": betas})
    read = from_dict(TrainConfig, {"betas": [0.5, 1]}, "f").betas
    assert read == (0.5, 1.0) and {*map(type, read)} == {float}


@pytest.mark.parametrize("kinds", ["keys", "values"])
def test_one_kind_alone(kinds: str) -> None:
    assert from_dict(FuserConfig, FUSER | {"kinds": kinds}, "f").fused_kinds == (kinds,)


@pytest.mark.parametrize(
    "config",
    [
        from_dict(FuserConfig, FUSER, "f"),
        TrainConfig(gates="learned", betas=(0.8, 0.9)),
        SamplingConfig(temp=0.5),
        Provenance("c2c-train ...", 3, ("chats",), "Apache-2.0", {"valid_loss": 1.5}),
    ],
    ids=lambda c: type(c).__name__,
)
def test_written_and_read_again(config: Any) -> None:
    data = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_dict(type(config), data, "f") == config


@pytest.mark.parametrize("cls", [FuserConfig, TrainConfig, SamplingConfig, Provenance])
@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_only_an_object_will_do(cls: type, data: Any) -> None:
    assert "expected an object with fields, not" in refused(cls, data)


def test_unknown_and_missing_keys_are_named() -> None:
    message = refused(FuserConfig, FUSER | {"hiden_dim": 3})
    assert "unknown key 'hiden_dim'" in message and "hidden_dim" in message
    assert "'layer_map' is missing" in refused(FuserConfig, {"receiver": SHAPE, "sharer": SHAPE})
    nested = FUSER | {"sharer": SHAPE | {"heads": 2}}
    assert "'sharer': unknown key 'heads'" in refused(FuserConfig, nested)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": "16"}, "'hidden_dim' must be of type int, not str"),
        ({"hidden_dim": 16.0}, "'hidden_dim' must be of type int, not float"),
        ({"hidden_dim": True}, "'hidden_dim' must be of type int, not bool"),
        ({"hidden_dim": None}, "'hidden_dim' must be of type int, not NoneType"),
        ({"normalise": 1}, "'normalise' must be of type bool, not int"),
        ({"dropout": True}, "'dropout' must be of type float, not bool"),
        ({"activation": "tanh"}, "'activation' must be one of gelu, silu, relu"),
        ({"alignment": ["span"]}, "'alignment' must be one of"),
        ({"layer_map": 3}, "'layer_map' must be a list"),
        ({"layer_map": [[0, 1, 2]]}, "'layer_map' must be a list of 2"),
        ({"layer_map": [[0, "1"]]}, "'layer_map' must be of type int"),
        ({"receiver": 3}, "'receiver': expected an object"),
        ({"depth": 2}, "depth must be at least 3, not 2"),
        ({"hidden_dim": 0}, "at least 1"),
        ({"dropout": 1}, "dropout must be in [0, 1), not 1"),
        ({"dropout": -0.1}, "dropout must be in"),
        ({"receiver": SHAPE | {"kv_heads": 0}}, "kv_heads must be at least 1, not 0"),
        ({"layer_map": []}, "layer_map"),
        ({"layer_map": [[0, 6]]}, "layer_map"),
        ({"layer_map": [[4, 0]]}, "layer_map"),
        ({"layer_map": [[-1, 0]]}, "layer_map"),
    ],
)
def test_bad_fuser_fields(changes: dict[str, Any], message: str) -> None:
    assert message in refused(FuserConfig, FUSER | changes)


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        (SamplingConfig, "max_tokens", 0),
        (SamplingConfig, "temp", -1),
        (SamplingConfig, "temp", float("nan")),
        (SamplingConfig, "top_p", 0),
        (SamplingConfig, "top_p", 1.1),
        (TrainConfig, "iters", 0),
        (TrainConfig, "batch_size", 0),
        (TrainConfig, "accumulate", 0),
        (TrainConfig, "report_every", 0),
        (TrainConfig, "eval_every", 0),
        (TrainConfig, "save_every", 0),
        (TrainConfig, "keep_checkpoints", 0),
        (TrainConfig, "warmup", -1),
        (TrainConfig, "max_tokens", 0),
        (TrainConfig, "anneal_steps", 0),
        (TrainConfig, "initial_temperature", 0.0),
        (TrainConfig, "final_temperature", -1.0),
        (TrainConfig, "clip", 0.0),
        (TrainConfig, "seed", -1),
        (TrainConfig, "seed", 2**32),
        (SamplingConfig, "seed", -1),
        (TrainConfig, "learning_rate", 0),
        (TrainConfig, "learning_rate", 1),
    ],
)
def test_numbers_out_of_range(cls: type, field: str, value: float) -> None:
    assert f"{field} must" in refused(cls, {field: value})


def test_whole_numbers_will_do_for_floats() -> None:
    config = from_dict(SamplingConfig, {"temp": 1}, "f")
    assert config.temp == 1.0 and isinstance(config.temp, float)
    assert from_dict(TrainConfig, {"betas": [0, 0.5]}, "f").betas == (0.0, 0.5)


def test_a_shape_describes_itself() -> None:
    shape = ModelShape("qwen", 28, 8, 128)
    assert shape.width == 1024
    assert str(shape) == "qwen (28 layers, 8 KV heads x 128)"
