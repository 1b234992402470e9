"""Linear layers of many experts, where every row of x belongs to one of them: each adapter meets its own rows only.

Letters beside those of `reference`: `E` experts, `S` rows, sorted by expert. Weights are `[E, O, I]`, factors
A `[E, k, I/k, r]` and B `[E, k, r, O/k]`; the sub-ranks g of a row lie together, `[S, k, r]`. No delta weight is made,
and no gradient of one: both would have the size of all experts' weights.

`grouped_linear` takes what comes before the product along, and computes it again in the backward. So what is kept of a
mixture-of-experts module is its input and what its first product gives.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from . import grouped_loops, plans, reference
from .autograd import differentiable
from .plans import falls_back
from .reference import Factors
from .routing import Groups
from .saved import save, saved
from .torch_seam import is_batched

if TYPE_CHECKING:  # a checker of types compares the modules with the protocol
    from . import grouped_kernels

    _with_torch: "GroupedKernels" = grouped_loops
    _with_triton: "GroupedKernels" = grouped_kernels

Before = Callable[..., Tensor]


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
        return _compute(before(*inputs).contiguous(), layer, groups)[0]
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
        y, gs = _compute(before(*tensors[:n]).contiguous(), layer, groups)
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
            x = ctx.before(*inputs).contiguous()
        edges = [get_gradient_edge(x)] if any(needs[:n]) else []
        x = x.detach()
        dx, d_factors = _gradients(dy, x, layer, gs, ctx.groups, bool(edges), needs[n:])
        del x, dy  # not needed for what follows, which takes memory, too
        d_inputs = differentiable(edges, inputs, needs[:n], [dx]) if edges else [None] * n
        return None, *d_inputs, *d_factors


@falls_back
def _compute(x: Tensor, layer: GroupedLinear, groups: Groups) -> tuple[Tensor, list[Tensor]]:
    """y, and g of each adapter."""
    how = kernels_for(x, layer.weight)
    with torch.autocast(x.device.type, enabled=False):
        y, gs = how.product(x, layer.matrices, groups), []
        for A, B, _, _, scaling in layer.adapters:
            gs.append(how.down(x, A, scaling, groups))
            how.up(gs[-1], B, y, groups)
    return y, gs


@falls_back
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
    dy, how = dy.contiguous(), kernels_for(x, layer.weight)
    grads: list[Tensor | None] = []
    with torch.autocast(x.device.type, enabled=False):
        dx = how.product(dy, layer.matrices.mT, groups) if needs_x else None
        wanted = zip(layer.adapters, gs, needs[::2], needs[1::2], strict=True)
        for (A, B, _, _, scaling), g, needs_A, needs_B in wanted:
            # laid out as the factors, so that autograd need not copy them
            dA, dB = torch.empty_like(A) if needs_A else None, torch.empty_like(B) if needs_B else None
            if dx is not None or dA is not None:
                dh = how.down(dy, B.mT, scaling, groups)
                if dx is not None:
                    how.up(dh, A.mT, dx, groups)
                if dA is not None:
                    how.factor_gradient(x, dh, dA, groups)
            if dB is not None:
                how.factor_gradient(dy, g, dB.mT, groups)
            grads += dA, dB
    return dx, grads


class GroupedKernels(Protocol):
    """The products that are computed of all experts; a module that has them as functions."""

    def product(self, x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        """x W_e^T for the rows of each expert: x `[S, I]`, weight `[E, O, I]` -> `[S, O]`."""

    def down(self, x: Tensor, A: Tensor, scaling: float, groups: Groups) -> Tensor:
        """Project down by each row's expert, exchange the sub-ranks and scale: x `[S, I]` -> g `[S, k, r]`."""

    def up(self, g: Tensor, B: Tensor, y: Tensor, groups: Groups) -> None:
        """Add up(g, B_e) to the rows of each expert, in place: g `[S, k, r]`, y `[S, O]`."""

    def factor_gradient(self, x: Tensor, h: Tensor, out: Tensor, groups: Groups) -> None:
        """Write x_i^T h_i over the rows of each expert: x `[S, n]`, h `[S, k, r]`, out `[E, k, n/k, r]`."""


def kernels_for(x: Tensor, weight: Tensor) -> GroupedKernels:
    """Who computes with x `[S, I]` and a weight `[E, O, I]` or `[E, I, O]`: kernels on a GPU, or loops.

    torch's grouped product, which goes with the kernels, takes what lies in multiples of 16 bytes.
    """
    is_aligned = not any(n * weight.element_size() % 16 for n in weight.shape[1:])
    is_aligned = is_aligned and not (x.data_ptr() % 16 or weight.data_ptr() % 16)
    kernels = plans.grouped_kernels(x) if len(x) and is_aligned else None
    return grouped_loops if kernels is None else kernels


def has_kernels(weight: Tensor) -> bool:
    """Whether torch's grouped product and Triton compute with rows of a weight's dtype."""
    return kernels_for(weight, weight) is not grouped_loops
