"""Triton kernels that run on any GPU Triton knows, and in its interpreter on the CPU."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _down_kernel(
    x_ptr,
    A_ptr,
    g_ptr,
    T,
    chunk,
    r,
    q,
    scaling,
    stride_xt,
    stride_Ak,
    stride_Ai,
    stride_Ar,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of tokens times one block of A; the columns are stored where the exchange puts them."""
    i = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    p_x = x_ptr + t[:, None].to(tl.int64) * stride_xt + i * chunk + c[None, :]
    p_A = A_ptr + i * stride_Ak + c[:, None] * stride_Ai + n[None, :] * stride_Ar
    b_h = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for c0 in range(0, chunk, BLOCK_C):
        b_x = tl.load(p_x, mask=(t[:, None] < T) & (c0 + c[None, :] < chunk), other=0.0)
        b_A = tl.load(p_A, mask=(c0 + c[:, None] < chunk) & (n[None, :] < r), other=0.0)
        b_h = tl.dot(b_x, b_A, b_h)
        p_x += BLOCK_C
        p_A += BLOCK_C * stride_Ai
    # column n of block i is place (i, n % q) of output block n // q
    p_g = g_ptr + ((n // q)[None, :].to(tl.int64) * T + t[:, None]) * r + i * q + (n % q)[None, :]
    tl.store(p_g, (b_h * scaling).to(g_ptr.dtype.element_ty), mask=(t[:, None] < T) & (n[None, :] < r))


def down(x: Tensor, A: Tensor, scaling: float) -> Tensor:
    """Project down, exchange and scale in one pass over x.

    Args:
        x: `[T, I]`, half precision or float32, unit stride along I.
        A: `[k, I/k, r]`, dtype of x, any strides.
        scaling: factor on the result, applied in float32.

    Returns:
        g `[k, T, r]`, dtype of x, summed in float32.
    """
    (T, _), (k, chunk, r) = x.shape, A.shape
    g = x.new_empty(k, T, r)
    block_t = 64 if r > 64 else 128
    _down_kernel[(triton.cdiv(T, block_t), k)](
        x,
        A,
        g,
        T,
        chunk,
        r,
        r // k,
        scaling,
        x.stride(0),
        *A.stride(),
        BLOCK_T=block_t,
        BLOCK_C=64,
        BLOCK_R=max(16, triton.next_power_of_2(r)),
        num_warps=4,
        num_stages=4,
    )
    return g
