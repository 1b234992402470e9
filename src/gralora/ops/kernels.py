"""Triton kernels that run on any GPU that Triton supports, and in its interpreter on the CPU.

They implement `interface.Kernels`; see there for the arguments.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import batched
from .batched import down_plain, dropout_scale
from .interface import Conversion
from .launch import Launcher
from .layout import row_stride, rows
from .torch_seam import is_traced

PROGRAMS = 128  # that a launch is to have at least: about as many as a large GPU has processors
FEW_TOKENS = 2048  # up to which one block is projected down by torch's product


@triton.jit
def _down_tile(
    tile,
    x_ptr,
    A_ptr,
    g_ptr,
    scaling,
    T,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    SUB_RANK: tl.constexpr,
    STRIDE_XT: tl.constexpr,
    STRIDE_AK: tl.constexpr,
    STRIDE_AI: tl.constexpr,
    STRIDE_AR: tl.constexpr,
    STRIDE_GT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Multiply one tile of tokens by one tile of A, and store the columns where the exchange puts them."""
    tiles_r = tl.cdiv(RANK, BLOCK_R)
    tiles_A = RANK // SUB_RANK * tiles_r
    i = tile % tiles_A // tiles_r
    t = tile // tiles_A * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tile % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    p_x = x_ptr + t[:, None].to(tl.int64) * STRIDE_XT + i * CHUNK + c[None, :]
    p_A = A_ptr + i * STRIDE_AK + c[:, None] * STRIDE_AI + n[None, :] * STRIDE_AR
    b_h = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for c0 in range(0, CHUNK, BLOCK_C):
        b_x = tl.load(p_x, mask=(t[:, None] < T) & (c0 + c[None, :] < CHUNK), other=0.0)
        b_A = tl.load(p_A, mask=(c0 + c[:, None] < CHUNK) & (n[None, :] < RANK), other=0.0)
        b_h = tl.dot(b_x, b_A.to(b_x.dtype), b_h)
        p_x += BLOCK_C
        p_A += BLOCK_C * STRIDE_AI
    # column n of block i is place (i, n % q) of output block n // q
    block, place = n // SUB_RANK, i * SUB_RANK + n % SUB_RANK
    p_g = g_ptr + (block[None, :].to(tl.int64) * T + t[:, None]) * STRIDE_GT + place[None, :]
    b_h *= tl.cast(scaling, tl.float32)  # float64 where torch.compile launches
    tl.store(p_g, b_h.to(g_ptr.dtype.element_ty), mask=(t[:, None] < T) & (n[None, :] < RANK))


@triton.jit
def _convert(source_ptr, target_ptr, SIZE: tl.constexpr):
    """Copy SIZE elements to another dtype, all programs of the first axis together."""
    if SIZE:
        for m0 in range(tl.program_id(0) * 1024, SIZE, tl.num_programs(0) * 1024):
            m = m0 + tl.arange(0, 1024)
            b_source = tl.load(source_ptr + m, mask=m < SIZE)
            tl.store(target_ptr + m, b_source.to(target_ptr.dtype.element_ty), mask=m < SIZE)


@triton.jit(do_not_specialize=["T"])
def _down_kernel(
    x_ptr,
    A_ptr,
    g_ptr,
    factor_ptr,
    converted_ptr,
    scaling,
    T,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    SUB_RANK: tl.constexpr,
    STRIDE_XT: tl.constexpr,
    STRIDE_AK: tl.constexpr,
    STRIDE_AI: tl.constexpr,
    STRIDE_AR: tl.constexpr,
    STRIDE_GT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CONVERTED: tl.constexpr,
):
    """Project down; together, the programs also convert another factor, of CONVERTED elements."""
    _convert(factor_ptr, converted_ptr, CONVERTED)
    _down_tile(
        tl.program_id(0),
        x_ptr,
        A_ptr,
        g_ptr,
        scaling,
        T,
        CHUNK,
        RANK,
        SUB_RANK,
        STRIDE_XT,
        STRIDE_AK,
        STRIDE_AI,
        STRIDE_AR,
        STRIDE_GT,
        BLOCK_T,
        BLOCK_C,
        BLOCK_R,
    )


@triton.jit(do_not_specialize=["T"])
def _downs_kernel(
    x_ptr,
    A_0_ptr,
    A_1_ptr,
    A_2_ptr,
    g_ptr,
    factor_0_ptr,
    factor_1_ptr,
    factor_2_ptr,
    converted_0_ptr,
    converted_1_ptr,
    converted_2_ptr,
    scaling_0,
    scaling_1,
    scaling_2,
    T,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    SUB_RANK: tl.constexpr,
    STRIDE_XT: tl.constexpr,
    STRIDE_AK: tl.constexpr,
    STRIDE_AI: tl.constexpr,
    STRIDE_AR: tl.constexpr,
    STRIDE_GT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CONVERTED_0: tl.constexpr,
    CONVERTED_1: tl.constexpr,
    CONVERTED_2: tl.constexpr,
):
    """Do what `_down_kernel` does for up to three factors A; the second axis of the grid says for which."""
    which = tl.program_id(1)
    A_ptr, scaling = A_0_ptr, scaling_0
    if which == 0:
        _convert(factor_0_ptr, converted_0_ptr, CONVERTED_0)
    elif which == 1:
        A_ptr, scaling = A_1_ptr, scaling_1
        _convert(factor_1_ptr, converted_1_ptr, CONVERTED_1)
    else:
        A_ptr, scaling = A_2_ptr, scaling_2
        _convert(factor_2_ptr, converted_2_ptr, CONVERTED_2)
    _down_tile(
        tl.program_id(0),
        x_ptr,
        A_ptr,
        g_ptr + which.to(tl.int64) * T * (RANK // SUB_RANK) * STRIDE_GT,
        scaling,
        T,
        CHUNK,
        RANK,
        SUB_RANK,
        STRIDE_XT,
        STRIDE_AK,
        STRIDE_AI,
        STRIDE_AR,
        STRIDE_GT,
        BLOCK_T,
        BLOCK_C,
        BLOCK_R,
    )


def _row_stride(x: Tensor) -> int:
    return row_stride(x.shape, x.stride())


def _dot_size(n: int, most: int) -> int:
    """Return the power of two that holds n, at least tl.dot's 16, at most `most`, which fits into shared memory."""
    return min(most, max(16, 1 << (n - 1).bit_length()))


_down = Launcher(__name__, _down_kernel, num_warps=4, num_stages=3)
_downs = Launcher(__name__, _downs_kernel, num_warps=4, num_stages=3)


def down(x: Tensor, A: Tensor, h: int, scaling: float, convert: Conversion | None = None) -> Tensor:
    """Project down, exchange and scale in one pass over x, summing in float32; convert in the same launch.

    The plain LoRA part is a product of its own. Rounding its sums to half precision block by block took gradients 1.22
    times as far from float64. For few tokens and one block, torch's product sums in parts, which keep a GPU busy.
    """
    k, chunk, R = A.shape
    r, T = R - h, x.numel() // (k * chunk)
    if k == 1 and not is_traced(x) and T <= FEW_TOKENS:
        return batched.down(x, A, h, scaling, convert)
    g = x.new_empty(k, T, R)
    size, source, target = _conversion(convert, A)
    block_r = _dot_size(r, 128)
    block_t = _tokens_of_tile(x, T, k * -(-r // block_r))
    constants = (chunk, r, r // k, _row_stride(x), *A.stride(), R, block_t, 64, block_r, size)
    grid = (-(-T // block_t) * k * -(-r // block_r), 1, 1)
    _down(constants, grid, (x, A, g, source, target), (float(scaling), T), constants)
    if h:
        g[..., r:] = down_plain(rows(x), A[..., r:], scaling)
    return g


def _tokens_of_tile(x: Tensor, T: int, others: int) -> int:
    """Return how many of T tokens a program projects down: 128, or fewer where few programs would have work.

    Args:
        x: the tokens; while torch.compile traces, their number may stand for any.
        T: their number.
        others: how many programs there are for each tile of tokens.
    """
    tokens = 128
    while not is_traced(x) and tokens > 16 and -(-T // tokens) * others < PROGRAMS:
        tokens //= 2
    return tokens


def _conversion(convert: Conversion | None, unused: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return the size of what a launch is to convert, source and target; size 0 if there is nothing to convert."""
    if convert is None:
        return 0, unused, unused
    if convert.source.stride() != convert.target.stride():  # a source with gaps in memory
        convert.target.copy_(convert.source)
        return 0, unused, unused
    return convert.source.numel(), *convert


def downs(
    x: Tensor, As: Sequence[Tensor], h: int, scalings: Sequence[float], converts: Sequence[Conversion | None]
) -> list[Tensor]:
    """Project down by up to three factors of the same layout in one launch, in which x is read from memory once."""
    first, n = As[0], len(As)
    if h or n > 3 or any(A.shape != first.shape or A.stride() != first.stride() or A.dtype != first.dtype for A in As):
        return [down(x, A, h, scaling, c) for A, scaling, c in zip(As, scalings, converts, strict=True)]
    (k, chunk, R), rest = first.shape, 3 - n
    T = x.numel() // (k * chunk)
    g = x.new_empty(n, k, T, R)
    sizes, sources, targets = zip(*[_conversion(c, first) for c in (*converts, *[None] * rest)], strict=True)
    block_r = _dot_size(R, 128)
    block_t = _tokens_of_tile(x, T, n * k * -(-R // block_r))
    constants = (chunk, R, R // k, _row_stride(x), *first.stride(), R, block_t, 64, block_r, *sizes)
    grid = (-(-T // block_t) * k * -(-R // block_r), n, 1)
    numbers = (*map(float, scalings), *[1.0] * rest, T)
    _downs(constants, grid, (x, *As, *[first] * rest, g, *sources, *targets), numbers, constants)
    return list(g.unbind())


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    """Return value and derivative of an activation of float32 numbers, by its name in `activations.ACTIVATIONS`."""
    if ACTIVATION == "silu":
        b_sigmoid = tl.sigmoid(x)
        return x * b_sigmoid, b_sigmoid * (1 + x * (1 - b_sigmoid))
    elif ACTIVATION == "gelu":
        b_below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * b_below, b_below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        b_below = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))  # (1 + tanh) / 2
        b_slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
        return x * b_below, b_below * (1 + x * (1 - b_below) * b_slope)


@triton.jit
def _gated_kernel(
    e_ptr,
    u_ptr,
    hidden_ptr,
    WIDTH: tl.constexpr,
    STRIDE_ET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute part of one row of act(e) * u."""
    t, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < WIDTH
    b_e = tl.load(e_ptr + t * STRIDE_ET + c, mask=inside, other=0.0).to(tl.float32)
    b_u = tl.load(u_ptr + t * STRIDE_ET + c, mask=inside, other=0.0).to(tl.float32)
    b_act, _ = _activation(b_e, ACTIVATION)
    tl.store(hidden_ptr + t * WIDTH + c, (b_act * b_u).to(hidden_ptr.dtype.element_ty), mask=inside)


_gated = Launcher(__name__, _gated_kernel, num_warps=4)


def gated(e: Tensor, u: Tensor, activation: str, hidden: Tensor) -> None:
    width = e.shape[-1]
    constants = (width, _stride_of_rows(e), activation, 1024)
    _gated(constants, (e.numel() // width, -(-width // 1024), 1), (e, u, hidden), (), constants)


def _stride_of_rows(e: Tensor) -> int:
    """Return the stride from row to row of a contiguous tensor, or of half of its columns."""
    return e.stride()[-2] if e.dim() > 1 else e.shape[0]


@triton.jit
def _gated_backward_kernel(
    e_ptr,
    u_ptr,
    dh_ptr,
    de_ptr,
    du_ptr,
    WIDTH: tl.constexpr,
    STRIDE_ET: tl.constexpr,
    STRIDE_DT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute part of one row of both gradients."""
    t, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < WIDTH
    b_e = tl.load(e_ptr + t * STRIDE_ET + c, mask=inside, other=0.0).to(tl.float32)
    b_u = tl.load(u_ptr + t * STRIDE_ET + c, mask=inside, other=0.0).to(tl.float32)
    b_dh = tl.load(dh_ptr + t * WIDTH + c, mask=inside, other=0.0).to(tl.float32)
    b_act, b_slope = _activation(b_e, ACTIVATION)
    tl.store(de_ptr + t * STRIDE_DT + c, (b_dh * b_u * b_slope).to(de_ptr.dtype.element_ty), mask=inside)
    tl.store(du_ptr + t * STRIDE_DT + c, (b_dh * b_act).to(du_ptr.dtype.element_ty), mask=inside)


_gated_backward = Launcher(__name__, _gated_backward_kernel, num_warps=4)


def gated_backward(e: Tensor, u: Tensor, d_hidden: Tensor, activation: str, de: Tensor, du: Tensor) -> None:
    width = e.shape[-1]
    constants = (width, _stride_of_rows(e), _stride_of_rows(de), activation, 1024)
    grid = (e.numel() // width, -(-width // 1024), 1)
    _gated_backward(constants, grid, (e, u, d_hidden, de, du), (), constants)


@triton.jit
def _up_tile(
    tile,
    g_ptr,
    B_ptr,
    y_ptr,
    T,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    STRIDE_BK: tl.constexpr,
    STRIDE_BR: tl.constexpr,
    STRIDE_BO: tl.constexpr,
    STRIDE_YT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add g_j B_j to one tile, of tokens and of outputs of block j, of y."""
    tiles_t, tiles_o = tl.cdiv(T, BLOCK_T), tl.cdiv(CHUNK, BLOCK_O)
    j = tile // (tiles_t * tiles_o)
    t = tile % tiles_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tile // tiles_t % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    n = tl.arange(0, BLOCK_R)
    in_t, in_o = t[:, None] < T, o[None, :] < CHUNK
    p_y = y_ptr + t[:, None].to(tl.int64) * STRIDE_YT + j * CHUNK + o[None, :]
    p_g = g_ptr + (j.to(tl.int64) * T + t[:, None]) * RANK + n[None, :]
    p_B = B_ptr + j * STRIDE_BK + n[:, None] * STRIDE_BR + o[None, :] * STRIDE_BO
    b_y = tl.load(p_y, mask=in_t & in_o, other=0.0).to(tl.float32)
    for n0 in range(0, RANK, BLOCK_R):
        b_g = tl.load(p_g, mask=in_t & (n0 + n[None, :] < RANK), other=0.0)
        b_B = tl.load(p_B, mask=(n0 + n[:, None] < RANK) & in_o, other=0.0)
        b_y = tl.dot(b_g, b_B.to(b_g.dtype), b_y)
        p_g += BLOCK_R
        p_B += BLOCK_R * STRIDE_BR
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=in_t & in_o)


@triton.jit
def _factor_grad_tile(
    tile,
    x_ptr,
    h_ptr,
    out_ptr,
    T,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    STRIDE_XT: tl.constexpr,
    STRIDE_OC: tl.constexpr,
    STRIDE_OR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute a tile of block i of x_i^T h_i, summed over all tokens."""
    tiles_c, tiles_r = tl.cdiv(CHUNK, BLOCK_C), tl.cdiv(RANK, BLOCK_R)
    i = tile // (tiles_c * tiles_r)
    c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tile // tiles_c % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.arange(0, BLOCK_T)
    p_x = x_ptr + t[None, :].to(tl.int64) * STRIDE_XT + i * CHUNK + c[:, None]
    p_h = h_ptr + (i.to(tl.int64) * T + t[:, None]) * RANK + n[None, :]
    b_out = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for t0 in range(0, T, BLOCK_T):
        b_x = tl.load(p_x, mask=(c[:, None] < CHUNK) & (t0 + t[None, :] < T), other=0.0)
        b_h = tl.load(p_h, mask=(t0 + t[:, None] < T) & (n[None, :] < RANK), other=0.0)
        b_out = tl.dot(b_x, b_h, b_out)
        p_x += BLOCK_T * STRIDE_XT
        p_h += BLOCK_T * RANK
    p_out = out_ptr + i * CHUNK * RANK + c[:, None] * STRIDE_OC + n[None, :] * STRIDE_OR
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=(c[:, None] < CHUNK) & (n[None, :] < RANK))


@triton.jit(do_not_specialize=["T"])
def _up_kernel(
    g_ptr,
    B_ptr,
    y_ptr,
    T,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    STRIDE_BK: tl.constexpr,
    STRIDE_BR: tl.constexpr,
    STRIDE_BO: tl.constexpr,
    STRIDE_YT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    _up_tile(
        tl.program_id(0),
        g_ptr,
        B_ptr,
        y_ptr,
        T,
        CHUNK,
        RANK,
        STRIDE_BK,
        STRIDE_BR,
        STRIDE_BO,
        STRIDE_YT,
        BLOCK_T,
        BLOCK_O,
        BLOCK_R,
    )


_up = Launcher(__name__, _up_kernel, num_warps=4)


def up(g: Tensor, B: Tensor, y: Tensor) -> None:
    """Add the up-projection to y, summing in float32 and rounding once."""
    (k, T, r), chunk = g.shape, B.shape[2]
    constants = (chunk, r, *B.stride(), _row_stride(y), 64, 64, _dot_size(r, 64))
    _up(constants, (-(-T // 64) * -(-chunk // 64) * k, 1, 1), (g, B, y), (T,), constants)


@triton.jit(do_not_specialize=["T"])
def _gradients_kernel(
    x_ptr,
    dy_ptr,
    g_ptr,
    dh_ptr,
    A_ptr,
    dx_ptr,
    dA_ptr,
    dB_ptr,
    T,
    CHUNK_I: tl.constexpr,
    CHUNK_O: tl.constexpr,
    RANK: tl.constexpr,
    STRIDE_XT: tl.constexpr,
    STRIDE_YT: tl.constexpr,
    STRIDE_AK: tl.constexpr,
    STRIDE_AI: tl.constexpr,
    STRIDE_AR: tl.constexpr,
    STRIDE_DXT: tl.constexpr,
    STRIDE_DAI: tl.constexpr,
    STRIDE_DAR: tl.constexpr,
    STRIDE_DBR: tl.constexpr,
    STRIDE_DBO: tl.constexpr,
    TILES_A: tl.constexpr,
    TILES_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute tiles of dA, then of dB, then of dx, since the longest should come first."""
    tile = tl.program_id(0)
    if tile < TILES_A:
        _factor_grad_tile(
            tile, x_ptr, dh_ptr, dA_ptr, T, CHUNK_I, RANK, STRIDE_XT, STRIDE_DAI, STRIDE_DAR, 64, 64, BLOCK_R
        )
    elif tile < TILES_A + TILES_B:
        _factor_grad_tile(
            tile - TILES_A, dy_ptr, g_ptr, dB_ptr, T, CHUNK_O, RANK, STRIDE_YT, STRIDE_DBO, STRIDE_DBR, 64, 64, BLOCK_R
        )
    else:
        _up_tile(
            tile - TILES_A - TILES_B,
            dh_ptr,
            A_ptr,
            dx_ptr,
            T,
            CHUNK_I,
            RANK,
            STRIDE_AK,
            STRIDE_AR,
            STRIDE_AI,
            STRIDE_DXT,
            64,
            64,
            BLOCK_R,
        )


_gradients = Launcher(__name__, _gradients_kernel, num_warps=4, num_stages=4)


def factor_gradients(
    x: Tensor,
    dy: Tensor,
    g: Tensor,
    dh: Tensor,
    dA: Tensor | None,
    dB: Tensor | None,
    A: Tensor | None = None,
    dx: Tensor | None = None,
) -> None:
    """Compute all gradients in one launch, which is the fastest way for few tokens."""
    (k, T, r), chunk_i, chunk_o = g.shape, x.shape[-1] // g.shape[0], dy.shape[-1] // g.shape[0]
    block_r, tiles_t, tiles_i, tiles_o = _dot_size(r, 64), -(-T // 64), -(-chunk_i // 64), -(-chunk_o // 64)
    tiles_r = -(-r // block_r)
    tiles_A = 0 if dA is None else k * tiles_i * tiles_r
    tiles_B = 0 if dB is None else k * tiles_o * tiles_r
    tiles_x = 0 if dx is None else k * tiles_i * tiles_t
    if not tiles_A + tiles_B + tiles_x:
        return
    a_strides = (0, 0, 0) if A is None else A.stride()
    da_strides, db_strides = ((0, 0) if out is None else out.stride()[1:] for out in (dA, dB))
    strides = _row_stride(x), _row_stride(dy), *a_strides, 0 if dx is None else _row_stride(dx)
    strides = *strides, *da_strides, *db_strides
    constants = (chunk_i, chunk_o, r, *strides, tiles_A, tiles_B, block_r)
    others = (x if t is None else t for t in (A, dx, dA, dB))
    _gradients(constants, (tiles_A + tiles_B + tiles_x, 1, 1), (x, dy, g, dh, *others), (T,), constants)


@triton.jit(do_not_specialize=["WIDTH"])
def _dropout_kernel(x_ptr, y_ptr, seed_ptr, p, scale, WIDTH, STRIDE_XT: tl.constexpr, BLOCK: tl.constexpr):
    """Drop elements in part of one row, four runs of BLOCK columns, as philox gives four numbers at a time."""
    t, first = tl.program_id(0), tl.program_id(1) * BLOCK
    c = first + tl.arange(0, BLOCK)
    u_0, u_1, u_2, u_3 = tl.philox(tl.load(seed_ptr), c, t, 0, 0)
    for run in tl.static_range(4):
        u = u_0 if run == 0 else u_1 if run == 1 else u_2 if run == 2 else u_3
        n = 4 * first + run * BLOCK + tl.arange(0, BLOCK)
        b_x = tl.load(x_ptr + t.to(tl.int64) * STRIDE_XT + n, mask=n < WIDTH, other=0.0).to(tl.float32)
        kept = tl.uint_to_uniform_float(u) >= p
        b_y = b_x * tl.where(kept, scale, 0.0)  # NaN stays NaN, as in torch
        tl.store(y_ptr + t.to(tl.int64) * WIDTH + n, b_y.to(y_ptr.dtype.element_ty), mask=n < WIDTH)


_dropout = Launcher(__name__, _dropout_kernel, num_warps=4)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    (T, width), y = x.shape, x.new_empty(x.shape)
    grid = (T, -(-width // 512), 1)
    constants = (x.stride(0), 128)
    _dropout(constants, grid, (x, y, seed), (float(p), dropout_scale(p), width), constants)
    return y


@triton.jit
def _delta_weight_kernel(
    A_ptr,
    B_ptr,
    dW_ptr,
    scaling,
    CHUNK_IN: tl.constexpr,
    CHUNK_OUT: tl.constexpr,
    RANK: tl.constexpr,
    SUB_RANK: tl.constexpr,
    FEATURES_IN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one tile of block (j, i) of dW: rows of the i-th part of B_j times the j-th columns of A_i."""
    i = tl.program_id(0) // tl.cdiv(CHUNK_IN, BLOCK_I)
    j = tl.program_id(1) // tl.cdiv(CHUNK_OUT, BLOCK_O)
    n = tl.program_id(0) % tl.cdiv(CHUNK_IN, BLOCK_I) * BLOCK_I + tl.arange(0, BLOCK_I)
    o = tl.program_id(1) % tl.cdiv(CHUNK_OUT, BLOCK_O) * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_Q)
    in_n, in_o = n < CHUNK_IN, o < CHUNK_OUT
    p_B = B_ptr + (j * RANK + i * SUB_RANK + c[None, :]) * CHUNK_OUT + o[:, None]
    p_A = A_ptr + (i * CHUNK_IN + n[None, :]) * RANK + j * SUB_RANK + c[:, None]
    b_dW = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for c0 in range(0, SUB_RANK, BLOCK_Q):
        in_q = c0 + c < SUB_RANK
        b_B = tl.load(p_B, mask=in_o[:, None] & in_q[None, :], other=0.0)
        b_A = tl.load(p_A, mask=in_q[:, None] & in_n[None, :], other=0.0)
        b_dW = tl.dot(b_B, b_A, b_dW, input_precision=PRECISION)
        p_B += BLOCK_Q * CHUNK_OUT
        p_A += BLOCK_Q
    p_dW = dW_ptr + (j * CHUNK_OUT + o[:, None]).to(tl.int64) * FEATURES_IN + i * CHUNK_IN + n[None, :]
    tl.store(p_dW, b_dW * scaling, mask=in_o[:, None] & in_n[None, :])


_delta_weight = Launcher(__name__, _delta_weight_kernel, num_warps=4)


def delta_weight(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Compute dW in one pass, as exactly as with float32 products."""
    (k, chunk_in, r), chunk_out = A.shape, B.shape[2]
    dW = A.new_empty(k * chunk_out, k * chunk_in)
    # six products of bfloat16 parts: nearer to float64 than float32's own, and faster; the interpreter has none
    precision = "bf16x6" if A.is_cuda else "ieee"
    constants = (chunk_in, chunk_out, r, r // k, k * chunk_in, 64, 128, _dot_size(r // k, 32), precision)
    grid = (k * -(-chunk_in // 128), k * -(-chunk_out // 64), 1)
    _delta_weight(constants, grid, (A, B, dW), (float(scaling),), constants)
    return dW


@triton.jit(do_not_specialize=["WORDS"])
def _dequantize_4bit_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    absmax_code_ptr,
    absmax_scale_ptr,
    absmax_offset_ptr,
    w_ptr,
    WORDS,
    BLOCK_WORDS: tl.constexpr,
    NESTED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Unpack TILE words of eight values, as a thread stores at once; a byte's first value is in its high bits."""
    word = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = word < WORDS
    b_packed = tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + word, mask=inside, other=0)
    block = word // BLOCK_WORDS
    if NESTED:
        b_code = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        b_scale = tl.load(absmax_scale_ptr + block // 256, mask=inside, other=0.0)
        b_absmax = tl.load(absmax_code_ptr + b_code) * b_scale + tl.load(absmax_offset_ptr)
    else:
        b_absmax = tl.load(absmax_ptr + block, mask=inside, other=0.0)
    n = tl.arange(0, 8)
    shift = n // 2 * 8 + (1 - n % 2) * 4
    b_w = tl.load(code_ptr + ((b_packed[:, None] >> shift[None, :]) & 15)) * b_absmax[:, None]
    tl.store(w_ptr + word[:, None] * 8 + n[None, :], b_w.to(w_ptr.dtype.element_ty), mask=inside[:, None])


# without fused multiply-add, as bitsandbytes computes: the same bits
_dequantize_4bit = Launcher(__name__, _dequantize_4bit_kernel, num_warps=4, enable_fp_fusion=False)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    w: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Unpack in one pass, at the speed of memory."""
    words, tile = w.numel() // 8, 256
    constants = (blocksize // 8, nested is not None, tile)
    pointers = (packed, absmax, code, *((code,) * 3 if nested is None else nested), w)
    _dequantize_4bit(constants, (-(-words // tile), 1, 1), pointers, (words,), constants)
