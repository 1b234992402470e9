"""GraLoRA through stock PEFT and transformers: everything that one does with a LoRA adapter."""

import itertools
import json
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from helpers import (
    CASES,
    MODELS,
    TARGETS,
    VOCAB,
    Case,
    OneLayer,
    adapted,
    adapter_layers,
    adapter_parameters,
    assert_close64,
    assert_unchanged,
    case_config,
    cases,
    factors_of,
    few_cases,
    gralora_config,
    kinds,
    models,
    naive_delta,
    naive_update,
    one_layer,
    only_layer,
    random_input,
    randomize,
    token_ids,
)
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.integrations import peft as transformers_peft
from transformers.pytorch_utils import Conv1D

import gralora
from gralora.ops import dropout
from gralora.ops.dropout import draw_seed

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA that is already a LoRA adapter"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
    pytest.mark.filterwarnings("ignore:Adapter first was active which is now deleted"),
]
safe_or_not = pytest.mark.parametrize("safe", [True, False], ids=["safe", "unsafe"])


def layer_delta(layer, scaling=3.0, adapter="default"):
    """dW of a GraLoRA adapter block by block, in the layout of the base weight."""
    dW = scaling * naive_delta(factors_of(layer, adapter))
    return (dW.T if layer.fan_in_fan_out else dW).detach()


# Merging


@cases
@kinds
@safe_or_not
def test_merge_and_unmerge(case, kind, safe):
    """Merging adds dW to the base weight and keeps the output; unmerging takes it away again."""
    model = adapted(one_layer(case, kind), case_config(case))
    layer, x = only_layer(model), random_input(7, case.in_features)
    weight, before = layer.base_layer.weight.detach().clone(), model(x)
    model.merge_adapter(safe_merge=safe)
    assert layer.merged
    assert_close64(layer.base_layer.weight.detach(), weight + layer_delta(layer))
    assert_close64(model(x), before)
    model.unmerge_adapter()
    assert not layer.merged
    assert_close64(layer.base_layer.weight.detach(), weight)
    assert_close64(model(x), before)


@few_cases
@kinds
@safe_or_not
def test_merge_and_unload(case, kind, safe):
    """The merged model is the base model's class of layer, with no trace of the adapter but in its weight."""
    model = adapted(one_layer(case, kind), case_config(case))
    x = random_input(7, case.in_features)
    before = model(x)
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged) is OneLayer and type(merged.layer) is (Conv1D if kind == "conv1d" else nn.Linear)
    assert set(merged.state_dict()) == {"layer.weight", "layer.bias"}
    assert_close64(merged(x), before)


@few_cases
def test_unload_gives_the_base_model_back(case):
    """Unloading without merging leaves the base model as it was."""
    base, x = one_layer(case), random_input(7, case.in_features)
    before = base(x)
    assert torch.equal(adapted(base, case_config(case)).unload()(x), before)


def test_safe_merge_refuses_a_broken_adapter():
    """A safe merge of an adapter with infinities raises, and leaves the base weight as it was."""
    model = adapted(one_layer(CASES[3]), case_config(CASES[3]))
    layer = only_layer(model)
    weight = layer.base_layer.weight.detach().clone()
    factors_of(layer).B.data[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


@few_cases
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_disable_adapter(case, merged):
    """While disabled the model is the base model; a merged adapter is unmerged for it."""
    base, x = one_layer(case), random_input(7, case.in_features)
    before = base(x)
    model = adapted(base, case_config(case))
    with_adapter = model(x)
    if merged:
        model.merge_adapter()
    with model.disable_adapter():
        assert_close64(model(x), before)
        assert merged or torch.equal(model(x), before)
    assert_close64(model(x), with_adapter)
    assert (with_adapter - before).abs().max() > 0.1


# Options of the config


@few_cases
@kinds
def test_lora_bias(case, kind):
    """With lora_bias=True the adapter has a bias, in forward as in merging."""
    model = adapted(one_layer(case, kind), case_config(case, lora_bias=True))
    layer, x = only_layer(model), random_input(7, case.in_features)
    bias = layer.lora_B["default"].bias
    assert bias.requires_grad and bias.all()
    expected = layer.base_layer(x) + 3.0 * (naive_update(x, factors_of(layer)) + bias)
    assert_close64(model(x), expected)
    assert_close64(model.merge_and_unload()(x), expected)


@few_cases
def test_dropout_acts_on_the_adapter_only(case):
    """In training the adapter sees dropout(x) and the base layer x; in evaluation there is no dropout."""
    model = adapted(one_layer(case), case_config(case, lora_dropout=0.5))
    layer, x = only_layer(model), random_input(7, case.in_features)
    assert_close64(model(x), layer.base_layer(x) + 3.0 * naive_update(x, factors_of(layer)))
    model.train()
    torch.manual_seed(0)
    first = model(x)
    torch.manual_seed(0)
    dropped = dropout(x.flatten(0, -2), 0.5, draw_seed(x)).view_as(x)
    assert_close64(first, layer.base_layer(x) + 3.0 * naive_update(dropped, factors_of(layer)))
    torch.manual_seed(0)
    assert torch.equal(model(x), first)
    assert not torch.equal(model(x), first)


@models
def test_rank_pattern_and_alpha_pattern(model_name):
    """Patterns set each layer's total rank and alpha; merging agrees with forward."""
    target = TARGETS[model_name][0]
    config = gralora_config(
        2, r=8, hybrid_r=2, target_modules=TARGETS[model_name], rank_pattern={target: 12}, alpha_pattern={target: 5}
    )
    model = adapted(MODELS[model_name](torch.float64), config)
    for name, layer in model.named_modules():
        if layer in adapter_layers(model):
            r, alpha = (12, 5) if name.endswith(target) else (8, 16)
            assert factors_of(layer).A.shape[2] == r - 2 and factors_of(layer).hybrid_A.shape[0] == 2
            assert_close64(layer.get_delta_weight("default").detach(), layer_delta(layer, alpha / r))
    ids = token_ids(2, 7)
    before = model(ids).logits
    assert_close64(model.merge_and_unload()(ids).logits, before)


@models
@pytest.mark.parametrize("cls", [peft.LoraConfig, gralora_config])
def test_all_linear(model_name, cls):
    """target_modules="all-linear" adapts the same layers as for plain LoRA, with as many parameters."""
    model = get_peft_model(MODELS[model_name](), cls(r=4, target_modules="all-linear"))
    stock = get_peft_model(MODELS[model_name](), peft.LoraConfig(r=4, target_modules="all-linear"))
    assert model.targeted_module_names == stock.targeted_module_names != []
    assert model.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()


@models
def test_modules_to_save(model_name, tmp_path):
    """Modules that are trained as a whole are saved and loaded beside the adapter, and off when it is disabled."""
    config = gralora_config(2, hybrid_r=2, target_modules=TARGETS[model_name], modules_to_save=["lm_head"])
    base = MODELS[model_name](tie_word_embeddings=False)
    ids = token_ids(2, 7)
    before = base(ids).logits
    model = adapted(base, config)
    head = model.get_output_embeddings().modules_to_save["default"]
    head.weight.data.mul_(1.5)
    assert head.weight.requires_grad
    out = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS[model_name](tie_word_embeddings=False), tmp_path)
    assert torch.equal(loaded(ids).logits, out) and not torch.equal(out, before)
    with loaded.disable_adapter():
        assert torch.equal(loaded(ids).logits, before)


# Several adapters on one layer

TWO = Case(0, 0, 0, 40, 48)  # the features of a layer that takes any of the adapters below
ADAPTERS = {
    "k2": lambda: gralora_config(2, r=4, target_modules=["layer"]),
    "k4-hybrid": lambda: gralora_config(4, r=10, hybrid_r=2, lora_alpha=15, target_modules=["layer"]),
    "stock": lambda: peft.LoraConfig(r=3, lora_alpha=7, target_modules=["layer"]),
    "plain": lambda: gralora.LoraConfig(r=5, lora_alpha=6, target_modules=["layer"]),
}
pairs = pytest.mark.parametrize("names", list(itertools.product(ADAPTERS, repeat=2)), ids="-then-".join)


def pair(names, kind="linear"):
    """A model with the two adapters "first" and "second", added in this order, both random; "first" is active."""
    first, second = (ADAPTERS[name]() for name in names)
    model = get_peft_model(one_layer(TWO, kind), first, adapter_name="first")
    randomize(model, "first", seed=1)
    model.add_adapter("second", second)
    return randomize(model, "second", seed=2).eval()


def update(model, adapter, x):
    """What one adapter of either kind adds to the output, from the formulas."""
    layer, config = only_layer(model), model.peft_config[adapter]
    scaling = config.lora_alpha / config.r
    if getattr(config, "use_gralora", False):
        return scaling * naive_update(x, factors_of(layer, adapter))
    return scaling * (x @ layer.lora_A[adapter].weight.T) @ layer.lora_B[adapter].weight.T


def sum_of_updates(model, x, adapters):
    return only_layer(model).base_layer(x) + sum(update(model, adapter, x) for adapter in adapters)


@pairs
def test_second_adapter_leaves_the_first_as_it_was(names):
    """Adding an adapter of either kind changes no bit of the first one's output, and not what is trainable."""
    first, second = (ADAPTERS[name]() for name in names)
    model = get_peft_model(one_layer(TWO), first, adapter_name="first")
    randomize(model, "first", seed=1)
    x = random_input(7, 40)
    before = model(x)
    model.add_adapter("second", second)
    assert torch.equal(model(x), before)
    assert model.active_adapters == ["first"]
    assert all(p.requires_grad for p in adapter_parameters(model, "first").values())
    assert not any(p.requires_grad for p in adapter_parameters(model, "second").values())


@pairs
@kinds
def test_set_adapter(names, kind):
    """Each adapter computes its own update, and is the one that is trained when it is active."""
    model, x = pair(names, kind), random_input(7, 40)
    for active, other in [("first", "second"), ("second", "first"), ("first", "second")]:
        model.set_adapter(active)
        assert_close64(model(x), sum_of_updates(model, x, [active]))
        assert all(p.requires_grad for p in adapter_parameters(model, active).values())
        assert not any(p.requires_grad for p in adapter_parameters(model, other).values())


@pairs
@kinds
@safe_or_not
def test_two_active_adapters(names, kind, safe):
    """The updates of two active adapters add up, in forward as in merging, together or one by one."""
    model, x = pair(names, kind), random_input(7, 40)
    model.base_model.set_adapter(["first", "second"])
    weight, expected = (
        only_layer(model).base_layer.weight.detach().clone(),
        sum_of_updates(model, x, ["first", "second"]),
    )
    assert_close64(model(x), expected)
    model.merge_adapter(safe_merge=safe)
    assert_close64(model(x), expected)
    model.unmerge_adapter()
    assert_close64(only_layer(model).base_layer.weight.detach(), weight)
    alone = sum_of_updates(model, x, ["second"])
    model.merge_adapter(["second"], safe_merge=safe)
    assert_close64(only_layer(model).base_layer(x), alone)
    model.merge_adapter(["first"], safe_merge=safe)
    assert_close64(model(x), expected)


@pairs
def test_mixed_batch(names):
    """With adapter_names every row of a batch is computed with its own adapter, or with none."""
    model, x = pair(names), random_input(5, 3, 40)
    rows = ["first", "__base__", "second", "second", "first"]
    expected = [sum_of_updates(model, x[i], [] if name == "__base__" else [name]) for i, name in enumerate(rows)]
    assert_close64(model(x, adapter_names=rows), torch.stack(expected))


@pairs
@pytest.mark.parametrize("deleted, kept", [("first", "second"), ("second", "first")], ids=["first", "second"])
def test_delete_adapter(names, deleted, kept):
    """Deleting one adapter leaves nothing of it, and the other as it was."""
    model, x = pair(names), random_input(7, 40)
    expected = sum_of_updates(model, x, [kept])
    model.delete_adapter(deleted)
    assert list(model.peft_config) == [kept]
    assert not any(deleted in name.split(".") for name in model.state_dict())
    model.set_adapter(kept)
    assert_close64(model(x), expected)
    assert_close64(model.merge_and_unload()(x), expected)


@pairs
def test_save_and_load_two_adapters(names, tmp_path):
    """Two adapters of one layer are saved and loaded side by side."""
    model, x = pair(names), random_input(7, 40)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(one_layer(TWO), tmp_path / "first", adapter_name="first")
    loaded.load_adapter(tmp_path / "second", adapter_name="second")
    for adapter in ("first", "second"):
        for m in (model, loaded):
            m.set_adapter(adapter)
        assert torch.equal(loaded(x), model(x))


def test_adapters_on_different_layers():
    """A second adapter may target other layers than the first; each layer has what targets it."""
    llama = MODELS["llama"](torch.float64)
    model = get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="first")
    model.add_adapter("second", gralora_config(4, target_modules=["q_proj", "o_proj"]))
    model.add_adapter("third", peft.LoraConfig(r=2, target_modules=["o_proj", "down_proj"]))
    ids, outputs = token_ids(2, 7), {}
    for i, adapter in enumerate(["first", "second", "third"]):
        randomize(model, adapter, seed=i)
    for adapter in ("first", "second", "third"):
        model.set_adapter(adapter)
        outputs[adapter] = model(ids).logits
    assert len({out.sum().item() for out in outputs.values()}) == 3
    mixed = model.eval()(ids, adapter_names=["second", "third"]).logits
    assert_close64(mixed[0], outputs["second"][0])
    assert_close64(mixed[1], outputs["third"][1])
    model.set_adapter("second")
    assert_close64(model.merge_and_unload()(ids).logits, outputs["second"])


@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["gralora-first", "loha-first"])
def test_mixed_adapter_types(order):
    """In PEFT's mixed model a GraLoRA adapter works beside a LoHa adapter on the same layer."""
    configs = [ADAPTERS["k4-hybrid"](), peft.LoHaConfig(r=2, target_modules=["layer"])]
    model = get_peft_model(one_layer(TWO), configs[order[0]], adapter_name=f"a{order[0]}", mixed=True)
    model.add_adapter(f"a{order[1]}", configs[order[1]])
    randomize(model, "a0")
    x = random_input(7, 40)
    model.set_adapter("a0")
    (layer,) = (m for m in adapter_layers(model) if hasattr(m, "lora_A"))
    expected = layer.get_base_layer()(x) + 1.5 * naive_update(x, factors_of(layer, "a0"))
    assert_close64(model(x), expected)
    assert_close64(model.merge_and_unload()(x), expected)


# Combining adapters

GRALORA_PAIRS = [names for names in itertools.product(ADAPTERS, repeat=2) if set(names) & {"k2", "k4-hybrid"}]
gralora_pairs = pytest.mark.parametrize("names", GRALORA_PAIRS, ids="-and-".join)


def total_delta(model, weights):
    """The weighted sum of the adapters' dW, `[O, I]`, through their outputs for unit vectors."""
    eye = torch.eye(40, dtype=torch.float64)
    return sum(w * update(model, adapter, eye).T for adapter, w in weights.items()).detach()


def low_rank(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@gralora_pairs
@kinds
def test_weighted_cat_is_exact(names, kind):
    """add_weighted_adapter "cat" gives a plain LoRA with the weighted sum of the updates."""
    model, x = pair(names, kind), random_input(7, 40)
    expected = total_delta(model, {"first": 0.5, "second": -2.0})
    model.add_weighted_adapter(["first", "second"], [0.5, -2.0], "mix", combination_type="cat")
    model.set_adapter("mix")
    layer = only_layer(model)
    assert_close64(model(x), layer.base_layer(x) + x @ expected.T)
    assert not layer.is_gralora("mix")
    assert not getattr(model.peft_config["mix"], "use_gralora", False)


@gralora_pairs
@kinds
@pytest.mark.parametrize("rank", [None, 5, 16])
def test_weighted_svd_is_the_best_approximation(names, kind, rank):
    """add_weighted_adapter "svd" gives the best approximation of the weighted sum that its rank allows."""
    if peft.__version__.startswith("0.20.") and {"stock", "plain"} & set(names):
        pytest.skip("PEFT 0.20 applies the scaling of a plain LoRA twice in svd")
    model, x = pair(names, kind), random_input(7, 40)
    ranks = {"k2": 2 * 4, "k4-hybrid": 4 * 8 + 2, "stock": 3, "plain": 5}
    expected = low_rank(total_delta(model, {"first": 0.5, "second": -2.0}), rank or max(ranks[n] for n in names))
    model.add_weighted_adapter(["first", "second"], [0.5, -2.0], "mix", combination_type="svd", svd_rank=rank)
    model.set_adapter("mix")
    assert_close64(model(x), only_layer(model).base_layer(x) + x @ expected.T)


def test_weighted_svd_of_a_rank_above_the_features(tmp_path):
    """Where k * r_g + hybrid_r exceeds a layer's features, "svd" at its default rank is exact, and can be saved."""
    case = Case(4, 10, 2, 16, 28)
    model = adapted(one_layer(case), case_config(case))
    model.add_adapter("second", case_config(case))
    randomize(model, "second", seed=2)
    x, layer = random_input(7, 16), only_layer(model)
    expected = layer.base_layer(x) + x @ (layer_delta(layer) - layer_delta(layer, adapter="second")).T
    model.add_weighted_adapter(["default", "second"], [1.0, -1.0], "mix", combination_type="svd")
    model.set_adapter("mix")
    assert_close64(model(x), expected)
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    assert_close64(PeftModel.from_pretrained(one_layer(case), tmp_path / "mix")(x), expected)


@pytest.mark.parametrize("kind_of_sum", ["cat", "svd"])
@pytest.mark.parametrize("name", ["k2", "k4-hybrid"])
def test_weighting_a_single_adapter(name, kind_of_sum):
    """A single GraLoRA adapter becomes a weighted plain LoRA exactly, though PEFT then always takes "linear"."""
    model, x = pair((name, "stock")), random_input(7, 40)
    expected = only_layer(model).base_layer(x) + 0.25 * update(model, "first", x)
    model.add_weighted_adapter(["first"], [0.25], "mix", combination_type=kind_of_sum)
    model.set_adapter("mix")
    assert_close64(model(x), expected)


@pytest.mark.parametrize("kind_of_sum", ["ties_svd", "magnitude_prune_svd", "dare_ties_svd", "dare_linear_svd"])
def test_weighted_pruning_acts_on_the_delta_weights(kind_of_sum, monkeypatch):
    """The other svd kinds prune dW itself, just as for plain LoRA adapters with the same dW."""
    bernoulli = torch.bernoulli  # the "dare" kinds drop at random: here the same entries each time
    monkeypatch.setattr(torch, "bernoulli", lambda p: bernoulli(p, generator=torch.Generator().manual_seed(0)))
    model, x = pair(("k2", "k4-hybrid")), random_input(7, 40)
    twin = get_peft_model(
        one_layer(TWO), peft.LoraConfig(r=40, lora_alpha=40, target_modules=["layer"]), adapter_name="first"
    )
    twin.add_adapter("second", peft.LoraConfig(r=40, lora_alpha=40, target_modules=["layer"]))
    for adapter in ("first", "second"):
        only_layer(twin).lora_A[adapter].weight.data = torch.eye(40).double()
        only_layer(twin).lora_B[adapter].weight.data = total_delta(model, {adapter: 1.0})
    for m in (model, twin):
        m.add_weighted_adapter(
            ["first", "second"], [0.5, -2.0], "mix", combination_type=kind_of_sum, svd_rank=20, density=0.4
        )
        m.set_adapter("mix")
    assert_close64(model(x), twin(x))


@gralora_pairs
@pytest.mark.parametrize("kind_of_sum", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "nonsense"])
def test_weighting_element_by_element_is_refused(names, kind_of_sum):
    """Combinations of single factor entries are refused, naming kind, adapters and the kinds that work."""
    model = pair(names)
    granular = [a for a, name in zip(["first", "second"], names, strict=True) if name.startswith("k")]
    with assert_unchanged(model, random_input(7, 40)), pytest.raises(ValueError) as error:
        model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "mix", combination_type=kind_of_sum, density=0.5)
    for part in [f"combination_type={kind_of_sum!r}", str(granular), "'cat'", "'svd'"]:
        assert part in str(error.value)


@pytest.mark.parametrize("kind_of_sum", ["linear", "ties", "cat", "svd"])
def test_weighting_plain_adapters_is_left_to_peft(kind_of_sum):
    """Beside a GraLoRA adapter, plain ones are combined as PEFT combines them, bit by bit and by any kind."""
    weights = []
    for with_gralora in (True, False):
        model = pair(("stock", "stock"))
        if with_gralora:
            model.add_adapter("granular", ADAPTERS["k2"]())
        model.add_weighted_adapter(["first", "second"], [0.5, 2.0], "mix", combination_type=kind_of_sum, density=0.5)
        weights.append(adapter_parameters(model, "mix"))
    assert all(torch.equal(*pair_of_tensors) for pair_of_tensors in zip(*(w.values() for w in weights), strict=True))


def test_weighting_refuses_biases():
    """Adapters with lora_bias=True are refused, since the combination would lose their biases."""
    model = adapted(one_layer(TWO), gralora_config(2, r=4, target_modules=["layer"], lora_bias=True))
    with assert_unchanged(model, random_input(7, 40)), pytest.raises(ValueError, match=r"\['default'\].*lora_bias"):
        model.add_weighted_adapter(["default"], [1.0], "mix", combination_type="cat")


def test_failed_weighting_leaves_no_trace():
    """When PEFT refuses a combination, the adapters made on the way are gone again."""
    model = pair(("k2", "stock"))
    with assert_unchanged(model, random_input(7, 40)), pytest.raises(ValueError, match="absent does not exist"):
        model.add_weighted_adapter(["first", "absent"], [1.0, 1.0], "mix", combination_type="cat")
    assert list(model.peft_config) == ["first", "second"]


@models
def test_weighting_over_patterns(model_name):
    """Adapters whose ranks differ by layer are combined exactly, and stay active and trainable as before."""
    target = TARGETS[model_name][0]
    base = MODELS[model_name](torch.float64)
    config = gralora_config(2, r=4, target_modules=TARGETS[model_name], rank_pattern={target: 8}, use_rslora=True)
    model = adapted(base, config)
    other = gralora_config(4, r=9, hybrid_r=1, target_modules=TARGETS[model_name], alpha_pattern={target: 3})
    model.add_adapter("other", other)
    randomize(model, "other", seed=1)
    ids = token_ids(2, 7)
    model.base_model.set_adapter(["default", "other"])
    expected = model(ids).logits
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "mix", combination_type="cat")
    assert model.active_adapters == ["default", "other"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert list(model.peft_config) == ["default", "other", "mix"]
    model.set_adapter("mix")
    assert_close64(model(ids).logits, expected)


# Saving and loading

SAVED = {
    "k1": lambda targets: gralora_config(1, r=4, target_modules=targets, task_type="CAUSAL_LM"),
    "k2-hybrid": lambda targets: gralora_config(2, r=6, hybrid_r=2, target_modules=targets, task_type="CAUSAL_LM"),
    "k4-patterns": lambda targets: gralora_config(
        4, r=4, use_rslora=True, target_modules=targets, rank_pattern={targets[0]: 8}, alpha_pattern={targets[-1]: 3}
    ),
    "auto": lambda targets: gralora_config("auto", r=4, target_modules=targets),
}
saved = pytest.mark.parametrize("config_name", SAVED)


@pytest.fixture(scope="module")
def base_dirs(tmp_path_factory):
    """Folders with the base models, from which transformers loads them."""
    dirs = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, folder in dirs.items():
        MODELS[name]().save_pretrained(folder)
    return dirs


def load_base(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def save_adapter(folder, base_dir, config_name, model_name):
    """Save a random adapter; returns the logits with it."""
    model = adapted(load_base(base_dir), SAVED[config_name](TARGETS[model_name]))
    model.save_pretrained(folder)
    return model(token_ids(2, 7)).logits


def by_transformers(base_dir, folder):
    model = load_base(base_dir)
    model.load_adapter(str(folder))
    return model


def beside_a_stock_adapter(base_dir, folder):
    targets = PeftConfig.from_pretrained(folder).target_modules
    model = adapted(load_base(base_dir), peft.LoraConfig(r=2, target_modules=targets), seed=5)
    model.load_adapter(folder, adapter_name="granular")
    model.set_adapter("granular")
    return model


def by_injection(base_dir, folder, by_names=False, **options):
    model, tensors = load_base(base_dir), load_peft_weights(folder)
    names = {name.removeprefix("base_model.model."): t for name, t in tensors.items()} if by_names else None
    inject_adapter_in_model(PeftConfig.from_pretrained(folder), model, state_dict=names, **options)
    set_peft_model_state_dict(model, tensors, **options)
    return model


LOADERS = {
    "from_pretrained": lambda base, path: PeftModel.from_pretrained(load_base(base), path),
    "trainable": lambda base, path: PeftModel.from_pretrained(load_base(base), path, is_trainable=True),
    "low-cpu-mem": lambda base, path: PeftModel.from_pretrained(load_base(base), path, low_cpu_mem_usage=True),
    "auto-peft": lambda base, path: AutoPeftModelForCausalLM.from_pretrained(path),
    "auto-model": lambda base, path: AutoModelForCausalLM.from_pretrained(path),
    "transformers": by_transformers,
    "second-adapter": beside_a_stock_adapter,
    "injection": by_injection,
    "injection-by-names-in-file": lambda base, path: by_injection(base, path, by_names=True),
    "injection-low-cpu-mem": lambda base, path: by_injection(base, path, low_cpu_mem_usage=True),
}


@models
@saved
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_saved_adapter_is_loaded_bit_by_bit(model_name, config_name, loader, base_dirs, tmp_path):
    """Every way to load an adapter gives back the very logits it had when it was saved."""
    base_dir = base_dirs[model_name]
    logits = save_adapter(tmp_path, base_dir, config_name, model_name)
    ids = token_ids(2, 7)
    assert not torch.equal(load_base(base_dir)(ids).logits, logits)
    model = loader(base_dir, tmp_path).eval()
    assert torch.equal(model(ids).logits, logits)
    assert not any(p.is_meta for p in model.parameters())


@models
@saved
def test_saved_files(model_name, config_name, base_dirs, tmp_path):
    """The file holds exactly the adapter's tensors, those of the grid three-dimensional, and the number k."""
    save_adapter(tmp_path, base_dirs[model_name], config_name, model_name)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    k, hybrid_r = config["gralora_k"], config["hybrid_r"]
    assert isinstance(k, int) and config["use_gralora"] is True and config["peft_type"] == "LORA"
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    layers = {name.rsplit(".lora_", 1)[0]: None for name in shapes}
    for layer in layers:
        base = load_base(base_dirs[model_name]).get_submodule(layer.removeprefix("base_model.model."))
        sizes = tuple(base.weight.shape) if isinstance(base, Conv1D) else (base.in_features, base.out_features)
        r = config["rank_pattern"].get(layer.rsplit(".", 1)[1], config["r"])
        assert shapes.pop(f"{layer}.lora_A.weight") == (k, sizes[0] // k, r - hybrid_r)
        assert shapes.pop(f"{layer}.lora_B.weight") == (k, r - hybrid_r, sizes[1] // k)
        if hybrid_r:
            assert shapes.pop(f"{layer}.lora_A.hybrid_weight") == (hybrid_r, sizes[0])
            assert shapes.pop(f"{layer}.lora_B.hybrid_weight") == (sizes[1], hybrid_r)
    assert len(layers) > 2 and not shapes


@models
@saved
def test_saving_a_loaded_adapter_gives_the_same_files(model_name, config_name, base_dirs, tmp_path):
    """Load and save again: the tensors are the same byte for byte, the config says the same."""
    save_adapter(tmp_path / "a", base_dirs[model_name], config_name, model_name)
    model = PeftModel.from_pretrained(load_base(base_dirs[model_name]), tmp_path / "a", is_trainable=True)
    model.save_pretrained(tmp_path / "b")
    a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert a == b
    configs = [PeftConfig.from_pretrained(tmp_path / name).to_dict() for name in "ab"]
    assert configs[0] | {"inference_mode": None} == configs[1] | {"inference_mode": None}


@models
def test_loaded_adapter_can_be_trained_further(model_name, base_dirs, tmp_path):
    """is_trainable=True makes exactly the adapter trainable; without it nothing is."""
    save_adapter(tmp_path, base_dirs[model_name], "k2-hybrid", model_name)
    for trainable in (True, False):
        model = PeftModel.from_pretrained(load_base(base_dirs[model_name]), tmp_path, is_trainable=trainable)
        found = {name for name, p in model.named_parameters() if p.requires_grad}
        assert found == (set(adapter_parameters(model)) if trainable else set())


takes_this_peft = pytest.mark.skipif(
    Version(transformers_peft.MIN_PEFT_VERSION) > Version(peft.__version__),
    reason="transformers' add_adapter wants a newer PEFT",
)


@models
@takes_this_peft
def test_adapter_of_a_transformers_model(model_name, base_dirs, tmp_path):
    """transformers' own add_adapter, disable, save and load work without a PeftModel."""
    model, ids = load_base(base_dirs[model_name]), token_ids(2, 7)
    before = model(ids).logits
    model.add_adapter(gralora_config(4, r=6, hybrid_r=2, target_modules=TARGETS[model_name]), adapter_name="granular")
    assert torch.equal(model(ids).logits, before)
    randomize(model, "granular")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS[model_name]), adapter_name="stock")
    model.set_adapter("granular")
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    model.disable_adapters()
    assert torch.equal(model(ids).logits, before) and not torch.equal(logits, before)
    assert torch.equal(by_transformers(base_dirs[model_name], tmp_path)(ids).logits, logits)


@saved
def test_bfloat16_adapter_is_saved_in_bfloat16(config_name, tmp_path):
    """An adapter kept in the base's bfloat16 is saved and loaded as such."""
    config = SAVED[config_name](TARGETS["llama"])
    model = adapted(MODELS["llama"](torch.bfloat16), config, autocast_adapter_dtype=False)
    ids = token_ids(2, 7)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS["llama"](torch.bfloat16), tmp_path, autocast_adapter_dtype=False)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_conversion_of_an_initialisation_that_left_the_base_alone(tmp_path):
    """The difference to the initial adapter is the adapter, of a grid that has zeros in its second half."""
    model = peft.get_peft_model(MODELS["llama"](), SAVED["k2-hybrid"](TARGETS["llama"]))
    model.save_pretrained(tmp_path / "initial")
    randomize(model).eval()
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "end")
    ids = token_ids(2, 7)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


# A plain LoRA through gralora.LoraConfig


def train(model, steps=3):
    model.train()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        ids = token_ids(2, 7, seed=step)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@models
def test_plain_lora_is_that_of_peft(model_name, base_dirs, tmp_path):
    """With use_gralora=False it starts, trains and is saved as `peft.LoraConfig`'s, byte for byte."""
    options = {"r": 4, "target_modules": TARGETS[model_name], "lora_dropout": 0.1, "rank_pattern": {"q_proj": 2}}
    losses = []
    for name, cls in [("ours", gralora.LoraConfig), ("stock", peft.LoraConfig)]:
        base = load_base(base_dirs[model_name])
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following rank_pattern keys did not match")
            model = get_peft_model(base, cls(**options))
        losses.append(train(model))
        model.save_pretrained(tmp_path / name)
    assert losses[0] == losses[1] and losses[0][0] != losses[0][-1]
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()


# Programs that do not know GraLoRA

STOCK_PROGRAM = """
import json, sys, warnings
import torch
from peft import PeftModel
warnings.simplefilter("ignore")
outcomes = {}
for path in sys.argv[1:]:
    try:
        PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(8, 8)), path)
        outcomes[path] = "loaded"
    except Exception as error:
        outcomes[path] = f"{type(error).__name__}: {error}"
assert "gralora" not in sys.modules
print(json.dumps(outcomes))
"""


def test_stock_peft_refuses_a_gralora_adapter(tmp_path):
    """Without `import gralora` PEFT fails on the shapes of a GraLoRA adapter, k=1 included, and loads a plain LoRA."""
    configs = {
        "k1": gralora_config(1, target_modules=["0"]),
        "k1-hybrid": gralora_config(1, hybrid_r=2, target_modules=["0"]),
        "k2": gralora_config(2, target_modules=["0"]),
        "k4-hybrid": gralora_config(4, hybrid_r=4, target_modules=["0"]),
        "rank-one": gralora_config(1, r=1, target_modules=["0"]),
        "plain": gralora.LoraConfig(r=4, target_modules=["0"]),
    }
    for name, config in configs.items():
        adapted(nn.Sequential(nn.Linear(8, 8)), config).save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", STOCK_PROGRAM, *(str(tmp_path / name) for name in configs)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    outcomes = {path.rsplit("/", 1)[1]: outcome for path, outcome in json.loads(result.stdout).items()}
    assert outcomes.pop("plain") == "loaded"
    for name, outcome in outcomes.items():
        assert outcome.startswith("RuntimeError") and "size mismatch" in outcome, (name, outcome)
        assert "lora_A" in outcome and "lora_B" in outcome


# Hotswapping


def save_for_hotswap(folder, config, seed):
    model = adapted(one_layer(TWO), config, seed=seed)
    model.save_pretrained(folder)
    return model(random_input(7, 40))


@pytest.mark.parametrize("name", ["k2", "k4-hybrid"])
def test_hotswap_of_the_same_grid(name, tmp_path):
    """Hotswapping between adapters of the same k and hybrid_r gives the other adapter's output."""
    expected = save_for_hotswap(tmp_path, ADAPTERS[name](), seed=1)
    model, x = adapted(one_layer(TWO), ADAPTERS[name](), seed=2), random_input(7, 40)
    assert not torch.equal(model(x), expected)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(model(x), expected)


def test_hotswap_to_a_larger_rank(tmp_path):
    """As for plain LoRA, rank and alpha may be larger: tensors and scaling are those of the new adapter."""
    config = gralora_config(2, r=8, lora_alpha=5, target_modules=["layer"])
    expected = save_for_hotswap(tmp_path, config, seed=1)
    model = adapted(one_layer(TWO), ADAPTERS["k2"](), seed=2)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(model(random_input(7, 40)), expected)


def test_hotswap_to_a_smaller_rank(tmp_path):
    """PEFT's own function pads the grid, too."""
    expected = save_for_hotswap(tmp_path, gralora_config(2, r=4, lora_alpha=3, target_modules=["layer"]), seed=1)
    model = adapted(one_layer(TWO), gralora_config(2, r=8, target_modules=["layer"]), seed=2)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    assert_close64(model(random_input(7, 40)), expected)


OTHER_GRIDS = {
    "other-k": (gralora_config(2, r=8), gralora_config(4, r=8), "gralora_k, 2 != 4"),
    "other-k-of-a-layer": (
        gralora_config(2, r=8),
        gralora_config(2, r=8, gralora_k_pattern={"layer": 4}),
        "gralora_k_pattern, {} != {'layer': 4}",
    ),
    "other-hybrid": (gralora_config(2, r=8), gralora_config(2, r=8, hybrid_r=2), "hybrid_r, 0 != 2"),
    "gralora-to-plain": (gralora_config(2, r=8), peft.LoraConfig(r=8), "use_gralora"),
    "plain-to-gralora": (peft.LoraConfig(r=8), gralora_config(2, r=8), "use_gralora"),
    "one-block-to-plain": (gralora_config(1, r=8), peft.LoraConfig(r=8), "use_gralora"),
}


@pytest.mark.parametrize("old, new, message", OTHER_GRIDS.values(), ids=OTHER_GRIDS)
def test_hotswap_to_another_grid_is_refused(old, new, message, tmp_path):
    """Hotswapping to another k or hybrid_r, or between plain and GraLoRA, raises and changes nothing."""
    old.target_modules = new.target_modules = ["layer"]
    save_for_hotswap(tmp_path, new, seed=1)
    model = adapted(one_layer(TWO), old, seed=2)
    with assert_unchanged(model, random_input(7, 40)), pytest.raises(ValueError, match=message):
        hotswap_adapter(model, tmp_path, adapter_name="default")


# Whole models


@models
def test_refused_config_leaves_a_model_usable(model_name):
    """After an error at injection nothing of the model has changed, and a fitting config can be used."""
    base, ids = MODELS[model_name](), token_ids(2, 7)
    with assert_unchanged(base, ids), pytest.raises(ValueError, match=r"gralora_k=5 .*use one of gralora_k=\[1, 2"):
        get_peft_model(base, gralora_config(5, r=10, target_modules=TARGETS[model_name]))
    model = adapted(base, gralora_config(2, r=10, target_modules=TARGETS[model_name]))
    assert model(ids).logits.isfinite().all()


@models
@takes_this_peft
def test_refused_config_leaves_a_transformers_model_usable(model_name):
    """The same for transformers' add_adapter (which marks the model as adapted before it tries, so PEFT goes on)."""
    base, ids = MODELS[model_name](), token_ids(2, 7)
    logits = base(ids).logits
    with pytest.raises(ValueError, match="gralora_k=5 must divide"):
        base.add_adapter(gralora_config(5, r=10, target_modules=TARGETS[model_name]), adapter_name="bad")
    assert not adapter_layers(base) and torch.equal(base(ids).logits, logits)
    model = adapted(base, gralora_config(2, r=10, target_modules=TARGETS[model_name]))
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, logits)


def tiny_mixtral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB, **sizes, **heads, experts_implementation="eager"))


def test_attention_of_a_mixture_of_experts_model():
    """The plain linear layers of a mixture-of-experts model can be adapted."""
    model, ids = tiny_mixtral().double(), token_ids(2, 7)
    model = adapted(model, gralora_config(2, target_modules=["q_proj", "o_proj"]))
    logits = model(ids).logits
    assert_close64(model.merge_and_unload()(ids).logits, logits)


@models
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing(model_name, reentrant):
    """Gradient checkpointing changes no gradient, with dropout too."""
    gradients = []
    for checkpointing in (True, False):
        config = gralora_config(2, hybrid_r=2, target_modules=TARGETS[model_name], lora_dropout=0.2)
        model = adapted(MODELS[model_name](torch.float64, use_cache=False), config).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        ids = token_ids(2, 7)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(model).items()})
    for name, grad in gradients[0].items():
        assert_close64(grad, gradients[1][name])
        assert grad.any()


@models
def test_generate(model_name):
    """Greedy generation gives the merged model's tokens, not the base model's."""
    model = adapted(MODELS[model_name](torch.float64), gralora_config(2, hybrid_r=2, target_modules="all-linear"))
    ids = token_ids(2, 5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    generated = model.generate(input_ids=ids, **options)
    assert generated.shape == (2, 17)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=ids, **options), generated)
    assert torch.equal(model.merge_and_unload().generate(input_ids=ids, **options), generated)


@models
def test_generate_with_a_mixed_batch(model_name):
    """With adapter_names every row of a batch is generated with its own adapter."""
    model = adapted(MODELS[model_name](torch.float64), gralora_config(2, target_modules="all-linear"))
    model.add_adapter("stock", peft.LoraConfig(r=4, target_modules="all-linear"))
    randomize(model, "stock", seed=1)
    ids = token_ids(1, 5).repeat(3, 1)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    mixed = model.generate(input_ids=ids, adapter_names=["__base__", "default", "stock"], **options)
    with model.disable_adapter():
        assert torch.equal(mixed[0], model.generate(input_ids=ids, **options)[0])
    for row, adapter in [(1, "default"), (2, "stock")]:
        model.set_adapter(adapter)
        assert torch.equal(mixed[row], model.generate(input_ids=ids, **options)[0])
    assert len({tuple(row.tolist()) for row in mixed}) == 3


@models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter_in_float32", [True, False], ids=["float32-adapter", "half-adapter"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "no-autocast"])
def test_training_in_half_precision(model_name, dtype, adapter_in_float32, autocast):
    """A half-precision model trains with either adapter dtype: all gradients are finite and none is zero."""
    config = gralora_config(2, hybrid_r=2, target_modules="all-linear")
    model = adapted(MODELS[model_name](dtype), config, autocast_adapter_dtype=adapter_in_float32).train()
    ids = token_ids(2, 7)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        loss = model(ids, labels=ids).loss
    loss.backward()
    for name, p in adapter_parameters(model).items():
        assert p.dtype == p.grad.dtype == (torch.float32 if adapter_in_float32 else dtype), name
        assert p.grad.isfinite().all() and p.grad.any(), name


@models
def test_training_reduces_the_loss(model_name):
    """A few steps on one batch reduce the loss, move every adapter tensor, and leave the base weights alone."""
    model = get_peft_model(MODELS[model_name](), gralora_config(2, hybrid_r=2, target_modules="all-linear"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    ids, losses = token_ids(2, 9), []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
    adapter = adapter_parameters(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (name in adapter), name


def test_status_tells_of_gralora_layers():
    """PEFT's status report knows GraLoRA layers as LoRA layers."""
    model = get_peft_model(MODELS["llama"](), gralora_config(2, target_modules=TARGETS["llama"]))
    status = model.get_model_status()
    assert (status.adapter_model_type, status.peft_types) == ("GraloraLoraModel", {"default": "LORA"})
    assert status.num_adapter_layers == 6 and status.trainable_params == model.get_nb_trainable_parameters()[0]
    stock = get_peft_model(MODELS["llama"](), peft.LoraConfig(r=8, target_modules=TARGETS["llama"]))
    layers = model.get_layer_status()
    assert [layer.name for layer in layers] == [layer.name for layer in stock.get_layer_status()]
    assert all(layer.enabled and layer.requires_grad == {"default": True} for layer in layers)


@models
def test_conversion_by_peft_to_a_plain_lora(model_name):
    """PEFT's convert_to_lora gives a plain LoRA with the same output, at a rank that holds dW."""
    model = adapted(MODELS[model_name](), gralora_config(2, r=4, target_modules=TARGETS[model_name]))
    config, tensors = peft.convert_to_lora(model, rank=8)
    plain = get_peft_model(MODELS[model_name](), config)
    set_peft_model_state_dict(plain, tensors)
    ids = token_ids(2, 7)
    torch.testing.assert_close(plain.eval()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
