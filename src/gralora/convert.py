"""Factors in, factors out: the same update written in another layout. Pure functions of tensors, no PEFT."""

import torch
from torch import Tensor


def grid_to_lora(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Write the factors of a grid as those of a plain LoRA. Use it where only plain LoRA is supported.

    Exact: entries are copied, none is computed. `B_lora @ A_lora == reference.delta_weight(A, B)`.

    Args:
        A: down-projections, `[k, I/k, r]`.
        B: up-projections, `[k, r, O/k]`.

    Returns:
        `A_lora` `[k * r, I]` and `B_lora` `[O, k * r]`; all but 1/k of the entries of each are zero. Their rank
        dimension is ordered as the exchanged sub-ranks: output block, input block, rank within the block.
    """
    k, chunk_in, r = A.shape
    chunk_out, q = B.shape[2], r // k
    A_lora = A.new_zeros(k, k, q, k, chunk_in)
    B_lora = B.new_zeros(k, chunk_out, k, k, q)
    for i in range(k):
        A_lora[:, i, :, i] = A[i].unflatten(1, (k, q)).permute(1, 2, 0)  # [k_j, q, I/k]
        B_lora[i, :, i] = B[i].unflatten(0, (k, q)).permute(2, 0, 1)  # [O/k, k_i, q]
    return A_lora.reshape(k * r, k * chunk_in), B_lora.reshape(k * chunk_out, k * r)


def hybrid_to_lora(
    A: Tensor, B: Tensor, hybrid_A: Tensor | None, hybrid_B: Tensor | None, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """`grid_to_lora` with the plain LoRA part appended, and zeros up to `rank` if it is given.

    Args:
        A, B: grid factors, `[k, I/k, r_g]` and `[k, r_g, O/k]`.
        hybrid_A, hybrid_B: plain part, `[hybrid_r, I]` and `[O, hybrid_r]`, or None.
        rank: total rank of the result, at least `k * r_g + hybrid_r`.

    Returns:
        `A_lora` `[rank, I]` and `B_lora` `[O, rank]`.
    """
    A_lora, B_lora = grid_to_lora(A, B)
    if hybrid_A is not None and hybrid_B is not None:
        A_lora, B_lora = torch.cat([A_lora, hybrid_A]), torch.cat([B_lora, hybrid_B], dim=1)
    padding = 0 if rank is None else rank - A_lora.shape[0]
    return torch.nn.functional.pad(A_lora, (0, 0, 0, padding)), torch.nn.functional.pad(B_lora, (0, padding))
