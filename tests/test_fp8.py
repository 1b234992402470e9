"""FP8 bases: layers against float64 of the dequantised weight, products of 8-bit floats, conversions, real files."""

import ast
import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fp8_layers import fp8_dequantized, fp8_linear, run_without_hub_kernels
from helpers import (
    Case,
    OneLayer,
    adapted,
    case_config,
    factors_of,
    gralora_config,
    naive_delta,
    naive_update,
    only_layer,
    random_factors,
    random_input,
    randomize,
    tiny_llama,
    token_ids,
)
from operators import gralora_linear
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import gralora
from gralora import fp8 as fp8_models
from gralora.ops import Factors, Float8Weight, fp8, plans
from gralora.ops.interface import KernelUnavailable

pytest.importorskip("torchao")

CASE = Case(4, 10, 2, 64, 96)
ROUNDING = 0.0245  # root mean square of E4M3's relative rounding error, of values whose logarithms are uniform


def scaled(layer: Any) -> Tensor:
    """The weight of torchao's layer by its parts, float64."""
    weight = layer.weight
    rows, columns = weight.block_size
    scales = weight.scale.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return weight.qdata.double() * scales


def layers(dtype: torch.dtype = torch.float32) -> dict[str, tuple[nn.Module, Tensor]]:
    """Each kind of FP8 layer of CASE's sizes, and its weight in float64."""
    from torchao.quantization import Float8Tensor, PerRow, PerTensor
    from torchao.quantization.granularity import PerGroup

    torch.manual_seed(2)
    linear = nn.Linear(CASE.in_features, CASE.out_features).to(dtype).requires_grad_(False)
    found: dict[str, tuple[nn.Module, Tensor]] = {}
    for granularity in (PerRow(), PerTensor(), PerGroup(16)):
        layer = copy.deepcopy(linear)
        weight = Float8Tensor.from_hp(linear.weight.detach(), granularity=granularity)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        found[type(granularity).__name__] = layer, scaled(layer)
    layer = copy.deepcopy(linear)
    layer.weight = nn.Parameter(quantises_its_input(linear.weight.detach()), requires_grad=False)
    found["quantises its input"] = layer, scaled(layer)
    for block in ((32, 16), (96, 64)):
        layer = fp8_linear(linear, block)
        found[f"blocks of {block}"] = layer, fp8_dequantized(layer).double()
    return found


KINDS = ("PerRow", "PerTensor", "PerGroup", "quantises its input", "blocks of (32, 16)", "blocks of (96, 64)")


def quantises_its_input(weight: Tensor) -> Any:
    """What Float8DynamicActivationFloat8WeightConfig makes of a weight, which it refuses to do on a CPU."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs

    how = QuantizeTensorToFloat8Kwargs(granularity=PerRow())
    return Float8Tensor.from_hp(weight, granularity=PerRow(), mm_config=Float8MMConfig(), act_quant_kwargs=how)


@pytest.fixture
def products(monkeypatch):
    """Let all FP8 weights be multiplied as they are stored, on the CPU, too."""
    monkeypatch.setattr(fp8, "choice", "products")
    monkeypatch.setattr(plans, "CPU", replace(plans.CPU, fp8_product="fp8"))
    plans.fp8_module.cache_clear()
    yield
    plans.fp8_module.cache_clear()


def relative(error: Tensor, exact: Tensor) -> float:
    return (error.double().norm() / exact.double().norm()).item()


def definition(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Any, scaling: float) -> Tensor:
    """An adapted layer by the block loop."""
    return nn.functional.linear(x, weight, bias) + scaling * naive_update(x, factors)


# The dequantised weight


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["plain", "autocast", "checkpointed", "dropout"])
def test_output_and_gradients(name, dtype, way):
    """All are those of the dequantised weight in float64, and nothing of its size is kept for the backward."""
    base, weight = layers(dtype)[name]
    dropout = 0.4 if way == "dropout" else 0.0
    model = adapted(OneLayer(base), case_config(CASE, lora_dropout=dropout)).train()
    layer = only_layer(model)
    if way != "autocast":
        layer.lora_A.to(dtype), layer.lora_B.to(dtype)
    x = random_input(9, CASE.in_features, dtype=dtype).requires_grad_()
    dy = random_input(9, CASE.out_features, dtype=dtype, seed=5)
    kept: list[Tensor] = []
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast")
    with autocast, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if way == "checkpointed" else model(x)
    assert way == "checkpointed" or not any(t.numel() >= weight.numel() for t in kept)
    factors = factors_of(layer)
    grads = torch.autograd.grad(y, [x, *factors.tensors()], dy.to(y.dtype))

    exact_x = x.detach().double().requires_grad_()
    exact = Factors(*(None if t is None else t.detach().double().requires_grad_() for t in factors), 3.0)
    bias = base.bias.double()
    if way == "dropout":
        assert y.isfinite().all() and all(grad.isfinite().all() and grad.any() for grad in grads)
        model.eval()
        y = model(x)
    tensors = type(factors)(*exact[:4])
    exact_y = definition(exact_x, weight, bias, tensors, 3.0)
    tolerance = 2e-6 if dtype is torch.float32 and way != "autocast" else 1e-2
    assert relative(y.double() - exact_y, exact_y) < tolerance
    if way != "dropout":
        wanted = torch.autograd.grad(exact_y, [exact_x, *tensors.tensors()], dy.double())
        for grad, exact_grad in zip(grads, wanted, strict=True):
            assert relative(grad.double() - exact_grad, exact_grad) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("values", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("block", [(1, 64), (32, 64), (8, 8), (7, 30), (32, 3), (1, 16)], ids=str)
def test_dense(dtype, values, block):
    """Value times scale, rounded once, with blocks that end where the weight does or not; and transposed."""
    w = random_input(32, 64, dtype=torch.float32)
    q, scales = fp8_models.quantize_blocks(w, block, values)
    exact = q.double() * scales.double().repeat_interleave(block[0], 0)[:32].repeat_interleave(block[1], 1)[:, :64]
    weight = Float8Weight(q, scales, block)
    assert torch.equal(weight.dense(dtype), exact.float().to(dtype))
    assert torch.equal(weight.t().dense(dtype), exact.float().to(dtype).T)
    assert relative(exact - w, w) < (0.03 if values is torch.float8_e4m3fn else 0.06)


# Products of 8-bit floats


def float8(w: Tensor) -> Float8Weight:
    values, scales = fp8.quantize_rows(w)
    return Float8Weight(values, scales, (1, w.shape[1]))


def test_quantize_rows():
    """Rows of zeros, of tiny and of huge numbers keep E4M3's precision; what is not finite stays so."""
    x = random_input(6, 64, dtype=torch.float32)
    x[1], x[2], x[3] = 0, x[2] * 1e-30, x[3] * 1e30
    values, scales = fp8.quantize_rows(x)
    assert values.float().abs().amax(1).tolist() == [448.0, 0.0, 448.0, 448.0, 448.0, 448.0]
    for row in (0, 2, 3, 4, 5):
        assert relative(values[row].double() * scales[row].double() - x[row], x[row]) < 1.2 * ROUNDING
    x[4, 3], x[5, 7] = torch.nan, torch.inf
    values, scales = fp8.quantize_rows(x)
    product = values.float() * scales
    assert product[:4].isfinite().all() and product[4].isnan().any() and not product[5].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k, r, h, bias", [(4, 8, 0, True), (2, 8, 3, False)])
@pytest.mark.parametrize("per_row", [True, False])
def test_error_of_the_product(products, dtype, k, r, h, bias, per_row):
    """y and dx are off by what rounding x and dy to E4M3 says; the factors' gradients are those without it."""
    n_in, n_out, tokens = 256, 128, 96
    weight = float8(random_input(n_out, n_in, dtype=torch.float32, seed=3))
    if not per_row:
        w = random_input(n_out, n_in, dtype=torch.float32, seed=3)
        weight = Float8Weight(*fp8_models.quantize_blocks(w, (n_out, n_in), torch.float8_e4m3fn), (n_out, n_in))
    dense = weight.dense(torch.float64)
    case = Case(k, r + h, h, n_in, n_out)
    factors = [None if t is None else (0.1 * t).to(dtype).requires_grad_() for t in random_factors(case)]
    x = random_input(tokens, n_in, dtype=dtype).requires_grad_()
    b = random_input(n_out, dtype=dtype, seed=8) if bias else None
    dy = random_input(tokens, n_out, dtype=dtype, seed=6)
    trained = [x, *(t for t in factors if t is not None)]
    y = gralora_linear(x, weight, b, *factors, 0.5)
    dx, *grads = torch.autograd.grad(y, trained, dy)

    doubles = [t.detach().double().requires_grad_() for t in trained]
    parts = iter(doubles[1:])
    exact_factors = type(random_factors(case))(*(None if t is None else next(parts) for t in factors))
    exact = definition(doubles[0], dense, None if b is None else b.double(), exact_factors, 0.5)
    exact_dx, *exact_grads = torch.autograd.grad(exact, doubles, dy.double())
    assert 0.85 * ROUNDING < relative(y.double() - exact, doubles[0] @ dense.T) < 1.2 * ROUNDING
    assert 0.85 * ROUNDING < relative(dx.double() - exact_dx, dy.double() @ dense) < 1.2 * ROUNDING
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert relative(grad.double() - exact_grad, exact_grad) < (1e-2 if dtype is torch.bfloat16 else 1e-5)


def test_products_are_of_the_values_as_they_are_stored(products):
    """Up to float32 sums: the products of quantised x with the values of W, and of dy, its scales in it, with W^T."""
    weight = float8(random_input(48, 64, dtype=torch.float32, seed=3))
    x, dy = random_input(7, 64, dtype=torch.float32), random_input(7, 48, dtype=torch.float32)
    for a, of, scales in ((x, weight, weight.scales.T), (dy, weight.t(), torch.ones(1, 64))):
        values, rows = fp8.quantize_rows(a if of is weight else a * weight.scales.T)
        exact = (values.double() * rows.double()) @ (of.values.double().T * scales.double())
        y = torch.full(exact.shape, 2.0)
        none = torch.zeros(1, 7, 2), torch.zeros(1, 2, len(of.values))
        fp8.linear(y, a, of, None, *none)
        assert relative(y.double() - exact, exact) < 1e-6
        fp8.linear(y, a, of, None, *none, adds=True)
        assert relative(y.double() - 2 * exact, exact) < 1e-6


@pytest.mark.parametrize("way", ["plain", "checkpointed", "dropout"])
def test_models_with_products(products, way):
    """q, k, v and the gated MLP, too, whose gradients of x are added up inside of products: as dequantised, nearly."""
    model = gralora.quantize_fp8(wide_llama())
    dropout = 0.2 if way == "dropout" else 0.0
    model = get_peft_model(model, config(lora_dropout=dropout, init_lora_weights=False)).train()
    if way == "checkpointed":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, outcomes = token_ids(2, 8), []
    for choice in ("products", "dequantised"):
        fp8.choice = choice
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        outcomes.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for ours, exact in zip(*outcomes, strict=True):
        assert 0 < relative(ours - exact, exact) < 0.2


@pytest.mark.parametrize(
    "name, choice",
    [(name, "dequantised") for name in ("PerRow", "blocks of (32, 16)", "quantises its input")]
    + [(name, "products") for name in ("PerRow", "blocks of (96, 64)", "quantises its input")],
)
def test_compiled(products, name, choice):
    """As in eager mode; an operator where 8-bit floats are multiplied or the layer's own product has no gradient."""
    fp8.choice, graphs = choice, []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return aot_eager(graph, inputs)

    base, _ = layers()[name]
    is_operator = choice == "products" or name != "PerRow"
    model = adapted(OneLayer(base), case_config(CASE))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for tokens in (9, 17):
        dy, outcomes = random_input(tokens, CASE.out_features, seed=5, dtype=torch.float32), []
        for function in (model, compiled):
            x = random_input(tokens, CASE.in_features, dtype=torch.float32).requires_grad_()
            y = function(x)
            parts = [p for p in model.parameters() if p.requires_grad]
            outcomes.append([y.detach(), *torch.autograd.grad(y, [x, *parts], dy)])
        for eager, ours in zip(*outcomes, strict=True):
            assert relative(ours - eager, eager) < 1e-5
    assert graphs and all(("gralora.fp8_linear" in code) == is_operator for code in graphs)


def test_products_only_where_asked_for(products):
    """By default for layers that quantise their inputs themselves; scales per block are dequantised."""
    x = random_input(5, CASE.in_features, dtype=torch.float32)
    for name, (base, weight) in layers().items():
        model = adapted(OneLayer(base), case_config(CASE))
        exact = definition(
            x.double(), weight, base.bias.double(), factors_of(only_layer(model)).to(torch.float64), 3.0
        )
        fp8.choice = "auto"
        error = relative(model(x).double() - exact, exact)
        multiplied = name in ("quantises its input", "blocks of (96, 64)")  # one block is one scale
        assert (1e-4 < error < 0.03) if multiplied else error < 1e-6, name
        fp8.choice = "dequantised"
        assert relative(model(x).double() - exact, exact) < 1e-6


@pytest.mark.parametrize(
    "weight, problem",
    [
        (
            Float8Weight(torch.zeros(32, 64).to(torch.float8_e5m2), torch.ones(32, 1), (1, 64)),
            "holds torch.float8_e5m2",
        ),
        (Float8Weight(torch.zeros(32, 64).to(fp8.E4M3), torch.ones(2, 4), (16, 16)), "has 2 x 4 scales"),
        (Float8Weight(torch.zeros(32, 60).to(fp8.E4M3), torch.ones(32, 1), (1, 60)), r"is \[32, 60\], and products"),
    ],
)
def test_weights_without_product(products, weight, problem):
    """What is asked for and impossible is an error that says why, and what would work."""
    x, factors = torch.randn(3, weight.shape[1]), (torch.zeros(1, weight.shape[1], 2), torch.zeros(1, 2, 32))
    with pytest.raises(RuntimeError, match=f"GRALORA_FP8=products: the weight {problem}.*GRALORA_FP8=dequantised"):
        gralora_linear(x, weight, None, *factors, None, None, 1.0)
    fp8.choice = "dequantised"
    assert gralora_linear(x, weight, None, *factors, None, None, 1.0).shape == (3, 32)


def test_hardware_without_products(monkeypatch):
    """The error names the card; without being asked for, the dequantised weight computes."""
    x, weight = torch.randn(3, 64), float8(torch.randn(32, 64))
    factors = torch.zeros(1, 64, 2), torch.zeros(1, 2, 32), None, None, 1.0
    asks = replace(weight, quantises_input=True)
    torch.testing.assert_close(gralora_linear(x, asks, None, *factors), x @ weight.dense(torch.float32).T)
    monkeypatch.setattr(fp8, "choice", "products")
    with pytest.raises(RuntimeError, match="GRALORA_FP8=products: the CPU multiplies no 8-bit floats"):
        gralora_linear(x, weight, None, *factors)


@pytest.mark.parametrize(
    "capability, product", [((12, 0), "fp8"), ((9, 0), "fp8_hopper"), ((8, 9), "fp8"), ((8, 0), "")]
)
def test_which_gpus(monkeypatch, capability, product):
    """Our own product on Hopper, and torch's instead where that cannot be compiled or was not chosen."""
    pytest.importorskip("triton.experimental.gluon")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(plans, "_failed", set())
    plans.choose("auto")
    module, card = plans.fp8_module(0)
    assert module == product and card == f"NVIDIA X, of compute capability {capability[0]}.{capability[1]},"
    with pytest.warns(RuntimeWarning, match="no room. From now on torch computes instead"):
        plans.give_up(KernelUnavailable("no room", "fp8_hopper"))
    assert plans.fp8_module(0)[0] == ("fp8" if product else "")
    plans._failed.clear()
    for chosen in ("torch", "auto"):
        plans.choose(chosen)
        assert plans.fp8_module(0)[0] == (product if chosen == "auto" or not product else "fp8")
    plans.choose("auto")


def test_choice(monkeypatch):
    monkeypatch.setenv("GRALORA_FP8", "always")
    with pytest.raises(ValueError, match="GRALORA_FP8='always' is not known; use one of auto, products, dequantised"):
        fp8.read_choice()


# Models and files


def wide_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2}
    return tiny_llama(dtype, initializer_range=0.1, **sizes)


def config(**fields: Any) -> gralora.LoraConfig:
    return gralora_config(target_modules="all-linear", **fields)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(token_ids(2, 6)).logits.float()


def test_quantize_fp8(tmp_path):
    """In place what transformers makes while it loads; saved and read again bit for bit, with its adapter."""
    from torchao.quantization import Float8WeightOnlyConfig
    from transformers import TorchAoConfig

    wide_llama(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "bf16", dtype=torch.bfloat16, quantization_config=TorchAoConfig(Float8WeightOnlyConfig())
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    assert gralora.quantize_fp8(model) is model
    kinds = {name: type(p).__name__ for name, p in model.named_parameters()}
    assert kinds == {name: type(p).__name__ for name, p in loaded.named_parameters()}
    assert {name.split(".")[-2] for name, kind in kinds.items() if kind == "Parameter"} == {
        "embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip
    assert torch.equal(logits(model), logits(loaded))

    model.save_pretrained(tmp_path / "fp8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16)
    assert torch.equal(logits(again), logits(model))
    tuned = randomize(get_peft_model(model, config()))
    tuned.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "adapter")), logits(tuned))


def test_quantize_fp8_leaves_out(tmp_path):
    """Modules by their names or parts of these, also read from its files, and in models that are not transformers'."""
    model: Any = gralora.quantize_fp8(wide_llama(), ["layers.0.mlp", "q_proj"])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert [type(p) for p in again.parameters()] == [type(p) for p in model.parameters()]
    assert torch.equal(logits(again), logits(model))
    converted = {name for name, p in model.named_parameters() if type(p).__name__ == "Float8Tensor"}
    assert "model.layers.1.mlp.up_proj.weight" in converted and "lm_head.weight" not in converted
    assert not [name for name in converted if "layers.0.mlp" in name or "q_proj" in name]
    plain = nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 32)))
    gralora.quantize_fp8(plain, ["1"])
    assert [type(plain[0].weight).__name__, type(plain[1][0].weight).__name__] == ["Float8Tensor", "Parameter"]


def test_quantize_fp8_refuses():
    with pytest.raises(ValueError, match="Embedding has no linear layer to convert to FP8"):
        gralora.quantize_fp8(nn.Embedding(3, 4))
    tuned = get_peft_model(wide_llama(), config())
    for function in (gralora.quantize_fp8, gralora.dequantize_fp8):
        with pytest.raises(ValueError, match="takes a model without adapters, and 'model.layers.0.self_attn.q_proj'"):
            function(tuned.base_model.model)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no FP8 layer"):
        gralora.dequantize_fp8(tuned.unload())


def test_layers_that_quantise_their_input_become_differentiable():
    """torchao's product of them has no gradient; converted, their numbers are the same and x gets one."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False, dtype=torch.bfloat16))
    model[0].weight = nn.Parameter(quantises_its_input(model[0].weight.detach()), requires_grad=False)
    before, x = model[0].weight, random_input(3, 64, dtype=torch.bfloat16).requires_grad_()
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_mm is not implemented"):
        model(x).sum().backward()
    gralora.quantize_fp8(model)
    after = model[0].weight
    assert torch.equal(after.qdata.float(), before.qdata.float()) and torch.equal(after.scale, before.scale)
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, after.dequantize().sum(0).expand(3, 64), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("fine_grained", [False, True])
def test_exact_merge(fine_grained, monkeypatch):
    """Into the dequantised base the adapter is merged to a rounding; a merge into FP8 says what it loses."""
    run_without_hub_kernels(monkeypatch)
    model = wide_llama()
    if fine_grained:
        blockwise(model)
    else:
        gralora.quantize_fp8(model)
    tuned = randomize(get_peft_model(model, config(init_lora_weights=False)))
    expected, weights = logits(tuned), {}
    for name, layer in tuned.named_modules():
        if hasattr(layer, "lora_A"):
            dense = fp8_models.float8_weight(layer.get_base_layer()).dense(torch.float32)
            dW = layer.scaling["default"] * naive_delta(factors_of(layer))
            weights[name.removeprefix("base_model.model.")] = dense, dense + dW.detach()
    exact = copy.deepcopy(tuned)
    adapter = {name: p.detach().clone() for name, p in tuned.named_parameters() if "lora_" in name}
    with pytest.warns(UserWarning, match="merging into the FP8 weights of 14 layers") as warned:
        merged = tuned.merge_and_unload()
    lost = weight = update = 0.0
    for name, (dense, sum_) in weights.items():
        stored = fp8_models.float8_weight(merged.get_submodule(name)).dense(torch.float32)
        lost += (stored - sum_).double().square().sum().item()
        weight += sum_.double().square().sum().item()
        update += (sum_ - dense).double().square().sum().item()
    told = [str(w.message) for w in warned if "merging into the FP8" in str(w.message)]
    assert len(told) == 1
    assert f"by {math.sqrt(lost / weight):.1%}, which is {math.sqrt(lost / update):.0%} of the update" in told[0]

    base = gralora.dequantize_fp8(exact.unload())
    assert not [m for m in base.modules() if fp8_models.float8_weight(m) is not None]
    again = get_peft_model(base, config())
    with torch.no_grad():
        for name, p in again.named_parameters():
            if "lora_" in name:
                p.copy_(adapter[name])
    exact_merge = again.merge_and_unload()
    assert relative(logits(exact_merge) - expected, expected) < 1e-5
    for name, (_, sum_) in weights.items():
        torch.testing.assert_close(exact_merge.get_submodule(name).weight, sum_, rtol=1e-5, atol=1e-6)


def blockwise(model: nn.Module) -> None:
    """Convert the linear layers of a Llama as transformers' FineGrainedFP8Config does on a GPU."""
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.model.set_submodule(name, fp8_linear(layer, (32, 32)))


@pytest.fixture
def fine_grained_files(tmp_path, monkeypatch):
    """A checkpoint of transformers' FineGrainedFP8Config, which it quantises and writes itself."""
    from transformers import FineGrainedFP8Config
    from transformers.quantizers import quantizer_finegrained_fp8

    cls = quantizer_finegrained_fp8.FineGrainedFP8HfQuantizer
    run_without_hub_kernels(monkeypatch)
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(cls, "validate_environment", lambda self, *args, **kwargs: None)  # it asks for a GPU
        wide_llama(torch.bfloat16).save_pretrained(tmp_path / "bf16")
        options: Any = {"dtype": torch.bfloat16}
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "bf16", quantization_config=FineGrainedFP8Config(), **options
        )
        model.save_pretrained(tmp_path / "fp8")
        yield SimpleNamespace(
            folder=tmp_path / "fp8", load=lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", **options)
        )


def test_fine_grained_files(fine_grained_files, tmp_path):
    """Its layers are read where they lie, trained on, and their adapter comes back; where there is no GPU, too."""
    model = fine_grained_files.load()
    layer = model.model.layers[0].mlp.down_proj
    assert type(layer).__name__ == "FP8Linear" and layer.weight.dtype == torch.float8_e4m3fn
    base = logits(model)
    tuned = randomize(get_peft_model(model, config()))
    assert {p.dtype for name, p in tuned.named_parameters() if "lora_" in name} == {torch.float32}
    adapted_logits = logits(tuned)
    assert relative(adapted_logits - base, base) > 0.05
    tuned.train()(input_ids=token_ids(2, 6), labels=token_ids(2, 6)).loss.backward()
    assert all(p.grad.any() for p in tuned.parameters() if p.requires_grad)
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(fine_grained_files.load(), tmp_path / "adapter")
    assert torch.equal(logits(again), adapted_logits)


@pytest.mark.parametrize("fine_grained", [False, True])
def test_merge_of_files(fine_grained, fine_grained_files, tmp_path):
    """`gralora merge` reads FP8 files and writes bfloat16 ones: the dequantised weight and dW, rounded once."""
    folder = fine_grained_files.folder
    if not fine_grained:
        model: Any = gralora.quantize_fp8(
            AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
        )
        folder = tmp_path / "torchao"
        model.save_pretrained(folder, max_shard_size="100KB")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tuned = get_peft_model(base, config(init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    report = gralora.merge_adapter(tmp_path / "adapter", tmp_path / "merged", folder)
    assert report["layers"] == 14 and report["verified"] > 0
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert not hasattr(merged.config, "quantization_config")
    for name, layer in tuned.named_modules():
        if hasattr(layer, "lora_A"):
            dW = layer.scaling["default"] * naive_delta(factors_of(layer)).detach()
            exact = fp8_models.float8_weight(layer.get_base_layer()).dense(torch.float32).double() + dW
            weight = merged.get_submodule(name.removeprefix("base_model.model.")).weight
            assert ((weight.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    expected = logits(tuned)
    assert relative(logits(merged) - expected, expected) < 0.03


def test_adapters_of_fp8_layers_have_a_dtype_to_train_in():
    """PEFT gives them the weight's 8 bits first, which would round the numbers that they start from."""
    model = wide_llama()
    blockwise(model)
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        tuned = get_peft_model(copy.deepcopy(model), config(), autocast_adapter_dtype=autocast)
        A = tuned.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight
        assert A.dtype == dtype and A.detach().unique().numel() > 200


def test_fp8_layers_that_no_adapter_fits(monkeypatch):
    """Grouped products and 4-bit floats are refused by name, and so are DoRA and biases on scales per block."""
    layer = fp8_linear(nn.Linear(32, 32), (16, 16))
    with pytest.raises(ValueError, match="use_dora=True cannot be combined with the target 'layer'"):
        get_peft_model(OneLayer(copy.deepcopy(layer)), case_config(Case(2, 8, 0, 32, 32), use_dora=True))
    packed = copy.deepcopy(layer)
    packed.weight = nn.Parameter(torch.zeros(32, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="which holds 4-bit floats"):
        get_peft_model(OneLayer(packed), case_config(Case(2, 8, 0, 32, 32)))
    layer.__class__ = type("FP8GroupedLinear", (type(layer),), {})
    with pytest.raises(ValueError, match="which is a grouped product, no linear layer"):
        get_peft_model(OneLayer(layer), case_config(Case(2, 8, 0, 32, 32)))


def test_benchmark(capsys):
    """Each base's step is compared in float64 with its own weights: bf16's as they are, FP8's dequantised."""
    from benchmarks import fp8 as benchmark

    chosen = fp8.choice
    try:
        benchmark.main(["speed", "--tiny", "--device", "cpu", "--rounds", "1"])
    finally:
        fp8.choice = chosen
    lines = [line for line in capsys.readouterr().out.splitlines() if "gralora, " in line]
    assert len(lines) == 2
    for line in lines:
        errors = ast.literal_eval(line[line.rindex("{") :])
        assert 0 < errors["A"] < 1e-5 and 0 < errors["B"] < 1e-5 and errors["loss"] < 1e-6
