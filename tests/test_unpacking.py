"""Weights of 4 bits that our own product computes with: unpacked to bitsandbytes' bits, layers as exact as before."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("bitsandbytes")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# A layer over a weight of 4 bits against its definition in float64, with PEFT's way over the same layer beside it
LAYER = """
import bitsandbytes as bnb, itertools, peft, torch
from torch import nn
import gralora
from gralora import fast_path, quantized
from gralora.ops import plans, reference


def unpacked(weight):
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


def definition(weight, dtype):
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    packed = weight.data.view(-1).view(torch.uint8)
    halves = torch.stack([packed >> 4, packed & 15], dim=1).view(-1).long()
    scales = absmax.repeat_interleave(state.blocksize)[: len(halves)]
    return (state.code[halves] * scales).to(dtype).view(state.shape)


def check_unpacking(device, sizes, blocksizes, dtypes):
    for (n_out, n_in), quant_type, blocksize, nested in itertools.product(sizes, ("nf4", "fp4"), blocksizes, (0, 1)):
        for dtype in dtypes:
            weight = torch.randn(n_out, n_in, dtype=dtype, device=device)
            storage = torch.bfloat16 if n_in % 64 == 0 else torch.uint8  # as FSDP needs it, and the default
            packed = bnb.nn.Params4bit(weight, False, None, blocksize, bool(nested), quant_type, quant_storage=storage)
            packed = packed.to(device)
            if packed.quant_state is None:
                packed = packed._quantize(device)
            ours = quantized.FourBitWeight(packed, packed.quant_state).dense(dtype)
            case = device, n_out, n_in, quant_type, blocksize, nested
            assert ours.dtype == dtype and torch.equal(ours, definition(packed, dtype)), case
            if device == "cuda":  # on a CPU bitsandbytes rounds otherwise where a block has not 64 values
                assert torch.equal(ours, unpacked(packed)), case


def four_bit_model(n_in, n_out, k, r, h, bias, p, device, dtype, adapter_dtype):
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(n_in, n_out, bias=bias, compute_dtype=dtype, quant_type="nf4")
    base.load_state_dict(nn.Linear(n_in, n_out, bias=bias).to(dtype).state_dict())
    config = gralora.LoraConfig(
        r=r + h, hybrid_r=h, use_gralora=True, gralora_k=k, lora_dropout=p, target_modules=["0"], lora_alpha=r
    )
    wrapped = nn.Sequential(base)
    wrapped.is_loaded_in_4bit = True
    model = peft.get_peft_model(wrapped.to(device), config, autocast_adapter_dtype=False).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn_like(parameter.data.float()) / 8).to(adapter_dtype)
    return model


def check_layer(tokens, n_in, n_out, k, r, h, bias, p, device, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16):
    model = four_bit_model(n_in, n_out, k, r, h, bias, p, device, dtype, adapter_dtype)
    layer = model.base_model.model[0]
    x = torch.randn(2, tokens // 2, n_in, device=device).to(dtype).requires_grad_()
    dy = torch.randn(2, tokens // 2, n_out, device=device).to(dtype)
    trained = [x, *(t for n, t in model.named_parameters() if "lora_" in n)]
    autocast = torch.autocast(device, dtype, enabled=adapter_dtype != dtype)

    def run():
        torch.manual_seed(3)
        saved = []
        with autocast, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            y = model(x)
        assert p or n_in * n_out not in saved, "an unpacked weight is kept"
        return [y, *torch.autograd.grad(y, trained, dy)]

    with autocast:
        call = fast_path.fused_call(layer, x)
    assert isinstance(call.weight, quantized.FourBitWeight)
    ours = run()
    many, quantized.MANY_TOKENS = quantized.MANY_TOKENS, 10**9
    near = run()  # the layer called, and the adapter added to what it returns
    quantized.MANY_TOKENS = many
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    exact_trained = [t.detach().double().requires_grad_() for t in trained]
    named = dict(zip(["x", *(n for n, _ in model.named_parameters() if "lora_" in n)], exact_trained))
    pick = lambda part, kind: next((t for n, t in named.items() if part in n and n.endswith(f"default.{kind}")), None)
    tensors = [pick(part, kind) for kind in ("weight", "hybrid_weight") for part in ("lora_A", "lora_B")]
    factors = reference.Factors(*tensors, layer.scaling["default"] * B.gain)
    if p == 0:
        weight = unpacked(layer.base_layer.weight).double()
        true_bias = layer.base_layer.bias.double() if bias else None
        y = reference.linear(exact_trained[0], weight, true_bias, factors)
        exact = [y, *torch.autograd.grad(y, exact_trained, dy.double())]
        for a, b, c in zip(ours, near, exact, strict=True):
            errors = [((t.double() - c).norm() / c.norm()).item() for t in (a, b)]
            assert a.dtype == b.dtype and errors[0] <= 1.2 * errors[1] + 1e-6, errors
    else:
        for a, b in zip(ours, near, strict=True):
            assert a.dtype == b.dtype and ((a.double() - b.double()).norm() / b.double().norm()).item() < 0.01
"""

INTERPRETED = """
from gralora.ops import kernels
from triton.runtime import interpreter

patch = interpreter._patch_lang_tensor  # NumPy 2.4 makes no int of the interpreter's arrays of one element


def patch_with_item(tensor, scope):
    patch(tensor, scope)
    tensor.__index__ = lambda self: self.handle.data.item()


interpreter._patch_lang_tensor = patch_with_item
check_unpacking("cpu", [(3, 64), (24, 40), (130, 64)], (64, 128), (torch.float32, torch.bfloat16))  # by torch
plans.CPU = plans.Architecture("the interpreter", (0, 0), "kernels", dtypes=(torch.float16, torch.bfloat16))
quantized.MANY_TOKENS = 4
check_unpacking("cpu", [(3, 64), (24, 40), (130, 64)], (64, 128), (torch.float16,))  # it truncates to bfloat16
for h, bias, p in [(0, False, 0.0), (2, True, 0.0), (0, True, 0.3)]:
    check_layer(8, 64, 32, 2, 4, h, bias, p, "cpu", torch.float16, torch.float16)
print("unpacked")
"""


def run(code: str, **environment: str) -> str:
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr[-3000:]


def test_interpreted() -> None:
    """The kernel's code on the CPU: odd sizes, both codes, scales quantised in turn or not; and whole layers."""
    pytest.importorskip("triton")
    assert "unpacked" in run(LAYER + INTERPRETED, TRITON_INTERPRET="1")


def test_kernel_that_cannot_run_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch unpacks the weight from then on, with one warning and no error in a training step."""
    import bitsandbytes

    from gralora import quantized
    from gralora.ops import batched, plans
    from gralora.ops.interface import KernelUnavailable

    class Broken:
        def dequantize_4bit(self, *operands: object) -> None:
            raise KernelUnavailable("the kernel cannot run", "kernels")

    monkeypatch.setattr(plans, "choice", "auto")
    monkeypatch.setattr(plans, "_failed", set())
    monkeypatch.setattr(plans, "kernels_for", lambda x: batched if "kernels" in plans._failed else Broken())
    packed = bitsandbytes.nn.Params4bit(torch.randn(8, 64), False, None, 64, False, "nf4")._quantize("cpu")
    with pytest.warns(RuntimeWarning, match="the kernel cannot run") as warned:
        w = quantized.FourBitWeight(packed, packed.quant_state).dense(torch.float32)
    assert len(warned) == 1
    assert torch.equal(w, bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state))


@pytest.mark.gpu
@needs_gpu
def test_on_gpu() -> None:
    """On a GPU bitsandbytes' bits, and layers as exact as with its own unpacking; no unpacked weight is kept."""
    code = """
check_unpacking("cuda", [(64, 64), (130, 576), (2048, 1024)], (64, 128, 256), (torch.bfloat16, torch.float16))
for n_in, n_out, k, r, h, bias, p in [
    (2048, 4096, 4, 64, 0, False, 0.0), (1024, 1024, 4, 16, 0, True, 0.0), (2048, 2048, 4, 64, 16, False, 0.0),
    (576, 1536, 4, 12, 0, True, 0.0), (2048, 4096, 4, 64, 0, True, 0.3),
]:
    for adapter_dtype in (torch.bfloat16, torch.float32):
        check_layer(4096, n_in, n_out, k, r, h, bias, p, "cuda", torch.bfloat16, adapter_dtype)
print("unpacked")
"""
    assert "unpacked" in run(LAYER + code)
