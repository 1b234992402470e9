"""The device code of `hopper`: three kinds of tiles through one ring of shared-memory slots.

    product      y = x W^T + bias + up(g, B)    [BLOCK_T, BLOCK_N] of y: all of K, then g_j and B_j
    sub-rank     g = scaling * down(x, A)       [BLOCK_T, BLOCK_R] of one input block, stored where the exchange puts it
    gradient     out_i = z_i^T h_i              [BLOCK_R, BLOCK_C] of one block: all tokens

One warp loads, two warpgroups multiply; both walk through the same tiles in the same order. Every slot has a large and
a small half, `w_slots` and `x_slots`. Programs tell one another through counters in global memory which rows of g are
there; whoever waits for sub-ranks has made its own before, so no order of programs can block.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _product_offsets(tile, T, N, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    """First row and column of a tile of y; GROUP row tiles are done together, they share columns of W in L2."""
    tiles_t = gl.cdiv(T, BLOCK_T)
    per_group = GROUP * gl.cdiv(N, BLOCK_N)
    first = tile // per_group * GROUP
    rows = gl.minimum(tiles_t - first, GROUP)
    return (first + tile % per_group % rows) * BLOCK_T, tile % per_group // rows * BLOCK_N


@gluon.jit
def _sub_rank_tiles(tile, done, T, N, per_row, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    """Sub-rank tiles that this program makes before a tile of the product, as a range whose stride is all programs.

    All programs together make those of the groups of rows that this round of product tiles reaches.
    """
    tiles_t, tiles_n = gl.cdiv(T, BLOCK_T), gl.cdiv(N, BLOCK_N)
    programs, program = gl.num_programs(0), gl.program_id(0)
    last = gl.minimum(tile - program + programs, tiles_t * tiles_n) - 1
    until = gl.minimum((last // (GROUP * tiles_n) + 1) * GROUP, tiles_t) * per_row
    return done + (program + programs - done % programs) % programs, until


@gluon.jit
def _gradient_tiles(k, r, chunk_in, chunk_out, share, BLOCK_C: gl.constexpr, BLOCK_R: gl.constexpr):
    """This program's tiles of the gradients from x and from z, as ranges.

    They are one sequence, dealt in turn to the programs that have a share: `programs` many, from `first` on.
    """
    first, programs = share
    tiles_x = k * gl.cdiv(chunk_in, BLOCK_C) * gl.cdiv(r, BLOCK_R)
    tiles_z = k * gl.cdiv(chunk_out, BLOCK_C) * gl.cdiv(r, BLOCK_R)
    place = (gl.program_id(0) + gl.num_programs(0) - first) % gl.num_programs(0)
    dealt = gl.cdiv(gl.maximum(tiles_x - place, 0), programs)
    without = gl.where(place < programs, 0, tiles_x + tiles_z)  # beyond the end of both ranges
    return (place + without, tiles_x, programs), (place + dealt * programs - tiles_x + without, tiles_z, programs)


@gluon.jit
def _gradient_offsets(tile, r, chunk, BLOCK_C: gl.constexpr, BLOCK_R: gl.constexpr):
    """Block, first column in it and first rank of a tile of a gradient."""
    tiles_r = gl.cdiv(r, BLOCK_R)
    in_block = gl.cdiv(chunk, BLOCK_C) * tiles_r
    return tile // in_block, tile % in_block // tiles_r * BLOCK_C, tile % tiles_r * BLOCK_R


@gluon.jit
def _announce(counter):
    """Add one to a counter, once all warps' stores to global memory are done, for TMA of any program to see."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    gl.thread_barrier()
    gl.atomic_add(counter, 1, sem="release", scope="gpu")


@gluon.jit
def _counted(counter):
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.u32 $0, [$1];", "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _wait_for(counter, count):
    """Wait until `_announce` has been called `count` times."""
    seen = _counted(counter)
    while seen < count:
        seen = _counted(counter)
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _as(slots, slot, desc):
    """A slot as what a descriptor loads."""
    return slots.index(slot)._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)


@gluon.jit
def _load(small_desc, small_at, large_desc, large_at, ring, step):
    """Load a pair of tiles into the next slot, once it is empty. TMA gives zeros outside of a tensor."""
    small_slots, large_slots, ready, empty = ring
    SLOTS: gl.constexpr = small_slots.type.shape[0]
    slot = step % SLOTS
    bar = ready.index(slot)
    mbarrier.wait(empty.index(slot), (step // SLOTS & 1) ^ 1)
    mbarrier.expect(bar, small_desc.block_type.nbytes + large_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(small_desc, small_at, bar, _as(small_slots, slot, small_desc))
    tma.async_copy_global_to_shared(large_desc, large_at, bar, _as(large_slots, slot, large_desc))
    return step + 1


@gluon.jit
def _multiply(a, b, acc, ring, step, first):
    """acc + a b once the slot is loaded, with one product in flight; `first`: of a tile, overwrites acc."""
    small_slots, large_slots, ready, empty = ring
    SLOTS: gl.constexpr = small_slots.type.shape[0]
    mbarrier.wait(ready.index(step % SLOTS), step // SLOTS & 1)
    acc = warpgroup_mma(a, b, acc, is_async=True, use_acc=not first)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    mbarrier.arrive(empty.index((step + SLOTS - 1) % SLOTS), pred=not first)  # the product before is done
    return acc, step + 1


@gluon.jit
def _finish(acc, ring, step):
    """Wait for the last product of a tile."""
    small_slots, large_slots, ready, empty = ring
    SLOTS: gl.constexpr = small_slots.type.shape[0]
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((step + SLOTS - 1) % SLOTS))
    return acc


@gluon.jit
def _load_tiles(
    x_desc,
    w_desc,
    a_desc,
    g_desc,
    b_desc,
    gradients,
    counters,
    ring,
    sizes,
    W_TRANSPOSED: gl.constexpr,
    A_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    MAKES_G: gl.constexpr,
    MAKES_GRADIENTS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_R: gl.constexpr,
    GROUP: gl.constexpr,
):
    """The loading warp."""
    T, N, K, k, r = sizes
    BLOCK_T: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    tiles_t, tiles_n, ranks = gl.cdiv(T, BLOCK_T), gl.cdiv(N, BLOCK_N), gl.cdiv(r, BLOCK_R)
    chunk_in, chunk_out = K // k, N // k
    step, done = 0, 0
    for tile in range(gl.program_id(0), tiles_t * tiles_n, gl.num_programs(0)):
        if MAKES_G:
            first, until = _sub_rank_tiles(tile, done, T, N, k * ranks, BLOCK_T, BLOCK_N, GROUP)
            for d in range(first, until, gl.num_programs(0)):
                i, n = d // ranks % k, d % ranks * BLOCK_R
                for c in range(0, chunk_in, BLOCK_K):
                    a_at = [i, n, c] if A_TRANSPOSED else [i, c, n]
                    x_at = [d // ranks // k * BLOCK_T, i * chunk_in + c]
                    step = _load(x_desc, x_at, a_desc, a_at, ring, step)
            done = until
        t, n = _product_offsets(tile, T, N, BLOCK_T, BLOCK_N, GROUP)
        for c in range(0, K, BLOCK_K):
            step = _load(x_desc, [t, c], w_desc, [n, c] if W_TRANSPOSED else [c, n], ring, step)
        if MAKES_G:
            _wait_for(counters + t // BLOCK_T, k * ranks)
        for j in range(n // chunk_out, (gl.minimum(n + BLOCK_N, N) - 1) // chunk_out + 1):
            for c in range(0, r, BLOCK_K):
                o = n - j * chunk_out
                step = _load(g_desc, [j, t, c], b_desc, [j, o, c] if B_TRANSPOSED else [j, c, o], ring, step)
    if MAKES_GRADIENTS:
        z_desc, h_desc, x_wide_desc, g_wide_desc, _, _, _, _, share = gradients
        BLOCK_S: gl.constexpr = z_desc.block_type.shape[0]
        BLOCK_C: gl.constexpr = z_desc.block_type.shape[1]
        BLOCK_H: gl.constexpr = h_desc.block_type.shape[2]
        for_x, for_z = _gradient_tiles(k, r, chunk_in, chunk_out, share, BLOCK_C, BLOCK_H)
        for tile in range(for_x[0], for_x[1], for_x[2]):
            i, c, n = _gradient_offsets(tile, r, chunk_in, BLOCK_C, BLOCK_H)
            for t in range(0, T, BLOCK_S):
                step = _load(h_desc, [i, t, n], x_wide_desc, [t, i * chunk_in + c], ring, step)
        if MAKES_G:
            if for_z[0] < for_z[1]:
                _wait_for(counters + tiles_t, tiles_t * k * ranks)
        for tile in range(for_z[0], for_z[1], for_z[2]):
            i, c, n = _gradient_offsets(tile, r, chunk_out, BLOCK_C, BLOCK_H)
            for t in range(0, T, BLOCK_S):
                step = _load(g_wide_desc, [i, t, n], z_desc, [t, i * chunk_out + c], ring, step)


@gluon.jit
def _multiply_gradients(
    out_ptr,
    strides,
    tiles,
    chunk,
    ring,
    step,
    T,
    r,
    H_LAYOUT: gl.constexpr,
    Z_LAYOUT: gl.constexpr,
    BLOCK_S: gl.constexpr,
    BLOCK_R: gl.constexpr,
    BLOCK_C: gl.constexpr,
    WARPS: gl.constexpr,
):
    small_slots, large_slots, ready, empty = ring
    stride_c, stride_r = strides
    SLOTS: gl.constexpr = small_slots.type.shape[0]
    WARPS_R: gl.constexpr = BLOCK_R // 16
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WARPS_R, WARPS // WARPS_R], [16, BLOCK_C * WARPS_R // WARPS, 16]
    )
    for tile in range(tiles[0], tiles[1], tiles[2]):
        i, c, n = _gradient_offsets(tile, r, chunk, BLOCK_C, BLOCK_R)
        acc = gl.zeros((BLOCK_R, BLOCK_C), dtype=gl.float32, layout=layout)
        for t in range(0, T, BLOCK_S):
            h = small_slots.index(step % SLOTS)._reinterpret(small_slots.dtype, [BLOCK_S, BLOCK_R], H_LAYOUT)
            z = large_slots.index(step % SLOTS)._reinterpret(small_slots.dtype, [BLOCK_S, BLOCK_C], Z_LAYOUT)
            acc, step = _multiply(h.permute((1, 0)), z, acc, ring, step, t == 0)
        acc = _finish(acc, ring, step)
        ranks = n + gl.arange(0, BLOCK_R, gl.SliceLayout(1, layout))[:, None]
        columns = c + gl.arange(0, BLOCK_C, gl.SliceLayout(0, layout))[None, :]
        pointers = out_ptr + i * chunk * r + columns * stride_c + ranks * stride_r
        gl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=(ranks < r) & (columns < chunk))
    return step


@gluon.jit
def _multiply_tiles(
    y_desc,
    y_tile,
    bias_ptr,
    g_ptr,
    scaling,
    gradients,
    counters,
    ring,
    sizes,
    A_LAYOUT: gl.constexpr,
    B_LAYOUT: gl.constexpr,
    H_LAYOUT: gl.constexpr,
    Z_LAYOUT: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    A_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    MAKES_G: gl.constexpr,
    MAKES_GRADIENTS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """The warpgroups that multiply."""
    small_slots, large_slots, ready, empty = ring
    T, N, K, k, r = sizes
    dtype: gl.constexpr = y_desc.dtype
    SLOTS: gl.constexpr = small_slots.type.shape[0]
    BLOCK_T: gl.constexpr = y_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = y_desc.block_type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    tiles_t, tiles_n, ranks = gl.cdiv(T, BLOCK_T), gl.cdiv(N, BLOCK_N), gl.cdiv(r, BLOCK_R)
    chunk_in, chunk_out = K // k, N // k
    step, done = 0, 0
    for tile in range(gl.program_id(0), tiles_t * tiles_n, gl.num_programs(0)):
        if MAKES_G:
            g_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_R, 16])
            first, until = _sub_rank_tiles(tile, done, T, N, k * ranks, BLOCK_T, BLOCK_N, GROUP)
            for d in range(first, until, gl.num_programs(0)):
                h = gl.zeros((BLOCK_T, BLOCK_R), dtype=gl.float32, layout=g_layout)
                for c in range(0, chunk_in, BLOCK_K):
                    a = large_slots.index(step % SLOTS)._reinterpret(
                        dtype, [BLOCK_R, BLOCK_K] if A_TRANSPOSED else [BLOCK_K, BLOCK_R], A_LAYOUT
                    )
                    if A_TRANSPOSED:
                        a = a.permute((1, 0))
                    h, step = _multiply(small_slots.index(step % SLOTS), a, h, ring, step, c == 0)
                h = _finish(h, ring, step)
                # column n of block i is place (i, n % q) of output block n // q
                i, q = d // ranks % k, r // k
                t = d // ranks // k * BLOCK_T + gl.arange(0, BLOCK_T, gl.SliceLayout(1, g_layout))[:, None]
                n = d % ranks * BLOCK_R + gl.arange(0, BLOCK_R, gl.SliceLayout(0, g_layout))[None, :]
                pointers = g_ptr + ((n // q).to(gl.int64) * T + t) * r + i * q + n % q
                gl.store(pointers, (h * scaling).to(dtype), mask=(t < T) & (n < r))
                _announce(counters + d // ranks // k)
                _announce(counters + tiles_t)
            done = until
        t, n = _product_offsets(tile, T, N, BLOCK_T, BLOCK_N, GROUP)
        acc = gl.zeros((BLOCK_T, BLOCK_N), dtype=gl.float32, layout=layout)
        for c in range(0, K, BLOCK_K):
            w = large_slots.index(step % SLOTS)
            if W_TRANSPOSED:
                w = w.permute((1, 0))
            acc, step = _multiply(small_slots.index(step % SLOTS), w, acc, ring, step, c == 0)
        for _ in range(n // chunk_out, (gl.minimum(n + BLOCK_N, N) - 1) // chunk_out + 1):
            for _ in range(0, r, BLOCK_K):
                b = large_slots.index(step % SLOTS)._reinterpret(
                    dtype, [BLOCK_N, BLOCK_K] if B_TRANSPOSED else [BLOCK_K, BLOCK_N], B_LAYOUT
                )
                if B_TRANSPOSED:
                    b = b.permute((1, 0))
                acc, step = _multiply(small_slots.index(step % SLOTS), b, acc, ring, step, False)
        acc = _finish(acc, ring, step)
        if HAS_BIAS:
            columns = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
            acc += gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
        tma.store_wait(pendings=0)
        y_tile.store(acc.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [t, n], y_tile)
    if MAKES_GRADIENTS:
        z_desc, h_desc, _, _, z_grad_ptr, x_grad_ptr, z_strides, x_strides, share = gradients
        BLOCK_S: gl.constexpr = z_desc.block_type.shape[0]
        BLOCK_C: gl.constexpr = z_desc.block_type.shape[1]
        BLOCK_H: gl.constexpr = h_desc.block_type.shape[2]
        for_x, for_z = _gradient_tiles(k, r, chunk_in, chunk_out, share, BLOCK_C, BLOCK_H)
        step = _multiply_gradients(
            x_grad_ptr, x_strides, for_x, chunk_in, ring, step, T, r, H_LAYOUT, Z_LAYOUT, BLOCK_S, BLOCK_H, BLOCK_C, WARPS
        )
        step = _multiply_gradients(
            z_grad_ptr, z_strides, for_z, chunk_out, ring, step, T, r, H_LAYOUT, Z_LAYOUT, BLOCK_S, BLOCK_H, BLOCK_C, WARPS
        )
    tma.store_wait(pendings=0)


_SIZES = ["T", "N", "K", "k", "r", "first", "programs", "z_stride_c", "z_stride_r", "x_stride_c", "x_stride_r"]


@gluon.jit(do_not_specialize=_SIZES)
def linear_kernel(
    x_desc,
    w_desc,
    a_desc,
    g_desc,
    b_desc,
    y_desc,
    z_desc,
    h_desc,
    x_wide_desc,
    g_wide_desc,
    bias_ptr,
    g_ptr,
    counters,
    z_grad_ptr,
    x_grad_ptr,
    z_stride_c,
    z_stride_r,
    x_stride_c,
    x_stride_r,
    first,
    programs,
    scaling,
    T,
    N,
    K,
    k,
    r,
    A_LAYOUT: gl.constexpr,
    B_LAYOUT: gl.constexpr,
    H_LAYOUT: gl.constexpr,
    Z_LAYOUT: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    A_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    MAKES_G: gl.constexpr,
    MAKES_GRADIENTS: gl.constexpr,
    BLOCK_R: gl.constexpr,
    SLOTS: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """See `hopper.linear` for the arguments; descriptors of what is not used are any others."""
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = y_desc.block_type.shape[1]
    small_slots = gl.allocate_shared_memory(x_desc.dtype, [SLOTS] + x_desc.block_type.shape, x_desc.layout)
    large_slots = gl.allocate_shared_memory(w_desc.dtype, [SLOTS] + w_desc.block_type.shape, w_desc.layout)
    y_tile = gl.allocate_shared_memory(y_desc.dtype, y_desc.block_type.shape, y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    ring = (small_slots, large_slots, ready, empty)
    sizes = (T, N, K, k, r)
    z_strides, x_strides, share = (z_stride_c, z_stride_r), (x_stride_c, x_stride_r), (first, programs)
    gradients = (z_desc, h_desc, x_wide_desc, g_wide_desc, z_grad_ptr, x_grad_ptr, z_strides, x_strides, share)
    gl.warp_specialize(
        [
            (
                _multiply_tiles,
                (
                    y_desc,
                    y_tile,
                    bias_ptr,
                    g_ptr,
                    scaling,
                    gradients,
                    counters,
                    ring,
                    sizes,
                    A_LAYOUT,
                    B_LAYOUT,
                    H_LAYOUT,
                    Z_LAYOUT,
                    W_TRANSPOSED,
                    A_TRANSPOSED,
                    B_TRANSPOSED,
                    HAS_BIAS,
                    MAKES_G,
                    MAKES_GRADIENTS,
                    BLOCK_K,
                    BLOCK_R,
                    GROUP,
                    WARPS,
                ),
            ),
            (
                _load_tiles,
                (
                    x_desc,
                    w_desc,
                    a_desc,
                    g_desc,
                    b_desc,
                    gradients,
                    counters,
                    ring,
                    sizes,
                    W_TRANSPOSED,
                    A_TRANSPOSED,
                    B_TRANSPOSED,
                    MAKES_G,
                    MAKES_GRADIENTS,
                    BLOCK_N,
                    BLOCK_R,
                    GROUP,
                ),
            ),
        ],
        [1],
        [24],
    )
