"""Triton compiles every kernel for every architecture that it is written for; this needs no GPU."""

import itertools
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon.language import shared_memory_descriptor  # noqa: E402

from gralora import ops  # noqa: E402
from gralora.ops import fp8, fp8_hopper, hopper, kernels, launch, plans  # noqa: E402
from gralora.ops.activations import ACTIVATIONS  # noqa: E402
from gralora.ops.interface import Conversion, FactorGradients  # noqa: E402
from gralora.ops.weights import Float8Weight  # noqa: E402

SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes a program may take


@pytest.fixture
def compiled(monkeypatch):
    """Of kernels that are launched on CPU tensors, what Triton compiles for the architecture `target`, by name."""
    kernels = SimpleNamespace(target=None, made={})

    def compile_only(self, key, grid, tensors, numbers, constants, *tiled):
        constants = tuple("bf16x6" if c == "ieee" else c for c in constants)  # the precision on a GPU
        kernel = self.compile(grid, tensors, numbers, constants, *tiled)
        kernels.made[kernel.name] = kernel

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", kernels.target, 32),
        get_current_device=lambda: kernels.target,  # Triton asks for the target once for each device
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(launch.Launcher, "__call__", compile_only)
    monkeypatch.setattr(hopper, "_processors", lambda device: 132)
    monkeypatch.setattr(hopper, "_counter", lambda device: torch.zeros(1, dtype=torch.int32))
    return kernels


def check(compiled):
    for name, kernel in compiled.made.items():
        assert len(kernel.asm["cubin"]) > 1000 and f".target sm_{compiled.target}" in kernel.asm["ptx"], name
        assert kernel.metadata.shared <= SHARED_MEMORY[compiled.target], (name, kernel.metadata.shared)


HALF, FLOAT = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "r, dtype, factors", [(16, HALF, HALF), (64, torch.half, FLOAT), (128, HALF, FLOAT), (512, HALF, FLOAT)]
)
@pytest.mark.parametrize("capability", list(SHARED_MEMORY), ids="sm{}".format)
def test_portable_kernels_compile(capability, r, dtype, factors, compiled, monkeypatch):
    """They fit into the shared memory, for any rank and for float32 factors, which take more of it."""
    compiled.target = capability
    x, dy, g = (torch.empty(*size, dtype=dtype) for size in [(64, 2048), (64, 4096), (2, 64, r)])
    A, B = torch.empty(2, 1024, r, dtype=factors), torch.empty(2, r, 2048, dtype=factors)
    kernels.down(x, A, 0, 1.0, Conversion(B, B.half()))
    for activation in ACTIVATIONS:
        kernels.gated(x, x, activation, x)
        kernels.gated_backward(x, x, x, activation, x, x)
        check(compiled)
    kernels.downs(x, [A, A], 0, [1.0, 1.0], [Conversion(B, B.half()), None])
    check(compiled)
    monkeypatch.setattr(kernels, "PROGRAMS", 1)  # with the largest tiles, as for many tokens
    kernels.down(x, A, 0, 1.0, Conversion(B, B.half()))
    kernels.downs(x, [A, A], 0, [1.0, 1.0], [Conversion(B, B.half()), None])
    kernels.up(g, B, dy)
    kernels.factor_gradients(x, dy, g, g, A, B, A, x)
    kernels.dropout(x, 0.5, torch.tensor(0))
    kernels.delta_weight(A.float(), B.float(), 1.0)
    code, packed, w = torch.empty(16), torch.empty(2**15, dtype=torch.uint8), torch.empty(2**16, dtype=dtype)
    kernels.dequantize_4bit(packed, torch.empty(1024, dtype=torch.uint8), code, 64, w, (code, code, code[0]))
    assert len(compiled.made) == 9
    check(compiled)


@pytest.mark.parametrize("block_r", [None, 64, 128], ids="gradients-{}".format)
@pytest.mark.parametrize("w_transposed, b_transposed", list(itertools.product([False, True], repeat=2)))
def test_hopper_kernel_compiles(w_transposed, b_transposed, block_r, compiled):
    """For either layout of weight and B, and with what it computes in the backward."""
    compiled.target = 90
    T, n_in, n_out, k, r = 256, 256, 512, 2, block_r or 64
    dtype, has_bias = torch.float16 if w_transposed else torch.bfloat16, w_transposed != b_transposed
    adds = bool(block_r) and not has_bias

    def draw(*size, transposed=False):
        t = torch.empty(size, dtype=dtype)
        return t.mT.contiguous().mT if transposed else t

    hopper.linear(
        draw(T, n_out),
        draw(T, n_in),
        draw(n_out, n_in, transposed=w_transposed),
        draw(n_out) if has_bias else None,
        draw(k, T, r),
        draw(k, r, n_out // k, transposed=b_transposed),
        FactorGradients(draw(T, n_out), draw(k, T, r), torch.empty(k, n_out // k, r), torch.empty(k, r, n_in // k).mT)
        if block_r
        else None,
        adds=adds,
    )
    check(compiled)
    assert ("cp.reduce.async.bulk.tensor" in compiled.made["linear_kernel"].asm["ptx"]) == (
        bool(block_r) and not has_bias
    )
    assert "wgmma.mma_async" in compiled.made["linear_kernel"].asm["ptx"]


@pytest.mark.parametrize("transposed, b_transposed", [(False, False), (True, True)])
@pytest.mark.parametrize("block_r", [None, 64, 128], ids="gradients-{}".format)
def test_fp8_kernels_compile(block_r, transposed, b_transposed, compiled, monkeypatch):
    """For weight and transpose, all with tensor cores' 8-bit floats, and the adapter's product in half precision."""
    compiled.target = 90
    monkeypatch.setattr(fp8_hopper, "is_capturing", lambda: True)
    T, n_in, n_out, k, r = 4096, 256, 2048, 2, block_r or 64
    w = fp8.quantize_rows(torch.zeros(n_in, n_out) if transposed else torch.zeros(n_out, n_in))
    weight = Float8Weight(*w, (1, w[0].shape[1]))
    B = torch.empty(k, n_out // k, r, dtype=HALF).mT if b_transposed else torch.empty(k, r, n_out // k, dtype=HALF)
    x, y, g = (torch.empty(*size, dtype=HALF) for size in [(T, n_in), (T, n_out), (k, T, r)])
    grads = FactorGradients(y, g, torch.empty(k, n_out // k, r), torch.empty(k, r, n_in // k).mT) if block_r else None
    bias = None if transposed else y[0]
    fp8_hopper.linear(y, x, weight.t() if transposed else weight, bias, g, B, grads, adds=transposed)
    assert set(compiled.made) == {"_quantize_rows_kernel", "scaled_linear_kernel"}
    check(compiled)
    ptx = compiled.made["scaled_linear_kernel"].asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3" in ptx and "m64n256k16.f32.bf16.bf16" in ptx
    assert "cvt.rn.satfinite.e4m3x2.f32" in compiled.made["_quantize_rows_kernel"].asm["ptx"]


@pytest.mark.parametrize("moved", ["", "reinterpret", "kernels"])
def test_a_triton_that_moved_what_kernels_use(moved, monkeypatch):
    """Plans do without these kernels, and a warning names Triton's version."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name in ("gluon", "hopper", "hopper_kernel", "kernels", "launch"):
        monkeypatch.setattr(ops, name, getattr(ops, name))  # imported again, for this test
        monkeypatch.delitem(sys.modules, f"gralora.ops.{name}")
    if moved == "reinterpret":
        for name in ("reinterpret", "_reinterpret"):
            monkeypatch.delattr(shared_memory_descriptor, name, raising=False)
    elif moved:
        monkeypatch.setitem(sys.modules, "triton.runtime.errors", None)
    monkeypatch.setattr(plans, "architecture", plans.architecture.__wrapped__)  # not from the cache
    expected = {"": ("kernels", "hopper"), "reinterpret": ("kernels", ""), "kernels": ("batched", "")}[moved]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        row = plans.architecture(0)
    assert (row.kernels, row.product) == expected
    ours = [str(w.message) for w in warned if "gralora" in str(w.message)]
    assert len(ours) == bool(moved) and all(f"Triton {triton.__version__}" in message for message in ours)
