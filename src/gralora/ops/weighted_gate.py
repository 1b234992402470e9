"""What the last product of gated experts sees: act(e) * u, times the weight of each row's expert for its token.

Letters: e and u are what the first product gives, side by side, `[S, 2 F]`. torch would keep act(e), its product with
u and that with the weights; here only the inputs are kept.
"""

from typing import Any

import torch
from torch import Tensor

from . import grouped_loops, plans
from .activations import ACTIVATIONS
from .autograd import differentiable
from .plans import falls_back
from .torch_seam import is_batched


def weighted_gate(x: Tensor, weights: Tensor, activation: str) -> Tensor:
    """act(e) * u * weights, differentiable in both.

    Args:
        x: e and u, `[S, 2 F]`, contiguous.
        weights: `[S, 1]`, any float dtype.
        activation: a name of `activations.ACTIVATIONS`.

    Returns:
        `[S, F]`, dtype of x.
    """
    return _WeightedGate.apply(x, weights, activation)


def definition(x: Tensor, weights: Tensor, activation: str) -> Tensor:
    """`weighted_gate` in torch's operations."""
    e, u = x.chunk(2, dim=1)
    return (ACTIVATIONS[activation].value(e) * u * weights).to(x.dtype)


class _WeightedGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.activation = activation
        return _value(x, weights, activation)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        x, weights = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(d_out):  # create_graph=True, is_grads_batched=True
            with torch.enable_grad():
                y = definition(x, weights, ctx.activation)
            return *differentiable([y], (x, weights), ctx.needs_input_grad[:2], [d_out]), None
        return *_gradients(x, weights, d_out.contiguous(), ctx.activation), None


@falls_back
def _value(x: Tensor, weights: Tensor, activation: str) -> Tensor:
    return _kernels(x).weighted_gate(x, weights, activation)


@falls_back
def _gradients(x: Tensor, weights: Tensor, d_out: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return _kernels(x).weighted_gate_backward(x, weights, d_out, activation)


def _kernels(x: Tensor) -> Any:
    return (plans.grouped_kernels(x) if len(x) else None) or grouped_loops
