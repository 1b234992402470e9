"""Several adapters on one layer at once: all active, or each for rows of its own."""

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from helpers import (
    OneLayer,
    assert_accurate,
    assert_close64,
    factors_of,
    gralora_config,
    naive_update,
    only_layer,
    random_input,
    randomize,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gralora
from gralora import fast_path

IN, OUT = 24, 16
LAYER: dict[str, Any] = {"target_modules": ["layer"]}
CONFIGS = {
    "two": gralora_config(2, 8, 0, **LAYER),
    "scaled": gralora_config(2, 4, 0, lora_alpha=3, **LAYER),
    "hybrid": gralora_config(4, 10, 2, **LAYER),
    "one": gralora_config(1, 3, 0, **LAYER),
    "plain": peft.LoraConfig(r=5, lora_alpha=10, **LAYER),
}
TOGETHER = [
    ("two", "scaled"),
    ("two", "one", "plain"),
    ("hybrid", "plain"),
    ("two", "hybrid", "scaled"),
    ("one", "hybrid"),
    ("plain", "one"),
]
together = pytest.mark.parametrize("names", TOGETHER, ids="-".join)
modes = pytest.mark.parametrize("mode", ["float64", "bfloat16", "autocast", "checkpointing"])
DTYPES = {"bfloat16": torch.bfloat16, "autocast": torch.float32}


def model_of(names: Sequence[str], dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    """A layer with these adapters, all of them active and trained."""
    torch.manual_seed(2)
    base = OneLayer(nn.Linear(IN, OUT)).to(dtype)
    configs = {name: copy.deepcopy(CONFIGS[name]) for name in names}
    for config, (field, value) in [(config, item) for config in configs.values() for item in fields.items()]:
        setattr(config, field, value)
    model = peft.get_peft_model(base, configs.pop(names[0]), names[0], autocast_adapter_dtype=False)
    for name, config in configs.items():
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    for seed, name in enumerate(names):
        randomize(model, name, seed)
    model.base_model.set_adapter(list(names))
    return model


def by_definition(model: Any, x: Tensor, names: Sequence[str]) -> Tensor:
    """The base layer's output and, one by one, those of the adapters."""
    layer = only_layer(model)
    y = layer.base_layer(x)
    for name in names:
        if layer.is_gralora(name):
            update = naive_update(x, factors_of(layer, name))
        else:
            update = x @ layer.lora_A[name].weight.T @ layer.lora_B[name].weight.T
        y = y + layer.scaling[name] * update
    return y


def by_rows(model: Any, x: Tensor, rows: Sequence[str]) -> Tensor:
    own = [by_definition(model, x[n], [name] if name != "__base__" else []) for n, name in enumerate(rows)]
    return torch.stack(own)


def results(model: Any, x: Tensor, compute: Any, mode: str = "") -> list[Tensor]:
    """The output, and the gradients of the input and of all factors that have one."""
    x = x.detach().clone().requires_grad_()
    autocast = torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else contextlib.nullcontext()
    with autocast:
        y = checkpoint(compute, x, use_reentrant=False) if mode == "checkpointing" else compute(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    dy = random_input(*y.shape, dtype=y.dtype, seed=9)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy, materialize_grads=True)]


def check(model: Any, x: Tensor, mode: str, compute: Any, definition: Any) -> None:
    """`compute(model)` in a mode is as exact as its definition in plain torch, or equal to it in float64."""
    found = results(model, x, compute(model), mode)
    exact = copy.deepcopy(model).double()
    wanted = results(exact, x.double(), definition(exact))
    if x.dtype == torch.float64:
        for own, expected in zip(found, wanted, strict=True):
            assert_close64(own, expected)
        return
    plain = results(model, x, definition(model), mode)
    for own, expected, theirs in zip(found, wanted, plain, strict=True):
        assert_accurate(own, expected, theirs)


@together
@modes
def test_active_together(names: Sequence[str], mode: str) -> None:
    model = model_of(names, DTYPES.get(mode, torch.float64))
    x = random_input(61, IN, dtype=DTYPES.get(mode, torch.float64))
    assert gralora.describe(model).startswith("1 of 1") or mode == "autocast"
    check(model, x, mode, lambda model: model, lambda model: lambda x: by_definition(model, x, names))


def test_as_few_operations_as_can_be() -> None:
    """One for all grids of the same number of blocks and all plain parts; one more for each other number."""
    for names in TOGETHER:
        call = only_layer(model_of(names)).fused_call(random_input(3, IN))
        assert call is not None and len(call.more) == (1 if {"two", "hybrid"} <= set(names) else 0)
        assert call.factors.is_plain == (names == ("plain", "one"))


def test_an_obstacle_of_one_is_one_of_all() -> None:
    model = model_of(("two", "one"))
    layer, x = only_layer(model), random_input(3, IN)
    wanted = model(x)
    handle = layer.lora_A["one"].register_forward_hook(lambda *args: None)
    assert layer.fused_call(x) is None
    assert_close64(model(x), wanted)
    handle.remove()
    assert layer.fused_call(x) is not None


def test_each_draws_a_mask_of_its_own() -> None:
    """With dropout, what one adapter does not see others may see."""
    model = model_of(("two", "one"), lora_dropout=0.5).train()
    call = only_layer(model).fused_call(random_input(3, IN))
    assert call is not None and call.p == 0.5 and [p for _, p, _ in call.more] == [0.5]
    x = torch.ones(4000, IN, dtype=torch.float64)
    mean, exact = model(x).mean(0), by_definition(model, x[0], ("two", "one"))
    torch.testing.assert_close(mean, exact, rtol=0, atol=0.2)
    assert_close64(model.eval()(x[:2]), exact.expand(2, -1))


ROWS = [
    ("two", "__base__", "plain", "hybrid", "two"),
    ("plain", "plain", "hybrid", "two", "two"),
    ("__base__", "one", "two", "two", "__base__"),
    ("__base__",) * 5,
]


@pytest.mark.parametrize("rows", ROWS, ids="-".join)
@modes
def test_rows_of_their_own(rows: Sequence[str], mode: str) -> None:
    """Batches of several adapters, in any order: outputs, and gradients, which are zero where no row is."""
    names = list(CONFIGS)
    model = model_of(names, DTYPES.get(mode, torch.float64)).eval()
    x = random_input(5, 17, IN, dtype=DTYPES.get(mode, torch.float64))
    check(
        model,
        x,
        mode,
        lambda model: lambda x: model(x, adapter_names=list(rows)),
        lambda model: lambda x: by_rows(model, x, rows),
    )


def test_rows_are_computed_by_our_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_of(("two", "plain")).eval(), random_input(3, 2, IN)
    rows, calls = ["two", "plain", "two"], []
    original = fast_path.mixed_update
    monkeypatch.setattr(fast_path, "mixed_update", lambda *args: (calls.append(1), original(*args))[1])
    wanted = model(x, adapter_names=rows)
    assert calls
    handle = only_layer(model).lora_A["two"].register_forward_hook(lambda *args: None)
    calls.clear()
    assert_close64(model(x, adapter_names=rows), wanted)
    assert not calls
    handle.remove()


def test_second_derivatives_of_rows() -> None:
    model = model_of(("two", "hybrid")).eval()
    rows, x = ["hybrid", "two", "__base__"], random_input(3, IN).requires_grad_()
    factors = [p for p in model.parameters() if p.requires_grad]
    found = []
    for compute in (lambda x: model(x, adapter_names=rows), lambda x: by_rows(model, x, rows)):
        gradients = torch.autograd.grad(1e-3 * compute(x).square().mean(), [x, *factors], create_graph=True)
        total = sum(gradient.square().sum() for gradient in gradients)
        found.append(torch.autograd.grad(total, [x, *factors]))
    for own, expected in zip(*found, strict=True):
        assert_close64(own, expected)


def test_a_gradient_that_nobody_asks_for_is_not_computed() -> None:
    model = model_of(("two", "hybrid")).eval()
    model.base_model.set_adapter(["two"])
    x = random_input(3, IN)
    model(x, adapter_names=["hybrid", "two", "two"]).sum().backward()
    assert all((p.grad is not None) == (".two." in name) for name, p in model.named_parameters())
