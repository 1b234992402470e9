"""`gralora.accelerate`: PEFT's plain LoRA through the fused path, with PEFT's files, numbers and everything else.

That PEFT's features behave as before is in test_accelerated_features.py.
"""

import contextlib
import copy
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from helpers import (
    MODELS,
    OneLayer,
    adapter_layers,
    add_by_transformers,
    assert_accurate,
    assert_close64,
    gralora_config,
    kinds,
    models,
    one_layer,
    only_layer,
    random_input,
    randomize,
    tiny_llama,
    token_ids,
)
from helpers import Case as Sizes
from peft import PeftModel, inject_adapter_in_model
from peft.tuners import lora
from torch import Tensor, nn

import gralora
from gralora import LoraConfig, fast_path
from gralora.fast_path import FusedLayer
from gralora.ops import compiled

SIZES = Sizes(1, 8, 0, 48, 80)
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
STOCK = {"target_modules": ["layer"], "lora_alpha": 24, "r": 8}


def plain(kind: str = "linear", dtype: torch.dtype = torch.float64, seed: int = 0, **fields: Any) -> PeftModel:
    """A stock LoRA with random factors on one layer."""
    model = peft.get_peft_model(
        one_layer(SIZES, kind, dtype), peft.LoraConfig(**STOCK | fields), autocast_adapter_dtype=False
    )
    return randomize(model, seed=seed)


@contextlib.contextmanager
def counted() -> Iterator[list[Any]]:
    """The calls of layers that ran as one operation within the block."""
    calls: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        original = fast_path.FusedCall.__call__
        patch.setattr(fast_path.FusedCall, "__call__", lambda call, x: (calls.append(call), original(call, x))[1])
        yield calls


def results(model: nn.Module, x: Tensor, autocast: bool = False) -> list[Tensor]:
    """The output, and the gradients of the input and of all that is trained, of a loss that weighs all outputs."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad((y * random_input(*y.shape, dtype=y.dtype, seed=9)).sum(), [x, *trained])]


# Numbers


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients(kind: str, dtype: torch.dtype) -> None:
    """In float64 they are PEFT's; in other dtypes at most twice as far from float64 as PEFT's are."""
    model, x = plain(kind, dtype), random_input(61, SIZES.in_features, dtype=dtype)
    stock = results(model, x)
    exact = results(copy.deepcopy(model).double(), x.double())
    with counted() as calls:
        found = results(gralora.accelerate(model), x)
    assert len(calls) == 1 and len(found) == 4
    for own, wanted, theirs in zip(found, exact, stock, strict=True):
        if dtype is torch.float64:
            assert_close64(own, wanted)
        assert_accurate(own, wanted, theirs)


@kinds
def test_autocast(kind: str) -> None:
    """Float32 adapters and base under autocast: the dtypes are PEFT's, and the numbers no further from float64."""
    model, x = plain(kind, torch.float32), random_input(61, SIZES.in_features, dtype=torch.float32)
    stock, exact = results(model, x, autocast=True), results(copy.deepcopy(model).double(), x.double())
    with counted() as calls:
        found = results(gralora.accelerate(model), x, autocast=True)
    assert len(calls) == 1
    for own, wanted, theirs in zip(found, exact, stock, strict=True):
        assert_accurate(own, wanted, theirs)


@kinds
def test_gradients_lie_as_parameters(kind: str) -> None:
    """So that autograd keeps them as they are, and does not copy them to the parameter's layout."""
    model = gralora.accelerate(plain(kind))
    model(random_input(3, SIZES.in_features)).sum().backward()
    for p in (p for p in model.parameters() if p.requires_grad):
        assert p.grad is not None and p.grad.stride() == p.stride() and p.grad.is_contiguous()


def test_second_derivatives() -> None:
    model = gralora.accelerate(plain())
    layer, x = only_layer(model), random_input(3, SIZES.in_features)
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    def penalty() -> Tensor:
        grads = torch.autograd.grad(model(x).square().sum(), factors, create_graph=True)
        return sum(g.square().sum() for g in grads)

    found = torch.autograd.grad(penalty(), factors)
    gralora.accelerate(model, enable=False)
    for own, wanted in zip(found, torch.autograd.grad(penalty(), factors), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_one_factor_is_trained(frozen: str) -> None:
    """As LoRA-FA trains B alone."""
    model, x = plain(), random_input(5, SIZES.in_features)
    getattr(only_layer(model), frozen).requires_grad_(False)
    wanted = results(model, x)
    for own, theirs in zip(results(gralora.accelerate(model), x), wanted, strict=True):
        assert_close64(own, theirs)


def test_dropout_changes_what_the_adapter_sees() -> None:
    """In training the masks are drawn anew in each call, the same in forward and backward; p=1 leaves the base."""
    model, x = gralora.accelerate(plain(lora_dropout=0.5)), random_input(64, SIZES.in_features)
    layer = only_layer(model)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with counted() as calls:
        y = model.train()(x)
    assert len(calls) == 1 and not torch.equal(model(x), y)
    update = (y - layer.base_layer(x)).detach()
    (grad,) = torch.autograd.grad(y.sum(), B)
    seen = torch.linalg.lstsq(B.detach(), update.T / layer.scaling["default"]).solution  # A (mask * x)
    assert_close64(grad, layer.scaling["default"] * seen.sum(1).expand_as(B))
    assert not torch.allclose(seen, A.detach() @ x.T)
    assert_close64(model.eval()(x), layer.base_layer(x) + layer.scaling["default"] * (x @ A.T) @ B.T)
    layer.lora_dropout["default"].p = 1.0
    assert_close64(model.train()(x), layer.base_layer(x))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model, x = gralora.accelerate(plain()), random_input(5, SIZES.in_features)
    wanted = results(model, x)
    for own, theirs in zip(results(torch.compile(model, fullgraph=True, backend="aot_eager"), x), wanted, strict=True):
        assert_close64(own, theirs)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiled_as_an_operator(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large layers are: the operator knows the shapes of a plain LoRA's gradients."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "form_of", lambda x, weight, p: "operator")
    monkeypatch.setattr(compiled, "is_called", lambda x, weight, p: True)
    model = gralora.accelerate(plain(lora_dropout=dropout)).eval()
    x = random_input(5, SIZES.in_features)
    wanted = results(model, x)
    found = results(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    for own, theirs in zip(found, wanted, strict=True):
        assert_close64(own, theirs)


def test_describe_tells_settings_and_how_each_layer_runs() -> None:
    """Layers of one name together, unless their settings or what they run as differ; what all share is said once."""
    config = LoraConfig(
        use_gralora=True, r=8, hybrid_r=4, lora_alpha=8, gralora_scaling="matched", target_modules="all-linear"
    )
    model = peft.get_peft_model(tiny_llama(), config)

    def rows() -> list[list[str]]:
        return [re.split("  +", line) for line in gralora.describe(model).splitlines()[1:]]

    attention, mlp = "model.layers.*.self_attn.", "model.layers.*.mlp."
    scaling = f"{(8 / (4 + 4 / 2)) ** 0.5:.4g}"
    settings = f"all layers: adapter default, method GraLoRA, r 8, hybrid_r 4, k 2, scaling {scaling}"
    assert rows()[:2] == [[settings], ["layers", "number", "runs"]]
    assert [attention + "q_proj", "2", "one operation with k_proj, v_proj"] in rows()
    assert [attention + "o_proj", "2", "one operation"] in rows()
    assert [mlp + "down_proj", "2", "one operation with gate_proj, up_proj"] in rows()
    assert len(rows()) == 2 + 7 and max(map(len, gralora.describe(model).splitlines())) <= 80
    hook = model.base_model.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: None)
    alone = [mlp + "down_proj", "1", "one operation"]
    assert alone in rows() and [*alone[:-1], "one operation with gate_proj, up_proj"] in rows()
    assert len(rows()) == 2 + 10
    hook.remove()
    model.add_adapter("plain", peft.LoraConfig(r=4, lora_alpha=6, target_modules=["o_proj"]))
    model.base_model.set_adapter("plain")
    why = "PEFT's forward, with a plain LoRA that is not accelerated"
    assert [attention + "o_proj", "2", "plain", "LoRA", "4", "1.5", why] in rows()
    assert [mlp + "up_proj", "2", *["-"] * 4, "PEFT's forward, without an active adapter"] in rows()


# Which adapters are covered


def all_fused(model: nn.Module, x: Tensor | None = None) -> bool:
    """Whether every LoRA layer of a model runs as one operation, as `describe` says and as it does."""
    layers = adapter_layers(model)
    with counted() as calls, torch.no_grad():
        model(token_ids(2, 5) if x is None else x)
    text = gralora.describe(model)
    assert text.startswith(f"{len(calls)} of {len(layers)} LoRA layers run as one operation"), text
    return bool(layers) and len(calls) == len(layers)


@models
def test_later_adapters(model_name: str, tmp_path: Path) -> None:
    """Adapters that are added or loaded, on these layers and others; and gone for all with enable=False."""
    config = peft.LoraConfig(r=4, target_modules=TARGETS[model_name])
    others = {"llama": ["k_proj", "o_proj", "up_proj"], "gpt2": ["c_fc", "c_proj"]}  # no whole block, called at once
    other = peft.LoraConfig(r=4, target_modules=others[model_name])
    model = peft.get_peft_model(MODELS[model_name](), config)
    model.save_pretrained(tmp_path)
    assert not all_fused(model)
    assert gralora.accelerate(model) is model and all_fused(model)
    for name, add in {
        "added": lambda: model.add_adapter("added", other),
        "loaded": lambda: model.load_adapter(tmp_path, "loaded"),
        "low": lambda: model.load_adapter(tmp_path, "low", low_cpu_mem_usage=True),
    }.items():
        add()
        model.set_adapter(name)
        active = sum(name in layer.scaling for layer in adapter_layers(model))
        with counted() as calls, torch.no_grad():
            model(token_ids(2, 5))
        assert len(calls) == active >= 4, name
    gralora.accelerate(model, enable=False)
    model.add_adapter("last", other)
    model.set_adapter("last")
    assert gralora.describe(model).startswith("0 of")
    assert not any(isinstance(module, FusedLayer) for module in model.modules())


PUT: dict[str, Callable[[nn.Module, peft.LoraConfig], nn.Module]] = {
    "PEFT": lambda base, config: peft.get_peft_model(base, config),
    "PEFT, mixed": lambda base, config: peft.get_peft_model(base, config, mixed=True),
    "injected": lambda base, config: inject_adapter_in_model(config, base),
    "transformers": add_by_transformers,
}


@pytest.mark.parametrize("name", PUT)
def test_ways_to_put_adapters(name: str) -> None:
    """The model may be accelerated before it has an adapter, after that, or by the config."""
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    assert all_fused(PUT[name](gralora.accelerate(tiny_llama()), peft.LoraConfig(**config)))
    assert all_fused(gralora.accelerate(PUT[name](tiny_llama(), peft.LoraConfig(**config))))
    by_config = PUT[name](tiny_llama(), LoraConfig(**config, accelerate=True))
    assert all_fused(by_config)
    assert gralora.describe(PUT[name](tiny_llama(), LoraConfig(**config))).startswith("0 of")


def test_adapters_of_a_wrapped_model() -> None:
    """A model inside of others is found, and marked for the adapters to come."""
    inner = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    gralora.accelerate(nn.ModuleList([nn.Identity(), inner]))
    inner.add_adapter("other", peft.LoraConfig(r=4, target_modules=["k_proj"]))
    inner.base_model.set_adapter("other")
    assert gralora.describe(inner).startswith("2 of 4 LoRA layers")


def test_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"and this is a SimplePipeline; give it the model inside"):
        gralora.accelerate(type("SimplePipeline", (), {})())


def test_mixed_models() -> None:
    """A plain LoRA and a GraLoRA adapter on one layer, in either order: each alone is one operation, as on its own."""
    x = random_input(7, SIZES.in_features)
    grid = gralora_config(4, r=8, target_modules=["layer"])
    stock = peft.LoraConfig(**STOCK)
    outputs = []
    for first, second in ({"plain": stock, "grid": grid}.items(), {"grid": grid, "plain": stock}.items()):
        model = gralora.accelerate(peft.get_peft_model(one_layer(SIZES), first[1], first[0]))
        model.add_adapter(*second)
        for seed, name in enumerate(("plain", "grid")):
            randomize(model, name, seed)
        for name in ("plain", "grid"):
            model.set_adapter(name)
            assert all_fused(model, x)
            outputs.append(model(x))
        model.base_model.set_adapter(["plain", "grid"])
        assert all_fused(model, x)
        outputs.append(model(x))
        gralora.accelerate(model, enable=False)
        assert_close64(model(x), outputs[-1])
        model.set_adapter("plain")
        assert "1 with a plain LoRA that is not accelerated" in gralora.describe(model)
        model.set_adapter("grid")
        assert all_fused(model, x)
    for one, other in zip(outputs[:3], outputs[3:], strict=True):
        assert_close64(one, other)


# What stays


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("by_config", [False, True])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}], ids=str)
def test_files_are_pefts(fields: dict[str, Any], by_config: bool, tmp_path: Path) -> None:
    """Byte for byte, model card and config too; and what is loaded is as it was."""
    fields = {"target_modules": ["q_proj", "down_proj"]} | fields
    stock = randomize(peft.get_peft_model(tiny_llama(), peft.LoraConfig(**fields)))
    stock.save_pretrained(tmp_path / "stock")
    if by_config:
        fast = randomize(peft.get_peft_model(tiny_llama(), LoraConfig(**fields, accelerate=True)))
    else:
        fast = gralora.accelerate(randomize(peft.get_peft_model(tiny_llama(), peft.LoraConfig(**fields))))
    assert any(isinstance(module, FusedLayer) for module in fast.modules())
    fast.save_pretrained(tmp_path / "fast")
    assert files(tmp_path / "fast") == files(tmp_path / "stock")
    assert list(fast.state_dict()) == list(stock.state_dict()) and str(fast) == str(stock)
    loaded = PeftModel.from_pretrained(gralora.accelerate(tiny_llama()), tmp_path / "fast")
    assert torch.equal(loaded(token_ids(2, 5)).logits, fast.eval()(token_ids(2, 5)).logits)


def test_config_keyword_is_not_saved(tmp_path: Path) -> None:
    config = LoraConfig(accelerate=True, target_modules=["q_proj"])
    config.save_pretrained(tmp_path / "ours")
    peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path / "pefts")
    assert files(tmp_path / "ours") == files(tmp_path / "pefts")
    assert not peft.PeftConfig.from_pretrained(tmp_path / "ours").accelerate
    assert "accelerate" not in gralora_config(accelerate=True).to_dict()


COPIES = {"copy.copy": copy.copy, "copy.deepcopy": copy.deepcopy}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies_are_accelerated(make_copy: Callable[[Any], Any]) -> None:
    """A deep copy shares nothing, and adapters added to it are covered as well."""
    layer = only_layer(gralora.accelerate(plain(use_dora=True)))
    twin = make_copy(layer)
    assert type(twin) is type(layer) and twin is not layer
    shares = twin.lora_A["default"].weight is layer.lora_A["default"].weight
    assert shares == (make_copy is copy.copy)
    model = gralora.accelerate(plain())
    twin, x = copy.deepcopy(model), random_input(3, SIZES.in_features)
    assert torch.equal(twin(x), model(x))
    twin.add_adapter("other", peft.LoraConfig(**STOCK))
    twin.set_adapter("other")
    assert all_fused(twin, x)


def test_saved_objects_need_no_gralora(tmp_path: Path) -> None:
    """`torch.save` of a whole accelerated model stores PEFT's classes: who loads it needs PEFT alone."""
    model = gralora.accelerate(
        randomize(
            peft.get_peft_model(nn.Sequential(nn.Linear(4, 6)), peft.LoraConfig(target_modules=["0"], use_dora=True))
        )
    )
    torch.save((model, model(torch.ones(1, 4))), tmp_path / "model.pt")
    program = f"""
import sys, torch
model, y = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
assert torch.allclose(model(torch.ones(1, 4)), y)
assert "gralora" not in sys.modules, [n for n in sys.modules if "gralora" in n]
print(type(model.base_model.model[0]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "peft.tuners.lora.layer.Linear" in done.stdout
    here = torch.load(io.BytesIO((tmp_path / "model.pt").read_bytes()), weights_only=False)[0]
    assert type(here.base_model.model[0]) is lora.Linear


def test_taken_back(tmp_path: Path) -> None:
    """enable=False leaves no trace: classes, dictionaries of modules, and pickled bytes are those before."""
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], use_dora=True)
    )

    def state() -> list[Any]:
        return [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()]

    before = state()
    assert state() != [gralora.accelerate(model), state()][1]
    gralora.accelerate(model, enable=False)
    assert state() == before


# Other layers


def test_layers_that_are_left() -> None:
    """Embeddings and convolutions, as those of GraLoRA, and `describe` says so."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.conv, self.linear = nn.Embedding(8, 4), nn.Conv1d(4, 6, 3), nn.Linear(6, 5)

        def forward(self, ids: Tensor) -> Tensor:
            return self.linear(self.conv(self.embedding(ids).mT).mT)

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["embedding", "conv", "linear"])
    model = randomize(peft.get_peft_model(Net().double(), config))
    ids = torch.randint(0, 8, (2, 7))
    before = model(ids)
    with counted() as calls:
        assert_close64(gralora.accelerate(model)(ids), before)
    assert len(calls) == 1
    assert first_line(model) == (
        "1 of 3 LoRA layers run as one operation (fused torch), 2 run PEFT's forward: 1 over Embedding; 1 over Conv1d"
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 6), (8, 6)])
def test_experts(shape: tuple[int, ...], transposed: bool) -> None:
    """dW is added to the parameter once in a forward, not twice; outputs and gradients are PEFT's."""

    class Experts(nn.Module):
        is_transposed = transposed

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(random_input(*shape))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.weight)

    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=[], target_parameters=["layer.weight"])
    model = randomize(peft.get_peft_model(OneLayer(Experts()), config))
    x = random_input(5, shape[-2])
    wanted = results(model, x)
    assert "1 not accelerated" in gralora.describe(model)
    gralora.accelerate(model)
    assert gralora.describe(model).startswith("1 of 1")
    for own, theirs in zip(results(model, x), wanted, strict=True):
        assert_close64(own, theirs)
    model.add_adapter("other", config)
    randomize(model, "other", 1)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    assert_close64(gralora.accelerate(model, enable=False)(x), both)


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora(kind: str, dropout: float) -> None:
    """Norms are computed without dW; outputs and gradients are PEFT's, in whatever mode it runs."""
    fields = {"use_dora": True, "lora_dropout": dropout, "fan_in_fan_out": kind == "conv1d"}
    model, x = plain(kind, **fields), random_input(5, SIZES.in_features)
    for training in (False, True):
        model.train(training)
        found = []
        for enable in (False, True):
            gralora.accelerate(model, enable)
            torch.manual_seed(4)
            found.append(results(model, x))
        for own, theirs in zip(*found, strict=True):
            assert_close64(own, theirs)
    formed = []
    with pytest.MonkeyPatch.context() as patch:
        name = "get_lora_weight"
        magnitude = only_layer(model).lora_magnitude_vector["default"]
        original = getattr(type(magnitude), name)
        patch.setattr(type(magnitude), name, lambda *args, **kw: (formed.append(1), original(*args, **kw))[1])
        model(x)
        assert not formed
        gralora.accelerate(model, enable=False)
        patch.setattr(type(magnitude), name, lambda *args, **kw: (formed.append(1), original(*args, **kw))[1])
        model(x)
        assert formed


def test_dora_of_other_weights_is_pefts() -> None:
    """A weight that is not an ordinary parameter is read by PEFT, as before."""
    model = gralora.accelerate(plain(use_dora=True))
    x, layer = random_input(5, SIZES.in_features), only_layer(model)
    before = model(x)
    layer.base_layer.weight = type("Other", (nn.Parameter,), {})(layer.base_layer.weight.data, requires_grad=False)
    assert_close64(model(x), before)


# What `describe` says


def first_line(model: nn.Module) -> str:
    return gralora.describe(model).splitlines()[0]


def test_describe_gives_reasons() -> None:
    """Each reason, as long as it holds."""
    model, x = gralora.accelerate(plain()), random_input(3, SIZES.in_features)
    layer = only_layer(model)
    assert first_line(model) == "1 of 1 LoRA layers run as one operation (fused torch)"
    model.add_adapter("two", peft.LoraConfig(**STOCK))

    def reason() -> str:
        with counted() as calls:
            model(x)
        assert not calls
        text = first_line(model)
        assert text.startswith("0 of 1 LoRA layers run as one operation (fused torch), 1 run PEFT's forward: 1 ")
        return text.partition("forward: 1 ")[2]

    model.base_model.set_adapter(["default", "two"])
    assert gralora.describe(model).startswith("1 of 1")
    model.set_adapter("default")
    with model.disable_adapter():
        assert reason() == "with adapters disabled"
    model.merge_adapter()
    assert reason() == "with merged adapters"
    model.unmerge_adapter()
    handle = layer.lora_A["default"].register_forward_hook(lambda *args: None)
    assert reason() == "with hooks on its factors or dropout"
    handle.remove()
    model.base_model.model.layer.lora_dropout["default"] = nn.AlphaDropout()
    assert reason() == "over Linear, for another reason"
    model.base_model.model.layer.lora_dropout["default"] = nn.Identity()
    layer.lora_B["default"].float()
    layer.lora_A["default"].float()
    assert first_line(model).endswith("1 with factors in float32 for inputs in float64, without autocast")
    add_hook_to_module(layer, ModelHook())
    assert first_line(model).endswith("1 with a forward of their own, as device maps give them")
    remove_hook_from_module(layer)
    assert gralora.describe(nn.Linear(2, 2)) == "no LoRA layers"
    assert gralora.describe("cpu") == gralora.describe(torch.device("cpu")) == "fused torch"
    biased = gralora.accelerate(plain(lora_bias=True))
    assert first_line(biased).endswith("1 with lora_bias")
