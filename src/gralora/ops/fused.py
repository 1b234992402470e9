"""An adapted linear layer, base and adapter together, in as few passes over memory as torch's own kernels allow.

The forward keeps only `x` and the exchanged sub-ranks `g`, with dropout also its seed, and where there are many
sub-ranks not even those (`dispatch.projects_again`); nothing of the size of `y` is made but `y`. Chunks of x and y are
strided views, [k, T, I/k] and [k, T, O/k], that batched matrix products read and write in place.

Both directions are the same three operations, because the exchange is its own mirror image:

    g  = down(x, A)          y  = x W^T + up(g, B)          dB = g^T dy, block by block
    dh = down(dy, B^T)       dx = dy W  + up(dh, A^T)       dA = x^T dh, block by block

The plain LoRA part of a hybrid adapter rides along as `h` more columns of every block of A and rows of B (`pack`):
where a grid's sub-ranks are exchanged, its columns are the same for all blocks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .dropout import dropout

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]

# bmm(out_dtype=): a float32 result without a pass to convert it; ROCm has none
_BMM_WIDENS = torch.__version__ >= (2, 8) and not torch.version.hip


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


def down(x: Tensor, A: Tensor, hybrid_r: int, scaling: float, B: Tensor) -> tuple[Tensor, Tensor]:
    """The exchanged sub-ranks, times `scaling`, and the factor that is to project them up.

    Args:
        x: `[..., I]`.
        A: `[k, I/k, R]`, any float dtype.
        hybrid_r: how many of its last columns are not exchanged.
        scaling: factor on the result.
        B: `[k, R, O/k]`, any float dtype.

    Returns:
        g `[k, T, R]`, dtype of x; and B, for large x in its dtype, converted in the same launch where there is one.
    """
    k, chunk, R = A.shape
    T, r = x.numel() // (k * chunk), R - hybrid_r
    kernels = dispatch.factor_kernels(x)
    source = None
    if B.dtype != x.dtype and dispatch.is_large(x):
        source, B = B, torch.empty_like(B, dtype=x.dtype)
        if kernels is None or B.stride() != source.stride():  # which those of a tensor with gaps do not keep
            B.copy_(source)
            source = None
    if kernels is not None:
        g = x.new_empty(k, T, R)
        if not hybrid_r:
            kernels.down(x, A, scaling, g, source, B)
            return g, B
        kernels.down(x, A[..., :r], scaling, g[..., :r], source, B)
        g[..., r:] = scaling * (_rows(x) @ A[..., r:].flatten(0, 1).to(x.dtype))
        return g, B
    x, A = _rows(x), A.to(x.dtype)
    grid = A[..., :r] if hybrid_r else A
    g = exchange(x.new_empty(k, T, r).baddbmm_(chunks(x, k), grid, beta=0, alpha=scaling))
    if hybrid_r:
        g = torch.cat([g, (scaling * (x @ A[..., r:].flatten(0, 1))).expand(k, -1, -1)], dim=2)
    return g, B


def sub_ranks(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    hybrid_A: Tensor | None,
    hybrid_B: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`down` of what the adapter sees of x `[..., I]`, by all of its factors: g `[k, T, R]` and B `[k, R, O/k]`."""
    A, B, hybrid_r = pack(A, B, hybrid_A, hybrid_B)
    return down(_contiguous_or_rows(x) if seed is None else dropout(_rows(x), p, seed), A, hybrid_r, scaling, B)


def write_linear(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: Tensor,
    B: Tensor,
    gradients: Gradients | None = None,
) -> bool:
    """y = x W^T + bias + up(g, B), for large x: in one launch where that wins.

    Args:
        y: written: `[..., O]`, contiguous, dtype of x.
        x: `[..., I]`.
        weight, bias: `[O, I]`, and `[O]` or None.
        g, B: `[k, T, R]` and `[k, R, O/k]`, dtype of x, as `down` gives them.
        gradients: `(z, h, z_grad, x_grad)`: z of O columns as x, h as g; z_i^T g_i `[k, O/k, R]` and x_i^T h_i
            `[k, I/k, R]` are written where the launch can do that.

    Returns:
        Whether the gradients are written.
    """
    x = _contiguous_or_rows(x)
    kernel = dispatch.linear_kernel(x, weight, B, gradients is not None)
    if kernel is not None:
        gradients = gradients if gradients is not None and kernel.readable(gradients[0]) else None
        kernel.linear_up(y, x, weight, bias, g, B, gradients)
        return gradients is not None
    with torch.no_grad():  # autograd knows y already
        x, y = _rows(x), _rows(y)
        if bias is None:
            # the product with W reads the adapter's output while it multiplies: cheaper than a pass of its own
            chunks(y, B.shape[0]).baddbmm_(g, B, beta=0)
            y.addmm_(x, weight.t())
        else:
            add_up(torch.addmm(bias, x, weight.t(), out=y), g, B)
    return False


def add_up(y: Tensor, g: Tensor, B: Tensor) -> Tensor:
    """y + up(g, B), in place: y `[..., O]`, contiguous, of any dtype, g `[k, T, R]`, B `[k, R, O/k]`.

    Computed in the dtype of g.
    """
    kernels = None if dispatch.is_large(y) else dispatch.factor_kernels(y, g.dtype)
    if kernels is not None:
        kernels.up(g, B, y)
    elif y.dtype == g.dtype:
        chunks(_rows(y), B.shape[0]).baddbmm_(g, B.to(g.dtype))
    else:
        chunks(_rows(y), B.shape[0]).add_(torch.bmm(g, B.to(g.dtype)))
    return y


def factor_grad(x: Tensor, h: Tensor, out: Tensor) -> None:
    """x_i^T h_i, block by block, to `out`.

    Args:
        x: `[..., n]`.
        h: `[k, T, R]`, contiguous, dtype of x.
        out: `[k, n/k, R]`, any float dtype, contiguous or the transpose of a contiguous `[k, R, n/k]`.
    """
    a, b = chunks(_rows(x), h.shape[0]).mT, h
    if not out.is_contiguous():
        a, b, out = b.mT, a.mT, out.mT
    if out.dtype == x.dtype:
        torch.bmm(a, b, out=out)
    elif x.is_cuda and out.dtype == torch.float32 and _BMM_WIDENS:
        torch.bmm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.bmm(a, b))


def output(x: Tensor, weight: Tensor) -> Tensor:
    """Memory for y `[..., O]`."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


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
    g, B = sub_ranks(x, A, B, hybrid_A, hybrid_B, scaling, p, seed)
    return adapted(x, weight, bias, g, B), g


def adapted(x: Tensor, weight: Tensor, bias: Tensor | None, g: Tensor, B: Tensor) -> Tensor:
    """x W^T + bias + up(g, B), as `write_linear`, for x of any size and B of any float dtype."""
    if dispatch.is_large(x):
        y = output(x, weight)
        write_linear(y, x, weight, bias, g, B.to(x.dtype))
        return y
    # with a bias, what torch makes of more than two dimensions is a view
    y = add_up(torch.nn.functional.linear(_contiguous_or_rows(x) if bias is None else _rows(x), weight, bias), g, B)
    # as matmul does: to autograd y is no view, so that callers may change it in place
    return y if y.dim() == x.dim() else torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1]))


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
    g, B = sub_ranks(x, A, B, hybrid_A, hybrid_B, scaling, p, seed)
    add_up(y, g, B)
    return g


def needs_of(x: bool, A: bool, B: bool, hybrid_A: bool, hybrid_B: bool) -> tuple[bool, bool, bool]:
    """What `backward` is to compute, of which of its inputs need gradients."""
    return x, A or hybrid_A, B or hybrid_B


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    hybrid_A: Tensor | None,
    hybrid_B: Tensor | None,
    g: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, A, B, hybrid_A and hybrid_B; that of x without the base's part if weight is None.

    `needs` says which of those of x, of (hybrid_)A and of (hybrid_)B, in this order; the others are None. Without g,
    which the forward returned, it is projected again: never with dropout.
    """
    needs_x, needs_A, needs_B = needs
    A, B, hybrid_r = pack(A, B, hybrid_A, hybrid_B)
    r, shape = A.shape[2] - hybrid_r, x.shape
    dy, x = _contiguous_or_rows(dy), _contiguous_or_rows(x)
    dA, dB = A.new_empty(A.shape) if needs_A else None, B.new_empty(B.shape) if needs_B else None
    if g is None:
        g, B = down(x, A, hybrid_r, scaling, B)
    kernels = dispatch.gradient_kernels(x, dy, g)
    dx = added = d_hybrid_A = d_hybrid_B = None
    done = False
    dh, A_up = down(dy, B.mT, hybrid_r, scaling, A.mT) if needs_x or needs_A else (g, A.mT)
    if needs_x and (seed is not None or weight is None):
        dx = x.new_empty(g.shape[1], shape[-1])
        chunks(dx, A.shape[0]).baddbmm_(dh, A_up.to(x.dtype), beta=0)
        dx = dx if seed is None else dropout(dx, p, seed)
        dx = dx if weight is None else dx.addmm_(_rows(dy), weight)
    elif needs_x and dispatch.is_large(dy):
        dx = x.new_empty(shape)
        gradients = None if dA is None or dB is None else (x, g, dA, dB.mT)
        done = write_linear(dx, dy, weight.t(), None, dh, A_up, gradients)
    elif needs_x:
        dx = dy @ weight
        if kernels is not None:
            added = dx
        else:
            add_up(dx, dh, A_up)
    if not done:
        seen = x if seed is None or not needs_A else dropout(_rows(x), p, seed)
        if kernels is not None:
            kernels.gradients(seen, dy, g, dh, A, added, dA, dB)
        else:
            if dA is not None:
                factor_grad(seen, dh, dA)
            if dB is not None:
                factor_grad(dy, g, dB.mT)
    dx = dx if dx is None or dx.dim() == len(shape) else dx.view(shape)
    if hybrid_r and dA is not None:
        dA, d_hybrid_A = dA.split([r, hybrid_r], dim=2)
        d_hybrid_A = d_hybrid_A.permute(2, 0, 1).flatten(1)
    if hybrid_r and dB is not None:
        dB, d_hybrid_B = dB.split([r, hybrid_r], dim=1)
        d_hybrid_B = d_hybrid_B.mT.flatten(0, 1)
    return [dx, dA, dB, d_hybrid_A, d_hybrid_B]


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _contiguous_or_rows(x: Tensor) -> Tensor:
    """x as products and kernels take it: a view of contiguous memory would cost as much as launching a kernel."""
    return x if x.is_contiguous() else _rows(x)
