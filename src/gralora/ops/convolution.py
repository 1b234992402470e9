"""An adapted convolution: the base layer's output, to which the adapter's is added in place.

Letters beside those of `reference`: `P` the sizes of the kernel, `S` those of the output. A is `[k, I/k, *P, r]`:
chunk i of the channels is convolved with A_i, the sub-ranks are exchanged at every position, and B_j is a 1x1
convolution.

The sub-ranks need no exchange of their own: B is laid out as one matrix with zeros between its blocks, whose rows are
in the order in which the convolution leaves the sub-ranks. The product with it adds to y where y lies.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .autograd import differentiable
from .reference import Factors
from .saved import save, saved
from .torch_seam import is_batched

# sub-ranks, k * r + h, up to which A is one dense convolution with zeros: grouped ones are slow on a GPU, whose matrix
# products have no narrower tiles
FEW = {"cuda": 64}
CONVOLUTIONS = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)


class Geometry(NamedTuple):
    """How a kernel moves: stride, padding with zeros on both sides, and dilation, with a number for each axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def convolve(x: Tensor, weight: Tensor, geometry: Geometry, groups: int = 1) -> Tensor:
    """The convolution of x `[..., n, *space]` by a weight `[m, n/groups, *P]`."""
    return CONVOLUTIONS[weight.dim() - 3](x, weight, None, *geometry, groups)


def conv_down(x: Tensor, A: Tensor, geometry: Geometry) -> Tensor:
    """Convolve every chunk of channels and exchange the sub-ranks: `[..., I, *space]` -> `[..., k * r, *S]`."""
    k, dims = A.shape[0], A.dim() - 3
    h = convolve(x, A.movedim(-1, 1).flatten(0, 1), geometry, k)
    channels = h.dim() - dims - 1
    return h.unflatten(channels, (k, k, -1)).transpose(channels, channels + 1).flatten(channels, channels + 2)


def conv_update(y: Tensor, x: Tensor, factors: Factors, geometry: Geometry) -> Tensor:
    """Add the adapter's output to y in place; differentiable in y, x and the factors.

    Args:
        y: `[N, O, *S]`, contiguous in some memory format, any float dtype, no leaf that requires gradients; changed.
        x: `[N, I, *space]`, the dtype that is computed in.
        factors: A `[k, I/k, *P, r]`, B `[k, r, O/k]`, hybrid_A `[h, I, *P]` and hybrid_B `[O, h]`, any float dtype.
        geometry: of the layer.
    """
    *tensors, scaling = factors
    return ConvUpdateFunction.apply(y, x, *tensors, (scaling, geometry))


def definition(x: Tensor, factors: Factors, geometry: Geometry) -> Tensor:
    """The adapter's output, `[N, O, *S]`."""
    A, B, hybrid_A, hybrid_B, scaling = factors
    y = reference.up(conv_down(x, A, geometry).movedim(1, -1), B)
    if hybrid_A is not None and hybrid_B is not None:
        y = y + torch.nn.functional.linear(convolve(x, hybrid_A, geometry).movedim(1, -1), hybrid_B)
    return scaling * y.movedim(-1, 1)


class Part(NamedTuple):
    """A convolution, and a product at every position, that add up to an adapter or to one part of it.

    Attributes:
        A: of the convolution, `[C, I/groups, *P]`.
        B: of the product, `[C, O]`.
        groups: of the convolution.
    """

    A: Tensor
    B: Tensor
    groups: int


def is_grouped(factors: Factors) -> bool:
    """Whether the convolution of the grid has groups, since a dense one would cost more."""
    A, _, hybrid_A, _, _ = factors
    k, r = A.shape[0], A.shape[-1]
    return k > 1 and k * r + (0 if hybrid_A is None else hybrid_A.shape[0]) > FEW.get(A.device.type, 0)


def parts(factors: Factors, dtype: torch.dtype) -> list[Part]:
    """Lay an adapter out as a dense part, or as a part with groups, and another one for its plain LoRA.

    The C channels between A and B are k * r sub-ranks, block by block of A, and then the ranks of the plain LoRA.
    """
    A, B, hybrid_A, hybrid_B, _ = factors
    (k, chunk, *P, r), h, is_split = A.shape, 0 if hybrid_A is None else hybrid_A.shape[0], is_grouped(factors)
    grid = k * r
    C = grid if is_split else grid + h
    matrix = B.new_zeros(C, k * B.shape[2], dtype=dtype)
    _blocks_of_B(matrix[:grid], k).copy_(B.unflatten(1, (k, -1)).movedim(0, -1))
    if is_split or k == 1 and not h:
        found = [Part(A.to(dtype).movedim(-1, 1).flatten(0, 1), matrix, k)]
        if hybrid_A is not None and hybrid_B is not None:
            found.append(Part(hybrid_A.to(dtype), hybrid_B.to(dtype).mT, 1))
        return found
    weight = A.new_zeros(C, k * chunk, *P, dtype=dtype)
    _blocks_of_A(weight[:grid], k).copy_(A.movedim((-1, 0), (0, -1)))
    if hybrid_A is not None and hybrid_B is not None:
        weight[grid:], matrix[grid:] = hybrid_A, hybrid_B.mT
    return [Part(weight, matrix, 1)]


def _blocks_of_A(weight: Tensor, k: int) -> Tensor:
    """The blocks of A in a dense weight `[k_i r, k_i I/k, *P]`: a view `[r, I/k, *P, k_i]`."""
    return weight.unflatten(1, (k, -1)).unflatten(0, (k, -1)).diagonal(dim1=0, dim2=2)


def _blocks_of_B(matrix: Tensor, k: int) -> Tensor:
    """The blocks of B in a dense matrix `[k_i k_j q, k_j O/k]`: a view `[k_i, q, O/k, k_j]`."""
    return matrix.unflatten(1, (k, -1)).unflatten(0, (k, k, -1)).diagonal(dim1=1, dim2=3)


def gradients_of_factors(
    grads: list[tuple[Tensor | None, Tensor | None]], factors: Factors, groups: int
) -> list[Tensor | None]:
    """Gradients of the A and B of `parts` -> those of A, B, hybrid_A and hybrid_B, in the factors' dtypes."""
    A, B, hybrid_A, hybrid_B, _ = factors
    (k, *_, r), (dA, dB) = A.shape, grads[0]
    grid, (tail_A, tail_B) = k * r, grads[-1]
    if len(grads) == 1 and hybrid_A is not None:
        tail_A, tail_B = (None if d is None else d[grid:] for d in (dA, dB))
    if dA is not None:
        dA = (
            dA[:grid].unflatten(0, (k, r)).movedim(1, -1)
            if groups == k
            else _blocks_of_A(dA[:grid], k).movedim((-1, 0), (0, -1))
        )
    if dB is not None:
        dB = _blocks_of_B(dB[:grid], k).movedim(-1, 0).flatten(1, 2)
    pairs = zip((dA, dB, tail_A, None if tail_B is None else tail_B.mT), factors[:4], strict=True)
    return [None if d is None or t is None else d.to(t.dtype) for d, t in pairs]


def _matrices(t: Tensor) -> Tensor:
    """View t `[N, n, *space]`, contiguous in some memory format, as matrices of positions by channels.

    Returns:
        `[N, positions, n]`, or `[1, N * positions, n]` where channels come last in memory.
    """
    if t.is_contiguous():
        return t.flatten(2).mT
    return t.movedim(1, -1).reshape(1, -1, t.shape[1])


def _like(t: Tensor, other: Tensor) -> Tensor:
    """t in the memory format of another tensor."""
    if other.is_contiguous():
        return t.contiguous()
    return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)


class ConvUpdateFunction(torch.autograd.Function):
    """Compute what `conv_update` says; the gradient of y is that of the result."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, hybrid_A: Any, hybrid_B: Any, others: Any
    ) -> Any:
        scaling, geometry = others
        ctx.mark_dirty(y)
        kept: list[Tensor] = []
        laid_out = parts(Factors(A, B, hybrid_A, hybrid_B), x.dtype)
        for weight, matrix, groups in laid_out:
            h = _like(convolve(x, weight, geometry, groups), y)
            out, g, B_each = _matrices(y), _matrices(h), matrix.expand(_matrices(y).shape[0], -1, -1)
            if y.dtype == x.dtype:
                _add(out, g, B_each, 1, scaling)
            else:
                out.add_(g @ B_each, alpha=scaling)
            kept += h, weight, matrix
        save(ctx, x, A, B, hybrid_A, hybrid_B, *kept)
        ctx.scaling, ctx.geometry, ctx.groups = scaling, geometry, [part.groups for part in laid_out]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, A, B, hybrid_A, hybrid_B, *kept = saved(ctx)
        factors, needed = Factors(A, B, hybrid_A, hybrid_B, ctx.scaling), ctx.needs_input_grad[1:-1]
        own_dy = dy if ctx.needs_input_grad[0] else None
        if torch.is_grad_enabled() or is_batched(dy):  # create_graph=True, is_grads_batched=True
            with torch.enable_grad():
                y = definition(x, factors, ctx.geometry)
            grads = differentiable([y], (x, *factors[:4]), needed, [dy.to(x.dtype)])
            return own_dy, *grads, None
        needs_x, needs_A, needs_B = needed[0], needed[1] or needed[3], needed[2] or needed[4]
        dx: Any = None
        dys, found = _matrices(_like(dy.to(x.dtype), kept[0])), []
        for n, groups in enumerate(ctx.groups):
            h, weight, matrix = kept[3 * n : 3 * n + 3]
            dA = dB = None
            if needs_B:
                dB = ctx.scaling * (_matrices(h).mT @ dys).sum(0)
            if needs_x or needs_A:
                dh = torch.empty_like(h)
                _add(_matrices(dh), dys, matrix.mT.expand(dys.shape[0], -1, -1), 0, ctx.scaling)
                part, dA, _ = _backward_of_convolution(
                    *(dh, x, weight, None, *ctx.geometry, False, [0] * (x.dim() - 2), groups),
                    [needs_x, needs_A, False],
                )
                dx = part if dx is None else dx.add_(part) if needs_x else None
            found.append((dA, dB))
        return own_dy, dx, *gradients_of_factors(found, factors, ctx.groups[0]), None


_backward_of_convolution: Any = torch.ops.aten.convolution_backward


def _add(out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
    """out = beta * out + alpha * a b, in place, by a product whose result lies row by row."""
    if out.stride(-1) != 1:
        out, a, b = out.mT, b.mT, a.mT
    out.baddbmm_(a, b, beta=beta, alpha=alpha)
