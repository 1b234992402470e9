"""The launches of `fp8_kernels` and `fp8_hopper`: the first in Triton's interpreter, both on a GPU (-m gpu)."""

import gc
import os
import subprocess
import sys

import pytest
import torch
from operators import gralora_linear
from test_kernels import make, needs_gpu, relative

from gralora.ops import Float8Weight, fp8, plans, reference
from gralora.ops.interface import FactorGradients
from gralora.ops.layout import layout

pytest.importorskip("triton.experimental.gluon")

from gralora.ops import fp8_hopper, hopper  # noqa: E402

ROUNDING = 0.0245  # root mean square of E4M3's relative rounding error, of values whose logarithms are uniform


def float8(w: torch.Tensor) -> Float8Weight:
    values, scales = fp8.quantize_rows(w)
    return Float8Weight(values, scales, (1, w.shape[1]))


INTERPRETED = """
import torch
from gralora.ops import fp8, fp8_kernels

fp8_kernels.E4M3 = torch.float32  # the interpreter rounds to 8 bits wrongly: 124.3 to 64
for T, n, longest in [(5, 64, 16384), (3, 300, 16384), (4, 300, 128), (1, 16, 16384)]:
    fp8_kernels.LONGEST = longest
    x = torch.randn(T, n + 3)[:, :n] * torch.tensor([1e-30, 1.0, 1e30, 0.0, 3.0])[:T, None]
    for dtype in (torch.float32, torch.bfloat16):
        for factors in (None, torch.rand(1, n) + 0.5, torch.full((1, 1), 0.3)):
            values, scales = fp8_kernels.quantize_rows(x.to(dtype), factors)
            product = x.to(dtype).float() if factors is None else x.to(dtype) * factors
            torch.testing.assert_close(scales, fp8.quantize_rows(product)[1], rtol=2e-7, atol=0)
            torch.testing.assert_close(values * scales, product, rtol=1e-6, atol=0)
            assert values.shape == (T, n) and values.abs().max() < 448.001
    x = torch.randn(3, n)
    x[0, 1], x[1, 2] = torch.nan, torch.inf
    product = torch.mul(*fp8_kernels.quantize_rows(x))
    assert not product[0].isfinite().all() and not product[1].isfinite().all() and product[2].isfinite().all()
"""


def test_quantize_rows_in_the_interpreter():
    """As torch's operations scale: rows with gaps, of zeros and of huge numbers, with factors, longer than a block."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=environment)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("T, n", [(5000, 4096), (33, 14336), (7, 576), (5, 40000)])
def test_quantize_rows_on_gpu(T, n):
    """As torch's operations round, but for those few that another last bit of the scale rounds otherwise."""
    from gralora.ops import fp8_kernels

    x = torch.randn(T, n, device="cuda", dtype=torch.bfloat16)
    x[1], x[2] = 0, x[2] * 1e30
    for factors in (None, torch.rand(1, n, device="cuda") + 0.5):
        values, scales = fp8_kernels.quantize_rows(x, factors)
        expected, expected_scales = fp8.quantize_rows(x if factors is None else x * factors)
        torch.testing.assert_close(scales, expected_scales, rtol=3e-7, atol=0)
        assert (values.view(torch.uint8) != expected.view(torch.uint8)).float().mean() < 1e-3
        assert relative(values.float() * scales, expected.double() * expected_scales.double()) < 1e-3
    x[0, 1], x[3, 2] = torch.nan, torch.inf
    product = torch.mul(*(t.float() for t in fp8_kernels.quantize_rows(x)))
    finite = product.isfinite().all(1).tolist()
    assert finite == [row not in (0, 3) for row in range(T)]


def test_transposed_copy():
    """It is kept while the values live and are what they were."""
    both = fp8.quantize_rows(torch.randn(64, 64))[0]
    values = both[32:]
    before, is_capturing = len(fp8_hopper._copies), fp8_hopper.is_capturing
    fp8_hopper.is_capturing = lambda: False
    try:
        copy = fp8_hopper._transposed(values)
        assert copy.is_contiguous() and torch.equal(copy.float(), values.float().T)
        assert fp8_hopper._transposed(values) is fp8_hopper._transposed(values.detach()) is copy
        assert torch.equal(fp8_hopper._transposed(both[:32]).float(), both[:32].float().T)
        values.zero_()
        changed = fp8_hopper._transposed(values)
        assert not changed.float().any() and fp8_hopper._transposed(values) is changed
        fp8_hopper.is_capturing = lambda: True
        assert fp8_hopper._transposed(values.clone()).shape == copy.shape
    finally:
        fp8_hopper.is_capturing = is_capturing
    assert len(fp8_hopper._copies) == before + 1
    del both
    gc.collect()
    assert len(fp8_hopper._copies) == before + 1, "a part of it is in use"
    del values
    gc.collect()
    assert len(fp8_hopper._copies) == before


# On a GPU: tokens, in, out, k, r, as few tiles as there are, tiles that straddle blocks, and odd sizes
SHAPES = [
    (8192, 4096, 4096, 4, 64),
    (4100, 2048, 4608, 4, 64),
    (8192, 2304, 2304, 3, 24),
    (5003, 1552, 6160, 2, 16),
    (4096, 4096, 4096, 8, 128),
    (4096, 14336, 4096, 4, 64),
    (8192, 2048, 2048, 1, 200),
]
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


@pytest.fixture
def fused(monkeypatch):
    """Let all FP8 weights be multiplied by the fused product, and nothing else."""
    monkeypatch.setattr(fp8, "choice", "products")
    monkeypatch.setattr(fp8, "linear", lambda *args: pytest.fail("not fused"))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-{}x{}-k{}-r{}".format(*s))
def test_fused_product_on_gpu(shape, dtype, fused):
    """Near the float64 product of the rounded operands: for either layout of B, W or W^T, scales of rows or one."""
    T, n_in, n_out, k, r = shape
    x, w, bias, _, B, *_ = make((*shape, 0), dtype, "cuda", bias=True)
    g = torch.randn(k, T, r, device="cuda", dtype=dtype)
    up = reference.up(g.double().transpose(0, 1).flatten(1), B.double())
    scale = w.abs().max().float().view(1, 1) / 448
    one = Float8Weight((w / scale).to(fp8.E4M3), scale, tuple(w.shape))
    weights = {"rows": float8(w), "one": one, "transposed": float8(w.t().contiguous()).t()}
    for name, weight in weights.items():
        factors = weight.scales if weight.scales.shape[0] == 1 else torch.ones(1, 1, device="cuda")
        values, scales = fp8.quantize_rows(x.float() * factors)
        columns = weight.scales.double().T if weight.scales.shape[0] > 1 else 1.0
        exact = (values.double() * scales.double()) @ weight.values.double().T * columns + up
        for b, adds, own_bias in ((B, False, bias), (B.mT.contiguous().mT, True, None), (B, False, None)):
            y = torch.ones(T, n_out, device="cuda", dtype=dtype)
            fp8_hopper.linear(y, x, weight, own_bias, g, b, adds=adds)
            wanted = exact + (own_bias.double() if own_bias is not None else 0.0) + float(adds)
            error = relative(y, wanted)
            print(f"{name} adds={adds} bias={own_bias is not None}: {error:.5f}")
            assert error < 0.01, (name, adds)


def test_one_x_is_quantised_once(monkeypatch):
    """For layers that have it one after the other, while it is what it was; and what comes of it is freed with it."""
    quantised = []
    monkeypatch.setattr(fp8_hopper, "quantize_rows", lambda x: quantised.append(1) or fp8.quantize_rows(x))
    monkeypatch.setattr(fp8_hopper, "is_capturing", lambda: False)
    monkeypatch.setattr(fp8_hopper, "current_raw_stream", lambda device: streams[-1])
    monkeypatch.setattr(fp8_hopper, "_last", {})
    x, streams = torch.randn(3, 16), [0]
    first = fp8_hopper._quantized(x)
    assert fp8_hopper._quantized(x) is first and len(quantised) == 1
    x[0] = 2
    assert torch.equal(fp8_hopper._quantized(x)[1], fp8.quantize_rows(x)[1]) and len(quantised) == 2
    streams.append(1)
    fp8_hopper._quantized(x)
    fp8_hopper._quantized(x.clone())
    assert len(quantised) == 4 and not fp8_hopper._last, "the copy is dead"
    with torch.inference_mode():
        fp8_hopper._quantized(torch.zeros(2, 16))
    monkeypatch.setattr(fp8_hopper, "is_capturing", lambda: True)
    fp8_hopper._quantized(x)
    assert not fp8_hopper._last


def test_operands_that_tma_cannot_read(monkeypatch):
    """A weight of rows with gaps or at an odd address, and factors as those of the half-precision product."""
    monkeypatch.setattr(hopper, "_processors", lambda device: 1)
    values, B = torch.zeros(256, 64, dtype=fp8.E4M3), torch.zeros(4, 16, 64, dtype=torch.bfloat16)

    def fits(values=values, B=B, dtype=torch.bfloat16):
        return fp8_hopper._fits(256, (256, 64), layout(values), dtype, layout(B), 0)

    assert fits() and fits(B=B.mT.contiguous().mT)
    assert not fits(torch.zeros(256, 80, dtype=fp8.E4M3)[:, :64]) and not fits(dtype=torch.float32)
    assert not fits(torch.zeros(256 * 64 + 1, dtype=fp8.E4M3)[1:].view(256, 64))
    assert not fits(B=torch.zeros(4, 12, 64, dtype=torch.bfloat16)) and not fits(B=torch.zeros(4, 16, 128)[..., ::2])


def test_product_where_it_is_not_fused(monkeypatch):
    """Is torch's, and writes the factors' gradients, too, for which a plan relies on it."""
    monkeypatch.setattr(hopper, "_processors", lambda device: 132)
    T, n_in, n_out, k, r = 24, 64, 32, 2, 4
    x, z, w = torch.randn(T, n_in), torch.randn(T, n_out), torch.randn(n_out, n_in)
    g, h, B = torch.randn(k, T, r), torch.randn(k, T, r), torch.randn(k, r, n_out // k)
    y, expected, z_grad, x_grad = (
        torch.empty(*size) for size in [(T, n_out)] * 2 + [(k, n_out // k, r), (k, r, n_in // k)]
    )
    fp8.linear(expected, x, float8(w), None, g, B)
    fp8_hopper.linear(y, x, float8(w), None, g, B, FactorGradients(z, h, z_grad, x_grad.mT))
    assert torch.equal(y, expected)
    torch.testing.assert_close(z_grad, torch.einsum("tkc,ktr->kcr", z.unflatten(1, (k, -1)), g))
    torch.testing.assert_close(x_grad.mT, torch.einsum("tkc,ktr->kcr", x.unflatten(1, (k, -1)), h))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[4]], ids=lambda s: "T{}-{}x{}-k{}-r{}".format(*s))
def test_gradients_of_factors_in_the_launch_on_gpu(shape, fused):
    """They are of x and z as they are, and the product is that of a launch without them."""
    T, n_in, n_out, k, r = shape
    x, w, _, _, B, *_ = make((*shape, 0), torch.bfloat16, "cuda")
    g, h = (torch.randn(k, T, r, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    z, weight = torch.randn(T, n_out, device="cuda", dtype=torch.bfloat16), float8(w)
    y, alone = (torch.empty(T, n_out, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    z_grad, x_grad = torch.empty(k, n_out // k, r, device="cuda"), torch.empty(k, r, n_in // k, device="cuda").mT
    fp8_hopper.linear(alone, x, weight, None, g, B)
    fp8_hopper.linear(y, x, weight, None, g, B, FactorGradients(z, h, z_grad, x_grad))
    assert torch.equal(y, alone)
    for grad, operand, ranks in ((z_grad, z, g), (x_grad, x, h)):
        exact = torch.einsum("tkc,ktr->kcr", operand.double().unflatten(1, (k, -1)), ranks.double())
        assert relative(grad, exact) < 1e-5


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("product", ["fp8", "fp8_hopper"])
@pytest.mark.parametrize(
    "n_in, n_out, bias, factors",
    [(4096, 4096, False, torch.bfloat16), (2048, 8192, True, torch.float32), (576, 1536, False, torch.bfloat16)],
)
def test_layers_on_gpu(monkeypatch, product, n_in, n_out, bias, factors):
    """Errors of y and dx are those of rounding x and dy, and the factors' gradients as exact as without FP8."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    monkeypatch.setattr(plans, "fp8_module", lambda device: (product, "the card"))
    x, w, b, A, B, *_ = make((4096, n_in, n_out, 4, 64, 0), torch.bfloat16, "cuda", bias)
    dy, weight, outcomes = torch.randn(4096, n_out, device="cuda", dtype=torch.bfloat16), float8(w), []
    trained = [x, A.to(factors), B.to(factors)]
    for used in ("dequantised", "products"):
        monkeypatch.setattr(fp8, "choice", used)
        leaves = [t.clone().requires_grad_() for t in trained]
        y = gralora_linear(leaves[0], weight, b, *leaves[1:], None, None, 1.0)
        outcomes.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    doubles = [t.double().requires_grad_() for t in trained]
    bias64 = None if b is None else b.double()
    exact = gralora_linear(doubles[0], weight.dense(torch.float64), bias64, *doubles[1:], None, None, 1.0)
    wanted = [exact.detach(), *torch.autograd.grad(exact, doubles, dy.double())]
    for n, (near, ours, right) in enumerate(zip(*outcomes, wanted, strict=True)):
        errors = relative(ours, right), relative(near, right)
        print(n, errors)
        assert errors[0] < (1.3 * ROUNDING if n < 2 else 1.2 * errors[1]), (n, errors)


@pytest.mark.gpu
@needs_hopper
def test_fused_product_in_a_graph_on_gpu(fused):
    """Replays of a CUDA graph that was recorded at the first backward give the bits of eager launches."""
    x, w, _, A, B, *_ = make((*SHAPES[0], 0), torch.bfloat16, "cuda")
    dy, weight = torch.randn(len(x), len(w), device="cuda", dtype=torch.bfloat16), float8(w)

    def step():
        leaves = [t.detach().requires_grad_() for t in (x, A, B)]
        y = gralora_linear(leaves[0], weight, None, *leaves[1:], None, None, 1.0)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    fp8_hopper._copies.clear()
    with torch.no_grad():  # compiled
        gralora_linear(x, weight, None, A, B, None, None, 1.0)
        other = float8(w)
    leaves = [t.detach().requires_grad_() for t in (x, A, B)]
    y = gralora_linear(leaves[0], other, None, *leaves[1:], None, None, 1.0)
    torch.autograd.grad(y, leaves, dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    assert id(weight.values.untyped_storage()) not in fp8_hopper._copies
    expected = step()
    for t in captured:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.gpu
@needs_hopper
def test_which_product_on_gpu(monkeypatch):
    """The fused one; few tokens are left to torch's."""
    monkeypatch.setattr(fp8, "choice", "products")
    x, w, _, A, B, *_ = make((4096, 4096, 4096, 4, 64, 0), torch.bfloat16, "cuda")
    plan = plans.plan(x, float8(w), A, B)
    assert plan.forward is plan.backward is fp8_hopper and plan.takes_packed
    launched = []
    monkeypatch.setattr(hopper, "launch", lambda *args: launched.append(args))
    g, y = torch.zeros(4, 4096, 64, device="cuda", dtype=torch.bfloat16), torch.empty_like(x)
    fp8_hopper.linear(y, x, float8(w), None, g, B)
    fp8_hopper.linear(y[:64], x[:64], float8(w), None, g[:, :64].contiguous(), B)
    assert len(launched) == 1
