"""GraLoRA of nn.MultiheadAttention: the in-projection E -> 3E and the out-projection."""

import copy
import pickle

import pytest
import torch
from helpers import (
    OneLayer,
    adapted,
    adapter_layers,
    adapter_parameters,
    assert_close64,
    assert_unchanged,
    factors_of,
    gralora_config,
    naive_delta,
    random_input,
    randomize,
)
from peft import PeftModel, get_peft_model
from torch import nn

E = 8


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(E, 2, batch_first=True, **options).double()

    def forward(self, x):
        return self.attention(query=x[0], key=x[1], value=x[2], need_weights=False)[0]


def config(k=2, r=6, hybrid_r=2, **fields):
    return gralora_config(k, r, hybrid_r, **{"target_modules": ["attention"]} | fields)


def inputs():
    return random_input(3, 2, 5, E)


def layers_of(model):
    """The wrappers of the in-projection, which is that of the module, and of the out-projection."""
    attention, out_proj = adapter_layers(model)
    return attention, out_proj


def expected_output(model, x, adapters=("default",)):
    """The frozen module's output with both weights replaced, differentiably, by W + dW of the block loop."""
    attention, out_proj = layers_of(model)
    base = copy.deepcopy(model).unload()
    weights = {
        "attention.in_proj_weight": attention.in_proj_weight,
        "attention.out_proj.weight": out_proj.base_layer.weight,
    }
    for key, layer in zip(weights, (attention, out_proj), strict=True):
        for adapter in adapters:
            weights[key] = weights[key] + layer.scaling[adapter] * naive_delta(factors_of(layer, adapter))
    return torch.func.functional_call(base, weights, (x,))


@pytest.mark.parametrize("k, r, hybrid_r", [(1, 4, 0), (2, 6, 2), (4, 8, 0)])
def test_output_and_gradients_equal_the_block_loop(k, r, hybrid_r):
    """dW is added once to each projection; the gradients are those through the weights; the base gets none."""
    model = adapted(Attention(), config(k, r, hybrid_r)).train()
    x = inputs().requires_grad_()
    parameters = [x, *adapter_parameters(model).values()]
    expected = expected_output(model, x)
    dy = random_input(*expected.shape, seed=9)
    gradients = torch.autograd.grad(expected, parameters, dy)
    out = model(x)
    assert_close64(out, expected)
    for grad, other in zip(torch.autograd.grad(out, parameters, dy), gradients, strict=True):
        assert_close64(grad, other)
        assert grad.any()
    with torch.no_grad():
        assert_close64(model.eval()(x), expected)
    with model.disable_adapter():
        assert_close64(model(x), Attention()(x))
        assert (model(x) - expected).abs().max() > 0.01


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(safe):
    model = adapted(Attention(), config())
    attention, out_proj = layers_of(model)
    x, base = inputs(), Attention()
    expected = expected_output(model, x)
    in_dW, out_dW = (2 * naive_delta(factors_of(layer)) for layer in (attention, out_proj))
    model.merge_adapter(safe_merge=safe)
    assert_close64(model(x), expected)
    assert_close64(attention.in_proj_weight.data, base.attention.in_proj_weight.data + in_dW.detach())
    assert_close64(out_proj.base_layer.weight.data, base.attention.out_proj.weight.data + out_dW.detach())
    model.unmerge_adapter()
    assert_close64(attention.in_proj_weight.data, base.attention.in_proj_weight.data)
    assert_close64(out_proj.base_layer.weight.data, base.attention.out_proj.weight.data)
    assert_close64(model(x), expected)
    merged = model.merge_and_unload(safe_merge=safe)
    assert_close64(merged(x), expected)
    assert type(merged.attention) is nn.MultiheadAttention


def test_save_and_load(tmp_path):
    model = adapted(Attention(), config())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Attention(), tmp_path)
    saved = adapter_parameters(model)
    for name, p in adapter_parameters(loaded).items():
        assert torch.equal(p, saved.pop(name)), name
    assert not saved
    with torch.no_grad():
        assert torch.equal(loaded(inputs()), model(inputs()))


def test_two_adapters():
    """Set, both at once, merge of both, delete."""
    model = adapted(Attention(), config())
    model.add_adapter("other", config(4, 8, 0))
    randomize(model, "other", seed=1)
    x = inputs()
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        assert_close64(model(x), expected_output(model, x, names))
    expected = model(x)
    model.merge_adapter()
    assert_close64(model(x), expected)
    model.unmerge_adapter()
    model.delete_adapter("default")
    model.set_adapter("other")
    assert_close64(model(x), expected_output(model, x, ["other"]))


def test_training_changes_only_the_factors():
    model = adapted(Attention(), config()).train()
    trained = adapter_parameters(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained) and len(trained) == 8
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(inputs()).square().sum().backward()
    torch.optim.SGD(trained.values(), lr=0.1).step()
    for name, p in model.named_parameters():
        if name in trained:
            assert not torch.equal(p, before[name]), name
        else:
            assert_close64(p, before[name])  # added to and subtracted from in each forward pass


@pytest.mark.parametrize("gradients", [True, False])
def test_encoder_layer_in_evaluation(gradients):
    """nn.TransformerEncoderLayer, which else reads the weights without calling the attention, calls it."""
    torch.manual_seed(0)
    base = OneLayer(nn.TransformerEncoderLayer(E, 2, 16, batch_first=True)).double().eval()
    model = adapted(copy.deepcopy(base), config(target_modules=["self_attn"]))
    x = random_input(2, 5, E)
    with torch.set_grad_enabled(gradients):
        out = model(x)
        with model.disable_adapter():
            assert_close64(model(x), base(x))
        assert (out - base(x)).abs().max() > 0.01
        model.merge_adapter()
        assert_close64(model(x), out)
        model.unmerge_adapter()
        assert_close64(model.merge_and_unload()(x), out)


def test_pickle():
    model = adapted(Attention(), config())
    assert torch.equal(pickle.loads(pickle.dumps(model))(inputs()), model(inputs()))


REFUSED = {
    "k": ({}, {"k": 3, "r": 6, "hybrid_r": 0}, ["gralora_k=3", "'attention'", "out_features=24", "[1, 2]"]),
    "sizes": ({"kdim": 6, "vdim": 4}, {}, ["'attention'", "kdim=6", "vdim=4"]),
    "lora_dropout": ({}, {"lora_dropout": 0.1}, ["lora_dropout=0.1", "'attention'", "nn.MultiheadAttention"]),
    "lora_bias": ({}, {"lora_bias": True}, ["lora_bias=True", "'attention'"]),
    "out_proj": ({}, {"target_modules": ["out_proj"]}, ["attention.out_proj", "never calls"]),
}


@pytest.mark.parametrize("options, fields, parts", REFUSED.values(), ids=REFUSED)
def test_refused(options, fields, parts):
    model = Attention(**options)
    x = [random_input(2, 5, n) for n in (E, options.get("kdim", E), options.get("vdim", E))]
    with assert_unchanged(model, x), pytest.raises(ValueError) as error:
        get_peft_model(model, config(**fields))
    for part in parts:
        assert part in str(error.value)


def test_add_weighted_adapter_is_refused():
    """PEFT's plain LoRA on an attention module adds the out-projection's dW twice, so no sum would be right."""
    model = adapted(Attention(), config())
    model.add_adapter("other", config(4, 8, 0))
    with pytest.raises(ValueError, match="MultiheadAttention"):
        model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", "cat")
