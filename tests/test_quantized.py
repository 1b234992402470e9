"""GraLoRA on quantised base models: the numbers of the dequantised weights, and merges no worse than need be."""

import copy
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import peft
import pytest
import torch
from fp8_layers import fp8_dequantized, fp8_linear, run_without_hub_kernels
from helpers import (
    Case,
    OneLayer,
    adapted,
    adapter_layers,
    adapter_parameters,
    assert_accurate,
    assert_unchanged,
    case_config,
    factors_of,
    gralora_config,
    naive_delta,
    naive_update,
    only_layer,
    random_input,
    randomize,
    tiny_llama,
    token_ids,
)
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments

import gralora
from gralora import fast_path, quantized
from gralora.layers import GraloraLayer
from gralora.tool.embedded import embedded_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Merge lora module to"),
    pytest.mark.filterwarnings("ignore:Unmerge lora module to"),
    pytest.mark.filterwarnings("ignore:merging into weights of 4 bits"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]
CASE = Case(4, 10, 2, 64, 96)  # multiples of bitsandbytes' blocks, so that it does all it does to larger layers


class Backend(NamedTuple):
    """How to quantise one layer, and how to read its weight, without PEFT."""

    library: str
    quantize: Callable[[nn.Linear, torch.dtype], nn.Module]  # for computing in this dtype
    dequantize: Callable[[Any], Tensor]  # to float32
    config: Callable[[], Any] | None = None  # for from_pretrained; None: transformers cannot load it
    flag: str = ""
    sums_in_float32: bool = False  # whether a merge dequantises to float32, whatever the layer computes in


def bnb_4bit(quant_type: str, double: bool) -> Backend:
    def quantize(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=dtype,
            compress_statistics=double,
            quant_type=quant_type,
        )
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    def dequantize(layer: Any) -> Tensor:
        import bitsandbytes as bnb

        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()

    def config() -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        )

    return Backend("bitsandbytes", quantize, dequantize, config, "is_loaded_in_4bit")


def bnb_8bit() -> Backend:
    def quantize(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
        import bitsandbytes as bnb

        sizes = linear.in_features, linear.out_features, linear.bias is not None
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    def dequantize(layer: Any) -> Tensor:
        scale = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return layer.weight.data.float() * scale.float()[:, None] / 127

    def config() -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True)

    return Backend("bitsandbytes", quantize, dequantize, config, "is_loaded_in_8bit")


def torchao(make: str, **options: Any) -> Backend:
    def config() -> Any:
        import torchao.quantization
        from transformers import TorchAoConfig

        return TorchAoConfig(getattr(torchao.quantization, make)(**options))

    def quantize(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
        from torchao import quantize_

        layer = copy.deepcopy(linear).to(dtype)
        quantize_(layer, config().get_apply_tensor_subclass())
        return layer

    def dequantize(layer: Any) -> Tensor:
        weight = layer.weight
        return weight.dequantize(torch.float32) if make.startswith("Float8") else weight.dequantize().float()

    return Backend("torchao", quantize, dequantize, config, sums_in_float32=make.startswith("Float8"))


def fine_grained_fp8() -> Backend:
    def quantize(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
        return fp8_linear(linear.to(dtype), (32, 16))

    return Backend("torch", quantize, fp8_dequantized, sums_in_float32=True)


def hqq(nbits: int) -> Backend:
    def quantize(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=nbits, group_size=32, axis=1)
        return HQQLinear(copy.deepcopy(linear), config, compute_dtype=dtype, device="cpu")

    return Backend("hqq", quantize, lambda layer: layer.dequantize().detach().float())


BACKENDS = {
    "nf4": bnb_4bit("nf4", double=False),
    "nf4-double": bnb_4bit("nf4", double=True),
    "fp4": bnb_4bit("fp4", double=False),
    "bnb-int8": bnb_8bit(),
    "torchao-int8": torchao("Int8WeightOnlyConfig", version=2),
    "torchao-fp8": torchao("Float8WeightOnlyConfig"),
    "fp8-blocks": fine_grained_fp8(),
    "hqq-4": hqq(4),
    "hqq-8": hqq(8),
}
backends = pytest.mark.parametrize("name", BACKENDS)
one_of_each = pytest.mark.parametrize("name", ["nf4-double", "bnb-int8", "torchao-int8", "hqq-4"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def backend_of(name: str) -> Backend:
    pytest.importorskip(BACKENDS[name].library)
    return BACKENDS[name]


def as_loaded(model: nn.Module, backend: Backend) -> Any:
    """The model with the attributes that transformers sets on one that it loads quantised."""
    if backend.flag:
        setattr(model, backend.flag, True)
    if backend.library == "torchao" and backend.config is not None:
        model.hf_quantizer = SimpleNamespace(quantization_config=backend.config())
    return model.requires_grad_(False)


def quantized_layer(name: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> OneLayer:
    """A model of one quantised layer of CASE's sizes, the same at every call."""
    backend = backend_of(name)
    torch.manual_seed(2)
    linear = nn.Linear(CASE.in_features, CASE.out_features, bias).to(dtype).requires_grad_(False)
    return as_loaded(OneLayer(backend.quantize(linear, dtype)), backend)


@pytest.fixture(autouse=True)
def without_hub_kernels(request, monkeypatch):
    if "fp8-blocks" in request.node.name:
        run_without_hub_kernels(monkeypatch)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama")
    wide_llama().save_pretrained(folder)
    return folder


def wide_llama() -> LlamaForCausalLM:
    return tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.1)


def quantized_llama(name: str, folder: Any) -> LlamaForCausalLM:
    """A tiny Llama, quantised while transformers loads it, or layer by layer where transformers cannot."""
    backend = backend_of(name)
    if backend.config is not None:
        return LlamaForCausalLM.from_pretrained(folder, quantization_config=backend.config(), dtype=torch.float32)
    model = wide_llama()
    for parent in list(model.model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, child_name, backend.quantize(child, torch.float32))
    return as_loaded(model, backend)


def run_in_evaluation_mode(model: Any, *inputs: Tensor) -> Any:
    """bitsandbytes rearranges 4-bit weights here, where the CPU and the layer's sizes allow it."""
    with torch.no_grad():
        return model.eval()(*inputs)


def naively_merged(backend: Backend, before: Tensor, delta: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What dequantise, add and quantise in float32 gives, dequantised."""
    linear = nn.Linear(*reversed(before.shape), bias=False).requires_grad_(False)
    linear.weight.data = before + delta
    return backend.dequantize(backend.quantize(linear, dtype))


def assert_merged(
    backend: Backend, base: nn.Module, before: Tensor, delta: Tensor, dtype: torch.dtype = torch.float32
) -> None:
    """The base weight is what quantising `before + delta` gives, up to elements that rounding put elsewhere."""
    dtype = torch.float32 if backend.sums_in_float32 else dtype
    naive, merged = naively_merged(backend, before, delta, dtype), backend.dequantize(base)
    assert merged.shape == naive.shape
    error, naive_error = ((w - (before + delta)).norm() for w in (merged, naive))
    assert error <= 1.02 * naive_error, f"error {error:.4g}, of quantising alone {naive_error:.4g}"
    assert (merged - naive).norm() <= 0.1 * delta.norm()
    assert ((merged - naive).abs() > 1e-2 * naive.abs().max()).float().mean() < 0.01


# One layer


@backends
def test_output_and_gradients(name):
    """Output and gradients are those of the quantised layer plus the block loop; the weight gets no gradient."""
    model = adapted(quantized_layer(name), case_config(CASE)).train()
    layer = only_layer(model)
    assert isinstance(layer, GraloraLayer) and layer.is_gralora("default")
    x = random_input(2, 7, CASE.in_features, dtype=torch.float32).requires_grad_()
    dy = random_input(2, 7, CASE.out_features, dtype=torch.float32, seed=9)
    inputs = [x, *factors_of(layer).tensors()]
    y = layer.get_base_layer()(x) + 3.0 * naive_update(x, factors_of(layer))
    expected = torch.autograd.grad(y, inputs, dy)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    model(x).backward(dy)
    for t, grad in zip(inputs, expected, strict=True):
        torch.testing.assert_close(t.grad, grad, rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in layer.get_base_layer().parameters())


@backends
def test_base_layer_is_computed_by_its_own_library(name, monkeypatch):
    """The fused operation, for which the weight is unpacked, stays out of inference, and of 4 bits on a CPU."""
    if "fp8" in name:
        pytest.skip("read by the fused operation: tests/test_fp8.py")
    calls, operation = [], fast_path.gralora_linear
    monkeypatch.setattr(fast_path, "gralora_linear", lambda *args: (calls.append(1), operation(*args))[1])
    model = adapted(quantized_layer(name), case_config(CASE))
    model(random_input(3, CASE.in_features, dtype=torch.float32))
    assert not calls
    model.train()(random_input(3, CASE.in_features, dtype=torch.float32))
    assert bool(calls) == (not name.startswith(("nf4", "fp4")))


@pytest.mark.parametrize("name", ["bnb-int8", "torchao-int8", "hqq-4", "hqq-8"])
@pytest.mark.parametrize("mode", ["", "autocast", "checkpointing"])
@dtypes
def test_unpacked_in_training(name, mode, dtype):
    """The bits that its library unpacks; outputs and gradients of the quantised layer and the block loop."""
    if mode == "autocast" and name.startswith("hqq"):
        mode = ""  # its layers refuse inputs of another dtype than autocast's
    backend = backend_of(name)
    model = adapted(quantized_layer(name, dtype), case_config(CASE), autocast_adapter_dtype=False)
    model.to(dtype=dtype).train()
    layer, x = only_layer(model), random_input(61, CASE.in_features, dtype=dtype)
    packed = quantized.packed_weight(layer.base_layer, x, dtype)
    assert packed is not None and packed.shape == (CASE.out_features, CASE.in_features)
    if name == "bnb-int8":
        state = layer.base_layer.weight if layer.base_layer.state.CB is None else layer.base_layer.state
        unpacked = state.CB.to(dtype, copy=True).mul_(state.SCB.unsqueeze(1).mul(1.0 / 127.0))  # as bitsandbytes does
    else:
        unpacked = backend.dequantize(layer.base_layer).to(dtype)
    assert torch.equal(packed.dense(dtype), unpacked)
    exact = backend.dequantize(layer.base_layer).double()
    bias = None if layer.base_layer.bias is None else layer.base_layer.bias.detach()

    def results(compute, x, factors):
        x = x.detach().clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast" and x.dtype != torch.float64):
            y = checkpoint(compute, x, use_reentrant=False) if mode == "checkpointing" else compute(x)
        dy = random_input(*y.shape, seed=9).to(y.dtype)
        return [y, *torch.autograd.grad(y, [x, *factors.tensors()], dy)]

    def loop(weight, bias, factors):
        return lambda x: nn.functional.linear(x, weight, bias) + 3.0 * naive_update(x, factors)

    factors = factors_of(layer)
    found, plain = results(model, x, factors), results(loop(exact.to(dtype), bias, factors), x, factors)
    exact_factors = factors.to(torch.float64)
    wanted = results(loop(exact, None if bias is None else bias.double(), exact_factors), x.double(), exact_factors)
    for own, expected, theirs in zip(found, wanted, plain, strict=True):
        assert_accurate(own, expected, theirs.to(own.dtype))


@backends
@dtypes
def test_plain_lora_accelerated(name, dtype):
    """Output, gradients and the merged weight are those of PEFT's layer, which `accelerate` leaves as it is stored."""
    backend, config = backend_of(name), peft.LoraConfig(r=8, lora_alpha=24, target_modules=["layer"])
    x = random_input(2, 7, CASE.in_features, dtype=dtype)
    dy = random_input(2, 7, CASE.out_features, dtype=dtype, seed=9)
    outcomes = []
    for accelerated in (False, True):
        model = adapted(quantized_layer(name, dtype), config, autocast_adapter_dtype=False).to(dtype=dtype).train()
        layer = only_layer(model)
        if accelerated:
            gralora.accelerate(model)
            assert layer.fused_call(x) is not None and gralora.describe(model).startswith("1 of 1")
        inputs = [x.clone().requires_grad_(), layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        y = model(inputs[0])
        outcomes.append([y, *torch.autograd.grad(y, inputs, dy)])
        model.merge_adapter()
        outcomes[-1].append(backend.dequantize(layer.get_base_layer()))
    for own, wanted in zip(*reversed(outcomes), strict=True):
        assert own.dtype == wanted.dtype
        torch.testing.assert_close(
            own,
            wanted,
            rtol=2**-6 if dtype is torch.bfloat16 else 1e-4,
            atol=wanted.abs().max().item() * (2**-6 if dtype is torch.bfloat16 else 1e-5),
        )


@one_of_each
def test_global_hooks_see_the_factors(name):
    """A hook on all modules sees the base layer and the factors called, once each."""
    model = adapted(quantized_layer(name), case_config(CASE))
    layer, seen = only_layer(model), []
    parts = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    handle = register_module_forward_hook(lambda module, *_: seen.append(module) if module in parts else None)
    try:
        model(random_input(3, CASE.in_features, dtype=torch.float32))
    finally:
        handle.remove()
    assert [id(module) for module in seen] == [id(module) for module in parts]


@backends
@dtypes
@pytest.mark.parametrize("adapter_in_float32", [True, False], ids=["float32-adapter", "base-dtype-adapter"])
def test_dtypes_and_devices_are_those_of_plain_lora(name, dtype, adapter_in_float32):
    """The factors have the dtype and device that PEFT gives plain LoRA on this layer, and train in it."""
    if name == "fp8-blocks" and not adapter_in_float32:
        pytest.skip("PEFT would give plain LoRA 8 bits, in which it cannot be trained: tests/test_fp8.py")
    options = {"autocast_adapter_dtype": adapter_in_float32}
    stock = get_peft_model(quantized_layer(name, dtype), peft.LoraConfig(r=4, target_modules=["layer"]), **options)
    model = adapted(quantized_layer(name, dtype), case_config(CASE), **options).train()
    expected = only_layer(stock).lora_A["default"].weight
    x = random_input(3, CASE.in_features, dtype=dtype)
    y = model(x)
    assert y.dtype == stock(x).dtype == dtype
    y.float().square().sum().backward()
    for t in factors_of(only_layer(model)).tensors():
        assert (t.dtype, t.device) == (expected.dtype, expected.device)
        assert t.grad.dtype == t.dtype and t.grad.isfinite().all() and t.grad.any()


@backends
@dtypes
@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe-merge"])
def test_merge_and_unmerge_are_as_good_as_quantising(name, dtype, safe):
    """Merging is no worse than dequantise, add, quantise in float32, and so is unmerging; the bias stays.

    Also after the layer has run in evaluation mode.
    """
    backend, model = backend_of(name), adapted(quantized_layer(name, dtype), case_config(CASE))
    layer, x = only_layer(model), random_input(5, CASE.in_features, dtype=dtype)
    before, bias = backend.dequantize(layer.get_base_layer()), layer.get_base_layer().bias.clone()
    run_in_evaluation_mode(model, x)
    assert torch.equal(backend.dequantize(layer.get_base_layer()), before)

    delta = 3.0 * naive_delta(factors_of(layer).to(torch.float32)).detach()
    assert delta.norm() > before.norm()
    model.merge_adapter(safe_merge=safe)
    assert_merged(backend, layer.get_base_layer(), before, delta, dtype)
    assert torch.equal(layer.get_base_layer().bias, bias)
    merged = backend.dequantize(layer.get_base_layer())
    y = run_in_evaluation_mode(model, x)
    expected = nn.functional.linear(x.float(), merged, bias.float())
    assert (y.float() - expected).norm() <= 0.02 * expected.norm()  # 8-bit layers round their input too

    model.unmerge_adapter()
    assert_merged(backend, layer.get_base_layer(), merged, -delta, dtype)
    assert torch.equal(layer.get_base_layer().bias, bias)
    update = 3.0 * naive_update(x.float(), factors_of(layer).to(torch.float32))
    expected = (layer.get_base_layer()(x) + update).to(dtype)
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)


@backends
def test_delta_weight(name):
    """The delta weight is that of the block loop, `[out, in]`."""
    layer = only_layer(adapted(quantized_layer(name), case_config(CASE)))
    torch.testing.assert_close(layer.get_delta_weight("default"), 3.0 * naive_delta(factors_of(layer)))


@backends
@pytest.mark.parametrize("gralora_first", [True, False], ids=["gralora-first", "plain-first"])
def test_plain_and_granular_adapters_share_a_layer(name, gralora_first):
    """GraLoRA and plain LoRA stand side by side, whichever came first: each alone, both, none, and per sample."""
    configs = [("grid", case_config(CASE)), ("plain", peft.LoraConfig(r=4, lora_alpha=8, target_modules=["layer"]))]
    (first, config), (second, other) = configs if gralora_first else reversed(configs)
    model = randomize(get_peft_model(quantized_layer(name), config, adapter_name=first), first)
    x = random_input(6, CASE.in_features, dtype=torch.float32)
    alone = model.train()(x)
    model.add_adapter(second, other)
    randomize(model, second, seed=1)
    assert torch.equal(model.train()(x), alone)
    model.eval()

    layer = only_layer(model)
    assert layer.is_gralora("grid") and not layer.is_gralora("plain")
    base = run_in_evaluation_mode(layer.get_base_layer(), x)
    updates = {
        "grid": 3.0 * naive_update(x, factors_of(layer, "grid")),
        "plain": 2.0 * (x @ layer.lora_A["plain"].weight.T) @ layer.lora_B["plain"].weight.T,
    }
    for active in (["grid"], ["plain"], ["grid", "plain"]):
        model.base_model.set_adapter(active)
        expected = base + sum(updates[adapter] for adapter in active)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    names = ["grid", "plain", "__base__"] * 2
    mixed = model(x, adapter_names=names)
    for row, adapter in enumerate(names):
        expected = base[row] + (0 if adapter == "__base__" else updates[adapter][row])
        torch.testing.assert_close(mixed[row], expected, rtol=1e-4, atol=1e-4)
    model.delete_adapter("plain")
    model.set_adapter("grid")
    torch.testing.assert_close(model(x), base + updates["grid"], rtol=1e-4, atol=1e-4)


@backends
def test_safe_merge_refuses_a_broken_adapter(name):
    """With safe_merge an adapter with a NaN is refused, and the weight stays as it was."""
    backend, model = backend_of(name), adapted(quantized_layer(name), case_config(CASE))
    layer = only_layer(model)
    before = backend.dequantize(layer.get_base_layer())
    with torch.no_grad():
        factors_of(layer).B[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(backend.dequantize(layer.get_base_layer()), before) and not layer.merged


@backends
def test_merge_of_two_adapters(name):
    """Two adapters are merged one after the other, and a name that the layer lacks is passed over."""
    backend, model = backend_of(name), adapted(quantized_layer(name), case_config(CASE))
    model.add_adapter("plain", peft.LoraConfig(r=4, lora_alpha=8, target_modules=["layer"]))
    randomize(model, "plain", seed=1)
    layer = only_layer(model)
    before = backend.dequantize(layer.get_base_layer())
    deltas = [layer.get_delta_weight(adapter).detach() for adapter in ("default", "plain")]
    layer.merge(adapter_names=["default", "elsewhere", "plain"])
    assert layer.merged_adapters == ["default", "plain"]
    if backend.sums_in_float32:  # all at once
        before, deltas = before + deltas[0], deltas[1:]
    else:
        before, deltas = naively_merged(backend, before, deltas[0]), deltas[1:]
    assert_merged(backend, layer.get_base_layer(), before, deltas[0])


@backends
def test_a_merge_warns_once_for_all_layers(name, llama_folder):
    """Of 4 bits, what is lost and what to do instead, in place of PEFT's line; of 8, PEFT's as with plain LoRA."""
    model = get_peft_model(quantized_llama(name, llama_folder), gralora_config(target_modules=["q_proj", "up_proj"]))

    def others_warn(*_):  # a library's warning that comes once, in every layer
        warnings.warn("another", stacklevel=1)

    for layer in adapter_layers(model):
        layer.get_delta_weight = partial(lambda own, *names: (others_warn(), own(*names))[1], layer.get_delta_weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model.merge_adapter()
        before = len(caught)
        others_warn()
    said = [str(warning.message) for warning in caught]
    assert len(said) == before, "Python has forgotten what it has shown"
    assert said.count("another") == 1
    is_coarse = name in ("nf4", "nf4-double", "fp4", "hqq-4")
    assert sum("gralora merge ADAPTER OUT --base MODEL" in text for text in said) == is_coarse
    peft_says = [text for text in said if "may get different generations" in text]
    assert len(peft_says) == (BACKENDS[name].library == "bitsandbytes" and not is_coarse)


def test_bitsandbytes_weights_are_not_repacked():
    """Layers that no adapter touches keep passing gradients on after the model ran in evaluation mode too."""
    pytest.importorskip("bitsandbytes")
    first, second = (quantized_layer("nf4", bias=False).layer for _ in range(2))
    middle = BACKENDS["nf4"].quantize(nn.Linear(96, 64, bias=False).requires_grad_(False), torch.float32)
    model = as_loaded(nn.Sequential(first, middle, second), BACKENDS["nf4"])
    model = adapted(model, case_config(CASE, target_modules=["0", "2"]))
    x = random_input(3, CASE.in_features, dtype=torch.float32)

    def gradients():
        model.zero_grad()
        model.train()(x).square().sum().backward()
        return [p.grad.clone() for p in adapter_parameters(model).values()]

    before = gradients()
    run_in_evaluation_mode(model, x)
    for grad, expected in zip(gradients(), before, strict=True):
        torch.testing.assert_close(grad, expected)
        assert grad.any()


# What is refused


def test_layer_that_the_model_does_not_announce_is_refused():
    """Without the attribute that transformers sets, PEFT would take a 4-bit layer for an ordinary one."""
    model = quantized_layer("nf4")
    del model.is_loaded_in_4bit
    x = random_input(3, CASE.in_features, dtype=torch.float32)
    model.train()
    with assert_unchanged(model, x), pytest.raises(ValueError, match="OneLayer.is_loaded_in_4bit is not True"):
        get_peft_model(model, case_config(CASE))
    stock = get_peft_model(model, peft.LoraConfig(r=4, target_modules=["layer"]))
    with pytest.raises(ValueError, match="PEFT has wrapped as Linear, not as a quantised layer"):
        stock.add_adapter("grid", case_config(CASE))


def test_another_class_than_expected_is_refused(monkeypatch):
    """If PEFT wraps a layer as something else than we know it to, this is an error, not a wrong merge later."""
    model = quantized_layer("nf4")
    monkeypatch.setattr("peft.tuners.lora.bnb.dispatch_bnb_4bit", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="PEFT has wrapped as Linear, not as a quantised layer"):
        get_peft_model(model, case_config(CASE))


def test_layer_that_was_repacked_is_refused():
    """A model that ran in evaluation mode before it got an adapter is refused, where that has damaged it."""
    model = quantized_layer("nf4")
    run_in_evaluation_mode(model, random_input(3, CASE.in_features, dtype=torch.float32))
    if not model.layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes repacks weights on CPUs with AVX512-BF16 only")
    for _ in range(2):
        with pytest.raises(ValueError, match="repacked for inference.*Load the model anew"):
            get_peft_model(model, case_config(CASE))
        assert not adapter_layers(model)
        model.state_dict()  # unpacks the weight, but not as it was


def test_quantised_activations_are_refused():
    """A torchao layer that quantises its input passes no gradient on, so it cannot be trained through."""
    pytest.importorskip("torchao")
    from torchao import quantize_
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    model = OneLayer(nn.Linear(64, 96))
    quantize_(model, Int8DynamicActivationInt8WeightConfig(version=2))
    with pytest.raises(ValueError, match="Int8Tensor, which quantises activations too"):
        get_peft_model(model, case_config(CASE))
    assert type(model.layer) is nn.Linear


def test_other_quantised_weights_are_refused():
    """A torchao weight of another class is refused by name, and the message lists what is supported."""
    pytest.importorskip("torchao")
    from torchao import quantize_
    from torchao.quantization import IntxWeightOnlyConfig

    model = OneLayer(nn.Linear(64, 96))
    quantize_(model, IntxWeightOnlyConfig(torch.int4))
    with pytest.raises(
        ValueError, match="IntxUnpackedToInt8Tensor, which is not supported. .* bitsandbytes 4-bit.* HQQ"
    ):
        get_peft_model(model, case_config(CASE))
    assert type(model.layer) is nn.Linear


def test_torchao_without_its_config_does_not_merge():
    """Where PEFT cannot know how to quantise again, its own error says so, and the layer stays as it was."""
    model = quantized_layer("torchao-int8")
    del model.hf_quantizer
    with pytest.warns(UserWarning, match="get_apply_tensor_subclass"):
        model = adapted(model, case_config(CASE))
    x = random_input(3, CASE.in_features, dtype=torch.float32)
    y = model(x)
    with pytest.raises(ValueError, match="get_apply_tensor_subclass"):
        model.merge_adapter()
    assert torch.equal(model(x), y)


# Libraries that are not tested themselves: PEFT's classes on a stand-in for the base layer


def stand_in(package: str, class_name: str) -> nn.Module:
    """A linear layer that is no nn.Linear but of a class of this name, with its weight under another name."""

    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = CASE.in_features, CASE.out_features
            torch.manual_seed(2)
            self.qweight = nn.Parameter(torch.randn(CASE.out_features, CASE.in_features), requires_grad=False)

        def forward(self, x):
            return nn.functional.linear(x, self.qweight)

    Foreign.__module__, Foreign.__name__ = f"{package}.somewhere", class_name
    return Foreign()


FOREIGN = {
    "gptq": (GPTQLoraLinear, "gptqmodel", "BaseQuantLinear"),
    "awq": (AwqLoraLinear, "gptqmodel", "BaseQuantLinear"),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("plain_first", [True, False], ids=["plain-first", "gralora-first"])
@pytest.mark.parametrize("peft_class, package, class_name", FOREIGN.values(), ids=FOREIGN)
def test_layer_classes_without_merge(peft_class, package, class_name, plain_first, monkeypatch):
    """PEFT's classes for GPTQ and AWQ train a grid, and go on to refuse merging."""

    def dispatch(target, adapter_name, config, **kwargs):
        return peft_class(target, adapter_name, config=config, r=kwargs["r"], lora_alpha=kwargs["lora_alpha"])

    monkeypatch.setattr("peft.tuners.lora.model.dispatch_default", dispatch)
    model = OneLayer(stand_in(package, class_name))
    if plain_first:
        model = get_peft_model(model, peft.LoraConfig(r=4, target_modules=["layer"]), adapter_name="plain")
        model.add_adapter("default", case_config(CASE))
        model.set_adapter("default")
    else:
        model = get_peft_model(model, case_config(CASE))
    randomize(model)
    layer = only_layer(model)
    assert isinstance(layer, peft_class) and layer.is_gralora("default")
    x = random_input(2, 7, CASE.in_features, dtype=torch.float32)
    y = layer.get_base_layer()(x) + 3.0 * naive_update(x, factors_of(layer))
    expected = torch.autograd.grad(y.square().sum(), factors_of(layer).tensors())
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    model(x).square().sum().backward()
    for t, grad in zip(factors_of(layer).tensors(), expected, strict=True):
        torch.testing.assert_close(t.grad, grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.get_delta_weight("default"), 3.0 * naive_delta(factors_of(layer)))
    with assert_unchanged(model, x), pytest.raises(NotImplementedError):
        model.merge_adapter()


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_weights_made_anew_are_not_taken_for_shared(monkeypatch):
    """Layers whose weight is computed at every look, as HQQ's is, are not refused as layers that share one."""

    def dispatch(target, adapter_name, config, **kwargs):
        return GPTQLoraLinear(target, adapter_name, config=config, r=kwargs["r"], lora_alpha=kwargs["lora_alpha"])

    monkeypatch.setattr("peft.tuners.lora.model.dispatch_default", dispatch)
    layer = stand_in("gptqmodel", "BaseQuantLinear")
    type(layer).weight = property(lambda self: self.qweight.clone())
    layers = nn.ModuleDict({f"layer{i}": copy.deepcopy(layer) for i in range(4)})
    model = get_peft_model(layers, case_config(CASE, target_modules=list(layers)))
    assert len(adapter_layers(model)) == 4
    model.base_model._check_merge_allowed()


FAKE_PACKAGES = {  # module -> class of the base layer
    "aqlm": "QuantizedLinear",
    "eetq": "EetqLinear",
    "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules": "PatchedLinear",
}
FAKE = """
import torch

class {name}(torch.nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = torch.nn.Parameter(torch.randn(out_features, in_features), requires_grad=False)
        self.codes = self.codebooks = self.weight

    def forward(self, x):
        return x @ self.weight.T
"""
WITH_FAKE_PACKAGE = """
import sys, torch, gralora
sys.path.insert(0, {tests!r})
from importlib import import_module
from helpers import OneLayer, factors_of, naive_update, only_layer, randomize
from peft import get_peft_model

base = getattr(import_module({module!r}), {name!r})(16, 24)
config = gralora.LoraConfig(use_gralora=True, r=10, hybrid_r=2, gralora_k=4, lora_alpha=30, target_modules=["layer"])
model = randomize(get_peft_model(OneLayer(base), config))
layer, x = only_layer(model), torch.randn(5, 16)
expected = base(x) + 3.0 * naive_update(x, factors_of(layer))
torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
grads = torch.autograd.grad(expected.square().sum(), factors_of(layer).tensors())
for a, b in zip(torch.autograd.grad(model(x).square().sum(), factors_of(layer).tensors()), grads, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
try:
    model.merge_adapter()
except (NotImplementedError, AttributeError) as error:
    print([cls.__name__ for cls in type(layer).__mro__], error)
"""


@pytest.mark.parametrize("module, name", FAKE_PACKAGES.items(), ids=["aqlm", "eetq", "inc"])
def test_layer_classes_that_need_their_library(module, name, tmp_path):
    """PEFT's own choice of class, with a package of the library's name: a grid trains, and merging is refused."""
    file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(FAKE.format(name=name))
    code = WITH_FAKE_PACKAGE.format(tests=str(Path(__file__).parent), module=module, name=name)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "LoraLinear'" in run.stdout, run.stdout + run.stderr[-1500:]


# Whole models


TARGETS = ["q_proj", "k_proj", "down_proj"]


def base_state(model: nn.Module, backend: Backend) -> dict[str, Tensor]:
    return {
        name: backend.dequantize(layer.get_base_layer())
        for name, layer in model.named_modules()
        if isinstance(layer, GraloraLayer)
    }


@one_of_each
def test_trainer(name, llama_folder, tmp_path):
    """prepare_model_for_kbit_training, a Trainer that evaluates and saves between steps, and loading what it saved."""
    backend, base = backend_of(name), quantized_llama(name, llama_folder)
    model = get_peft_model(
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=True),
        gralora_config(2, hybrid_r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    weights, start = base_state(model, backend), {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
    data = [{"input_ids": ids, "labels": ids} for ids in token_ids(1, 8).repeat(8, 1)]
    options = {"max_steps": 12, "eval_steps": 4, "save_steps": 12, "logging_steps": 1, "learning_rate": 2e-2}
    options |= {"eval_strategy": "steps", "per_device_train_batch_size": 4}
    options |= {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), **options)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:2])
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] / 2
    for parameter_name, p in adapter_parameters(model).items():
        assert not torch.equal(p, start[parameter_name]), parameter_name
    for layer_name, weight in base_state(model, backend).items():
        assert torch.equal(weight, weights[layer_name]), layer_name

    logits = run_in_evaluation_mode(model, token_ids(2, 7)).logits
    fresh = quantized_llama(name, llama_folder)
    fresh = prepare_model_for_kbit_training(fresh, use_gradient_checkpointing=False)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "checkpoint-12")
    torch.testing.assert_close(run_in_evaluation_mode(loaded, token_ids(2, 7)).logits, logits, rtol=1e-4, atol=1e-4)


@one_of_each
def test_saved_adapter_loads_into_a_quantised_model(name, llama_folder, tmp_path):
    """Every way to load an adapter into a quantised model, transformers' too, gives the saved one's logits."""
    config = gralora_config(2, hybrid_r=2, target_modules=TARGETS)
    model, ids = adapted(quantized_llama(name, llama_folder), config), token_ids(2, 7)
    logits = run_in_evaluation_mode(model, ids).logits
    with model.disable_adapter():
        assert not torch.allclose(model(ids).logits, logits, atol=1e-2)
    model.save_pretrained(tmp_path)
    with_load_adapter = quantized_llama(name, llama_folder)
    with_load_adapter.load_adapter(tmp_path)
    loaded = {
        "from_pretrained": PeftModel.from_pretrained(quantized_llama(name, llama_folder), tmp_path),
        "low_cpu": PeftModel.from_pretrained(quantized_llama(name, llama_folder), tmp_path, low_cpu_mem_usage=True),
        "gralora": gralora.load_adapter(quantized_llama(name, llama_folder), tmp_path),
        "transformers": with_load_adapter,
    }
    for way, other in loaded.items():
        assert torch.equal(run_in_evaluation_mode(other, ids).logits, logits), way


@one_of_each
def test_generate_and_merge(name, llama_folder):
    """Generation with a mixed batch is that of each adapter; merge_and_unload leaves quantised layers, well merged."""
    backend = backend_of(name)
    model = adapted(quantized_llama(name, llama_folder), gralora_config(2, hybrid_r=2, target_modules=TARGETS))
    model.add_adapter("plain", peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    randomize(model, "plain", seed=1)
    ids = token_ids(1, 5).repeat(3, 1)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    model.eval()
    mixed = model.generate(input_ids=ids, adapter_names=["__base__", "default", "plain"], **options)
    with model.disable_adapter():
        assert torch.equal(mixed[0], model.generate(input_ids=ids, **options)[0])
    for row, adapter in [(2, "plain"), (1, "default")]:
        model.set_adapter(adapter)
        assert torch.equal(mixed[row], model.generate(input_ids=ids, **options)[row])
    assert len({tuple(row.tolist()) for row in mixed}) == 3

    before = base_state(model, backend)
    exact = {}
    for layer_name, layer in model.named_modules():
        if layer_name in before:
            exact[layer_name] = before[layer_name], 2.0 * naive_delta(factors_of(layer)).detach()
    layer_types = {type(layer.get_base_layer()) for layer in adapter_layers(model)}
    merged = model.merge_and_unload()
    assert not adapter_layers(merged)
    modules = dict(merged.named_modules())
    for layer_name, (weight, delta) in exact.items():
        layer = modules[layer_name.removeprefix("base_model.model.")]
        assert type(layer) in layer_types
        assert_merged(backend, layer, weight, delta)


@one_of_each
def test_nothing_of_the_size_of_a_weight_is_kept(name, llama_folder):
    """Beyond what plain LoRA keeps for the backward pass, GraLoRA keeps no tensor as large as a weight."""

    def kept(config):
        sizes = []
        model = get_peft_model(quantized_llama(name, llama_folder), config)
        model.train()

        def pack(t):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(token_ids(1, 3)).logits.sum()
        return Counter(size for size in sizes if size >= 64 * 32)

    plain = kept(peft.LoraConfig(r=4, target_modules=TARGETS))
    grid = kept(gralora_config(2, r=4, target_modules=TARGETS))
    assert not grid - plain


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4-double", "bnb-int8", "torchao-int8"])
def test_embedded_model(name, tmp_path):
    """A pretrained model, quantised, learns a text; the adapter is loaded and merged at the price of rounding only."""
    backend, folder = backend_of(name), embedded_model()

    def base():
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=backend.config(), dtype=torch.float32)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The zebra of Zanzibar zigzags through the zinnias at zero hundred hours, and Zoe counts her zithers."
    ids = tokenizer(text, return_tensors="pt").input_ids
    model = prepare_model_for_kbit_training(base(), use_gradient_checkpointing=False)
    model = get_peft_model(model, gralora_config(4, r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(12):
        loss = model.train()(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 4 == 3:
            run_in_evaluation_mode(model, ids)
    assert losses[-1] < losses[0] / 4
    final = run_in_evaluation_mode(model, ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(prepare_model_for_kbit_training(base()), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, final, rtol=1e-3, atol=1e-3)
        trained = loaded(ids, labels=ids).loss
        merged = loaded.merge_and_unload()(ids, labels=ids).loss
        print(f"{name}: loss {losses[0]:.3f}, trained {trained:.3f}, merged {merged:.3f}")
        if name != "nf4-double":  # steps of four bits are larger than what a short training changes
            assert abs(merged - trained) < 0.05 * (losses[0] - trained)
        if not name.startswith("torchao"):  # which transformers cannot dequantise
            model = PeftModel.from_pretrained(base().dequantize(), tmp_path).merge_and_unload()
            dequantised = model(ids, labels=ids).loss
            print(f"{name}: merged into the dequantised model {dequantised:.3f}")
            assert abs(dequantised - trained) < 0.05 * (losses[0] - trained)
