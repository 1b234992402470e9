"""An adapted embedding: the base layer's output and the adapter's.

Letters beside those of `reference`: `V` is the number of ids, in k chunks of V/k. A is `[r, k, V/k]` and B
`[k, O/k, r]`; of the r ranks the first h are the plain LoRA. What A has for an id of chunk i is its column; the j-th
sub-rank of the grid's part of it goes to place i of output block j, and all other places are zero.

All of it are torch's operations, and so are the gradients: an autograd function in Python would cost the host more
than it saves.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding


class Lookup(NamedTuple):
    """What an adapter of an embedding is beside its two factors.

    Attributes:
        h: rank of the plain LoRA.
        scaling: factor on the output.
        factor: a tensor of one element that the output is multiplied by, too, or None.
        padding_idx: an id whose column of A gets no gradient, or None.
        scale_grad_by_freq: whether gradients of A are divided by how often their id occurs, as nn.Embedding's are.
    """

    h: int
    scaling: float
    factor: Tensor | None
    padding_idx: int | None
    scale_grad_by_freq: bool


def embedding_update(
    y: Tensor, ids: Tensor, A: Tensor, B: Tensor, lookup: Lookup, dtype: torch.dtype | None = None
) -> Tensor:
    """y and the adapter's output, `[..., O]` in y's dtype; differentiable in y and the factors.

    Args:
        y: `[..., O]`, any float dtype.
        ids: `[...]`, int64 or int32.
        A, B: `[r, k, V/k]` and `[k, O/k, r]`, any float dtype.
        lookup: the rest of the adapter.
        dtype: that is computed in [that of A].
    """
    z = _unscaled(ids.reshape(-1), A, B, lookup, dtype or A.dtype)
    blocks = y.view(z.shape)
    if y.dtype == z.dtype:
        return torch.add(blocks, z, alpha=lookup.scaling).view_as(y)
    return (blocks + z * lookup.scaling).to(y.dtype).view_as(y)


def embedding_output(ids: Tensor, A: Tensor, B: Tensor, lookup: Lookup) -> Tensor:
    """The adapter's output alone, `[..., O]` in A's dtype; arguments as in `embedding_update`."""
    z = _unscaled(ids.reshape(-1), A, B, lookup, A.dtype) * lookup.scaling
    return z.reshape(*ids.shape, B.shape[0] * B.shape[1])


def _unscaled(ids: Tensor, A: Tensor, B: Tensor, lookup: Lookup, dtype: torch.dtype) -> Tensor:
    """The adapter's output for ids `[T]` before scaling, by output blocks: `[T, k, O/k]`."""
    (r, k, chunk), h = A.shape, lookup.h
    table, by_freq = A.flatten(1).t(), lookup.scale_grad_by_freq
    found = embedding(ids, table, lookup.padding_idx, scale_grad_by_freq=by_freq).to(dtype)
    if lookup.factor is not None:
        found = found * lookup.factor.to(dtype)
    ups = B.mT.to(dtype)
    if k == 1:
        return (found @ ups[0]).unsqueeze(1)
    plain, grid = found.split([h, r - h], 1) if h else (None, found)
    place = (ids // chunk).unsqueeze(1) == torch.arange(k, device=ids.device)  # [T, k_i]
    parts = grid.reshape(len(ids), k, 1, (r - h) // k)  # [T, k_j, 1, q]
    g = torch.where(place.view(-1, 1, k, 1), parts, 0).flatten(2).transpose(0, 1)  # [k_j, T, k_i * q]
    if plain is not None:
        g = torch.cat([plain.expand(k, -1, -1), g], 2)
    return torch.bmm(g, ups).transpose(0, 1)
