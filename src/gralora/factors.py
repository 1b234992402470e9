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
        # transposed to contiguous memory first, since torch does that faster than a strided copy
        A_lora[:, i, :, i] = A[i].T.contiguous().unflatten(0, (k, q))  # [k_j, q, I/k]
        B_lora[i, :, i] = B[i].T.contiguous().unflatten(1, (k, q))  # [O/k, k_i, q]
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
    return (A_lora, B_lora) if rank is None else pad_lora(A_lora, B_lora, rank)


def pad_lora(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A plain LoRA, `[R, I]` and `[O, R]`, with zeros up to `rank`, which is at least R; itself if R is `rank`."""
    padding = rank - A.shape[0]
    if padding == 0:
        return A, B
    return torch.nn.functional.pad(A, (0, 0, 0, padding)), torch.nn.functional.pad(B, (0, padding))


def pad_grid(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of a grid, `[k, I/k, r]` and `[k, r, O/k]`, with zeros up to a rank that is at least r: the same dW.

    Args:
        A, B: grid factors.
        rank: of the result, divisible by k: every block gets as many zeros, at the end of its sub-rank.
    """
    k, padding = A.shape[0], (rank - A.shape[2]) // A.shape[0]
    A = torch.nn.functional.pad(A.unflatten(2, (k, -1)), (0, padding)).flatten(2)
    B = torch.nn.functional.pad(B.unflatten(1, (k, -1)), (0, 0, 0, padding)).flatten(1, 2)
    return A, B


def compact_lora(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrite a plain LoRA whose rank exceeds min(I, O) with rank min(I, O). Use it where the rank is limited.

    `B' @ A' == B @ A` up to one rounding: the factor on the narrow side becomes square by a QR decomposition, computed
    in float64. A pair that is not wider than its matrix comes back unchanged.

    Args:
        A, B: `[R, I]` and `[O, R]`.

    Returns:
        `[min(R, I, O), I]` and `[O, min(R, I, O)]`, in the dtype of `A`.
    """
    rank, in_features, out_features = A.shape[0], A.shape[1], B.shape[0]
    if rank <= min(in_features, out_features):
        return A, B
    if out_features <= in_features:
        Q, R = torch.linalg.qr(B.double().T)  # B = R^T Q^T with R^T [O, O]
        return (Q.T @ A.double()).to(A.dtype), R.T.to(B.dtype)
    Q, R = torch.linalg.qr(A.double())  # A = Q R with R [I, I]
    return R.to(A.dtype), (B.double() @ Q).to(B.dtype)


def truncate_lora(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of a plain LoRA by one of lower rank, from an SVD of R x R, never of dW. Lossy.

    Args:
        A, B: `[R, I]` and `[O, R]`.
        rank: of the result.

    Returns:
        `[rank, I]` and `[O, rank]` in the dtype of `A`, each with half of the singular values, and all singular values
        of `B @ A`, descending, float64: the error's Frobenius norm is that of the values from `rank` on.
    """
    Q_A, R_A = torch.linalg.qr(A.double().T)
    Q_B, R_B = torch.linalg.qr(B.double())
    U, values, V = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    kept = values[:rank].sqrt()
    A_new, B_new = kept[:, None] * (V[:rank] @ Q_A.T), (Q_B @ U[:, :rank]) * kept
    return A_new.to(A.dtype).contiguous(), B_new.to(B.dtype).contiguous(), values


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """The R singular values of `B @ A`, descending, float64, from the factors' Gram matrices.

    That is several times faster than QR decompositions, and the error is some 1e-8 of the largest value: right for
    norms and numerical ranks, not for values far below the largest.

    Args:
        A, B: `[R, I]` and `[O, R]`.
    """
    A, B = A.double(), B.double()
    values, vectors = torch.linalg.eigh(A @ A.T)
    root = vectors * values.clamp(min=0).sqrt()  # root root^T = A A^T, so |B A|^2 has the spectrum of |B root|^2
    return torch.linalg.eigvalsh(root.T @ (B.T @ B) @ root).clamp(min=0).sqrt().flip(0)


def block_norms(A: Tensor, B: Tensor) -> Tensor:
    """Frobenius norms of the k x k blocks of a grid's dW, `[k, k]` (output block, input block), float64.

    Args:
        A, B: grid factors, `[k, I/k, r]` and `[k, r, O/k]`.
    """
    k, q = A.shape[0], A.shape[2] // A.shape[0]
    A_blocks = A.double().unflatten(2, (k, q)).permute(2, 0, 3, 1)  # [k_j, k_i, q, I/k]
    B_blocks = B.double().unflatten(1, (k, q))  # [k_j, k_i, q, O/k]
    gram_A, gram_B = A_blocks @ A_blocks.mT, B_blocks @ B_blocks.mT  # [k_j, k_i, q, q]; |b^T a|^2 = <b b^T, a a^T>
    return (gram_A * gram_B).sum((-2, -1)).clamp(min=0).sqrt()
