"""The device code of `hopper`, which sends two kinds of tiles through one ring of shared-memory slots.

    product      y = x W^T + bias + up(g, B)    [BLOCK_T, BLOCK_N] of y: all of K, then g_j and B_j
    gradient     out_i = z_i^T h_i              [BLOCK_R, BLOCK_C] of one block, transposed: all tokens

Persistent programs take tiles one by one from a list, through a counter in global memory, since tiles differ in length
and another kernel may hold a part of the GPU. In each program one warp loads, and two warpgroups multiply.
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

from .gluon import async_add, async_load, async_store, reinterpret

TURNS = gl.constexpr(8)  # entries of the queue from the loading warp: more than a program can have begun tiles


@gluon.jit
def _tile(place, products, spread, every):
    """Tell whether the tile at a place of the list belongs to a gradient, and its number among tiles of its kind.

    From the first place on, one tile in `every` is a gradient's, `spread` in all; the other gradient tiles come last.
    """
    before = gl.minimum(gl.cdiv(place, every), spread)
    is_last = place >= products + spread
    is_gradient = is_last | ((place % every == 0) & (place // every < spread))
    return is_gradient, gl.where(is_last, place - products, gl.where(is_gradient, before, place - before))


@gluon.jit
def _product_at(tile, T, N, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    """Compute first row and column of a tile of y; tiles run down the rows of a group, then to the next columns."""
    tiles_t = gl.cdiv(T, BLOCK_T)
    per_group = GROUP * gl.cdiv(N, BLOCK_N)
    first = tile // per_group * GROUP
    rows = gl.minimum(tiles_t - first, GROUP)
    return (first + tile % per_group % rows) * BLOCK_T, tile % per_group // rows * BLOCK_N


@gluon.jit
def _gradient_at(tile, r, chunk, BLOCK_C: gl.constexpr, BLOCK_R: gl.constexpr):
    """Compute the block, the first column in the block and the first rank of a tile of a gradient."""
    tiles_r = gl.cdiv(r, BLOCK_R)
    in_block = gl.cdiv(chunk, BLOCK_C) * tiles_r
    return tile // in_block, tile % in_block // tiles_r * BLOCK_C, tile % tiles_r * BLOCK_R


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
def _load(small_desc, small_at, large_desc, large_at, ring, step):
    """Load a pair of tiles into the next slot, once it is empty. TMA gives zeros outside of a tensor."""
    small_slots, large_slots, ready, empty = ring
    SLOTS: gl.constexpr = small_slots.type.shape[0]
    slot = step % SLOTS
    bar = ready.index(slot)
    small = reinterpret(small_slots.index(slot), small_desc.dtype, small_desc.block_type.shape, small_desc.layout)
    large = reinterpret(large_slots.index(slot), large_desc.dtype, large_desc.block_type.shape, large_desc.layout)
    mbarrier.wait(empty.index(slot), (step // SLOTS & 1) ^ 1)
    mbarrier.expect(bar, small_desc.block_type.nbytes + large_desc.block_type.nbytes)
    async_load(small_desc, small_at, bar, small)
    async_load(large_desc, large_at, bar, large)
    return step + 1


@gluon.jit
def _multiply(a, b, acc, ring, step, first):
    """Add a b to acc once the slot is loaded, with one product in flight; a tile's `first` product overwrites acc."""
    small_slots, large_slots, ready, empty = ring
    SLOTS: gl.constexpr = small_slots.type.shape[0]
    mbarrier.wait(ready.index(step % SLOTS), step // SLOTS & 1)
    acc = warpgroup_mma(a, b, acc, is_async=True, use_acc=not first)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    mbarrier.arrive(empty.index((step + SLOTS - 1) % SLOTS), pred=not first)  # the product before is done
    return acc, step + 1


@gluon.jit
def _scale(acc, scales, t, n, T, N):
    """Scale rows and columns of acc once its products are done; scales are read while the last one runs."""
    layout: gl.constexpr = acc.type.layout
    rows = t + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    of_rows = gl.load(scales[0] + rows, mask=rows < T, other=0.0)
    if len(scales) > 1:
        columns = n + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
        # N is a multiple of 8, and told so a thread loads two scales at once
        of_columns = gl.load(scales[1] + columns, mask=columns // 8 < N // 8, other=0.0)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        acc *= of_columns[None, :]
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    return acc * of_rows[:, None]


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
    g_desc,
    b_desc,
    gradients,
    counter,
    queue,
    ring,
    sizes,
    W_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    MAKES_GRADIENTS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Run the loading warp, which takes tiles from the list and loads their operands."""
    T, N, K, k, r, from_z, from_x, spread, every = sizes
    BLOCK_T: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    STEP_R: gl.constexpr = g_desc.block_type.shape[2]
    chunk = N // k
    products = gl.cdiv(T, BLOCK_T) * gl.cdiv(N, BLOCK_N)
    places = products + from_z + from_x
    step, turn = 0, 0
    place = gl.atomic_add(counter, 1, sem="relaxed", scope="gpu")
    while place < places:
        _send(place, queue, turn)
        turn += 1
        is_gradient, tile = _tile(place, products, spread, every)
        if MAKES_GRADIENTS:
            z_desc, h_desc, x_wide_desc, g_wide_desc, _, _, _, _ = gradients
            BLOCK_S: gl.constexpr = z_desc.block_type.shape[0]
            BLOCK_C: gl.constexpr = z_desc.block_type.shape[1]
            BLOCK_R: gl.constexpr = h_desc.block_type.shape[2]
            if is_gradient:
                if tile < from_z:
                    i, c, n = _gradient_at(tile, r, chunk, BLOCK_C, BLOCK_R)
                    for t in range(0, T, BLOCK_S):
                        step = _load(g_wide_desc, [i, t, n], z_desc, [t, i * chunk + c], ring, step)
                else:
                    i, c, n = _gradient_at(tile - from_z, r, K // k, BLOCK_C, BLOCK_R)
                    for t in range(0, T, BLOCK_S):
                        step = _load(h_desc, [i, t, n], x_wide_desc, [t, i * (K // k) + c], ring, step)
        if not is_gradient:
            t, n = _product_at(tile, T, N, BLOCK_T, BLOCK_N, GROUP)
            for c in range(0, K, BLOCK_K):
                step = _load(x_desc, [t, c], w_desc, [n, c] if W_TRANSPOSED else [c, n], ring, step)
            for j in range(n // chunk, (gl.minimum(n + BLOCK_N, N) - 1) // chunk + 1):
                o = n - j * chunk
                for c in range(0, r, STEP_R):
                    step = _load(g_desc, [j, t, c], b_desc, [j, o, c] if B_TRANSPOSED else [j, c, o], ring, step)
        place = gl.atomic_add(counter, 1, sem="relaxed", scope="gpu")
    if place == places + gl.num_programs(0) - 1:  # the last of the programs to find no tile: for the next launch
        gl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
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
    dtype: gl.constexpr,
    H_LAYOUT: gl.constexpr,
    Z_LAYOUT: gl.constexpr,
    BLOCK_S: gl.constexpr,
    BLOCK_C: gl.constexpr,
    BLOCK_R: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Compute one tile of a gradient, transposed in the accumulator, BLOCK_S tokens per step."""
    small_slots, large_slots, ready, empty = ring
    stride_c, stride_r = strides
    SLOTS: gl.constexpr = small_slots.type.shape[0]
    WARPS_R: gl.constexpr = BLOCK_R // 16
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WARPS_R, WARPS // WARPS_R], [16, BLOCK_C * WARPS_R // WARPS, 16]
    )
    i, c, n = _gradient_at(tile, r, chunk, BLOCK_C, BLOCK_R)
    acc = gl.zeros((BLOCK_R, BLOCK_C), dtype=gl.float32, layout=layout)
    for t in range(0, T, BLOCK_S):
        h = reinterpret(small_slots.index(step % SLOTS), dtype, [BLOCK_S, BLOCK_R], H_LAYOUT)
        z = reinterpret(large_slots.index(step % SLOTS), dtype, [BLOCK_S, BLOCK_C], Z_LAYOUT)
        mbarrier.wait(ready.index(step % SLOTS), step // SLOTS & 1)
        acc = warpgroup_mma(h.permute((1, 0)), z, acc, is_async=True, use_acc=t != 0)
        # at once, unlike a product's steps: this tile waits for memory, and an empty slot is one more load on its way
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(step % SLOTS))
        step += 1
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
    scales,
    gradients,
    queue,
    ring,
    sizes,
    G_LAYOUT: gl.constexpr,
    B_LAYOUT: gl.constexpr,
    H_LAYOUT: gl.constexpr,
    Z_LAYOUT: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    MAKES_GRADIENTS: gl.constexpr,
    ADDS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STEP_R: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Run the warpgroups, which multiply the loaded operands and store the results."""
    small_slots, large_slots, ready, empty = ring
    T, N, K, k, r, from_z, from_x, spread, every = sizes
    dtype: gl.constexpr = y_desc.dtype
    SLOTS: gl.constexpr = small_slots.type.shape[0]
    BLOCK_T: gl.constexpr = y_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = y_desc.block_type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    main_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WARPS, 1], [16, BLOCK_N, 256 // small_slots.dtype.primitive_bitwidth]
    )
    chunk = N // k
    products = gl.cdiv(T, BLOCK_T) * gl.cdiv(N, BLOCK_N)
    places = products + from_z + from_x
    step, turn = 0, 0
    place = _receive(queue, turn)
    while place < places:
        is_gradient, tile = _tile(place, products, spread, every)
        if not is_gradient:
            t, n = _product_at(tile, T, N, BLOCK_T, BLOCK_N, GROUP)
            acc = gl.zeros((BLOCK_T, BLOCK_N), dtype=gl.float32, layout=main_layout)
            for c in range(0, K, BLOCK_K):
                w = large_slots.index(step % SLOTS)
                if W_TRANSPOSED:
                    w = w.permute((1, 0))
                acc, step = _multiply(small_slots.index(step % SLOTS), w, acc, ring, step, c == 0)
            if len(scales) > 0:
                acc = _scale(acc, scales, t, n, T, N)
                acc = gl.convert_layout(acc, layout, assert_trivial=True)
            for _j in range(n // chunk, (gl.minimum(n + BLOCK_N, N) - 1) // chunk + 1):
                for _c in range(0, r, STEP_R):
                    b_block: gl.constexpr = [BLOCK_N, STEP_R] if B_TRANSPOSED else [STEP_R, BLOCK_N]
                    b = reinterpret(large_slots.index(step % SLOTS), dtype, b_block, B_LAYOUT)
                    if B_TRANSPOSED:
                        b = b.permute((1, 0))
                    g = reinterpret(small_slots.index(step % SLOTS), dtype, [BLOCK_T, STEP_R], G_LAYOUT)
                    acc, step = _multiply(g, b, acc, ring, step, False)
            acc = _finish(acc, ring, step)
            if HAS_BIAS:
                columns = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
                acc += gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
            tma.store_wait(pendings=0)
            y_tile.store(acc.to(dtype))
            fence_async_shared()
            if ADDS:
                async_add(y_desc, [t, n], y_tile)
            else:
                async_store(y_desc, [t, n], y_tile)
        if MAKES_GRADIENTS:
            z_desc, h_desc, _, _, z_grad_ptr, x_grad_ptr, z_strides, x_strides = gradients
            BLOCK_S: gl.constexpr = z_desc.block_type.shape[0]
            BLOCK_C: gl.constexpr = z_desc.block_type.shape[1]
            BLOCK_R: gl.constexpr = h_desc.block_type.shape[2]
            # not as if and else: ptxas would then wait for every product before the next
            if is_gradient & (tile < from_z):
                step = _multiply_gradient(
                    z_grad_ptr,
                    z_strides,
                    tile,
                    chunk,
                    ring,
                    step,
                    T,
                    r,
                    dtype,
                    H_LAYOUT,
                    Z_LAYOUT,
                    BLOCK_S,
                    BLOCK_C,
                    BLOCK_R,
                    WARPS,
                )
            if is_gradient & (tile >= from_z):
                step = _multiply_gradient(
                    x_grad_ptr,
                    x_strides,
                    tile - from_z,
                    K // k,
                    ring,
                    step,
                    T,
                    r,
                    dtype,
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


@gluon.jit
def run_tiles(
    x_desc,
    w_desc,
    g_desc,
    b_desc,
    y_desc,
    bias_ptr,
    counter,
    scales,
    gradients,
    sizes,
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
):
    """Allocate the ring and run the loading warp and the warpgroups: the body of a kernel.

    `scales` are pointers to a float32 scale for each row of x, and for each row of W, or none.
    """
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    STEP_R: gl.constexpr = g_desc.block_type.shape[2]
    BLOCK_N: gl.constexpr = y_desc.block_type.shape[1]
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
    gl.warp_specialize(
        [
            (
                _multiply_tiles,
                (
                    y_desc,
                    y_tile,
                    bias_ptr,
                    scales,
                    gradients,
                    queue,
                    ring,
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
                    BLOCK_K,
                    STEP_R,
                    GROUP,
                    WARPS,
                ),
            ),
            (
                _load_tiles,
                (
                    x_desc,
                    w_desc,
                    g_desc,
                    b_desc,
                    gradients,
                    counter,
                    queue,
                    ring,
                    sizes,
                    W_TRANSPOSED,
                    B_TRANSPOSED,
                    MAKES_GRADIENTS,
                    BLOCK_N,
                    GROUP,
                ),
            ),
        ],
        [1],
        [24],
    )


SIZES = ["T", "N", "K", "k", "r", "from_z", "from_x", "spread", "every"]
STRIDES = ["z_stride_c", "z_stride_r", "x_stride_c", "x_stride_r"]


@gluon.jit(do_not_specialize=[*SIZES, *STRIDES])
def linear_kernel(
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
):
    """See `hopper.linear` for the arguments; for an unused one any tensor or descriptor may be passed.

    `from_z` and `from_x` are the numbers of tiles of the two gradients; `spread` and `every` are from `hopper._order`.
    The counter, which counts the places of the list that are taken, is 0 before and after a launch.
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
        (),
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
