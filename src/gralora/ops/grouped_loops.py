"""`grouped.GroupedKernels` in torch's own products, one expert after another: on CPUs, and in any float dtype.

And in torch's operations, what `weighted_gate` computes.
"""

import torch
from torch import Tensor

from .activations import ACTIVATIONS, Activation
from .layout import chunks
from .routing import Groups


def product(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    y = x.new_empty(len(x), weight.shape[1])
    for e, rows in groups.spans:
        torch.mm(x[rows], weight[e].mT, out=y[rows])
    return y


def down(x: Tensor, A: Tensor, scaling: float, groups: Groups) -> Tensor:
    _, k, _, r = A.shape
    g = x.new_empty(len(x), k, r)
    for e, rows in groups.spans:
        x_e, A_e = x[rows], A[e].to(x.dtype)
        h = x.new_empty(k, len(x_e), r).baddbmm_(chunks(x_e, k), A_e, beta=0, alpha=scaling)
        # block i's j-th sub-rank becomes block j's i-th
        g[rows].unflatten(2, (k, r // k)).copy_(h.unflatten(2, (k, r // k)).permute(1, 2, 0, 3))
    return g


def up(g: Tensor, B: Tensor, y: Tensor, groups: Groups) -> None:
    k = B.shape[1]
    for e, rows in groups.spans:
        chunks(y[rows], k).baddbmm_(g[rows].transpose(0, 1), B[e].to(g.dtype))


def factor_gradient(x: Tensor, h: Tensor, out: Tensor, groups: Groups) -> None:
    k = h.shape[1]
    if len(groups.spans) < len(out):
        out.zero_()
    for e, rows in groups.spans:
        a, b, target = chunks(x[rows], k).mT, h[rows].transpose(0, 1), out[e]
        if target.stride(2) != 1:
            a, b, target = b.mT, a.mT, target.mT
        if target.dtype == x.dtype and target.stride(2) == 1:
            torch.bmm(a, b, out=target)
        else:
            target.copy_(torch.bmm(a, b))


def weighted_gate(x: Tensor, weights: Tensor, activation: str) -> Tensor:
    """See `weighted_gate`: x `[S, 2 F]`, weights `[S, 1]` -> `[S, F]`; nothing else of this size is made."""
    e, u = x.chunk(2, dim=1)
    with torch.no_grad():
        return ACTIVATIONS[activation].value(e).mul_(u).mul_(weights)


def weighted_gate_backward(x: Tensor, weights: Tensor, d_out: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weights, from that of the result, `[S, F]`, by as many rows as caches hold."""
    dx, d_weights = torch.empty_like(x), torch.empty_like(weights)
    rows = max(2**16 // x.shape[1], 1)
    with torch.no_grad():
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            dx[part], d_weights[part] = _gate_gradients(x[part], weights[part], d_out[part], ACTIVATIONS[activation])
    return dx, d_weights


def _gate_gradients(x: Tensor, weights: Tensor, d_out: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
    e, u = x.chunk(2, dim=1)
    value, d_value = act.value(e), (d_out * weights).to(x.dtype)
    du = d_value * value
    de = act.gradient(d_value.mul_(u), e)
    dtype = torch.promote_types(weights.dtype, torch.float32)
    return torch.cat([de, du], dim=1), value.mul_(u).mul_(d_out).sum(1, keepdim=True, dtype=dtype)
