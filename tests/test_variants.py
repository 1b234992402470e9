"""GraLoRA with DoRA and with aLoRA: PEFT's variants on a grid's factors."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from helpers import (
    CASES,
    MODELS,
    TARGETS,
    Case,
    adapted,
    adapter_layers,
    adapter_parameters,
    assert_accurate,
    assert_close64,
    assert_unchanged,
    case_config,
    cases,
    dora,
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
from peft import PeftModel
from saved import edit, logits, read, save_fork, save_gralora
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gralora
from gralora import inject
from gralora.dora import GranularDora, dora_factors, row_norms
from gralora.ops import compiled


def weight_of(layer) -> Tensor:
    """W, `[O, I]`."""
    weight = layer.get_base_layer().weight
    return weight.T if layer.fan_in_fan_out else weight


def magnitude_of(layer, adapter: str = "default") -> Tensor:
    return layer.lora_magnitude_vector[adapter].weight


def dora_weight(layer, scaling: float = 3.0, adapter: str = "default") -> Tensor:
    """W' = m (W + dW) / |W + dW|, with the norm a constant, from the definitions."""
    V = weight_of(layer) + scaling * naive_delta(factors_of(layer, adapter))
    return (magnitude_of(layer, adapter) / V.detach().norm(dim=1))[:, None] * V


def dora_model(case: Case, kind: str = "linear", **fields):
    """One layer with random factors and magnitudes."""
    return adapted(one_layer(case, kind), case_config(case, use_dora=True, **fields))


# DoRA


@dora
@cases
def test_row_norms(case: Case) -> None:
    """The norms of W + dW from products of factors are those of the full matrices."""
    layer = only_layer(dora_model(case))
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    for scaling in (3.0, -0.5):
        V = weight_of(layer) + scaling * naive_delta(factors_of(layer))
        assert_close64(row_norms(weight_of(layer), dora_factors(A, B, scaling)), V.norm(dim=1).detach())


@dora
@few_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_norms_are_accurate(case: Case, dtype: torch.dtype) -> None:
    """In low precision they are as near to the exact ones as those of W + dW formed in float32."""
    layer = only_layer(dora_model(case).to(dtype))
    factors, W = factors_of(layer), weight_of(layer)
    exact = (W.double() + 3.0 * naive_delta(factors.to(torch.float64))).norm(dim=1).detach()
    plain = (W.float() + 3.0 * naive_delta(factors.to(torch.float32))).norm(dim=1).detach()
    norms = row_norms(W, dora_factors(layer.lora_A["default"], layer.lora_B["default"], 3.0))
    assert_accurate(norms, exact, plain)


@dora
@cases
@kinds
@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_dora_starts_as_the_adapter(case: Case, kind: str, init: bool | str) -> None:
    """At first m is the norm of W + dW, so the output is that without DoRA: with B = 0, the base model's."""
    model = peft.get_peft_model(one_layer(case, kind), case_config(case, use_dora=True, init_lora_weights=init))
    layer, x = only_layer(model), random_input(7, case.in_features)
    assert isinstance(layer.lora_magnitude_vector["default"], GranularDora)
    assert magnitude_of(layer).requires_grad
    assert_close64(model(x), layer.base_layer(x) + 3.0 * naive_update(x, factors_of(layer)))


@dora
@cases
@kinds
def test_dora_output_and_gradients(case: Case, kind: str) -> None:
    """Output and gradients, of x, the factors and m, are those of x W'^T + bias with the norm held constant."""
    model = dora_model(case, kind).train()
    layer, x = only_layer(model), random_input(2, 3, case.in_features).requires_grad_()
    inputs = [x, magnitude_of(layer), *factors_of(layer).tensors()]
    expected = x @ dora_weight(layer).T + layer.base_layer.bias
    out, dy = model(x), random_input(2, 3, case.out_features, seed=9)
    assert_close64(out, expected)
    gradients = [torch.autograd.grad(y, inputs, dy) for y in (out, expected)]
    for actual, exact in zip(*gradients, strict=True):
        assert_close64(actual, exact)


@dora
@few_cases
@kinds
@pytest.mark.parametrize("mode", ["bfloat16", "autocast", "checkpointing"])
def test_dora_as_one_operation(case: Case, kind: str, mode: str) -> None:
    """Output and gradients are at most twice as far from float64 as those of the formula in the same dtypes."""
    dtype = torch.float32 if mode == "autocast" else torch.bfloat16
    options = {"use_dora": True, "fan_in_fan_out": kind == "conv1d"}
    model = adapted(one_layer(case, kind, dtype), case_config(case, **options), autocast_adapter_dtype=False).train()
    x = random_input(61, case.in_features, dtype=dtype)

    def formula(model, x: Tensor) -> Tensor:
        layer = only_layer(model)
        factors, base = factors_of(layer), layer.base_layer(x)
        norm = (weight_of(layer) + 3.0 * naive_delta(factors)).detach().norm(dim=1)
        gain, product = magnitude_of(layer) / norm, base - layer.base_layer.bias
        return (base + (gain - 1) * product + gain * (3.0 * naive_update(x, factors))).to(base.dtype)

    def results(compute, model, x: Tensor, mode: str) -> list[Tensor]:
        x = x.detach().clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            y = compute(model, x) if mode != "checkpointing" else checkpoint(compute, model, x, use_reentrant=False)
        inputs = [x, magnitude_of(only_layer(model)), *factors_of(only_layer(model)).tensors()]
        return [y, *torch.autograd.grad(y, inputs, random_input(*y.shape, seed=9).to(y.dtype))]

    exact = copy.deepcopy(model).double()
    assert only_layer(exact).fused_call(x.double()).magnitude is not None
    found = results(lambda model, x: model(x), model, x, mode)
    for own, expected, plain in zip(
        found, results(formula, exact, x.double(), ""), results(formula, model, x, mode), strict=True
    ):
        assert_accurate(own, expected, plain)


@dora
@few_cases
@kinds
def test_dora_with_dropout(case: Case, kind: str) -> None:
    """As in PEFT, the base layer's own output sees x, and all that DoRA adds to it sees dropout(x)."""
    model = dora_model(case, kind, lora_dropout=0.5)
    layer, x = only_layer(model), random_input(7, case.in_features)
    assert_close64(model(x), x @ dora_weight(layer).T + layer.base_layer.bias)
    model.train()
    torch.manual_seed(0)
    out = model(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    assert_close64(out, layer.base_layer(x) + dropped @ (dora_weight(layer) - weight_of(layer)).T)


@dora
@cases
@kinds
@pytest.mark.parametrize("safe", [True, False], ids=["safe", "unsafe"])
def test_dora_merge_and_unmerge(case: Case, kind: str, safe: bool) -> None:
    """Merging makes the weight W', unmerging W again, and the output stays the same."""
    model = dora_model(case, kind)
    layer, x = only_layer(model), random_input(7, case.in_features)
    W, merged, before = weight_of(layer).detach().clone(), dora_weight(layer).detach(), model(x)
    model.merge_adapter(safe_merge=safe)
    assert_close64(weight_of(layer).detach(), merged)
    assert_close64(model(x), before)
    model.unmerge_adapter()
    assert_close64(weight_of(layer).detach(), W)
    assert_close64(model.merge_and_unload(safe_merge=safe)(x), before)


@dora
def test_dora_of_one_block_is_that_of_peft() -> None:
    """With k=1 output and magnitudes are those of PEFT's DoRA with the same factors, through steps of training."""
    case = Case(1, 4, 0, 20, 12)
    mine, plain = dora_model(case), one_layer(case)
    plain = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=12, target_modules=["layer"], use_dora=True))
    A, B, _, _ = factors_of(only_layer(mine))
    only_layer(plain).lora_A["default"].weight.data = A.data[0].T.clone()
    only_layer(plain).lora_B["default"].weight.data = B.data[0].T.clone()
    magnitude_of(only_layer(plain)).data = magnitude_of(only_layer(mine)).data.clone()
    x = random_input(7, 20)
    for model in (mine.train(), plain.train()):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert_close64(mine(x), plain(x))
    assert_close64(magnitude_of(only_layer(mine)).detach(), magnitude_of(only_layer(plain)).detach())


OTHERS = {
    "dora": lambda: gralora_config(4, r=8, target_modules=["layer"], use_dora=True),
    "gralora": lambda: gralora_config(4, r=8, target_modules=["layer"]),
    "lora": lambda: peft.LoraConfig(r=3, target_modules=["layer"]),
    "plain-dora": lambda: peft.LoraConfig(r=3, target_modules=["layer"], use_dora=True),
}


@dora
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("other", OTHERS)
def test_dora_beside_another_adapter(other: str, first: bool) -> None:
    """Two adapters on one layer: each alone, both merged as both active, one deleted."""
    case = Case(2, 6, 2, 40, 48)
    configs = [case_config(case, use_dora=True), OTHERS[other]()]
    names = ["mine", "other"] if first else ["other", "mine"]
    model = peft.get_peft_model(one_layer(case), configs[0 if first else 1], adapter_name=names[0])
    model.add_adapter(names[1], configs[1 if first else 0])
    for seed, name in enumerate(names):
        randomize(model, name, seed=seed)
    model.eval()
    layer, x = only_layer(model), random_input(7, 40)
    model.set_adapter("mine")
    alone = x @ dora_weight(layer, adapter="mine").T + layer.base_layer.bias
    assert_close64(model(x), alone)
    model.base_model.set_adapter(names)
    W, both = weight_of(layer).detach().clone(), model(x)
    model.merge_adapter()
    assert_close64(model(x), both)
    model.unmerge_adapter()
    assert_close64(weight_of(layer).detach(), W)
    model.delete_adapter("other")
    model.set_adapter("mine")
    assert_close64(model(x), alone)


@dora
@models
def test_dora_is_saved_and_loaded(model_name: str, tmp_path: Path) -> None:
    """from_pretrained, with low memory too, and gralora.load_adapter give the same logits; so does a copy."""
    expected = save_gralora(tmp_path, model_name, use_dora=True)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(MODELS[model_name](), tmp_path, **options)
        assert_close64(logits(loaded), expected)
    assert_close64(logits(copy.deepcopy(loaded)), expected)
    assert_close64(logits(gralora.load_adapter(MODELS[model_name](), tmp_path)), expected)


@dora
@models
def test_dora_checkpoint_commands(model_name: str, tmp_path: Path) -> None:
    """merge and export --for peft give the same logits, inspect finds nothing wrong, and what cannot be is refused."""
    expected = save_gralora(tmp_path / "adapter", model_name, use_dora=True)
    base = MODELS[model_name]()
    base.save_pretrained(tmp_path / "base")
    gralora.merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    merged = type(base).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    gralora.to_lora(tmp_path / "adapter", tmp_path / "plain")
    config, _ = read(tmp_path / "plain")
    assert config["use_dora"] and "use_gralora" not in config
    plain = PeftModel.from_pretrained(base, tmp_path / "plain")
    torch.testing.assert_close(logits(plain), expected, rtol=1e-6, atol=1e-6)
    assert gralora.inspect_adapter(tmp_path / "adapter")["anomalies"] == []
    with pytest.raises(ValueError, match="vllm takes nothing but A and B .* use_dora=True; `gralora merge`"):
        gralora.to_lora(tmp_path / "adapter", tmp_path / "vllm", "vllm")
    with pytest.raises(ValueError, match="use_dora=True cannot be expressed in PEFT's GRALORA"):
        gralora.convert_adapter(tmp_path / "adapter", tmp_path / "peft", "peft")
    edit(tmp_path / "adapter", use_dora=False)
    with pytest.raises(ValueError, match="factor magnitude is there, with .* use_dora=False"):
        gralora.inspect_adapter(tmp_path / "adapter")


@dora
def test_dora_of_a_model_trains() -> None:
    """A bfloat16 model with float32 adapters, gradient checkpointing and autocast: the loss falls, m moves."""
    config = gralora_config("auto", hybrid_r=2, target_modules="all-linear", use_dora=True, lora_dropout=0.1)
    model = peft.get_peft_model(MODELS["llama"](torch.bfloat16, use_cache=False), config).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    magnitudes = {name: p for name, p in adapter_parameters(model).items() if "magnitude" in name}
    before = {name: p.detach().clone() for name, p in magnitudes.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = token_ids(2, 9), []
    for _ in range(15):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert len(magnitudes) == 14 and all(not torch.equal(p, before[name]) for name, p in magnitudes.items())


@dora
def test_dora_with_several_ks() -> None:
    """gralora_k_pattern and rank_pattern give layers their own grids under DoRA."""
    targets = TARGETS["llama"]
    fields = {"gralora_k_pattern": {"down_proj": 4}, "rank_pattern": {"down_proj": 12}, "alpha_pattern": {"q_proj": 3}}
    model = adapted(
        MODELS["llama"](torch.float64), gralora_config(2, r=8, target_modules=targets, use_dora=True, **fields)
    )
    expected = {layer: dora_weight(layer, layer.scaling["default"]).detach() for layer in adapter_layers(model)}
    before = logits(model)
    model.merge_adapter()
    for layer, weight in expected.items():
        assert_close64(weight_of(layer).detach(), weight)
    assert_close64(logits(model), before)


@dora
@pytest.mark.parametrize("form", ["operations", "operator"])
def test_dora_compiles(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes forward and backward as one graph each, whatever form it has there."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "form_of", lambda x, weight, p: form)
    case = CASES[3]
    model = dora_model(case).train()
    assert only_layer(model).fused_call(random_input(case.in_features)) is not None  # also of one token, `[I]`
    assert_close64(model(random_input(case.in_features)), model(random_input(1, case.in_features))[0])
    x = random_input(7, case.in_features)
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert_close64(out, model(x))
    tensors = list(adapter_parameters(model).values())
    gradients = [torch.autograd.grad(y.square().sum(), tensors) for y in (out, model(x))]
    for actual, exact in zip(*gradients, strict=True):
        assert_close64(actual, exact)


# aLoRA

INVOCATION = [5, 6]


def alora_model(**fields):
    config = gralora_config(
        2, hybrid_r=2, target_modules="all-linear", task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION, **fields
    )
    return adapted(MODELS["llama"](torch.float64), config)


def with_invocation(*starts: int | None) -> Tensor:
    """Rows of 8 tokens with the invocation tokens at `starts`, or without them."""
    ids = torch.randint(7, 30, (len(starts), 8), generator=torch.Generator().manual_seed(0))
    for row, start in zip(ids, starts, strict=True):
        if start is not None:
            row[start : start + 2] = torch.tensor(INVOCATION)
    return ids


def naive_alora(model, ids: Tensor, starts: list[int | None]) -> Tensor:
    """Logits row by row: the update is added from the invocation on, with hooks on the base model's own layers."""
    rows = []
    for row, start in zip(ids, starts, strict=True):
        base = MODELS["llama"](torch.float64)
        for name, layer in model.get_base_model().named_modules():
            if layer in adapter_layers(model):
                factors = factors_of(layer)

                def add(module, args, out, factors=factors, start=start):
                    update = 2.0 * naive_update(args[0], factors)
                    update[:, : 8 if start is None else start] = 0
                    return out + update

                base.get_submodule(name).register_forward_hook(add)
        rows.append(base(row[None]).logits[0])
    return torch.stack(rows)


def test_alora_acts_from_the_invocation_on() -> None:
    """Tokens before the invocation see the base model only; rows without one are the base model's."""
    model, starts = alora_model(), [1, 4, None, 6]
    ids = with_invocation(*starts)
    expected = naive_alora(model, ids, starts)
    out = model(ids).logits
    assert_close64(out, expected)
    tensors = list(adapter_parameters(model).values())
    gradients = [torch.autograd.grad(y.square().sum(), tensors) for y in (out, expected)]
    for actual, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-8, atol=1e-8)


def test_alora_generates_with_cache() -> None:
    """Generation is that of the naive computation, which has no cache, token by token."""
    model, starts = alora_model(), [3, None]
    ids = with_invocation(*starts)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    generated = model.generate(input_ids=ids, **options)
    for row, start in zip(generated, starts, strict=True):
        naive = row[None, :8]
        for _ in range(6):
            logits = naive_alora_of_any_length(model, naive, start)
            naive = torch.cat([naive, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(row[None], naive)
    with model.disable_adapter():
        base = model.generate(input_ids=ids, **options)
    assert torch.equal(base[1], generated[1]) and not torch.equal(base[0], generated[0])


def naive_alora_of_any_length(model, ids: Tensor, start: int | None) -> Tensor:
    base = MODELS["llama"](torch.float64)
    for name, layer in model.get_base_model().named_modules():
        if layer in adapter_layers(model) and start is not None:
            factors = factors_of(layer)

            def add(module, args, out, factors=factors):
                update = 2.0 * naive_update(args[0], factors)
                return torch.cat([out[:, :start], out[:, start:] + update[:, start:]], dim=1)

            base.get_submodule(name).register_forward_hook(add)
    return base(ids).logits


def test_alora_in_a_mixed_batch() -> None:
    """With adapter_names each row has its own adapter: aLoRA, GraLoRA for all tokens, or none."""
    model = alora_model()
    model.add_adapter("whole", gralora_config(4, r=8, target_modules="all-linear"))
    randomize(model, "whole", seed=1)
    ids = with_invocation(2, 2, 2)
    mixed = model(ids, adapter_names=["default", "whole", "__base__"]).logits
    assert_close64(mixed[:1], naive_alora(model, ids[:1], [2]))
    with model.disable_adapter():
        assert_close64(mixed[2:], model(ids[2:]).logits)
    model.set_adapter("whole")
    assert_close64(mixed[1:2], model(ids[1:2]).logits)


def test_alora_is_saved_and_loaded(tmp_path: Path) -> None:
    """A loaded adapter acts as before; it cannot be merged, and goes to stock PEFT as a plain aLoRA."""
    model, ids = alora_model(), with_invocation(1, 5, None)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(MODELS["llama"](torch.float64), tmp_path / "adapter")
    assert_close64(loaded(ids).logits, expected)
    assert_close64(gralora.load_adapter(MODELS["llama"](torch.float64), tmp_path / "adapter")(ids).logits, expected)
    for safe in (True, False):
        with pytest.raises(NotImplementedError, match="aLoRA does not support"):
            model.merge_adapter(safe_merge=safe)
    gralora.to_lora(tmp_path / "adapter", tmp_path / "plain")
    plain = PeftModel.from_pretrained(MODELS["llama"](torch.float64), tmp_path / "plain")
    assert_close64(plain(ids).logits, expected)
    MODELS["llama"]().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"alora_invocation_tokens=\[5, 6\] cannot be merged"):
        gralora.merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    with pytest.raises(ValueError, match=r"mlx takes nothing but .* alora_invocation_tokens=\[5, 6\]; use --for peft"):
        gralora.to_lora(tmp_path / "adapter", tmp_path / "mlx", "mlx")


# What is refused


def test_variants_in_an_adapter_of_the_fork_are_refused(tmp_path: Path) -> None:
    """What that program makes of them together with a grid is not known."""
    save_fork(tmp_path)
    edit(tmp_path, use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True, which gralora does not know"):
        gralora.inspect_adapter(tmp_path)


def test_two_variants_are_refused() -> None:
    """PEFT takes one variant."""
    fields = {"use_dora": True, "alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}
    with pytest.raises(ValueError, match=r"use_dora=True cannot be combined with alora_invocation_tokens=\[1\]"):
        gralora_config(2, target_modules=["q_proj"], **fields)


@dora
@pytest.mark.parametrize("field, value", [("use_dora", True), ("alora_invocation_tokens", [1])])
@pytest.mark.parametrize("kind", ["convolution", "bitsandbytes"])
def test_variants_on_other_layers_are_refused(field: str, value: object, kind: str) -> None:
    """On layers of other kinds they are refused by the layer's name, before any layer is changed."""
    if kind == "convolution":
        other = nn.Conv1d(20, 12, 1)
    else:
        other = pytest.importorskip("bitsandbytes").nn.Linear8bitLt(20, 12, has_fp16_weights=False)
    model = nn.Sequential(nn.Linear(20, 20), other)
    model.is_loaded_in_8bit = True
    config = gralora_config(2, target_modules=["0", "1"], task_type="CAUSAL_LM", **{field: value})
    with pytest.raises(ValueError, match=f"(?s){field}=.*'1'|'1'.*{field}="):
        peft.LoraModel(model, config, "default")
    assert type(model[0]) is nn.Linear and model[1] is other


def test_dora_with_an_old_peft_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT 0.20 merges DoRA wrongly."""
    monkeypatch.setattr(inject, "MERGES_DORA", False)
    model = one_layer(CASES[2])
    with assert_unchanged(model, random_input(3, 12)), pytest.raises(ValueError, match="use_dora=True .* PEFT 0.21"):
        peft.get_peft_model(model, case_config(CASES[2], use_dora=True))


@dora
def test_variants_are_not_combined_by_weights() -> None:
    """add_weighted_adapter would lose magnitudes, and where an aLoRA acts."""
    model = dora_model(CASES[2])
    with assert_unchanged(model, random_input(3, 12)), pytest.raises(ValueError, match=r"\['default'\] have use_dora"):
        model.add_weighted_adapter(["default"], [1.0], "mix", combination_type="cat")
    with pytest.raises(ValueError, match=r"\['default'\] have alora_invocation_tokens"):
        alora_model().add_weighted_adapter(["default"], [1.0], "mix", combination_type="cat")


@dora
def test_dora_and_alora_are_not_converted_by_peft() -> None:
    """convert_to_lora takes dW for all that an adapter does, and would lose magnitudes and where an aLoRA acts."""
    for model in (
        adapted(MODELS["llama"](), gralora_config(2, target_modules=["q_proj"], use_dora=True)),
        alora_model(),
    ):
        with pytest.raises(TypeError, match="do(es)? not support LoRA conversion"):
            peft.convert_to_lora(model, rank=16)


@dora
def test_hotswap_of_variants(tmp_path: Path) -> None:
    """DoRA is not hotswapped; aLoRA is, between adapters of the same invocation tokens."""
    model = dora_model(CASES[2])
    model.save_pretrained(tmp_path / "dora")
    with assert_unchanged(model, random_input(3, 12)), pytest.raises(ValueError, match="use_dora=True: PEFT does not"):
        gralora.hotswap_adapter(model, tmp_path / "dora", "default")
    model, other, ids = alora_model(), alora_model(), with_invocation(1, 5)
    randomize(other, seed=5)
    other.save_pretrained(tmp_path / "alora")
    gralora.hotswap_adapter(model, tmp_path / "alora", "default")
    assert_close64(model(ids).logits, other(ids).logits)
    edit(tmp_path / "alora", alora_invocation_tokens=[7, 8])
    with pytest.raises(ValueError, match=r"alora_invocation_tokens=\[7, 8\] are not .* \[5, 6\]"):
        gralora.hotswap_adapter(model, tmp_path / "alora", "default")


@dora
def test_dora_in_a_mixed_batch_is_refused_by_peft() -> None:
    """As for plain LoRA with DoRA."""
    model = dora_model(CASES[2])
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
        model(random_input(2, 12), adapter_names=["default", "default"])
