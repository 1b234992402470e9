"""One adapted layer: numbers, gradients, initialisation and dtypes, and which layers are refused."""

import copy
import io
import itertools
import math
import pickle
import re

import peft
import pytest
import torch
from helpers import (
    ACCURACY_CASES,
    BATCH_SHAPES,
    CASES,
    Case,
    Factors,
    OneLayer,
    adapted,
    adapter_layers,
    adapter_parameters,
    assert_accurate,
    assert_close64,
    assert_unchanged,
    case_config,
    cases,
    factors_of,
    few_cases,
    gralora_config,
    kinds,
    naive_delta,
    naive_update,
    one_layer,
    only_layer,
    random_input,
    set_factors,
    tiny_llama,
)
from peft import get_peft_model
from peft.tuners import lora
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)
from transformers.pytorch_utils import Conv1D

import gralora
from gralora import fast_path
from gralora.inject import install
from gralora.kinds import check_fields
from gralora.layers import GraloraLayer
from gralora.ops import compiled

accuracy_cases = pytest.mark.parametrize("case", ACCURACY_CASES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def expected_output(model, x, scaling, dtype=torch.float64):
    """base(x) + scaling * (the update written block by block), computed in `dtype` from the model's numbers."""
    layer = only_layer(model)
    base = copy.deepcopy(layer.base_layer).to(dtype)
    return base(x.to(dtype)) + scaling * naive_update(x.to(dtype), factors_of(layer).to(dtype))


# Forward and backward


@cases
@kinds
@pytest.mark.parametrize("batch", BATCH_SHAPES, ids=str)
def test_output_equals_the_block_loop(case, kind, batch):
    """The output is base(x) + lora_alpha / r * (grid + B_s A_s x), for any batch dimensions."""
    model = adapted(one_layer(case, kind), case_config(case))
    x = random_input(*batch, case.in_features)
    assert_close64(model(x), expected_output(model, x, scaling=3.0))


@cases
@kinds
@pytest.mark.parametrize("batch", [(7,), (2, 3), (0,)], ids=str)
def test_gradients_equal_the_block_loop(case, kind, batch):
    """The gradients of x and of every adapter tensor are those of the block loop; the base weight gets none."""
    model = adapted(one_layer(case, kind), case_config(case)).train()
    x = random_input(*batch, case.in_features).requires_grad_()
    dy = random_input(*batch, case.out_features, seed=9)
    layer = only_layer(model)
    inputs = [x, *factors_of(layer).tensors()]
    expected = torch.autograd.grad(layer.base_layer(x) + 3.0 * naive_update(x, factors_of(layer)), inputs, dy)
    model(x).backward(dy)
    for t, grad in zip(inputs, expected, strict=True):
        assert_close64(t.grad, grad)
    assert all(p.grad is None for p in layer.base_layer.parameters())


STRIDES = {  # transformers' Conv1D itself views its input, so it takes only the first three
    "every-second": lambda n: random_input(7, 2 * n)[:, ::2],
    "transposed": lambda n: random_input(n, 7).T,
    "expanded": lambda n: random_input(1, n).expand(7, n),
    "swapped-batch": lambda n: random_input(3, 2, n).transpose(0, 1),
    "slice-of-sequence": lambda n: random_input(2, 5, n)[:, 1:4],
}
KINDS_AND_STRIDES = [*(("linear", name) for name in STRIDES), *(("conv1d", name) for name in list(STRIDES)[:3])]


@few_cases
@pytest.mark.parametrize("kind, strides", KINDS_AND_STRIDES)
def test_input_of_any_strides(case, kind, strides):
    """Input that is not contiguous gives the same output and gradients as a contiguous copy."""
    x = STRIDES[strides](case.in_features)
    assert not x.is_contiguous()
    model = adapted(one_layer(case, kind), case_config(case)).train()
    gradients = []
    for value in (x, x.contiguous()):
        leaf = value.detach().requires_grad_()
        out = model(leaf)
        gradients.append(torch.autograd.grad(out.square().sum(), [leaf, *adapter_parameters(model).values()]))
        assert_close64(out, expected_output(model, leaf, scaling=3.0))
    for strided, contiguous in zip(*gradients, strict=True):
        assert_close64(strided, contiguous)


@few_cases
@kinds
def test_output_gradient_of_any_strides(case, kind):
    """The gradient that comes in may be expanded or transposed, as from a sum or a permuted output."""
    model = adapted(one_layer(case, kind), case_config(case)).train()
    inputs = [random_input(5, 7, case.in_features).requires_grad_(), *factors_of(only_layer(model)).tensors()]
    dy = random_input(case.out_features, 7, 5, seed=9).permute(2, 1, 0)
    for gradient in (torch.ones(1, dtype=torch.float64).expand(5, 7, case.out_features), dy):
        assert not gradient.is_contiguous()
        strided = torch.autograd.grad(model(inputs[0]), inputs, gradient)
        contiguous = torch.autograd.grad(model(inputs[0]), inputs, gradient.contiguous())
        for a, b in zip(strided, contiguous, strict=True):
            assert_close64(a, b)


@few_cases
@kinds
@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
def test_only_needed_gradients_are_computed(case, kind, needed):
    """Whichever of x, A and B are frozen, the others get their gradients and the frozen ones none."""
    model = adapted(one_layer(case, kind), case_config(case)).train()
    layer, x = only_layer(model), random_input(7, case.in_features)
    factors = factors_of(layer)
    tensors = [[x], factors[0::2], factors[1::2]]
    for group, wanted in zip(tensors, needed, strict=True):
        for t in group:
            if t is not None:
                t.requires_grad_(wanted)
    inputs = [t for group, wanted in zip(tensors, needed, strict=True) if wanted for t in group if t is not None]
    dy = random_input(7, case.out_features, seed=9)
    expected = torch.autograd.grad(layer.base_layer(x) + 3.0 * naive_update(x, factors), inputs, dy)
    model(x).backward(dy)
    for t, grad in zip(inputs, expected, strict=True):
        assert_close64(t.grad, grad)
    assert all(t.grad is None for group in tensors for t in group if t is not None and not t.requires_grad)


@few_cases
def test_gradients_accumulate(case):
    """Two backward passes give twice the gradient."""
    model = adapted(one_layer(case), case_config(case)).train()
    x = random_input(7, case.in_features)
    model(x).square().sum().backward()
    once = [t.grad.clone() for t in factors_of(only_layer(model)).tensors()]
    model(x).square().sum().backward()
    for t, grad in zip(factors_of(only_layer(model)).tensors(), once, strict=True):
        assert_close64(t.grad, 2 * grad)


@few_cases
@kinds
def test_second_derivatives(case, kind):
    """Gradients can be differentiated again, as those of plain LoRA can."""
    model = adapted(one_layer(case, kind), case_config(case)).train()
    layer, x = only_layer(model), random_input(3, case.in_features).requires_grad_()
    inputs = [x, *factors_of(layer).tensors()]
    results = []
    for out in (model(x), layer.base_layer(x) + 3.0 * naive_update(x, factors_of(layer))):
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(t.square().sum() for t in first), inputs))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


IN_PLACE = {
    "add": lambda y: y.add_(1),
    "relu": lambda y: y.relu_(),
    "slice": lambda y: y[..., 1:3].mul_(2),
}


@few_cases
@kinds
@pytest.mark.parametrize("operation", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("batch", [(7,), (2, 3)], ids=str)
def test_output_can_be_changed_in_place(case, kind, operation, batch):
    """What follows the layer may work in place, as after a plain LoRA layer, and the gradients are still right."""
    model = adapted(one_layer(case, kind), case_config(case)).train()
    layer, x = only_layer(model), random_input(*batch, case.in_features).requires_grad_()
    results = []
    for out in (model(x), layer.base_layer(x) + 3.0 * naive_update(x, factors_of(layer))):
        operation(out)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *factors_of(layer).tensors()])])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@few_cases
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_output_without_gradients(case, context):
    """The output is the same where no gradients are recorded."""
    model = adapted(one_layer(case), case_config(case))
    x = random_input(7, case.in_features)
    expected = expected_output(model, x, 3.0).detach()
    with context():
        out = model(x)
    assert not out.requires_grad
    assert_close64(out.clone(), expected)


@few_cases
@kinds
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_base_bias(case, kind, bias):
    """With bias="lora_only" or "all" the base layer's own bias is trained too, and gets its gradient."""
    model = adapted(one_layer(case, kind), case_config(case, bias=bias)).train()
    layer, x = only_layer(model), random_input(7, case.in_features)
    dy = random_input(7, case.out_features, seed=9)
    model(x).backward(dy)
    assert_close64(layer.base_layer.bias.grad, dy.sum(0))
    assert layer.base_layer.weight.grad is None


@few_cases
@kinds
def test_trained_base_weight(case, kind):
    """If a user trains the base weight beside the adapter, it gets its gradient."""
    model = adapted(one_layer(case, kind), case_config(case)).train()
    base, x = only_layer(model).base_layer, random_input(7, case.in_features)
    dy = random_input(7, case.out_features, seed=9)
    base.weight.requires_grad_()
    model(x).backward(dy)
    assert_close64(base.weight.grad, x.T @ dy if kind == "conv1d" else dy.T @ x)


class Doubling(nn.Linear):
    """A layer of another forward than its parent's."""

    def forward(self, x):
        return 2 * super().forward(x)


def double_the_class(layer):
    layer.__class__ = Doubling


def double_the_instance(layer):
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)


def double_by_hook(layer):
    layer.register_forward_hook(lambda module, args, out: 2 * out)


def double_by_pre_hook(layer):
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    layer.bias.data *= 2


def double_by_parametrization(layer):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(layer, "weight", Twice())
    layer.bias.data *= 2


@few_cases
@pytest.mark.parametrize(
    "change", [double_the_class, double_the_instance, double_by_hook, double_by_pre_hook, double_by_parametrization]
)
def test_base_layer_is_called_as_it_is(case, change):
    """A base layer that computes something of its own is called as a module: nothing bypasses it."""
    model = adapted(one_layer(case), case_config(case))
    layer, x = only_layer(model), random_input(7, case.in_features)
    expected = 2 * layer.base_layer(x) + 3.0 * naive_update(x, factors_of(layer))
    change(layer.base_layer)
    assert_close64(model(x), expected)


@few_cases
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_dropout"])
def test_hooks_on_the_adapter_are_called(case, part):
    """Forward hooks on the adapter's modules see their inputs and outputs, and what they return is used."""
    model = adapted(one_layer(case), case_config(case))
    layer, x = only_layer(model), random_input(7, case.in_features)
    seen = []
    getattr(layer, part)["default"].register_forward_hook(lambda module, args, out: seen.append(out) or 2 * out)
    assert_close64(model(x), layer.base_layer(x) + 6.0 * naive_update(x, factors_of(layer)))
    assert len(seen) == 1


def parts_of(layer):
    return [layer, layer.base_layer, *(getattr(layer, f"lora_{part}")["default"] for part in ("dropout", "A", "B"))]


GLOBAL_HOOKS = {
    "forward": lambda hook: register_module_forward_hook(lambda module, args, out: hook(module)),
    "forward_pre": lambda hook: register_module_forward_pre_hook(lambda module, args: hook(module)),
    "full_backward": lambda hook: register_module_full_backward_hook(lambda module, grad_in, grad_out: hook(module)),
    "full_backward_pre": lambda hook: register_module_full_backward_pre_hook(lambda module, grad_out: hook(module)),
}


@kinds
@pytest.mark.parametrize("register", GLOBAL_HOOKS.values(), ids=GLOBAL_HOOKS)
def test_global_hooks_see_every_part(kind, register, monkeypatch):
    """While a hook on all modules is registered it sees what it would see of a plain LoRA, and no longer."""
    case = CASES[5]
    model = adapted(one_layer(case, kind), case_config(case)).train()
    layer, x = only_layer(model), random_input(7, case.in_features).requires_grad_()
    expected, calls, seen = model(x), [], []
    fused = fast_path.gralora_linear
    monkeypatch.setattr(fast_path, "gralora_linear", lambda *args: calls.append(args) or fused(*args))
    handle = register(lambda module: seen.append(module) if module in parts_of(layer) else None)
    try:
        out = model(x)
        out.sum().backward()
    finally:
        handle.remove()
    assert_close64(out, expected)
    assert not calls and {id(module) for module in seen} == {id(module) for module in parts_of(layer)}
    seen.clear()
    model(x).sum().backward()
    assert len(calls) == 1 and not seen


@few_cases
@kinds
def test_global_hooks_may_change_outputs(case, kind):
    """What a hook on all modules returns for the base layer, A, B or dropout is used."""
    model = adapted(one_layer(case, kind), case_config(case))
    layer, x = only_layer(model), random_input(7, case.in_features)
    update = naive_update(x, factors_of(layer))
    for n, factor in [(1, 1), (2, 2), (3, 2), (4, 2)]:  # the base layer; dropout, A, B
        handle = register_module_forward_hook(
            lambda module, args, out, n=n: 2 * out if module is parts_of(layer)[n] else None
        )
        try:
            out = model(x)
        finally:
            handle.remove()
        assert_close64(out, (2 if n == 1 else 1) * layer.base_layer(x) + 3.0 * factor * update)


@few_cases
def test_prepared_for_compiled_hotswap(case):
    """After PEFT turned the scalings into tensors, output, gradients and dW are the same."""
    model = adapted(one_layer(case), case_config(case)).train()
    x = random_input(7, case.in_features)
    expected = torch.autograd.grad(model(x).square().sum(), factors_of(only_layer(model)).tensors())
    prepare_model_for_compiled_hotswap(model)
    assert isinstance(only_layer(model).scaling["default"], torch.Tensor)
    assert_close64(model(x), expected_output(model, x, 3.0))
    actual = torch.autograd.grad(model(x).square().sum(), factors_of(only_layer(model)).tensors())
    for a, e in zip(actual, expected, strict=True):
        assert_close64(a, e)
    assert_close64(only_layer(model).get_delta_weight("default"), 3.0 * naive_delta(factors_of(only_layer(model))))


@few_cases
@kinds
@pytest.mark.parametrize("form", ["operations", "operator", "kernels"])
def test_compiles_without_graph_breaks(case, kind, form, monkeypatch):
    """torch.compile takes forward and backward as one graph each, with the same results, in all its forms."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "form_of", lambda x, weight, p: form)
    monkeypatch.setattr(compiled, "is_called", lambda x, weight, p: True)
    model = adapted(one_layer(case, kind), case_config(case)).train()
    x, graphs = random_input(7, case.in_features), []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    out = torch.compile(model, backend=backend, fullgraph=True)(x)
    expected = {"operations": [], "operator": ["linear"], "kernels": ["linear_traced"]}[form]
    assert len(graphs) == 1 and re.findall(r"gralora\.(linear\w*?)(?:_[0-9]\w*)?\.default", graphs[0]) == expected
    assert_close64(out, expected_output(model, x, 3.0))
    inputs = factors_of(only_layer(model)).tensors()
    dy = random_input(7, case.out_features, seed=9)
    for a, e in zip(torch.autograd.grad(out, inputs, dy), torch.autograd.grad(model(x), inputs, dy), strict=True):
        assert_close64(a, e)


@pytest.mark.parametrize("adapter_name", ["default", "second-task"])
def test_adapter_name_does_not_matter(adapter_name):
    """Any adapter name that PEFT accepts works."""
    case = CASES[3]
    model = get_peft_model(one_layer(case), case_config(case, init_lora_weights=False), adapter_name=adapter_name)
    layer, x = only_layer(model), random_input(7, case.in_features)
    assert_close64(model(x), layer.base_layer(x) + 3.0 * naive_update(x, factors_of(layer, adapter_name)))


SCALINGS = {
    "alpha-over-r": ({"lora_alpha": 5}, lambda r: 5 / r),
    "rslora": ({"lora_alpha": 5, "use_rslora": True}, lambda r: 5 / math.sqrt(r)),
    "alpha-pattern": ({"lora_alpha": 5, "alpha_pattern": {"layer": 11}}, lambda r: 11 / r),
    "rslora-alpha-pattern": (
        {"lora_alpha": 5, "use_rslora": True, "alpha_pattern": {"layer": 11}},
        lambda r: 11 / math.sqrt(r),
    ),
}


@cases
@pytest.mark.parametrize("fields, scaling", SCALINGS.values(), ids=SCALINGS)
def test_scaling_uses_the_total_rank(case, fields, scaling):
    """The scaling is lora_alpha / r, or / sqrt(r), with r the total rank, whatever k and hybrid_r are."""
    model = adapted(one_layer(case), case_config(case, **fields))
    x = random_input(7, case.in_features)
    expected = expected_output(model, x, scaling(case.r))
    assert_close64(model(x), expected)
    model.merge_adapter()
    assert_close64(model(x), expected)


def test_rank_pattern_sets_the_total_rank():
    """With rank_pattern a layer's total rank, its scaling and its grid rank follow the pattern; hybrid_r does not."""
    case = Case(2, 8, 2, 12, 20)
    model = adapted(one_layer(case), case_config(case, lora_alpha=7, rank_pattern={"layer": 12}))
    factors, x = factors_of(only_layer(model)), random_input(7, case.in_features)
    assert factors.A.shape == (2, 6, 10) and factors.hybrid_A.shape == (2, 12)
    assert_close64(model(x), expected_output(model, x, 7 / 12))


def test_scale_can_be_changed():
    """PEFT's scale_layer and unscale_layer act on forward and merge."""
    case = CASES[3]
    model = adapted(one_layer(case), case_config(case))
    layer, x = only_layer(model), random_input(7, case.in_features)
    layer.scale_layer(0.5)
    assert_close64(model(x), expected_output(model, x, 1.5))
    assert_close64(layer.get_delta_weight("default"), 1.5 * naive_delta(factors_of(layer)))
    layer.unscale_layer()
    assert_close64(model(x), expected_output(model, x, 3.0))


# Against PEFT's own implementations


@cases
@kinds
@pytest.mark.parametrize("batch", [(7,), (2, 3)], ids=str)
def test_equals_the_gralora_tuner_of_peft(case, kind, batch):
    """With the same weights, output, gradients and merged weight are those of `peft.GraloraConfig`, in float32."""
    alpha = case.r // 2  # keeps all numbers near 1, where 1e-6 means something
    ours = adapted(one_layer(case, kind, torch.float32), case_config(case, lora_alpha=alpha)).train()
    config = peft.GraloraConfig(
        r=case.r_g,
        hybrid_r=case.hybrid_r,
        gralora_k=case.k,
        alpha=alpha,
        target_modules=["layer"],
        fan_in_fan_out=kind == "conv1d",
    )
    theirs = get_peft_model(one_layer(case, kind, torch.float32), config).train()
    stock, factors = only_layer(theirs), factors_of(only_layer(ours))
    pairs = [(factors.A, stock.gralora_A["default"]), (factors.B, stock.gralora_B["default"])]
    if case.hybrid_r:
        pairs.append((factors.hybrid_A, stock.gralora_A_general["default"].weight))
        pairs.append((factors.hybrid_B, stock.gralora_B_general["default"].weight))
    for mine, other in pairs:
        assert mine.shape == other.shape
        other.data.copy_(mine)

    def close(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)

    x = random_input(*batch, case.in_features, dtype=torch.float32)
    dy = random_input(*batch, case.out_features, dtype=torch.float32, seed=9) / math.sqrt(case.out_features)
    leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [model(leaf) for model, leaf in zip((ours, theirs), leaves, strict=True)]
    close(*outputs)
    for out in outputs:
        out.backward(dy)
    close(leaves[0].grad, leaves[1].grad)
    for mine, other in pairs:
        close(mine.grad, other.grad)
    close(only_layer(ours).get_delta_weight("default"), stock.get_delta_weight("default"))


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@kinds
def test_one_block_starts_as_plain_lora(init, kind):
    """From the same seed, k=1 starts with the very numbers of plain LoRA, and leaves the generator where it does."""
    case = Case(1, 4, 0, 12, 20)
    states = []
    for config in (
        case_config(case, init_lora_weights=init),
        peft.LoraConfig(r=4, lora_alpha=12, target_modules=["layer"], init_lora_weights=init),
    ):
        base = one_layer(case, kind)
        torch.manual_seed(0)
        layer = only_layer(get_peft_model(base, config))
        states.append((layer.lora_A["default"].weight, layer.lora_B["default"].weight, torch.get_rng_state()))
    (A, B, rng), (lora_A, lora_B, stock_rng) = states
    assert torch.equal(A[0].T, lora_A) and torch.equal(B[0].T, lora_B)
    assert torch.equal(rng, stock_rng)


@kinds
@pytest.mark.parametrize("hybrid_r", [0, 3])
def test_one_block_is_plain_lora(kind, hybrid_r):
    """k=1, hybrid or not, is plain LoRA exactly: with integers no bit of output, gradients and dW differs."""
    case = Case(1, 8, hybrid_r, 12, 20)
    ours = get_peft_model(one_layer(case, kind), case_config(case))
    theirs = get_peft_model(one_layer(case, kind), peft.LoraConfig(r=8, lora_alpha=24, target_modules=["layer"]))
    generator = torch.Generator().manual_seed(0)

    def integers(*shape):
        return torch.randint(-3, 4, shape, generator=generator).double()

    A, B, x, dy = integers(8, 12), integers(20, 8), integers(7, 12), integers(7, 20)
    lora, h = only_layer(theirs), hybrid_r
    lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data = A, B
    hybrid = (A[:h], B[:, :h]) if h else (None, None)
    set_factors(only_layer(ours), Factors(A[h:].T[None], B[:, h:].T[None], *hybrid))

    outputs, gradients = [], []
    for model in (ours, theirs):
        for p in only_layer(model).base_layer.parameters():
            p.data.fill_(1)
        leaf = x.clone().requires_grad_()
        outputs.append(model(leaf))
        outputs[-1].backward(dy)
        gradients.append(leaf.grad)
    assert torch.equal(*outputs) and torch.equal(*gradients)

    factors = factors_of(only_layer(ours))
    dA = torch.cat([*([factors.hybrid_A.grad] if h else []), factors.A.grad[0].T])
    dB = torch.cat([*([factors.hybrid_B.grad] if h else []), factors.B.grad[0].T], dim=1)
    assert torch.equal(dA, lora.lora_A["default"].weight.grad)
    assert torch.equal(dB, lora.lora_B["default"].weight.grad)
    assert torch.equal(only_layer(ours).get_delta_weight("default"), lora.get_delta_weight("default"))


# dW


@cases
@kinds
def test_delta_weight_is_the_map_of_forward(case, kind):
    """dW, in the layout of the base weight, is the map that forward adds; it equals the one built block by block."""
    model = adapted(one_layer(case, kind), case_config(case))
    layer = only_layer(model)
    dW = layer.get_delta_weight("default")
    assert dW.shape == layer.base_layer.weight.shape
    dW = dW.T if kind == "conv1d" else dW
    assert_close64(dW, 3.0 * naive_delta(factors_of(layer)))
    eye = torch.eye(case.in_features, dtype=torch.float64)
    assert_close64(dW, (model(eye) - layer.base_layer(eye)).T)


@few_cases
@kinds
def test_delta_weight_can_be_differentiated(case, kind):
    """A loss on dW has the gradients of the one built block by block."""
    layer = only_layer(adapted(one_layer(case, kind), case_config(case)).train())
    inputs = factors_of(layer).tensors()
    gradient = random_input(*layer.base_layer.weight.shape)
    actual = torch.autograd.grad(layer.get_delta_weight("default"), inputs, gradient)
    dW = 3.0 * naive_delta(factors_of(layer))
    expected = torch.autograd.grad(dW.T if kind == "conv1d" else dW, inputs, gradient)
    for a, e in zip(actual, expected, strict=True):
        assert_close64(a, e)


@cases
def test_rank_of_delta_weight(case):
    """The numerical rank of dW reaches k * r_g + hybrid_r, or all that the features allow."""
    layer = only_layer(adapted(one_layer(case), case_config(case)))
    rank = torch.linalg.matrix_rank(layer.get_delta_weight("default")).item()
    assert rank == min(case.k * case.r_g + case.hybrid_r, case.in_features, case.out_features)


# Parameters and initialisation


@cases
@kinds
def test_as_many_parameters_as_lora(case, kind):
    """A layer has exactly the r * (in + out) trainable parameters of plain LoRA at rank r."""
    ours = get_peft_model(one_layer(case, kind), case_config(case))
    lora = get_peft_model(one_layer(case, kind), peft.LoraConfig(r=case.r, target_modules=["layer"]))
    trainable, _ = ours.get_nb_trainable_parameters()
    assert trainable == case.r * (case.in_features + case.out_features)
    assert ours.get_nb_trainable_parameters() == lora.get_nb_trainable_parameters()


@cases
def test_no_unused_tensors(case):
    """Every entry of every trainable tensor takes part: with random A and B all gradients are non-zero."""
    model = adapted(one_layer(case), case_config(case)).train()
    model(random_input(7, case.in_features)).square().sum().backward()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_parameters(model))
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert (p.grad != 0).all(), name


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("hybrid_r", [0, 32])
def test_initial_down_projection_is_uniform(k, hybrid_r):
    """A_i is uniform within 1/sqrt(in/k), as the fan-in of a block asks for, and A_s within LoRA's 1/sqrt(in)."""
    case = Case(k, 64 + hybrid_r, hybrid_r, 256, 64)
    base = one_layer(case)
    torch.manual_seed(0)
    factors = factors_of(only_layer(get_peft_model(base, case_config(case))))
    for A, fan_in in [*((A_i, 256 / k) for A_i in factors.A), *([(factors.hybrid_A, 256)] if hybrid_r else [])]:
        bound = 1 / math.sqrt(fan_in)
        assert 0.99 * bound < A.abs().max() <= bound
        assert A.var().item() == pytest.approx(bound**2 / 3, rel=0.1)
        assert A.mean().abs() < 0.1 * bound


@cases
def test_initial_up_projection_is_zero(case):
    """B and B_s start at zero, A and A_s do not, so that a new adapter changes nothing."""
    base = one_layer(case)
    x = random_input(7, case.in_features)
    before = base(x)
    model = get_peft_model(base, case_config(case))
    factors = factors_of(only_layer(model))
    assert not factors.B.any() and (factors.A != 0).all()
    if case.hybrid_r:
        assert not factors.hybrid_B.any() and (factors.hybrid_A != 0).all()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gaussian_initialisation(k):
    """With "gaussian" A has the standard deviation 1/r of plain LoRA, which does not depend on the fan-in."""
    case = Case(k, 96, 32, 256, 64)
    base = one_layer(case)
    torch.manual_seed(0)
    factors = factors_of(only_layer(get_peft_model(base, case_config(case, init_lora_weights="gaussian"))))
    for A in [*factors.A, factors.hybrid_A]:
        assert A.std().item() == pytest.approx(1 / 96, rel=0.05)
    assert not factors.B.any() and not factors.hybrid_B.any()


def test_initialisation_off_gives_random_factors():
    """With init_lora_weights=False B is random too, so that the adapter is not a no-op."""
    factors = factors_of(
        only_layer(get_peft_model(one_layer(CASES[3]), case_config(CASES[3], init_lora_weights=False)))
    )
    assert all((t != 0).all() for t in factors.tensors())


# dtypes


def output_and_gradients(model, x, dy, dtype):
    """Output, and gradients of x and the factors, of plain torch in `dtype`, from the model's numbers."""
    layer = only_layer(model)
    base, factors = copy.deepcopy(layer.base_layer).to(dtype), factors_of(layer).to(dtype)
    leaf = x.detach().to(dtype, copy=True).requires_grad_()
    out = base(leaf) + 3.0 * naive_update(leaf, factors)
    return [out, *torch.autograd.grad(out, [leaf, *factors.tensors()], dy.to(dtype))]


@accuracy_cases
@kinds
@dtypes
def test_accuracy_in_the_dtype_of_the_base(case, kind, dtype):
    """Base and adapter in one dtype: output and gradients are as accurate as plain torch in that dtype."""
    model = adapted(one_layer(case, kind, dtype), case_config(case), autocast_adapter_dtype=False).train()
    assert {p.dtype for p in model.parameters()} == {dtype}
    x = random_input(61, case.in_features, dtype=dtype).requires_grad_()
    dy = random_input(61, case.out_features, dtype=dtype, seed=9)
    exact, plain = (output_and_gradients(model, x, dy, compute) for compute in (torch.float64, dtype))
    out = model(x)
    out.backward(dy)
    actual = [out, *(t.grad for t in [x, *factors_of(only_layer(model)).tensors()])]
    for a, e, p in zip(actual, exact, plain, strict=True):
        assert_accurate(a, e, p)


@accuracy_cases
@kinds
@pytest.mark.parametrize("autocast", [False, True], ids=["no-autocast", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_base_with_float32_adapter(case, kind, dtype, autocast):
    """With PEFT's default for such a base, a float32 adapter: as accurate as half precision, gradients in float32."""
    model = adapted(one_layer(case, kind, dtype), case_config(case)).train()
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    x = random_input(61, case.in_features, dtype=dtype).requires_grad_()
    dy = random_input(61, case.out_features, dtype=dtype, seed=9)
    exact, plain = (output_and_gradients(model, x, dy, compute) for compute in (torch.float64, dtype))
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out = model(x)
    out.backward(dy)
    actual = [out, x.grad, *(t.grad for t in factors_of(only_layer(model)).tensors())]
    assert [t.dtype for t in actual] == [dtype, dtype] + [torch.float32] * (len(actual) - 2)
    for a, e, p in zip(actual, exact, plain, strict=True):
        assert_accurate(a, e, p.to(a.dtype))


COMBINATIONS = [  # base, input, autocast: those that a plain LoRA accepts
    *((base, base, None) for base in (torch.float32, torch.bfloat16, torch.float16)),
    *((base, x, torch.bfloat16) for base in (torch.float32, torch.bfloat16) for x in (torch.float32, torch.bfloat16)),
    (torch.float32, torch.float32, torch.float16),
    (torch.float64, torch.float64, torch.bfloat16),
]


@few_cases
@pytest.mark.parametrize("base, x_dtype, autocast", COMBINATIONS, ids=str)
@pytest.mark.parametrize("adapter_in_float32", [True, False], ids=["float32-adapter", "same-adapter"])
def test_output_dtype_is_that_of_plain_lora(case, base, x_dtype, autocast, adapter_in_float32):
    """Whatever the dtypes of base, input, adapter and autocast, output and gradients have those of a plain LoRA."""
    dtypes_found = []
    for config in (case_config(case), peft.LoraConfig(r=case.r, target_modules=["layer"])):
        model = adapted(one_layer(case, dtype=base), config, autocast_adapter_dtype=adapter_in_float32).train()
        x = random_input(7, case.in_features, dtype=x_dtype).requires_grad_()
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            out = model(x)
        out.sum().backward()
        gradients = {p.grad.dtype for p in adapter_parameters(model).values()}
        dtypes_found.append((out.dtype, x.grad.dtype, gradients))
    assert dtypes_found[0] == dtypes_found[1]


@accuracy_cases
@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter_in_float32", [True, False], ids=["float32-adapter", "half-adapter"])
@pytest.mark.parametrize("safe", [True, False], ids=["safe", "unsafe"])
def test_merging_into_half_precision(case, kind, dtype, adapter_in_float32, safe):
    """Merging into a half-precision base, and unmerging, are as accurate as plain torch adding and subtracting dW."""
    config = case_config(case)
    model = adapted(one_layer(case, kind, dtype), config, autocast_adapter_dtype=adapter_in_float32)
    layer = only_layer(model)
    weight = layer.base_layer.weight.detach().clone()
    dW = 3.0 * naive_delta(factors_of(layer).to(torch.float64)).detach()
    dW = dW.T if kind == "conv1d" else dW
    merged = weight.clone().add_(dW.to(dtype) if safe else dW.float())  # PEFT's safe merge rounds dW first
    model.merge_adapter(safe_merge=safe)
    assert layer.base_layer.weight.dtype == dtype
    assert_accurate(layer.base_layer.weight, weight.double() + dW, merged)
    assert not torch.equal(layer.base_layer.weight, weight)
    model.unmerge_adapter()
    assert_accurate(layer.base_layer.weight, weight.double(), merged - dW.to(dtype))


# Layers that are refused


class Attention(nn.Module):
    """A model with an attention module, whose inner projection is never called as a module."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Sequence(nn.Module):
    """A good layer in front of one of another kind, to see that the first is not wrapped before the second fails."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def images():
    return random_input(2, 4, 5, 8, dtype=torch.float32)


UNSUPPORTED = {
    "layer-norm": (
        lambda: Sequence(nn.Linear(8, 8), nn.LayerNorm(8)),
        images,
        {"target_modules": ["layers.0", "layers.1"]},
        ["layers.1", "LayerNorm"],
    ),
    "attention-out-proj": (
        Attention,
        lambda: images()[:, 0],
        {"target_modules": ["out_proj"]},
        ["attention.out_proj", "NonDynamicallyQuantizableLinear"],
    ),
}


@pytest.mark.parametrize("build, inputs, fields, parts", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_layers_are_refused(build, inputs, fields, parts):
    """A layer of another kind is refused by name and kind, with the remedy, and the model stays as it was."""
    torch.manual_seed(0)
    model = build()
    with assert_unchanged(model, inputs()), pytest.raises(ValueError) as error:
        get_peft_model(model, gralora_config(**fields))
    for part in [*parts, "nn.Linear", "Conv1D", "target_modules", "use_gralora=False"]:
        assert part in str(error.value)


FEATURES = {  # in, out, k, the ks that divide both
    "in": (6, 8, 4, [1, 2]),
    "out": (8, 6, 4, [1, 2]),
    "both": (9, 15, 2, [1, 3]),
    "coprime": (7, 8, 2, [1]),
}


@pytest.mark.parametrize("in_features, out_features, k, ks", FEATURES.values(), ids=FEATURES)
@kinds
def test_k_must_divide_the_features(in_features, out_features, k, ks, kind):
    """A k that does not divide a layer's features is refused by the layer's name, with the ks that work there."""
    bad = Conv1D(out_features, in_features) if kind == "conv1d" else nn.Linear(in_features, out_features)
    model = Sequence(nn.Linear(8, 8), nn.Linear(8, in_features), bad).double()
    config = gralora_config(k=k, r=36, target_modules=["layers.0", "layers.2"])
    with assert_unchanged(model, random_input(3, 8)), pytest.raises(ValueError) as error:
        get_peft_model(model, config)
    for part in [f"gralora_k={k}", "'layers.2'", f"in_features={in_features}", f"out_features={out_features}"]:
        assert part in str(error.value)
    advised = re.search(r"use one of gralora_k=(\[.*?\])", str(error.value)).group(1)
    assert advised == str(ks)
    for good in ks:
        get_peft_model(copy.deepcopy(model), gralora_config(k=good, r=36, target_modules=["layers.2"]))


def test_error_when_adding_a_second_adapter_changes_nothing():
    """A refused second adapter leaves model and first adapter as they were; a fitting one can be added afterwards."""
    torch.manual_seed(0)
    model = adapted(Sequence(nn.Linear(8, 8), nn.Linear(8, 6)), gralora_config(2, target_modules=["0", "1"]))
    x = random_input(3, 8, dtype=torch.float32)
    with assert_unchanged(model, x), pytest.raises(ValueError, match=r"gralora_k=4 .*'layers\.1'"):
        model.add_adapter("other", gralora_config(4, target_modules=["0", "1"]))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("other", gralora_config(4, target_modules=["0"]))
    model.set_adapter("other")


CHANGES = {
    "k": ({"gralora_k": 4}, "gralora_k=4"),
    "rank": ({"r": 9}, "r=9"),
    "rank-pattern": ({"rank_pattern": {"layers.1": 9}}, "=9"),
    "hybrid": ({"hybrid_r": 8}, "hybrid_r=8"),
    "variant": ({"use_qalora": True}, "use_qalora=True"),
    "initialisation": ({"init_lora_weights": "gauss"}, "init_lora_weights='gauss'"),
}


@pytest.mark.parametrize("second", [False, True], ids=["new", "used-before"])
@pytest.mark.parametrize("changes, message", CHANGES.values(), ids=CHANGES)
def test_config_changed_after_construction_is_checked(changes, message, second):
    """Fields that are set on a config later are checked at injection, before anything of the model is changed."""
    torch.manual_seed(0)
    model = Sequence(nn.Linear(8, 8), nn.Linear(8, 6))
    config = gralora_config(2, target_modules=["layers.0", "layers.1"])
    if second:
        model = get_peft_model(model, config)
    for name, value in changes.items():
        setattr(config, name, value)
    with assert_unchanged(model, random_input(3, 8, dtype=torch.float32)), pytest.raises(ValueError, match=message):
        model.add_adapter("other", config) if second else get_peft_model(model, config)


def test_attempt_after_a_failed_one_is_checked_anew(monkeypatch):
    """A config that failed inside of PEFT, and was changed since, is checked as a new one is."""

    def fail(*args, **kwargs):
        raise MemoryError

    model = adapted(Sequence(nn.Linear(8, 8), nn.Linear(8, 6)), gralora_config(2, target_modules=["layers.0"]))
    config = gralora_config(2, target_modules=["layers.1"])
    with monkeypatch.context() as broken, pytest.raises(MemoryError):
        broken.setattr(lora.LoraModel, "_create_new_module", staticmethod(fail))
        model.add_adapter("second", config)
    config.gralora_k, config.target_modules = 4, {"layers.0", "layers.1"}
    with assert_unchanged(model, random_input(3, 8, dtype=torch.float32)), pytest.raises(ValueError) as error:
        model.add_adapter("second", config)
    assert "layers.1" in str(error.value) and "gralora_k=[1, 2]" in str(error.value)


def test_layers_under_a_parameter_wrapper_are_refused():
    """A layer that another adapter wraps through target_parameters is refused: PEFT wraps parameters, not layers."""
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["layer.weight"])
    model = get_peft_model(OneLayer(nn.Linear(8, 8)), config)
    x = random_input(3, 8, dtype=torch.float32)
    with assert_unchanged(model, x), pytest.raises(ValueError, match="target module 'layer'"):
        model.add_adapter("other", gralora_config(target_modules=["layer"]))


class Rectified(nn.Linear):
    """A base layer that is more than its weight, and keeps its output for the backward."""

    def forward(self, x):
        return super().forward(x).relu()


def test_base_layer_with_a_forward_of_its_own():
    """The adapter is added to what the base layer returns; its gradients are those of the two alone."""
    torch.manual_seed(0)
    model = adapted(OneLayer(Rectified(16, 24)).double(), gralora_config(2, target_modules=["layer"]))
    layer, x = only_layer(model), random_input(5, 16).requires_grad_()
    expected = layer.base_layer(x) + layer.scaling["default"] * naive_update(x, factors_of(layer))
    inputs = [x, *factors_of(layer).tensors()]
    assert_close64(model(x), expected)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (model(x), expected)), strict=True):
        assert_close64(a, b)


LINEAR_ONLY = {"use_dora": True, "alora_invocation_tokens": [1]}


@pytest.mark.parametrize("field", LINEAR_ONLY)
@pytest.mark.parametrize("layer", [nn.Embedding(8, 8), nn.Conv2d(8, 8, 1), nn.MultiheadAttention(8, 2)], ids=str)
def test_variants_of_linear_layers_are_refused_on_others(layer, field):
    """LoRA variants that go with GraLoRA go with linear layers only."""
    config = gralora_config(**{field: LINEAR_ONLY[field]})
    check_fields("layer", nn.Linear(8, 8), config)
    with pytest.raises(ValueError, match=f"{field}=.*'layer'"):
        check_fields("layer", layer, config)


def test_tensor_parallel_models_are_refused():
    """A base model that is split over devices by a tensor-parallel plan is refused, and left as it is."""
    model = OneLayer(nn.Linear(8, 8))
    model._tp_size = 2
    x = random_input(3, 8, dtype=torch.float32)
    with assert_unchanged(model, x), pytest.raises(ValueError, match="does not support tensor-parallel base models"):
        get_peft_model(model, gralora_config(target_modules=["layer"]))


# The choice of k for a model

AUTO = {  # r, hybrid_r, rank_pattern, widths of a chain of layers, the k of each layer, what is saved
    "below-64": (32, 0, {}, [16, 32], [2], (2, {})),
    "from-64": (64, 0, {}, [16, 32], [4], (4, {})),
    "odd-features": (64, 0, {}, [16, 15], [1], (1, {})),
    "one-layer-fits-less": (64, 0, {}, [16, 32, 6, 16, 16], [4, 2, 2, 4], (4, {"1": 2, "2": 2})),
    "odd-grid-rank": (33, 0, {}, [16, 32], [1], (1, {})),
    "hybrid-makes-it-even": (33, 1, {}, [16, 32], [2], (2, {})),
    "rank-of-one-layer": (64, 0, {"layers.1": 6}, [16, 32, 32, 16], [4, 2, 4], (4, {"1": 2})),
    "rank-of-one-layer-is-64": (6, 0, {"layers.1": 64}, [16, 32, 32, 16], [2, 4, 2], (2, {"1": 4})),
    "nearest-smaller": (66, 0, {}, [24, 48], [3], (3, {})),
}


def chain(widths):
    return Sequence(*(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)))


def ks_of(model, adapter="default"):
    return [layer.lora_A[adapter].weight.shape[0] for layer in adapter_layers(model)]


@pytest.mark.filterwarnings("ignore:gralora_k='auto' found no k > 1")
@pytest.mark.parametrize("r, hybrid_r, rank_pattern, widths, ks, saved", AUTO.values(), ids=AUTO)
def test_auto_k_fits_each_layer(tmp_path, r, hybrid_r, rank_pattern, widths, ks, saved):
    """ "auto" is one number for each layer, by its rank and features; the saved numbers give the same layers."""
    names = [f"layers.{i}" for i in range(len(ks))]
    config = gralora_config("auto", r=r, hybrid_r=hybrid_r, rank_pattern=rank_pattern, target_modules=names)
    model = adapted(chain(widths), config)
    assert ks_of(model) == ks
    model.save_pretrained(tmp_path)
    file = peft.PeftConfig.from_pretrained(tmp_path)
    assert (file.gralora_k, file.gralora_k_pattern) == saved
    base = copy.deepcopy(model).unload()
    x = random_input(3, widths[0], dtype=torch.float32)
    assert torch.equal(peft.PeftModel.from_pretrained(base, tmp_path)(x), model(x))


@pytest.mark.filterwarnings("ignore:gralora_k='auto' found no k > 1")
def test_auto_k_ignores_layers_that_are_not_targeted():
    """Only what is adapted limits k."""
    model = get_peft_model(Sequence(nn.Linear(16, 7), nn.Linear(7, 16)), gralora_config("auto", target_modules=".*1"))
    assert model.peft_config["default"].gralora_k == 1
    model = Sequence(nn.Linear(16, 8), nn.Linear(8, 7))
    config = gralora_config("auto", target_modules=r"layers\.\d", exclude_modules=["layers.1"])
    assert get_peft_model(model, config).peft_config["default"].gralora_k == 2


def test_auto_k_of_one_warns():
    """If nothing above 1 divides, the user is told which layers are plain LoRA."""
    message = r"found no k > 1 that .* 1 of the 2 targeted layers, e.g. 'layers.1' .*=\(8, 7\): .* plain LoRA"
    with pytest.warns(UserWarning, match=message):
        get_peft_model(chain([16, 8, 7]), gralora_config("auto", target_modules=r"layers\.\d"))


@pytest.mark.filterwarnings("ignore:gralora_k='auto' found no k > 1")
def test_auto_config_can_be_used_for_other_models():
    """What is chosen for one model, or adapter, is in its own config; the user's keeps "auto" for the next."""
    config = gralora_config("auto", target_modules=r"layers\.\d")
    for widths, ks in [([16, 7, 16], [1, 1]), ([16, 8, 16], [2, 2]), ([16, 8, 7], [2, 1])]:
        model = get_peft_model(chain(widths), config)
        model.add_adapter("other", config)
        for adapter in ("default", "other"):
            assert ks_of(model, adapter) == ks
            assert model.peft_config[adapter].gralora_k == ks[0]
        assert config.gralora_k == "auto" and config.gralora_k_pattern == {}


def test_auto_k_beside_a_pattern():
    """A layer that the pattern names gets its k; "auto" is for the others."""
    config = gralora_config("auto", r=64, gralora_k_pattern={"layers.1": 8}, target_modules=r"layers\.\d")
    model = get_peft_model(chain([16, 16, 16, 16]), config)
    assert ks_of(model) == [4, 8, 4]
    settled = model.peft_config["default"]
    assert (settled.gralora_k, settled.gralora_k_pattern) == (4, {"1": 8})


def test_auto_k_needs_layers_to_choose_for():
    """Where PEFT takes the layers from a state dict and the config names none, there is nothing to choose k by."""
    config = gralora_config("auto", target_modules=["other"])
    model, x = chain([16, 8]), random_input(3, 16, dtype=torch.float32)
    with assert_unchanged(model, x), pytest.raises(ValueError, match=r"gralora_k='auto' .*'other'.* a number"):
        peft.inject_adapter_in_model(config, model, state_dict={"layers.0.lora_A.weight": torch.zeros(2, 8, 8)})


# k by the name of the layer


def test_k_pattern_sets_the_k_of_layers():
    """A layer gets the k of the first key that ends its name, by PEFT's rule; output and merging are its grid's."""
    pattern = {r"layers\.[12]": 4, "1": 2, "ayers.0": 8}
    config = gralora_config(2, r=8, gralora_k_pattern=pattern, target_modules=r"layers\.\d")
    with pytest.warns(UserWarning, match=r"gralora_k_pattern keys that match no targeted layer: \['ayers.0'\]"):
        model = adapted(chain([16, 8, 24, 16]).double(), config)
    assert ks_of(model) == [2, 4, 4]
    x = y = random_input(3, 16)
    for layer in adapter_layers(model):
        y = layer.base_layer(y) + 2.0 * naive_update(y, factors_of(layer))
    assert_close64(model(x), y)
    assert_close64(model.merge_and_unload()(x), y)


def test_patterns_whose_order_matters_are_saved_without(tmp_path):
    """A saved pattern is sorted; where this would give a layer another k, r or alpha, the saved one is another."""
    ordered = {"layers.[01]": 4, "0": 2}
    patterns = {"gralora_k_pattern": ordered, "alpha_pattern": ordered, "rank_pattern": {"layers.[01]": 16, "0": 12}}
    config = gralora_config(2, r=8, **patterns, target_modules=r"layers\.\d")
    model = adapted(chain([16, 8, 24, 16, 8]), config)
    assert ks_of(model) == [4, 4, 2, 2]
    assert [layer.scaling["default"] for layer in adapter_layers(model)] == [4 / 16, 4 / 16, 2, 2]
    model.save_pretrained(tmp_path)
    x = random_input(3, 16, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path)
    assert torch.equal(loaded(x), model(x))


UNFIT = {  # fields beside r=10 and hybrid_r=2, what the error says; layer 1 has features 8 and 6
    "features": ({"gralora_k_pattern": {"1": 4}}, r"gralora_k_pattern\['1'\]=4 .*'layers.1'.*=8 .*=6"),
    "rank": ({"gralora_k_pattern": {"1": 3}}, r"'layers.1': r=10 less hybrid_r=2 .*gralora_k_pattern\['1'\]=3"),
    "rank-of-layer": (
        {"rank_pattern": {"1": 4}, "gralora_k_pattern": {"0": 2, "1": 3}},
        r"'layers.1': rank_pattern\['1'\]=4 less hybrid_r=2 .*gralora_k_pattern\['1'\]=3",
    ),
    "default": ({"k": 3, "gralora_k_pattern": {"0": 2}}, "'layers.1': r=10 less hybrid_r=2 .*gralora_k=3"),
}


@pytest.mark.parametrize("fields, message", UNFIT.values(), ids=UNFIT)
def test_k_pattern_that_does_not_fit_is_refused(fields, message):
    """Every layer's k is checked against its rank and features before any is changed; the advised ks work."""
    model = chain([16, 8, 6])
    config = gralora_config(**{"r": 10, "hybrid_r": 2, "target_modules": r"layers\.\d"} | fields)
    with assert_unchanged(model, random_input(3, 16, dtype=torch.float32)), pytest.raises(ValueError) as error:
        get_peft_model(model, config)
    assert re.search(message, str(error.value)), str(error.value)
    assert re.search(r"one of \S+=(\[.*?\])", str(error.value)).group(1) == "[1, 2]"
    for good in (1, 2):
        config.gralora_k_pattern = {"0": 2, "1": good}
        assert ks_of(get_peft_model(copy.deepcopy(model), config)) == [2, good]


# Modules as Python objects


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_of_a_model_work(make_copy):
    """A copied model gives the same output, shares no weights with the original, and can be merged and extended."""
    case = CASES[3]
    model = adapted(one_layer(case), case_config(case))
    model.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["layer"]))
    x = random_input(7, case.in_features)
    before = model(x)
    twin = make_copy(model)
    assert torch.equal(twin(x), before)
    assert type(only_layer(twin)) is type(only_layer(model)) and type(twin.base_model) is type(model.base_model)
    twin.add_adapter("other", gralora_config(4, target_modules=["layer"]))
    assert_close64(twin.merge_and_unload()(x), before)
    assert torch.equal(model(x), before)


def test_repr_tells_the_sizes():
    """Printing a model shows k, r and hybrid_r of every factor."""
    text = repr(get_peft_model(one_layer(CASES[3]), case_config(CASES[3], lora_bias=True)))
    assert "GranularDown(in=20, k=2, r=7, hybrid_r=3)" in text
    assert "GranularUp(out=12, k=2, r=7, hybrid_r=3, bias=True)" in text


def test_is_gralora_tells_adapters_apart():
    """A layer says of each adapter whether it is GraLoRA."""
    case = CASES[2]
    model = get_peft_model(one_layer(case), case_config(case))
    model.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["layer"]))
    layer = only_layer(model)
    assert isinstance(layer, GraloraLayer) and isinstance(layer, peft.tuners.lora.Linear)
    assert layer.is_gralora("default") and not layer.is_gralora("plain") and not layer.is_gralora("absent")


def test_plain_lora_layers_are_not_promoted():
    """A model without a GraLoRA adapter has only PEFT's own classes, whichever of the two configs made it."""
    for cls in (peft.LoraConfig, gralora.LoraConfig):
        model = get_peft_model(tiny_llama(), cls(r=2, target_modules="all-linear"))
        assert type(model.base_model) is peft.LoraModel
        assert {type(layer) for layer in adapter_layers(model)} == {peft.tuners.lora.Linear}


def test_install_changes_peft_once():
    """Installing again changes nothing."""
    seam = peft.LoraModel._create_and_replace
    keys = list(peft.utils.hotswap.CONFIG_KEYS_TO_CHECK[peft.PeftType.LORA])
    install()
    assert peft.LoraModel._create_and_replace is seam
    assert peft.utils.hotswap.CONFIG_KEYS_TO_CHECK[peft.PeftType.LORA] == keys
