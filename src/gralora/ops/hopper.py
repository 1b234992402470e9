"""A matrix product for Hopper GPUs with the adapter in its accumulator: y = x W^T + bias + up(g, B) in one pass.

Persistent and warp-specialised: in every program one warp keeps a ring of shared-memory slots filled by TMA, two
warpgroups multiply. After the K steps over x and W come the steps over g_j and B_j of the output block j, into the
same float32 accumulator, so the adapter costs `r / I` of the product and no pass over y. In the backward the same
launch computes the factors' gradients: few tiles, each with all tokens to sum over, that go to the programs which would
wait for the last tiles of the product. Written in Gluon, Triton's lower level (Triton >= 3.6).
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
GRAD_BLOCKS = {64: (128, 128), 128: (64, 256)}  # ranks in a tile of a factor's gradient -> tokens a step, columns
GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _tile_offsets(tile, T, N, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    tiles_t = gl.cdiv(T, BLOCK_T)
    per_group = GROUP * gl.cdiv(N, BLOCK_N)
    first = tile // per_group * GROUP
    rows = gl.minimum(tiles_t - first, GROUP)
    return (first + tile % per_group % rows) * BLOCK_T, tile % per_group // rows * BLOCK_N


@gluon.jit
def _factor_grad_offsets(tile, r, chunk, BLOCK_C: gl.constexpr, BLOCK_R: gl.constexpr):
    """Block, first column in it and first rank of a tile of a factor's gradient."""
    in_block = gl.cdiv(chunk, BLOCK_C) * gl.cdiv(r, BLOCK_R)
    return tile // in_block, tile % in_block // gl.cdiv(r, BLOCK_R) * BLOCK_C, tile % gl.cdiv(r, BLOCK_R) * BLOCK_R


@gluon.jit
def _load_factor_grad(z_desc, h_desc, slots, barriers, step, tiles, T, r, chunk):
    """Fill slot after slot with tiles of z and h, over all tokens, for every tile of the range `tiles`."""
    x_slots, w_slots = slots
    ready, empty = barriers
    first, end, stride = tiles
    SLOTS: gl.constexpr = x_slots.type.shape[0]
    BLOCK_S: gl.constexpr = z_desc.block_type.shape[0]
    for tile in range(first, end, stride):
        i, c, n = _factor_grad_offsets(tile, r, chunk, z_desc.block_type.shape[1], h_desc.block_type.shape[2])
        for t in range(0, T, BLOCK_S):
            slot = step % SLOTS
            bar = ready.index(slot)
            z_slot = w_slots.index(slot)._reinterpret(z_desc.dtype, z_desc.block_type.shape, z_desc.layout)
            h_slot = x_slots.index(slot)._reinterpret(h_desc.dtype, h_desc.block_type.shape, h_desc.layout)
            mbarrier.wait(empty.index(slot), (step // SLOTS & 1) ^ 1)
            mbarrier.expect(bar, z_desc.block_type.nbytes + h_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(z_desc, [t, i * chunk + c], bar, z_slot)
            tma.async_copy_global_to_shared(h_desc, [i, t, n], bar, h_slot)
            step += 1
    return step


@gluon.jit
def _multiply_factor_grad(
    out_ptr,
    strides,
    slots,
    barriers,
    step,
    tiles,
    T,
    r,
    chunk,
    Z_LAYOUT: gl.constexpr,
    H_LAYOUT: gl.constexpr,
    BLOCK_S: gl.constexpr,
    BLOCK_C: gl.constexpr,
    BLOCK_R: gl.constexpr,
    WARPS: gl.constexpr,
):
    """out_i = z_i^T h_i, transposed in the accumulator, [BLOCK_R, BLOCK_C], for every tile of the range `tiles`."""
    x_slots, w_slots = slots
    ready, empty = barriers
    first, end, stride = tiles
    stride_c, stride_r = strides
    dtype: gl.constexpr = x_slots.dtype
    SLOTS: gl.constexpr = x_slots.type.shape[0]
    WARPS_R: gl.constexpr = BLOCK_R // 16
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WARPS_R, WARPS // WARPS_R], [16, BLOCK_C * WARPS_R // WARPS, 16]
    )
    for tile in range(first, end, stride):
        i, c, n = _factor_grad_offsets(tile, r, chunk, BLOCK_C, BLOCK_R)
        acc = gl.zeros((BLOCK_R, BLOCK_C), dtype=gl.float32, layout=layout)
        for t in range(0, T, BLOCK_S):
            slot = step % SLOTS
            z = w_slots.index(slot)._reinterpret(dtype, [BLOCK_S, BLOCK_C], Z_LAYOUT)
            h = x_slots.index(slot)._reinterpret(dtype, [BLOCK_S, BLOCK_R], H_LAYOUT)
            mbarrier.wait(ready.index(slot), step // SLOTS & 1)
            acc = warpgroup_mma(h.permute((1, 0)), z, acc, is_async=True, use_acc=t > 0)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((step + SLOTS - 1) % SLOTS), pred=t > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + SLOTS - 1) % SLOTS))
        ranks = n + gl.arange(0, BLOCK_R, gl.SliceLayout(1, layout))[:, None]
        columns = c + gl.arange(0, BLOCK_C, gl.SliceLayout(0, layout))[None, :]
        pointers = out_ptr + i * chunk * r + columns * stride_c + ranks * stride_r
        gl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=(ranks < r) & (columns < chunk))
    return step


@gluon.jit
def _factor_grad_tiles(r, chunk_a, chunk_b, k, share, BLOCK_C: gl.constexpr, BLOCK_R: gl.constexpr):
    """This program's tiles of either factor's gradient, as ranges; they are counted through both.

    The programs from `first` on take one tile after the other in turn, `programs` of them.
    """
    first, programs = share
    place = (gl.program_id(0) + gl.num_programs(0) - first) % gl.num_programs(0)
    tiles_a = k * gl.cdiv(chunk_a, BLOCK_C) * gl.cdiv(r, BLOCK_R)
    tiles_b = k * gl.cdiv(chunk_b, BLOCK_C) * gl.cdiv(r, BLOCK_R)
    taken = gl.cdiv(gl.maximum(tiles_a - place, 0), programs)
    out = gl.where(place < programs, 0, tiles_a + tiles_b)  # too many for a program without a share
    return (place + out, tiles_a, programs), (place + taken * programs - tiles_a + out, tiles_b, programs)


@gluon.jit
def _load_warp(
    x_desc,
    w_desc,
    g_desc,
    b_desc,
    grads,
    slots,
    barriers,
    sizes,
    W_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    WITH_GRADS: gl.constexpr,
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
    if WITH_GRADS:
        za_desc, ha_desc, zb_desc, hb_desc, _, _, _, _, k, share = grads
        BLOCK_C: gl.constexpr = za_desc.block_type.shape[1]
        BLOCK_R: gl.constexpr = ha_desc.block_type.shape[2]
        tiles_a, tiles_b = _factor_grad_tiles(r, chunk, K // k, k, share, BLOCK_C, BLOCK_R)
        step = _load_factor_grad(za_desc, ha_desc, slots, barriers, step, tiles_a, T, r, chunk)
        step = _load_factor_grad(zb_desc, hb_desc, slots, barriers, step, tiles_b, T, r, K // k)


@gluon.jit
def _multiply_warps(
    y_desc,
    y_tile,
    bias_ptr,
    grads,
    slots,
    barriers,
    sizes,
    B_LAYOUT: gl.constexpr,
    Z_LAYOUT: gl.constexpr,
    H_LAYOUT: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    WITH_GRADS: gl.constexpr,
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
    if WITH_GRADS:
        za_desc, ha_desc, _, _, a_ptr, b_ptr, strides_a, strides_b, k, share = grads
        BLOCK_S: gl.constexpr = za_desc.block_type.shape[0]
        BLOCK_C: gl.constexpr = za_desc.block_type.shape[1]
        BLOCK_R: gl.constexpr = ha_desc.block_type.shape[2]
        tiles_a, tiles_b = _factor_grad_tiles(r, chunk, K // k, k, share, BLOCK_C, BLOCK_R)
        step = _multiply_factor_grad(
            a_ptr, strides_a, slots, barriers, step, tiles_a, T, r, chunk, Z_LAYOUT, H_LAYOUT, BLOCK_S, BLOCK_C, BLOCK_R,
            WARPS,
        )
        step = _multiply_factor_grad(
            b_ptr, strides_b, slots, barriers, step, tiles_b, T, r, K // k, Z_LAYOUT, H_LAYOUT, BLOCK_S, BLOCK_C, BLOCK_R,
            WARPS,
        )
    tma.store_wait(pendings=0)


_SIZES = ["T", "N", "K", "r", "chunk", "k", "first", "programs", "a_stride_c", "a_stride_r", "b_stride_c", "b_stride_r"]


@gluon.jit(do_not_specialize=_SIZES)
def _linear_up_kernel(
    x_desc,
    w_desc,
    g_desc,
    b_desc,
    y_desc,
    bias_ptr,
    za_desc,
    ha_desc,
    zb_desc,
    hb_desc,
    a_ptr,
    b_ptr,
    a_stride_c,
    a_stride_r,
    b_stride_c,
    b_stride_r,
    k,
    first,
    programs,
    T,
    N,
    K,
    r,
    chunk,
    B_LAYOUT: gl.constexpr,
    Z_LAYOUT: gl.constexpr,
    H_LAYOUT: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    WITH_GRADS: gl.constexpr,
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
    strides_a, strides_b = (a_stride_c, a_stride_r), (b_stride_c, b_stride_r)
    grads = (za_desc, ha_desc, zb_desc, hb_desc, a_ptr, b_ptr, strides_a, strides_b, k, (first, programs))
    gl.warp_specialize(
        [
            (
                _multiply_warps,
                (
                    y_desc,
                    y_tile,
                    bias_ptr,
                    grads,
                    slots,
                    barriers,
                    sizes,
                    B_LAYOUT,
                    Z_LAYOUT,
                    H_LAYOUT,
                    W_TRANSPOSED,
                    B_TRANSPOSED,
                    HAS_BIAS,
                    WITH_GRADS,
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
                    grads,
                    slots,
                    barriers,
                    sizes,
                    W_TRANSPOSED,
                    B_TRANSPOSED,
                    WITH_GRADS,
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


def readable(x: Tensor) -> bool:
    """Whether TMA can read x `[T, n]` row by row: one unit stride, the other and the address multiples of 16 bytes."""
    return x.stride(1) == 1 and not x.stride(0) % 8 and not x.data_ptr() % 16


def wins(x: Tensor, weight: Tensor, g: Tensor, B: Tensor) -> bool:
    """Whether the kernel can take these tensors and is faster than cuBLAS and a separate up-projection."""
    (T, _), N = x.shape, weight.shape[0]
    return (
        _tiles(T, N) >= _processors(x.device.index)
        and x.dtype in GLUON_DTYPES
        and weight.dtype == x.dtype
        and readable(x)
        and readable(weight if weight.stride(1) == 1 else weight.t())
        and 1 in B.stride()[1:]
        and not (N | g.shape[2] | B.shape[2] | B.stride(1) * B.stride(2)) % 8
        and not B.data_ptr() % 16
    )


@functools.lru_cache(1024)
def _share(product: int, steps: int, grads: int, grad_steps: int, programs: int) -> tuple[int, int]:
    """The first program that computes tiles of the factors' gradients, and how many do.

    Those that have one tile of the product less, or, from there on, all: whichever is done earlier.

    Args:
        product, steps: tiles of the product, and what one takes.
        grads, grad_steps: tiles of the gradients, and what one takes.
        programs: all that run.
    """
    rounds, rest = divmod(product, programs)
    light = programs - rest
    some = max(bool(rest) * steps, -(-grads // light) * grad_steps)
    every = max(
        -(-grads // programs) * grad_steps, bool(rest) * (steps + -(-max(grads - light, 0) // programs) * grad_steps)
    )
    return rest, light if some <= every else programs


def linear_up(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: Tensor,
    B: Tensor,
    factor_grads: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """x W^T + bias + up(g, B), summed in float32 and rounded once.

    Args:
        x: `[T, I]`, bfloat16 or float16, unit stride along I.
        weight: `[O, I]`, dtype of x, unit stride along either side.
        bias: `[O]`, any float dtype, or None.
        g: exchanged sub-ranks, `[k, T, r]`, contiguous.
        B: `[k, r, O/k]`, unit stride along r or O/k.
        factor_grads: what else is computed: `(z, h, z_grad, x_grad)` with z `[T, O]` as x, h `[k, T, r]` as g, and two
            tensors that are written, of any float dtype, both contiguous or the transpose of a contiguous one:
            `[k, O/k, r]` with z_i^T g_i and `[k, I/k, r]` with x_i^T h_i.

    Returns:
        y `[T, O]`, dtype of x.
    """
    (T, K), N, (k, _, r), chunk = x.shape, weight.shape[0], g.shape, B.shape[2]
    y = x.new_empty(T, N)
    w_transposed, b_transposed = weight.stride(1) == 1, B.stride(2) != 1
    b_block = (BLOCK_N, BLOCK_K) if b_transposed else (BLOCK_K, BLOCK_N)
    tiles = _tiles(T, N)
    programs = min(tiles, _processors(x.device.index))
    g_desc, y_desc = _descriptor(g, (1, BLOCK_T, BLOCK_K)), _descriptor(y, (BLOCK_T, BLOCK_N))
    grads, z_layout, h_layout, grads_key = (y_desc, g_desc, y_desc, g_desc, y, y, 0, 0, 0, 0, k, 0, 1), None, None, None
    if factor_grads is not None:
        z, h, z_grad, x_grad = factor_grads
        block_r = 64 if r <= 64 else 128
        z_block, h_block = GRAD_BLOCKS[block_r], (1, GRAD_BLOCKS[block_r][0], block_r)
        z_layout, h_layout = _layout(z_block, x.dtype), _layout(h_block[1:], x.dtype)
        in_tiles = [k * -(-(n // k) // z_block[1]) * -(-r // block_r) for n in (N, K)]
        share = _share(tiles, -(-K // 64) * 2, sum(in_tiles), -(-T // 64) * block_r * z_block[1] // (64 * 256), programs)
        grads = (
            _descriptor(z, z_block),
            _descriptor(g, h_block),
            _descriptor(x, z_block),
            _descriptor(h, h_block),
            z_grad,
            x_grad,
            *z_grad.stride()[1:],
            *x_grad.stride()[1:],
            k,
            *share,
        )
        grads_key = block_r, z_grad.dtype, x_grad.dtype, z_grad.data_ptr() % 16, x_grad.data_ptr() % 16
    _linear_up(
        (x.dtype, w_transposed, b_transposed, None if bias is None else (bias.dtype, bias.data_ptr() % 16), grads_key),
        (programs, 1, 1),
        x,
        _descriptor(x, (BLOCK_T, BLOCK_K)),
        _descriptor(*((weight, (BLOCK_N, BLOCK_K)) if w_transposed else (weight.t(), (BLOCK_K, BLOCK_N)))),
        g_desc,
        _descriptor(B.transpose(1, 2) if b_transposed else B, (1, *b_block)),
        y_desc,
        y if bias is None else bias,
        *grads,
        T,
        N,
        K,
        r,
        chunk,
        _layout(b_block, x.dtype),
        z_layout,
        h_layout,
        w_transposed,
        b_transposed,
        bias is not None,
        factor_grads is not None,
        SLOTS,
        GROUP,
        8,
    )
    return y
