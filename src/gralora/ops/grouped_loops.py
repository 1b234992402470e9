"""`grouped.GroupedKernels` in torch's own products, one expert after another: on CPUs, and in any float dtype."""

import torch
from torch import Tensor

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
