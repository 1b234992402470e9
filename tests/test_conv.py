"""GraLoRA of nn.Conv1d, nn.Conv2d and nn.Conv3d: blocks over input and output channels."""

import copy
import itertools
import pickle

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
    randomize,
)
from peft import PeftModel, get_peft_model
from torch import nn

CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CASES = [Case(1, 4, 0, 6, 10), Case(2, 7, 3, 8, 6), Case(4, 10, 2, 8, 12)]
GEOMETRIES = {
    "1x1": {"kernel_size": 1},
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 2, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflected": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
}
SIZES = {1: (9,), 2: (7, 6), 3: (5, 6, 5)}
cases = pytest.mark.parametrize("case", CASES, ids=str)
dims = pytest.mark.parametrize("dims", CLASSES, ids="{}d".format)
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)


def one_conv(case, dims, geometry="padded", bias=True):
    torch.manual_seed(2)
    return OneLayer(CLASSES[dims](case.in_features, case.out_features, bias=bias, **GEOMETRIES[geometry]).double())


def images(case, dims, *batch, seed=1):
    return random_input(*(batch or (2,)), case.in_features, *SIZES[dims], seed=seed)


def naive_kernel(layer, adapter="default"):
    """dW without scaling, `[O, I, *kernel]`: block (j, i) at each position of the kernel, plus B_s A_s."""
    A, B, hybrid_A, hybrid_B = factors_of(layer, adapter)
    k, chunk_in, *kernel, r_g = A.shape
    chunk_out, q = B.shape[2], r_g // k
    dW = A.new_zeros(k * chunk_out, k * chunk_in, *kernel)
    for position in itertools.product(*map(range, kernel)):
        for i, j in itertools.product(range(k), repeat=2):
            down = A[(i, slice(None), *position)][:, j * q : (j + 1) * q]  # [I/k, q]
            block = (down @ B[j, i * q : (i + 1) * q]).T
            rows, columns = slice(j * chunk_out, (j + 1) * chunk_out), slice(i * chunk_in, (i + 1) * chunk_in)
            dW[(rows, columns, *position)] = block
        if hybrid_A is not None:
            dW[(..., *position)] += hybrid_B @ hybrid_A[(..., *position)]
    return dW


def like(base, weight):
    """The convolution of a layer's geometry with another weight and no bias."""
    other = copy.deepcopy(base)
    del other.weight
    other.weight, other.bias = weight, None
    return other


@cases
@dims
@geometries
def test_output_and_gradients_equal_the_block_loop(case, dims, geometry):
    """The adapter adds the convolution with the naive kernel; gradients too are its, and the base gets none."""
    model = adapted(one_conv(case, dims, geometry), case_config(case)).train()
    layer, x = only_layer(model), images(case, dims).requires_grad_()
    base = layer.base_layer
    expected = base(x) + 3 * like(base, naive_kernel(layer))(x)
    dy = random_input(*expected.shape, seed=9)
    inputs = [x, *(t for t in factors_of(layer) if t is not None)]
    gradients = torch.autograd.grad(expected, inputs, dy)
    out = model(x)
    assert_close64(out, expected)
    out.backward(dy)
    for t, grad in zip(inputs, gradients, strict=True):
        assert_close64(t.grad, grad)
    assert base.weight.grad is None


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


@cases
@dims
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("geometry", ["1x1", "strided", "reflected"])
def test_merge_and_unmerge(case, dims, safe, geometry):
    model = adapted(one_conv(case, dims, geometry), case_config(case))
    layer, x = only_layer(model), images(case, dims)
    out, weight, dW = model(x), layer.base_layer.weight.clone(), 3 * naive_kernel(layer)
    assert_close64(layer.get_delta_weight("default"), dW)
    model.merge_adapter(safe_merge=safe)
    assert_close64(layer.base_layer.weight, weight + dW)
    assert_close64(model(x), out)
    model.unmerge_adapter()
    assert_close64(layer.base_layer.weight, weight)
    assert_close64(model.merge_and_unload(safe_merge=safe)(x), out)


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
def test_random_start_with_k1_is_that_of_plain_lora(dims):
    """With init_lora_weights=False neither factor is zero; both are read from PEFT's."""
    case, deltas, fields = CASES[0], [], {"init_lora_weights": False, "target_modules": ["layer"]}
    for config in (gralora_config(1, 4, **fields), peft.LoraConfig(r=4, lora_alpha=8, **fields)):
        torch.manual_seed(0)
        deltas.append(only_layer(get_peft_model(one_conv(case, dims), config)).get_delta_weight("default"))
    assert_close64(*deltas)
    assert deltas[0].any()


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


@dims
def test_training_changes_only_the_factors(dims):
    model = adapted(one_conv(CASES[1], dims), case_config(CASES[1])).train()
    trained = adapter_parameters(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(images(CASES[1], dims)).square().sum().backward()
    torch.optim.SGD(trained.values(), lr=0.1).step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trained), name


@dims
@pytest.mark.parametrize("low_memory", [False, True])
def test_save_and_load(dims, low_memory, tmp_path):
    """A fresh model with the saved adapter has the same tensors, bit by bit, and the same output up to rounding."""
    case = CASES[-1]
    model = adapted(one_conv(case, dims, "reflected"), case_config(case))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(one_conv(case, dims, "reflected"), tmp_path, low_cpu_mem_usage=low_memory)
    saved = adapter_parameters(model)
    for name, p in adapter_parameters(loaded).items():
        assert torch.equal(p, saved.pop(name)), name
    assert not saved
    x = images(case, dims)
    assert_close64(loaded(x), model(x))  # torch sums in another order for weights that need no gradient


def test_plain_lora_refuses_the_file(tmp_path):
    case = Case(1, 4, 0, 6, 10)
    model = adapted(one_conv(case, 2), case_config(case))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(one_conv(case, 2), tmp_path, config=peft.LoraConfig(r=4, target_modules=["layer"]))


def test_adapters_of_several_kinds():
    """Two GraLoRAs and a plain LoRA on one convolution: set, add up, mix, merge, delete."""
    case = CASES[-1]
    model = adapted(one_conv(case, 2), case_config(case))
    model.add_adapter("other", gralora_config(2, 8, 0, target_modules=["layer"]))
    model.add_adapter("plain", peft.LoraConfig(r=4, target_modules=["layer"]))
    for seed, name in enumerate(("other", "plain")):
        randomize(model, name, seed)
    layer, x = only_layer(model), images(case, 2, 4)
    base, updates = layer.base_layer, {"__base__": torch.zeros(4, 12, 7, 6).double()}
    for name, scaling in (("default", 3), ("other", 2)):
        updates[name] = scaling * like(base, naive_kernel(layer, name))(x)
    updates["plain"] = 2 * layer.lora_B["plain"](layer.lora_A["plain"](x))
    assert_close64(model(x), base(x) + updates["default"])
    with model.disable_adapter():
        assert_close64(model(x), base(x))
    for names in (["other"], ["plain"], ["plain", "default", "other"]):
        model.base_model.set_adapter(names)
        assert_close64(model(x), base(x) + sum(updates[name] for name in names))
    mixed = ["other", "__base__", "default", "plain"]
    rows = torch.stack([updates[name][row] for row, name in enumerate(mixed)])
    with torch.no_grad():
        assert_close64(model(x, adapter_names=mixed), base(x) + rows)
    expected = base(x) + updates["default"] + updates["other"] + updates["plain"]
    model.merge_adapter()
    assert_close64(model(x), expected)
    model.unmerge_adapter()
    model.delete_adapter("default")
    model.set_adapter("other")
    assert_close64(model(x), base(x) + updates["other"])


@dims
def test_add_weighted_adapter(dims):
    """ "cat" gives the weighted sum of the adapters' dW, as a plain LoRA."""
    case = CASES[-1]
    model = adapted(one_conv(case, dims), case_config(case))
    model.add_adapter("other", gralora_config(2, 8, 0, target_modules=["layer"]))
    randomize(model, "other", seed=1)
    layer = only_layer(model)
    expected = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("other")
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", "cat")
    assert_close64(layer.get_delta_weight("sum"), expected)


def test_pickle():
    model = adapted(one_conv(CASES[1], 2, "circular"), case_config(CASES[1]))
    x = images(CASES[1], 2)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


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
