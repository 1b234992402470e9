"""Gated MLPs as one operation: what they compute, when they apply, and that they leave no trace."""

import copy
import pickle

import peft
import pytest
import torch
import transformers
from helpers import dora
from torch import nn

import gralora
from gralora import mlp, parents
from gralora.mlp import AdaptedMlp
from gralora.ops import AdaptedLinear, Factors, GatedMlp, gated, gated_mlp, gralora_linear, plans
from gralora.ops.activations import ACTIVATIONS

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
gpu = [pytest.mark.gpu, needs_gpu]


# The operation


def drawn(T, n_in, width, n_out, k, r, h, n_first, bias, device, dtype, factor_dtype, activation="silu", p=0.0):
    """x, dy and a gated MLP of random numbers, in the units of a trained one."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size, scale=1.0, dtype=dtype):
        return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

    def layer(i, o):
        factors = [normal(k, i // k, r, scale=i**-0.5), normal(k, r, o // k, scale=r**-0.5 / 4)]
        factors += [normal(h, i, scale=i**-0.5), normal(o, h, scale=h**-0.5 / 4)] if h else [None, None]
        factors = [None if f is None else f.to(factor_dtype).requires_grad_() for f in factors]
        seed = torch.tensor(i + o, device=device) if p else None
        return AdaptedLinear(normal(o, i, scale=i**-0.5), normal(o) if bias else None, Factors(*factors, 1.5), p, seed)

    first = [layer(n_in, width), layer(n_in, width)] if n_first == 2 else [layer(n_in, 2 * width)]
    whole = GatedMlp(tuple(first), layer(width, n_out), activation)
    return normal(2, T // 2, n_in).requires_grad_(), normal(2, T // 2, n_out), whole


def one_by_one(x, whole):
    """The MLP as its layers compute it on their own."""
    values = [gralora_linear(x, *layer) for layer in whole.first]
    e, u = values if len(values) == 2 else values[0].chunk(2, dim=-1)
    return gralora_linear(ACTIVATIONS[whole.activation].value(e) * u, *whole.down)


def outcome(compute, x, dy, whole):
    """y and the gradients of x and of all factors."""
    leaves = [x, *(t for layer in (*whole.first, whole.down) for t in layer.factors[:4] if t is not None)]
    y = compute(x, whole)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def in_double(x, dy, whole):
    def layer(weight, bias, factors, p, seed):
        wide = [None if f is None else f.detach().double().requires_grad_() for f in factors[:4]]
        bias = None if bias is None else bias.double()
        return AdaptedLinear(weight.double(), bias, Factors(*wide, factors.scaling), p, seed)

    first = tuple(layer(*own) for own in whole.first)
    return x.detach().double().requires_grad_(), dy.double(), GatedMlp(first, layer(*whole.down), whole.activation)


def check(*case, **options):
    """No farther from float64 than the layers on their own are."""
    x, dy, whole = drawn(*case, **options)
    wanted = outcome(gated.definition, *in_double(x, dy, whole))
    ours, usual_ones = (outcome(compute, x, dy, whole) for compute in (gated_mlp, one_by_one))
    for own, other, exact in zip(ours, usual_ones, wanted, strict=True):
        assert own.dtype == other.dtype and own.shape == exact.shape
        error, usual = (torch.linalg.norm(t.double() - exact) / torch.linalg.norm(exact) for t in (own, other))
        assert error <= max(1.1 * usual, 1e-6 if own.dtype == torch.float32 else 1e-15), (error, usual)
    with torch.no_grad():
        assert torch.equal(gated_mlp(x, whole), ours[0])


CASES = {  # k, r, h, layers before down, bias
    "plain": (2, 8, 0, 2, False),
    "side by side": (2, 8, 0, 1, False),
    "hybrid and bias": (4, 8, 3, 2, True),
    "side by side, hybrid and bias": (2, 4, 2, 1, True),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_on_the_cpu(case, activation):
    for dtype, factors in [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)]:
        check(10, 16, 24, 32, *CASES[case], device="cpu", dtype=dtype, factor_dtype=factors, activation=activation)


@pytest.mark.parametrize("case", CASES)
def test_dropout(case):
    """Every layer drops what its adapter sees, by a mask of its own, which the backward draws again."""
    for dtype, factors in [(torch.float64,) * 2, (torch.bfloat16, torch.float32)]:
        check(10, 16, 24, 32, *CASES[case], device="cpu", dtype=dtype, factor_dtype=factors, p=0.3)


SIZES = {"large": (4096, 2048, 8192, 2048), "small": (256, 512, 1024, 512), "odd": (334, 72, 120, 40)}


@pytest.mark.parametrize("choice", ["auto", "portable"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.gpu
@needs_gpu
def test_gradients_on_a_gpu(case, factors, size, choice, monkeypatch):
    monkeypatch.setattr(plans, "choice", choice)
    plans.architecture.cache_clear()
    (k, r, *others), activation = CASES[case], list(ACTIVATIONS)[len(case) % 3]
    r = 64 if size == "large" else r
    try:
        options = {"device": "cuda", "dtype": torch.bfloat16, "factor_dtype": factors, "activation": activation}
        check(*SIZES[size], k, r, *others, **options)
    finally:
        plans.architecture.cache_clear()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_second_derivatives_and_many_gradients(p):
    x, dy, whole = drawn(4, 8, 12, 8, 2, 4, 2, 2, True, "cpu", torch.float64, torch.float64, p=p)
    A = whole.down.factors.A

    def norms(compute):
        y = compute(x, whole)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        second = torch.autograd.grad(dx.square().sum(), [x, A], retain_graph=True)
        if p:  # torch draws no random numbers for many gradients at once
            return second
        return [*second, *torch.autograd.grad(y, A, torch.stack([dy, 2 * dy]), is_grads_batched=True)]

    for own, wanted in zip(norms(gated_mlp), norms(gated.definition), strict=True):
        torch.testing.assert_close(own, wanted)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("frozen", ["x", "down", "first", "all but x"])
def test_only_needed_gradients(frozen, p):
    x, dy, whole = drawn(4, 8, 12, 8, 2, 4, 0, 2, False, "cpu", torch.float64, torch.float64, p=p)
    x.requires_grad_(frozen != "x")
    for layer in whole.first:
        [f.requires_grad_(frozen not in ("first", "all but x")) for f in layer.factors[:2]]
    [f.requires_grad_(frozen not in ("down", "all but x")) for f in whole.down.factors[:2]]
    factors = [f for layer in (*whole.first, whole.down) for f in layer.factors[:2]]
    leaves = [t for t in (x, *factors) if t.requires_grad]
    own, wanted = (torch.autograd.grad(f(x, whole), leaves, dy) for f in (gated_mlp, gated.definition))
    for ours, theirs in zip(own, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_is_kept(p):
    """x, e and u: neither the activation nor hidden, nor what dropout leaves of them."""
    x, _, whole = drawn(6, 8, 20, 8, 2, 4, 0, 2, False, "cpu", torch.float32, torch.float32, p=p)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        gated_mlp(x, whole)
    assert sorted(s for s in saved if len(s) == 3 and s[-1] in (8, 20) and s[0] == 2 and s[1] == 3) == [
        (2, 3, 8), (2, 3, 20), (2, 3, 20)
    ]  # fmt: skip


# The modules

SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SHAPE |= dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = {
    "Llama": "silu",
    "Mistral": "silu",
    "Qwen2": "silu",
    "Qwen3": "silu",
    "SmolLM3": "silu",
    "Olmo2": "silu",
    "Phi3": "silu",
    "Glm4": "silu",
    "Gemma": "gelu_tanh",
    "Gemma2": "gelu_tanh",
    "Gemma3Text": "gelu_tanh",
}


def model_of(family, r=4, **fields):
    config_class = getattr(transformers, f"{family}Config")
    extra = {} if "Gemma" not in family and family not in ("Qwen3", "Glm4") else {"head_dim": 8}
    name = "Gemma3ForCausalLM" if family == "Gemma3Text" else f"{family}ForCausalLM"
    torch.manual_seed(0)
    base = getattr(transformers, name)(config_class(**SHAPE, **extra))
    fields = {"r": r, "use_gralora": True, "gralora_k": 2, "target_modules": "all-linear"} | fields
    model = peft.get_peft_model(base, gralora.LoraConfig(**fields)).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    return model


def mlps(model):
    return [module for module in model.modules() if isinstance(module, AdaptedMlp)]


@pytest.fixture
def used(monkeypatch):
    """The MLPs that were computed as one operation."""
    calls = []
    monkeypatch.setattr(mlp, "gated_mlp", lambda *args: calls.append(args) or gated_mlp(*args))
    return calls


IDS = torch.arange(3, 27).view(2, 12)


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def without(monkeypatch, model, compute):
    """What `compute(model)` gives while the layers compute on their own."""
    with monkeypatch.context() as patch:
        patch.setattr(mlp, "fused_mlp", lambda *args: None)
        return compute(model)


def check_same(own, other, rtol=1e-5):
    for ours, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * theirs.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, used, monkeypatch):
    model = model_of(family)
    own = loss_and_gradients(model)
    assert len(used) == 2 and {call[1].activation for call in used} == {FAMILIES[family]}
    check_same(own, without(monkeypatch, model, loss_and_gradients))
    assert len(used) == 2


def test_plain_lora(used, monkeypatch):
    """Of a model that `accelerate` was asked for, and no longer once that is taken back."""
    model = gralora.accelerate(model_of("Llama", use_gralora=False))
    own = loss_and_gradients(model)
    assert len(used) == 2
    check_same(own, without(monkeypatch, model, loss_and_gradients))
    gralora.accelerate(model, enable=False)
    check_same(own, loss_and_gradients(model))
    assert not mlps(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, used, monkeypatch):
    model = model_of("Llama")
    model.enable_input_require_grads()
    wanted = without(monkeypatch, model, loss_and_gradients)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check_same(loss_and_gradients(model), wanted)
    assert len(used) == 4


def test_autocast(used, monkeypatch):
    model = model_of("Llama")
    with torch.autocast("cpu", torch.bfloat16):
        own, other = loss_and_gradients(model), without(monkeypatch, model, loss_and_gradients)
    assert used
    check_same(own, other, rtol=0.03)


def test_without_gradients(used, monkeypatch):
    """A few tokens are left to the layers, which costs the host less."""
    model = model_of("Llama").eval()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        assert not used
        monkeypatch.setattr(mlp, "LARGE", IDS.numel() * SHAPE["hidden_size"])
        check_same([model(input_ids=IDS).logits], [wanted])
        assert len(used) == 2


def test_compiled_without_a_break(used):
    model = model_of("Llama")
    wanted = model(input_ids=IDS).logits
    used.clear()
    check_same([torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=IDS).logits], [wanted])
    assert not used  # the compiler fuses the layers itself


# When it does not apply


def with_hook(module):
    module.register_forward_hook(lambda *args: None)


def with_own_forward(layer):
    own = layer.forward
    layer.forward = lambda x: own(x) * 2


OBSTACLES = {
    "a hook on the MLP": lambda module: with_hook(module),
    "a hook on a layer": lambda module: with_hook(module.up_proj),
    "a hook on a base layer": lambda module: with_hook(module.down_proj.base_layer),
    "a hook on a factor": lambda module: with_hook(module.gate_proj.lora_A["default"]),
    "a forward of a layer's own": lambda module: with_own_forward(module.gate_proj),
    "a disabled layer": lambda module: module.up_proj.enable_adapters(False),
    "a merged layer": lambda module: module.down_proj.merge(),
    "a base weight that is trained": lambda module: module.down_proj.base_layer.weight.requires_grad_(),
    "an MLP of its own": lambda module: setattr(
        module, "forward", lambda x: module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x) * 1.01)
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_layers_on_their_own(obstacle, used, monkeypatch):
    model = model_of("Llama")
    model(input_ids=IDS)
    assert len(used) == 2  # seen before it changes
    OBSTACLES[obstacle](mlps(model)[0])
    used.clear()
    own = loss_and_gradients(model)
    assert len(used) == 1
    check_same(own, without(monkeypatch, model, loss_and_gradients))


def seeded(model):
    torch.manual_seed(7)
    return loss_and_gradients(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_with_dropout(checkpointing, used, monkeypatch):
    """The masks are those that the layers draw on their own, also where a block is computed again."""
    model = model_of("Llama", lora_dropout=0.3)
    wanted = without(monkeypatch, model, seeded)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    check_same(seeded(model), wanted)
    assert len(used) == (4 if checkpointing else 2)
    assert seeded(model)[0] != loss_and_gradients(model)[0]


ON_THEIR_OWN = [{"target_modules": ["gate_proj", "up_proj"]}]


@pytest.mark.parametrize("fields", [*ON_THEIR_OWN, pytest.param({"use_dora": True}, marks=dora)], ids=str)
def test_adapters_on_their_own(fields, used):
    model = model_of("Llama", **fields)
    assert torch.isfinite(loss_and_gradients(model)[0])
    assert not used


def test_two_active_adapters(used, monkeypatch):
    model = model_of("Llama")
    model.add_adapter("other", gralora.LoraConfig(r=4, use_gralora=True, gralora_k=2, target_modules="all-linear"))
    for active in (["default", "other"], ["other"]):
        model.base_model.set_adapter(active)
        used.clear()
        check_same(loss_and_gradients(model), without(monkeypatch, model, loss_and_gradients))
        assert len(used) == 2


def variant(formula):
    """A class like Llama's MLP that computes by `formula(module, gate, up)`."""

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
            self.act_fn, self.limit, self.drop = nn.SiLU(), 7.0, nn.Dropout(0.5)

        def forward(self, x):
            return self.down_proj(formula(self, self.gate_proj(x), self.up_proj(x)))

    return Mlp


class Residual(variant(None)):
    def forward(self, x):
        return x + self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class OtherInput(variant(None)):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x * 2))


class Twice(variant(None)):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x) + self.gate_proj(x)) * self.up_proj(x))


OTHERS = {
    "clamped": variant(lambda m, e, u: m.act_fn(e.clamp(max=7)) * u.clamp(-7, 7)),
    "scaled": variant(lambda m, e, u: m.act_fn(e) * u * 1.001),
    "shifted": variant(lambda m, e, u: m.act_fn(e) * (u + 1)),
    "swapped": variant(lambda m, e, u: m.act_fn(u) * e),
    "a limit of the module's": variant(lambda m, e, u: m.act_fn(e).clamp(max=m.limit) * u),
    "dropout": variant(lambda m, e, u: m.drop(m.act_fn(e) * u)),
    "relu": variant(lambda m, e, u: e.relu() * u),
    "a swish of another slope": variant(lambda m, e, u: e * torch.sigmoid(1.702 * e) * u),
    "residual": Residual,
    "other input": OtherInput,
    "a layer twice": Twice,
}
SAME = {
    "written out": (variant(lambda m, e, u: u * (e * torch.sigmoid(e))), "silu"),
    "gelu": (variant(lambda m, e, u: nn.functional.gelu(e) * u), "gelu"),
    "gelu by tanh": (variant(lambda m, e, u: 0.5 * e * (1 + torch.tanh(0.7978845608 * (e + 0.044715 * e**3))) * u),
                     "gelu_tanh"),
}  # fmt: skip


def adapted(mlp_class):
    torch.manual_seed(0)
    config = gralora.LoraConfig(
        r=4, use_gralora=True, gralora_k=2, target_modules=["gate_proj", "up_proj", "down_proj"]
    )
    return peft.get_peft_model(nn.Sequential(mlp_class()), config)


@pytest.mark.parametrize("name", OTHERS)
def test_mlps_that_compute_something_else(name, used):
    model = adapted(OTHERS[name])
    for training in (True, False):
        torch.manual_seed(1)
        y = model.train(training)(torch.ones(2, 8))
        plain = copy.deepcopy(model)
        mlp.demote(plain.base_model.model[0])
        torch.manual_seed(1)
        assert torch.equal(y, plain(torch.ones(2, 8)))
    assert not used or name == "dropout" and len(used) == 1  # which is none in evaluation


@pytest.mark.parametrize("name", SAME)
def test_mlps_of_unknown_classes(name, used):
    mlp_class, activation = SAME[name]
    model = adapted(mlp_class)
    model(torch.ones(2, 8))
    assert [call[1].activation for call in used] == [activation]


def test_a_forward_set_on_the_object(used, monkeypatch):
    """As Liger replaces it."""
    model, called = model_of("Llama"), []

    def forward(self, x):
        called.append(self)
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    for module in mlps(model):
        module.forward = forward.__get__(module)
    own = loss_and_gradients(model)
    assert len(used) == 2 and len(called) == 2  # seen once, by a stand-in
    check_same(own, without(monkeypatch, model, loss_and_gradients))


# No trace


def classes(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("end", ["merge_and_unload", "unload"])
def test_no_trace_after_unloading(end):
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    before = classes(base)
    model = peft.get_peft_model(
        base, gralora.LoraConfig(r=4, use_gralora=True, gralora_k=2, target_modules="all-linear")
    )
    model(input_ids=IDS)
    assert len(mlps(model)) == 2
    assert classes(getattr(model, end)()) == before


def test_no_trace_after_deletion():
    model = model_of("Llama")
    model.add_adapter("plain", peft.LoraConfig(r=4, target_modules="all-linear"))
    model.delete_adapter("default")
    assert not mlps(model)


def test_no_trace_after_layers_are_replaced(used):
    """By those who do not ask us, as diffusers does."""
    model = model_of("Llama")
    module = mlps(model)[0]
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(module, name, getattr(module, name).base_layer)
    model(input_ids=IDS)
    assert len(used) == 1 and type(module) is transformers.models.llama.modeling_llama.LlamaMLP


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies(how, used):
    model = model_of("Llama")
    wanted = model(input_ids=IDS).logits
    other = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
    used.clear()
    assert torch.equal(other(input_ids=IDS).logits, wanted) and len(used) == (2 if how == "copy" else 0)
    assert not {id(layer) for call in used for layer in call[1].first} & {id(m) for m in model.modules()}
    llama = transformers.models.llama.modeling_llama.LlamaMLP
    assert {isinstance(m, llama) for m in mlps(other)} == ({True} if how == "copy" else set())


def test_names_stay():
    model = model_of("Llama")
    assert {type(module).__name__ for module in mlps(model)} == {"LlamaMLP"}
    assert not [name for name in model.state_dict() if "lora" not in name and "base_layer" in name and "act" in name]


@pytest.mark.parametrize("value, allowed", [("on", True), ("off", False), ("", None), ("no", None)])
def test_off_switch(value, allowed, monkeypatch):
    monkeypatch.setenv("GRALORA_BLOCKS", value)
    if allowed is None:
        with pytest.raises(ValueError, match="GRALORA_BLOCKS"):
            parents.read_choice()
        return
    assert parents.read_choice() is allowed
    monkeypatch.setattr(parents, "allowed", allowed)
    assert bool(mlps(model_of("Llama"))) is allowed
