"""An adapted linear layer as torch.compile sees it: operators with the functions of `fused` as bodies.

Those here are opaque: the compiler calls them, which costs the host more than the kernels of a small layer do.
`traced.linear` has bodies that the compiler traces, fuses and launches itself; it could not do so with the products of
large layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import fused, plans
from .fused import Needs
from .interface import KernelUnavailable
from .reference import Factors
from .torch_seam import is_exporting


def form_of(x: Tensor, weight: Tensor, p: float) -> str:
    """What form an adapted layer has in the graph of torch.compile.

    How many tokens x has does not matter, so that graphs for any number can be compiled.

    Args:
        x: its input, `[..., I]`.
        weight: `[O, I]`.
        p: probability of dropout.

    Returns:
        "kernels": an operator whose kernels the compiler sees and launches itself, except where `is_called`.
        "operator": one that it calls, of torch's kernels.
        "operations": those of the definition, which it fuses; `torch.export` can save these.
    """
    if x.dtype in plans.HALF and not is_exporting() and _compiler_has_kernels(x.is_cuda, x.device.index, x.dtype):
        return "kernels"
    return "operator" if is_called(x, weight, p) else "operations"


def is_called(x: Tensor, weight: Tensor, p: float) -> bool:
    """Whether the compiler calls an operator where it could fuse or launch; arguments as in `form_of`.

    That saves more time than the call takes; with dropout it saves memory, since the mask is drawn again.
    """
    return p > 0 or max(weight.shape) >= _called_features(x.is_cuda, x.device.index)


@torch.compiler.assume_constant_result  # it could not be traced: it imports, and launches
def _compiler_has_kernels(is_cuda: bool, device: int, dtype: torch.dtype) -> bool:
    """Whether torch.compile is to see kernels: they are there, and a GPU has run them.

    The compiler compiles a graph's kernels itself, after it has made the graph. One that fails there fails the step.
    """
    if is_cuda:
        _try_kernels(device, dtype)
    return (plans.architecture(device) if is_cuda else plans.CPU).kernels != "batched"


@functools.cache
def _try_kernels(device: int, dtype: torch.dtype) -> None:
    """Launch what a compiled layer's graph launches, with the widest tiles; give it up if that cannot be compiled."""
    if plans.architecture(device).kernels == "batched":
        return
    n, gpu = 128, torch.device("cuda", device)
    x, factor = torch.zeros(1, n, dtype=dtype, device=gpu), torch.zeros(1, n, n, dtype=dtype, device=gpu)
    kernels = plans.kernels_for(x)
    try:
        g = kernels.down(x, factor, 0, 1.0)
        kernels.up(g, factor, x)
        kernels.factor_gradients(x, x, g, g, factor, factor, factor, x)
    except KernelUnavailable as error:
        plans.give_up(error)


@torch.compiler.assume_constant_result
def _called_features(is_cuda: bool, device: int) -> float:
    return (plans.architecture(device) if is_cuda else plans.CPU).called_features


def linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    hybrid_A: Tensor | None,
    hybrid_B: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`fused.linear` with the factors one by one, as an operator takes them."""
    return fused.linear(x, weight, bias, Factors(A, B, hybrid_A, hybrid_B, scaling), p, seed)


def linear_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    hybrid_A: Tensor | None,
    hybrid_B: Tensor | None,
    scaling: float,
    g: Tensor | None,
    p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """`fused.gradients` without the None entries: an operator can return no None."""
    factors = Factors(A, B, hybrid_A, hybrid_B, scaling)
    grads = fused.gradients(dy, x, weight, factors, g, p, seed, Needs(*needs))
    return [grad.contiguous() for grad in grads if grad is not None]


def operators(name: str, define: Any, body: Callable[..., Any], backward_body: Callable[..., Any]) -> Any:
    """Define an operator `gralora::name` that returns y and g, and the operator of its gradients.

    Args:
        name: of the operator.
        define: `torch.library.custom_op`, or `triton_op`, whose bodies are traced.
        body, backward_body: with the signatures of `linear_op` and `linear_backward_op`.
    """
    forward = define(f"gralora::{name}", mutates_args=())(body)
    backward = define(f"gralora::{name}_backward", mutates_args=())(backward_body)
    forward.register_fake(linear_fake)
    backward.register_fake(linear_backward_fake)

    def differentiated(ctx: Any, dy: Tensor, _: Any) -> Any:
        x, weight, A, B, hybrid_A, hybrid_B, g, seed = ctx.saved_tensors
        needs_x, _, _, *needs_factors = ctx.needs_input_grad[:7]
        needs = list(Needs.of(needs_x, *needs_factors))
        grads = iter(backward(dy, x, weight, A, B, hybrid_A, hybrid_B, ctx.scaling, g, ctx.p, seed, needs))
        wanted = needing(x, A, B, hybrid_A, hybrid_B, needs)
        dx, *d_factors = [None if t is None else next(grads) for t in wanted]
        return dx, None, None, *d_factors, None, None, None

    forward.register_autograd(differentiated, setup_context=_setup_context)
    return forward, backward


def needing(x: Tensor, A: Tensor, B: Tensor, hybrid_A: Any, hybrid_B: Any, needs: Any) -> list[Tensor | None]:
    """What the entries of `fused.gradients`' result are gradients of; None where there is none."""
    needs_x, needs_A, needs_B = needs
    inputs = x, A, B, hybrid_A, hybrid_B
    needed = needs_x, needs_A, needs_B, needs_A, needs_B
    return [t if need else None for t, need in zip(inputs, needed, strict=True)]


def linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    A: Tensor,
    B: Tensor,
    hybrid_A: Any,
    hybrid_B: Any,
    scaling: float,
    p: float,
    seed: Any,
) -> tuple[Tensor, Tensor]:
    k, _, r = Factors(A, B).as_grid().A.shape
    R = r + (0 if hybrid_A is None else hybrid_A.shape[0])
    T = x.numel() // x.shape[-1]
    return fused.output(x, weight), x.new_empty(k, T, R)


def linear_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    hybrid_A: Any,
    hybrid_B: Any,
    scaling: float,
    g: Any,
    p: float,
    seed: Any,
    needs: list[bool],
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in needing(x, A, B, hybrid_A, hybrid_B, needs) if t is not None]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, *factors, scaling, p, seed = inputs
    g = output[1]
    k, _, R = g.shape
    keeps_g = not is_called(x, weight, p) or plans.keeps_g(x, k * R, factors[2] is not None, p > 0)
    ctx.save_for_backward(x, weight, *factors, g if keeps_g else None, seed)
    ctx.scaling, ctx.p = scaling, p


def adapted_op(x: Tensor, weight: Tensor, bias: Tensor | None, g: Tensor, B: Tensor) -> Tensor:
    """`fused.linear_up` with a plan of its own: x W^T + bias + up(g, B); B of any float dtype."""
    return fused.adapted(x, weight, bias, g, B)


linear, linear_backward = operators("linear", custom_op, linear_op, linear_backward_op)
adapted = custom_op("gralora::adapted", adapted_op, mutates_args=())
adapted.register_fake(lambda x, weight, bias, g, B: fused.output(x, weight))
