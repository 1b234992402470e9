"""The device code of `hopper`: tiles of three kinds through one ring of shared-memory slots.

    product      y = x W^T + bias + up(g, B)    [BLOCK_T, BLOCK_N] of y: all of K, then g_j and B_j
    sub-ranks    g = scaling * down(x, A)       BLOCK_T rows of g, block by block, stored where the exchange puts them
    gradient     out_i = z_i^T h_i              [BLOCK_R, BLOCK_C] of one block: all tokens

Persistent programs take one tile after the other from a list, by a counter in global memory. In a program one warp
loads, and two warpgroups multiply. Flags say which rows of g are there. In the list, rows of g come before what reads
them, so whoever waits for one waits for a program that runs, however few the GPU has room for. What is bound by memory
is spread among the products, which are not.
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

NOTHING, PRODUCT, SUB_RANKS, X_GRADIENT, Z_GRADIENT = (gl.constexpr(kind) for kind in range(5))
TURNS = gl.constexpr(8)  # entries of the queue from the loading warp: more than a program can have begun tiles


@gluon.jit
def _list_sizes(tiles_t, tiles_n, counts, MAKES_G: gl.constexpr, GROUP: gl.constexpr):
    """Of the list: sections of its first and second part, and products, rows of g and gradients in each; its length.

    A section has the products of a group of GROUP row tiles, which share columns of W in L2. In the first part it
    begins with the sub-ranks of two groups, so those are done by half, and a share of the gradients from x; in the
    second part with a share of the gradients from z, which need them all.
    """
    x_gradients, z_gradients = counts
    groups = gl.cdiv(tiles_t, GROUP)
    first, second = (groups + 1) // 2, gl.maximum(groups // 2, 1)
    products, rows = GROUP * tiles_n, 2 * GROUP if MAKES_G else 0
    x_share, z_share = gl.cdiv(x_gradients, first), gl.cdiv(z_gradients, second)
    length = first * (rows + x_share + products) + (second - 1) * (z_share + products) + z_share
    length += gl.maximum(tiles_t * tiles_n - (first + second - 1) * products, 0)
    return first, products, rows, x_share, z_share, length


@gluon.jit
def _tile(place, tiles_t, tiles_n, counts, MAKES_G: gl.constexpr, GROUP: gl.constexpr):
    """Kind and number of the tile at a place of the list; some places are left empty."""
    x_gradients, z_gradients = counts
    first, products, rows, x_share, z_share, _ = _list_sizes(tiles_t, tiles_n, counts, MAKES_G, GROUP)
    section = place // (rows + x_share + products)
    at = place % (rows + x_share + products)
    kind, tile, end = gl.to_tensor(PRODUCT), section * products + at - rows - x_share, tiles_t * tiles_n
    if at < rows + x_share:
        kind, tile, end = gl.to_tensor(X_GRADIENT), section * x_share + at - rows, x_gradients
    if at < rows:
        kind, tile, end = gl.to_tensor(SUB_RANKS), section * rows + at, tiles_t
    if section >= first:
        at = place - first * (rows + x_share + products)
        section = at // (z_share + products)
        at = at % (z_share + products)
        kind, tile, end = gl.to_tensor(PRODUCT), (first + section) * products + at - z_share, tiles_t * tiles_n
        if at < z_share:
            kind, tile, end = gl.to_tensor(Z_GRADIENT), section * z_share + at, z_gradients
    return gl.where(tile < end, kind, NOTHING), tile


@gluon.jit
def _product_at(tile, T, N, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    """First row and column of a tile of y: down the rows of a group, then the next columns."""
    tiles_t = gl.cdiv(T, BLOCK_T)
    per_group = GROUP * gl.cdiv(N, BLOCK_N)
    first = tile // per_group * GROUP
    rows = gl.minimum(tiles_t - first, GROUP)
    return (first + tile % per_group % rows) * BLOCK_T, tile % per_group // rows * BLOCK_N


@gluon.jit
def _gradient_at(tile, r, chunk, BLOCK_C: gl.constexpr, BLOCK_R: gl.constexpr):
    """Block, first column in it and first rank of a tile of a gradient."""
    tiles_r = gl.cdiv(r, BLOCK_R)
    in_block = gl.cdiv(chunk, BLOCK_C) * tiles_r
    return tile // in_block, tile % in_block // tiles_r * BLOCK_C, tile % tiles_r * BLOCK_R


@gluon.jit
def _fence():
    """Order accesses to global memory by threads and by TMA."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _announce(counters, row):
    """Say that a row tile of g is there, and count it, once all warps have stored it, for TMA of any program to see."""
    _fence()
    gl.thread_barrier()
    gl.atomic_add(counters + 1, 1, sem="release", scope="gpu")
    gl.atomic_add(counters + 2 + row, 1, sem="release", scope="gpu")


@gluon.jit
def _counted(counter):
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.u32 $0, [$1];", "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _wait_for(counter, count):
    """Wait until so many row tiles of g have been announced."""
    seen = _counted(counter)
    while seen < count:
        seen = _counted(counter)
    _fence()


@gluon.jit
def _send(place, queue, turn):
    """Tell the warpgroups which place of the list is next."""
    places, sent = queue
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    places.index(turn % TURNS).store(gl.full([1], place, gl.int32, layout))
    mbarrier.arrive(sent.index(turn % TURNS))


@gluon.jit
def _receive(queue, turn):
    places, sent = queue
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(sent.index(turn % TURNS), turn // TURNS & 1)
    return gl.max(places.index(turn % TURNS).load(layout), 0)


@gluon.jit
def _load(small_desc, small_at, large_desc, large_at, large_next, ring, step):
    """Load tiles into the next slot, once it is empty; the large part in one piece, or two if `large_next` is no None.

    TMA gives zeros outside of a tensor.
    """
    small_slots, large_slots, ready, empty = ring
    SLOTS: gl.constexpr = small_slots.type.shape[0]
    PIECES: gl.constexpr = 1 if large_next is None else 2
    slot = step % SLOTS
    bar = ready.index(slot)
    small = small_slots.index(slot)._reinterpret(small_desc.dtype, small_desc.block_type.shape, small_desc.layout)
    large = large_slots.index(slot)._reinterpret(
        large_desc.dtype, [PIECES] + large_desc.block_type.shape, large_desc.layout
    )
    mbarrier.wait(empty.index(slot), (step // SLOTS & 1) ^ 1)
    mbarrier.expect(bar, small_desc.block_type.nbytes + PIECES * large_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(small_desc, small_at, bar, small)
    tma.async_copy_global_to_shared(large_desc, large_at, bar, large.index(0))
    if PIECES == 2:
        tma.async_copy_global_to_shared(large_desc, large_next, bar, large.index(1))
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
    queue,
    ring,
    sizes,
    W_TRANSPOSED: gl.constexpr,
    A_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    MAKES_G: gl.constexpr,
    MAKES_GRADIENTS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_R: gl.constexpr,
    GROUP: gl.constexpr,
):
    """The loading warp: take tiles from the list and load what they multiply."""
    T, N, K, k, r, counts = sizes
    BLOCK_T: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    chunk_in, chunk_out, tiles_t, tiles_n = K // k, N // k, gl.cdiv(T, BLOCK_T), gl.cdiv(N, BLOCK_N)
    length = _list_sizes(tiles_t, tiles_n, counts, MAKES_G, GROUP)[5]
    step, turn = 0, 0
    place = gl.atomic_add(counters, 1, sem="relaxed", scope="gpu")
    while place < length:
        _send(place, queue, turn)
        turn += 1
        kind, tile = _tile(place, tiles_t, tiles_n, counts, MAKES_G, GROUP)
        if kind == PRODUCT:
            t, n = _product_at(tile, T, N, BLOCK_T, BLOCK_N, GROUP)
            for c in range(0, K, BLOCK_K):
                step = _load(x_desc, [t, c], w_desc, [n, c] if W_TRANSPOSED else [c, n], None, ring, step)
            if MAKES_G:
                _wait_for(counters + 2 + t // BLOCK_T, 1)
            for j in range(n // chunk_out, (gl.minimum(n + BLOCK_N, N) - 1) // chunk_out + 1):
                o = n - j * chunk_out
                for c in range(0, r, BLOCK_K):
                    step = _load(g_desc, [j, t, c], b_desc, [j, o, c] if B_TRANSPOSED else [j, c, o], None, ring, step)
        if MAKES_G:
            if kind == SUB_RANKS:
                for i in range(k):
                    for n in range(0, r, BLOCK_R):
                        for c in range(0, chunk_in, BLOCK_D):
                            t, at = tile * BLOCK_T, i * chunk_in + c
                            a_at = [i, n, c] if A_TRANSPOSED else [i, c, n]
                            x_next = None if BLOCK_D == BLOCK_K else [t, at + BLOCK_K]
                            step = _load(a_desc, a_at, x_desc, [t, at], x_next, ring, step)
        if MAKES_GRADIENTS:
            z_desc, h_desc, x_wide_desc, g_wide_desc, _, _, _, _ = gradients
            BLOCK_S: gl.constexpr = z_desc.block_type.shape[0]
            BLOCK_C: gl.constexpr = z_desc.block_type.shape[1]
            if kind == X_GRADIENT:
                i, c, n = _gradient_at(tile, r, chunk_in, BLOCK_C, BLOCK_R)
                for t in range(0, T, BLOCK_S):
                    step = _load(h_desc, [i, t, n], x_wide_desc, [t, i * chunk_in + c], None, ring, step)
            if kind == Z_GRADIENT:
                if MAKES_G:
                    _wait_for(counters + 1, tiles_t)
                i, c, n = _gradient_at(tile, r, chunk_out, BLOCK_C, BLOCK_R)
                for t in range(0, T, BLOCK_S):
                    step = _load(g_wide_desc, [i, t, n], z_desc, [t, i * chunk_out + c], None, ring, step)
        place = gl.atomic_add(counters, 1, sem="relaxed", scope="gpu")
    _send(place, queue, turn)


@gluon.jit
def _multiply_gradient(
    out_ptr,
    strides,
    tile,
    chunk,
    ring,
    step,
    T,
    r,
    H_LAYOUT: gl.constexpr,
    Z_LAYOUT: gl.constexpr,
    BLOCK_S: gl.constexpr,
    BLOCK_C: gl.constexpr,
    BLOCK_R: gl.constexpr,
    WARPS: gl.constexpr,
):
    """One tile of a gradient, transposed in the accumulator."""
    small_slots, large_slots, ready, empty = ring
    stride_c, stride_r = strides
    dtype: gl.constexpr = small_slots.dtype
    SLOTS: gl.constexpr = small_slots.type.shape[0]
    WARPS_R: gl.constexpr = BLOCK_R // 16
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WARPS_R, WARPS // WARPS_R], [16, BLOCK_C * WARPS_R // WARPS, 16]
    )
    i, c, n = _gradient_at(tile, r, chunk, BLOCK_C, BLOCK_R)
    acc = gl.zeros((BLOCK_R, BLOCK_C), dtype=gl.float32, layout=layout)
    for t in range(0, T, BLOCK_S):
        h = small_slots.index(step % SLOTS)._reinterpret(dtype, [BLOCK_S, BLOCK_R], H_LAYOUT)
        z = large_slots.index(step % SLOTS)._reinterpret(dtype, [BLOCK_S, BLOCK_C], Z_LAYOUT)
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
    queue,
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
    SUB_RANK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_R: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """The warpgroups: multiply what is loaded, and store."""
    small_slots, large_slots, ready, empty = ring
    T, N, K, k, r, counts = sizes
    dtype: gl.constexpr = y_desc.dtype
    SLOTS: gl.constexpr = small_slots.type.shape[0]
    BLOCK_T: gl.constexpr = y_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = y_desc.block_type.shape[1]
    y_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    g_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_R, 16])
    chunk_in, chunk_out, tiles_t, tiles_n = K // k, N // k, gl.cdiv(T, BLOCK_T), gl.cdiv(N, BLOCK_N)
    length = _list_sizes(tiles_t, tiles_n, counts, MAKES_G, GROUP)[5]
    step, turn = 0, 0
    place = _receive(queue, turn)
    while place < length:
        kind, tile = _tile(place, tiles_t, tiles_n, counts, MAKES_G, GROUP)
        if kind == PRODUCT:
            t, n = _product_at(tile, T, N, BLOCK_T, BLOCK_N, GROUP)
            acc = gl.zeros((BLOCK_T, BLOCK_N), dtype=gl.float32, layout=y_layout)
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
                columns = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, y_layout))
                acc += gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
            tma.store_wait(pendings=0)
            y_tile.store(acc.to(dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(y_desc, [t, n], y_tile)
        if MAKES_G:
            if kind == SUB_RANKS:
                ts = tile * BLOCK_T + gl.arange(0, BLOCK_T, gl.SliceLayout(1, g_layout))[:, None]
                for i in range(k):
                    for n in range(0, r, BLOCK_R):
                        h = gl.zeros((BLOCK_T, BLOCK_R), dtype=gl.float32, layout=g_layout)
                        for c in range(0, chunk_in, BLOCK_D):
                            x = large_slots.index(step % SLOTS)._reinterpret(
                                dtype, [BLOCK_T, BLOCK_D], small_slots.layout
                            )
                            a = small_slots.index(step % SLOTS)._reinterpret(
                                dtype, [BLOCK_R, BLOCK_D] if A_TRANSPOSED else [BLOCK_D, BLOCK_R], A_LAYOUT
                            )
                            if A_TRANSPOSED:
                                a = a.permute((1, 0))
                            h, step = _multiply(x, a, h, ring, step, c == 0)
                        h = _finish(h, ring, step)
                        # column n of block i is place (i, n % SUB_RANK) of output block n // SUB_RANK
                        ns = n + gl.arange(0, BLOCK_R, gl.SliceLayout(0, g_layout))[None, :]
                        rows = g_ptr + ((ns // SUB_RANK).to(gl.int64) * T + ts) * r
                        gl.store(
                            rows + i * SUB_RANK + ns % SUB_RANK, (h * scaling).to(dtype), mask=(ts < T) & (ns < r)
                        )
                _announce(counters, tile)
        if MAKES_GRADIENTS:
            z_desc, h_desc, _, _, z_grad_ptr, x_grad_ptr, z_strides, x_strides = gradients
            BLOCK_S: gl.constexpr = z_desc.block_type.shape[0]
            BLOCK_C: gl.constexpr = z_desc.block_type.shape[1]
            if kind == X_GRADIENT:
                step = _multiply_gradient(
                    x_grad_ptr,
                    x_strides,
                    tile,
                    chunk_in,
                    ring,
                    step,
                    T,
                    r,
                    H_LAYOUT,
                    Z_LAYOUT,
                    BLOCK_S,
                    BLOCK_C,
                    BLOCK_R,
                    WARPS,
                )
            if kind == Z_GRADIENT:
                step = _multiply_gradient(
                    z_grad_ptr,
                    z_strides,
                    tile,
                    chunk_out,
                    ring,
                    step,
                    T,
                    r,
                    H_LAYOUT,
                    Z_LAYOUT,
                    BLOCK_S,
                    BLOCK_C,
                    BLOCK_R,
                    WARPS,
                )
        turn += 1
        place = _receive(queue, turn)
    tma.store_wait(pendings=0)


_SIZES = ["T", "N", "K", "k", "r", "x_gradients", "z_gradients"]
_STRIDES = ["z_stride_c", "z_stride_r", "x_stride_c", "x_stride_r"]


@gluon.jit(do_not_specialize=[*_SIZES, *_STRIDES])
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
    scaling,
    T,
    N,
    K,
    k,
    r,
    x_gradients,
    z_gradients,
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
    SUB_RANK: gl.constexpr,
    BLOCK_R: gl.constexpr,
    SLOTS: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """See `hopper.linear` for the arguments; descriptors of what is not used are any others."""
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = y_desc.block_type.shape[1]
    BLOCK_D: gl.constexpr = x_desc.block_type.nbytes * 8 // x_desc.dtype.primitive_bitwidth // BLOCK_R  # of A's rows
    small_slots = gl.allocate_shared_memory(x_desc.dtype, [SLOTS] + x_desc.block_type.shape, x_desc.layout)
    large_slots = gl.allocate_shared_memory(w_desc.dtype, [SLOTS] + w_desc.block_type.shape, w_desc.layout)
    y_tile = gl.allocate_shared_memory(y_desc.dtype, y_desc.block_type.shape, y_desc.layout)
    places = gl.allocate_shared_memory(gl.int32, [TURNS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    sent = gl.allocate_shared_memory(gl.int64, [TURNS, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    for turn in gl.static_range(TURNS):
        mbarrier.init(sent.index(turn), count=1)
    queue = (places, sent)
    ring = (small_slots, large_slots, ready, empty)
    sizes = (T, N, K, k, r, (x_gradients, z_gradients))
    z_strides, x_strides = (z_stride_c, z_stride_r), (x_stride_c, x_stride_r)
    gradients = (z_desc, h_desc, x_wide_desc, g_wide_desc, z_grad_ptr, x_grad_ptr, z_strides, x_strides)
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
                    queue,
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
                    SUB_RANK,
                    BLOCK_K,
                    BLOCK_D,
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
                    queue,
                    ring,
                    sizes,
                    W_TRANSPOSED,
                    A_TRANSPOSED,
                    B_TRANSPOSED,
                    MAKES_G,
                    MAKES_GRADIENTS,
                    BLOCK_N,
                    BLOCK_D,
                    BLOCK_R,
                    GROUP,
                ),
            ),
        ],
        [1],
        [24],
    )
