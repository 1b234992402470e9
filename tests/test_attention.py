"""GraLoRA of nn.MultiheadAttention: the in-projection E -> 3E and the out-projection."""

import copy

import pytest
import torch
from helpers import (
    OneLayer,
    adapted,
    assert_close64,
    assert_unchanged,
    gralora_config,
    random_input,
)
from kinds_table import WIDTH as E
from kinds_table import Attention
from peft import get_peft_model
from torch import nn


def config(k=2, r=6, hybrid_r=2, **fields):
    return gralora_config(k, r, hybrid_r, **{"target_modules": ["attention"]} | fields)


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
