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
