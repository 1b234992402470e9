"""A matrix product for Hopper GPUs that includes the adapter: y = x W^T + bias + up(g, B) in one launch.

Implements `interface.Product`; see there for arguments.

The kernel is persistent and warp-specialised: in every program one warp keeps a ring of shared-memory slots filled by
TMA, and two warpgroups multiply. The K steps over x and W are followed by steps over g_j and B_j of output block j,
which add to the same float32 accumulator. So the adapter costs `r / I` of the product, and no pass over y. In the
backward pass the same launch computes the factors' gradients, which read x and dy while the product is busy
multiplying.

Written in Gluon, Triton's lower level (Triton >= 3.6); the device code is in hopper_kernel.py.
"""

import functools
import math
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_kernel import linear_kernel
from .interface import FactorGradients
from .launch import MOST_TILINGS, Grid, Launcher, Tiling
from .layout import Ints, Layout, layout, row_stride
from .torch_seam import current_raw_stream, is_capturing

BLOCK_T, BLOCK_N = 128, 256
BLOCK_K = 64  # of half precision, and twice as many 8-bit floats, which take the same time
SLOTS = 3
GROUP = 8  # row tiles that share columns of W while they are in L2
GRADIENT_BLOCKS = {64: (128, 128), 128: (64, 256)}  # ranks of a tile -> tokens of a step, and columns
GRADIENT_STEPS = {64: 0.7, 128: 1.0}  # ranks of a tile -> duration of a step, in steps of a product
FULL = (
    0.82  # least share of a round's places that tiles fill: two rounds at 85% beat cuBLAS by 8%, three at 81% lose 7%
)
LONG_ROW = 8192  # longest row of W; above it cuBLAS is faster: for 4096 rows of 14336, 1183 us against 1352
GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_counters: dict[tuple[int, int], Tensor] = {}


def _counter(device: int) -> Tensor:
    """Return the counter from which the programs of a launch take their tiles; it is 0 before and after a launch.

    Each stream has its own counter, since its launches follow each other, and so has each launch in a CUDA graph.
    """
    if is_capturing():
        return torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", device))
    key = device, current_raw_stream(device)
    counter = _counters.get(key)
    if counter is None:
        with ThreadPoolExecutor(1) as thread:
            counter = _counters[key] = thread.submit(_new_counter, device).result()
    return counter


def _new_counter(device: int) -> Tensor:
    """Make a counter that lasts, which takes a thread of its own.

    Before it captures a CUDA graph, torch.compile lets a thread allocate what the graph's replays overwrite.
    """
    counter = torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", device))
    torch.cuda.synchronize(device)  # whatever stream is to use it
    return counter


@functools.cache
def _layout(block: Ints, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), GLUON_DTYPES[dtype])


def descriptor(tensor: Tensor, block: Ints, shape: Ints, strides: Ints) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(shape), list(strides), list(block), _layout(block, tensor.dtype))


_linear = Launcher(__name__, linear_kernel, descriptor, num_warps=8, maxnreg=168)


def _tiles(T: int, N: int) -> int:
    return -(-T // BLOCK_T) * -(-N // BLOCK_N)


def fills(T: int, N: int, device: int, share: float, all_rounds: bool = True) -> bool:
    """Tell whether tiles of y `[T, N]` fill this share of the places that a GPU has in all rounds, or in the first."""
    rounds = _tiles(T, N) / _processors(device)
    return rounds >= share * (math.ceil(rounds) if all_rounds else 1)


def reads(x: Tensor) -> bool:
    """Tell whether TMA can read x, `[T, n]` or contiguous `[..., n]`, row by row."""
    return _reads(layout(x))


def _reads(x: Layout) -> bool:
    """Tell whether the last stride is 1, and the row stride and the address are multiples of 16 bytes."""
    return x.aligned and x.strides[-1] == 1 and not row_stride(x.shape, x.strides) % 8


def takes(x: Layout, weight: Layout, B: Layout, device: int, z: Layout | None = None) -> bool:
    """Tell whether TMA can read the operands, and the tiles fill the GPU's processors.

    If few tiles are left for the last round, cuBLAS, which has smaller tiles, is faster. If gradients are computed,
    too, their tiles fill the last round.
    """
    (_, r, chunk), (stride_k, stride_r, stride_c), (stride_o, stride_i) = B.shape, B.strides, weight.strides
    return (
        fills(math.prod(x.shape[:-1]), weight.shape[0], device, FULL, z is None)
        and not (stride_i == 1 and stride_o > LONG_ROW)
        and _reads(x)
        and (z is None or _reads(z))
        and 1 in (stride_o, stride_i)
        and 1 in (stride_r, stride_c)
        and not (stride_o * stride_i | r | chunk | stride_k | stride_r * stride_c) % 8
        and weight.aligned
        and B.aligned
    )


def _order(products: int, length: int, gradients: int, gradient_length: float, processors: int) -> tuple[int, int]:
    """Choose how many gradient tiles to spread among the product tiles, and at what distance; the others come last.

    The two lengths are those of one tile, in steps of a product. Tiles that are spread begin early enough to end with
    the products, since all programs wait for a tile that begins late. If gradient tiles are the shorter ones, a
    quarter of a round of them comes last, in the places that the last round of products leaves. More would wait for
    memory.
    """
    spread = gradients if 4 * gradient_length > 3 * length else max(gradients - processors // 4, 0)
    begun_by = 1 - gradient_length * processors / (length * products)
    return spread, max(int((products + spread) * begun_by) // max(spread, 1), 1)


def linear(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: Tensor,
    B: Tensor,
    gradients: FactorGradients | None = None,
    adds: bool = False,
) -> None:
    """Compute y = x W^T + bias + up(g, B), summed in float32 and rounded once, of operands that `takes` accepts.

    What is added to y is rounded before, as by the addition of two tensors.
    """
    launch(_linear, y, x, x, weight, bias, g, B, gradients, adds)


def launch(
    launcher: Launcher,
    y: Tensor,
    x: Tensor,
    factor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: Tensor,
    B: Tensor,
    gradients: FactorGradients | None,
    adds: bool,
    more_pointers: tuple[Tensor, ...] = (),
    more_constants: tuple[Any, ...] = (),
) -> None:
    """Launch `linear_kernel`, or another kernel with the same parameters and more.

    Args:
        launcher: of the kernel.
        y, x, bias, g, B, gradients, adds: as of `linear`.
        factor, weight: what the product multiplies: x, or what it was rounded to, contiguous; and the weight.
        more_pointers, more_constants: what the kernel takes after the pointers and constants of `linear_kernel`.
    """
    (k, T, r), device = g.shape, x.get_device()
    tensors, written, gradient_strides = (factor, weight, g, B, y), (y, y), None
    if gradients is not None:
        z, h, *written = gradients
        tensors = *tensors, z, h, x
        x_stride = row_stride(x.shape, x.stride())
        z_stride = row_stride(z.shape, z.stride())
        gradient_strides = x_stride, z_stride, *written[0].stride()[1:], *written[1].stride()[1:]
    sizes = T, weight.shape[0], x.shape[-1], k, r
    strides = row_stride(factor.shape, factor.stride()), weight.stride(), B.stride()
    key, grid, numbers, constants, tiling = _launch_of(
        x.dtype, factor.dtype, device, sizes, *strides, bias is not None, gradient_strides, adds
    )
    pointers = y if bias is None else bias, _counter(device), *written, *more_pointers
    launcher((key, more_constants), grid, pointers, numbers, constants + more_constants, (tiling, tensors))


@functools.lru_cache(MOST_TILINGS)
def _launch_of(
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    device: int,
    sizes: tuple[int, int, int, int, int],
    factor_stride: int,
    w_strides: tuple[int, int],
    b_strides: tuple[int, int, int],
    has_bias: bool,
    gradient_strides: tuple[int, int, int, int, int, int] | None,
    adds: bool,
) -> tuple[Hashable, Grid, tuple[int, ...], tuple[Any, ...], Tiling]:
    """Compute what a launch takes besides tensors: key, grid, numbers, constants, and the tiling of the tensors.

    The tiled tensors are factor, weight, g, B, y, z, h and x, in this order; the last three only with gradients.

    Args:
        dtype: dtype of x.
        factor_dtype: dtype of what is multiplied with the weight.
        device: index of the GPU.
        sizes: T, O, I, k, r.
        factor_stride, w_strides, b_strides: the strides of the rows of the factor, of weight and of B.
        has_bias: whether bias is not None.
        gradient_strides: strides of the rows of x and z, and of columns and ranks of z_grad and x_grad; None if there
            are no gradients.
        adds: whether y is added to.
    """
    T, N, K, k, r = sizes
    w_transposed, b_transposed = w_strides[1] == 1, b_strides[2] != 1
    block_k = BLOCK_K * dtype.itemsize // factor_dtype.itemsize
    g_block, b_block = (BLOCK_T, BLOCK_K), (BLOCK_N, BLOCK_K) if b_transposed else (BLOCK_K, BLOCK_N)
    g_layout = (k, T, r), (T * r, r, 1)
    factor_tiles, g_tiles = (0, (BLOCK_T, block_k), (T, K), (factor_stride, 1)), (2, (1, *g_block), *g_layout)
    if w_transposed:
        w_tiles = 1, (BLOCK_N, block_k), (N, K), w_strides
    else:
        w_tiles = 1, (block_k, BLOCK_N), (K, N), w_strides[::-1]
    if b_transposed:
        b_tiles = 3, (1, *b_block), (k, N // k, r), (b_strides[0], b_strides[2], 1)
    else:
        b_tiles = 3, (1, *b_block), (k, r, N // k), b_strides
    read, strides, tiles, h_layout, z_layout = (factor_tiles, g_tiles) * 2, (0,) * 4, (0, 0), None, None
    order, block_r = (0, 1), 64 if r <= 64 else 128
    if gradient_strides is not None:
        x_stride, z_stride, *strides = gradient_strides
        z_block = GRADIENT_BLOCKS[block_r]
        h_block = z_block[0], block_r
        read = (
            (5, z_block, (T, N), (z_stride, 1)),
            (6, (1, *h_block), *g_layout),
            (7, z_block, (T, K), (x_stride, 1)),
            (2, (1, *h_block), *g_layout),
        )
        tiles = [k * -(-(n // k) // z_block[1]) * -(-r // block_r) for n in (N, K)]
        length, gradient_length = -(-K // block_k) + -(-r // BLOCK_K), -(-T // z_block[0]) * GRADIENT_STEPS[block_r]
        order = _order(_tiles(T, N), length, sum(tiles), gradient_length, _processors(device))
        h_layout, z_layout = _layout(h_block, dtype), _layout(z_block, dtype)
    return (
        (dtype, w_transposed, b_transposed, has_bias, gradient_strides is not None, adds, block_r),
        (_processors(device), 1, 1),
        (*strides, *sizes, *tiles, *order),
        (
            _layout(g_block, dtype),
            _layout(b_block, dtype),
            h_layout,
            z_layout,
            w_transposed,
            b_transposed,
            has_bias,
            gradient_strides is not None,
            adds,
            SLOTS,
            GROUP,
            8,
        ),
        Tiling((factor_tiles, w_tiles, g_tiles, b_tiles, (4, (BLOCK_T, BLOCK_N), (T, N), (N, 1)), *read)),
    )
