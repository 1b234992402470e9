"""The arithmetic of an adapted linear layer. `gralora_linear` is the entry; it knows tensors, no modules."""

import torch
from torch import Tensor

from . import compiled, dispatch, fused, reference
from .dropout import draw_seed, dropout
from .saved import save, saved
from .transforms import is_batched, is_transformed


def gralora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    hybrid_A: Tensor | None,
    hybrid_B: Tensor | None,
    scaling: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + scaling * (grid + B_s A_s x), differentiable in x and the factors, not in weight and bias.

    Args:
        x: `[..., I]`.
        weight: frozen base weight, `[O, I]`, dtype of x.
        bias: frozen base bias, `[O]`, dtype of x, or None.
        A, B: grid factors, `[k, I/k, r]` and `[k, r, O/k]`; computed with in the dtype of x.
        hybrid_A, hybrid_B: plain LoRA part, `[h, I]` and `[O, h]`, or None.
        scaling: factor on the adapter's output.
        p: probability of dropout on what the adapter sees of x.
        seed: of dropout, int64 `[]` on the device of x; drawn from torch's generator if it is None and p > 0.

    Returns:
        y, `[..., O]`, dtype of x. Gradients have the dtype of what they belong to.
    """
    if p and seed is None:
        seed = draw_seed(x)
    if torch.compiler.is_compiling():
        args = x, weight, bias, A, B, hybrid_A, hybrid_B, scaling, p, seed
        if dispatch.compiled_as(x, weight, p) != "kernels":
            return compiled.linear(*args)[0]
        from .traced import linear  # imports Triton

        return linear(*args)[0]
    if not torch.is_grad_enabled():
        return fused.forward(x, weight, bias, A, B, hybrid_A, hybrid_B, scaling, p, seed)[0]
    projected: list[Tensor] | None = [] if dispatch.is_large(x) else None
    others = weight, bias, scaling, p, seed, projected
    y = GraloraLinearFunction.apply(x, A, B, hybrid_A, hybrid_B, others)
    if projected is not None:
        g, up = projected
        fused.write_linear(y, x, weight, bias, g, up)
    return y


class GraloraLinearFunction(torch.autograd.Function):
    """`fused.forward` and `fused.backward` for eager mode, where the dispatch of a custom op would cost more.

    What has no gradient is one argument, since each costs the host. With a list for g and B there, y is not computed
    yet, only what the backward needs is saved: gradient checkpointing stops computing a block anew where the last
    tensor is saved, and so never comes to the product of the block's last layer.
    """

    @staticmethod
    def forward(ctx, x, A, B, hybrid_A, hybrid_B, others):
        weight, bias, scaling, p, seed, projected = others
        if projected is None:
            y, g = fused.forward(x, weight, bias, A, B, hybrid_A, hybrid_B, scaling, p, seed)
        else:
            projected += fused.sub_ranks(x, A, B, hybrid_A, hybrid_B, scaling, p, seed)
            y, g = fused.output(x, weight), projected[0]
            if dispatch.projects_again(x, g, hybrid_A, p):
                g = None
        save(ctx, x, weight, A, B, hybrid_A, hybrid_B, g, seed)
        ctx.scaling, ctx.p = scaling, p
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, A, B, hybrid_A, hybrid_B, g, seed = saved(ctx)
        needed = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled() or is_batched(dy):  # create_graph=True, is_grads_batched=True
            with torch.enable_grad():
                kept = None if seed is None else _kept(x, ctx.p, seed)
                y = reference.linear(x, weight, None, A, B, hybrid_A, hybrid_B, ctx.scaling, kept)
            grads = _differentiable(y, (x, A, B, hybrid_A, hybrid_B), needed, dy)
        else:
            needs = fused.needs_of(*needed)
            grads = fused.backward(dy, x, weight, A, B, hybrid_A, hybrid_B, g, ctx.scaling, ctx.p, seed, needs)
        return *grads, None


def add_update(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    hybrid_A: Tensor | None,
    hybrid_B: Tensor | None,
    scaling: float,
    p: float = 0.0,
) -> Tensor:
    """y + scaling * (grid + B_s A_s x), in place: for base layers whose product with x is not ours to compute.

    Args:
        y: `[..., O]`, contiguous, any float dtype, no leaf that requires gradients; changed.
        The others are those of `gralora_linear`.
    """
    seed = draw_seed(x) if p else None
    args = y, x, A, B, hybrid_A, hybrid_B, scaling, p, seed
    if torch.is_grad_enabled():
        return GraloraUpdateFunction.apply(*args)
    fused.add_update(*args)
    return y


class GraloraUpdateFunction(torch.autograd.Function):
    """`fused.add_update`; the gradient of y is that of the result."""

    @staticmethod
    def forward(ctx, y, x, A, B, hybrid_A, hybrid_B, scaling, p, seed):
        ctx.mark_dirty(y)
        g = fused.add_update(y, x, A, B, hybrid_A, hybrid_B, scaling, p, seed)
        if dispatch.is_large(x) and dispatch.projects_again(x, g, hybrid_A, p):
            g = None
        save(ctx, x, A, B, hybrid_A, hybrid_B, g, seed)
        ctx.scaling, ctx.p = scaling, p
        return y

    @staticmethod
    def backward(ctx, dy):
        x, A, B, hybrid_A, hybrid_B, g, seed = saved(ctx)
        needs_y, *needed = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled() or is_batched(dy):
            inputs = x, A, B, hybrid_A, hybrid_B
            with torch.enable_grad():
                update = ctx.scaling * reference.update(x if seed is None else x * _kept(x, ctx.p, seed), *inputs[1:])
            grads = _differentiable(update, inputs, needed, dy.to(x.dtype))
        else:
            needs = fused.needs_of(*needed)
            grads = fused.backward(
                dy.to(x.dtype), x, None, A, B, hybrid_A, hybrid_B, g, ctx.scaling, ctx.p, seed, needs
            )
        return dy if needs_y else None, *grads, None, None, None


def _kept(x, p, seed):
    """What dropout multiplies x with, 0 or 1 / (1 - p)."""
    return dropout(torch.ones_like(x).reshape(-1, x.shape[-1]), p, seed).view_as(x)


def _differentiable(y, inputs, needed, dy):
    """Gradients of those inputs that need one, to be differentiated in turn if that is on; None for the others."""
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=torch.is_grad_enabled()))
    return [next(grads) if need else None for need in needed]


def delta_weight(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """`reference.delta_weight`, by a kernel where there is one: A `[k, I/k, r]`, B `[k, r, O/k]` -> `[O, I]`."""
    if dispatch.use_delta_weight_kernel(A) and not is_transformed():
        return DeltaWeightFunction.apply(A, B, scaling)
    return reference.delta_weight(A, B, scaling)


class DeltaWeightFunction(torch.autograd.Function):
    """The kernel forward; backward through the definition, for those who regularise delta weights."""

    @staticmethod
    def forward(ctx, A, B, scaling):
        ctx.save_for_backward(A, B)
        ctx.scaling = scaling
        return dispatch.kernels(A.device.index).delta_weight(A.contiguous(), B.contiguous(), scaling)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            dW = reference.delta_weight(*inputs, ctx.scaling)
        return *torch.autograd.grad(dW, inputs, grad), None
