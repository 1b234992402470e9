"""An adapted linear layer as torch.compile sees it: operators with the functions of `fused` as bodies.

Those here are opaque: the compiler calls them, which costs the host more than the kernels of a small layer. What
`traced.linear` does it sees, fuses and launches itself; the products of large layers it could not.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.library import custom_op

from . import dispatch, fused


def operators(name: str, define: Any, body: Callable[..., Any], gradients_body: Callable[..., Any]) -> Any:
    """An operator `gralora::name` of `gralora_linear`'s arguments that returns y and g, and the one of its gradients.

    Args:
        name: of the operator.
        define: `torch.library.custom_op`, or `triton_op`, whose bodies are traced.
        body, gradients_body: with the signatures of `fused.forward` and `gradients`.
    """
    forward = define(f"gralora::{name}", mutates_args=())(body)
    backward = define(f"gralora::{name}_backward", mutates_args=())(gradients_body)
    forward.register_fake(_forward_fake)
    backward.register_fake(_gradients_fake)

    def differentiated(ctx, dy, _):
        x, weight, A, B, hybrid_A, hybrid_B, g, seed = ctx.saved_tensors
        needs_x, _, _, *needs_factors = ctx.needs_input_grad[:7]
        needs = list(fused.needs_of(needs_x, *needs_factors))
        grads = iter(backward(dy, x, weight, A, B, hybrid_A, hybrid_B, g, ctx.scaling, ctx.p, seed, needs))
        wanted = _wanted(x, A, B, hybrid_A, hybrid_B, needs)
        dx, *d_factors = [None if t is None else next(grads) for t in wanted]
        return dx, None, None, *d_factors, None, None, None

    forward.register_autograd(differentiated, setup_context=_setup_context)
    return forward, backward


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    hybrid_A: Tensor | None,
    hybrid_B: Tensor | None,
    g: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that `needs` asks for, without the None entries: an operator can return no None."""
    grads = fused.backward(dy, x, weight, A, B, hybrid_A, hybrid_B, g, scaling, p, seed, needs)
    return [grad.contiguous() for grad in grads if grad is not None]


def _wanted(x, A, B, hybrid_A, hybrid_B, needs):
    """What the entries of `fused.backward`'s result are gradients of; None where there is none."""
    needs_x, needs_A, needs_B = needs
    inputs = x, A, B, hybrid_A, hybrid_B
    needed = needs_x, needs_A, needs_B, needs_A, needs_B
    return [t if need else None for t, need in zip(inputs, needed, strict=True)]


def _forward_fake(x, weight, bias, A, B, hybrid_A, hybrid_B, scaling, p, seed):
    R = A.shape[2] + (0 if hybrid_A is None else hybrid_A.shape[0])
    T = x.numel() // x.shape[-1]
    return fused.output(x, weight), x.new_empty(A.shape[0], T, R)


def _gradients_fake(dy, x, weight, A, B, hybrid_A, hybrid_B, g, scaling, p, seed, needs):
    wanted = _wanted(x, A, B, hybrid_A, hybrid_B, needs)
    return [t.new_empty(t.shape) for t in wanted if t is not None]


def _setup_context(ctx, inputs, output):
    x, weight, _, A, B, hybrid_A, hybrid_B, scaling, p, seed = inputs
    g = output[1]
    if dispatch.is_called(x, weight, p) and dispatch.projects_again(x, g, hybrid_A, p):
        g = None
    ctx.save_for_backward(x, weight, A, B, hybrid_A, hybrid_B, g, seed)
    ctx.scaling, ctx.p = scaling, p


linear, linear_backward = operators("linear", custom_op, fused.forward, gradients)
adapted = custom_op("gralora::adapted", fused.adapted, mutates_args=())
adapted.register_fake(lambda x, weight, bias, g, B: fused.output(x, weight))
