"""The paper's studies on hand-made cases with known answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

from c2c_mlx import Fuser, LanguageModel
from c2c_mlx.config import FuserConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation.choice import Choice
from c2c_mlx.evaluation.files import choice_item
from c2c_mlx.evaluation.reference import Reference
from c2c_mlx.evaluation.runner import Log
from c2c_mlx.evaluation.task import Item
from c2c_mlx.fusion import kv
from c2c_mlx.studies import enrich, gates, layers, mapping, rank, transform
from c2c_mlx.studies.examples import Enriching, with_examples
from c2c_mlx.studies.study import Work

# Of a key that RoPE has turned back; the spacing of bfloat16 is 2^-8 of a number.
ROUNDING = {mx.float32: 1e-5, mx.bfloat16: 2**-6, mx.float16: 2**-9}
TEXTS = ("who wrote it", "and when", "the quick brown", "a house by the sea", "read this", "jumps")
ITEMS = [
    Item(str(i), [{"role": "user", "content": f"{TEXTS[i % 6]} {i}"}], f"{TEXTS[-i % 6]} he did")
    for i in range(24)
]
# Each hands on more to its attention layers than x, mask and cache.
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
}
HUNYUAN = SMALL | {
    "model_type": "hunyuan",
    "attention_bias": False,
    "moe_topk": 1,
    "num_experts": 1,
    "num_shared_expert": 1,
    "use_mixed_mlp_moe": False,
    "use_qk_norm": True,
    "use_cla": False,
    "cla_share_factor": 2,
    "rope_scaling": {"factor": 1.0, "type": "dynamic", "alpha": 1000.0},
}
GEMMA3N = {
    "model_type": "gemma3n",
    "text_config": SMALL
    | {
        "model_type": "gemma3n_text",
        "head_dim": 8,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 512,
        "sliding_window": 512,
        "max_position_embeddings": 512,
        "rope_local_base_freq": 1e4,
        "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 4,
    },
}
FAMILIES = (HUNYUAN, GEMMA3N)
MakeWork = Callable[..., Work]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network of `transform` learns for as long as it takes to see that it does."""
    monkeypatch.setattr(mapping, "STEPS", mapping.CHECK)


@pytest.fixture
def make(receiver: LanguageModel, sharer: LanguageModel) -> MakeWork:
    def make(**options: Any) -> Work:
        fields: dict[str, Any] = {
            "receiver": receiver,
            "sharers": [sharer],
            "fusers": [],
            "order": "sequential",
            "task": Reference(),
            "items": ITEMS,
            "log": Log(None, {}),
            "seed": 0,
            "shots": 2,
            "progress": lambda what, done, total: None,
        }
        return Work(**(fields | options))

    return make


@pytest.fixture
def fuser(receiver: LanguageModel, sharer: LanguageModel) -> Fuser:
    mx.random.seed(1)
    fuser = Fuser(FuserConfig(receiver.shape, sharer.shape, ((1, 3), (3, 5)), 24, 20))
    fuser.gate_logit = mx.full(fuser.gate_logit.shape, -1.0)
    fuser.proj_out.bias = 3 * fuser.proj_out.bias
    fuser.eval()
    return fuser


def difference(a: mx.array, b: mx.array) -> float:
    """The largest, over the largest number."""
    a, b = (x.astype(mx.float32) for x in (a, b))
    return float((mx.abs(a - b).max() / mx.abs(b).max()).item())


# --- enrich, layers ---------------------------------------------------------------------------


def test_enriching_moves_a_question_back_and_keeps_what_it_read(receiver: LanguageModel) -> None:
    caches = Enriching(receiver, ITEMS[:2])(ITEMS[5])
    n = caches.prompt_tokens - 1
    assert kv.length(caches.enriched) == kv.length(caches.alone) == n
    assert kv.length(caches.few_shot) == caches.few_shot_tokens - 1 > n
    every = kv.attention_layers(caches.alone)
    alone, enriched = (kv.read(c, every, 0, n) for c in (caches.alone, caches.enriched))
    # The first layer sees tokens alone: moved back, its keys are what they were without examples.
    assert difference(enriched.keys[0], alone.keys[0]) < ROUNDING[alone.keys.dtype]
    assert difference(enriched.values[0], alone.values[0]) < ROUNDING[alone.keys.dtype]
    assert difference(enriched.values[-1], alone.values[-1]) > 1e-2
    tail = kv.read(caches.few_shot, every, caches.few_shot_tokens - 6, caches.few_shot_tokens - 1)
    assert difference(enriched.values[..., -5:, :], tail.values) == 0


def test_without_examples_nothing_is_enriched(receiver: LanguageModel) -> None:
    caches = Enriching(receiver, [])(ITEMS[5])
    n, every = caches.prompt_tokens - 1, kv.attention_layers(caches.alone)
    for a, b in zip(
        *(kv.read(c, every, 0, n) for c in (caches.alone, caches.enriched)), strict=True
    ):
        assert difference(a, b) < ROUNDING[a.dtype]


def test_a_template_that_tells_turns_apart_is_refused(receiver: LanguageModel) -> None:
    enriching = Enriching(receiver, ITEMS[:1])
    template = receiver.tokenizer.chat_template
    try:
        receiver.tokenizer.chat_template = "{{ messages[-1]['content'] }} {{ messages | length }}"
        with pytest.raises(C2CError, match="writes a question otherwise"):
            enriching(ITEMS[5])
    finally:
        receiver.tokenizer.chat_template = template


def test_examples_stand_behind_a_system_prompt() -> None:
    system = {"role": "system", "content": "be short"}
    item = Item("1", [system, {"role": "user", "content": "and when?"}], "now")
    said = with_examples(item, ITEMS[:1])
    assert [m["role"] for m in said] == ["system", "user", "assistant", "user"]
    assert said[2]["content"] == ITEMS[0].reference


def test_enrich_has_three_conditions_of_which_one_is_longer(make: MakeWork) -> None:
    work = make(items=ITEMS[:6])
    found = enrich.run(work)
    of = found["conditions"]
    assert of["receiver"]["cache_tokens"] == of["enriched"]["cache_tokens"]
    assert of["few-shot"]["cache_tokens"] > of["receiver"]["cache_tokens"]
    assert of["receiver"]["vs_receiver"]["nll"]["mean"] == 0
    assert len({of[c]["scores"]["nll"]["mean"] for c in enrich.CONDITIONS}) == 3
    assert of["enriched"]["scores"]["nll"]["items"] == 4 and set(found["examples"]) < {*"123450"}
    assert enrich.run(work) == found  # from the log alone
    assert "few-shot" in enrich.report(found)


def test_choices_are_weighed_among_their_letters(make: MakeWork) -> None:
    row = {"question": "who?", "choices": ["a", "b", "c", "d"], "answer": 2}
    task = Choice("logits")
    rows = [row | {"question": f"who {i}?"} for i in range(5)]
    items = [task.asked(choice_item(row, str(i), "", "row")) for i, row in enumerate(rows)]
    found = enrich.run(make(task=task, items=items, shots=1))
    scores = found["conditions"]["receiver"]["scores"]
    assert set(scores) == {"nll", "accuracy"}
    assert abs(scores["nll"]["mean"] - np.log(4)) < 1 and 0 <= scores["accuracy"]["mean"] <= 1


def test_layers_are_ranked_on_one_half_and_cumulated_on_the_other(make: MakeWork) -> None:
    work = make(items=ITEMS[:10])
    found = layers.run(work)
    assert sorted(found["ranked"]) == [0, 1, 2, 3] and found["questions"] == [4, 4]
    means = {of["layer"]: of["difference"]["mean"] for of in found["single"]}
    # The first layer can't be enriched; its keys were rounded once more on their way back.
    assert abs(means[0]) < ROUNDING[kv.dtype_of(work.receiver.model)]
    assert [means[layer] for layer in found["ranked"]] == sorted(means.values())
    together = {of["condition"]: of for of in found["together"]}
    assert together["best 1"]["layers"] == [found["ranked"][0]]
    assert together["worst 3"]["layers"] == sorted(found["ranked"][1:])
    assert together["all 4"]["difference"]["mean"] != 0
    ones, others = (set(work.log.records[name]) for name in ("layer 0", "all 4"))
    assert not ones & others
    assert "best 2" in layers.report(found)


# --- transform --------------------------------------------------------------------------------


def test_a_linear_map_is_recovered() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(400, 12)), rng.normal(size=(12, 7))
    y = (x @ weight + 3).astype(np.float32)
    kept_out = np.arange(400) >= 300
    new = rng.normal(size=(50, 12))
    target = new @ weight + 3
    linear = mapping.least_squares(x, y, kept_out)
    assert mapping.error(linear(new), target, y.mean(axis=0)) < 1e-6
    assert mapping.error(mapping.network(x, y, kept_out, 0)(new), target, y.mean(axis=0)) < 0.1
    assert 0.5 < mapping.error(mapping.constant(y.mean(axis=0))(new), target, y.mean(axis=0)) < 1.5


def test_what_is_not_there_is_not_found() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 12)), rng.normal(size=(400, 7))
    found = mapping.least_squares(x, y, np.arange(400) >= 300)(rng.normal(size=(200, 12)))
    assert mapping.error(found, rng.normal(size=(200, 7)), y.mean(axis=0)) > 0.9


@pytest.mark.usefixtures("short")
def test_a_receiver_maps_into_itself(make: MakeWork, receiver: LanguageModel) -> None:
    found = transform.run(make(sharers=[receiver]))
    exact, mean = found["errors"]["least squares"], found["errors"]["mean"]
    for quantity in transform.QUANTITIES:
        assert exact[quantity]["mean"] < 1e-3 < mean[quantity]["mean"]
    assert [(of["receiver_layer"], of["sharer_layer"]) for of in found["layers"]] == [
        (i, i) for i in range(4)
    ]
    target, mapped = (
        np.array(found["layers"][0]["points"]["keys"][k]) for k in ("target", "mapped")
    )
    np.testing.assert_allclose(mapped, target, atol=0.05)
    assert "least squares" in transform.report(found)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family["model_type"])
def test_attention_is_called_as_its_family_does(
    make: MakeWork, receiver: LanguageModel, family: dict[str, Any]
) -> None:
    kind, arguments = mlx_lm.utils._get_classes({"model_type": family["model_type"]})
    mx.random.seed(0)
    other = replace(receiver, model=kind(arguments.from_dict(family)))
    pair = transform._Pair(make(receiver=other, sharers=[other]))
    sample = pair.sample(ITEMS[0], pair.aligned(ITEMS[0]))
    for at in range(len(pair.layers[0])):
        clean = pair._attend(at, sample, None)
        own, nothing = sample.target[:, at], 0 * sample.target[:, at]
        assert mapping.error(pair._attend(at, sample, own), clean) < 1e-3
        assert mapping.error(pair._attend(at, sample, nothing), clean) > 1e-3


def test_an_answers_attention_needs_an_answer(make: MakeWork) -> None:
    with pytest.raises(C2CError, match="a reference answer"):
        transform.run(make(items=[*ITEMS, replace(ITEMS[0], reference="")]))


def test_the_rank_of_a_sharer_elsewhere_is_not_to_be_had(
    make: MakeWork, sharer: LanguageModel, fuser: Fuser
) -> None:
    with pytest.raises(C2CError, match="name one that is here"):
        rank.run(make(sharers=[replace(sharer, is_elsewhere=True)], fusers=[fuser]))


@pytest.mark.parametrize("study", [gates, rank, transform])
def test_a_prompt_that_is_too_long_is_named_before_anything_is_read(
    make: MakeWork, fuser: Fuser, study: Any
) -> None:
    fuser.set_gate(0, 0, True)
    long = Item("long", [{"role": "user", "content": "fox " * 600}], "he did")
    work = make(fusers=[] if study is transform else [fuser], items=[*ITEMS, long])
    with pytest.raises(C2CError, match="item long: the prompt is .* reads at most 512; leave it"):
        study.run(work)
    assert not work.log.records


@pytest.mark.usefixtures("short")
def test_another_model_maps_worse_than_oneself_and_attention_says_so(make: MakeWork) -> None:
    work = make()
    found = transform.run(work)
    of = found["errors"]["least squares"]
    assert all(of[quantity]["mean"] > 1e-3 for quantity in transform.QUANTITIES)
    assert len(found["layers"]) == 4 and transform.run(work) == found


def test_watching_a_model_leaves_it_as_it_was(make: MakeWork, receiver: LanguageModel) -> None:
    before = [type(layer.self_attn) for layer in receiver.model.layers]
    ids = mx.array([[1, 2, 3]])
    logits = receiver.model(ids)
    cache = kv.make_cache(receiver.model)
    read = transform._inputs(receiver.model, [0, 2], ids, cache)
    assert set(read) == {0, 2} and read[0].args[0].shape[:2] == (1, 3)
    assert [type(layer.self_attn) for layer in receiver.model.layers] == before
    assert difference(receiver.model(ids), logits) == 0


# --- gates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(0, 1), (1, 0)])
def test_the_one_open_slice_is_found(make: MakeWork, fuser: Fuser, wanted: tuple[int, int]) -> None:
    fuser.set_gate(*wanted, True)
    before = fuser.gates.copy()
    found = gates.run(make(fusers=[fuser], items=ITEMS[:8]))
    np.testing.assert_array_equal(fuser.gates, before)
    worth = {tuple(of["slice"]): of["worth"]["mean"] for of in found["slices"]}
    assert len(worth) == 4 and [s for s, w in worth.items() if w] == [wanted]
    bars = {tuple(of["slice"]): (of["weight"], of["change"]) for of in found["slices"]}
    assert [s for s, (w, c) in bars.items() if w > 0 and c > 0] == [wanted]
    assert "values" in gates.report(found)


def test_the_better_slices_are_opened_first(make: MakeWork, fuser: Fuser) -> None:
    for kind in (0, 1):
        for at in (0, 1):
            fuser.set_gate(kind, at, True)
    work = make(fusers=[fuser], items=ITEMS[:8])
    found = gates.run(work)
    worth = [of["worth"]["mean"] for of in found["slices"]]
    assert len({*worth}) == 4 and {of["count"] for of in found["cumulated"]} == {1, 2, 3}
    assert set(found["rank_correlation"]) == {"weight", "change"}
    assert gates.run(work) == found
    with pytest.raises(C2CError, match="one fuser"):
        gates.run(make())


@pytest.mark.parametrize("order", [range(1, 8), range(7, 0, -1)])
def test_what_is_worth_the_same_has_no_order(order: range) -> None:
    assert gates._spearman([0] * 7 + [1], [*order, 8]) == pytest.approx(1 / 3**0.5)


def test_shut_gates_are_nothing_to_study(make: MakeWork, fuser: Fuser) -> None:
    with pytest.raises(C2CError, match="shut"):
        gates.run(make(fusers=[fuser]))


# --- rank -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_cache_of_rank_k_has_rank_k(receiver: LanguageModel, k: int) -> None:
    rng = np.random.default_rng(k)
    left, right = (np.linalg.qr(rng.normal(size=(n, k)))[0] for n in (40, 32))
    rows = mx.array((left @ right.T).astype(np.float32))  # 40 positions, 2 heads x 16
    cache = kv.make_cache(receiver.model)
    for layer in range(4):
        x = rows.reshape(1, 40, 2, 16).transpose(0, 2, 1, 3)
        kv.append(cache, layer, x, 5 * x)
    grams = rank.Grams()
    grams.add(cache, range(4), list(range(40)))
    assert grams.positions == 40
    np.testing.assert_allclose(grams.ranks(), k, rtol=1e-3)


def test_an_identity_uses_all_directions_evenly() -> None:
    assert rank.effective_rank(np.eye(6)) == pytest.approx(6)
    assert rank.effective_rank(np.diag([1.0, 0, 0])) == pytest.approx(1)
    assert 1 < rank.effective_rank(np.diag([1.0, 0.01])) < 1.4
    assert rank.effective_rank(np.zeros((3, 3))) == 0


def test_shut_gates_leave_the_rank_alone(make: MakeWork, fuser: Fuser) -> None:
    found = rank.run(make(fusers=[fuser], items=ITEMS[:10]))
    caches = found["caches"]
    assert caches["fused"]["layers"] == caches["receiver"]["layers"] != caches["sharer"]["layers"]
    assert found["fused_minus_receiver"]["keys"]["ci95"] == [0, 0]
    fuser.set_gate(1, 0, True)
    found = rank.run(make(fusers=[fuser], items=ITEMS[:10]))
    assert found["fused_minus_receiver"]["keys"]["mean"] == 0
    assert found["fused_minus_receiver"]["values"]["mean"] != 0
    assert "fused minus receiver" in rank.report(found)
