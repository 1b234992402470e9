"""The kernels against the definition: on a GPU (-m gpu), and the portable ones in Triton's interpreter on the CPU."""

import dataclasses
import itertools
import os
import subprocess
import sys

import pytest
import torch
from operators import add_update, gralora_linear, reference_linear, reference_update

from gralora.ops import dropout, reference
from gralora.ops.interface import FactorGradients
from gralora.ops.layout import layout

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# tokens, in, out, k, r, hybrid_r: sizes of the Hopper kernel, tiles that straddle blocks, and odd ones
SHAPES = [
    (4096, 4096, 4096, 4, 64, 0),
    (4100, 2048, 4608, 4, 64, 0),
    (8192, 2304, 2304, 3, 24, 0),
    (5000, 1536, 6144, 2, 16, 0),
    (4096, 4096, 4096, 8, 128, 0),
    (8192, 2048, 2048, 4, 192, 0),
    (4096, 4096, 4096, 4, 64, 16),
    (1000, 576, 1536, 4, 12, 0),
    (300, 570, 190, 5, 5, 0),
    (7, 64, 128, 4, 8, 4),
]


def make(shape, dtype, device, bias=False):
    tokens, n_in, n_out, k, r, h = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size, fan_in):
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float64) / fan_in**0.5

    x = draw(tokens, n_in, fan_in=1)
    weight = draw(n_out, n_in, fan_in=n_in)
    b = draw(n_out, fan_in=1) if bias else None
    A, B = draw(k, n_in // k, r, fan_in=n_in // k), draw(k, r, n_out // k, fan_in=r)
    hybrid = (draw(h, n_in, fan_in=n_in), draw(n_out, h, fan_in=h)) if h else (None, None)
    tensors = [x, weight, b, A, B, *hybrid]
    return [None if t is None else t.to(dtype) for t in tensors]


def gradients(function, tensors, dy):
    leaves = [None if t is None else t.detach().requires_grad_(i not in (1, 2)) for i, t in enumerate(tensors)]
    y = function(*leaves, 0.5)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def relative(value, exact):
    assert torch.isfinite(value).all()
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-{}x{}-k{}-r{}-h{}".format(*s))
def test_linear_on_gpu(shape, dtype, bias):
    """Output and all gradients are as near to the float64 result as the plain definition in the same dtype."""
    tensors = make(shape, dtype, "cuda", bias)
    dy = torch.randn(shape[0], shape[2], device="cuda", dtype=dtype)
    exact = gradients(reference_linear, [None if t is None else t.double() for t in tensors], dy.double())
    plain = gradients(reference_linear, tensors, dy)
    ours = gradients(gralora_linear, tensors, dy)
    for name, a, b, c in zip(["y", "dx", "dA", "dB", "d_hybrid_A", "d_hybrid_B"], ours, plain, exact, strict=False):
        assert relative(a, c) <= 1.2 * relative(b, c) + 1e-6, name


@pytest.mark.gpu
@needs_gpu
def test_conv1d_layout_on_gpu():
    """A weight stored [in, out], as in transformers' Conv1D, takes the same kernel."""
    tensors = make(SHAPES[0], torch.bfloat16, "cuda")
    stored = tensors[1].t().contiguous().t()
    assert torch.equal(gralora_linear(tensors[0], stored, *tensors[2:], 0.5), gralora_linear(*tensors, 0.5))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("layout", ["batch", "batch of one", "rows of a wider tensor", "rows of odd addresses"])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=["", "many sub-ranks"])
def test_layouts_on_gpu(shape, layout):
    """Tokens in more dimensions, or with other numbers between them, give what the same rows alone give."""
    x, weight, _, A, B, *_ = make(shape, torch.bfloat16, "cuda")
    dy = torch.randn(len(x), len(weight), device="cuda", dtype=torch.bfloat16)

    def arrange(t):
        if layout == "batch":
            return t.view(2, -1, 2, t.shape[1])
        if layout == "batch of one":
            return t[None]
        gap = 8 if layout == "rows of a wider tensor" else 3
        return torch.cat([t[:, :gap], t], dim=1)[:, gap:]

    expected = gradients(gralora_linear, [x, weight, None, A, B, None, None], dy)
    ours = gradients(gralora_linear, [arrange(x), weight, None, A, B, None, None], arrange(dy))
    for name, a, b in zip(["y", "dx", "dA", "dB"], ours, expected, strict=True):
        if name in ("y", "dx"):
            a = a.reshape(b.shape)
        assert torch.equal(a, b) if "odd" not in layout else relative(a, b.double()) < 0.005, name


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "shape", [SHAPES[0], SHAPES[5], SHAPES[6], SHAPES[7]], ids=["large", "large rank", "large hybrid", "small"]
)
def test_float32_factors_on_gpu(shape):
    """Computed with in the dtype of x, which the launches convert them to; their gradients are float32."""
    x, weight, bias, *factors = make(shape, torch.bfloat16, "cuda")
    dy = torch.randn(shape[0], shape[2], device="cuda", dtype=torch.bfloat16)
    halves = gradients(gralora_linear, [x, weight, bias, *factors], dy)
    noise = [None if t is None else t.float() * (1 + 1e-4) for t in factors]  # rounds to the same bfloat16
    assert all(t is None or torch.equal(n.bfloat16(), t) for n, t in zip(noise, factors, strict=True))
    floats = gradients(gralora_linear, [x, weight, bias, *noise], dy)
    for name, a, b in zip(["y", "dx", "dA", "dB"], floats, halves, strict=False):
        assert a.dtype == (torch.bfloat16 if name in ("y", "dx") else torch.float32)
        assert torch.equal(a.bfloat16(), b), name


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("how", ["eager", "compiled", "added"])
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_many_sub_ranks_are_not_kept_on_gpu(how, factors, monkeypatch):
    """Of a layer with an eighth as many of them as its input has: projected again they give the same bits."""
    from gralora.ops import plans

    x, weight, _, A, B, *_ = make(SHAPES[1], torch.bfloat16, "cuda")
    x, A, B = x.requires_grad_(), A.to(factors).requires_grad_(), B.to(factors).requires_grad_()
    dy = torch.randn(len(x), len(weight), device="cuda", dtype=torch.bfloat16)

    def requested():
        return torch.cuda.memory_stats()["requested_bytes.all.current"]  # what is allocated is more, by gaps

    def run():
        function = torch.compile(gralora_linear, fullgraph=True) if how == "compiled" else gralora_linear
        before = requested()
        if how == "added":
            y = add_update(torch.zeros_like(dy), x, A, B, None, None, 0.5)
        else:
            y = function(x, weight, None, A, B, None, None, 0.5)
        kept = requested() - before - y.nbytes
        return kept, [y.detach(), *torch.autograd.grad(y, [x, A, B], dy)]

    torch._dynamo.reset()
    run()  # compiled, and memory of libraries
    few, ours = run()
    row = dataclasses.replace(plans.architecture(0), most_kept=2.0)
    monkeypatch.setattr(plans, "architecture", lambda device: row)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):  # keys of which are not of what is kept
        run()
        many, expected = run()
    sub_ranks = 2 * len(x) * A.shape[0] * A.shape[2]
    assert many - few == sub_ranks and few < sub_ranks, (few, many)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_streams_and_graphs_on_gpu():
    """Launches on two streams at once, and replays of a CUDA graph, give the bits of launches one after the other."""
    tensors = make(SHAPES[0], torch.bfloat16, "cuda")
    dy = torch.randn(SHAPES[0][0], SHAPES[0][2], device="cuda", dtype=torch.bfloat16)
    expected = gradients(gralora_linear, tensors, dy)
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for _ in range(8):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(gradients(gralora_linear, tensors, dy))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(gralora_linear, tensors, dy)
    for _ in range(3):
        for t in captured:
            t.zero_()
        graph.replay()
        results.append([t.clone() for t in captured])
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_reduce_overhead_on_gpu():
    """CUDA graphs of torch.compile give the bits of eager mode, and what lasts is not in their memory."""
    from gralora.ops import hopper

    torch._dynamo.reset()
    hopper._counters.clear()
    compiled = torch.compile(gralora_linear, mode="reduce-overhead", fullgraph=True, dynamic=False)
    for tokens in (SHAPES[0][0], SHAPES[0][0] // 2, SHAPES[0][0]):
        tensors = make((tokens, *SHAPES[0][1:]), torch.bfloat16, "cuda")
        dy = torch.randn(tokens, SHAPES[0][2], device="cuda", dtype=torch.bfloat16)
        expected = gradients(gralora_linear, tensors, dy)
        for _ in range(4):  # run, captured, replayed
            torch.compiler.cudagraph_mark_step_begin()
            ours = [t.clone() for t in gradients(compiled, tensors, dy)]
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    segments = torch.cuda.memory_snapshot()
    for counter in hopper._counters.values():
        [pool] = [s["segment_pool_id"] for s in segments if 0 <= counter.data_ptr() - s["address"] < s["total_size"]]
        assert tuple(pool) == (0, 0) and not counter.any()
    assert any(tuple(s["segment_pool_id"]) != (0, 0) for s in segments)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "shape, factors",
    [(SHAPES[7], torch.bfloat16), (SHAPES[8], torch.float32), (SHAPES[9], torch.float32)]
    + [((6000, 576, 1536, 4, 32, 0), torch.bfloat16)],
    ids=["few tokens", "float32 factors", "hybrid", "many tokens"],
)
def test_compiled_small_layer_on_gpu(shape, factors):
    """torch.compile launches the kernels itself, for any number of tokens, as exact as the plain definition."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    compiled = torch.compile(gralora_linear, fullgraph=True)
    for tokens in (shape[0], 2 * shape[0] + 1):
        tensors = make((tokens, *shape[1:]), torch.bfloat16, "cuda", bias=True)
        dy = torch.randn(tokens, shape[2], device="cuda", dtype=torch.bfloat16)
        exact = gradients(reference_linear, [None if t is None else t.double() for t in tensors], dy.double())
        plain = gradients(reference_linear, tensors, dy)
        tensors[3:] = [None if t is None else t.to(factors) for t in tensors[3:]]
        ours, sources = run_and_get_code(gradients, compiled, tensors, dy)
        assert all("_kernel" in source and "ops.gralora" not in source for source in sources)
        assert [t.dtype for t in ours] == [torch.bfloat16] * 2 + [factors] * (len(ours) - 2)
        for a, b, c in zip(ours, plain, exact, strict=True):
            assert a.shape == b.shape and relative(a, c) <= 1.2 * relative(b, c) + 1e-6


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize(
    "shape, factors",
    [(SHAPES[0], torch.bfloat16), (SHAPES[0], torch.float32), (SHAPES[6], torch.bfloat16)]
    + [((16, 2048, 4096, 4, 64, 0), torch.float32)],
    ids=["large", "large float32 factors", "large hybrid", "few tokens"],
)
def test_compiled_large_layer_on_gpu(shape, factors, p):
    """What eager mode computes; checkpointed, its product is not computed anew."""
    from torch._inductor.utils import run_and_get_code
    from torch.utils.checkpoint import checkpoint

    def layer(*args):
        return gralora_linear(*args, p, torch.tensor(7, device="cuda") if p else None)

    torch._dynamo.reset()
    tensors = make(shape, torch.bfloat16, "cuda", bias=True)
    tensors[3:] = [None if t is None else t.to(factors) for t in tensors[3:]]
    dy = torch.randn(shape[0], shape[2], device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(lambda *args: checkpoint(layer, *args, use_reentrant=False), fullgraph=True)
    ours, (forward, backward) = run_and_get_code(gradients, compiled, tensors, dy)
    assert "ops.gralora.adapted" in forward and "down_kernel" in forward
    assert "ops.gralora.linear_backward" in backward and "ops.gralora.adapted" not in backward
    for a, b in zip(ours, gradients(layer, tensors, dy), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b) if not shape[5] else relative(a, b.double()) < 0.005


@pytest.mark.gpu
@needs_gpu
def test_hopper_kernel_is_used():
    """On a Hopper GPU the large shapes do run the kernel that these tests are about."""
    from gralora.ops import hopper, kernels, plans

    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    x, weight, _, A, B, *_ = make(SHAPES[0], torch.bfloat16, "cuda")
    plan = plans.plan(x, weight, A, B)
    assert plan.down is kernels and plan.forward is plan.backward is hopper and plan.gradients_in_product


def test_hopper_kernel_leaves_half_a_round_to_cublas(monkeypatch):
    """Unless the factors' gradients fill the rest of it."""
    pytest.importorskip("triton.experimental.gluon")
    from gralora.ops import hopper

    monkeypatch.setattr(hopper, "_processors", lambda device: 4)
    weight, B = (layout(torch.zeros(*size, dtype=torch.bfloat16)) for size in [(256, 64), (4, 16, 64)])
    for tiles, alone, beside_gradients in [(3, False, False), (4, True, True), (5, False, True), (8, True, True)]:
        x = layout(torch.zeros(128 * tiles, 64, dtype=torch.bfloat16))
        assert hopper.takes(x, weight, B, 0) == alone and hopper.takes(x, weight, B, 0, x) == beside_gradients, tiles


def test_every_gradient_tile_has_a_place_in_the_list():
    """Those among the products begin before the list ends; with what comes last they are all there are."""
    pytest.importorskip("triton.experimental.gluon")
    from gralora.ops import hopper

    for products, gradients in itertools.product([100, 512, 3584], [1, 20, 64, 300]):
        for length, gradient_length in itertools.product([9, 65, 225], [0.7, 45.0, 128.0, 1e4]):
            spread, every = hopper._order(products, length, gradients, gradient_length, 132)
            assert 0 <= spread <= gradients and every >= 1
            assert spread == 0 or every * (spread - 1) < products + spread, (products, gradients, length)


def test_hopper_kernel_leaves_what_tma_cannot_read(monkeypatch):
    """Strides and addresses that are no multiples of 16 bytes, of every operand; either unit stride is read."""
    pytest.importorskip("triton.experimental.gluon")
    from gralora.ops import hopper

    monkeypatch.setattr(hopper, "_processors", lambda device: 1)

    def takes(**operands):
        return hopper.takes(**{name: layout(t) for name, t in operands.items()}, device=0)

    operands = {"x": (256, 64), "weight": (256, 64), "B": (4, 16, 64)}
    good = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in operands.items()}
    assert takes(**good)
    for name, tensor in good.items():
        if name != "x":
            assert takes(**good | {name: tensor.mT.contiguous().mT})
        wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 8, dtype=torch.bfloat16)
        assert takes(**good | {name: wide[..., 8:]}), "a part, in multiples of 16 bytes"
        assert not takes(**good | {name: wide[..., 1 : 1 + tensor.shape[-1]]}), "an address"
        assert not takes(**good | {name: torch.stack([tensor, tensor], dim=-1)[..., 0]}), "no unit stride"
        odd = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 4, dtype=torch.bfloat16)
        assert not takes(**good | {name: odd[..., : tensor.shape[-1]]}), "a stride"
    narrow = torch.zeros(256, 12, dtype=torch.bfloat16)
    assert takes(**good | {"z": good["x"]}) and not takes(**good | {"z": narrow}), "what gradients are computed of"
    blocks = torch.zeros(4, 16 * 64 + 4, dtype=torch.bfloat16)[:, : 16 * 64].unflatten(1, (16, 64))
    assert not takes(**good | {"B": blocks}), "the stride from block to block"
    assert not takes(**good | {"B": torch.zeros(4, 12, 64, dtype=torch.bfloat16)}), "g's stride"


def test_hopper_launch_copies_tensors_as_they_lie(monkeypatch):
    """Whatever their layouts, of the same sizes: in each tile the tensor's numbers in its order, or transposed."""
    pytest.importorskip("triton.experimental.gluon")
    from gralora.ops import hopper

    launched = []
    monkeypatch.setattr(hopper, "_processors", lambda device: 4)
    monkeypatch.setattr(hopper, "_counter", lambda device: torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(hopper, "_linear", lambda *args: launched.append(args))
    tokens, n_in, n_out, k, r = 256, 128, 192, 2, 16

    def draw(*size):
        return torch.randn(*size).bfloat16()

    g, h = draw(k, tokens, r), draw(k, tokens, r)
    z_grad, x_grad = torch.empty(k, n_out // k, r), torch.empty(k, r, n_in // k).mT
    for x, z, w, B, gradients in itertools.product(
        (draw(2, tokens // 2, n_in), draw(tokens, n_in + 8)[:, :n_in]),
        (draw(2, tokens // 2, n_out), draw(tokens, n_out + 8)[:, :n_out]),
        (draw(n_out, n_in), draw(n_in, n_out).mT, draw(n_out, n_in + 8)[:, :n_in]),
        (draw(k, r, n_out // k), draw(k, n_out // k, r + 8)[..., :r].mT, draw(k, r + 8, n_out // k)[:, :r]),
        (False, True),
    ):
        y = draw(tokens, n_out)
        hopper.linear(y, x, w, None, g, B, FactorGradients(z, h, z_grad, x_grad) if gradients else None)
        *_, pointers, numbers, _, (tiling, tensors) = launched[-1]
        seen = [tensors[place].as_strided(shape, strides) for place, _, shape, strides in tiling.tiles]
        assert all(t.stride(-1) == 1 and t.dim() == len(tile[1]) for tile, t in zip(tiling.tiles, seen, strict=True))
        x, z = x.reshape(tokens, n_in), z.reshape(tokens, n_out)
        read = (z, h, x, g) if gradients else (x, g, x, g)
        expected = x, w if w.stride(1) == 1 else w.mT, g, B if B.stride(2) == 1 else B.mT, y, *read
        assert all(torch.equal(*pair) for pair in zip(seen, expected, strict=True))
        assert seen[4].data_ptr() == y.data_ptr() and pointers[0] is y
        strides = (r, 1, 1, n_in // k) if gradients else (0, 0, 0, 0)
        assert numbers[:9] == (*strides, tokens, n_out, n_in, k, r)
        assert not gradients or pointers[2] is z_grad and pointers[3] is x_grad


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-{}x{}-k{}-r{}-h{}".format(*s))
def test_delta_weight_on_gpu(shape):
    """dW and its gradients by the kernel are as exact as float32 products are."""
    from gralora import ops

    A, B = (t.requires_grad_() for t in make(shape, torch.float32, "cuda")[3:5])
    dW, exact = ops.delta_weight(A, B, 0.5), reference.delta_weight(A.double(), B.double(), 0.5)
    weights = torch.randn_like(dW)
    grads = torch.autograd.grad(dW, [A, B], weights)
    exact_grads = torch.autograd.grad(exact, [A, B], weights.double())
    for value, truth in zip([dW.detach(), *grads], [exact.detach(), *exact_grads], strict=True):
        assert relative(value, truth.double()) < 1e-6


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[6], SHAPES[8]], ids=lambda s: "T{}-{}x{}-k{}-r{}-h{}".format(*s))
def test_dropout_on_gpu(shape):
    """Forward and backward see one mask, that of the seed: results as near to float64 as the plain definition's."""
    tensors, seed = make(shape, torch.bfloat16, "cuda"), torch.tensor(3, device="cuda")
    kept = dropout(torch.ones_like(tensors[0]), 0.3, seed)
    assert abs((kept == 0).double().mean() - 0.3) < 0.02 and len(kept.unique()) == 2
    dy = torch.randn(shape[0], shape[2], device="cuda", dtype=torch.bfloat16)
    doubles = [None if t is None else t.double() for t in tensors]
    exact = gradients(lambda *args: reference_linear(*args, (kept != 0) / 0.7), doubles, dy.double())
    plain = gradients(lambda *args: reference_linear(*args, kept), tensors, dy)
    ours = gradients(lambda *args: gralora_linear(*args, 0.3, seed), tensors, dy)
    for name, a, b, c in zip(["y", "dx", "dA", "dB", "d_hybrid_A", "d_hybrid_B"], ours, plain, exact, strict=False):
        assert relative(a, c) <= 1.2 * relative(b, c) + 1e-6, name


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[5], SHAPES[6]], ids=lambda s: "T{}-{}x{}-k{}-r{}-h{}".format(*s))
def test_added_on_gpu(shape, dtype):
    """The adapter in bfloat16, added to a result of bfloat16 or float32: as near to float64 as the definition is."""
    x, _, _, *factors = make(shape, torch.bfloat16, "cuda")
    y = torch.randn(shape[0], shape[2], device="cuda", dtype=dtype)
    dy = torch.randn_like(y)

    def plain(x, _, __, *args):
        *factors, scaling = args
        return y.to(torch.promote_types(dtype, x.dtype)) + reference_update(x, *factors, scaling)

    doubles = [None if t is None else t.double() for t in (x, None, None, *factors)]
    exact = gradients(plain, doubles, dy.double())
    near = gradients(plain, [x, None, None, *factors], dy)
    ours = gradients(lambda x, _, __, *args: add_update(y.clone(), x, *args), [x, None, None, *factors], dy)
    for name, a, b, c in zip(["y", "dx", "dA", "dB", "d_hybrid_A", "d_hybrid_B"], ours, near, exact, strict=False):
        assert relative(a, c) <= 1.2 * relative(b, c) + 1e-6, name


INTERPRETED = """
import dataclasses

import torch
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter
from operators import add_update, gralora_linear, reference_linear
from gralora.ops import batched, dropout, kernels, plans, reference
from gralora.ops.interface import Conversion

patch = interpreter._patch_lang_tensor  # NumPy 2.4 makes no int of the interpreter's arrays of one element


def patch_with_item(tensor, scope):
    patch(tensor, scope)
    tensor.__index__ = lambda self: self.handle.data.item()


interpreter._patch_lang_tensor = patch_with_item

sizes = [(33, 40, 2, 4), (130, 96, 4, 8), (5, 63, 3, 3), (64, 64, 1, 5), (140, 40, 2, 130)]
for programs, few, (tokens, n_in, k, r) in [(128, 2048, size) for size in sizes] + [(2, 0, size) for size in sizes]:
    kernels.PROGRAMS, kernels.FEW_TOKENS = programs, few
    x, A = torch.randn(tokens, n_in), torch.randn(k, n_in // k, r)
    g = kernels.down(x, A, 0, 0.5)
    exact = 0.5 * reference.down(x.double(), A.double()).unflatten(1, (k, r)).transpose(0, 1)
    assert (g - exact).abs().max() < 1e-5 * exact.abs().max(), (tokens, n_in, k, r)
    for other in (torch.randn(k, r, 700), torch.randn(k, 700, r).mT):  # converted beside it
        converted = torch.full_like(other, torch.nan, dtype=torch.float16)
        g = kernels.down(x, A, 0, 0.5, Conversion(other, converted))
        assert torch.equal(converted, other.half())
        assert (g - exact).abs().max() < 1e-5 * exact.abs().max(), (tokens, n_in, k, r)
    gaps = torch.randn(k, r + 1, 70)[:, :r]
    assert torch.equal(kernels.down(x, A, 0, 0.5, Conversion(gaps, converted := torch.empty(k, r, 70).half())), g)
    assert torch.equal(converted, gaps.half())
    wide = torch.cat([A, torch.randn(k, n_in // k, 2)], dim=2).transpose(1, 2).contiguous().transpose(1, 2)
    hybrid = kernels.down(x, wide, 2, 0.5)
    nearly = 1e-5 * g.abs().max() if k == 1 and few else 0  # torch's product sums in an order of its own
    assert (hybrid[..., :r] - g).abs().max() <= nearly
    assert torch.equal(hybrid[..., r:], (0.5 * (x @ wide[..., r:].flatten(0, 1))).expand(k, -1, -1))
assert [kernels._tokens_of_tile(x, 512, n) for n in (1, 2)] == [128, 128]
kernels.PROGRAMS, kernels.FEW_TOKENS = 128, 2048
assert [kernels._tokens_of_tile(x, T, 4) for T in (1, 512, 2048, 4096, 8192)] == [16, 16, 64, 128, 128]
for tokens, n_out, k, r in [(33, 40, 2, 4), (70, 288, 4, 8), (5, 63, 3, 3), (64, 64, 1, 70)]:
    g, B, y = torch.randn(k, tokens, r), torch.randn(k, r, n_out // k), torch.randn(tokens, n_out)
    exact = y.double() + reference.up(g.double().transpose(0, 1).flatten(1), B.double())
    transposed = y.clone()
    kernels.up(g, B, y)
    assert (y - exact).abs().max() < 1e-5 * exact.abs().max(), (tokens, n_out, k, r)
    kernels.up(g, B.mT.contiguous().mT, transposed)
    assert torch.equal(y, transposed)
for n_in, n_out, k, r in [(40, 60, 2, 4), (63, 99, 3, 3), (160, 96, 4, 8), (64, 70, 1, 70)]:
    A, B = torch.randn(k, n_in // k, r), torch.randn(k, r, n_out // k)
    exact = reference.delta_weight(A.double(), B.double(), 0.5)
    assert (kernels.delta_weight(A, B, 0.5) - exact).abs().max() < 1e-5 * exact.abs().max(), (n_in, n_out, k, r)
for tokens, n_in, n_out, k, r in [(33, 40, 60, 2, 4), (130, 288, 96, 4, 8), (5, 63, 99, 3, 3), (64, 64, 70, 1, 70)]:
    x, dy, wide = torch.randn(tokens, n_in), torch.randn(1, tokens, 1, n_out), torch.randn(tokens, 2 * n_in)
    g, dh, A, dx = torch.randn(k, tokens, r), torch.randn(k, tokens, r), torch.randn(k, n_in // k, r), wide[:, :n_in]
    exact = [
        dx.double() + reference.up(dh.double().transpose(0, 1).flatten(1), A.double().mT),
        torch.einsum("tkc,ktr->kcr", x.double().unflatten(1, (k, -1)), dh.double()),
        torch.einsum("ktr,tkc->krc", g.double(), dy.double().view(tokens, k, -1)),
    ]
    for wanted in [(0, 1, 2), (0,), (1,), (2,), (0, 2), (1, 2)]:
        grads = [wide.clone()[:, :n_in], torch.empty(k, n_in // k, r), torch.empty(k, r, n_out // k)]
        dx, dA, dB = (grad if i in wanted else None for i, grad in enumerate(grads))
        kernels.factor_gradients(x, dy, g, dh, dA, dB, A, dx)
        for i in wanted:
            assert (grads[i] - exact[i]).abs().max() < 1e-5 * exact[i].abs().max(), (tokens, n_in, n_out, k, r, i)
x = torch.rand(40, 1100) + 1
first, again, other = (kernels.dropout(x, 0.25, torch.tensor(seed)) for seed in (5, 5, 6))
assert torch.equal(first, again) and not torch.equal(first == 0, other == 0)
assert torch.allclose(first[first != 0], x[first != 0] / 0.75) and abs((first == 0).double().mean() - 0.25) < 0.01
assert ((first == 0).double().mean(0) < 0.7).all() and ((first == 0).double().mean(1) < 0.35).all()
# whole layers, in the few launches that small ones take on a GPU
small = plans.Architecture("the interpreter", (0, 0), "kernels", dtypes=(torch.float32, torch.float64))
plans.CPU = small
launches = []
for name in ("down", "up", "factor_gradients", "dropout"):
    setattr(kernels, name, lambda *args, f=getattr(kernels, name): (launches.append(f.__name__), f(*args))[1])


def leaves(*tensors):
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def check(x, dy, k, r, h, p):
    n_in, n_out, seed = x.shape[-1], dy.shape[-1], torch.tensor(3) if p else None
    hybrid = (torch.randn(h, n_in), torch.randn(n_out, h)) if h else (None, None)
    weight, bias = torch.randn(n_out, n_in), torch.randn(n_out)
    shapes = [(k, n_in // k, r), (k, r, n_out // k)] if k else [(r, n_in), (n_out, r)]  # k = 0: a plain LoRA
    trained = leaves(x, *map(torch.randn, shapes), *hybrid)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in trained]
    launches.clear()
    y = gralora_linear(trained[0], weight, bias, *trained[1:], 0.5, p, seed)
    kept = dropout(torch.ones(x[..., 0].numel(), n_in), p, seed).view(x.shape) if p else None
    true = reference_linear(exact[0], weight.double(), bias.double(), *exact[1:], 0.5, kept)
    ours = torch.autograd.grad(y, [t for t in trained if t is not None], dy)
    truths = torch.autograd.grad(true, [t for t in exact if t is not None], dy.double())
    for value, truth in zip([y, *ours], [true, *truths], strict=True):
        assert value.shape == truth.shape
        assert (value - truth).abs().max() < 1e-5 * truth.abs().max(), (x.shape, k, h, p)
    assert k or all(grad.is_contiguous() for grad in ours[1:])


for tokens in [(), (7,), (2, 3), (2, 1, 3)]:
    for k, r, h, p in [(2, 4, 0, 0.0), (3, 6, 2, 0.0), (2, 2, 0, 0.5), (0, 5, 0, 0.0), (0, 3, 0, 0.5)]:
        check(torch.randn(*tokens, 6 * max(k, 1)), torch.randn(*tokens, 4 * max(k, 1)), k, r, h, p)
        assert [name for name in launches if name != "dropout"] == ["down", "up", "down", "factor_gradients"], launches
check(torch.randn(7, 24)[:, :12], torch.randn(7, 16)[:, :8], 2, 4, 0, 0.0)  # rows of wider tensors
assert launches == ["down", "up", "down", "factor_gradients"], launches
check(torch.randn(5, 1, 12).transpose(0, 1), torch.randn(1, 8).expand(1, 5, 8), 2, 4, 0, 0.0)
check(torch.randn(1, 5, 12).transpose(0, 1), torch.randn(5, 3, 8)[:, :1], 2, 4, 0, 0.0)  # contiguous, of odd strides
check(torch.randn(12, 7).T, torch.randn(8, 7).T, 2, 4, 0, 0.0)
assert launches == ["down", "up", "down", "factor_gradients"], launches  # without unit stride along a row: copied
# large ones: sub-ranks are kept, or where there are many projected down again, as they are for added adapters
large = plans.CPU = dataclasses.replace(small, large=0)
for r, h, p, downs in [(1, 0, 0.0, 2), (2, 0, 0.0, 3), (2, 1, 0.0, 2), (2, 0, 0.5, 2)]:
    check(torch.randn(2, 3, 64), torch.randn(2, 3, 8), 2, 2 * r, h, p)
    assert [name for name in launches if name != "dropout"] == downs * ["down"] + ["factor_gradients"], launches
    x, A, B, dy = torch.randn(7, 64), torch.randn(2, 32, 2 * r), torch.randn(2, 2 * r, 4), torch.randn(7, 8)
    hybrid = (torch.randn(h, 64), torch.randn(8, h)) if h else (None, None)
    grads = []
    for kept in (0.0, 2.0):  # nothing, or everything
        plans.CPU = dataclasses.replace(large, most_kept=kept)
        trained = leaves(x, A, B, *hybrid)
        torch.manual_seed(0)
        launches.clear()
        y = add_update(torch.zeros(7, 8), *trained, 0.5, p)
        grads.append([y, *torch.autograd.grad(y, [t for t in trained if t is not None], dy)])
        assert launches.count("down") == (2 if kept or h or p else 3), launches
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)), (r, h, p)
    plans.CPU = large
check(torch.randn(2, 3, 64), torch.randn(2, 3, 8), 0, 4, 0, 0.0)
assert launches == ["down", "down", "factor_gradients"], launches
plain, gralora_linear = gralora_linear, lambda *args: checkpoint(plain, *args, use_reentrant=False)
check(torch.randn(2, 3, 64), torch.randn(2, 3, 8), 2, 4, 0, 0.0)  # once in each forward
assert launches == ["down", "down", "down", "factor_gradients"], launches
print("interpreted")
"""


def test_kernels_interpreted():
    """Triton's interpreter runs the portable kernels' code on the CPU: odd sizes, any strides, and whole layers."""
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "interpreted" in run.stdout, run.stderr[-2000:]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-{}x{}-k{}-r{}-h{}".format(*s))
def test_two_runs_on_gpu_give_the_same_bits(shape, dtype):
    tensors = make(shape, dtype, "cuda", bias=True)
    dy = torch.randn(shape[0], shape[2], device="cuda", dtype=dtype)
    first, second = gradients(gralora_linear, tensors, dy), gradients(gralora_linear, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
