"""What an adapted layer becomes in torch.compile's graphs for a GPU, without one; `test_kernels.py` runs them."""

import functools
import warnings

import peft
import pytest
import torch
from operators import gralora_linear
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import gralora
from gralora.ops import batched, compiled, plans
from gralora.ops.interface import KernelUnavailable

BF16, FP32 = torch.bfloat16, torch.float32


class Target:
    """What Triton and torch ask of a GPU's driver while they trace."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return 0


@pytest.fixture
def nothing_cached(monkeypatch):
    """Neither graphs nor which GPU has kernels is known from before, or after; any may have them."""
    monkeypatch.setattr(plans, "choice", "auto")
    torch._dynamo.reset()
    plans.architecture.cache_clear()
    yield
    torch._dynamo.reset()
    plans.architecture.cache_clear()


@pytest.fixture
def as_on_gpu(monkeypatch, nothing_cached):
    """Tensors on the CPU are taken for a GPU's."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(plans, "CPU", plans.Architecture("a GPU", (8, 0), "kernels"))
    monkeypatch.setattr(triton.runtime.driver, "_active", Target())


def operands(tokens, k, r, h=0, n_in=64, n_out=32, dtype=BF16):
    def factor(*size):
        return torch.randn(*size, dtype=dtype, requires_grad=True)

    x = torch.randn(2, tokens // 2, n_in, dtype=BF16, requires_grad=True)
    grid = factor(k, n_in // k, r), factor(k, r, n_out // k)
    hybrid = (factor(h, n_in), factor(n_out, h)) if h else (None, None)
    return x, torch.randn(n_out, n_in, dtype=BF16), torch.randn(n_out, dtype=BF16), *grid, *hybrid, 2.0


def graphs_of(function, *args):
    """The names of what forward and backward call, nothing of which is run; CUDA graphs could record all of it."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    graphs = []

    def compile_nothing(graph, inputs):
        assert get_first_incompatible_cudagraph_node(graph) is None  # such as one that waits for the GPU
        calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append([getattr(target, "__name__", str(target)) for target in calls])
        results = [t.meta["val"] if isinstance(t, torch.fx.Node) else t for t in graph.graph.output_node().args[0]]
        return make_boxed_func(
            lambda *args: [None if t is None else torch.zeros(t.shape, dtype=t.dtype) for t in results]
        )

    backend = aot_autograd(fw_compiler=compile_nothing, partition_fn=min_cut_rematerialization_partition)
    y = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args)
    if y.requires_grad:
        y.sum().backward()
    return graphs


def launches(graph):
    """Products and kernels of a graph, in order."""
    names = [name.removesuffix(".default") for name in graph]
    return [name.removesuffix("_wrapper_functional") for name in names if name in PRODUCTS or "triton" in name]


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "adapted", "linear_backward")


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_small_layer_is_products_and_kernels(as_on_gpu, dtype):
    """One product and two kernels a pass; factors of float32 are converted in the kernels."""
    forward, backward = graphs_of(gralora_linear, *operands(8, 2, 8, dtype=dtype))
    assert launches(forward) == ["triton_kernel", "addmm", "triton_kernel"]
    assert launches(backward) == ["triton_kernel", "mm", "triton_kernel"]
    assert not any("gralora" in name or "_to_copy" in name for name in forward + backward)


@pytest.mark.parametrize("case", ["bf16", "fp32-autocast", "conv1d", "prepared-for-hotswap", "inference"])
def test_layer_of_a_model_is_products_and_kernels(as_on_gpu, case):
    """Through PEFT's modules, too: nothing else is launched for the adapter, but a conversion of what is float32."""
    base = Conv1D(32, 64) if case == "conv1d" else nn.Linear(64, 32)
    config = gralora.LoraConfig(
        r=8, use_gralora=True, gralora_k=2, target_modules=["0"], fan_in_fan_out=case == "conv1d"
    )
    autocast = case == "fp32-autocast"
    model = peft.get_peft_model(nn.Sequential(base).to(BF16), config, autocast_adapter_dtype=autocast)
    if case == "prepared-for-hotswap":
        peft.utils.hotswap.prepare_model_for_compiled_hotswap(model)
    x = torch.randn(2, 4, 64, dtype=FP32 if autocast else BF16, requires_grad=True)

    def function(x):
        with torch.autocast("cpu", BF16, enabled=autocast):
            return model(x)

    with torch.set_grad_enabled(case != "inference"):
        forward, *backward = graphs_of(function, x)
    assert launches(forward) == ["triton_kernel", "addmm", "triton_kernel"]
    assert [launches(graph) for graph in backward] == [["triton_kernel", "mm", "triton_kernel"]] * (
        case != "inference"
    )


def test_many_tokens_leave_gradients_to_products(as_on_gpu):
    """As in eager mode: the kernel for the factors' gradients is one for few tokens."""
    forward, backward = graphs_of(gralora_linear, *operands(2 * plans.CPU.few_tokens, 2, 8))
    assert launches(forward) == ["triton_kernel", "addmm", "triton_kernel"]
    assert launches(backward) == ["triton_kernel", "mm", "triton_kernel", "bmm", "bmm"]


def test_hybrid_layer_is_products_and_kernels(as_on_gpu):
    forward, backward = graphs_of(gralora_linear, *operands(8, 2, 8, h=3))
    assert launches(forward) == ["triton_kernel", "mm", "addmm", "triton_kernel"]
    assert launches(backward) == ["triton_kernel", "mm", "mm", "triton_kernel"]


def test_input_without_gradient_takes_no_product(as_on_gpu):
    x, *others = operands(8, 2, 8)
    forward, backward = graphs_of(gralora_linear, x.detach(), *others)
    assert launches(backward) == ["triton_kernel", "triton_kernel"]


def test_checkpointed_layers_are_computed_anew(as_on_gpu):
    """Both in the backward's graph, but the last one's output, which nothing there needs."""

    def block(x, *others):
        return gralora_linear(gralora_linear(x, *others).relu(), *others)

    args = operands(8, 2, 8, n_out=64)
    forward, backward = graphs_of(lambda *args: checkpoint(block, *args, use_reentrant=False), *args)
    assert launches(forward) == 2 * ["triton_kernel", "addmm", "triton_kernel"]
    anew, gradients = ["addmm"] + 3 * ["triton_kernel"], 2 * (["mm"] + 2 * ["triton_kernel"])
    assert sorted(launches(backward)) == sorted(anew + gradients)


@pytest.mark.parametrize("h, factors", [(0, BF16), (0, FP32), (3, BF16)], ids=["bf16", "fp32", "hybrid"])
def test_large_layer_is_projection_and_product(as_on_gpu, monkeypatch, h, factors):
    """What its backward needs, the projection, is all that is computed anew of a checkpointed block's last layer."""
    monkeypatch.setattr(compiled, "is_called", lambda x, weight, p: True)
    args = operands(8, 2, 8, h=h, n_out=64, dtype=factors)
    project = ["triton_kernel"] + ["mm"] * (h > 0)
    forward, backward = graphs_of(gralora_linear, *args)
    assert launches(forward) == [*project, "adapted"]
    assert launches(backward) == ["linear_backward"]

    def block(x, *others):
        return gralora_linear(gralora_linear(x, *others).relu(), *others)

    forward, backward = graphs_of(lambda *args: checkpoint(block, *args, use_reentrant=False), *args)
    assert launches(forward) == 2 * [*project, "adapted"]
    assert sorted(launches(backward)) == sorted([*project, *project, "adapted", "linear_backward", "linear_backward"])


@pytest.mark.parametrize(
    "r, h, p, checkpointed, is_kept",
    [(2, 0, 0.0, False, True), (4, 0, 0.0, False, False), (4, 1, 0.0, False, True), (4, 0, 0.5, False, True)]
    + [(4, 0, 0.0, True, True)],
    ids=["few", "many", "hybrid", "dropout", "checkpointed"],
)
def test_many_sub_ranks_are_not_kept(as_on_gpu, monkeypatch, r, h, p, checkpointed, is_kept):
    """The backward of a large layer gets none, but where its graph, of a checkpointed block, projects down anyway."""
    monkeypatch.setattr(compiled, "is_called", lambda x, weight, p: True)
    given = []
    backward = compiled.linear_backward_op

    def see(*args):
        given.append(args[8] is not None)
        return backward(*args)

    monkeypatch.setattr(compiled, "linear_backward", see)
    args = *operands(8, 2, r, h=h), p
    function = gralora_linear
    if checkpointed:
        function = functools.partial(checkpoint, gralora_linear, use_reentrant=False)
    graphs_of(function, *args)
    assert given and set(given) == {is_kept}


def test_dropout_keeps_seed_and_no_mask(as_on_gpu):
    """The backward's operator draws the mask again, also where dropout is traced in the forward."""
    args = *operands(8, 2, 8), 0.5
    forward, backward = graphs_of(gralora_linear, *args)
    assert launches(forward) == ["triton_kernel", "triton_kernel", "adapted"]
    assert launches(backward) == ["linear_backward"]


def test_exported_layer_needs_no_kernels(as_on_gpu):
    """torch.export cannot save Triton kernels."""

    class Layer(torch.nn.Module):
        def forward(self, *args):
            return gralora_linear(*args, 2.0)

    for strict in (True, False):
        graph = torch.export.export(Layer(), operands(8, 2, 8)[:-1], strict=strict).graph
        assert "traced" not in str(graph) and "triton" not in str(graph)


def test_the_gpu_of_a_tensor_decides(monkeypatch, nothing_cached):
    """Of two in one machine, the compiler sees kernels on the one that multiplies on tensor cores."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(7, 5), (8, 6)][device])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "of Turing")
    monkeypatch.setattr(compiled, "_try_kernels", lambda device, dtype: None)
    calls = []

    def see(graph, inputs):
        calls.append(next(str(node.target) for node in graph.graph.nodes if "gralora" in str(node.target)))
        return graph.forward

    for device in ("cuda:0", "cuda:1"):
        torch._dynamo.reset()
        with FakeTensorMode():
            args = [t if t is None else torch.empty_like(t, device=device) for t in operands(8, 2, 8)[:-1]]
            torch.compile(gralora_linear, backend=see, fullgraph=True)(*args, 2.0)
    assert calls[0] == "gralora.linear.default" and calls[1].startswith("gralora.linear_traced")


@pytest.mark.parametrize(
    "expected, is_cuda, dtype, features, p, triton",
    [
        ("kernels", True, BF16, 1536, 0.0, True),
        ("kernels", True, BF16, 2048, 0.0, True),
        ("kernels", True, BF16, 1536, 0.1, True),
        ("operator", True, BF16, 2048, 0.0, False),
        ("operator", True, FP32, 2048, 0.0, True),
        ("operator", True, FP32, 1536, 0.1, True),
        ("operations", True, FP32, 1536, 0.0, True),
        ("operations", True, BF16, 1536, 0.0, False),
        ("operations", False, BF16, 2048, 0.0, True),
        ("operator", False, FP32, 64, 0.1, True),
    ],
)
def test_what_a_layer_is_form_of(monkeypatch, expected, is_cuda, dtype, features, p, triton):
    class X:
        device = torch.device("cuda", 0)

    X.is_cuda, X.dtype = is_cuda, dtype
    row = plans.Architecture("a GPU", (8, 0), "kernels" if triton else "batched")
    monkeypatch.setattr(plans, "architecture", lambda device: row)
    monkeypatch.setattr(compiled, "_try_kernels", lambda device, dtype: None)
    for weight in (torch.empty(features, 64), torch.empty(64, features)):
        assert compiled.form_of(X, weight, p) == expected


class BrokenKernels:
    """Kernels of which one cannot be compiled."""

    def __init__(self, broken):
        self.broken = broken

    def __getattr__(self, name):
        if name == self.broken:
            raise KernelUnavailable(f"_{name}_kernel cannot run with Triton 9.9: no such name", "kernels")
        return getattr(batched, name)


@pytest.fixture
def gpu_without_memory(monkeypatch, nothing_cached):
    """A GPU whose tensors lie on the CPU."""
    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: zeros(*size, **options))
    monkeypatch.setattr(plans, "_failed", set())
    compiled._try_kernels.cache_clear()
    yield
    compiled._try_kernels.cache_clear()


@pytest.mark.parametrize("broken", ["down", "up", "factor_gradients"])
def test_kernel_that_the_compiler_could_not_compile_is_not_traced(gpu_without_memory, monkeypatch, broken):
    """It is tried before the graph is made: one warning, and a graph without it, instead of an error in the step."""
    pytest.importorskip("triton")
    monkeypatch.setattr(plans, "kernels_for", lambda x: BrokenKernels(broken))
    seen = []

    def see(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if "gralora" in str(node.target))
        return graph.forward

    with warnings.catch_warnings(record=True) as warned, FakeTensorMode():
        warnings.simplefilter("always")
        args = [t if t is None else torch.empty_like(t, device="cuda:0") for t in operands(8, 2, 8)[:-1]]
        for _ in range(2):
            torch._dynamo.reset()
            torch.compile(gralora_linear, backend=see, fullgraph=True)(*args, 2.0)
    assert seen == 2 * ["gralora.linear.default"]
    messages = [str(w.message) for w in warned if "Triton 9.9" in str(w.message)]
    assert messages == [
        f"_{broken}_kernel cannot run with Triton 9.9: no such name. From now on torch computes instead, more slowly."
    ]


def test_kernels_that_compile_are_traced(gpu_without_memory, monkeypatch):
    """Tried once for a GPU and a dtype, not for every layer."""
    pytest.importorskip("triton")
    tried = []

    class Kernels:
        def __getattr__(self, name):
            tried.append(name)
            return getattr(batched, name)

    monkeypatch.setattr(plans, "kernels_for", lambda x: Kernels())
    for _ in range(2):
        assert compiled._compiler_has_kernels(True, 0, BF16)
    assert tried == ["down", "up", "factor_gradients"]
