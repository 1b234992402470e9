"""Experts computed row by row: `ops.grouped`, and the modules of transformers that `routed` computes by it."""

import copy
import importlib
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from helpers import (
    Case,
    adapted,
    adapter_parameters,
    assert_accurate,
    assert_close64,
    gralora_config,
    naive_delta,
    random_factors,
    random_input,
    randomize,
    token_ids,
)
from kinds_table import naive_experts
from peft.tuners import lora
from test_experts import ARCHITECTURES, BOTH, COMMON, naive_merge, tiny
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import gralora
from gralora import routed
from gralora.ops import Factors
from gralora.ops.activations import ACTIVATIONS
from gralora.ops.grouped import GroupedLinear, grouped_linear
from gralora.ops.routing import Groups, Routing, combine, gather
from gralora.ops.weighted_gate import weighted_gate

E, IN, OUT = 4, 12, 20
COUNTS = {"unequal": [3, 1, 6, 2], "one without": [4, 0, 7, 0], "all to one": [0, 0, 9, 0], "none": [0, 0, 0, 0]}

# One product


def stacked(k, r, hybrid_r=0, seed=0):
    """The factors of E experts."""
    each = [random_factors(Case(k, r, hybrid_r, IN, OUT), seed=seed + e) for e in range(E)]
    return each, Factors(torch.stack([f.A for f in each]), torch.stack([f.B for f in each]), scaling=1.5 + k)


def groups_of(counts):
    return Groups(torch.tensor(counts).cumsum(0, dtype=torch.int32))


@pytest.mark.parametrize("transposed", [False, True], ids=["EOI", "EIO"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_product_equals_weights_with_dw(counts, transposed):
    """Two adapters at once: output and gradients are those of W + dW, whatever the experts' numbers of rows."""
    (each, first), (others, second) = stacked(2, 6), stacked(1, 3, seed=9)
    weight = nn.Parameter(random_input(E, OUT, IN, seed=5), requires_grad=False)
    stored = nn.Parameter(weight.mT.contiguous(), requires_grad=False) if transposed else weight
    x = random_input(sum(counts), IN).requires_grad_()
    factors = [t.requires_grad_() for t in (first.A, first.B, second.A, second.B)]
    layer = GroupedLinear(stored, transposed, (first, second))
    y = grouped_linear((x,), torch.tanh, layer, groups_of(counts))
    with torch.no_grad():
        assert_close64(grouped_linear((x,), torch.tanh, layer, groups_of(counts)), y)

    dWs = []
    for e in range(E):
        grids = zip((each, others), (first, second), strict=True)
        naive = [naive_delta(own[e]._replace(A=f.A[e], B=f.B[e])) * f.scaling for own, f in grids]
        dWs.append(weight[e] + naive[0] + naive[1])
    parts = torch.tanh(x).split(counts)
    expected = torch.cat([part @ dW.T for part, dW in zip(parts, dWs, strict=True)])
    assert_close64(y, expected)
    dy = random_input(*y.shape, seed=6)
    wanted = torch.autograd.grad(expected, (x, *factors), dy, allow_unused=True)
    for t, grad, other in zip((x, *factors), torch.autograd.grad(y, (x, *factors), dy), wanted, strict=True):
        assert_close64(grad, torch.zeros_like(t) if other is None else other)


def test_gradients_of_gradients():
    """create_graph=True goes through the definition."""
    _, factors = stacked(2, 4)
    A, B = factors.A.requires_grad_(), factors.B.requires_grad_()
    weight = nn.Parameter(random_input(E, OUT, IN, seed=5), requires_grad=False)
    x = random_input(7, IN).requires_grad_()

    def product(x, A, B):
        layer = GroupedLinear(weight, False, (Factors(A, B, scaling=2.0),))
        return grouped_linear((x,), torch.tanh, layer, groups_of([3, 0, 3, 1]))

    assert torch.autograd.gradgradcheck(product, (x, A, B))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_weighted_gate(activation):
    """Gradients, and theirs, which go through the definition; weights may have more digits than what they weigh."""
    x, weights = random_input(5, 12).requires_grad_(), random_input(5, 1, seed=2).requires_grad_()
    gate = partial(weighted_gate, activation=activation)
    assert torch.autograd.gradcheck(gate, (x, weights)) and torch.autograd.gradgradcheck(gate, (x, weights))
    small, d_out = x.detach().bfloat16().requires_grad_(), random_input(5, 6, seed=3).bfloat16()
    large = weights.detach().float().requires_grad_()
    y = gate(small, large)
    grads = y.detach(), *torch.autograd.grad(y, (small, large), d_out)
    assert [t.dtype for t in grads] == [torch.bfloat16, torch.bfloat16, torch.float32]
    exact, plain = [], []
    for found, dtype in ((exact, torch.float64), (plain, torch.bfloat16)):
        inputs = (
            small.detach().to(dtype).requires_grad_(),
            large.detach().to(torch.promote_types(dtype, torch.float32)),
        )
        inputs[1].requires_grad_()
        e, u = inputs[0].chunk(2, dim=1)
        z = (ACTIVATIONS[activation].value(e) * u * inputs[1]).to(dtype)
        found += z.detach(), *torch.autograd.grad(z, inputs, d_out.to(dtype))
    for values in zip(grads, exact, plain, strict=True):
        assert_accurate(*values)


def test_routing():
    """Rows are sorted by expert, and `combine` is the transpose of `gather`."""
    chosen = torch.tensor([[2, 0], [2, 3], [0, 2]])
    routing = Routing.of(chosen, E)
    assert routing.groups.ends.tolist() == [2, 2, 5, 6] and routing.tokens.tolist() == [0, 2, 0, 1, 2, 1]
    x, y = random_input(3, IN).requires_grad_(), random_input(6, IN, seed=2).requires_grad_()
    assert torch.equal(gather(x, routing), x[routing.tokens])
    assert_close64((gather(x, routing) * y).sum(), (x * combine(y, routing)).sum())
    for function, t in ((gather, x), (combine, y)):
        torch.autograd.gradcheck(lambda t, function=function: function(t, routing), (t,))


# Modules of transformers


@use_experts_implementation(has_gate=False)
class UngatedExperts(nn.Module):
    """As some hybrids have them: one product before the activation; the forward is the contract's."""

    def __init__(self, config):
        super().__init__()
        self.num_experts, self.act_fn = config.num_local_experts, nn.Tanh()
        self.up_proj = nn.Parameter(torch.empty(config.num_local_experts, config.intermediate_size, 16))
        self.down_proj = nn.Parameter(torch.empty(config.num_local_experts, 16, config.intermediate_size))

    def forward(self, hidden, chosen, weights):
        y = torch.zeros_like(hidden)
        for t, n in torch.cartesian_prod(torch.arange(len(chosen)), torch.arange(chosen.shape[1])).tolist():
            e = chosen[t, n]
            y[t] = y[t] + weights[t, n] * (self.down_proj[e] @ self.act_fn(self.up_proj[e] @ hidden[t]))
        return y


# its name in transformers 5.6
DEEPSEEK = getattr(modeling_deepseek_v3, "DeepseekV3NaiveMoe", None) or modeling_deepseek_v3.DeepseekV3Experts
MODULES = {
    "mixtral": MixtralExperts,
    "qwen3-moe": Qwen3MoeExperts,
    "deepseek-v3": DEEPSEEK,
    "olmoe": OlmoeExperts,
    "gpt-oss": GptOssExperts,
    "ungated": UngatedExperts,
}
try:  # since transformers 5.23 or earlier: a norm after the last product
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

    MODULES["muse-spark"] = MuseSparkExperts
except ImportError:
    pass
TOKENS, HIDDEN = 9, 16
modules = pytest.mark.parametrize("name", MODULES)


class Routed(nn.Module):
    """A module of experts as a model, whose router's choices are given."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, hidden, chosen, weights):
        return self.experts(hidden, chosen, weights)


def experts_of(name="mixtral", implementation="eager", dtype=torch.float64, width=8):
    """A module with random weights and biases."""
    names = ("intermediate_size", "moe_intermediate_size")
    counts = ("num_local_experts", "num_experts", "n_routed_experts")
    config = SimpleNamespace(
        **dict.fromkeys(names, width), **dict.fromkeys(counts, E), hidden_size=HIDDEN, hidden_act="silu"
    )
    config.moe_hidden_size, config.post_norm_eps = HIDDEN, 1e-6
    config.swiglu_alpha, config.swiglu_limit = 1.702, 0.5  # so low that it clamps
    config._experts_implementation = implementation
    experts = MODULES[name](config)
    for number, p in enumerate(experts.parameters()):
        p.data = 0.4 * random_input(*p.shape, seed=number)
    return Routed(experts.to(dtype))


def inputs(dtype=torch.float64):
    """Tokens, two experts for each, of which expert 3 gets no token, and their weights."""
    chosen = torch.tensor([[0, 1], [1, 2], [1, 0], [2, 1], [1, 2], [0, 1], [1, 2], [2, 1], [1, 0]])
    weights = random_input(TOKENS, 2, seed=8).softmax(-1)
    return random_input(TOKENS, HIDDEN, dtype=dtype).requires_grad_(), chosen, weights.to(dtype).requires_grad_()


def both(model):
    return ["experts.up_proj" if hasattr(model.experts, "up_proj") else BOTH[0], BOTH[1]]


def with_grid(model, hybrid_r=2, r=8, **options):
    config = gralora_config(2, r, hybrid_r, target_modules=[], target_parameters=both(model))
    return adapted(model, config, **options)


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, lora.ParamWrapper)]


def naive_dW(layer, adapter):
    """By the loop over blocks, or PEFT's of a plain LoRA; in the parameter's layout, without scaling."""
    if layer.is_gralora(adapter):
        return naive_experts(layer, adapter)
    return lora.ParamWrapper.get_delta_weight(layer, adapter) / layer.scaling[adapter]


def merged_weights(model, adapters=("default",)):
    """The parameters of the base module with every dW, in float64; differentiable."""
    weights = {}
    for layer in wrappers(model):
        dW = sum(layer.scaling[name] * naive_dW(layer, name).double() for name in adapters)
        weights[f"experts.{layer.parameter_name}"] = layer.get_param().double() + dW
    return weights


def reference(model, base, x, adapters=("default",)):
    """What transformers' eager function gives with dW added to the weights, in float64."""
    hidden, chosen, weights = x
    base = copy.deepcopy(base).double()
    base.experts.config._experts_implementation = "eager"
    return functional_call(base, merged_weights(model, adapters), (hidden.double(), chosen, weights.double()))


@pytest.fixture
def calls(monkeypatch):
    """The routed calls of a test, in the order in which they were made."""
    made, call = [], routed.RoutedCall.__call__

    def count(self):
        made.append(self)
        return call(self)

    monkeypatch.setattr(routed.RoutedCall, "__call__", count)
    return made


def assert_same_gradients(model, y, expected, x):
    parameters = [x[0], x[2], *adapter_parameters(model).values()]
    dy = random_input(*y.shape, seed=6)
    wanted = torch.autograd.grad(expected, parameters, dy)
    for grad, other in zip(torch.autograd.grad(y, parameters, dy), wanted, strict=True):
        assert_close64(grad, other)
        assert grad.any()


@modules
def test_modules(name, calls):
    """Output and gradients of tokens, router and factors are those of weights with dW."""
    base = experts_of(name)
    model, x = with_grid(copy.deepcopy(base)), inputs()
    y = model(*x)
    assert len(calls) == 1
    expected = reference(model, base, x)
    assert_close64(y, expected)
    assert (y - base(*x)).abs().max() > 0.01
    assert_same_gradients(model, y, expected, x)
    with torch.no_grad():
        assert_close64(model(*x), y)


def test_activation_that_is_replaced():
    """What the experts compute is asked at each call: an activation without a kernel goes through autograd."""
    base, x = experts_of(), inputs()
    for activation in (nn.SiLU(), nn.Tanh(), nn.GELU()):
        base.experts.act_fn = activation
        plain = copy.deepcopy(base)
        model = with_grid(base)
        y, expected = model(*x), reference(model, plain, x)
        assert_close64(y, expected)
        assert_same_gradients(model, y, expected, x)
        base = model.unload()


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_sizes_in_memory(name):
    """Neither pass makes a tensor of the size of all experts' weights, and little is kept between them."""
    model, x = with_grid(experts_of(name, width=32), hybrid_r=0, r=4), inputs()
    experts = model.base_model.model.experts.get_base_layer()
    made, kept = [], {}

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            made.extend(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if is_new(t, experts))
            return out

    def keep(t):
        if t.is_floating_point():
            assert is_new(t, experts)
            kept[t.data_ptr()] = t.numel()
        return t

    with Sizes():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = model(*x)
        y.backward(random_input(*y.shape))
    assert max(made) < experts.down_proj.numel()
    rows = 2 * TOKENS
    tokens_and_weights, e_and_u, g = TOKENS * HIDDEN + rows, rows * 2 * 32, rows * 2 * 4
    weights_for_bias = rows * HIDDEN if name == "gpt-oss" else 0  # the bias of each row's expert
    assert sum(kept.values()) == tokens_and_weights + e_and_u + 2 * g + weights_for_bias


def is_new(t, experts):
    """Whether a tensor is none of the module's weights, nor a view of one."""
    weights = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    return isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in weights


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_implementations_and_autocast(implementation, calls):
    """float32 factors on bfloat16 experts: twice as near to float64 as adding dW has to be, also under autocast."""
    base = experts_of(implementation=implementation, dtype=torch.bfloat16)
    model, x = with_grid(copy.deepcopy(base)), inputs(torch.bfloat16)
    assert next(iter(adapter_parameters(model).values())).dtype == torch.float32
    exact = reference(model, base, x).detach()
    plain = functional_call(base, {n: w.bfloat16() for n, w in merged_weights(model).items()}, x)
    assert_accurate(model(*x), exact, plain)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(*x)
        assert_accurate(y, exact, plain)
        assert_accurate(model(x[0].float(), *x[1:]).bfloat16(), exact, plain)
    y.sum().backward()
    assert len(calls) == 3
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in adapter_parameters(model).values())


def test_float32_experts_under_autocast(calls):
    """grouped_mm computes in the dtype of the weights, and so do we; eager's products are autocast's to convert."""
    x = inputs(torch.float32)
    for implementation, number, most in (("grouped_mm", 1, 1e-4), ("eager", 0, 1)):
        base = experts_of(implementation=implementation, dtype=torch.float32)
        model = with_grid(copy.deepcopy(base))
        with torch.autocast("cpu", torch.bfloat16):
            y = model(*x)
        assert len(calls) == number
        calls.clear()
        error = (y - reference(model, base, x)).abs().max()
        assert error < most and (implementation == "grouped_mm" or error > 1e-3)


def test_adapters_of_both_kinds(calls):
    """Several active adapters, one a plain LoRA; then one, none, and some merged."""
    base = experts_of("gpt-oss")
    model, x = with_grid(copy.deepcopy(base)), inputs()
    plain = peft.LoraConfig(r=3, target_modules=[], target_parameters=both(base))
    model.add_adapter("plain", plain)
    randomize(model, "plain", seed=4)
    gralora.accelerate(model)
    names = ["default", "plain"]
    model.base_model.set_adapter(names)
    y = model(*x)
    assert_close64(y, reference(model, base, x, names))
    assert_same_gradients(model, y, reference(model, base, x, names), x)
    assert gralora.describe(model).startswith("2 of 2 LoRA layers run as one operation")
    model.set_adapter("plain")
    assert_close64(model(*x), reference(model, base, x, ["plain"]))
    expected = model(*x)
    assert len(calls) == 3
    for layer in wrappers(model):  # merged in one of the two: the other one's adapter is still to be added
        layer.merge()
        assert_close64(model(*x), expected)
        layer.unmerge()
    with model.disable_adapter():
        assert_close64(model(*x), base(*x))
    gralora.accelerate(model, False)
    number = len(calls)
    assert_close64(model(*x), reference(model, base, x, ["plain"]))
    assert len(calls) == number


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, calls):
    model, x = with_grid(experts_of("gpt-oss")), inputs()
    parameters = [x[0], x[2], *adapter_parameters(model).values()]
    expected = torch.autograd.grad(model(*x).square().sum(), parameters)
    torch.utils.checkpoint.checkpoint(model, *x, use_reentrant=reentrant).square().sum().backward()
    assert len(calls) == 3
    for t, grad in zip(parameters, expected, strict=True):
        assert torch.equal(t.grad, grad)


def test_trained_bias(calls):
    base = experts_of("gpt-oss")
    model, x = with_grid(copy.deepcopy(base)), inputs()
    experts = model.base_model.model.experts.get_base_layer()
    dy = random_input(TOKENS, HIDDEN, seed=6)
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        bias = getattr(experts, name).requires_grad_()
        (grad,) = torch.autograd.grad(model(*x), bias, dy)
        weights = merged_weights(model) | {f"experts.{name}": bias}
        (expected,) = torch.autograd.grad(functional_call(base, weights, x), bias, dy)
        assert_close64(grad, expected)
    assert len(calls) == 2


def hooked(model, experts):
    experts.register_forward_hook(lambda module, args, out: None)


def trained(model, experts):
    experts.down_proj.requires_grad_()


def another_implementation(model, experts):
    experts.config._experts_implementation = "of a test"


def another_forward(model, experts):
    class Own(type(experts)):
        def forward(self, *args):
            return super().forward(*args)

    experts.__class__ = Own


def spread(model, experts):
    experts._is_expert_parallel = True


def plain(model, experts):
    model.add_adapter("plain", peft.LoraConfig(r=3, target_modules=[], target_parameters=BOTH))
    randomize(model, "plain")
    model.base_model.set_adapter(["default", "plain"])
    assert "2 with several active adapters" in gralora.describe(model)


@pytest.mark.parametrize("prevent", [hooked, trained, another_implementation, another_forward, spread, plain])
def test_others_keep_the_weights_with_dw(prevent, calls, monkeypatch):
    """A module that cannot be computed so has the same output, from weights with dW."""
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "of a test", ALL_EXPERTS_FUNCTIONS["batched_mm"])
    base = experts_of()
    model, x = with_grid(copy.deepcopy(base)), inputs()
    prevent(model, model.base_model.model.experts.get_base_layer())
    assert_close64(model(*x), reference(model, base, x, model.active_adapters))
    assert not calls


AS_TRANSFORMERS_5_6 = """
from functools import wraps


def patch(update_layer):
    @wraps(update_layer)
    def new_update_layer(layer, *args, **kwargs):
        if not layer._did_swap_in_out_features:
            layer.in_features, layer.out_features = layer.out_features, layer.in_features
            layer._did_swap_in_out_features = True
        return update_layer(layer, *args, **kwargs)

    return new_update_layer
"""


def test_load_adapter_of_older_transformers(calls, monkeypatch):
    """After it, PEFT takes transposed experts for what they are not: no GraLoRA does, and plain LoRAs stay PEFT's."""
    there = {"__name__": "transformers.integrations.peft"}
    exec(AS_TRANSFORMERS_5_6, there)
    patched = there["patch"](there["patch"](lora.ParamWrapper.update_layer))  # at every call
    monkeypatch.setattr(lora.ParamWrapper, "update_layer", patched)
    base, x = experts_of("gpt-oss"), inputs()
    model = with_grid(copy.deepcopy(base))
    assert lora.ParamWrapper.update_layer is patched
    assert_close64(model(*x), reference(model, base, x))
    assert len(calls) == 1
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=both(base))
    plain = randomize(peft.get_peft_model(copy.deepcopy(base), config))
    expected = plain(*x)
    assert_close64(gralora.accelerate(plain)(*x), expected)
    assert len(calls) == 1


class AnyConfig:
    """A small value for every field that a class of experts reads."""

    _experts_implementation = "eager"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        values = {"experts": E, "act": "silu", "limit": 0.5, "alpha": 1.702, "eps": 1e-6, "bias": False}
        sized = HIDDEN if "size" in name or "dim" in name else None
        found = (value for part, value in values.items() if part in name)
        return self if name == "moe_config" else sized or next(found, HIDDEN)


@pytest.mark.slow
def test_every_class_of_transformers(calls):
    """Every class of experts that the installed version has agrees with its own eager forward on weights with dW."""
    models, seen = Path(transformers.__file__).parent / "models", []
    for file in sorted(models.glob("*/modeling_*.py")):
        names = re.findall(r"^@use_experts_implementation.*?^class (\w+)", file.read_text(), re.M | re.S)
        for name in names:
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            experts = getattr(module, name)(AnyConfig())
            for number, p in enumerate(experts.parameters()):
                p.data = 0.4 * random_input(*p.shape, seed=number)
            base, x = Routed(experts.double()), inputs()
            model = with_grid(copy.deepcopy(base))
            y, expected = model(*x), reference(model, base, x)
            error = (y - expected).abs().max() / expected.abs().max()
            seen.append((name, len(calls), float(error)))
            calls.clear()
    assert len(seen) > 20 and all(number == 1 for _, number, _ in seen)
    assert all(error < 1e-5 for _, _, error in seen), "some compute in float32"
    assert sum(error > 1e-12 for _, _, error in seen) <= 3, seen


# Models

FAMILIES = ARCHITECTURES | {"olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 4})}


@pytest.mark.parametrize("family", FAMILIES)
def test_generation(family, calls, monkeypatch):
    """Greedy generation gives, token for token, what the merged model does."""
    monkeypatch.setitem(ARCHITECTURES, "olmoe", FAMILIES["olmoe"])
    config = gralora_config(2, 8, 2, target_modules=[], target_parameters=BOTH)
    model = adapted(tiny(family), config)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = token_ids(2, 5)
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert len(calls) >= 12
    number = len(calls)
    assert torch.equal(naive_merge(model).generate(ids, attention_mask=torch.ones_like(ids), **options), tokens)
    assert len(calls) == number and COMMON["num_experts_per_tok"] == 2


def test_compiled_model():
    """torch.compile traces what adds dW to the weights."""
    model, x = with_grid(experts_of(dtype=torch.float32)), inputs(torch.float32)
    torch.testing.assert_close(torch.compile(model, backend="eager")(*x), model(*x), rtol=1e-4, atol=1e-4)
