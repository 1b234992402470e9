"""A matrix product for Hopper GPUs with the adapter in it: y = x W^T + bias + up(g, B) in one launch.

Persistent and warp-specialised: in every program one warp keeps a ring of shared-memory slots filled by TMA, two
warpgroups multiply. After the K steps over x and W come the steps over g_j and B_j of the output block j, into the
same float32 accumulator, so the adapter costs `r / I` of the product and no pass over y. In the backward the same
launch computes the factors' gradients, which read x and dy from memory while the product is busy multiplying.

Written in Gluon, Triton's lower level (Triton >= 3.6); the device code is in hopper_kernel.py.
"""

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_kernel import linear_kernel
from .launch import Launcher

BLOCK_T, BLOCK_N, BLOCK_K = 128, 256, 64
SLOTS = 3
GROUP = 8  # row tiles that share columns of W while they are in L2
GRADIENT_BLOCKS = {64: (128, 128), 128: (64, 256)}  # of ranks -> tokens a step, and columns, that fill a slot
LONG_ROW = 8192  # elements, above which cuBLAS reads rows of W faster: 4096 rows of 14336, 1183 us against 1352
GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

_linear = Launcher(linear_kernel, num_warps=8, maxnreg=168)


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_counters: dict[tuple[int, int], Tensor] = {}


def _counter(device: int) -> Tensor:
    """The counter of a stream, whose launches follow each other and leave it at 0; of its own in a CUDA graph."""
    if torch._C._cuda_isCurrentStreamCapturing():
        return torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", device))
    key = device, torch._C._cuda_getCurrentRawStream(device)
    counter = _counters.get(key)
    if counter is None:
        counter = _counters[key] = torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", device))
    return counter


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), GLUON_DTYPES[dtype])


def _tiles(T: int, N: int) -> int:
    return -(-T // BLOCK_T) * -(-N // BLOCK_N)


def _descriptor(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    descriptor = TensorDescriptor.__new__(TensorDescriptor)  # its constructor checks again what `wins` has
    descriptor.base, descriptor.shape, descriptor.strides = tensor, tensor.shape, tensor.stride()
    descriptor.block_shape, descriptor.layout, descriptor.padding = list(block), _layout(block, tensor.dtype), "zero"
    return descriptor


def readable(x: Tensor) -> bool:
    """Whether TMA can read x `[T, n]` row by row: one unit stride, the other and the address multiples of 16 bytes."""
    return x.stride(1) == 1 and not x.stride(0) % 8 and not x.data_ptr() % 16


def wins(x: Tensor, weight: Tensor, B: Tensor) -> bool:
    """Whether the kernel can take these tensors and is faster than cuBLAS and a separate up-projection.

    B is `[k, r, O/k]`, as `readable` says in either of its last two dimensions; g `[k, T, r]` and y are contiguous.
    """
    return (
        _tiles(x.shape[0], weight.shape[0]) >= _processors(x.device.index)
        and not (weight.stride(1) == 1 and weight.stride(0) > LONG_ROW)
        and x.dtype in GLUON_DTYPES
        and weight.dtype == x.dtype
        and readable(x)
        and readable(weight if weight.stride(1) == 1 else weight.t())
        and 1 in B.stride()[1:]
        and not (B.shape[1] | B.shape[2] | B.stride(0) | B.stride(1) * B.stride(2)) % 8
        and not B.data_ptr() % 16
    )


def linear_up(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: Tensor,
    B: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """x W^T + bias + up(g, B), summed in float32 and rounded once.

    Args:
        x: `[T, I]`, bfloat16 or float16, unit stride along I.
        weight: `[O, I]`, dtype of x, unit stride along either side.
        bias: `[O]`, any float dtype, or None.
        g: exchanged sub-ranks, `[k, T, r]`, contiguous.
        B: `[k, r, O/k]`, unit stride along r or O/k.
        gradients: what else is computed, `(z, h, z_grad, x_grad)`: z `[T, O]` as x, h `[k, T, r]` as g, and what is
            written, of any float dtype, contiguous or the transpose of a contiguous tensor: `[k, O/k, r]` with
            z_i^T g_i and `[k, I/k, r]` with x_i^T h_i.

    Returns:
        y `[T, O]`, dtype of x.
    """
    (T, K), N, (k, _, r) = x.shape, weight.shape[0], g.shape
    device = x.device.index
    y = x.new_empty(T, N)
    w_transposed, b_transposed = weight.stride(1) == 1, B.stride(2) != 1
    b_block = (BLOCK_N, BLOCK_K) if b_transposed else (BLOCK_K, BLOCK_N)
    x_desc, g_desc = _descriptor(x, (BLOCK_T, BLOCK_K)), _descriptor(g, (1, BLOCK_T, BLOCK_K))
    read, written, strides, tiles, h_layout, z_layout = (x_desc, g_desc) * 2, (y, y), (0,) * 4, (0, 0), None, None
    spread, block_r = 0, 64 if r <= 64 else 128
    if gradients is not None:
        z, h, *written = gradients
        z_block = GRADIENT_BLOCKS[block_r]
        h_block = z_block[0], block_r
        read = (
            _descriptor(z, z_block),
            _descriptor(h, (1, *h_block)),
            _descriptor(x, z_block),
            _descriptor(g, (1, *h_block)),
        )
        strides = (*written[0].stride()[1:], *written[1].stride()[1:])
        tiles = [k * -(-(n // k) // z_block[1]) * -(-r // block_r) for n in (N, K)]
        # a quarter of a round at the end: more, and that end would wait for memory; tiles of 128 ranks are too long
        spread = sum(tiles) if block_r > 64 else max(sum(tiles) - _processors(device) // 4, 0)
        h_layout, z_layout = _layout(h_block, x.dtype), _layout(z_block, x.dtype)
    key = (
        x.dtype,
        w_transposed,
        b_transposed,
        None if bias is None else (bias.dtype, bias.data_ptr() % 16),
        None if gradients is None else (block_r, *[(t.dtype, t.data_ptr() % 16) for t in written]),
    )
    _linear(
        key,
        (_processors(device), 1, 1),
        x,
        x_desc,
        _descriptor(*((weight, (BLOCK_N, BLOCK_K)) if w_transposed else (weight.t(), (BLOCK_K, BLOCK_N)))),
        g_desc,
        _descriptor(B.mT if b_transposed else B, (1, *b_block)),
        _descriptor(y, (BLOCK_T, BLOCK_N)),
        *read,
        y if bias is None else bias,
        _counter(device),
        *written,
        *strides,
        T,
        N,
        K,
        k,
        r,
        *tiles,
        spread,
        _layout(b_block, x.dtype),
        h_layout,
        z_layout,
        w_transposed,
        b_transposed,
        bias is not None,
        gradients is not None,
        SLOTS,
        GROUP,
        8,
    )
    return y
