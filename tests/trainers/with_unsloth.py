"""Unsloth's own functions on the CPU: GraLoRA layers in its training and decoding passes, and in its merge.

Arguments: "before" or "after", when gralora is imported beside unsloth.
"""

import sys

if sys.argv[1] == "before":
    import gralora
import unsloth  # noqa: F401, I001
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from unsloth import save
from unsloth.kernels import fast_lora, utils
from unsloth_zoo import compiler

if sys.argv[1] == "after":
    import gralora

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model(**fields):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes)).bfloat16()
    config = gralora.LoraConfig(r=8, lora_alpha=16, target_modules=NAMES, **fields)
    adapted = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)
    return adapted.base_model.model.model.layers[0]


def calls(layer, X):
    """Each of Unsloth's passes, and what PEFT's own forward gives."""
    attention, mlp = layer.self_attn, layer.mlp
    token = X[:, :1]
    return {
        "qkv": (
            lambda: fast_lora.apply_lora_qkv(attention, X),
            lambda: [getattr(attention, f"{n}_proj")(X) for n in "qkv"],
        ),
        "o": (lambda: fast_lora.apply_lora_o(attention, X), lambda: attention.o_proj(X)),
        "mlp": (
            lambda: fast_lora.apply_lora_mlp_swiglu(mlp, X),
            lambda: mlp.down_proj(mlp.act_fn(mlp.gate_proj(X)) * mlp.up_proj(X)),
        ),
        "decode": (lambda: utils.fast_linear_forward(mlp.up_proj, token), lambda: mlp.up_proj(token)),
    }


def gradients(layer, out):
    out = out if isinstance(out, torch.Tensor) else torch.cat([t.flatten() for t in out])
    layer.zero_grad()
    out.float().square().sum().backward()
    return out, [p.grad for p in layer.parameters() if p.grad is not None]


for hybrid_r in (0, 4):
    layer = model(use_gralora=True, gralora_k=2, hybrid_r=hybrid_r)
    X = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    for name, (theirs, pefts) in calls(layer, X).items():
        (out, grads), (expected, wanted) = gradients(layer, theirs()), gradients(layer, pefts())
        assert torch.equal(out, expected), name
        assert len(grads) == len(wanted) > 0 and all(map(torch.equal, grads, wanted)), name
    try:
        save._merge_lora(layer.self_attn.q_proj, "q_proj")
    except ValueError as error:
        assert "`gralora merge FOLDER OUT`" in str(error), error
    else:
        raise AssertionError("Unsloth has merged factors that are no matrices")

# the forward that Unsloth Zoo writes in the place of PEFT's, where ours is not taken, as under a hook
assert peft.tuners.lora.Linear.forward.__name__ != "unsloth_forward"
layer = model(use_gralora=True, gralora_k=2, hybrid_r=4)
X = torch.randn(1, 5, 64, dtype=torch.bfloat16)
hook = layer.mlp.up_proj.lora_A["default"].register_forward_hook(lambda *_: None)
expected, wanted = gradients(layer, layer.mlp.up_proj(X))
compiler.patch_lora_forwards({})
assert peft.tuners.lora.Linear.forward.__name__ == "unsloth_forward"
out, grads = gradients(layer, layer.mlp.up_proj(X))
torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
for ours, theirs in zip(grads, wanted, strict=True):
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())
assert model().mlp.up_proj(X).shape == out.shape  # of a plain LoRA

# a plain LoRA is fused as before, and so is a GraLoRA layer whose adapter is off
plain = model()
assert utils._has_active_dora_adapter(plain.mlp.up_proj) is False
W, _, A, B, scaling, _ = utils.get_lora_parameters_bias(plain.mlp.up_proj)
assert A.ndim == 2 and scaling == 2
torch.testing.assert_close(
    save._merge_lora(plain.mlp.up_proj, "up_proj")[0], (W + 2 * B @ A).bfloat16(), rtol=0.02, atol=0.02
)
layer.mlp.up_proj.enable_adapters(False)
assert utils._has_active_dora_adapter(layer.mlp.up_proj) is False
assert utils.get_lora_parameters_bias(layer.mlp.up_proj)[2] is None
print(unsloth.__version__, "fused functions fall back")
