"""Layers that are called with the same input, as one operation: which they are, what they compute, and no trace."""

import copy
import gc
import pickle
import weakref
from types import MethodType

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from test_mlp import FAMILIES, IDS, SHAPE, check_same, loss_and_gradients, model_of, seeded
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import gralora
from gralora import siblings
from gralora.ops import shared_linear
from gralora.siblings import SharingInput

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def used(monkeypatch):
    """How many layers were computed by each operation."""
    calls = []
    monkeypatch.setattr(
        siblings, "shared_linear", lambda x, layers: calls.append(len(layers)) or shared_linear(x, layers)
    )
    return calls


def sharing(model):
    return [module for module in model.modules() if isinstance(module, SharingInput)]


def without(monkeypatch, model, compute):
    with monkeypatch.context() as patch:
        patch.setattr(siblings.Siblings, "output_of", lambda *args: None)
        return compute(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, used, monkeypatch):
    model = model_of(family)
    own = loss_and_gradients(model)
    assert used == ([] if family == "Phi3" else [3, 3])  # Phi-3 has one layer for q, k and v
    check_same(own, without(monkeypatch, model, loss_and_gradients))


@pytest.mark.parametrize(
    "fields", [{"hybrid_r": 2, "r": 6}, {"gralora_k": 4, "r": 8}, {"use_gralora": False}], ids=str
)
def test_adapters(fields, used, monkeypatch):
    model = model_of("Llama", **fields)
    if not fields.get("use_gralora", True):
        gralora.accelerate(model)
    check_same(loss_and_gradients(model), without(monkeypatch, model, loss_and_gradients))
    assert used == [3, 3]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout(checkpointing, used, monkeypatch):
    """The masks are those that the layers draw on their own, also where a block is computed again."""
    model = model_of("Llama", lora_dropout=0.3, target_modules=ATTENTION)
    wanted = without(monkeypatch, model, seeded)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    check_same(seeded(model), wanted)
    assert used == [3] * (4 if checkpointing else 2)


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


def test_inference_mode(used):
    """Its tensors have no version, by which a change in place would show, so each layer computes on its own."""
    model = model_of("Llama")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    before = len(used)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    assert before and len(used) == before


def test_generation(used):
    """Without gradients each layer on its own costs the host less."""
    model = model_of("Llama").eval()
    expected = model(input_ids=IDS).logits
    before = len(used)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)
        model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert before and len(used) == before


def test_second_derivatives(used, monkeypatch):
    model = model_of("Llama", target_modules=ATTENTION).double()
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def norm(model):
        model.zero_grad()
        loss = model(inputs_embeds=embedded).logits.square().mean()
        (d,) = torch.autograd.grad(loss, embedded, create_graph=True)
        d.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        check_same(norm(model), without(monkeypatch, model, norm))
    assert used


def test_compiled_without_a_break(used):
    model = model_of("Llama")
    wanted = model(input_ids=IDS).logits
    used.clear()
    check_same([torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=IDS).logits], [wanted])
    assert not used


def test_cross_attention_is_left_alone(used):
    """T5 calls k and v with the encoder's states, or with its own, under a condition."""
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    )
    config = gralora.LoraConfig(r=4, use_gralora=True, gralora_k=2, target_modules=["q", "k", "v", "wi", "wo"])
    model = peft.get_peft_model(base, config)
    assert torch.isfinite(loss_and_gradients(model)[0]) and not used


# Which layers share their input


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 4), nn.Linear(8, 6), nn.Linear(8, 8)

    def forward(self, x):
        return self.a(x).sum() * self.b(x).sum() + self.c(x * 2).sum()


class Condition(Plain):
    def forward(self, x, cross=None):
        return self.a(x).sum() + (self.b(x) if cross is None else self.b(cross)).sum() + self.c(x).sum()


class Loop(Plain):
    def forward(self, x):
        for _ in range(2):
            x = self.c(x)
        return self.a(x).sum() + self.b(x).sum()


class Changed(Plain):
    def forward(self, x):
        a = self.a(x)
        x = x * 2
        return a.sum() + self.b(x).sum() + self.c(x).sum()


class InPlace(Plain):
    def forward(self, x):
        x = x.detach().clone()
        a = self.a(x)
        x.mul_(2)
        return a.sum() + self.b(x).sum()


class Early(Plain):
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.a(x).sum() + self.b(x).sum()


class Settings(Plain):
    def forward(self, x):
        with torch.no_grad():
            a = self.a(x)
        return a.sum() + self.b(x).sum()


class Handed(Plain):
    def forward(self, x):
        layer = self.b
        return self.a(x).sum() + self.b(x).sum() + layer(x * 3).sum()


class Two(Plain):
    def __init__(self):
        super().__init__()
        self.d = nn.Linear(8, 2)

    def forward(self, x, other):
        return self.a(x).sum() + self.b(x).sum() + self.c(other).sum() * self.d(other).sum()


SOURCES = {
    Plain: (("a", "b"),),
    Condition: (("a", "c"),),
    Loop: (("a", "b"),),
    Changed: (),
    InPlace: (("a", "b"),),
    Early: (),
    Settings: (),
    Handed: (),
    Two: (("a", "b"), ("c", "d")),
}


def adapted(module_class):
    torch.manual_seed(0)
    targets = [name for name in ("a", "b", "c", "d") if hasattr(module_class(), name)]
    config = gralora.LoraConfig(r=4, use_gralora=True, gralora_k=2, target_modules=targets)
    model = peft.get_peft_model(nn.Sequential(module_class()), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    return model, model.base_model.model[0]


@pytest.mark.parametrize("module_class", SOURCES, ids=lambda c: c.__name__)
def test_which_share_their_input(module_class, used, monkeypatch):
    """By the source; and whatever it says, results are right."""
    model, module = adapted(module_class)
    groups = siblings.groups_of(module)
    assert groups == SOURCES[module_class]
    xs = [torch.randn(3, 8, requires_grad=True) for _ in range(1 + (module_class is Two))]

    def outcome(model):
        y = module(*xs)
        if module_class is InPlace:  # torch refuses its backward
            return [y]
        wanted = [*xs, *(p for p in model.parameters() if p.requires_grad)]
        return [y.detach(), *(g for g in torch.autograd.grad(y, wanted, allow_unused=True) if g is not None)]

    own = outcome(model)
    assert used == [len(group) for group in groups]
    check_same(own, without(monkeypatch, model, outcome))


def test_another_tensor_than_the_source_says(used, monkeypatch):
    """A hook gives one layer something else."""
    model, module = adapted(Plain)
    module.b.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    x = torch.randn(3, 8)
    assert torch.equal(module(x), without(monkeypatch, model, lambda _: module(x)))
    assert not used


@pytest.mark.parametrize("layer", ["a", "b"])
def test_layers_on_their_own(layer, used, monkeypatch):
    model, module = adapted(Plain)
    getattr(module, layer).enable_adapters(False)
    x = torch.randn(3, 8)
    assert torch.equal(module(x), without(monkeypatch, model, lambda _: module(x))) and not used


def test_an_error_leaves_nothing_behind(used):
    model, module = adapted(Plain)
    with pytest.raises(RuntimeError):
        module(torch.randn(3, 9))
    assert siblings.sharing.group is None
    module(torch.randn(3, 8))
    assert used == [2, 2] or used == [2]


# No trace


@pytest.mark.parametrize("end", ["merge_and_unload", "unload"])
def test_no_trace_after_unloading(end):
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    before = [type(module) for module in base.modules()]
    model = peft.get_peft_model(
        base, gralora.LoraConfig(r=4, use_gralora=True, gralora_k=2, target_modules="all-linear")
    )
    model(input_ids=IDS)
    assert len(sharing(model)) == 2
    assert [type(module) for module in getattr(model, end)().modules()] == before


def test_no_trace_after_layers_are_replaced(used):
    model, module = adapted(Plain)
    for name in ("a", "b", "c"):
        setattr(module, name, getattr(module, name).base_layer)
    module(torch.randn(3, 8))
    assert type(module) is Plain and not used


def test_a_class_in_front_of_ours_stays(used, monkeypatch):
    """FSDP2 makes such classes, and must find its own again."""
    model, module = adapted(Plain)
    module.__class__ = type("FSDPPlain", (type("FSDPModule", (), {}), type(module)), {})
    wrapped, x = type(module), torch.randn(3, 8)
    assert torch.equal(module(x), without(monkeypatch, model, lambda _: module(x))) and used
    model.unload()
    assert type(module) is wrapped
    torch.testing.assert_close(module(x), module.a(x).sum() * module.b(x).sum() + module.c(x * 2).sum())


def bound(module):
    module.forward = MethodType(type(module).forward, module)  # as Liger does


def hooked(module):
    add_hook_to_module(module, ModelHook())  # as a device map over several devices does


@pytest.mark.parametrize("forward", [bound, hooked])
def test_nothing_keeps_a_model_alive(forward):
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    for module in (base.model.layers[0].mlp, base.model.layers[0].self_attn):
        forward(module)
    config = gralora.LoraConfig(r=4, use_gralora=True, gralora_k=2, target_modules="all-linear")
    model = peft.get_peft_model(base, config)
    model(input_ids=IDS).logits.sum().backward()
    alive = [weakref.ref(module) for module in base.modules()]
    del base, model, module
    gc.collect()
    assert not [ref() for ref in alive if ref() is not None]


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies(how, used):
    model = model_of("Llama")
    wanted = model(input_ids=IDS).logits
    other = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
    used.clear()
    check_same([other(input_ids=IDS).logits], [wanted])
    assert used == ([3, 3] if how == "copy" else [])
