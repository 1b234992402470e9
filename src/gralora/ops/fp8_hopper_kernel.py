"""The device code of `fp8_hopper`: hopper_kernel.py's, with scales between the base layer's product and the adapter's.

FP8 tensor cores read 8-bit floats along the sum only, so W is always `[N, K]` in memory here.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_kernel import SIZES, STRIDES, run_tiles


@gluon.jit(do_not_specialize=[*SIZES, *STRIDES])
def scaled_linear_kernel(
    x_desc,
    w_desc,
    g_desc,
    b_desc,
    y_desc,
    z_desc,
    h_desc,
    x_wide_desc,
    g_wide_desc,
    bias_ptr,
    counter,
    z_grad_ptr,
    x_grad_ptr,
    row_scales_ptr,
    column_scales_ptr,
    z_stride_c,
    z_stride_r,
    x_stride_c,
    x_stride_r,
    T,
    N,
    K,
    k,
    r,
    from_z,
    from_x,
    spread,
    every,
    G_LAYOUT: gl.constexpr,
    B_LAYOUT: gl.constexpr,
    H_LAYOUT: gl.constexpr,
    Z_LAYOUT: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    MAKES_GRADIENTS: gl.constexpr,
    ADDS: gl.constexpr,
    SLOTS: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
    SCALES_COLUMNS: gl.constexpr,
):
    """See `hopper_kernel.linear_kernel`; `x_desc` and `w_desc` are of 8-bit floats, and `x_wide_desc` is of x itself.

    Rows of the product are scaled, and columns if SCALES_COLUMNS, before the adapter is added.
    """
    sizes = (T, N, K, k, r, from_z, from_x, spread, every)
    z_strides, x_strides = (z_stride_c, z_stride_r), (x_stride_c, x_stride_r)
    gradients = (z_desc, h_desc, x_wide_desc, g_wide_desc, z_grad_ptr, x_grad_ptr, z_strides, x_strides)
    run_tiles(
        x_desc,
        w_desc,
        g_desc,
        b_desc,
        y_desc,
        bias_ptr,
        counter,
        (row_scales_ptr, column_scales_ptr) if SCALES_COLUMNS else (row_scales_ptr,),
        gradients,
        sizes,
        G_LAYOUT,
        B_LAYOUT,
        H_LAYOUT,
        Z_LAYOUT,
        W_TRANSPOSED,
        B_TRANSPOSED,
        HAS_BIAS,
        MAKES_GRADIENTS,
        ADDS,
        SLOTS,
        GROUP,
        WARPS,
    )
