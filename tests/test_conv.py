"""GraLoRA of nn.Conv1d, nn.Conv2d and nn.Conv3d: blocks over input and output channels."""

import copy

import peft
import pytest
import torch
from helpers import (
    Case,
    OneLayer,
    adapted,
    adapter_parameters,
    assert_accurate,
    assert_close64,
    assert_unchanged,
    case_config,
    factors_of,
    gralora_config,
    only_layer,
    random_input,
)
from kinds_table import CONVOLUTIONS as CLASSES
from kinds_table import GEOMETRIES, naive_kernel
from kinds_table import IMAGES as SIZES
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import gralora
from gralora.ops.convolution import FEW, parts

CASES = [Case(1, 4, 0, 6, 10), Case(2, 7, 3, 8, 6), Case(4, 10, 2, 8, 12)]
cases = pytest.mark.parametrize("case", CASES, ids=str)
dims = pytest.mark.parametrize("dims", CLASSES, ids="{}d".format)
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)


def one_conv(case, dims, geometry="padded", bias=True):
    torch.manual_seed(2)
    return OneLayer(CLASSES[dims](case.in_features, case.out_features, bias=bias, **GEOMETRIES[geometry]).double())


def images(case, dims, *batch, seed=1):
    return random_input(*(batch or (2,)), case.in_features, *SIZES[dims], seed=seed)


def like(base, weight):
    """The convolution of a layer's geometry with another weight and no bias."""
    other = copy.deepcopy(base)
    del other.weight
    other.weight, other.bias = weight, None
    return other


@dims
def test_each_step_of_the_definition(dims):
    """A_i convolves chunk i of the channels, the j-th sub-ranks go to output block j, B_j mixes its channels."""
    case = CASES[-1]
    model = adapted(one_conv(case, dims, "strided"), case_config(case))
    layer, x = only_layer(model), images(case, dims)
    A, B, hybrid_A, hybrid_B = factors_of(layer)
    q, chunk = case.r_g // case.k, case.in_features // case.k
    h = [like(layer.base_layer, A[i].movedim(-1, 0))(x[:, i * chunk : (i + 1) * chunk]) for i in range(case.k)]
    y = []
    for j in range(case.k):
        g_j = torch.cat([h[i][:, j * q : (j + 1) * q] for i in range(case.k)], dim=1)
        y.append(torch.einsum("nr...,ro->no...", g_j, B[j]))
    plain = torch.einsum("nr...,or->no...", like(layer.base_layer, hybrid_A)(x), hybrid_B)
    update = layer.lora_B["default"](layer.lora_A["default"](x))
    assert_close64(update, torch.cat(y, dim=1) + plain)


@pytest.mark.parametrize("batch", [(0,), (3,)], ids=str)
@dims
def test_batches(dims, batch):
    case = CASES[1]
    model = adapted(one_conv(case, dims), case_config(case))
    layer, x = only_layer(model), images(case, dims, *batch)
    assert_close64(model(x), layer.base_layer(x) + 3 * like(layer.base_layer, naive_kernel(layer))(x))


@dims
def test_input_without_batch(dims):
    """Input `[I, *space]`, which torch's convolutions take."""
    case = CASES[1]
    model = adapted(one_conv(case, dims), case_config(case))
    x = images(case, dims)
    assert_close64(model(x[0]), model(x)[0])


def test_merge_in_half_precision_rounds_once():
    case = CASES[-1]
    model = adapted(one_conv(case, 2).to(torch.bfloat16), case_config(case), autocast_adapter_dtype=False)
    layer = only_layer(model)
    weight, dW = layer.base_layer.weight.double(), 3 * naive_kernel(layer.double())
    layer.to(torch.bfloat16)
    model.merge_adapter()
    assert_accurate(layer.base_layer.weight, weight + dW, (weight + dW).to(torch.bfloat16))


@dims
def test_start_is_that_of_plain_lora(dims):
    """A is PEFT's times sqrt(k), B zero; as many parameters as LoRA."""
    case, models = Case(2, 4, 0, 8, 6), []
    for config in (case_config(case), peft.LoraConfig(r=case.r, target_modules=["layer"])):
        torch.manual_seed(0)
        models.append(get_peft_model(one_conv(case, dims), config))
    ours, plain = (only_layer(model).lora_A["default"].weight for model in models)
    assert_close64(ours.flatten(0, 1).movedim(-1, 0), 2**0.5 * plain)
    x = images(case, dims)
    assert torch.equal(models[0](x), only_layer(models[0]).base_layer(x))
    counts = [sum(p.numel() for p in adapter_parameters(model).values()) for model in models]
    assert counts[0] == counts[1]


@dims
def test_dropout_and_bias(dims):
    """lora_dropout acts on the adapter's input, and lora_bias adds to its output, also when merged."""
    case = CASES[1]
    model = adapted(one_conv(case, dims), case_config(case, lora_dropout=0.5, lora_bias=True))
    layer, x = only_layer(model), images(case, dims)
    bias = layer.lora_B["default"].bias
    assert bias.any()
    update = like(layer.base_layer, naive_kernel(layer))
    expected = layer.base_layer(x) + 3 * (update(x) + bias.view(-1, *[1] * dims))
    assert_close64(model(x), expected)
    model.train()
    torch.manual_seed(0)
    out = model(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    assert_close64(out, layer.base_layer(x) + 3 * (update(dropped) + bias.view(-1, *[1] * dims)))
    assert_close64(model.eval().merge_and_unload()(x), expected)


class Padded(nn.Conv1d):
    """A causal convolution: a forward of its own, as some models have."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (2, 0)))


REFUSED = {
    "groups": (lambda: nn.Conv1d(8, 8, 3, groups=2), {}, ["groups=2", "'layer'", "Conv1d"]),
    "forward": (lambda: Padded(8, 8, 3), {}, ["forward of its own", "'layer'", "Padded"]),
    "transposed": (lambda: nn.ConvTranspose1d(8, 8, 3), {}, ["'layer'", "ConvTranspose1d", "not supported"]),
    "in": (lambda: nn.Conv1d(6, 8, 3), {"k": 4}, ["gralora_k=4", "'layer'", "in_features=6", "nn.Conv1d", "[1, 2]"]),
    "out": (lambda: nn.Conv1d(8, 6, 3), {"k": 4}, ["gralora_k=4", "'layer'", "out_features=6"]),
}


@pytest.mark.parametrize("build, fields, parts", REFUSED.values(), ids=REFUSED)
def test_refused(build, fields, parts):
    torch.manual_seed(0)
    model = OneLayer(build())
    x = torch.randn(2, model.layer.in_channels, 9)
    with assert_unchanged(model, x), pytest.raises(ValueError) as error:
        get_peft_model(model, gralora_config(**{"k": 2, "target_modules": ["layer"]} | fields))
    for part in parts:
        assert part in str(error.value)


def test_auto_k_counts_the_channels():
    model = OneLayer(nn.Conv2d(12, 6, 3))
    assert (
        get_peft_model(model, gralora_config("auto", 64, target_modules=["layer"])).peft_config["default"].gralora_k
        == 2
    )


LAYOUTS = [
    (1, torch.contiguous_format),
    (2, torch.contiguous_format),
    (2, torch.channels_last),
    (3, torch.channels_last_3d),
]
MANY, MORE = Case(4, 36, 4, 8, 12), Case(2, 36, 0, 8, 12)  # more sub-ranks than one dense convolution is made of


def one_operation(case, dims, dtype, memory_format, geometry="strided"):
    """A trained layer and its input, in a memory format."""
    model = adapted(one_conv(case, dims, geometry).to(dtype), case_config(case), autocast_adapter_dtype=False).train()
    x = images(case, dims).to(dtype).contiguous(memory_format=memory_format)
    return model.to(memory_format=memory_format) if dims > 1 else model, x


def formula(model, x):
    """The definition in torch's operations, of any dtype."""
    layer = only_layer(model)
    return layer.base_layer(x) + 3 * layer.lora_B["default"](layer.lora_A["default"](x))


def results(model, x, compute, mode=""):
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        y = checkpoint(compute, x, use_reentrant=False) if mode == "checkpointing" else compute(x)
    inputs = [x, *adapter_parameters(model).values()]
    return [y, *torch.autograd.grad(y, inputs, random_input(*y.shape, seed=9).to(y.dtype))]


@pytest.mark.parametrize("case", [CASES[0], CASES[-1], MANY, MORE], ids=str)
@pytest.mark.parametrize("dims, memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("mode", ["bfloat16", "autocast", "checkpointing"])
def test_one_operation(case, dims, memory_format, mode, monkeypatch):
    """Any number of sub-ranks, memory format and dtype: at most twice as far from float64 as plain torch."""
    monkeypatch.setitem(FEW, "cpu", FEW["cuda"])
    dtype = {"autocast": torch.float32, "checkpointing": torch.float64}.get(mode, torch.bfloat16)
    model, x = one_operation(case, dims, dtype, memory_format)
    call = only_layer(model).fused_call(x)
    assert call is not None and gralora.describe(model).startswith("1 of 1 LoRA layers run as one operation")
    laid_out = parts(call.adapters[0].factors, dtype)
    assert len(laid_out) == (2 if case is MANY else 1)
    assert laid_out[0].groups == (case.k if case in (MANY, MORE) else 1)
    exact = copy.deepcopy(model).double()
    wanted = results(exact, x.double(), lambda x: formula(exact, x))
    found = results(model, x, model, mode)
    assert found[0].stride() == only_layer(model).base_layer(x).stride()
    for own, expected, plain in zip(found, wanted, results(model, x, lambda x: formula(model, x), mode), strict=True):
        if dtype is torch.float64:
            assert_close64(own, expected)
        assert_accurate(own, expected, plain)


@pytest.mark.parametrize("case", [CASES[-1], MANY], ids=str)
def test_second_derivatives_and_those_that_nobody_needs(case):
    model, x = one_operation(case, 2, torch.float64, torch.contiguous_format)
    tensors = factors_of(only_layer(model)).tensors()
    found = []
    for compute in (model, lambda x: formula(model, x)):
        gradients = torch.autograd.grad(1e-2 * compute(x).square().mean(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors))
    for own, expected in zip(*found, strict=True):
        assert_close64(own, expected)
    dy = torch.autograd.grad(formula(model, x).square().sum(), tensors)
    for n, t in enumerate(tensors):
        model.requires_grad_(False)
        t.requires_grad_(True)
        model(x).square().sum().backward()
        assert_close64(t.grad, dy[n])
        t.grad = None
        assert all(p.grad is None for p in model.parameters())


@dims
def test_base_layer_keeps_what_it_returns(dims):
    """A hook on the base layer sees its output, which nothing changes afterwards; the layer's own may be changed."""
    case = CASES[1]
    model, x = adapted(one_conv(case, dims), case_config(case)).train(), images(case, dims)
    layer, seen = only_layer(model), []
    wanted = model(x)
    handle = layer.base_layer.register_forward_hook(lambda module, args, y: seen.append(y))
    assert_close64(model(x), wanted)
    assert_close64(seen[0], layer.base_layer(x))
    handle.remove()
    y = model(x)
    y.mul_(2).sum().backward()
    assert_close64(y, 2 * wanted)


def test_dropout_without_bias():
    """As torch's own dropout with the same seed, one mask for each adapter."""
    case = CASES[1]
    model = adapted(one_conv(case, 2), case_config(case, lora_dropout=0.5)).train()
    layer, x = only_layer(model), images(case, 2)
    assert layer.fused_call(x).adapters[0].p == 0.5
    torch.manual_seed(0)
    out = model(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    assert_close64(out, layer.base_layer(x) + 3 * like(layer.base_layer, naive_kernel(layer))(dropped))
