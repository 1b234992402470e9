"""A matrix product for Hopper GPUs with the adapter in its accumulator: y = x W^T + bias + up(g, B) in one pass.

Persistent and warp-specialised: in every program one warp keeps a ring of shared-memory slots filled by TMA, two
warpgroups multiply. After the K steps over x and W come the steps over g_j and B_j of the output block j, into the
same float32 accumulator, so the adapter costs `r / I` of the product and no pass over y. Written in Gluon, Triton's
lower level (Triton >= 3.6).
"""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .launch import Launcher

BLOCK_T, BLOCK_N, BLOCK_K = 128, 256, 64
SLOTS = 3
GROUP = 8  # row tiles that share columns of W while they are in L2
GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _tile_offsets(tile, T, N, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    tiles_t = gl.cdiv(T, BLOCK_T)
    per_group = GROUP * gl.cdiv(N, BLOCK_N)
    first = tile // per_group * GROUP
    rows = gl.minimum(tiles_t - first, GROUP)
    return (first + tile % per_group % rows) * BLOCK_T, tile % per_group // rows * BLOCK_N


@gluon.jit
def _load_warp(
    x_desc,
    w_desc,
    g_desc,
    b_desc,
    slots,
    barriers,
    sizes,
    W_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    BLOCK_T: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Fill slot after slot: tiles of x and W, then of g and B. TMA gives zeros outside of a tensor."""
    x_slots, w_slots = slots
    ready, empty = barriers
    T, N, K, r, chunk = sizes
    SLOTS: gl.constexpr = x_slots.type.shape[0]
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(T, BLOCK_T) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        t, n = _tile_offsets(tile, T, N, BLOCK_T, BLOCK_N, GROUP)
        for k in range(0, K, BLOCK_K):
            slot = step % SLOTS
            bar = ready.index(slot)
            mbarrier.wait(empty.index(slot), (step // SLOTS & 1) ^ 1)
            mbarrier.expect(bar, x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(x_desc, [t, k], bar, x_slots.index(slot))
            if W_TRANSPOSED:
                tma.async_copy_global_to_shared(w_desc, [n, k], bar, w_slots.index(slot))
            else:
                tma.async_copy_global_to_shared(w_desc, [k, n], bar, w_slots.index(slot))
            step += 1
        for j in range(n // chunk, (gl.minimum(n + BLOCK_N, N) - 1) // chunk + 1):
            for c in range(0, r, BLOCK_K):
                slot = step % SLOTS
                bar = ready.index(slot)
                g_slot = x_slots.index(slot)._reinterpret(g_desc.dtype, g_desc.block_type.shape, g_desc.layout)
                b_slot = w_slots.index(slot)._reinterpret(b_desc.dtype, b_desc.block_type.shape, b_desc.layout)
                mbarrier.wait(empty.index(slot), (step // SLOTS & 1) ^ 1)
                mbarrier.expect(bar, g_desc.block_type.nbytes + b_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(g_desc, [j, t, c], bar, g_slot)
                if B_TRANSPOSED:
                    tma.async_copy_global_to_shared(b_desc, [j, n - j * chunk, c], bar, b_slot)
                else:
                    tma.async_copy_global_to_shared(b_desc, [j, c, n - j * chunk], bar, b_slot)
                step += 1


@gluon.jit
def _multiply_warps(
    y_desc,
    y_tile,
    bias_ptr,
    slots,
    barriers,
    sizes,
    B_LAYOUT: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BLOCK_T: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Multiply slot after slot into the accumulator, one product always in flight; store the tile by TMA."""
    x_slots, w_slots = slots
    ready, empty = barriers
    T, N, K, r, chunk = sizes
    SLOTS: gl.constexpr = x_slots.type.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(T, BLOCK_T) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        t, n = _tile_offsets(tile, T, N, BLOCK_T, BLOCK_N, GROUP)
        acc = gl.zeros((BLOCK_T, BLOCK_N), dtype=gl.float32, layout=layout)
        for k in range(0, K, BLOCK_K):
            slot = step % SLOTS
            w = w_slots.index(slot)
            if W_TRANSPOSED:
                w = w.permute((1, 0))
            mbarrier.wait(ready.index(slot), step // SLOTS & 1)
            acc = warpgroup_mma(x_slots.index(slot), w, acc, is_async=True, use_acc=k > 0)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((step + SLOTS - 1) % SLOTS), pred=k > 0)  # the product before is done
            step += 1
        for _ in range(n // chunk, (gl.minimum(n + BLOCK_N, N) - 1) // chunk + 1):
            for _ in range(0, r, BLOCK_K):
                slot = step % SLOTS
                b = w_slots.index(slot)._reinterpret(
                    y_desc.dtype, [BLOCK_N, BLOCK_K] if B_TRANSPOSED else [BLOCK_K, BLOCK_N], B_LAYOUT
                )
                if B_TRANSPOSED:
                    b = b.permute((1, 0))
                mbarrier.wait(ready.index(slot), step // SLOTS & 1)
                acc = warpgroup_mma(x_slots.index(slot), b, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                mbarrier.arrive(empty.index((step + SLOTS - 1) % SLOTS))
                step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + SLOTS - 1) % SLOTS))
        if HAS_BIAS:
            columns = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
            acc += gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
        tma.store_wait(pendings=0)
        y_tile.store(acc.to(y_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [t, n], y_tile)
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["T", "N", "K", "r", "chunk"])
def _linear_up_kernel(
    x_desc,
    w_desc,
    g_desc,
    b_desc,
    y_desc,
    bias_ptr,
    T,
    N,
    K,
    r,
    chunk,
    B_LAYOUT: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SLOTS: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):
    BLOCK_T: gl.constexpr = y_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = y_desc.block_type.shape[1]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    x_slots = gl.allocate_shared_memory(x_desc.dtype, [SLOTS] + x_desc.block_type.shape, x_desc.layout)
    w_slots = gl.allocate_shared_memory(w_desc.dtype, [SLOTS] + w_desc.block_type.shape, w_desc.layout)
    y_tile = gl.allocate_shared_memory(y_desc.dtype, y_desc.block_type.shape, y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    slots = (x_slots, w_slots)
    barriers = (ready, empty)
    sizes = (T, N, K, r, chunk)
    gl.warp_specialize(
        [
            (
                _multiply_warps,
                (
                    y_desc,
                    y_tile,
                    bias_ptr,
                    slots,
                    barriers,
                    sizes,
                    B_LAYOUT,
                    W_TRANSPOSED,
                    B_TRANSPOSED,
                    HAS_BIAS,
                    BLOCK_T,
                    BLOCK_N,
                    BLOCK_K,
                    GROUP,
                    WARPS,
                ),
            ),
            (
                _load_warp,
                (
                    x_desc,
                    w_desc,
                    g_desc,
                    b_desc,
                    slots,
                    barriers,
                    sizes,
                    W_TRANSPOSED,
                    B_TRANSPOSED,
                    BLOCK_T,
                    BLOCK_N,
                    BLOCK_K,
                    GROUP,
                ),
            ),
        ],
        [1],
        [24],
    )


_linear_up = Launcher(_linear_up_kernel, num_warps=8, maxnreg=168)


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


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


def wins(x: Tensor, weight: Tensor, g: Tensor, B: Tensor) -> bool:
    """Whether the kernel can take these tensors and is faster than cuBLAS and a separate up-projection.

    TMA reads tensors with one unit stride, whose other strides and address are multiples of 16 bytes.
    """
    (T, _), N = x.shape, weight.shape[0]
    stride_w = weight.stride(0) if weight.stride(1) == 1 else weight.stride(1)
    return (
        _tiles(T, N) >= _processors(x.device.index)
        and x.dtype in GLUON_DTYPES
        and weight.dtype == x.dtype
        and x.stride(1) == 1
        and 1 in weight.stride()
        and 1 in B.stride()[1:]
        and not (N | x.stride(0) | stride_w | g.shape[2] | B.shape[2] | B.stride(1) * B.stride(2)) % 8
        and not (x.data_ptr() | weight.data_ptr() | B.data_ptr()) % 16
    )


def linear_up(x: Tensor, weight: Tensor, bias: Tensor | None, g: Tensor, B: Tensor) -> Tensor:
    """x W^T + bias + up(g, B), summed in float32 and rounded once.

    Args:
        x: `[T, I]`, bfloat16 or float16, unit stride along I.
        weight: `[O, I]`, dtype of x, unit stride along either side.
        bias: `[O]`, any float dtype, or None.
        g: exchanged sub-ranks, `[k, T, r]`, contiguous.
        B: `[k, r, O/k]`, unit stride along r or O/k.

    Returns:
        y `[T, O]`, dtype of x.
    """
    (T, K), N, r, chunk = x.shape, weight.shape[0], g.shape[2], B.shape[2]
    y = x.new_empty(T, N)
    w_transposed, b_transposed = weight.stride(1) == 1, B.stride(2) != 1
    b_block = (BLOCK_N, BLOCK_K) if b_transposed else (BLOCK_K, BLOCK_N)
    programs = min(_tiles(T, N), _processors(x.device.index))
    _linear_up(
        (x.dtype, w_transposed, b_transposed, None if bias is None else (bias.dtype, bias.data_ptr() % 16)),
        (programs, 1, 1),
        x,
        _descriptor(x, (BLOCK_T, BLOCK_K)),
        _descriptor(*((weight, (BLOCK_N, BLOCK_K)) if w_transposed else (weight.t(), (BLOCK_K, BLOCK_N)))),
        _descriptor(g, (1, BLOCK_T, BLOCK_K)),
        _descriptor(B.transpose(1, 2) if b_transposed else B, (1, *b_block)),
        _descriptor(y, (BLOCK_T, BLOCK_N)),
        y if bias is None else bias,
        T,
        N,
        K,
        r,
        chunk,
        _layout(b_block, x.dtype),
        w_transposed,
        b_transposed,
        bias is not None,
        SLOTS,
        GROUP,
        8,
    )
    return y
