"""The fused linear against its definition, in float64, and as torch's own checks see it."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from operators import add_update, gralora_linear, reference_linear, reference_update

from gralora.ops import Factors, batched, compiled, dropout, fused, plans
from gralora.ops.dropout import draw_seed

# k, r, hybrid_r; k = 0 is a plain LoRA, A and B as PEFT has them
GRIDS = [(0, 3, 0), (1, 3, 0), (2, 4, 0), (4, 8, 3), (3, 3, 2), (2, 2, 5)]
grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: "k{}-r{}-h{}".format(*g))
dropouts = pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
sizes = pytest.mark.parametrize("size", ["small", "large"], indirect=True)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every test compiles anew: the others' shapes would count against the limit of recompilations."""
    torch._dynamo.reset()


@pytest.fixture
def size(request, monkeypatch):
    """Layers as they are computed that are small, or large on a GPU without a kernel for them."""
    if request.param == "large":
        monkeypatch.setattr(plans, "CPU", plans.Architecture("a GPU without kernels", (0, 0), "batched", large=0))


def operands(grid, p, tokens=(2, 5), bias=True):
    """Arguments of `gralora_linear`; all float tensors but weight and bias require gradients."""
    k, r, h = grid
    n_in, n_out = 6 * max(k, 1), 4 * max(k, 1)
    generator = torch.Generator().manual_seed(0)

    def draw(*size, grad=True):
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_(grad)

    hybrid = (draw(h, n_in), draw(n_out, h)) if h else (None, None)
    frozen = draw(n_out, n_in, grad=False), draw(n_out, grad=False) if bias else None
    seed = torch.tensor(7) if p else None
    factors = (draw(k, n_in // k, r), draw(k, r, n_out // k)) if k else (draw(r, n_in), draw(n_out, r))
    return [draw(*tokens, n_in), *frozen, *factors, *hybrid, 0.7, p, seed]


def exactly(args):
    """`reference.linear` of the operands, with the mask that dropout draws of their seed."""
    *tensors, p, seed = args
    x = tensors[0]
    kept = None if seed is None else dropout(torch.ones_like(x).flatten(0, -2), p, seed).view_as(x)
    return reference_linear(*tensors, kept)


def trainable(args):
    return [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]


def rebuild(args, leaves):
    """`args` with its trainable tensors replaced, in order, by `leaves`."""
    leaves = iter(leaves)
    return [next(leaves) if isinstance(t, torch.Tensor) and t.requires_grad else t for t in args]


@sizes
@grids
@dropouts
@pytest.mark.parametrize("tokens", [(2, 5), ()], ids=["batch", "vector"])
def test_gradcheck(grid, p, tokens, size):
    """Numerical and analytical gradients agree, the first and the second."""
    args = operands(grid, p, tokens)

    def function(*leaves):
        return gralora_linear(*rebuild(args, leaves))

    assert torch.autograd.gradcheck(function, trainable(args))
    assert torch.autograd.gradgradcheck(function, trainable(args))


@sizes
@grids
@dropouts
@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
def test_equals_the_definition(grid, p, bias, size):
    """Output and all gradients are those of `reference.linear`."""
    args = operands(grid, p, bias=bias)
    ours, exact = gralora_linear(*args), exactly(args)
    dy = torch.randn_like(ours)
    torch.testing.assert_close(ours, exact, atol=1e-12, rtol=0)
    for a, b in zip(
        torch.autograd.grad(ours, trainable(args), dy), torch.autograd.grad(exact, trainable(args), dy), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@grids
@dropouts
def test_added_to_another_result(grid, p):
    """`add_update` on a base's output is the whole layer: value, all gradients, the first and the second."""
    x, weight, _, A, B, hybrid_A, hybrid_B, scaling, *_ = args = operands(grid, p, bias=False)

    def function(*leaves):
        x, _, _, *factors = rebuild(args, leaves)[:7]
        torch.manual_seed(0)
        return add_update(torch.nn.functional.linear(x, weight), x, *factors, scaling, p)

    torch.manual_seed(0)
    exact = exactly([*args[:-1], draw_seed(x) if p else None])
    ours = function(*trainable(args))
    torch.testing.assert_close(ours, exact, atol=1e-12, rtol=0)
    dy = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(y, trainable(args), dy) for y in (ours, exact)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert torch.autograd.gradgradcheck(function, trainable(args))
    with torch.no_grad():
        assert torch.equal(function(*trainable(args)), ours)


@grids
def test_added_to_a_result_of_another_dtype(grid):
    """In bfloat16, added to float32: what autocast makes of base layers that keep the dtype of their input."""
    x, weight, _, *factors, scaling, _, _ = operands(grid, 0.0, bias=False)
    halves = [None if t is None else t.detach().bfloat16().requires_grad_() for t in (x, *factors)]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in halves]
    y = add_update(torch.ones(2, 5, weight.shape[0]), *halves, scaling)
    exact = 1 + reference_update(*wide, scaling)
    assert y.dtype == torch.float32
    dy = torch.randn(2, 5, weight.shape[0])
    values = [y, *torch.autograd.grad(y, trainable(halves), dy)]
    truths = [exact, *torch.autograd.grad(exact, trainable(wide), dy.double())]
    for value, truth in zip(values, truths, strict=True):
        assert (value.double() - truth).norm() <= 0.01 * truth.norm()


@sizes
@grids
def test_float32_factors(grid, size):
    """Computed with in bfloat16, the dtype of x, as those that are bfloat16; their gradients are float32."""
    x, weight, bias, *factors, scaling, _, _ = operands(grid, 0.0)
    x, weight, bias = (t.detach().bfloat16() for t in (x, weight, bias))
    dy = torch.randn(2, 5, len(weight)).bfloat16()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [None if t is None else t.detach().bfloat16().to(dtype).requires_grad_() for t in factors]
        inputs = [x.clone().requires_grad_(), *leaves]
        y = gralora_linear(inputs[0], weight, bias, *leaves, scaling)
        grads = torch.autograd.grad(y, trainable(inputs), dy)
        assert y.dtype == torch.bfloat16 and [t.dtype for t in grads] == [t.dtype for t in trainable(inputs)]
        results.append([y, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.bfloat16(), b)


@sizes
@dropouts
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_any_subset_of_gradients(p, compiles, size):
    """With only some inputs trainable, their gradients are the same as with all."""
    args = operands((2, 4, 3), p)
    function = torch.compile(gralora_linear, fullgraph=True, backend="aot_eager") if compiles else gralora_linear
    places = [i for i, t in enumerate(args) if isinstance(t, torch.Tensor) and t.requires_grad]
    dy = torch.ones(2, 5, 8, dtype=torch.float64)
    exact = dict(zip(places, torch.autograd.grad(exactly(args), trainable(args), dy), strict=True))
    for chosen in itertools.chain(itertools.combinations(places, 1), itertools.combinations(places, 2)):
        torch._dynamo.reset()
        some = [t.detach().requires_grad_(i in chosen) if i in places else t for i, t in enumerate(args)]
        grads = torch.autograd.grad(function(*some), trainable(some), dy)
        for place, grad in zip(chosen, grads, strict=True):
            torch.testing.assert_close(grad, exact[place], atol=1e-12, rtol=0)


@grids
@dropouts
def test_custom_op(grid, p):
    """torch's checks of a custom op: schema, fake tensors, autograd registration, AOT dispatch with dynamic shapes."""
    torch.library.opcheck(compiled.linear, tuple(operands(grid, p)))
    x, weight, bias, *factors, scaling, p, seed = operands(grid, p)
    with torch.no_grad():
        packed = fused.pack(Factors(*factors, scaling))
        g, B = fused.linear_down(x.flatten(0, -2), packed, p, seed, plans.TORCH)
    inputs = x.detach(), weight, bias, g, B.detach()
    torch.library.opcheck(compiled.adapted, inputs, test_utils=("test_schema", "test_faketensor"))


@grids
@dropouts
def test_compiled_without_graph_breaks(grid, p):
    """torch.compile(fullgraph=True) gives the same output and gradients."""
    function = torch.compile(gralora_linear, fullgraph=True, backend="aot_eager")
    for tokens in [(2, 5), (3, 4)]:
        args = operands(grid, p, tokens)
        ours, eager = function(*args), gralora_linear(*args)
        assert torch.equal(ours, eager)
        dy = torch.randn_like(ours)
        for a, b in zip(*(torch.autograd.grad(y, trainable(args), dy) for y in (ours, eager)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("p", [0.25, 1.0])
def test_dropout_follows_its_seed(p):
    """As many zeros as asked for, the rest scaled; the seed decides which, and torch's generator decides the seed."""
    x = torch.rand(200, 300) + 1
    seeds = torch.tensor(1), torch.tensor(1), torch.tensor(2)
    first, again, other = (dropout(x, p, seed) for seed in seeds)
    assert abs((first == 0).double().mean() - p) < 0.01 and torch.equal(first, again)
    if p < 1:
        assert not torch.equal(first, other)
        torch.testing.assert_close(first[first != 0], x[first != 0] / (1 - p))
    args = operands((2, 4, 3), p)[:-1]
    torch.manual_seed(0)
    one, two = gralora_linear(*args), gralora_linear(*args)
    torch.manual_seed(0)
    assert torch.equal(gralora_linear(*args), one)
    assert p == 1 or not torch.equal(one, two)


def test_dropout_keeps_no_mask():
    """Between forward and backward only the seed is stored beside what is stored without dropout."""

    def stored(p):
        elements = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: elements.append(t.numel()) or t, lambda t: t):
            gralora_linear(*operands((2, 4, 3), p))
        return sum(elements)

    assert stored(0.3) == stored(0.0) + 1


@sizes
def test_strided_inputs(size):
    """Inputs, weights and incoming gradients of any strides give the result of their contiguous copies."""
    args = operands((2, 4, 3), 0.0)
    x, weight, *rest = args
    wide = torch.randn(5, 2, 24, dtype=torch.float64)[..., ::2].transpose(0, 1).requires_grad_()
    ours = gralora_linear(wide, weight.t().contiguous().t(), *rest)
    exact = gralora_linear(wide.contiguous(), weight, *rest)
    assert not wide.is_contiguous() and torch.allclose(ours, exact, atol=1e-12)
    dy = torch.randn(8, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    for a, b in zip(*(torch.autograd.grad(y, [wide, *trainable(rest)], dy) for y in (ours, exact)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", ["large"], indirect=True)
def test_output_may_be_changed_in_place(size):
    """As that of nn.Linear: it is no view, and its gradients are those of the changed result."""
    for bias in (False, True):
        args = operands((2, 4, 3), 0.0, bias=bias)
        y = gralora_linear(*args)
        assert not y._is_view() and y.is_contiguous()
        changed = torch.autograd.grad(y.mul_(2).sum(), trainable(args))
        for a, b in zip(changed, torch.autograd.grad((2 * exactly(args)).sum(), trainable(args)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", ["large"], indirect=True)
def test_checkpointing_spares_the_last_product(size, monkeypatch):
    """Computing a block anew ends with what its last layer saves, before that layer's product with W."""
    first, second = operands((2, 4, 3), 0.3), operands((2, 2, 0), 0.0)
    second[1] = torch.randn(20, 8, dtype=torch.float64)
    second[2:5] = None, torch.randn(2, 4, 2, dtype=torch.float64), torch.randn(2, 2, 10, dtype=torch.float64)
    products = []
    write = batched.linear
    monkeypatch.setattr(
        batched,
        "linear",
        lambda y, x, weight, *rest: (products.append(weight.shape), write(y, x, weight, *rest))[1],
    )

    def block(x):
        return gralora_linear(torch.tanh(gralora_linear(x, *first[1:])), *second[1:])

    exact = torch.autograd.grad(block(first[0]).sum(), trainable(first))
    products.clear()
    y = torch.utils.checkpoint.checkpoint(block, first[0], use_reentrant=False)
    assert products == [(8, 12), (20, 8)]
    products.clear()
    for a, b in zip(torch.autograd.grad(y.sum(), trainable(first)), exact, strict=True):
        assert torch.equal(a, b)
    assert products == [(8, 12), (8, 20)], "the first layer's again, then the gradient of the second layer's input"


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_unknown_choice_of_kernels_is_refused():
    """GRALORA_KERNELS with another value is an error that lists the values."""
    result = run("import gralora", GRALORA_KERNELS="fastest")
    assert result.returncode != 0 and "GRALORA_KERNELS='fastest'" in result.stderr and "reference" in result.stderr


def test_choice_is_visible_and_import_starts_nothing():
    """`describe` names what runs; importing gralora neither imports Triton nor starts CUDA."""
    code = "import sys, gralora, torch; from gralora.ops import plans; print(plans.describe('cpu')); "
    code += "assert 'triton' not in sys.modules and not torch.cuda.is_initialized()"
    assert run(code, GRALORA_KERNELS="auto").stdout.strip() == "fused torch"
    assert run(code, GRALORA_KERNELS="reference").stdout.strip() == "reference"
    assert plans.describe("cpu") in ("fused torch", "reference")
    code = "from gralora.ops import plans; print(plans.describe('cuda'))"
    assert run(code, GRALORA_KERNELS="torch").stdout.strip() == "fused torch"


OF_TURING = "torch.cuda.get_device_capability = lambda _: (7, 5); torch.cuda.get_device_name = lambda _: 'Tesla T4'"


@pytest.mark.parametrize(
    "made, reason",
    [
        ("sys.modules['triton'] = None", "triton"),
        ("torch.version.hip = '6.4'", "the kernels are for NVIDIA's GPUs"),
        (OF_TURING, "8.0 and later, and this is a Tesla T4"),
    ],
    ids=["no Triton", "ROCm", "Turing"],
)
def test_without_kernels_torch_computes(made, reason):
    """Unless kernels are asked for: then the reason why there are none is told."""
    code = f"import sys, torch; {made}; from gralora.ops import plans; "
    chosen = run(code + "print(plans.describe('cuda'), repr(plans.architecture(0).product))", GRALORA_KERNELS="auto")
    assert chosen.stdout.strip() == "fused torch ''", chosen.stderr
    refused = run(code + "plans.describe('cuda')", GRALORA_KERNELS="triton")
    assert "ImportError: GRALORA_KERNELS=triton: " in refused.stderr and reason in refused.stderr
