"""The names of PEFT, transformers and torch that may change: each has the signature and the effect that we rely on.

A test that fails here names what has moved; `gralora/seam.py` and `gralora/ops/torch_seam.py` say what it must do.
"""

import argparse
import ast
import importlib
import importlib.util
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from helpers import (
    Case,
    OneLayer,
    adapted,
    adapter_layers,
    case_config,
    factors_of,
    gralora_config,
    naive_delta,
    naive_update,
    one_layer,
    only_layer,
    random_input,
    randomize,
    tiny_llama,
    token_ids,
)
from peft import PeftConfig, PeftType, get_peft_model
from peft.helpers import DoraCaching
from peft.tuners import lora
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import GptOssConfig, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments
from transformers.integrations import moe
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import gralora
from gralora import kinds, seam, unsloth
from gralora.attention import GranularOutProjection
from gralora.dora import FusedDora
from gralora.kinds import KINDS
from gralora.model import GraloraModel
from gralora.ops import torch_seam
from gralora.promote import Promoted

SOURCE = Path(gralora.__file__).parent
CASE = Case(4, 10, 2, 16, 24)


def plain_lora(model: nn.Module, **fields: Any) -> peft.PeftModel:
    """A stock LoRA with random factors."""
    return randomize(get_peft_model(model, peft.LoraConfig(r=4, **{"target_modules": ["layer"]} | fields)))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 8, 4))  # [E, O, I]

    def forward(self, x):
        return torch.einsum("eoi,ti->eto", self.weight, x)


# Signatures: the calls that we make, or that are made of ours, can be made


def call(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


SIGNATURES: dict[str, tuple[Callable[..., Any], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "LoraModel._create_and_replace": (
        lora.LoraModel._create_and_replace,
        call(0, "config", "adapter", "target", "target_name", "parent", current_key="key", parameter_name="weight"),
    ),
    "check_adapters_to_merge": (seam.check_adapters_to_merge, call("layer", ["adapter"])),
    "check_hotswap_configs_compatible": (seam.check_hotswap_configs_compatible, call("old", "new")),
    "get_pattern_key": (seam.get_pattern_key, call(["pattern"], "layer")),
    "hotswap_adapter_from_state_dict": (
        seam.hotswap_adapter_from_state_dict,
        call("model", {}, "adapter", "config"),
    ),
    "in_out_features": (seam.in_out_features, call("layer")),
    "prepare_model_for_compiled_hotswap": (
        seam.prepare_model_for_compiled_hotswap,
        call("model", target_rank=8, config=None, check_compiled="error"),
    ),
    "DoraLinearLayer.forward": (
        seam.DoraLinearLayer.forward,
        call(0, "x", lora_A=1, lora_B=2, scaling=1.0, base_layer=3, base_result=None, adapter_name="default"),
    ),
    "LoraVariant.forward": (seam.LoraVariant.forward, call("module", "adapter", "x", "result")),
    "LoraVariant.merge_safe": (seam.LoraVariant.merge_safe, call("module", "adapter", "weight")),
    "LoraVariant.merge_unsafe": (seam.LoraVariant.merge_unsafe, call("module", "adapter", "weight")),
    "LoraVariant.unmerge": (seam.LoraVariant.unmerge, call("module", "adapter", "weight")),
    "Embedding._embed": (lora.Embedding._embed, call(0, "ids", "weight")),
    "Embedding._get_embed_scale": (lora.Embedding._get_embed_scale, call(0)),
    "ParamWrapper._remove_parametrizations": (lora.ParamWrapper._remove_parametrizations, call(0)),
    "type_validator": (seam.type_validator, call("name", 1, int)),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    """The function takes the arguments that we give it, or that ours in its place are given."""
    function, (args, kwargs) = SIGNATURES[name]
    inspect.signature(function).bind(*args, **kwargs)


def overrides() -> dict[str, tuple[type, type, str]]:
    """Every attribute of PEFT's classes that ours, in front of them, take the place of."""
    pairs = {(GraloraModel, lora.LoraModel), (GranularOutProjection, lora.Linear), (FusedDora, seam.DoraLinearLayer)}
    for kind in KINDS:
        stock = kind.mixin.peft_class
        ours = {kind.mixin, kind.fused} - {None}
        pairs |= {(mixin, one) for mixin in ours for one in (stock if isinstance(stock, tuple) else (stock,))}
    return {
        f"{ours.__name__}.{name} over {stock.__name__}": (ours, stock, name)
        for ours, stock in pairs
        for cls in ours.__mro__
        if issubclass(cls, Promoted)
        for name in vars(cls)
        if not name.startswith("__") and hasattr(stock, name)
    }


@pytest.mark.parametrize("which", sorted(overrides()))
def test_override_is_meant(which):
    """Ours has the place of a method of PEFT's that is in the list, and takes what PEFT's takes."""
    ours, stock, name = overrides()[which]
    assert name in seam.OVERRIDES, f"{which}: PEFT has got this name; rename ours, or list it"
    theirs, own = inspect.getattr_static(stock, name), inspect.getattr_static(ours, name)
    if isinstance(theirs, property):
        assert isinstance(own, property)
        return
    own_parameters = inspect.signature(own).parameters.values()
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in own_parameters)
    takes_any_keyword = any(p.kind is p.VAR_KEYWORD for p in own_parameters)
    own_names = [p.name for p in own_parameters]
    for position, p in enumerate(inspect.signature(theirs).parameters.values()):
        if p.kind is p.VAR_KEYWORD:
            assert takes_any_keyword
        elif p.kind is p.KEYWORD_ONLY or position >= len(own_names) or own_names[position] != p.name:
            assert p.name in own_names or takes_any or takes_any_keyword, f"{which}: {p.name} is new"


def test_every_override_exists():
    """No name in the list has gone from PEFT: ours would be called by nobody, silently."""
    assert set(seam.OVERRIDES) == {name for _, _, name in overrides().values()}


# What PEFT calls of ours. Each is watched where PEFT's own class is at work.


def watch(monkeypatch: pytest.MonkeyPatch, cls: type, name: str) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    original = getattr(cls, name)

    def watched(self, *args, **kwargs):
        calls.append((args, kwargs))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, name, watched)
    return calls


def test_activate_lora(monkeypatch):
    """A forward pass of ParamWrapper enters `_activate_lora`, within which the parameter is W + dW."""
    model = plain_lora(OneLayer(Experts()), target_modules=[], target_parameters=["layer.weight"])
    calls, wrapper, seen = watch(monkeypatch, lora.ParamWrapper, "_activate_lora"), only_layer(model), []
    experts = wrapper.get_base_layer()
    experts.register_forward_pre_hook(lambda module, args: seen.append(module.weight.detach().clone()))
    model(torch.randn(5, 4))
    assert [list(args[0]) for args, _ in calls] == [["default"]]
    torch.testing.assert_close(seen[0], experts.weight + wrapper.get_delta_weight("default"))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_did_swap_in_out_features(is_transposed):
    """The flag of ParamWrapper says that a parameter of three dimensions is `[E, O, I]`."""
    experts = Experts()
    experts.is_transposed = is_transposed
    experts.weight = nn.Parameter(
        experts.weight.detach().mT.contiguous() if is_transposed else experts.weight.detach()
    )
    model = get_peft_model(
        OneLayer(experts), peft.LoraConfig(r=2, target_modules=[], target_parameters=["layer.weight"])
    )
    wrapper = only_layer(model)
    assert wrapper._did_swap_in_out_features is not is_transposed
    assert wrapper.lora_A["default"].weight.shape == (3 * 2, 4) and wrapper.lora_B["default"].weight.shape[0] == 8
    assert wrapper.num_experts == 3 and wrapper.parameter_name == "weight"


def test_remove_parametrizations():
    """`_remove_parametrizations` takes back what register_parametrization did to the parameter."""
    model = plain_lora(OneLayer(Experts()), target_modules=[], target_parameters=["layer.weight"])
    wrapper = only_layer(model)
    before = wrapper.get_param()
    nn.utils.parametrize.register_parametrization(wrapper.get_base_layer(), "weight", nn.Identity())
    wrapper._remove_parametrizations()
    assert wrapper.get_param() is before and not hasattr(wrapper.get_base_layer(), "parametrizations")


def test_check_merge_allowed(monkeypatch):
    """`_check_merge_allowed` is asked before anything is merged."""
    model = plain_lora(OneLayer(nn.Linear(4, 6)))
    calls = watch(monkeypatch, lora.LoraModel, "_check_merge_allowed")
    merges = watch(monkeypatch, lora.Linear, "merge")
    model.merge_adapter()
    model.unmerge_adapter()
    model.merge_and_unload()
    assert len(calls) == 2 and len(merges) == 2


def test_embedding_calls(monkeypatch):
    """`_mixed_batch_forward` computes batches with adapter_names; `_embed` and `_get_embed_scale` do what they say."""
    model = plain_lora(OneLayer(nn.Embedding(10, 4))).eval()
    calls, layer, ids = (
        watch(monkeypatch, lora.Embedding, "_mixed_batch_forward"),
        only_layer(model),
        token_ids(2, 3) % 10,
    )
    layer(ids, adapter_names=["default", "__base__"])
    assert [kwargs["adapter_names"] for _, kwargs in calls] == [["default", "__base__"]]
    weight = torch.randn(10, 3)
    assert torch.equal(layer._embed(ids, weight), weight[ids])
    assert layer._get_embed_scale() is None
    layer.get_base_layer().embed_scale = 3.0
    assert layer._get_embed_scale().item() == 3.0


@pytest.mark.parametrize("safe", [False, True])
def test_lora_variant(safe):
    """`lora.Embedding` asks what is in `lora_variant` for output, merged and unmerged weight."""
    asked = []

    class Variant(seam.LoraVariant):
        def forward(self, module, active_adapter, x, result, **kwargs):
            asked.append("forward")
            return result + 1

        def merge_safe(self, module, active_adapter, orig_weight):
            asked.append("merge_safe")
            return orig_weight + 1

        def merge_unsafe(self, module, active_adapter, orig_weight):
            asked.append("merge_unsafe")
            orig_weight.data += 1

        def unmerge(self, module, active_adapter, orig_weight):
            asked.append("unmerge")
            return orig_weight - 1

    model = plain_lora(OneLayer(nn.Embedding(10, 4)))
    layer = only_layer(model)
    weight = layer.get_base_layer().weight.detach().clone()
    layer.lora_variant["default"] = Variant()
    torch.testing.assert_close(model(token_ids(3) % 10), weight[token_ids(3) % 10] + 1)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(layer.get_base_layer().weight, weight + 1, check_dtype=False)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight.detach(), weight)
    assert asked == ["forward", "merge_safe" if safe else "merge_unsafe", "unmerge"]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_qkv_same_embed_dim():
    """nn.TransformerEncoderLayer in evaluation calls an attention module for which `_qkv_same_embed_dim` is False."""
    for same in (True, False):
        layer, called, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), [], torch.randn(1, 3, 8)
        layer.self_attn._qkv_same_embed_dim = same
        layer.self_attn.forward = lambda query, *args, called=called, **kwargs: called.append(1) or (query, None)
        with torch.no_grad():
            layer(x)
        assert bool(called) is not same
    assert isinstance(inspect.getattr_static(seam.MultiheadAttention, "_qkv_same_embed_dim"), property)


@pytest.mark.parametrize("safe", [False, True])
def test_get_delta_weight_is_what_merging_asks(monkeypatch, safe):
    """`merge` adds what `get_delta_weight` gives, and asks it once; `unmerge` subtracts it."""
    for base in (nn.Linear(4, 6), seam.Conv1D(6, 4), nn.Embedding(6, 4), nn.Conv1d(4, 6, 2), nn.Conv2d(4, 6, 1)):
        model = plain_lora(OneLayer(base))
        layer = only_layer(model)
        before = layer.get_base_layer().weight.detach().clone()
        monkeypatch.setattr(type(layer), "get_delta_weight", lambda self, adapter: torch.full_like(self.weight, 2.0))
        calls = watch(monkeypatch, type(layer), "get_delta_weight")
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(layer.get_base_layer().weight.detach(), before + 2)
        assert len(calls) == 1
        model.unmerge_adapter()
        torch.testing.assert_close(layer.get_base_layer().weight.detach(), before)
        monkeypatch.undo()


def test_other_overrides_are_called(monkeypatch, tmp_path):
    """Whole-adapter operations of PeftModel come to the methods of LoraModel and its layers that we override."""
    names = ("set_adapter", "delete_adapter", "add_weighted_adapter", "subtract_mutated_init", "merge_adapter")
    resolved = watch(monkeypatch, lora.LoraLayer, "resolve_lora_variant")
    model = plain_lora(OneLayer(nn.Linear(4, 6)))
    assert len(resolved) == 1
    calls = {name: watch(monkeypatch, lora.LoraModel, name) for name in names}
    layer_calls = {name: watch(monkeypatch, lora.Linear, name) for name in ("forward", "merge", "unmerge")}
    converted = watch(monkeypatch, lora.Linear, "supports_lora_conversion")
    model.add_weighted_adapter(["default"], [1.0], "second", combination_type="cat")
    model.set_adapter("default")
    model.delete_adapter("second")
    initial = plain_lora(OneLayer(nn.Linear(4, 6)), init_lora_weights="pissa")
    initial.peft_config["default"].init_lora_weights = True
    initial.save_pretrained(tmp_path / "initial")
    initial.peft_config["default"].init_lora_weights = "pissa"
    initial.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "initial")
    model(torch.randn(2, 4))
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(calls.values()) and all(layer_calls.values()), {n: len(c) for n, c in (calls | layer_calls).items()}
    peft.convert_to_lora(model, rank=2)
    assert converted


# Configs, targets, layers


def test_is_from_file(monkeypatch, tmp_path):
    """A config built by a user is told from one that PEFT builds from a file; PEFT builds the class in the mapping."""
    seen = []

    class Recording(peft.LoraConfig):
        def __post_init__(self):
            seen.append(seam.is_from_file(self))
            super().__post_init__()

    Recording(r=4).save_pretrained(tmp_path)
    monkeypatch.setitem(seam.PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.LORA, Recording)
    assert type(PeftConfig.from_pretrained(tmp_path)) is Recording
    assert seen == [False, True]


def test_config_mapping_and_hotswap_keys():
    """`import gralora` has put its class into the mapping, and its fields into the list that hotswapping compares."""
    assert seam.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is gralora.LoraConfig
    for name, other in [("use_lora", 8), ("gralora_k", 4), ("hybrid_r", 2), ("gralora_scaling", "matched")][1:]:
        assert name in seam.CONFIG_KEYS_TO_CHECK[PeftType.LORA]
        old, new = gralora_config(2, 8), gralora_config(2, 8)
        seam.check_hotswap_configs_compatible(old, new)
        setattr(new, name, other)
        with pytest.raises(ValueError, match=name):
            seam.check_hotswap_configs_compatible(old, new)


def test_get_pattern_key():
    """A pattern matches a whole name, or what follows a dot in it; the first that does is taken."""
    assert seam.get_pattern_key(["q_proj", "proj"], "model.q_proj") == "q_proj"
    assert seam.get_pattern_key(["proj"], "model.q_proj") == "model.q_proj"
    assert seam.get_pattern_key([r"layers\.1\.q_proj"], "model.layers.1.q_proj") == r"layers\.1\.q_proj"


def test_is_targeted():
    """target_modules, exclude_modules and layers_to_transform are all looked at, by names' ends."""
    config = peft.LoraConfig(target_modules=["q_proj"], exclude_modules=["1.q_proj"])
    found = [seam.is_targeted(config, f"layers.{name}") for name in ("0.q_proj", "1.q_proj", "0.k_proj")]
    assert found == [True, False, False]
    config = peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1])
    assert [seam.is_targeted(config, f"model.layers.{n}.q_proj") for n in range(3)] == [False, True, False]


def test_in_out_features():
    """Features of every kind of base layer are (in, out)."""
    layers = nn.Linear(3, 5), seam.Conv1D(5, 3), nn.Embedding(3, 5), nn.Conv1d(3, 5, 2), nn.Conv2d(3, 5, 1)
    assert [seam.in_out_features(layer) for layer in layers] == [(3, 5)] * 5


def test_Conv1D():
    """transformers' Conv1D multiplies by its weight `[in, out]` as it is."""
    layer, x = seam.Conv1D(5, 3), torch.randn(2, 3)
    assert layer.weight.shape == (3, 5)
    torch.testing.assert_close(layer(x), x @ layer.weight + layer.bias)


def test_create_and_replace_is_the_way_into_a_model(monkeypatch):
    """Every adapter of a layer or parameter passes `_create_and_replace`; then the parent has the LoRA layer."""
    seen, experts = [], Experts()
    monkeypatch.setattr(lora.LoraModel, "_create_and_replace", lora.LoraModel._create_and_replace)  # put back later

    def wrap(stock):
        def wrapped(self, config, adapter, target, target_name, parent, current_key, **kwargs):
            stock(self, config, adapter, target, target_name, parent, current_key=current_key, **kwargs)
            made = getattr(parent, target_name)
            seen.append((adapter, current_key, kwargs.get("parameter_name"), isinstance(made, lora.LoraLayer)))

        return wrapped

    seam.wrap_create_and_replace(wrap)
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4), "experts": experts})
    config = peft.LoraConfig(r=2, target_modules=["second", "first"], target_parameters=["experts.weight"])
    get_peft_model(model, config).add_adapter("more", peft.LoraConfig(r=2, target_modules=["first"]))
    assert seen == [
        ("default", "first", None, True),
        ("default", "second", None, True),
        ("default", "experts.weight", "weight", True),
        ("more", "first", None, True),
    ]


def test_check_adapters_to_merge():
    """The active adapters, or those named, without what is merged already."""
    model = plain_lora(OneLayer(nn.Linear(4, 6)))
    layer = only_layer(model)
    assert seam.check_adapters_to_merge(layer, None) == ["default"]
    assert seam.check_adapters_to_merge(layer, ["other"]) == ["other"]
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        assert seam.check_adapters_to_merge(layer, ["default", "other"]) == ["other"]
    # `GraloraLayer.merge` asks PEFT for one adapter at a time, and ignores this warning there by its text


def test_lora_layers_are_where_we_read_them():
    """What the fast path reads of a layer is in its own dictionary, and means what the properties say."""
    layer = only_layer(plain_lora(OneLayer(nn.Linear(4, 6)), lora_alpha=12))
    own = vars(layer)
    assert own["merged_adapters"] == [] and own["lora_variant"] == {} and own["scaling"] == {"default": 3.0}
    for enabled in (False, True):
        layer.enable_adapters(enabled)
        assert own["_disable_adapters"] is layer.disable_adapters is not enabled
    assert set(torch_seam.children_of(layer)) >= {"base_layer", "lora_A", "lora_B", "lora_dropout"}
    assert layer.active_adapters == ["default"]


def test_names_of_layers_that_peft_does_not_export():
    """PEFT makes these classes of these base layers."""
    cases = {
        seam.Conv1d: nn.Conv1d(4, 6, 2),
        seam.MultiheadAttention: nn.MultiheadAttention(4, 2),
        lora.Linear: seam.Conv1D(6, 4),
    }
    for cls, base in cases.items():
        assert (
            type(adapter_layers(get_peft_model(OneLayer(base), peft.LoraConfig(r=2, target_modules=["layer"])))[0])
            is cls
        )


def test_DoraLinearLayer(monkeypatch):
    """PEFT calls its magnitude module by these keywords, and adds what it returns."""
    if not seam.MERGES_DORA:
        pytest.skip("GraLoRA refuses DoRA with this PEFT")
    model = plain_lora(OneLayer(nn.Linear(4, 6)), use_dora=True).eval()
    layer, calls, x = only_layer(model), [], torch.randn(2, 4)
    dora = layer.lora_magnitude_vector["default"]
    assert type(layer.lora_variant["default"]) is seam.DoraLinearVariant
    assert type(dora) is seam.DoraLinearLayer and dora.weight.shape == (6,) and dora.fan_in_fan_out is False

    def forward(self, x, **kwargs):
        calls.append(kwargs)
        return torch.ones(2, 6)

    monkeypatch.setattr(seam.DoraLinearLayer, "forward", forward)
    torch.testing.assert_close(model(x), layer.base_layer(x) + 1)
    assert set(calls[0]) >= {"lora_A", "lora_B", "scaling", "base_layer", "base_result"}
    assert calls[0]["lora_A"] is layer.lora_A["default"] and calls[0]["scaling"] == layer.scaling["default"]


def test_dora_is_cached():
    """Inside of PEFT's context the magnitude module keeps its norms in evaluation mode, and only then."""
    model = plain_lora(one_layer(CASE, dtype=torch.float32), use_dora=True)
    magnitude = only_layer(model).lora_magnitude_vector["default"]
    for training, caching in itertools.product([False, True], repeat=2):
        model.train(training)
        with DoraCaching(caching):
            model(torch.randn(2, CASE.in_features))
            assert seam.dora_is_cached(magnitude) == bool(magnitude._dora_cache) == (caching and not training)
        magnitude._cache_clear()


def test_MERGES_DORA():
    """The version that is compared is that of the release with the right merging."""
    assert hasattr(lora.LoraLayer, "_unmerged_base_weight") == seam.MERGES_DORA


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_MERGES_4_BITS():
    """It begins the one warning that PEFT's class gives while it merges."""
    import bitsandbytes as bnb

    model = OneLayer(bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu"))
    model.is_loaded_in_4bit = True  # as transformers marks it
    layer = only_layer(plain_lora(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer.merge()
    (said,) = [str(warning.message) for warning in caught]
    assert said.startswith(seam.MERGES_4_BITS)


def test_prepare_model_for_compiled_hotswap():
    """Scalings become tensors, and plain LoRAs get the target rank."""
    model = plain_lora(OneLayer(nn.Linear(4, 6)))
    seam.prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    layer = only_layer(model)
    assert isinstance(layer.scaling["default"], torch.Tensor) and layer.lora_A["default"].weight.shape == (8, 4)


def test_hotswap_adapter_from_state_dict():
    """Tensors named as in the model's state dict, of any number of dimensions, are copied into the adapter."""
    model = adapted(OneLayer(nn.Linear(16, 24)), case_config(CASE))
    wanted = {name: torch.randn_like(t) for name, t in model.state_dict().items() if ".lora_" in name}
    seam.hotswap_adapter_from_state_dict(model, dict(wanted), "default", case_config(CASE))
    for name, t in wanted.items():
        assert torch.equal(model.state_dict()[name], t), name


# diffusers


def test_flux_expansions():
    """The two class methods of Flux pipelines take these arguments, and ours are around them."""
    flux = pytest.importorskip(seam.FLUX).FluxLoraLoaderMixin
    for name, arguments in {
        "_maybe_expand_transformer_param_shape_or_error_": ["lora_state_dict", "norm_state_dict", "prefix"],
        "_maybe_expand_lora_state_dict": ["lora_state_dict"],
    }.items():
        ours = getattr(flux, name).__func__
        stock = inspect.unwrap(ours)
        assert list(inspect.signature(stock).parameters) == ["cls", "transformer", *arguments]
        assert stock is not ours and stock.__module__ == seam.FLUX
    assert callable(seam.wrap_flux_expansions)


def test_guessed_config():
    """Of files without a config `_create_lora_config` makes one by this function, which is given the tensors."""
    name = seam.GUESSES_CONFIG[1]
    module = pytest.importorskip(seam.GUESSES_CONFIG[0])
    ours = getattr(module, name)
    stock = inspect.unwrap(ours)
    assert list(inspect.signature(stock).parameters)[:3] == ["rank_dict", "network_alpha_dict", "peft_state_dict"]
    assert stock is not ours and stock.__module__ == module.__name__
    assert name in module._create_lora_config.__code__.co_names


def test_wrap_model_card(monkeypatch):
    """PEFT's method that writes README.md into a folder is replaced on the class."""
    monkeypatch.setattr(peft.PeftModel, "create_or_update_model_card", peft.PeftModel.create_or_update_model_card)
    assert list(inspect.signature(peft.PeftModel.create_or_update_model_card).parameters) == ["self", "output_dir"]
    seam.wrap_model_card(lambda stock: (stock, "wrapped"))
    assert peft.PeftModel.create_or_update_model_card[1] == "wrapped"


def test_trl_trainer():
    """TRL's trainers inherit `create_model_card` from one class."""
    trl = pytest.importorskip("trl")
    base = getattr(importlib.import_module(seam.TRL_TRAINER), seam.TRL_TRAINER_CLASS)
    assert issubclass(trl.SFTTrainer, base) and issubclass(trl.DPOTrainer, base)
    assert "create_model_card" in vars(base) and base.create_model_card is trl.SFTTrainer.create_model_card


def test_harness_asks_git():
    """`simple_evaluate` looks the function that runs git up in its module, and it needs no arguments."""
    pytest.importorskip("lm_eval")
    module, name = seam.ASKS_GIT
    evaluator = importlib.import_module(module)
    assert name in inspect.unwrap(evaluator.simple_evaluate).__code__.co_names
    assert not inspect.signature(getattr(evaluator, name)).parameters
    assert '"git"' in inspect.getsource(getattr(evaluator, name))


def test_wrap_hotswap(monkeypatch):
    """diffusers imports the functions anew for each adapter, so that it gets those that are there."""
    loaders = pytest.importorskip("diffusers.loaders.peft")
    for name in ("hotswap_adapter_from_state_dict", "prepare_model_for_compiled_hotswap"):
        assert name not in vars(loaders) and name in inspect.getsource(loaders)
        monkeypatch.setattr(seam.hotswap, name, None)
    seam.wrap_hotswap(lambda stock: (stock, "wrapped"), print)
    assert seam.hotswap.prepare_model_for_compiled_hotswap is print
    assert seam.hotswap.hotswap_adapter_from_state_dict == (seam.hotswap_adapter_from_state_dict, "wrapped")


def test_what_preprocessing_leaves(monkeypatch):
    """The gradient and the covariance of a layer's inputs, under the seam's names, and nothing after forgetting."""
    model, x = OneLayer(nn.Linear(4, 6)), torch.randn(5, 4)
    fields = {"r": 2, "target_modules": ["layer"]}
    corda = seam.CordaConfig(prune_temporary_fields=False)
    before = set(vars(model.layer))
    preprocess_corda(model, peft.LoraConfig(init_lora_weights="corda", corda_config=corda, **fields), lambda: model(x))
    torch.testing.assert_close(getattr(model.layer, seam.COVARIANCE), (x / x.max()).T @ (x / x.max()))
    lora_ga = peft.LoraConfig(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(), **fields)
    preprocess_loraga(model, lora_ga, lambda: model(x.requires_grad_()).sum().backward())
    torch.testing.assert_close(getattr(model.layer, seam.GRADIENT), x.detach().sum(0).expand(6, 4))
    assert set(vars(model.layer)) > before
    seam.forget_preprocessing(model.layer)
    assert set(vars(model.layer)) == before


def test_corda_decomposition():
    """U S V^T is W, and U S is that of W times the damped covariance."""
    W, x = torch.randn(6, 4), torch.randn(50, 4)
    U, S, V = seam.corda_decomposition(W, x.T @ x)
    torch.testing.assert_close(U @ torch.diag(S) @ V.T, W, rtol=1e-4, atol=1e-4)
    damped = x.T @ x + 0.01 * (x.T @ x).diagonal().mean() * torch.eye(4)
    torch.testing.assert_close(S, torch.linalg.svdvals(W @ damped), rtol=1e-4, atol=1e-4)


def test_weights_as_floats_and_whole(monkeypatch):
    """`seam.dequantize_module_weight` gives an ordinary weight itself, and so does `seam.gather_params_ctx`."""
    layer = nn.Linear(4, 6)
    assert seam.dequantize_module_weight(layer) is layer.weight
    with seam.gather_params_ctx(layer.weight):
        assert layer.weight.shape == (6, 4)


def test_wrap_eva(monkeypatch):
    """PEFT's initialize_lora_eva_weights asks its module for both functions, with these arguments."""
    calls = []
    for name in ("get_eva_state_dict", "_load_eva_state_dict"):
        monkeypatch.setattr(seam.eva, name, getattr(seam.eva, name))  # restored afterwards
    seam.wrap_eva(
        lambda stock: lambda **kwargs: calls.append(kwargs) or {"found": True},
        lambda stock: lambda model, found, adapter_name: calls.append((model, found, adapter_name)),
    )
    model = plain_lora(OneLayer(nn.Linear(4, 6)), init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    peft.initialize_lora_eva_weights(model, [1])
    assert {"model", "dataloader", "adapter_name", "prepare_layer_inputs_fn"} <= calls[0].keys()
    assert calls[1] == (model, {"found": True}, "default")
    assert "peft_config" in inspect.signature(peft.get_eva_state_dict).parameters


def test_LORA_METADATA():
    assert pytest.importorskip("diffusers.loaders.lora_base").LORA_ADAPTER_METADATA_KEY == seam.LORA_METADATA


# Unsloth, which is not in the environment of the tests: `make test-trainers` runs its real functions


def test_unsloth_names(monkeypatch):
    """Stand-ins with the names of the seam: GraLoRA is left to PEFT and not read, plain LoRA is as before."""
    package, kernels, user = ModuleType("unsloth"), ModuleType(seam.UNSLOTH), ModuleType("unsloth.save")
    setattr(kernels, seam.UNSLOTH_LEAVES, lambda layer: False)
    for name in seam.UNSLOTH_READS:
        setattr(kernels, name, lambda layer: "parameters")
    setattr(user, seam.UNSLOTH_READS[1], getattr(kernels, seam.UNSLOTH_READS[1]))  # as `from .kernels import ...`
    for module in (package, kernels, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    unsloth.install_in_kernels(kernels)
    model = adapted(OneLayer(nn.Linear(16, 24)), case_config(CASE))
    layer, plain = only_layer(model), only_layer(plain_lora(OneLayer(nn.Linear(16, 24))))
    leaves = getattr(kernels, seam.UNSLOTH_LEAVES)
    assert leaves(layer) is True and leaves(plain) is False and leaves(nn.Linear(2, 2)) is False
    for module, name in ((kernels, seam.UNSLOTH_READS[0]), (user, seam.UNSLOTH_READS[1])):
        assert getattr(module, name)(plain) == "parameters"
        with pytest.raises(ValueError, match="'default' is GraLoRA.*gralora merge"):
            getattr(module, name)(layer)
    model.disable_adapter_layers()
    assert leaves(layer) is False and getattr(user, seam.UNSLOTH_READS[1])(layer) == "parameters"


def test_unsloth_writes_forwards(monkeypatch):
    """A forward written for PEFT's class, with a function of matrices in its globals, calls a grid's factors."""
    written: dict[str, Any] = {}
    body = f"def {seam.UNSLOTH_UPDATE}(result, lora_A, lora_B, dropout, x, scaling): return 'matrices'\n"
    body += "def forward(self, x): pass\n"
    compiler = ModuleType(seam.UNSLOTH_COMPILER)

    def write(options):
        exec(body, written)
        monkeypatch.setattr(lora.Linear, "forward", written["forward"])

    setattr(compiler, seam.UNSLOTH_WRITES, write)
    unsloth.install_in_compiler(compiler)
    getattr(compiler, seam.UNSLOTH_WRITES)({})
    layer = only_layer(adapted(OneLayer(nn.Linear(16, 24)), case_config(CASE)))
    down, up, x = layer.lora_A["default"], layer.lora_B["default"], torch.randn(3, 16)
    update = written[seam.UNSLOTH_UPDATE]
    assert update(0, nn.Linear(2, 2), nn.Linear(2, 2), nn.Identity(), x, 2) == "matrices"
    torch.testing.assert_close(update(1.0, down, up, nn.Identity(), x, 2), 1 + 2 * up(down(x)))


# Quantised base layers: what matters is what PEFT's layer does


class QuantisedLinear(nn.Module):
    """A stand-in for a quantised layer: its weight is stored as 8 bits and a scale."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.randn(out_features, in_features)
        self.scale = weight.abs().max() / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def dequantize(self):
        return self.weight * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dequantize())


class Backend:
    """A quantisation backend as PEFT's `QuantizationBackend` is."""

    def get_base_weight(self, base):
        return base.dequantize()

    def set_base_weight(self, layer, weight):
        base = layer.get_base_layer()
        base.scale = weight.abs().max() / 127
        base.weight.data = (weight / base.scale).round().to(torch.int8)


def merge_by_backend(self, safe_merge=False, adapter_names=None):
    """`merge` as PEFT's methods write it that have moved to quantisation backends."""
    for name in seam.check_adapters_to_merge(self, adapter_names):
        backend, base = self.quantization_backend, self.get_base_layer()
        weight = base.weight.data if backend is None else backend.get_base_weight(base)
        weight = weight + self.get_delta_weight(name)
        if backend is None:
            base.weight.data = weight
        else:
            backend.set_base_weight(self, weight)
        self.merged_adapters.append(name)


def peft_with_backends(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Make PEFT choose its ordinary layer for bitsandbytes' class, with a backend, as its other methods do."""

    def new_module(lora_config, adapter_name, target, *, r, lora_alpha, **kwargs):
        layer = lora.Linear(target, adapter_name, config=lora_config, r=r, lora_alpha=lora_alpha)
        layer.quantization_backend = backend
        return layer

    monkeypatch.setattr(lora.LoraModel, "_create_new_module", staticmethod(new_module))
    monkeypatch.setattr(lora.Linear, "merge", merge_by_backend)
    name_of = kinds._name
    monkeypatch.setattr(kinds, "_name", lambda cls: "hqq.HQQLinear" if cls is QuantisedLinear else name_of(cls))


def test_peft_that_wraps_quantised_layers_as_ordinary_ones(monkeypatch):
    """With the quantisation backend, PEFT's ordinary layer is as good as a class of its own: output, and merging."""
    peft_with_backends(monkeypatch, Backend())
    torch.manual_seed(0)
    model = adapted(OneLayer(QuantisedLinear(16, 24)), case_config(CASE))
    layer, x = only_layer(model), random_input(5, 16, dtype=torch.float32)
    before = layer.get_base_layer().dequantize()
    assert seam.stock_class(layer, Promoted) is lora.Linear and layer.is_gralora("default")
    torch.testing.assert_close(model(x), x @ before.T + 3.0 * naive_update(x, factors_of(layer)), rtol=1e-4, atol=1e-4)
    dW = 3.0 * naive_delta(factors_of(layer)).detach()
    model.merge_adapter()
    base = layer.get_base_layer()
    assert base.weight.dtype == torch.int8
    assert ((base.dequantize() - (before + dW)).abs() <= 0.51 * base.scale).all()


def test_peft_that_takes_quantised_layers_for_ordinary_ones(monkeypatch):
    """Without a backend its merge would add to packed numbers: the layer is refused, by name."""
    peft_with_backends(monkeypatch, None)
    with pytest.raises(
        ValueError, match="'layer' is a QuantisedLinear.*has wrapped as Linear, not as a quantised layer"
    ):
        get_peft_model(OneLayer(QuantisedLinear(16, 24)), case_config(CASE))


def test_layer_of_a_user_over_a_quantised_one(monkeypatch):
    """A class that is not PEFT's may do anything: refused as well."""
    peft_with_backends(monkeypatch, Backend())

    class Own(lora.Linear):
        def merge(self, *args, **kwargs):
            raise NotImplementedError

    monkeypatch.setattr(lora, "Linear", Own)
    with pytest.raises(ValueError, match="has wrapped as Own, which is no class of PEFT's"):
        get_peft_model(OneLayer(QuantisedLinear(16, 24)), case_config(CASE))


def test_writes_quantised_weights():
    """Classes that PEFT makes for quantised layers merge by themselves; its ordinary one needs a backend."""
    from peft.tuners.lora.awq import AwqLoraLinear
    from peft.tuners.lora.gptq import GPTQLoraLinear
    from peft.tuners.lora.torchao import TorchaoLoraLinear

    for cls in (AwqLoraLinear, GPTQLoraLinear, TorchaoLoraLinear):
        assert seam.writes_quantised_weights(SimpleNamespace(), cls), cls
    assert not seam.writes_quantised_weights(SimpleNamespace(), lora.Linear)
    assert seam.writes_quantised_weights(SimpleNamespace(quantization_backend=Backend()), lora.Linear)


@pytest.mark.skipif(not seam.MERGES_DORA, reason="PEFT 0.20 has no quantisation backends")
def test_quantization_backend():
    """PEFT's layers have the attribute, which is None over ordinary layers."""
    from peft.utils.quantization_utils import QuantizationBackend

    assert only_layer(plain_lora(OneLayer(nn.Linear(4, 6)))).quantization_backend is None
    assert {"get_base_weight", "set_base_weight"} <= set(vars(QuantizationBackend))


# The command's


def test_lazy_names():
    """What the command takes from transformers and huggingface_hub does what it says."""
    field = seam.HfArg(default=3, help="words", aliases=["--f"])
    assert field.default == 3 and field.metadata["help"] == "words" and field.metadata["aliases"] == ["--f"]
    assert [seam.string_to_bool(s) for s in ("yes", "True", "1", "no", "f", "0")] == [True] * 3 + [False] * 3
    with pytest.raises(argparse.ArgumentTypeError):
        seam.string_to_bool("maybe")
    assert "tensorboard" in seam.INTEGRATION_TO_CALLBACK
    assert "cosine" in [kind.value for kind in seam.SchedulerType]
    assert "adamw_torch" in [kind.value for kind in seam.OptimizerNames]
    seam.type_validator("r", 4, int | None)
    with pytest.raises(TypeError, match="r"):
        seam.type_validator("r", "4", int)


def test_prepare_inputs(tmp_path):
    """The Trainer's `_prepare_inputs` gives a batch of the same tensors, on the device of training."""
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    batch = Trainer(model=tiny_llama(), args=arguments)._prepare_inputs({"input_ids": token_ids(2, 3)})
    assert torch.equal(batch["input_ids"], token_ids(2, 3)) and batch["input_ids"].device.type == "cpu"


def test_unknown_name_is_an_attribute_error():
    """The lazy names are all there is besides those imported."""
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        seam.nothing  # noqa: B018
    assert set(seam.LAZY) <= set(seam.__all__)
    for name in seam.__all__:
        getattr(seam, name)


# torch


def test_has_global_hooks():
    """It is true while a hook on all modules is registered."""
    assert not torch_seam.has_global_hooks()
    handle = register_module_forward_hook(lambda *args: None)
    try:
        assert torch_seam.has_global_hooks()
    finally:
        handle.remove()
    assert not torch_seam.has_global_hooks()


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda *args: None),
    "forward_pre": lambda m: m.register_forward_pre_hook(lambda *args: None),
    "full_backward": lambda m: m.register_full_backward_hook(lambda *args: None),
    "full_backward_pre": lambda m: m.register_full_backward_pre_hook(lambda *args: None),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_has_hooks(kind):
    """Each kind of hook on a module is seen while it is registered, and so is a `forward` of its own."""
    module = nn.Linear(2, 2)
    assert not torch_seam.has_hooks(module)
    handle = HOOKS[kind](module)
    assert torch_seam.has_hooks(module) and torch_seam.unhooked_parameters(module) is None
    handle.remove()
    assert not torch_seam.has_hooks(module)
    assert torch_seam.unhooked_parameters(module) is torch_seam.parameters_of(module)
    module.forward = lambda x: x
    assert torch_seam.has_hooks(module)


def test_parameters_and_children_of():
    """The dictionaries hold what attributes give, also after it was set anew."""
    module = nn.Sequential(nn.Linear(2, 2))
    assert torch_seam.children_of(module) == {"0": module[0]}
    module[0].weight = nn.Parameter(torch.zeros(2, 2))
    assert torch_seam.parameters_of(module[0])["weight"] is module[0].weight
    module[0].bias = None
    assert torch_seam.parameters_of(module[0])["bias"] is None


def test_is_view():
    """What autograd takes for a view."""
    x = torch.randn(2, 3, requires_grad=True)
    assert torch_seam.is_view((2 * x)[0]) and not torch_seam.is_view(2 * x)


def test_reversed_padding():
    """The padding as nn.functional.pad takes it gives what the convolution computes."""
    for mode in ("reflect", "circular", "replicate"):
        conv, x = nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode), torch.randn(1, 2, 5, 6)
        padded = nn.functional.pad(x, torch_seam.reversed_padding(conv), mode=mode)
        torch.testing.assert_close(nn.functional.conv2d(padded, conv.weight, conv.bias), conv(x))


def test_NonDynamicallyQuantizableLinear():
    """It is the class of an attention module's out-projection, which is not called."""
    attention, called = nn.MultiheadAttention(4, 2), []
    assert type(attention.out_proj) is torch_seam.NonDynamicallyQuantizableLinear
    attention.out_proj.register_forward_hook(lambda *args: called.append(1))
    attention(*[torch.randn(3, 1, 4)] * 3)
    assert not called


def test_is_traced_and_is_exporting():
    """The body of a traced operator gets tensors without memory; export is told from compilation."""
    seen = []

    @torch.library.triton_op("gralora_test::seen", mutates_args=())
    def operator(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_seam.is_traced(x))
        return x.clone()

    operator(torch.ones(2))
    torch.compile(lambda x: operator(x) + 1, backend="aot_eager", fullgraph=True)(torch.ones(2))
    assert seen[0] is False and seen[-1] is True

    class Asks(nn.Module):
        def forward(self, x):
            return x + 1 if torch_seam.is_exporting() else x + 2

    torch._dynamo.reset()
    assert torch.equal(torch.compile(Asks(), backend="eager")(torch.zeros(2)), torch.full((2,), 2.0))
    assert torch.equal(torch.export.export(Asks(), (torch.zeros(2),)).module()(torch.zeros(2)), torch.ones(2))
    assert not torch_seam.is_exporting()


def test_saves_through_hooks():
    """True inside of gradient checkpointing and of saved_tensors_hooks."""
    seen = []

    def function(x):
        seen.append(torch_seam.saves_through_hooks())
        return 2 * x

    x = torch.ones(2, requires_grad=True)
    function(x)
    torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        function(x)
    function(x)
    assert seen == [False, True, True, False]


def test_unsafe_view():
    """The same numbers in another shape, which may be changed in place and are no view."""
    x = torch.ones(6, requires_grad=True)
    y = torch_seam.unsafe_view(2 * x, (2, 3))
    assert not torch_seam.is_view(y)
    y += 1
    y.sum().backward()
    assert torch.equal(y.detach(), torch.full((2, 3), 3.0)) and torch.equal(x.grad, torch.full((6,), 2.0))


def test_version_of():
    """It rises with every change in place, also of a view."""
    t = torch.zeros(2)
    before = torch_seam.version_of(t)
    t[0] += 1
    assert torch_seam.version_of(t) > before


TRANSFORMS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(torch.ones(2)),
    "vmap": lambda f: torch.func.vmap(f)(torch.ones(3, 2)),
    "jvp": lambda f: torch.func.jvp(f, (torch.ones(2),), (torch.ones(2),)),
    "forward_ad": lambda f: _in_forward_mode(f),
    "make_fx": lambda f: torch.fx.experimental.proxy_tensor.make_fx(f)(torch.ones(2)),
    "jit.trace": lambda f: torch.jit.trace(f, torch.ones(2), check_trace=False),
}


def _in_forward_mode(f: Callable[..., Any]) -> None:
    with torch.autograd.forward_ad.dual_level():
        f(torch.autograd.forward_ad.make_dual(torch.ones(2), torch.ones(2)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_is_transformed(name):
    """It is true inside of the transform, and not after it."""
    seen = []

    def function(x):
        seen.append(torch_seam.is_transformed())
        return x * x

    function(torch.ones(2))
    TRANSFORMS[name](function)
    function(torch.ones(2))
    assert seen[0] is False and seen[-1] is False and all(seen[1:-1]) and len(seen) > 2


def test_is_batched():
    """A backward with is_grads_batched=True gets a tensor that stands for many."""
    seen = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            seen.append(torch_seam.is_batched(dy))
            return 2 * dy

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Function.apply(x), x, torch.ones(2))
    torch.autograd.grad(Function.apply(x), x, torch.ones(3, 2), is_grads_batched=True)
    assert seen == [False, True]


@pytest.mark.gpu
def test_cuda_functions():
    """They say what the documented functions of torch.cuda say."""
    assert torch_seam.current_device() == torch.cuda.current_device()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert torch_seam.current_raw_stream(torch.cuda.current_device()) == stream.cuda_stream
    assert not torch_seam.is_capturing()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        captured = torch_seam.is_capturing()
    assert captured


def test_trial_id():
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study()
    study.ask()
    study.ask()
    optuna.Trial(study, study.trials[1]._trial_id).report(3.0, 1)
    assert [trial.intermediate_values for trial in study.trials] == [{}, {1: 3.0}]


def test_weight_conversions(tmp_path):
    """What is in it is undone when files are written; with None, what the model's type asks for is."""
    config = MixtralConfig(
        **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 16),
        **{"num_hidden_layers": 1, "num_local_experts": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "files")
    model = MixtralForCausalLM.from_pretrained(tmp_path / "files")
    assert model._weight_conversions
    model._weight_conversions = None
    model.save_pretrained(tmp_path / "again")
    files, again = (load_file(tmp_path / name / "model.safetensors") for name in ("files", "again"))
    assert files.keys() == again.keys() != dict(model.named_parameters()).keys()


def test_experts_implementation(monkeypatch):
    """The decorator asks the interface at each call, by the config's name, for a function of module and rest."""
    experts = MixtralExperts(MixtralConfig(num_local_experts=2, hidden_size=8, intermediate_size=4))
    interface, asked = moe.ALL_EXPERTS_FUNCTIONS, []
    monkeypatch.setitem(interface._global_mapping, "watched", lambda *args: asked.append(args))
    for name, found in (
        ("eager", "eager"),
        ("batched_mm", "batched_mm"),
        ("grouped_mm", "grouped_mm"),
        (None, "eager"),
    ):
        experts.config._experts_implementation = name
        assert seam.experts_implementation(experts) == found
    experts.config._experts_implementation = "watched"
    assert seam.experts_implementation(experts) is None
    experts("hidden", "chosen", "weights")
    assert asked == [(experts, "hidden", "chosen", "weights")]
    assert experts.has_gate and not experts.has_bias and not experts.is_transposed
    monkeypatch.setitem(interface._global_mapping, "grouped_mm", interface["watched"])  # as Unsloth does
    experts.config._experts_implementation = "grouped_mm"
    assert seam.experts_implementation(experts) is None
    experts.config._experts_implementation = "eager"
    experts._is_expert_parallel = True
    assert seam.experts_implementation(experts) is None
    assert seam.experts_implementation(nn.Linear(2, 2)) is None


def test_apply_gate():
    """`_apply_gate` of a module of experts takes the first product's result to the last product's input."""
    experts = MixtralExperts(MixtralConfig(num_local_experts=2, hidden_size=8, intermediate_size=4))
    e, u = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(experts._apply_gate(torch.cat([e, u], dim=1)), nn.functional.silu(e) * u)
    assert seam.has_default_gate(experts)
    config = GptOssConfig(num_local_experts=2, hidden_size=8, intermediate_size=4)
    assert not seam.has_default_gate(GptOssExperts(config)), "it clamps"


def test_apply_to():
    """Module.to calls the method `_apply` of each module, and parameters stay the objects that they are."""
    module, calls = nn.Linear(2, 3), []
    weight = module.weight
    torch_seam.apply_to(module, lambda t: t + 1, True)
    assert module.weight is weight

    class Called(nn.Linear):
        def _apply(self, fn, recurse=True):
            calls.append(fn(torch.zeros(2)).dtype)
            return torch_seam.apply_to(self, fn, recurse)

    assert nn.Sequential(Called(2, 3)).to(torch.float64)[0].weight.dtype == torch.float64
    assert calls == [torch.float64]


def test_every_name_has_a_test():
    """The seams' names are all looked at in this file."""
    text = Path(__file__).read_text()
    missing = [name for name in torch_seam.__all__ if f"torch_seam.{name}" not in text]
    missing += [name for name in seam.__all__ if f"seam.{name}" not in text]
    assert missing == []


# Nowhere else

SEAMS = {"seam.py", "ops/torch_seam.py", "ops/gluon.py"}  # the last one: Triton's
SEAM_MODULES = (  # of which nothing is public
    "huggingface_hub.dataclasses",
    "peft.mapping",
    "peft.tuners.lora.",
    "peft.utils.",
    "transformers.hf_argparser",
    "transformers.pytorch_utils",
    "transformers.trainer_utils",
    "transformers.training_args",
    "transformers.integrations.",
    "torch._",
)
PUBLIC = {"peft.utils.save_and_load"}  # get_ and set_peft_model_state_dict, which `peft` exports
OURS_OR_PYTHONS = {"_fields", "_asdict", "_exit", "_gralora_plan", "_actions", "_get_value"}


def outside_of_seams(file: Path) -> list[str]:
    """What a file uses of other packages' private or unstable names."""
    found, tree = [], ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            unstable = node.module.startswith(SEAM_MODULES) and node.module not in PUBLIC
            if (private or unstable) and node.module != "__future__":
                found.append(f"line {node.lineno}: from {node.module} import ...")
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            known = node.attr in OURS_OR_PYTHONS or node.attr in seam.OVERRIDES or node.attr in seam.ATTRIBUTES
            if ast.unparse(node.value) not in ("self", "cls") and not known:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("file", sorted(str(f.relative_to(SOURCE)) for f in SOURCE.rglob("*.py")))
def test_private_names_are_used_in_the_seams_only(file):
    """No other file imports, or reads, a name of PEFT's, transformers' or torch's that is private or may change."""
    if file in SEAMS:
        return
    assert outside_of_seams(SOURCE / file) == []
