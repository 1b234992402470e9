"""Parameters adapted through target_parameters: the fused experts of mixture-of-experts models, one grid an expert."""

import copy
import re

import peft
import pytest
import torch
from helpers import (
    VOCAB,
    OneLayer,
    adapted,
    adapter_layers,
    adapter_parameters,
    assert_close64,
    assert_unchanged,
    gralora_config,
    naive_delta,
    naive_update,
    random_input,
    token_ids,
)
from kinds_table import EXPERTS, IN, OUT, Experts, each_expert
from kinds_table import naive_experts as unscaled
from peft import PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
QWEN = {"moe_intermediate_size": 8, "num_experts": 4}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"moe_intermediate_size": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
ARCHITECTURES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"head_dim": 8} | QWEN),
    "gpt-oss": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 4, "head_dim": 8}),
    "deepseek-v3": (DeepseekV3ForCausalLM, DeepseekV3Config, LATENT | ROUTED | {"num_key_value_heads": 2}),
}
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def tiny(architecture, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model, config, sizes = ARCHITECTURES[architecture]
    options = {"experts_implementation": "eager"} | options  # the default takes no float64
    return model(config(**COMMON | sizes | options)).to(dtype).eval()


def experts_config(k=2, r=8, hybrid_r=2, parameters=("layer.weight",), modules=(), **fields):
    return gralora_config(k, r, hybrid_r, target_modules=list(modules), target_parameters=list(parameters), **fields)


def wrappers(model):
    return [layer for layer in adapter_layers(model) if isinstance(layer, lora.ParamWrapper)]


def naive_experts(layer, adapter="default"):
    """dW of a wrapper's parameter by the block loop, in the parameter's layout."""
    return layer.scaling[adapter] * unscaled(layer, adapter)


@torch.no_grad()
def naive_merge(model):
    """The base model with every expert's dW added by the block loop."""
    model = copy.deepcopy(model)
    for layer in wrappers(model):
        layer.get_param().add_(naive_experts(layer))
    return model.unload()


# One layer


def test_trained_base_parameter():
    """If a user trains the parameter beside the adapter, it gets its gradient, and goes on to require one."""
    model = adapted(OneLayer(Experts(False)), experts_config()).train()
    (layer,) = wrappers(model)
    layer.get_param().requires_grad_()
    expected = Experts(False)
    expected.weight.data = (layer.get_param() + naive_experts(layer)).detach()
    x = random_input(7, IN)
    for module in (model, expected):
        module(x).square().sum().backward()
    assert_close64(layer.get_param().grad, expected.weight.grad)
    assert layer.get_param().requires_grad


def test_parameter_of_two_dimensions():
    """A linear layer's weight adapted as a parameter is one expert, `[O, I]`: the output is the linear grid's."""
    base = OneLayer(nn.Linear(IN, OUT)).double()
    x = random_input(5, IN)
    model = adapted(copy.deepcopy(base), experts_config())
    (layer,) = wrappers(model)
    (factors,) = each_expert(layer)
    assert_close64(model(x), base(x) + 2 * naive_update(x, factors))
    assert_close64(model.merge_and_unload()(x), base(x) + 2 * naive_update(x, factors))


def test_single_expert_in_three_dimensions():
    """A parameter `[1, I, O]` works too, where dW must get its third dimension back."""
    base = Experts(True)
    base.weight = nn.Parameter(base.weight[:1])
    base.forward = lambda x: x @ base.weight[0]
    model = adapted(OneLayer(base), experts_config())
    (layer,) = wrappers(model)
    (factors,) = each_expert(layer)
    x = random_input(5, IN)
    assert layer.get_delta_weight("default").shape == (1, IN, OUT)
    assert_close64(layer.get_delta_weight("default")[0], 2 * naive_delta(factors).T)
    assert_close64(model(x), x @ base.weight[0] + 2 * naive_update(x, factors))


def test_start_is_that_of_plain_lora():
    """The elements are those of PEFT's plain LoRA, expert by expert, A times sqrt(k); the output is the base's."""
    models = []
    for config in (
        experts_config(2, 8, 0),
        peft.LoraConfig(r=8, target_modules=[], target_parameters=["layer.weight"]),
    ):
        torch.manual_seed(0)
        models.append(get_peft_model(OneLayer(Experts(False)), config))
    ours, plain = (wrappers(model)[0] for model in models)
    A = plain.lora_A["default"].weight.unflatten(0, (EXPERTS, 8))  # [E, r, I]
    A_ours = ours.lora_A["default"].weight  # [E, k, I/k, r]
    for e in range(EXPERTS):
        assert_close64(A_ours[e].flatten(0, 1).T, 2**0.5 * A[e])
    assert not ours.lora_B["default"].weight.any()
    x = random_input(7, IN)
    assert_close64(models[0](x), models[1](x))
    count = [sum(p.numel() for p in adapter_parameters(model).values()) for model in models]
    assert count[0] == count[1] == EXPERTS * 8 * (IN + OUT)


# Architectures


@architectures
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_architectures(architecture, implementation):
    """Both parameters of the experts, one wrapper in the other, and a linear layer: as merged by the block loop."""
    base = tiny(architecture, experts_implementation=implementation)
    model = adapted(copy.deepcopy(base), experts_config(parameters=BOTH, modules=["o_proj"]))
    layers = wrappers(model)
    assert len(layers) == 2 * (1 if architecture == "deepseek-v3" else 2)  # whose first layer has no experts
    ids = token_ids(2, 7)
    logits = model(ids).logits
    expected = naive_merge(model)  # o_proj is unloaded there, so it is merged by itself
    attention = copy.deepcopy(model)
    attention.merge_adapter()
    for name, p in attention.named_parameters():
        if ".o_proj." in name and name.endswith("base_layer.weight"):
            place = name.removeprefix("base_model.model.").replace(".base_layer", "")
            expected.get_parameter(place).data = p.data
    assert_close64(logits, expected(ids).logits)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base(ids).logits)
        assert (base(ids).logits - logits).abs().max() > 0.01
    model.merge_adapter()
    assert_close64(model(ids).logits, logits)
    model.unmerge_adapter()
    assert_close64(model(ids).logits, logits)
    assert_close64(model.merge_and_unload(safe_merge=True)(ids).logits, logits)


@architectures
def test_default_implementation_of_experts(architecture):
    """transformers' default, which reads the parameters without calling the module's forward, sees the adapter too."""
    logits, ids = [], token_ids(2, 7)
    for implementation in (None, "eager"):
        base = tiny(architecture, torch.float32, experts_implementation=implementation)
        model = adapted(base, experts_config(parameters=BOTH))
        logits.append(model(ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (model(ids).logits - logits[0]).abs().max() > 0.01


@architectures
@pytest.mark.parametrize("low_memory", [False, True])
def test_save_and_load(architecture, low_memory, tmp_path):
    """A fresh model with the saved adapter has the same tensors, bit by bit, and the same output."""
    model = adapted(tiny(architecture), experts_config(parameters=BOTH))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(architecture), tmp_path, low_cpu_mem_usage=low_memory)
    saved = adapter_parameters(model)
    for name, p in adapter_parameters(loaded).items():
        assert torch.equal(p, saved.pop(name)), name
    assert not saved
    ids = token_ids(2, 7)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_gradients_in_an_architecture():
    """The gradients through nested wrappers and the router are those of weights merged differentiably."""
    model = adapted(tiny("qwen3-moe"), experts_config(parameters=BOTH)).train()
    ids = token_ids(2, 7)
    merged = {}
    for layer in wrappers(model):
        place = next(name for name, m in model.named_modules() if m is layer.get_base_layer())
        key = f"{place.removeprefix('base_model.model.').replace('.base_layer', '')}.{layer.parameter_name}"
        merged[key] = layer.get_param() + naive_experts(layer)
    base = copy.deepcopy(model).unload()
    loss = torch.func.functional_call(base, merged, (ids,)).logits.square().sum()
    parameters = list(adapter_parameters(model).values())
    expected = torch.autograd.grad(loss, parameters)
    gradients = torch.autograd.grad(model(ids).logits.square().sum(), parameters)
    for grad, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-9)
        assert grad.any()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "w1", "w2", "w3"]], ids=["all-linear", "experts"])
def test_targets_that_peft_makes_parameters_of(targets):
    """PEFT makes target_parameters of the experts' former linear layers, and doubles r for the fused ones."""
    model = adapted(tiny("mixtral"), gralora_config(2, target_modules=targets))
    ranks = {layer.parameter_name: layer.r["default"] for layer in wrappers(model)}
    assert ranks["gate_up_proj"] == 16 and ranks["down_proj"] == 8
    ids = token_ids(2, 7)
    logits = model(ids).logits
    assert_close64(model.merge_and_unload()(ids).logits, logits)


def test_half_precision_base_with_float32_adapter():
    """PEFT's default, float32 factors on bfloat16 experts: the parameter is W + dW, rounded to bfloat16."""
    model = adapted(tiny("gpt-oss", torch.bfloat16), experts_config(parameters=BOTH))
    layer = wrappers(model)[0]
    assert layer.lora_A["default"].weight.dtype == torch.float32
    exact = layer.get_param().double() + naive_experts(layer)
    model.merge_adapter()
    error = (layer.get_param().double() - exact).abs()
    assert (error <= 2**-7 * (exact.abs() + naive_experts(layer).abs())).all()
    assert model(token_ids(2, 7)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("transposed", [False, True], ids=["EOI", "EIO"])
def test_experts_of_8_bits(transposed):
    """On float8 experts the factors are float32, and the forward pass sees W + dW rounded once."""
    base = Experts(transposed)
    base.weight.data = base.weight.data.to(torch.float8_e4m3fn)
    base.forward = lambda x: base.weight.double()
    model = adapted(OneLayer(base), experts_config())
    (layer,) = wrappers(model)
    assert layer.lora_A["default"].weight.dtype == layer.lora_B["default"].weight.dtype == torch.float32
    exact = base.weight.double() + naive_experts(layer).double()
    error = (model(torch.zeros(1)) - exact).abs()
    assert (error <= 2**-4 * exact.abs() + 2**-9).all()
    assert (exact - base.weight.double()).abs().max() > 1


# What is refused


REFUSED = {
    "k": (
        lambda: OneLayer(Experts(False)),
        {"k": 8, "r": 16, "hybrid_r": 0},
        ["layer.weight", "in_features=12", "[1, 2, 4]"],
    ),
    "k-transposed": (lambda: OneLayer(Experts(True)), {"k": 8, "r": 16, "hybrid_r": 0}, ["in_features=12", "layer.w"]),
    "dropout": (lambda: OneLayer(Experts(False)), {"lora_dropout": 0.1}, ["lora_dropout=0.1", "layer.weight"]),
    "bias": (lambda: OneLayer(Experts(False)), {"lora_bias": True}, ["lora_bias=True", "layer.weight"]),
    "transposing": (lambda: OneLayer(Experts(False)), {"fan_in_fan_out": True}, ["fan_in_fan_out", "layer.weight"]),
    "dimensions": (
        lambda: OneLayer(nn.Conv2d(IN, OUT, 1)),
        {"parameters": ["layer.weight"]},
        ["layer.weight", "Conv2d", "4 dimensions"],
    ),
    "parametrised": (
        lambda: OneLayer(nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT))),
        {},
        ["layer.weight", "parametrised"],
    ),
    "both": (lambda: OneLayer(nn.Linear(IN, OUT)), {"modules": ["layer"]}, ["layer.weight", "target_modules"]),
}


@pytest.mark.parametrize("build, fields, parts", REFUSED.values(), ids=REFUSED)
def test_refused(build, fields, parts):
    """What does not fit is refused by the parameter's name, before anything is changed."""
    torch.manual_seed(0)
    model = build().double()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        get_peft_model(model, experts_config(**fields))
    for part in parts:
        assert part in str(error.value)
    assert not adapter_layers(model) and state.keys() == model.state_dict().keys()


def test_second_adapter_that_does_not_fit_changes_nothing():
    model = adapted(OneLayer(Experts(False)), experts_config())
    with assert_unchanged(model, random_input(7, IN)), pytest.raises(ValueError, match=r"gralora_k=8.*layer\.weight"):
        model.add_adapter("other", experts_config(8, 16, 0))
    with assert_unchanged(model, random_input(7, IN)), pytest.raises(ValueError, match="same set of parameters"):
        model.add_adapter("other", experts_config(parameters=["layer.weight", "other.weight"]))


def test_parameter_of_an_adapted_layer_is_refused():
    """A parameter whose layer has a LoRA already is refused, as PEFT cannot nest the two."""
    model = adapted(OneLayer(nn.Linear(IN, OUT)).double(), gralora_config(2, target_modules=["layer"]))
    with assert_unchanged(model, random_input(7, IN)), pytest.raises(ValueError, match="'layer'.*not a valid target"):
        model.add_adapter("other", experts_config())  # PEFT's error


def test_auto_k_counts_the_experts():
    """gralora_k="auto" takes for experts a k that divides their sizes; 64 ranks give other layers 4."""
    config = experts_config("auto", 64, 0, parameters=BOTH, modules=["q_proj"])
    sizes = {"hidden_size": 16, "intermediate_size": 6}
    model = get_peft_model(tiny("mixtral", **sizes), config)
    settled = model.peft_config["default"]
    assert settled.of_layer("gralora_k", "model.layers.0.self_attn.q_proj") == 4
    assert {layer.lora_A["default"].weight.shape[1] for layer in wrappers(model)} == {2, 4}
    assert re.search(r"ExpertsDown\(experts=4, in=6, k=2, r=64, hybrid_r=0\)", repr(model))
