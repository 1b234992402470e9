"""The arithmetic of an adapted linear layer. `gralora_linear` is the entry; it knows tensors, no modules."""

import torch
from torch import Tensor

from . import dispatch, fused, reference


def gralora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    hybrid_A: Tensor | None,
    hybrid_B: Tensor | None,
    scaling: float,
) -> Tensor:
    """x W^T + bias + scaling * (grid + B_s A_s x), differentiable in x and the factors, not in weight and bias.

    Args:
        x: `[..., I]`.
        weight: frozen base weight, `[O, I]`, dtype of x.
        bias: frozen base bias, `[O]`, dtype of x, or None.
        A, B: grid factors, `[k, I/k, r]` and `[k, r, O/k]`; computed with in the dtype of x.
        hybrid_A, hybrid_B: plain LoRA part, `[h, I]` and `[O, h]`, or None.
        scaling: factor on the adapter's output.

    Returns:
        y, `[..., O]`, dtype of x. Gradients have the dtype of what they belong to.
    """
    args = x, weight, bias, A, B, hybrid_A, hybrid_B, scaling
    if torch.compiler.is_compiling():
        return _linear_op(*args)[0]
    if not torch.is_grad_enabled():
        return fused.forward(*args)[0]
    return GraloraLinearFunction.apply(*args)


class GraloraLinearFunction(torch.autograd.Function):
    """`fused.forward` and `fused.backward` for eager mode, where the dispatch of a custom op would cost more."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, hybrid_A, hybrid_B, scaling):
        y, g = fused.forward(x, weight, bias, A, B, hybrid_A, hybrid_B, scaling)
        ctx.save_for_backward(x, weight, A, B, hybrid_A, hybrid_B, g)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, A, B, hybrid_A, hybrid_B, g = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated in turn
            inputs = x, weight, None, A, B, hybrid_A, hybrid_B
            y = reference.linear(*inputs, ctx.scaling)
            wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
            grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return *(next(grads) if needed else None for needed in ctx.needs_input_grad[:-1]), None
        needs = _needs(ctx.needs_input_grad)
        dx, dA, dB, d_hybrid_A, d_hybrid_B = fused.backward(
            dy, x, weight, A, B, hybrid_A, hybrid_B, g, ctx.scaling, needs
        )
        return dx, None, None, dA, dB, d_hybrid_A, d_hybrid_B, None


def delta_weight(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """`reference.delta_weight`, by a kernel where there is one: A `[k, I/k, r]`, B `[k, r, O/k]` -> `[O, I]`."""
    if dispatch.use_delta_weight_kernel(A):
        return DeltaWeightFunction.apply(A, B, scaling)
    return reference.delta_weight(A, B, scaling)


class DeltaWeightFunction(torch.autograd.Function):
    """The kernel forward; backward through the definition, for those who regularise delta weights."""

    @staticmethod
    def forward(ctx, A, B, scaling):
        ctx.save_for_backward(A, B)
        ctx.scaling = scaling
        return dispatch.kernels().delta_weight(A.contiguous(), B.contiguous(), scaling)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            dW = reference.delta_weight(*inputs, ctx.scaling)
        return *torch.autograd.grad(dW, inputs, grad), None


def _needs(needs_input_grad):
    """Whether gradients are needed of x, of A or hybrid_A, of B or hybrid_B, from those of all inputs."""
    x, _, _, A, B, hybrid_A, hybrid_B, *_ = needs_input_grad
    return x, A or hybrid_A, B or hybrid_B


@torch.library.custom_op(
    "gralora::linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor? hybrid_A, Tensor? hybrid_B, "
    "float scaling) -> (Tensor, Tensor)",
)
def _linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    hybrid_A: Tensor | None,
    hybrid_B: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    return fused.forward(x, weight, bias, A, B, hybrid_A, hybrid_B, scaling)


@_linear_op.register_fake
def _(x, weight, bias, A, B, hybrid_A, hybrid_B, scaling):
    R = A.shape[2] + (0 if hybrid_A is None else hybrid_A.shape[0])
    T = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(A.shape[0], T, R)


@torch.library.custom_op(
    "gralora::linear_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor A, Tensor B, Tensor? hybrid_A, Tensor? hybrid_B, Tensor g, "
    "float scaling, bool[] needs) -> Tensor[]",
)
def _linear_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    hybrid_A: Tensor | None,
    hybrid_B: Tensor | None,
    g: Tensor,
    scaling: float,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that `needs` asks for, without the None entries: a custom op can return no None."""
    grads = fused.backward(dy, x, weight, A, B, hybrid_A, hybrid_B, g, scaling, tuple(needs))
    return [grad.contiguous() for grad in grads if grad is not None]


@_linear_backward_op.register_fake
def _(dy, x, weight, A, B, hybrid_A, hybrid_B, g, scaling, needs):
    needs_x, needs_A, needs_B = needs
    wanted = [(x, needs_x), (A, needs_A), (B, needs_B), (hybrid_A, needs_A), (hybrid_B, needs_B)]
    return [t.new_empty(t.shape) for t, needed in wanted if needed and t is not None]


def _setup_context(ctx, inputs, output):
    x, weight, _, A, B, hybrid_A, hybrid_B, scaling = inputs
    ctx.save_for_backward(x, weight, A, B, hybrid_A, hybrid_B, output[1])
    ctx.scaling = scaling


def _op_backward(ctx, dy, _):
    x, weight, A, B, hybrid_A, hybrid_B, g = ctx.saved_tensors
    needs = list(_needs(ctx.needs_input_grad))
    grads = iter(_linear_backward_op(dy, x, weight, A, B, hybrid_A, hybrid_B, g, ctx.scaling, needs))
    dx, dA, dB = (next(grads) if need else None for need in needs)
    d_hybrid_A = next(grads) if needs[1] and hybrid_A is not None else None
    d_hybrid_B = next(grads) if needs[2] and hybrid_B is not None else None
    return dx, None, None, dA, dB, d_hybrid_A, d_hybrid_B, None


_linear_op.register_autograd(_op_backward, setup_context=_setup_context)
