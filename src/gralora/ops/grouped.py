"""Linear layers of many experts, where every row of x belongs to one of them: each adapter meets its own rows only.

Letters beside those of `reference`: `E` experts, `S` rows, sorted by expert. Weights are `[E, O, I]`, factors
A `[E, k, I/k, r]` and B `[E, k, r, O/k]`; the sub-ranks g of a row lie together, `[S, k, r]`. No delta weight is made,
and no gradient of one: both would have the size of all experts' weights.

`grouped_linear` takes what comes before the product along, and computes it again in the backward. So what is kept of a
mixture-of-experts module is its input and what its first product gives.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .autograd import differentiable
from .layout import chunks
from .reference import Factors
from .saved import save, saved
from .torch_seam import is_batched

Before = Callable[..., Tensor]


class Groups:
    """Where each expert's rows lie.

    Attributes:
        ends: the row after each expert's last, int32 `[E]`, on the device of the rows.
    """

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends

    @functools.cached_property
    def spans(self) -> list[tuple[int, slice]]:
        """The experts that have rows, and these rows; waits for the device."""
        ends = [0, *self.ends.tolist()]
        return [(e, slice(*span)) for e, span in enumerate(itertools.pairwise(ends)) if span[0] < span[1]]


class Routing(NamedTuple):
    """Which token each row is of, if every token goes to several experts.

    Attributes:
        groups: the rows of each expert.
        order: `[S]`, row -> its place in the router's choices, counted token by token.
        rows: `[T, n]`, token and place among its n choices -> row; the inverse of `order`.
        tokens: `[S]`, row -> token.
    """

    groups: Groups
    order: Tensor
    rows: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> "Routing":
        """Sort the rows of a router's choices, `[T, n]`, which are numbers below `experts`."""
        of_row, order = chosen.flatten().sort(stable=True)
        numbers = torch.arange(max(len(order), experts), device=chosen.device)
        ends = torch.searchsorted(of_row, numbers[:experts].to(of_row.dtype), right=True, out_int32=True)
        rows = torch.empty_like(order).scatter_(0, order, numbers[: len(order)]).view(chosen.shape)
        return cls(Groups(ends), order, rows, order // chosen.shape[1])


def gather(x: Tensor, routing: Routing) -> Tensor:
    """Copy tokens `[T, n]` to the rows of their experts, `[S, n]`."""
    return _Gather.apply(x, routing)


def combine(y: Tensor, routing: Routing) -> Tensor:
    """Sum up the rows of each token: the transpose of `gather`, `[S, n]` -> `[T, n]`."""
    return _Combine.apply(y, routing)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return x.index_select(0, routing.tokens)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return combine(dy, ctx.routing), None


class _Combine(torch.autograd.Function):
    """Summed token by token, which gives the same bits every time, where adding row by row does not on a GPU."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        rows = routing.rows
        return y.index_select(0, rows.flatten()).view(*rows.shape, -1).sum(1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return gather(dy, ctx.routing), None


class GroupedLinear(NamedTuple):
    """The layers of all experts, of one kind.

    Attributes:
        weight: frozen, `[E, O, I]`, or `[E, I, O]` if it is stored transposed.
        is_transposed: which of the two.
        adapters: any number, each with A and B as above, of any float dtype, and no hybrid part.
    """

    weight: Tensor
    is_transposed: bool
    adapters: tuple[Factors, ...]

    @property
    def matrices(self) -> Tensor:
        """The weight as `[E, O, I]`."""
        return self.weight.mT if self.is_transposed else self.weight


def grouped_linear(inputs: tuple[Tensor, ...], before: Before, layer: GroupedLinear, groups: Groups) -> Tensor:
    """x W_e^T + sum of scaling * up(down(x, A_e), B_e) for the rows of every expert e, with x = before(*inputs).

    Differentiable in the inputs and the factors, not in the weight.

    Args:
        inputs: tensors.
        before: makes x `[S, I]` of them, in the dtype of the weight, by differentiable operations; called once more in
            the backward.
        layer: of the experts.
        groups: the rows of each.

    Returns:
        `[S, O]`, dtype of x.
    """
    if not torch.is_grad_enabled():
        return _compute(before(*inputs), layer, groups)[0]
    factors = [t for adapter in layer.adapters for t in adapter[:2]]
    return GroupedLinearFunction.apply((before, layer, groups, len(inputs)), *inputs, *factors)


def definition(x: Tensor, layer: GroupedLinear, groups: Groups) -> Tensor:
    """`grouped_linear` of x by the definition, expert by expert."""
    weight, ys = layer.matrices, []
    for e, rows in groups.spans:
        y = torch.nn.functional.linear(x[rows], weight[e])
        for A, B, _, _, scaling in layer.adapters:
            y = y + reference.update(x[rows], Factors(A[e].to(x.dtype), B[e].to(x.dtype), scaling=scaling))
        ys.append(y)
    return torch.cat(ys) if ys else x.new_zeros(0, weight.shape[1])


class GroupedLinearFunction(torch.autograd.Function):
    """Keep the inputs and the sub-ranks; make x again for the gradient of A, and of the inputs."""

    @staticmethod
    def forward(ctx: Any, others: Any, *tensors: Tensor) -> Tensor:
        before, layer, groups, n = others
        y, gs = _compute(before(*tensors[:n]), layer, groups)
        save(ctx, layer.weight, *tensors, *gs)
        ctx.before, ctx.groups, ctx.n, ctx.is_transposed = before, groups, n, layer.is_transposed
        ctx.scalings = [adapter.scaling for adapter in layer.adapters]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        weight, *tensors = saved(ctx)
        n, m = ctx.n, ctx.n + 2 * len(ctx.scalings)
        inputs, factors, gs = tensors[:n], tensors[n:m], tensors[m:]
        needs = ctx.needs_input_grad[1:]
        pairs = zip(factors[::2], factors[1::2], ctx.scalings, strict=True)
        adapters = tuple(Factors(A, B, scaling=scaling) for A, B, scaling in pairs)
        layer = GroupedLinear(weight, ctx.is_transposed, adapters)
        if torch.is_grad_enabled() or is_batched(dy):  # create_graph=True, is_grads_batched=True
            with torch.enable_grad():
                y = definition(ctx.before(*inputs), layer, ctx.groups)
            return None, *differentiable([y], (*inputs, *factors), needs, [dy])
        with torch.set_grad_enabled(any(needs[:n])):
            inputs = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs[:n], strict=True)]
            x = ctx.before(*inputs)
        dx, d_factors = _gradients(dy, x.detach(), layer, gs, ctx.groups, any(needs[:n]), needs[n:])
        d_inputs = [None] * n if dx is None else differentiable([x], inputs, needs[:n], [dx])
        return None, *d_inputs, *d_factors


def _compute(x: Tensor, layer: GroupedLinear, groups: Groups) -> tuple[Tensor, list[Tensor]]:
    """y, and g of each adapter."""
    with torch.autocast(x.device.type, enabled=False):
        y, gs = product(x, layer.matrices, groups), []
        for A, B, _, _, scaling in layer.adapters:
            gs.append(down(x, A, scaling, groups))
            up(gs[-1], B, y, groups)
    return y, gs


def _gradients(
    dy: Tensor,
    x: Tensor,
    layer: GroupedLinear,
    gs: Sequence[Tensor],
    groups: Groups,
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x, and of A and B of each adapter in turn."""
    dy = dy.contiguous()
    grads: list[Tensor | None] = []
    with torch.autocast(x.device.type, enabled=False):
        dx = product(dy, layer.matrices.mT, groups) if needs_x else None
        for (A, B, _, _, scaling), g, needs_A, needs_B in zip(
            layer.adapters, gs, needs[::2], needs[1::2], strict=True
        ):
            dA = dB = None
            if dx is not None or needs_A:
                dh = down(dy, B.mT, scaling, groups)
                if dx is not None:
                    up(dh, A.mT, dx, groups)
                if needs_A:
                    dA = factor_gradient(x, dh, A, groups)
            if needs_B:
                dB = factor_gradient(dy, g, B.mT, groups).mT
            grads += dA, dB
    return dx, grads


# One expert after another, in torch's own products


def product(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """x W_e^T for the rows of each expert: x `[S, I]`, weight `[E, O, I]` -> `[S, O]`."""
    y = x.new_empty(len(x), weight.shape[1])
    for e, rows in groups.spans:
        torch.mm(x[rows], weight[e].mT, out=y[rows])
    return y


def down(x: Tensor, A: Tensor, scaling: float, groups: Groups) -> Tensor:
    """Project down by each row's expert, exchange the sub-ranks and scale: x `[S, I]` -> g `[S, k, r]`, dtype of x."""
    _, k, _, r = A.shape
    g = x.new_empty(len(x), k, r)
    for e, rows in groups.spans:
        x_e, A_e = x[rows], A[e].to(x.dtype)
        h = x.new_empty(k, len(x_e), r).baddbmm_(chunks(x_e, k), A_e, beta=0, alpha=scaling)
        # block i's j-th sub-rank becomes block j's i-th
        g[rows].unflatten(2, (k, r // k)).copy_(h.unflatten(2, (k, r // k)).permute(1, 2, 0, 3))
    return g


def up(g: Tensor, B: Tensor, y: Tensor, groups: Groups) -> None:
    """Add up(g, B_e) to the rows of each expert, in place: g `[S, k, r]`, y `[S, O]`."""
    k = B.shape[1]
    for e, rows in groups.spans:
        chunks(y[rows], k).baddbmm_(g[rows].transpose(0, 1), B[e].to(g.dtype))


def factor_gradient(x: Tensor, h: Tensor, factor: Tensor, groups: Groups) -> Tensor:
    """x_i^T h_i over the rows of each expert: x `[S, n]`, h `[S, k, r]` -> `[E, k, n/k, r]`, dtype of `factor`."""
    k = h.shape[1]
    out = factor.new_zeros(factor.shape) if len(groups.spans) < len(factor) else factor.new_empty(factor.shape)
    for e, rows in groups.spans:
        a, b = chunks(x[rows], k).mT, h[rows].transpose(0, 1)
        if out.dtype == x.dtype:
            torch.bmm(a, b, out=out[e])
        else:
            out[e] = torch.bmm(a, b)
    return out
