"""An adapted convolution: the base layer's output, to which the adapter's is added in place.

Letters beside those of `reference`: `P` the sizes of the kernel, `S` those of the output. A is `[k, I/k, *P, r]`:
chunk i of the channels is convolved with A_i, the sub-ranks are exchanged at every position, and B_j is a 1x1
convolution.

Both are torch's own convolutions, and so are their gradients: an autograd function in Python would cost the host as
much. The sub-ranks need no exchange of their own, since B is laid out with its columns in the order in which
the first convolution leaves them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import Factors

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
        y: `[N, O, *S]`, any float dtype, no leaf that requires gradients, kept by nobody; changed.
        x: `[N, I, *space]`, the dtype that is computed in.
        factors: A `[k, I/k, *P, r]`, B `[k, r, O/k]`, hybrid_A `[h, I, *P]` and hybrid_B `[O, h]`, any float dtype.
        geometry: of the layer.
    """
    each = Geometry((1,) * (x.dim() - 2), (0,) * (x.dim() - 2), (1,) * (x.dim() - 2))
    for A, B, groups in parts(factors, x.dtype):
        z = convolve(convolve(x, A, geometry, groups), B, each)
        if y.dtype == z.dtype:
            y.add_(z, alpha=factors.scaling)
        else:
            y.add_(z * factors.scaling)  # else its gradient would be scaled in y's dtype
    return y


class Part(NamedTuple):
    """Two convolutions, one after the other, that are an adapter or a part that is added to others.

    Attributes:
        A: weight of the first, `[C, I/groups, *P]`.
        B: weight of the second, `[O, C, 1, ...]`.
        groups: of the first.
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
    k, chunk, *P, r = A.shape
    ups = _weight_of_B(B.to(dtype), len(P))
    if hybrid_A is not None and hybrid_B is not None:
        hybrid_A, hybrid_B = hybrid_A.to(dtype), hybrid_B.to(dtype)[(..., *[None] * len(P))]
    if k == 1 or is_grouped(factors):
        found = [Part(A.to(dtype).movedim(-1, 1).flatten(0, 1), ups, k)]
        if hybrid_A is not None and hybrid_B is not None:
            found.append(Part(hybrid_A, hybrid_B, 1))
        return found
    blocks = A.to(dtype).permute(-1, *range(1, A.dim() - 1), 0)  # [r, I/k, *P, k]
    downs = torch.diag_embed(blocks, dim1=0, dim2=2).reshape(k * r, k * chunk, *P)
    if hybrid_A is not None and hybrid_B is not None:
        downs, ups = torch.cat([downs, hybrid_A]), torch.cat([ups, hybrid_B], 1)
    return [Part(downs, ups, 1)]


def _weight_of_B(B: Tensor, dims: int) -> Tensor:
    """The exchange of sub-ranks and B as the weight of a 1x1 convolution: `[k, r, O/k]` -> `[O, k * r, 1, ...]`.

    Its columns are in the order in which A leaves the sub-ranks, block by block of A, and zero but for one block of B.
    """
    k, r, n = B.shape
    blocks = B.reshape(k, k, r // k, n).permute(3, 1, 2, 0)  # [O/k, k_i, q, k_j]
    return torch.diag_embed(blocks, dim1=0, dim2=3).reshape(k * n, k * r, *[1] * dims)
