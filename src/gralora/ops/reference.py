"""The definition of GraLoRA in plain torch: the oracle that every faster implementation is tested against.

Legend, used in all of `gralora.ops`: `I`/`O` input/output features, `k` blocks per side, `r` rank of the grid,
`q = r // k` rank of one block (a sub-rank), `h` rank of the plain LoRA part, `R = r + h`, `T` tokens, `...` any batch
dimensions. Factors: A `[k, I/k, r]`, B `[k, r, O/k]`; plain part A_s `[h, I]`, B_s `[O, h]`. What A gives, after the
exchange of sub-ranks, is `g`; gradients are `dx`, `dy`, `dA`, `dB`, and `dh` is what B^T gives of dy.

Source: GraLoRA, arXiv 2505.20355, section 3; the tensors are laid out as in `peft.tuners.gralora`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The tensors of one adapter of one layer as a linear map, and its scaling.

    The factors of experts have one more dimension, `E`, in front; the functions of `gralora.ops` take none of those.

    Attributes:
        A, B: of the grid, `[k, I/k, r]` and `[k, r, O/k]`; or of a plain LoRA, PEFT's `[r, I]` and `[O, r]`.
        hybrid_A, hybrid_B: of the plain LoRA part, `[h, I]` and `[O, h]`; both None for a pure GraLoRA.
        scaling: factor on the adapter's output, the gain of `gralora_scaling` included.
    """

    A: Tensor
    B: Tensor
    hybrid_A: Tensor | None = None
    hybrid_B: Tensor | None = None
    scaling: Any = 1.0  # a number; a tensor in layers that are prepared for hotswapping

    @property
    def is_plain(self) -> bool:
        """Whether these are the factors of a plain LoRA, in PEFT's layout."""
        return self.A.dim() == 2

    def as_grid(self) -> "Factors":
        """These factors; a plain LoRA's as those of the grid of one block that it is, in views."""
        A, B, hybrid_A, hybrid_B, scaling = self
        return Factors(A.mT.unsqueeze(0), B.mT.unsqueeze(0), hybrid_A, hybrid_B, scaling) if A.dim() == 2 else self


def down(x: Tensor, A: Tensor) -> Tensor:
    """Project every input chunk down and exchange the sub-ranks.

    Chunk i of `x` gives h_i = x_i A_i; the j-th `q` columns of h_i go to output block j, at place i.

    Args:
        x: input, `[..., I]`.
        A: down-projections, `[k, I/k, r]`, dtype of `x`.

    Returns:
        g, `[..., k * r]`: for each output block j the `r` values g_j = concat over i of h_i[j].
    """
    k, _, r = A.shape
    h = torch.einsum("...ki,kir->...kr", x.unflatten(-1, (k, -1)), A)
    return h.unflatten(-1, (k, r // k)).transpose(-3, -2).flatten(-3)


def up(g: Tensor, B: Tensor) -> Tensor:
    """Project the exchanged sub-ranks of every output block up: y_j = g_j B_j.

    Args:
        g: exchanged sub-ranks, `[..., k * r]`, as `down` returns them.
        B: up-projections, `[k, r, O/k]`, dtype of `g`.

    Returns:
        y, `[..., O]`.
    """
    k, r, _ = B.shape
    return torch.einsum("...kr,kro->...ko", g.unflatten(-1, (k, r)), B).flatten(-2)


def delta_weight(A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """The weight update of the grid, dW, for which `scaling * up(down(x, A), B) == x @ dW.T`.

    Block (j, i) of dW is (A_i[:, j] B_j[i])^T with A_i[:, j] the j-th `q` columns of A_i and B_j[i] the i-th `q`
    rows of B_j: all k x k blocks are filled; only the two factors are block-diagonal.

    Args:
        A: down-projections, `[k, I/k, r]`.
        B: up-projections, `[k, r, O/k]`, dtype and device of `A`.
        scaling: factor on dW.

    Returns:
        dW, `[O, I]`, dtype of `A`.
    """
    k, chunk_in, r = A.shape
    chunk_out, q = B.shape[2], r // k
    dW = A.new_empty(k * chunk_out, k * chunk_in)
    A_blocks = A.unflatten(2, (k, q)).permute(2, 0, 3, 1)  # [k_j, k_i, q, I/k]
    B_blocks = B.unflatten(1, (k, q)).transpose(2, 3)  # [k_j, k_i, O/k, q]
    grid = dW.unflatten(0, (k, chunk_out)).unflatten(2, (k, chunk_in)).permute(0, 2, 1, 3)  # [k_j, k_i, O/k, I/k]
    for j in range(k):
        grid[j].baddbmm_(B_blocks[j], A_blocks[j], beta=0, alpha=scaling)  # written in place, nothing is copied
    return dW


def update(x: Tensor, factors: Factors) -> Tensor:
    """The adapter's output, scaling * (up(down(x, A), B) + x A_s^T B_s^T): `[..., I]` -> `[..., O]`."""
    A, B, hybrid_A, hybrid_B, scaling = factors.as_grid()
    y = up(down(x, A), B)
    if hybrid_A is not None and hybrid_B is not None:
        y = y + torch.nn.functional.linear(torch.nn.functional.linear(x, hybrid_A), hybrid_B)
    return scaling * y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, kept: Tensor | None = None) -> Tensor:
    """The adapted layer, x W^T + bias + update(x * kept): `[..., I]` -> `[..., O]`.

    Args:
        x: `[..., I]`.
        weight, bias: of the base layer, `[O, I]`, and `[O]` or None.
        factors: dtype of x.
        kept: what dropout multiplies x with before the adapter sees it, 0 or 1/(1-p), shape of x; None is 1.
    """
    return torch.nn.functional.linear(x, weight, bias) + update(x if kept is None else x * kept, factors)
