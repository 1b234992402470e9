"""The laws that hold for every kind of layer: each is one test over the table of kinds."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from helpers import (
    adapted,
    adapter_parameters,
    assert_close64,
    assert_unchanged,
    random_input,
    randomize,
)
from kinds_table import ADAPTERS, FEW, KINDS, OUT, Kind
from peft import PeftModel, get_peft_model
from torch import Tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
few_kinds = pytest.mark.parametrize("kind", FEW, ids=str)
safe = pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])


def one(kind: Kind, adapter: str = "default") -> Any:
    """A model of a kind with one adapter of ADAPTERS, random and not zero, in evaluation mode."""
    model = get_peft_model(kind.build(), kind.config(*ADAPTERS[adapter]), adapter_name=adapter)
    return randomize(model, adapter).eval()


def three(kind: Kind) -> Any:
    """A model with two grids of other k and hybrid_r, "default" and "other", and a plain LoRA, "plain"."""
    model = one(kind)
    model.add_adapter("other", kind.config(*ADAPTERS["other"]))
    model.add_adapter("plain", kind.plain_config())
    for seed, name in enumerate(("other", "plain"), start=1):
        randomize(model, name, seed)
    return model


@kinds
@pytest.mark.parametrize("adapter", ["default", "one", "four"])
def test_output_and_gradients_are_those_of_the_block_loop(kind: Kind, adapter: str) -> None:
    """Those of the base model with W + dW: of the input and of every factor; the base weights get none."""
    model = one(kind, adapter).train()
    parameters = list(adapter_parameters(model, adapter).values())
    x = kind.x()
    inputs = [x.requires_grad_(), *parameters] if x.is_floating_point() else parameters
    expected = kind.expected(model, x, adapter)
    dy = random_input(*expected.shape, seed=9)
    gradients = torch.autograd.grad(expected, inputs, dy)
    out = model(x)
    assert_close64(out, expected)
    out.backward(dy)
    for t, gradient in zip(inputs, gradients, strict=True):
        assert_close64(t.grad, gradient)
        assert gradient.any()
    ours = set(adapter_parameters(model, adapter))
    assert all((p.grad is not None) == (name in ours) for name, p in list(model.named_parameters()))
    with torch.no_grad():
        assert_close64(model.eval()(x), expected)


@few_kinds
def test_gradients_are_the_slopes_of_the_output(kind: Kind) -> None:
    """By finite differences, which no formula of ours enters."""
    model = one(kind).train()
    x, parameters = kind.x(), list(adapter_parameters(model).values())
    dy = random_input(*model(x).shape, seed=9)
    gradients = torch.autograd.grad(model(x), parameters, dy)
    steps = [random_input(*p.shape, seed=seed) for seed, p in enumerate(parameters, start=20)]
    slope = sum((gradient * step).sum() for gradient, step in zip(gradients, steps, strict=True))

    @torch.no_grad()
    def moved(by: float) -> Tensor:
        for p, step in zip(parameters, steps, strict=True):
            p.add_(step, alpha=by)
        value = (model(x) * dy).sum()
        for p, step in zip(parameters, steps, strict=True):
            p.add_(step, alpha=-by)
        return value

    torch.testing.assert_close((moved(1e-5) - moved(-1e-5)) / 2e-5, slope, rtol=1e-6, atol=1e-6)


@kinds
@pytest.mark.parametrize("adapter", ["default", "one", "four"])
@safe
@torch.no_grad()
def test_merge_and_unmerge(kind: Kind, adapter: str, safe: bool) -> None:
    """The weight becomes W + dW of the block loop, and W again; the output is the adapter's throughout."""
    model, base, x = (
        one(kind, adapter),
        kind.build(),
        kind.x(),
    )
    out, deltas = model(x), kind.deltas(model, adapter)
    weights = {name: base.get_parameter(name).clone() for name in kind.weights}
    for name, layer in kind.layers(model).items():
        assert_close64(layer.get_delta_weight(adapter), deltas[name])

    def assert_weights(expected: dict[str, Tensor]) -> None:
        unloaded = copy.deepcopy(model).unload()
        for name, weight in expected.items():
            assert_close64(unloaded.get_parameter(name), weight)

    model.merge_adapter(safe_merge=safe)
    assert_close64(model(x), out)
    assert_weights({name: weights[name] + deltas[name] for name in weights})
    model.unmerge_adapter()
    assert_close64(model(x), out)
    assert_weights(weights)
    merged = model.merge_and_unload(safe_merge=safe)
    assert_close64(merged(x), out)
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    assert (base(x) - out).abs().max() > 0.01


@few_kinds
def test_safe_merge_refuses_nan(kind: Kind) -> None:
    """And leaves every weight as it was."""
    model = one(kind)
    *_, broken = adapter_parameters(model).values()
    broken.data.view(-1)[0] = torch.nan
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    for name, t in model.state_dict().items():
        assert torch.equal(t.nan_to_num(7), before[name].nan_to_num(7)), name


@few_kinds
def test_start_is_the_base_model(kind: Kind) -> None:
    """An adapter that has not been trained changes nothing, and has as many parameters as a LoRA of its rank."""
    base, x = kind.build(), kind.x()
    counts = []
    for config in (kind.config(*ADAPTERS["default"]), kind.plain_config(ADAPTERS["default"][1])):
        model = get_peft_model(kind.build(), config)
        assert_close64(model(x), base(x))
        counts.append(sum(p.numel() for p in adapter_parameters(model).values()))
    assert counts[0] == counts[1]


@few_kinds
@pytest.mark.parametrize("hybrid_r", [0, 3])
def test_one_block_is_plain_lora(kind: Kind, hybrid_r: int) -> None:
    """With k = 1 and both factors random, the same seed gives plain LoRA's dW, and its output."""
    outputs, deltas = [], []
    grid = kind.config(1, 4, hybrid_r, init_lora_weights=False)
    for config in (grid, kind.plain_config(4, init_lora_weights=False)):
        torch.manual_seed(0)
        model = get_peft_model(kind.build(), config)
        outputs.append(model(kind.x()))
        deltas.append([layer.get_delta_weight("default") for layer in kind.layers(model).values()])
    if kind.exact_base:  # else PEFT adds its plain LoRA's out-projection twice
        assert_close64(*outputs)
    for ours, plain in zip(*deltas, strict=True):
        assert_close64(ours, plain)
        assert plain.any()


@few_kinds
def test_training_changes_only_the_factors(kind: Kind) -> None:
    model = one(kind).train()
    trained = adapter_parameters(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(kind.x()).square().sum().backward()
    torch.optim.SGD(trained.values(), lr=0.1).step()
    for name, p in model.named_parameters():
        if name in trained:
            assert not torch.equal(p, before[name]), name
        elif kind.exact_base:
            assert torch.equal(p, before[name]), name
        else:
            assert_close64(p, before[name])


# Files and copies


@kinds
@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low-memory"])
def test_save_and_load(kind: Kind, low_memory: bool, tmp_path: Any) -> None:
    """A fresh model with the saved adapter has the same tensors, bit by bit, and the same output."""
    model = one(kind)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(kind.build(), tmp_path, low_cpu_mem_usage=low_memory)
    saved = adapter_parameters(model)
    for name, p in adapter_parameters(loaded).items():
        assert torch.equal(p, saved.pop(name)), name
    assert not saved
    assert_close64(loaded(kind.x()), model(kind.x()))  # torch may sum in another order without gradients


@few_kinds
def test_plain_lora_refuses_the_file(kind: Kind, tmp_path: Any) -> None:
    """PEFT's own config, which knows nothing of GraLoRA, fails on the shapes: nothing is loaded silently."""
    one(kind, "one").save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(kind.build(), tmp_path / "one", config=kind.plain_config(4))


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@kinds
@pytest.mark.parametrize("make_copy", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies(kind: Kind, make_copy: Any) -> None:
    """A copy computes the same, and can be trained and merged without the first one."""
    model, x = one(kind), kind.x()
    out = model(x)
    other = make_copy(model)
    assert torch.equal(other(x), out)
    randomize(other, seed=5)
    assert not torch.equal(other(x), out) and torch.equal(model(x), out)
    changed = other(x)
    assert_close64(other.merge_and_unload()(x), changed)
    assert torch.equal(model(x), out)


# Several adapters


@few_kinds
def test_adapters_of_several_kinds(kind: Kind) -> None:
    """Two grids and a plain LoRA on one layer: set, add up, disable, merge, unmerge, rescale, delete."""
    model, base, x = three(kind), kind.build(), kind.x()
    names = ("default", "other") if kind.name == "attention" else ("default", "other", "plain")
    alone = {name: kind.expected(model, x, name) for name in names}
    assert len({tuple(out.flatten().tolist()) for out in [base(x), *alone.values()]}) == len(names) + 1
    assert_close64(model(x), alone["default"])
    with model.disable_adapter():
        assert_close64(model(x), base(x))
    for chosen in (["other"], list(names[1:]), [*names[1:], "default"]):
        model.base_model.set_adapter(chosen)
        assert_close64(model(x), kind.expected(model, x, *chosen))
    together = kind.expected(model, x, *names)
    model.merge_adapter()
    assert_close64(model(x), together)
    model.unmerge_adapter()
    assert_close64(model(x), together)
    model.set_adapter("default")
    for layer in kind.layers(model).values():
        layer.set_scale("default", 0.5)
        assert layer.scaling["default"] == 1
    assert_close64(model(x), kind.expected(model, x, "default"))
    model.delete_adapter("default")
    model.set_adapter("other")
    assert_close64(model(x), alone["other"])
    assert all("default" not in name.split(".") for name, _ in model.named_parameters())


@few_kinds
def test_batches_of_several_adapters(kind: Kind) -> None:
    """Each row of a batch has the adapter that it names, or none; kinds that PEFT cannot do so refuse."""
    model, base, x = three(kind), kind.build(), kind.x()
    names = ["other", "__base__", "default", "plain"]
    with torch.no_grad():
        if not kind.mixes:
            with pytest.raises((TypeError, ValueError), match="mixed|adapter_names"):
                model(x, adapter_names=names[: len(x)])
            return
        rows = [base(x) if name == "__base__" else kind.expected(model, x, name) for name in names]
        out = model(x, adapter_names=names)
        assert_close64(out, torch.stack([row[number] for number, row in enumerate(rows)]))


@pytest.mark.parametrize(
    "kind, combination",
    [
        (kind, combination)
        for kind in FEW
        for combination in ("cat", "svd")
        if combination == "cat" or "convolution" not in kind.name  # PEFT's "svd" knows no Conv1d and Conv3d
    ],
    ids=str,
)
def test_add_weighted_adapter(kind: Kind, combination: str) -> None:
    """The weighted sum of the adapters' dW, as a plain LoRA; where PEFT has none, nothing changes."""
    model = three(kind)
    options = {"svd_rank": OUT} if combination == "svd" else {}
    if not kind.adds_up:
        with (
            assert_unchanged(model, kind.x()),
            pytest.raises(ValueError, match="target_parameters|MultiheadAttention"),
        ):
            model.base_model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", combination, **options)
        assert sorted(model.peft_config) == ["default", "other", "plain"]
        return
    (layer,) = kind.layers(model).values()
    expected = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("other")
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", combination, **options)
    assert_close64(layer.get_delta_weight("sum"), expected)
    (weight,) = kind.weights
    base = kind.build()
    model.set_adapter("sum")
    whole = {weight: base.get_parameter(weight) + expected}
    assert_close64(model(kind.x()), torch.func.functional_call(base, whole, (kind.x(),)))


@few_kinds
def test_gralora_beside_plain_lora_that_was_first(kind: Kind) -> None:
    """A grid on a layer that has a plain LoRA leaves that one's output as it was."""
    model, x = adapted(kind.build(), kind.plain_config()), kind.x()
    out = model(x)
    model.add_adapter("other", kind.config(*ADAPTERS["other"]))
    assert torch.equal(model(x), out)
    randomize(model, "other")
    model.set_adapter("other")
    assert_close64(model(x), kind.expected(model, x, "other"))


@few_kinds
def test_adapter_that_does_not_fit_changes_nothing(kind: Kind) -> None:
    model = one(kind)
    with assert_unchanged(model, kind.x()), pytest.raises(ValueError, match="gralora_k=5"):
        model.add_adapter("other", kind.config(5, 25, 0))
