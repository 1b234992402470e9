"""An adapted embedding: the base layer's output, to which the adapter's is added in place.

Letters beside those of `reference`: `V` is the number of ids, in k chunks of V/k. A is `[r, k, V/k]` and B
`[k, O/k, r]`; of the r ranks the first h are the plain LoRA. What A has for an id of chunk i is its column; the j-th
sub-rank of the grid's part of it goes to place i of output block j, and all other places are zero.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .autograd import differentiable
from .layout import chunks, rows
from .saved import save, saved
from .torch_seam import is_batched


class Lookup(NamedTuple):
    """What an adapter of an embedding is beside its two factors.

    Attributes:
        h: rank of the plain LoRA.
        scaling: factor on the output.
        factor: a tensor of one element that the output is multiplied by, too, or None.
        padding_idx: an id whose column of A gets no gradient, or -1.
        scale_grad_by_freq: whether gradients of A are divided by how often their id occurs, as nn.Embedding's are.
    """

    h: int
    scaling: float
    factor: Tensor | None
    padding_idx: int
    scale_grad_by_freq: bool


def embedding_update(
    y: Tensor, ids: Tensor, A: Tensor, B: Tensor, lookup: Lookup, dtype: torch.dtype | None = None
) -> Tensor:
    """Add the adapter's output to y in place; differentiable in y and the factors.

    Args:
        y: `[..., O]`, contiguous, any float dtype, no leaf that requires gradients; changed.
        ids: `[...]`, int64 or int32.
        A, B: `[r, k, V/k]` and `[k, O/k, r]`, any float dtype.
        lookup: the rest of the adapter.
        dtype: that is computed in [that of A].
    """
    return EmbeddingUpdateFunction.apply(y, ids, A, B, lookup, dtype or A.dtype)


def definition(ids: Tensor, A: Tensor, B: Tensor, lookup: Lookup) -> Tensor:
    """The adapter's output, `[..., O]`, scaling included."""
    (r, k, chunk), h = A.shape, lookup.h
    padding = None if lookup.padding_idx < 0 else lookup.padding_idx
    found = torch.nn.functional.embedding(ids, A.flatten(1).T, padding, scale_grad_by_freq=lookup.scale_grad_by_freq)
    plain, grid = found.split([h, r - h], dim=-1)
    place = (ids // chunk).unsqueeze(-1) == torch.arange(k, device=ids.device)  # [..., k_i]
    g = grid.unflatten(-1, (k, 1, -1)) * place.unsqueeze(-1).unsqueeze(-3)  # [..., k_j, k_i, q]
    y = reference.up(g.flatten(-3), B[..., h:].transpose(-2, -1))
    if h:
        y = y + torch.nn.functional.linear(plain, B[..., :h].flatten(0, 1))
    return y * lookup.scaling * (1 if lookup.factor is None else lookup.factor.to(y.dtype))


class EmbeddingUpdateFunction(torch.autograd.Function):
    """Compute what `embedding_update` says; the gradient of y is that of the result."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, ids: Tensor, A: Tensor, B: Tensor, lookup: Lookup, dtype: torch.dtype) -> Tensor:
        ctx.mark_dirty(y)
        flat, (_, k, chunk) = ids.reshape(-1), A.shape
        found = A.flatten(1).index_select(1, flat).to(dtype)  # [r, T]
        if lookup.factor is not None:
            found = found * lookup.factor.to(dtype)
        out, matrix = chunks(rows(y), k), B.mT.to(dtype)  # [k, T, O/k], [k, r, O/k]
        g = _placed(found, flat // chunk, k, lookup.h)  # [k, T, r]
        if y.dtype == dtype:
            out.baddbmm_(g, matrix, alpha=lookup.scaling)
        else:
            out.add_(torch.bmm(g, matrix), alpha=lookup.scaling)
        save(ctx, ids, A, B, g)
        ctx.lookup = lookup
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        ids, A, B, g = saved(ctx)
        lookup, needed = ctx.lookup, ctx.needs_input_grad[2:4]
        own_dy = dy if ctx.needs_input_grad[0] else None
        if torch.is_grad_enabled() or is_batched(dy):  # create_graph=True, is_grads_batched=True
            with torch.enable_grad():
                y = definition(ids, A, B, lookup)
            return own_dy, None, *differentiable([y], (A, B), needed, [dy.to(y.dtype)]), None, None
        h, scaling, factor, padding_idx, scale_grad_by_freq = lookup
        flat, (r, k, chunk), dA, dB = ids.reshape(-1), A.shape, None, None
        dy = rows(dy.to(g.dtype))
        dys = chunks(dy, k)
        if needed[1]:
            dB = g.new_empty(B.shape).baddbmm_(dys.mT, g, beta=0, alpha=scaling).to(B.dtype)
        if needed[0]:
            matrix = B.to(g.dtype)
            dg = dys.new_empty(k, len(flat), r - h).baddbmm_(dys, matrix[..., h:], beta=0, alpha=scaling)
            places = (flat // chunk).view(-1, 1, 1, 1).expand(-1, k, 1, (r - h) // k)
            d_found = dg.unflatten(2, (k, -1)).transpose(0, 1).gather(2, places).flatten(1)  # [T, r - h]
            if h:
                plain = dy.new_empty(len(dy), h).addmm_(dy, matrix[..., :h].flatten(0, 1), beta=0, alpha=scaling)
                d_found = torch.cat([plain, d_found], dim=1)
            d_found = d_found if factor is None else d_found * factor.to(d_found.dtype)
            options = k * chunk, padding_idx, scale_grad_by_freq
            dA = torch.ops.aten.embedding_dense_backward(d_found.to(A.dtype), flat, *options)
            dA = dA.T.unflatten(1, (k, chunk))
        return own_dy, None, dA, dB, None, None


def _placed(found: Tensor, place: Tensor, k: int, h: int) -> Tensor:
    """g `[k, T, r]` of what A has for T ids, `[r, T]`, whose chunks are `place` `[T]`: plain ranks first, as in B."""
    r, T = found.shape
    if k == 1:
        return found.T.unsqueeze(0)
    g = found.new_zeros(k, T, r)
    if h:
        g[..., :h] = found[:h].T
    places = place.view(1, -1, 1, 1).expand(k, -1, 1, (r - h) // k)
    g[..., h:].unflatten(2, (k, -1)).scatter_(2, places, found[h:].unflatten(0, (k, -1)).mT.unsqueeze(2))
    return g
