"""Random sequences of everything one does with adapters, against a plain model of what the output must be.

The plain model knows base weights and delta weights only, and adds them. After every step the two agree.
"""

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import (
    BATCH_SHAPES,
    Case,
    adapter_layers,
    assert_close64,
    case_config,
    factors_of,
    naive_delta,
    naive_update,
    one_layer,
    random_factors,
    random_input,
    randomize,
    set_factors,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gralora
from gralora.ops import dropout
from gralora.ops.dropout import draw_seed

SEQUENCES, NIGHTLY, STEPS = 100, 2000, 10
LAYERS = ["linear", "conv", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "pair.first", "pair.second"]
MLP = ["gate_proj", "up_proj", "down_proj"]
TARGETS = [["linear", "conv", *MLP, "first", "second"], ["linear"], ["conv", "up_proj"], MLP, ["first", "second"]]
ATOL = {torch.float64: 1e-9, torch.float32: 2e-4}  # of outputs of order 1
X = random_input(3, 16)
quiet = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


class Mlp(nn.Module):
    """Layers that are computed as one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Pair(nn.Module):
    """Layers of one input, which are computed together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) * self.second(x)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv, self.mlp, self.pair = nn.Linear(16, 24), Conv1D(16, 24), Mlp(), Pair()
        nn.init.normal_(self.conv.weight, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.linear(x))) + self.mlp(x) + self.pair(x)


@st.composite
def configs(draw: st.DrawFn) -> peft.LoraConfig:
    """A plain LoRA, a pure or a hybrid GraLoRA, on some of the layers or all."""
    fields: dict[str, Any] = {
        "target_modules": draw(st.sampled_from([TARGETS[0], *TARGETS])),
        "lora_alpha": draw(st.integers(1, 12)),
        "use_rslora": draw(st.booleans()),
        "lora_dropout": draw(st.sampled_from([0.0, 0.5])),
    }
    if draw(st.booleans()) and draw(st.booleans()):
        return peft.LoraConfig(r=draw(st.integers(1, 6)), **fields)
    k, hybrid_r = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([0, 0, 1, 2]))
    r = k * draw(st.integers(1, 2)) + hybrid_r
    return gralora.LoraConfig(r=r, use_gralora=True, gralora_k=k, hybrid_r=hybrid_r, **fields)


class AdapterMachine(RuleBasedStateMachine):
    """The real model, and beside it weights and updates by name, which is all the plain model is."""

    def __init__(self) -> None:
        super().__init__()
        warnings.simplefilter("ignore")
        self.folder = Path(tempfile.mkdtemp())
        self.updates: dict[str, dict[str, Tensor]] = {}  # adapter -> layer -> scaled dW, `[O, I]`
        self.configs: dict[str, Any] = {}
        self.active: list[str] = []
        self.merged: dict[str, Tensor] | None = None  # layer -> what was added to its weight
        self.disabled = False
        self.now = self.dtype = torch.float64  # of the model; and of the narrowest that it had
        self.count = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # Looking at the real model: only at tensors that it was given, never at what it computes

    def layer(self, name: str) -> Any:
        return self.model.base_model.model.get_submodule(name)

    def dW(self, adapter: str, layer: str) -> Tensor | None:
        """Without scaling, from the factors; None if the layer has no such adapter."""
        module = self.layer(layer)
        if adapter not in getattr(module, "lora_A", {}):
            return None
        A, B = module.lora_A[adapter], module.lora_B[adapter]
        if isinstance(A, nn.Linear):
            return (B.weight.double() @ A.weight.double()).detach()
        factors = factors_of(module, adapter)
        return naive_delta(type(factors)(*(None if t is None else t.detach().double() for t in factors)))

    def base_weight(self, layer: str) -> Tensor:
        module = self.layer(layer)
        weight = (module.get_base_layer() if hasattr(module, "get_base_layer") else module).weight.detach().double()
        return (weight.T if layer == "conv" else weight).clone()

    def scaling(self, config: Any) -> float:
        return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)

    # What the steps share

    def new_name(self) -> str:
        self.count += 1
        return f"adapter{self.count}"

    def know(self, name: str, config: Any, like: str | None = None) -> None:
        """Note a new adapter: by its factors, or as equal to another before that was scaled."""
        self.configs[name] = config
        self.settle()
        if like is None:
            dWs = {layer: self.dW(name, layer) for layer in LAYERS}
            self.updates[name] = {layer: dW * self.scaling(config) for layer, dW in dWs.items() if dW is not None}
        else:
            dWs = {layer: self.dW(like, layer) for layer in LAYERS}
            scaling = self.scaling(self.configs[like])
            self.updates[name] = {layer: dW * scaling for layer, dW in dWs.items() if dW is not None}

    def settle(self) -> None:
        """After adding: PEFT has unmerged, adds dropout in training mode, and a layer's first adapter enabled."""
        self.model.eval()
        self.merged = None
        if self.disabled:
            self.model.base_model.disable_adapter_layers()

    def choose(self, data: st.DataObject, of: list[str] | None = None) -> str:
        return data.draw(st.sampled_from(sorted(self.updates) if of is None else of))

    def granular(self) -> list[str]:
        return sorted(name for name in self.updates if getattr(self.configs[name], "use_gralora", False))

    def saved(self, name: str) -> Path:
        self.model.save_pretrained(self.folder / "saved", selected_adapters=[name])
        return self.folder / "saved" / name

    def after_loading(self) -> None:
        """Loading through gralora makes the new adapter the active one; and tidy up."""
        shutil.rmtree(self.folder / "saved")
        self.activate(self.active)

    def activate(self, names: list[str]) -> None:
        self.model.set_adapter(names[0])  # the PeftModel knows one name
        self.model.base_model.set_adapter(names)
        self.active, self.merged = names, None  # PEFT unmerges first

    @initialize(config=configs(), accelerated=st.booleans())
    def start(self, config: Any, accelerated: bool) -> None:
        name = self.new_name()
        self.model = peft.get_peft_model(Base().double(), config, adapter_name=name, autocast_adapter_dtype=False)
        if accelerated:
            gralora.accelerate(self.model)
        randomize(self.model, name).eval()
        self.weights = {layer: self.base_weight(layer) for layer in LAYERS}
        self.know(name, config)
        self.active = [name]

    # The steps

    @precondition(lambda self: len(self.updates) < 5)
    @rule(config=configs(), seed=st.integers(0, 99))
    def add(self, config: Any, seed: int) -> None:
        name = self.new_name()
        self.model.add_adapter(name, config, autocast_adapter_dtype=False)
        randomize(self.model, name, seed)
        self.know(name, config)

    @rule(data=st.data())
    def set_one(self, data: st.DataObject) -> None:
        name = self.choose(data)
        self.model.set_adapter(name)
        self.active, self.merged = [name], None

    @rule(data=st.data())
    def set_several(self, data: st.DataObject) -> None:
        self.activate(data.draw(st.lists(st.sampled_from(sorted(self.updates)), unique=True, min_size=1)))

    @precondition(lambda self: self.merged is None and not self.disabled)
    @rule(safe=st.booleans(), data=st.data())
    def merge(self, safe: bool, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.updates)), unique=True, min_size=1) | st.none())
        self.model.merge_adapter(adapter_names=names, safe_merge=safe)
        names = names or self.active
        # a layer that has none of them stays as it is, and goes on to follow the active adapters
        merged = [layer for layer in LAYERS if any(layer in self.updates[name] for name in names)]
        self.merged = {layer: self.sum_of(names, layer) for layer in merged}

    @precondition(lambda self: self.merged is not None)
    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged = None
        for layer in LAYERS:  # the base is what it was
            torch.testing.assert_close(self.base_weight(layer), self.weights[layer], rtol=0, atol=ATOL[self.dtype])

    @rule()
    def disable(self) -> None:
        self.model.base_model.disable_adapter_layers()
        self.disabled, self.merged = True, None  # PEFT unmerges when it next runs, which is now

    @precondition(lambda self: self.disabled)
    @rule()
    def enable(self) -> None:
        self.model.base_model.enable_adapter_layers()
        self.disabled = False

    @precondition(lambda self: self.merged is None)
    @rule(scale=st.sampled_from([0.5, 2.0, -1.0]))
    def scale(self, scale: float) -> None:
        for module in adapter_layers(self.model):
            module.scale_layer(scale)
        for name in self.active:
            self.updates[name] = {layer: dW * scale for layer, dW in self.updates[name].items()}

    @precondition(lambda self: len(self.updates) > 1 and self.merged is None)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = self.choose(data)
        self.model.delete_adapter(name)
        del self.updates[name], self.configs[name]
        self.activate([self.choose(data)])

    @precondition(lambda self: len(self.updates) < 5)
    @rule(data=st.data())
    def save_and_load(self, data: st.DataObject) -> None:
        source, name = self.choose(data), self.new_name()
        folder = self.saved(source)
        if source in self.granular():
            gralora.load_adapter(self.model, folder, name)
        else:
            self.model.load_adapter(folder, name, autocast_adapter_dtype=False)
        self.know(name, self.configs[source], like=source)
        self.after_loading()

    @precondition(lambda self: len(self.updates) < 5 and self.granular())
    @rule(data=st.data())
    def convert_and_back(self, data: st.DataObject) -> None:
        source, name = self.choose(data, self.granular()), self.new_name()
        folder, config = self.saved(source), self.configs[source]
        peft_format, back = self.folder / "saved" / "peft", self.folder / "saved" / "back"
        if config.use_rslora and int(config.r**0.5) ** 2 != config.r:
            with pytest.raises(ValueError, match="use_rslora"):
                gralora.convert_adapter(folder, peft_format, to="peft")
            shutil.rmtree(self.folder / "saved")
            return
        gralora.convert_adapter(folder, peft_format, to="peft")
        gralora.convert_adapter(peft_format, back)
        gralora.load_adapter(self.model, back, name)
        self.know(name, self.model.peft_config[name], like=source)
        self.after_loading()

    @precondition(lambda self: len(self.updates) < 5 and self.granular())
    @rule(data=st.data())
    def export_and_load(self, data: st.DataObject) -> None:
        source, name = self.choose(data, self.granular()), self.new_name()
        gralora.to_lora(self.saved(source), self.folder / "saved" / "lora")
        self.model.load_adapter(self.folder / "saved" / "lora", name, autocast_adapter_dtype=False)
        self.know(name, self.model.peft_config[name], like=source)
        self.after_loading()

    @precondition(lambda self: 1 < len(self.updates) < 5)  # of one alone, PEFT rounds the weight to float32
    @rule(data=st.data(), weights=st.lists(st.sampled_from([0.5, 1.0, -2.0]), min_size=2, max_size=2))
    def combine(self, data: st.DataObject, weights: list[float]) -> None:
        sources = data.draw(st.lists(st.sampled_from(sorted(self.updates)), min_size=2, max_size=2, unique=True))
        name = self.new_name()
        if not set(sources) & set(self.granular()) and self.configs[sources[0]].use_rslora:
            return  # of plain LoRAs alone PEFT makes the combination, and scales it by sqrt(r) too much
        self.model.base_model.add_weighted_adapter(sources, weights, name, combination_type="cat")
        self.configs[name] = self.model.peft_config[name]
        found: dict[str, Tensor] = {}
        for layer in LAYERS:
            parts = [
                w * self.updates[s][layer] for s, w in zip(sources, weights, strict=True) if layer in self.updates[s]
            ]
            if parts:
                found[layer] = sum(parts[1:], parts[0])
        self.updates[name] = found
        self.settle()
        self.activate(self.active)

    @precondition(lambda self: self.merged is None)
    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.now = dtype
        self.dtype = dtype if dtype == torch.float32 else self.dtype  # once rounded, rounded

    # The plain model

    def sum_of(self, adapters: list[str], layer: str) -> Tensor:
        zero = torch.zeros_like(self.weights[layer])
        return sum((self.updates[name].get(layer, zero) for name in adapters), zero)

    def linear(self, layer: str, x: Tensor) -> Tensor:
        """What a layer gives of x, of its weight, update and bias."""
        update = self.sum_of([] if self.disabled else self.active, layer)
        weight = self.weights[layer] + (self.merged or {}).get(layer, update)
        module = self.layer(layer)
        return x @ weight.T + getattr(module, "base_layer", module).bias.detach().double()

    def expected(self, x: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.linear("mlp.gate_proj", x)) * self.linear("mlp.up_proj", x)
        pair = torch.tanh(self.linear("pair.first", x)) * self.linear("pair.second", x)
        h = torch.tanh(self.linear("linear", x))
        return self.linear("conv", h) + self.linear("mlp.down_proj", hidden) + pair

    @invariant()
    def agrees(self) -> None:
        if not self.updates:
            return
        x, exact_x = X.to(self.now).requires_grad_(), X.clone().requires_grad_()
        out, expected = self.model(x), self.expected(exact_x)
        [dx], [exact_dx] = torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), exact_x)
        for value, exact in [(out, expected), (dx, exact_dx)]:
            scale = max(1.0, exact.abs().max().item())
            torch.testing.assert_close(value.double(), exact, rtol=0, atol=ATOL[self.dtype] * scale)
        assert set(self.model.peft_config) == set(self.updates)


def test_sequences() -> None:
    run_state_machine_as_test(
        AdapterMachine,
        settings=settings(quiet, max_examples=SEQUENCES, stateful_step_count=STEPS, derandomize=True),
    )


@pytest.mark.slow
def test_nightly_sequences() -> None:
    """Other sequences at every run; the report of a failure has the line that repeats it."""
    run_state_machine_as_test(
        AdapterMachine,
        settings=settings(quiet, max_examples=NIGHTLY, stateful_step_count=STEPS, print_blob=True),
    )


# One layer: sizes, dtypes, dropout, batches


@st.composite
def cases(draw: st.DrawFn) -> Case:
    k, hybrid_r = draw(st.integers(1, 5)), draw(st.integers(0, 3))
    chunks = st.integers(1, 9)
    return Case(k, k * draw(st.integers(1, 3)) + hybrid_r, hybrid_r, k * draw(chunks), k * draw(chunks))


DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@settings(quiet, max_examples=150, derandomize=True)
@given(
    case=cases(),
    kind=st.sampled_from(["linear", "conv1d"]),
    dtype=st.sampled_from(list(DTYPES)),
    adapter_dtype=st.sampled_from(["same", "float32"]),
    p=st.sampled_from([0.0, 0.3, 0.9]),
    shape=st.sampled_from(BATCH_SHAPES),
    training=st.booleans(),
)
def test_one_layer(
    case: Case, kind: str, dtype: torch.dtype, adapter_dtype: str, p: float, shape: tuple[int, ...], training: bool
) -> None:
    """Output, and in float64 all gradients, of any size, dtype, dropout and batch."""
    model = peft.get_peft_model(
        one_layer(case, kind, dtype),
        case_config(case, lora_dropout=p),
        autocast_adapter_dtype=adapter_dtype == "float32",
    )
    layer = model.base_model.model.layer
    set_factors(layer, random_factors(case))
    factors = factors_of(layer).to(torch.float64)
    x = random_input(*shape, case.in_features, dtype=dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    model.train(training)
    torch.manual_seed(0)
    out = model(x)

    weight, bias = (t.detach().double() for t in layer.get_base_layer().parameters())
    torch.manual_seed(0)
    dropped = exact_x
    if training and p:
        ones = torch.ones_like(x, dtype=factors_of(layer).A.dtype)  # in which the adapter computes
        if ones.dtype == dtype:  # base and adapter in one operation, with its own dropout
            drawn = dropout(ones.reshape(-1, case.in_features), p, draw_seed(ones)).view_as(ones)
        else:
            drawn = nn.functional.dropout(ones, p)
        dropped = exact_x * (drawn != 0) / (1 - p)
    weight = weight if kind == "conv1d" else weight.T
    expected = exact_x @ weight + bias + layer.scaling["default"] * naive_update(dropped, factors)
    assert out.shape == expected.shape and out.dtype == dtype
    tolerance = DTYPES[dtype] * max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    if dtype == torch.float64 and out.numel():
        real = torch.autograd.grad(out.square().sum(), [x, *factors_of(layer).tensors()])
        exact = torch.autograd.grad(expected.square().sum(), [exact_x, *factors.tensors()])
        for g, e in zip(real, exact, strict=True):
            assert_close64(g / (1 + e.abs().max()), e / (1 + e.abs().max()))


@settings(quiet, max_examples=60, derandomize=True)
@given(
    case=cases(),
    kind=st.sampled_from(["linear", "conv1d"]),
    dtype=st.sampled_from(list(DTYPES)),
    adapter_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    safe=st.booleans(),
)
def test_merge_rounds_once(case: Case, kind: str, dtype: torch.dtype, adapter_dtype: torch.dtype, safe: bool) -> None:
    """Adapters of every dtype merged into bases of every dtype: the sum in float32 or better, rounded once.

    With safe_merge, PEFT rounds dW to the base's dtype first.
    """
    model = peft.get_peft_model(one_layer(case, kind, dtype), case_config(case), autocast_adapter_dtype=False)
    layer = model.base_model.model.layer
    layer.lora_A.to(adapter_dtype), layer.lora_B.to(adapter_dtype)
    set_factors(layer, random_factors(case))
    weight = layer.get_base_layer().weight
    dW = layer.scaling["default"] * naive_delta(factors_of(layer).to(torch.float64)).detach()
    dW = dW.T if kind == "conv1d" else dW
    exact = weight.detach().double() + dW
    model.merge_adapter(safe_merge=safe)
    half_unit = torch.finfo(dtype).eps / 2
    # and the float32 rounding of dW before
    allowed = half_unit * exact.abs() + 1e-5 * dW.abs().max() + torch.finfo(dtype).tiny
    allowed = allowed + half_unit * dW.abs() * (1 + half_unit) if safe else allowed
    assert ((layer.get_base_layer().weight.double() - exact).abs() <= allowed).all()
