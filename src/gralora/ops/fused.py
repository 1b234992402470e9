"""An adapted linear layer, base and adapter together, in as few passes over memory as a plan allows.

The forward keeps only `x` and the exchanged sub-ranks `g`, with dropout also its seed, and where there are many
sub-ranks not even those (`Plan.keeps_g`); nothing of the size of `y` is made but `y`.

Both directions are the same three operations, because the exchange is its own mirror image:

    g  = down(x, A)          y  = x W^T + up(g, B)          dB = g^T dy, block by block
    dh = down(dy, B^T)       dx = dy W  + up(dh, A^T)       dA = x^T dh, block by block

The plain LoRA part of a hybrid adapter rides along as `h` more columns of every block of A and rows of B (`pack`):
where a grid's sub-ranks are exchanged, its columns are the same for all blocks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .interface import Conversion, FactorGradients
from .layout import chunks, contiguous_or_rows, rows
from .plans import Plan, falls_back, plan
from .reference import Factors
from .torch_seam import is_traced, unsafe_view
from .weights import Weight, dense


class Packed(NamedTuple):
    """Factors of grid and plain LoRA part in one pair.

    Attributes:
        A, B: `[k, I/k, R]` and `[k, R, O/k]` with R = r + h.
        h: rank of the plain LoRA part, the last columns of A and rows of B.
        scaling: factor on the adapter's output.
    """

    A: Tensor
    B: Tensor
    h: int
    scaling: float


def pack(factors: Factors) -> Packed:
    A, B, hybrid_A, hybrid_B, scaling = factors
    if factors.is_plain:
        return Packed(_grid(A), _grid(B), 0, scaling)
    if hybrid_A is None or hybrid_B is None:
        return Packed(A, B, 0, scaling)
    k = A.shape[0]
    tail_A = hybrid_A.unflatten(1, (k, A.shape[1])).permute(1, 2, 0)
    tail_B = hybrid_B.unflatten(0, (k, B.shape[2])).mT
    return Packed(torch.cat([A, tail_A], dim=2), torch.cat([B, tail_B], dim=1), hybrid_A.shape[0], scaling)


def unpack(dA: Tensor | None, dB: Tensor | None, h: int, is_plain: bool) -> list[Tensor | None]:
    """Gradients of packed factors -> those of A, B, hybrid_A and hybrid_B, or of a plain LoRA's A and B."""
    d_hybrid_A = d_hybrid_B = None
    if is_plain:
        return [None if d is None else _matrix(d) for d in (dA, dB)] + [None, None]
    if h and dA is not None:
        dA, tail = dA.split([dA.shape[2] - h, h], dim=2)
        d_hybrid_A = tail.permute(2, 0, 1).flatten(1)
    if h and dB is not None:
        dB, tail = dB.split([dB.shape[1] - h, h], dim=1)
        d_hybrid_B = tail.mT.flatten(0, 1)
    return [dA, dB, d_hybrid_A, d_hybrid_B]


def _grid(factor: Tensor) -> Tensor:
    """A plain LoRA's factor `[m, n]` as that of one block, `[1, n, m]`: by one call of torch, since each costs."""
    if is_traced(factor):
        return factor.mT.unsqueeze(0)
    (m, n), (stride_m, stride_n) = factor.shape, factor.stride()
    return factor.as_strided((1, n, m), (m * n, stride_n, stride_m))


def _matrix(grid: Tensor) -> Tensor:
    """The inverse of `_grid`."""
    if is_traced(grid):
        return grid.squeeze(0).mT
    (_, n, m), (_, stride_n, stride_m) = grid.shape, grid.stride()
    return grid.as_strided((m, n), (stride_m, stride_n))


def _gradient_of(factor: Tensor) -> Tensor:
    """Memory for a factor's gradient: contiguous, or transposed where a plain LoRA is, so that it is not copied."""
    if factor.is_contiguous() or factor.shape[0] == 1 and factor.stride()[1] == 1:
        return torch.empty_like(factor)  # half the time of new_empty
    return factor.new_empty(factor.shape)


class Needs(NamedTuple):
    """What a backward computes: the gradient of x, and those of (hybrid_)A and of (hybrid_)B."""

    x: bool
    A: bool
    B: bool

    @classmethod
    def of(cls, x: bool, A: bool, B: bool, hybrid_A: bool, hybrid_B: bool) -> "Needs":
        """From which of these need a gradient."""
        return cls(x, A or hybrid_A, B or hybrid_B)


def linear_down(x: Tensor, packed: Packed, p: float, seed: Tensor | None, how: Plan) -> tuple[Tensor, Tensor]:
    """Project down what the adapter sees of x, and convert B where the plan says so.

    Args:
        x: `[T, I]` with unit stride along I, or contiguous `[..., I]`.
        packed: the factors.
        p, seed: of dropout; seed is None without.
        how: the plan.

    Returns:
        g `[k, T, R]`, dtype of x; and B `[k, R, O/k]`.
    """
    A, B, h, scaling = packed
    convert = Conversion(B, torch.empty_like(B, dtype=x.dtype)) if how.converts_B else None
    x = x if seed is None else how.down.dropout(rows(x), p, seed)
    return how.down.down(x, A, h, scaling, convert), B if convert is None else convert.target


def linear_up(x: Tensor, seen: Tensor, weight: Weight, bias: Tensor | None, g: Tensor, B: Tensor, how: Plan) -> Tensor:
    """x W^T + bias + up(g, B), `[..., O]`.

    Args:
        x: `[..., I]`, any strides.
        seen: `contiguous_or_rows(x)`.
        weight, bias: of the base layer.
        g, B: as `linear_down` returns them.
        how: the plan.
    """
    if how.forward is not None:
        y = output(x, weight)
        how.forward.linear(y, seen, how.operand(weight, x.dtype), bias, g, B)
        return y
    # with a bias, what torch makes of more than two dimensions is a view
    y = torch.nn.functional.linear(seen if bias is None else rows(seen), dense(weight, x.dtype), bias)
    how.up.up(g, B, y)
    return y if y.dim() == x.dim() else unsafe_view(y, (*x.shape[:-1], y.shape[1]))


def output(x: Tensor, weight: Weight) -> Tensor:
    """Memory for y `[..., O]`."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Weight | None,
    factors: Factors,
    g: Tensor | None,
    p: float,
    seed: Tensor | None,
    needs: Needs,
    how: Plan,
    dx_before: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of x, A, B, hybrid_A and hybrid_B; None for those that are not needed.

    Args:
        dy: `[..., O]`, dtype of x, any strides.
        x: `[..., I]`, any strides.
        weight: `[O, I]`, or None if the base layer's part of dx is computed elsewhere.
        factors: of the layer.
        g: `[k, T, R]` from the forward; None to project x down again.
        p, seed: of dropout.
        needs: which gradients are needed.
        how: the forward's plan.
        dx_before: what the gradient of x is to be added to: contiguous, shape and dtype of x; changed, and returned.
    """
    shape, (A, B, h, scaling) = x.shape, pack(factors)
    dy, x = contiguous_or_rows(dy), contiguous_or_rows(x)
    if how.backward is not None and not how.backward.reads(dy):
        dy = dy.clone(memory_format=torch.contiguous_format)
    dA, dB = _gradient_of(A) if needs.A else None, _gradient_of(B) if needs.B else None
    seen = x  # by the adapter
    if seed is not None and (needs.A or g is None):
        seen = how.down.dropout(rows(x), p, seed)
    if g is None:
        g = how.down.down(seen, A, h, scaling)
    dh, A_up = g, A.mT
    if needs.x or needs.A:
        convert = Conversion(A_up, torch.empty_like(A_up, dtype=x.dtype)) if how.converts_A else None
        dh = how.down.down(dy, B.mT, h, scaling, convert)
        A_up = A_up if convert is None else convert.target
    dx = grown = None  # the gradient of x, and what is still to grow by the adapter's part of it
    is_done = False
    if needs.x and (seed is not None or weight is None):
        dx = x.new_empty(g.shape[1], shape[-1])
        chunks(dx, A.shape[0]).baddbmm_(dh, A_up.to(x.dtype), beta=0)
        dx = dx if seed is None else how.down.dropout(dx, p, seed)
        dx = dx if weight is None else dx.addmm_(rows(dy), dense(weight, x.dtype))
        dx = dx if dx_before is None else rows(dx_before).add_(dx)
    elif needs.x and weight is not None and how.backward is not None:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if dx_before is None else dx_before
        gradients = None
        if how.gradients_in_product and dA is not None and dB is not None:
            gradients, is_done = FactorGradients(x, g, dA, dB.mT), True
        adds = dx_before is not None
        how.backward.linear(dx, dy, how.operand(weight, x.dtype).t(), None, dh, A_up, gradients, adds)
    elif needs.x and weight is not None:
        if dx_before is None:
            dx = dy @ dense(weight, x.dtype)
        else:
            dx = rows(dx_before).addmm_(rows(dy), dense(weight, x.dtype))
        if how.gradients is how.up:
            grown = dx  # in the launch that computes the gradients of A and B
        else:
            how.up.up(dh, A_up, dx)
    if not is_done:
        how.gradients.factor_gradients(seen, dy, g, dh, dA, dB, A, grown)
    dx = dx if dx is None or dx.dim() == len(shape) else dx.view(shape)
    return [dx, *unpack(dA, dB, h, factors.is_plain)]


@falls_back
def linear(
    x: Tensor, weight: Weight, bias: Tensor | None, factors: Factors, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Plan and compute y `[..., O]`; also returns g `[k, T, R]` for the backward.

    Args:
        x: `[..., I]`, any strides.
        weight, bias: `[O, I]`, and `[O]` or None; dtype of x.
        factors: of any float dtype.
        p, seed: of dropout; seed is None without.
    """
    packed, seen = pack(factors), contiguous_or_rows(x)
    how = plan(seen, weight, packed.A, packed.B, packed.h, p)
    g, B = linear_down(seen, packed, p, seed, how)
    return linear_up(x, seen, weight, bias, g, B, how), g


@falls_back
def adapted(x: Tensor, weight: Weight, bias: Tensor | None, g: Tensor, B: Tensor) -> Tensor:
    """Plan and compute x W^T + bias + up(g, B), `[..., O]`: x of any strides, B `[k, R, O/k]` of any float dtype."""
    seen = contiguous_or_rows(x)
    how = plan(seen, weight, None, B)
    return linear_up(x, seen, weight, bias, g, B.to(x.dtype) if how.converts_B else B, how)


@falls_back
def add_update(y: Tensor, x: Tensor, factors: Factors, p: float, seed: Tensor | None) -> tuple[Tensor, Plan]:
    """Plan, and add the adapter's output to y `[..., O]`, contiguous, any float dtype.

    Returns:
        g `[k, T, R]`, and the plan, for the backward.
    """
    packed, seen = pack(factors), contiguous_or_rows(x)
    how = plan(seen, None, packed.A, packed.B, packed.h, p)
    g, B = linear_down(seen, packed, p, seed, how)
    how.up.up(g, B, y)
    return g, how


@falls_back
def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Weight | None,
    factors: Factors,
    g: Tensor | None,
    p: float,
    seed: Tensor | None,
    needs: Needs,
) -> list[Tensor | None]:
    """`linear_backward` with a plan of its own."""
    packed = pack(factors)
    how = plan(contiguous_or_rows(x), weight, packed.A, packed.B, packed.h, p)
    return linear_backward(dy, x, weight, factors, g, p, seed, needs, how)
