"""The kernels of experts: interpreted, compiled for Hopper without a GPU, and on one."""

import copy
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from helpers import adapter_parameters  # noqa: E402
from test_experts_grouped import experts_of, inputs, merged_weights, reference, with_grid  # noqa: E402
from test_launch import check as check_launch  # noqa: E402
from test_launch import cuda, draw, stub  # noqa: E402, F401 (fixtures)
from test_launch import pytestmark as needs_stub  # noqa: E402
from torch.func import functional_call  # noqa: E402

from gralora.ops import grouped_kernels  # noqa: E402
from gralora.ops.routing import Groups  # noqa: E402

INTERPRETED = """
import torch
from torch import nn
from triton.runtime import interpreter
from gralora.ops import Factors, grouped_kernels, grouped_loops, plans, weighted_gate
from gralora.ops.grouped import GroupedLinear, grouped_linear
from gralora.ops.routing import Groups

patch = interpreter._patch_lang_tensor  # NumPy 2.4 makes no int of the interpreter's arrays of one element


def patch_with_item(tensor, scope):
    patch(tensor, scope)
    tensor.__index__ = lambda self: self.handle.data.item()


interpreter._patch_lang_tensor = patch_with_item


def assert_near(value, truth, *case):
    assert (value - truth).abs().max() < 1e-5 * truth.abs().max() + 1e-12, case


COUNTS = [(70, 0, 3, 129, 0), (0, 0, 64, 0, 0), (1, 1, 1, 1, 1), (0, 5, 0, 0, 0)]
for counts, (k, r, n_in, n_out) in zip(COUNTS, [(2, 4, 40, 60), (4, 16, 96, 288), (3, 3, 63, 99), (1, 70, 64, 70)]):
    groups, E, S = Groups(torch.tensor(counts).cumsum(0, dtype=torch.int32)), len(counts), sum(counts)
    x, dy = torch.randn(S, n_in), torch.randn(S, n_out)
    A, B = torch.randn(E, k, n_in // k, r), torch.randn(E, k, n_out // k, r).mT
    g, dh = torch.full((S, k, r), torch.nan), torch.randn(S, k, r)
    exact = grouped_loops.down(x.double(), A.double(), 0.5, groups)
    assert_near(g := grouped_kernels.down(x, A, 0.5, groups), exact, counts)
    y, truth = dy.clone(), dy.double()
    grouped_loops.up(g.double(), B.double(), truth, groups)
    grouped_kernels.up(g, B, y, groups)
    assert_near(y, truth, counts)
    for out in (torch.full_like(A, torch.nan), torch.full_like(A.mT.contiguous(), torch.nan).mT):
        truth = torch.empty_like(A).double()
        grouped_loops.factor_gradient(x.double(), dh.double(), truth, groups)
        grouped_kernels.factor_gradient(x, dh, out, groups)
        assert_near(out, truth, counts)

for S, F, activation in [(3, 24, "silu"), (5, 1030, "gelu"), (2, 64, "gelu_tanh")]:
    x, weights, d_out = torch.randn(S, 2 * F), torch.rand(S, 1), torch.randn(S, F)
    doubles = [t.double().requires_grad_() for t in (x, weights)]
    truth = weighted_gate.definition(*doubles, activation)
    for kernels in (grouped_kernels, grouped_loops):
        assert_near(kernels.weighted_gate(x, weights, activation), truth, kernels, F)
        grads = kernels.weighted_gate_backward(x, weights, d_out, activation)
        for grad, wanted in zip(grads, torch.autograd.grad(truth, doubles, d_out.double(), retain_graph=True)):
            assert_near(grad, wanted, kernels, F)

# whole layers
launches = []
for name in ("product", "down", "up", "factor_gradient"):
    kernel = getattr(grouped_kernels, name)
    setattr(grouped_kernels, name, lambda *args, f=kernel: (launches.append(f.__name__), f(*args))[1])
plans.CPU = plans.Architecture("the interpreter", (0, 0), "kernels", dtypes=(torch.float32,))
counts, k, r, n_in, n_out = (7, 0, 66), 2, 8, 24, 32
groups = Groups(torch.tensor(counts).cumsum(0, dtype=torch.int32))
for is_transposed in (False, True):
    weight = nn.Parameter(torch.randn(3, n_in, n_out) if is_transposed else torch.randn(3, n_out, n_in), False)
    tensors = [torch.randn(sum(counts), n_in), torch.randn(3, k, n_in // k, r), torch.randn(3, k, r, n_out // k)]
    results = []
    for dtype in (torch.float32, torch.float64):
        x, A, B = (t.to(dtype).requires_grad_() for t in tensors)
        layer = GroupedLinear(nn.Parameter(weight.to(dtype), False), is_transposed, (Factors(A, B, scaling=0.5),))
        launches.clear()
        y = grouped_linear((x,), torch.tanh, layer, groups)
        results.append([y, *torch.autograd.grad(y, (x, A, B), torch.ones_like(y))])
        used = ["product", "down", "up"] * 2 + ["factor_gradient"] * 2
        assert launches == (used if dtype == torch.float32 else []), launches
    for value, truth in zip(*results):
        assert_near(value, truth, is_transposed)
print("interpreted")
"""


def test_interpreted():
    """Triton's interpreter runs the kernels' code on the CPU: odd sizes, any strides, experts without rows."""
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "interpreted" in run.stdout, run.stderr[-2000:]


@needs_stub[0]
@needs_stub[1]
@needs_stub[2]
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_launches(factors, cuda):  # noqa: F811
    """Compiled for Hopper, the kernels reach the driver by the cheap launch as by Triton's own."""
    E, S, k, r = 5, 100, 2, 16
    groups = Groups(torch.tensor([10, 10, 40, 90, S], dtype=torch.int32))
    A, B = draw(E, k, 32, r, dtype=factors), draw(E, k, 48, r, dtype=factors).mT
    x, y, g = draw(S, 64), draw(S, 96), draw(S, k, r)
    check_launch(cuda, grouped_kernels.down, x, A, 0.3, groups)
    check_launch(cuda, grouped_kernels.down, y, B.mT, 0.3, groups)
    check_launch(cuda, grouped_kernels.up, g, B, y, groups)
    check_launch(cuda, grouped_kernels.factor_gradient, x, g, torch.empty_like(A), groups)
    check_launch(cuda, grouped_kernels.factor_gradient, y, g, torch.empty_like(B).mT, groups)
    weights = draw(S, 1, dtype=factors)
    check_launch(cuda, grouped_kernels.weighted_gate, y, weights, "silu")
    check_launch(cuda, grouped_kernels.weighted_gate_backward, y, weights, draw(S, 48), "silu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("fp32_factors", [False, True], ids=["bf16", "fp32"])
def test_modules_on_gpu(name, fp32_factors, monkeypatch):
    """Output and gradients are at most twice as far from float64 as with dW added; the host waits for nothing."""
    base = experts_of(name, "grouped_mm", torch.bfloat16, width=64).cuda()
    model = with_grid(copy.deepcopy(base), autocast_adapter_dtype=fp32_factors)
    hidden, chosen, weights = (t.detach().repeat(40, 1).cuda() for t in inputs(torch.bfloat16))
    x = hidden.requires_grad_(), chosen, weights.requires_grad_()
    parameters = [x[0], x[2], *adapter_parameters(model).values()]
    dy, launched, down = torch.randn_like(hidden), [], grouped_kernels.down

    def results(y):
        return [y.detach(), *torch.autograd.grad(y, parameters, dy.to(y.dtype))]

    monkeypatch.setattr(grouped_kernels, "down", lambda *args: launched.append(args) or down(*args))
    results(model(*x))  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = results(model(*x))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(launched) == 2 * 2 * 2 * 2  # calls, passes, layers, and a grid with a plain part
    exact = results(reference(model, base, x))
    plain = functional_call(base, {name: w.bfloat16() for name, w in merged_weights(model).items()}, x)
    for value, near, truth in zip(ours, results(plain), exact, strict=True):
        error, bound = (relative(t, truth) for t in (value, near))
        assert error <= 2 * bound + 1e-6
    assert all(map(torch.equal, ours, results(model(*x)))), "the same bits at every call"


def relative(value, truth):
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()
