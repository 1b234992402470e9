"""Adapters of which each sees rows of its own: they add to the base layer's output, each to its rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import fused, reference
from .autograd import Grads, differentiable
from .fused import Needs
from .reference import Factors
from .saved import save, saved
from .torch_seam import is_batched


class Rows(NamedTuple):
    """Consecutive rows of a batch, `[start:stop]`, and the factors of the adapter that sees them."""

    start: int
    stop: int
    factors: Factors


def mixed_update(y: Tensor, x: Tensor, groups: Sequence[Rows], order: Tensor | None) -> Tensor:
    """Add to y what the adapters give of their rows of x, in place; differentiable in y, x and the factors.

    Args:
        y: `[N, ..., O]`, contiguous, any float dtype, no leaf that requires gradients; changed.
        x: `[N, ..., I]`, the dtype that is computed in.
        groups: the adapters and their rows, in ascending order, which do not overlap.
        order: the rows of x and y in the order in which `groups` counts them, int64; None if it is that of x.
    """
    if order is not None:
        part = y.new_zeros(len(order), *y.shape[1:])
        return y.index_add_(0, order, mixed_update(part, x.index_select(0, order), groups, None))
    if torch.is_grad_enabled():
        return MixedUpdateFunction.apply(y, x, *[t for group in groups for t in group.factors[:4]], groups)
    for start, stop, factors in groups:
        fused.add_update(y[start:stop], x[start:stop], factors, 0.0, None)
    return y


class MixedUpdateFunction(torch.autograd.Function):
    """Compute what `mixed_update` says; the gradient of y is that of the result."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, *others: Any) -> Any:
        groups: Sequence[Rows] = others[-1]
        ctx.mark_dirty(y)
        kept = [fused.add_update(y[start:stop], x[start:stop], own, 0.0, None)[0] for start, stop, own in groups]
        save(ctx, x, *others[:-1], *kept)
        ctx.rows = [(start, stop, factors.scaling) for start, stop, factors in groups]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, *tensors = saved(ctx)
        n, needed = len(ctx.rows), ctx.needs_input_grad[1:-1]
        groups = []
        for m, (start, stop, scaling) in enumerate(ctx.rows):
            A, B, hybrid_A, hybrid_B = tensors[4 * m : 4 * m + 4]
            groups.append(Rows(start, stop, Factors(A, B, hybrid_A, hybrid_B, scaling)))
        own_dy = dy if ctx.needs_input_grad[0] else None
        if torch.is_grad_enabled() or is_batched(dy):  # create_graph=True, is_grads_batched=True
            with torch.enable_grad():
                parts = [reference.update(x[start:stop], factors) for start, stop, factors in groups]
            dys = [dy[start:stop].to(x.dtype) for start, stop, _ in groups]
            return own_dy, *differentiable(parts, (x, *tensors[: 4 * n]), needed, dys), None
        dx = x.new_zeros(x.shape) if needed[0] else None
        grads: Grads = []
        for m, ((start, stop, factors), g) in enumerate(zip(groups, tensors[4 * n :], strict=True)):
            needs = Needs.of(needed[0], *needed[4 * m + 1 : 4 * m + 5])
            rows = dy[start:stop].to(x.dtype), x[start:stop]
            part, *own = fused.gradients(*rows, None, factors, g, 0.0, None, needs)
            if dx is not None:
                dx[start:stop] = part
            grads += own
        return own_dy, dx, *grads, None
