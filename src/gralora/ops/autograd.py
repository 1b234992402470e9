"""The autograd functions of eager mode, where the dispatch of a custom operator would cost more."""

from typing import Any

import torch
from torch import Tensor

from . import batched, fused, plans, reference
from .dropout import dropout_mask
from .fused import Needs
from .interface import KernelUnavailable
from .layout import contiguous_or_rows
from .reference import Factors
from .saved import save, saved
from .torch_seam import is_batched
from .weights import Weight, dense

Grads = list[Tensor | None]


def linear(x: Tensor, weight: Weight, bias: Tensor | None, factors: Factors, p: float, seed: Tensor | None) -> Tensor:
    """`fused.linear`, differentiable in x and the factors."""
    *tensors, scaling = factors
    y, product = GraloraLinearFunction.apply(x, *tensors, (weight, bias, scaling, p, seed))
    if product is not None:
        how, seen, g, B = product
        try:
            how.forward.linear(y, seen, how.operand(weight, x.dtype), bias, g, B)
        except KernelUnavailable as error:
            plans.give_up(error)
            batched.linear(y, seen, dense(weight, x.dtype), bias, g, B)
    return y


class GraloraLinearFunction(torch.autograd.Function):
    """Compute what the backward needs, and y, or memory for y and what is still to be called to fill it.

    A product that takes the adapter's output in is called after the function has returned: gradient checkpointing
    computes a block again until its last tensor is saved, and so never comes to the product of the block's last layer.
    What has no gradient is one argument, since each costs the host.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, hybrid_A: Any, hybrid_B: Any, others: Any) -> Any:
        weight, bias, scaling, p, seed = others
        factors = Factors(A, B, hybrid_A, hybrid_B, scaling)
        seen = contiguous_or_rows(x)
        how, g, B_up, y = _begin(x, seen, weight, bias, factors, p, seed)
        product = None
        if y is None:
            y, product = fused.output(x, weight), (how, seen, g, B_up)
        ctx.packed, weight = (None, weight) if isinstance(weight, Tensor) else (weight, None)
        save(ctx, x, weight, A, B, hybrid_A, hybrid_B, g if how.keeps_g else None, seed)
        ctx.scaling, ctx.p, ctx.how = scaling, p, how
        return y, product

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> Any:
        x, weight, A, B, hybrid_A, hybrid_B, g, seed = saved(ctx)
        factors = Factors(A, B, hybrid_A, hybrid_B, ctx.scaling)
        weight = ctx.packed if weight is None else weight
        return *_backward(ctx, dy, x, weight, factors, g, seed), None


@plans.falls_back
def _begin(
    x: Tensor, seen: Tensor, weight: Weight, bias: Tensor | None, factors: Factors, p: float, seed: Tensor | None
) -> Any:
    """Plan and project down: the plan, g, B, and y if no product of ours computes it."""
    packed = fused.pack(factors)
    how = plans.plan(seen, weight, packed.A, packed.B, packed.h, p)
    g, B = fused.linear_down(seen, packed, p, seed, how)
    y = fused.linear_up(x, seen, weight, bias, g, B, how) if how.forward is None else None
    return how, g, B, y


def add_update(y: Tensor, x: Tensor, factors: Factors, p: float, seed: Tensor | None) -> Tensor:
    """`fused.add_update`, differentiable in y, x and the factors."""
    *tensors, scaling = factors
    return GraloraUpdateFunction.apply(y, x, *tensors, (scaling, p, seed))


class GraloraUpdateFunction(torch.autograd.Function):
    """Add the adapter's output to y in place; the gradient of y is that of the result."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, hybrid_A: Any, hybrid_B: Any, others: Any
    ) -> Any:
        scaling, p, seed = others
        ctx.mark_dirty(y)
        g, how = fused.add_update(y, x, Factors(A, B, hybrid_A, hybrid_B, scaling), p, seed)
        save(ctx, x, A, B, hybrid_A, hybrid_B, g if how.keeps_g else None, seed)
        ctx.scaling, ctx.p, ctx.how = scaling, p, how
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, A, B, hybrid_A, hybrid_B, g, seed = saved(ctx)
        factors = Factors(A, B, hybrid_A, hybrid_B, ctx.scaling)
        return (
            dy if ctx.needs_input_grad[0] else None,
            *_backward(ctx, dy.to(x.dtype), x, None, factors, g, seed),
            None,
        )


def _backward(
    ctx: Any, dy: Tensor, x: Tensor, weight: Weight | None, factors: Factors, g: Tensor | None, seed: Tensor | None
) -> Grads:
    """Gradients of x, A, B, hybrid_A and hybrid_B; with create_graph=True to be differentiated in turn."""
    needed = ctx.needs_input_grad[-6:-1]
    if torch.is_grad_enabled() or is_batched(dy):  # create_graph=True, is_grads_batched=True
        with torch.enable_grad():
            kept = None if seed is None else dropout_mask(x, ctx.p, seed)
            if weight is None:
                y = reference.update(x if kept is None else x * kept, factors)
            else:
                y = reference.linear(x, dense(weight, x.dtype), None, factors, kept)
        return differentiable([y], (x, *factors[:4]), needed, [dy])
    needs = Needs.of(*needed)
    try:
        return fused.linear_backward(dy, x, weight, factors, g, ctx.p, seed, needs, ctx.how)
    except KernelUnavailable as error:
        plans.give_up(error)
    return fused.gradients(dy, x, weight, factors, g, ctx.p, seed, needs)


def differentiable(ys: Any, inputs: Any, needed: Any, dys: Any) -> Grads:
    """Gradients of those inputs that need one, to be differentiated in turn if that is on; None for the others."""
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(ys, wanted, dys, create_graph=torch.is_grad_enabled()))
    return [next(grads) if need else None for need in needed]


class DeltaWeightFunction(torch.autograd.Function):
    """A kernel's delta weight; backward through the definition, for those who regularise delta weights."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(A, B)
        ctx.scaling = scaling
        return plans.delta_weight_kernels(A).delta_weight(A.contiguous(), B.contiguous(), scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            A, B = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            dW = reference.delta_weight(A, B, ctx.scaling)
        return *torch.autograd.grad(dW, (A, B), grad), None
