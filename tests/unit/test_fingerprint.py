"""Weights by their content: other numbers, another precision, another name."""

from __future__ import annotations

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import pytest

from c2c_mlx import LanguageModel, load_model
from c2c_mlx.training.fingerprint import of_weights


def test_equal_weights_have_equal_names(receiver: LanguageModel, sharer: LanguageModel) -> None:
    assert of_weights(load_model(receiver.path).model) == of_weights(receiver.model)
    assert of_weights(sharer.model) != of_weights(receiver.model)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_every_number_and_its_place_counts(dtype: mx.Dtype) -> None:
    model = nn.Linear(64, 32)
    model.set_dtype(dtype)
    names = {of_weights(model)}
    weight = model.weight
    model.weight = mx.array(weight)
    model.weight[3, 5] = -weight[3, 5]
    names.add(of_weights(model))
    model.weight = weight[::-1]
    names.add(of_weights(model))
    model.weight = weight[:, ::-1]
    names.add(of_weights(model))
    assert len(names) == 4


def test_another_precision_is_another_model() -> None:
    names = set()
    for bits in (0, 4, 8):
        for dtype in (mx.float32, mx.bfloat16, mx.float16):
            mx.random.seed(0)
            model = nn.Sequential(nn.Linear(64, 32))
            model.set_dtype(dtype)
            if bits:
                nn.quantize(model, group_size=32, bits=bits)
            names.add(of_weights(model))
    assert len(names) == 9
