"""Rounding to 8-bit floats row by row in Triton: x is read once, where torch's operations read it three times."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8 import E4M3, LARGEST, SMALLEST
from .launch import Launcher
from .layout import row_stride

LONGEST = 16384  # elements of a row that a program keeps in registers; longer rows are read twice


@triton.jit
def _read(x_ptr, factors_ptr, t, c, WIDTH: tl.constexpr, STRIDE_XT: tl.constexpr, FACTOR_STRIDE: tl.constexpr):
    """Read columns c of row t of x as float32, each times its factor."""
    b_x = tl.load(x_ptr + t * STRIDE_XT + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    if FACTOR_STRIDE is not None:
        b_x *= tl.load(factors_ptr + c * FACTOR_STRIDE, mask=c < WIDTH, other=0.0)
    return b_x


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    factors_ptr,
    values_ptr,
    scales_ptr,
    WIDTH: tl.constexpr,
    STRIDE_XT: tl.constexpr,
    FACTOR_STRIDE: tl.constexpr,
    LARGEST_VALUE: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round one row, times factors, to the dtype of values: its largest element becomes LARGEST_VALUE."""
    t, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    b_x = _read(x_ptr, factors_ptr, t, c, WIDTH, STRIDE_XT, FACTOR_STRIDE)
    b_most = tl.abs(b_x)
    for c0 in range(BLOCK, WIDTH, BLOCK):
        b_most = tl.maximum(b_most, tl.abs(_read(x_ptr, factors_ptr, t, c0 + c, WIDTH, STRIDE_XT, FACTOR_STRIDE)))
    scale = tl.maximum(tl.max(b_most, 0) / LARGEST_VALUE, SMALLEST_SCALE)
    tl.store(scales_ptr + t, scale)
    # a NaN, or infinity times 0, becomes NaN; a row's largest element may come out above the format's by rounding
    inverse = 1 / scale
    for c0 in range(0, WIDTH, BLOCK):
        if WIDTH > BLOCK:
            b_x = _read(x_ptr, factors_ptr, t, c0 + c, WIDTH, STRIDE_XT, FACTOR_STRIDE)
        tl.store(values_ptr + t * WIDTH + c0 + c, (b_x * inverse).to(values_ptr.dtype.element_ty), mask=c0 + c < WIDTH)


# of the module that cannot compute without it
_quantize_rows = Launcher(f"{__package__}.fp8_hopper", _quantize_rows_kernel, num_warps=8)


def quantize_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round x to E4M3 with one scale a row, in one launch; see `fp8.quantize_rows`.

    Args:
        x: `[T, n]` with unit stride along n, or contiguous `[..., n]`; any float dtype.
        factors: that columns of x are multiplied by first: `[1, n]` or `[1, 1]`, float32, contiguous.

    Returns:
        Values `[T, n]`, float8_e4m3fn, and scales `[T, 1]`, float32.
    """
    width = x.shape[-1]
    T = x.numel() // width
    values, scales = x.new_empty(T, width, dtype=E4M3), x.new_empty(T, 1, dtype=torch.float32)
    factor_stride = None if factors is None else int(factors.numel() > 1)
    block = min(triton.next_power_of_2(width), LONGEST)
    constants = (width, row_stride(x.shape, x.stride()), factor_stride, LARGEST, SMALLEST, block)
    _quantize_rows(constants, (T, 1, 1), (x, scales if factors is None else factors, values, scales), (), constants)
    return values, scales
