"""An adapted linear layer, base and adapter together, in as few passes over memory as torch's own kernels allow.

The forward keeps only `x` and the exchanged sub-ranks `g`, with dropout also its seed; nothing of the size of `y` is
made but `y`. Chunks of x and
y are strided views, [k, T, I/k] and [k, T, O/k], that batched matrix products read and write in place.

Both directions are the same three operations, because the exchange is its own mirror image:

    g  = down(x, A)          y  = x W^T + up(g, B)          dB = g^T dy, block by block
    dh = down(dy, B^T)       dx = dy W  + up(dh, A^T)       dA = x^T dh, block by block

The plain LoRA part of a hybrid adapter rides along as `h` more columns of every block of A and rows of B (`pack`):
where a grid's sub-ranks are exchanged, its columns are the same for all blocks.
"""

import torch
from torch import Tensor

from . import dispatch
from .dropout import dropout

Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

_BMM_WIDENS = torch.__version__ >= (2, 8)  # bmm(out_dtype=): a float32 result without a pass to convert it


def chunks(x: Tensor, k: int) -> Tensor:
    """View `[T, n]` as `[k, T, n/k]`."""
    n, (stride_t, stride_n) = x.shape[1] // k, x.stride()
    return x.as_strided((k, x.shape[0], n), (n * stride_n, stride_t, stride_n))


def exchange(h: Tensor) -> Tensor:
    """`[k_i, T, r]` -> `[k_j, T, r]`: block i's j-th sub-rank becomes block j's i-th. h is contiguous."""
    k, T, r = h.shape
    q = r // k
    return h if k == 1 else h.as_strided((k, T, k, q), (q, r, T * r, 1)).contiguous().view(k, T, r)


def pack(A: Tensor, B: Tensor, hybrid_A: Tensor | None, hybrid_B: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Grid and hybrid factors as one pair `[k, I/k, R]`, `[k, R, O/k]` with R = r + h; and h."""
    if hybrid_A is None or hybrid_B is None:
        return A, B, 0
    k = A.shape[0]
    tail_A = hybrid_A.unflatten(1, (k, A.shape[1])).permute(1, 2, 0)
    tail_B = hybrid_B.unflatten(0, (k, B.shape[2])).mT
    return torch.cat([A, tail_A], dim=2), torch.cat([B, tail_B], dim=1), hybrid_A.shape[0]


def down(x: Tensor, A: Tensor, hybrid_r: int, scaling: float) -> Tensor:
    """Exchanged sub-ranks, times `scaling`: x `[T, I]`, A `[k, I/k, R]` -> g `[k, T, R]`, dtype of x."""
    k, T, r = A.shape[0], x.shape[0], A.shape[2] - hybrid_r
    kernels = dispatch.factor_kernels(x)
    if kernels is not None:
        g = x.new_empty(k, T, r + hybrid_r)
        if not hybrid_r:
            kernels.down(x, A, scaling, g)
            return g
        kernels.down(x, A[..., :r], scaling, g[..., :r])
        g[..., r:] = scaling * (x @ A[..., r:].flatten(0, 1).to(x.dtype))
        return g
    A = A.to(x.dtype)
    grid = A[..., :r] if hybrid_r else A
    g = exchange(x.new_empty(k, T, r).baddbmm_(chunks(x, k), grid, beta=0, alpha=scaling))
    if not hybrid_r:
        return g
    return torch.cat([g, (scaling * (x @ A[..., r:].flatten(0, 1))).expand(k, -1, -1)], dim=2)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    hybrid_r: int,
    scaling: float,
    g: Tensor | None = None,
    gradients: Gradients | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x W^T + bias + up(g, B) `[T, O]`, and g = down(x, A) unless it is given.

    Args:
        x: `[T, I]`.
        weight, bias: `[O, I]`, and `[O]` or None.
        A, B, hybrid_r, scaling: see `pack` and `down`.
        g: `[k, T, R]`.
        gradients: `(z, h, z_grad, x_grad)`, to be computed in the same launch if possible: `factor_grad` of z `[T, O]`
            and g to z_grad, of x and h to x_grad; None for a result that is not wanted.
    """
    matmul = dispatch.linear_kernel(x, weight, B)
    if g is None:
        makes_g = matmul is not None and not hybrid_r and matmul.makes_g(A)
        g = x.new_empty(A.shape[0], x.shape[0], A.shape[2]) if makes_g else down(x, A, hybrid_r, scaling)
    else:
        makes_g = False
    if matmul is not None:
        along = gradients is not None and all(t is not None for t in gradients) and matmul.readable(gradients[0])
        A, B = _cast(A, B, x.dtype) if makes_g else (None, B.to(x.dtype))
        y = matmul.linear(x, weight, bias, g, B, A, scaling, gradients if along else None)
        gradients = None if along else gradients
    elif bias is None and x.is_cuda and x.numel() >= dispatch.MIN_SIZE:
        # the product with W reads the adapter's output while it multiplies: cheaper than a pass of its own
        y = x.new_empty(x.shape[0], weight.shape[0])
        chunks(y, B.shape[0]).baddbmm_(g, B.to(x.dtype), beta=0)
        y.addmm_(x, weight.t())
    else:
        y = add_up(torch.nn.functional.linear(x, weight, bias), g, B)
    if gradients is not None:
        z, h, z_grad, x_grad = gradients
        factor_grad(z, g, z_grad)
        factor_grad(x, h, x_grad)
    return y, g


def add_up(y: Tensor, g: Tensor, B: Tensor) -> Tensor:
    """y + up(g, B), in place: y `[T, O]` of any dtype, g `[k, T, R]`, B `[k, R, O/k]`; computed in the dtype of g."""
    kernels = dispatch.factor_kernels(y, g.dtype) if y.numel() < dispatch.MIN_SIZE else None
    if kernels is not None:
        kernels.up(g, B, y)
    elif y.dtype == g.dtype:
        chunks(y, B.shape[0]).baddbmm_(g, B.to(g.dtype))
    else:
        chunks(y, B.shape[0]).add_(torch.bmm(g, B.to(g.dtype)))
    return y


def factor_grad(x: Tensor, h: Tensor, out: Tensor | None) -> None:
    """x_i^T h_i, block by block, to `out`, if that is no None.

    Args:
        x: `[T, n]`.
        h: `[k, T, R]`, contiguous, dtype of x.
        out: `[k, n/k, R]`, any float dtype, contiguous or the transpose of a contiguous `[k, R, n/k]`.
    """
    if out is None:
        return
    kernels = dispatch.factor_kernels(x) if h.shape[1] <= dispatch.FEW_TOKENS else None
    if kernels is not None:
        kernels.factor_grad(x, h, out)
        return
    a, b = chunks(x, h.shape[0]).mT, h
    if not out.is_contiguous():
        a, b, out = b.mT, a.mT, out.mT
    if out.dtype == x.dtype:
        torch.bmm(a, b, out=out)
    elif x.is_cuda and out.dtype == torch.float32 and _BMM_WIDENS:
        torch.bmm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.bmm(a, b))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    hybrid_A: Tensor | None,
    hybrid_B: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y `[..., O]`, and the exchanged sub-ranks g `[k, T, R]` for the backward. Factors are cast to the dtype of x."""
    A, B, hybrid_r = pack(A, B, hybrid_A, hybrid_B)
    rows = _rows(x)
    g = None if seed is None else down(dropout(rows, p, seed), A, hybrid_r, scaling)
    y, g = linear(rows, weight, bias, A, B, hybrid_r, scaling, g)
    # as matmul does: to autograd y is no view, so that callers may change it in place
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])), g


def add_update(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    hybrid_A: Tensor | None,
    hybrid_B: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    """Add the adapter's output to y `[..., O]`, contiguous, any dtype; returns g `[k, T, R]` for the backward."""
    A, B, hybrid_r = pack(A, B, hybrid_A, hybrid_B)
    rows = _rows(x)
    g = down(rows if seed is None else dropout(rows, p, seed), A, hybrid_r, scaling)
    add_up(y.view(-1, y.shape[-1]), g, B)
    return g


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    hybrid_A: Tensor | None,
    hybrid_B: Tensor | None,
    g: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> list[Tensor | None]:
    """Gradients of x, A, B, hybrid_A and hybrid_B; that of x without the base's part if weight is None.

    `needs` says which of those of x, of (hybrid_)A and of (hybrid_)B; the others are None.
    """
    needs_x, needs_A, needs_B = needs
    dtype_A, dtype_B = A.dtype, B.dtype
    A, B, hybrid_r = pack(A, B, hybrid_A, hybrid_B)
    k, r, shape = A.shape[0], A.shape[2] - hybrid_r, x.shape
    dy, x = _rows(dy), _rows(x)
    dA = torch.empty(A.shape, dtype=dtype_A, device=x.device) if needs_A else None
    dB = torch.empty(B.shape, dtype=dtype_B, device=x.device) if needs_B else None
    dx = d_hybrid_A = d_hybrid_B = None
    if needs_x and seed is None and weight is not None:
        gradients = x, g, dA, None if dB is None else dB.mT
        dx, _ = linear(dy, weight.t(), None, B.mT, A.mT, hybrid_r, scaling, gradients=gradients)
    else:
        dh = down(dy, B.mT, hybrid_r, scaling) if needs_x or needs_A else None
        if needs_x:
            dx = x.new_empty(x.shape)
            chunks(dx, k).baddbmm_(dh, A.mT.to(x.dtype), beta=0)
            dx = dx if seed is None else dropout(dx, p, seed)
            dx = dx if weight is None else dx.addmm_(dy, weight)
        if needs_A:
            factor_grad(x if seed is None else dropout(x, p, seed), dh, dA)
        factor_grad(dy, g, None if dB is None else dB.mT)
    if hybrid_r and needs_A:
        dA, d_hybrid_A = dA.split([r, hybrid_r], dim=2)
        d_hybrid_A = d_hybrid_A.permute(2, 0, 1).flatten(1)
    if hybrid_r and needs_B:
        dB, d_hybrid_B = dB.split([r, hybrid_r], dim=1)
        d_hybrid_B = d_hybrid_B.mT.flatten(0, 1)
    return [None if dx is None else dx.view(shape), dA, dB, d_hybrid_A, d_hybrid_B]


def _cast(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both in one launch, with their strides."""
    if A.dtype == B.dtype == dtype:
        return A, B
    cast = torch.empty_like(A, dtype=dtype), torch.empty_like(B, dtype=dtype)
    torch._foreach_copy_(cast, (A, B))
    return cast


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
