"""`grouped.GroupedKernels` on a GPU: all experts in one launch, whatever each one's number of rows.

That number is read on the GPU, which the host never waits for. The kernels run in Triton's interpreter, too. And what
`weighted_gate` computes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import _activation
from .launch import Launcher
from .routing import Groups

ROWS = 64  # of a tile


@triton.jit
def _rows_of(tile, ends_ptr, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr):
    """Find expert and rows of a tile, if every expert's rows begin a tile: its first row, and the end of its expert's.

    Tiles beyond the last one get no rows.
    """
    e = tl.arange(0, BLOCK_E)
    b_end = tl.load(ends_ptr + e, mask=e < EXPERTS, other=0)
    b_start = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < EXPERTS), other=0)
    b_tiles = tl.cumsum(tl.cdiv(b_end - b_start, BLOCK_S), axis=0)  # of all experts up to this one
    is_before = b_tiles <= tile
    expert = tl.sum(is_before.to(tl.int32), axis=0)
    first = tile - tl.max(tl.where(is_before, b_tiles, 0), axis=0)  # counted from the expert's first tile
    start = tl.sum(tl.where(e == expert, b_start, 0), axis=0) + first * BLOCK_S
    end = tl.sum(tl.where(e == expert, b_end, 0), axis=0)
    return tl.minimum(expert, EXPERTS - 1), start, end


@triton.jit
def _down_kernel(
    x_ptr,
    A_ptr,
    g_ptr,
    ends_ptr,
    scaling,
    EXPERTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    STRIDE_XS: tl.constexpr,
    STRIDE_AE: tl.constexpr,
    STRIDE_AK: tl.constexpr,
    STRIDE_AI: tl.constexpr,
    STRIDE_AR: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Multiply one tile of rows by one tile of their A, and store the columns where the exchange puts them."""
    tiles_r: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0)
    i = program // tiles_r % BLOCKS
    expert, start, end = _rows_of(program // (tiles_r * BLOCKS), ends_ptr, EXPERTS, BLOCK_E, BLOCK_S)
    if start < end:
        s = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        n = program % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
        c = tl.arange(0, BLOCK_C)
        p_x = x_ptr + s[:, None] * STRIDE_XS + i * CHUNK + c[None, :]
        p_A = A_ptr + expert.to(tl.int64) * STRIDE_AE + i * STRIDE_AK + c[:, None] * STRIDE_AI + n[None, :] * STRIDE_AR
        b_h = tl.zeros((BLOCK_S, BLOCK_R), dtype=tl.float32)
        for c0 in range(0, CHUNK, BLOCK_C):
            b_x = tl.load(p_x, mask=(s[:, None] < end) & (c0 + c[None, :] < CHUNK), other=0.0)
            b_A = tl.load(p_A, mask=(c0 + c[:, None] < CHUNK) & (n[None, :] < RANK), other=0.0)
            b_h = tl.dot(b_x, b_A.to(b_x.dtype), b_h)
            p_x += BLOCK_C
            p_A += BLOCK_C * STRIDE_AI
        # column n of block i is place (i, n % q) of output block n // q
        place = n // (RANK // BLOCKS) * RANK + i * (RANK // BLOCKS) + n % (RANK // BLOCKS)
        p_g = g_ptr + s[:, None] * (BLOCKS * RANK) + place[None, :]
        b_h *= tl.cast(scaling, tl.float32)
        tl.store(p_g, b_h.to(g_ptr.dtype.element_ty), mask=(s[:, None] < end) & (n[None, :] < RANK))


@triton.jit
def _up_kernel(
    g_ptr,
    B_ptr,
    y_ptr,
    ends_ptr,
    EXPERTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    STRIDE_BE: tl.constexpr,
    STRIDE_BK: tl.constexpr,
    STRIDE_BR: tl.constexpr,
    STRIDE_BO: tl.constexpr,
    STRIDE_YS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add g_j B_j of their expert to one tile, of rows and of outputs of block j, of y."""
    tiles_o: tl.constexpr = (CHUNK + BLOCK_O - 1) // BLOCK_O
    program = tl.program_id(0)
    j = program // tiles_o % BLOCKS
    expert, start, end = _rows_of(program // (tiles_o * BLOCKS), ends_ptr, EXPERTS, BLOCK_E, BLOCK_S)
    if start < end:
        s = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        o = program % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
        n = tl.arange(0, BLOCK_R)
        in_s, in_o = s[:, None] < end, o[None, :] < CHUNK
        p_y = y_ptr + s[:, None] * STRIDE_YS + j * CHUNK + o[None, :]
        p_g = g_ptr + s[:, None] * (BLOCKS * RANK) + j * RANK + n[None, :]
        p_B = B_ptr + expert.to(tl.int64) * STRIDE_BE + j * STRIDE_BK + n[:, None] * STRIDE_BR + o[None, :] * STRIDE_BO
        b_y = tl.load(p_y, mask=in_s & in_o, other=0.0).to(tl.float32)
        for n0 in range(0, RANK, BLOCK_R):
            b_g = tl.load(p_g, mask=in_s & (n0 + n[None, :] < RANK), other=0.0)
            b_B = tl.load(p_B, mask=(n0 + n[:, None] < RANK) & in_o, other=0.0)
            b_y = tl.dot(b_g, b_B.to(b_g.dtype), b_y)
            p_g += BLOCK_R
            p_B += BLOCK_R * STRIDE_BR
        tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=in_s & in_o)


@triton.jit
def _factor_gradient_kernel(
    x_ptr,
    h_ptr,
    out_ptr,
    ends_ptr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    STRIDE_XS: tl.constexpr,
    STRIDE_OE: tl.constexpr,
    STRIDE_OK: tl.constexpr,
    STRIDE_OC: tl.constexpr,
    STRIDE_OR: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute a tile of block i of x_i^T h_i, summed over all rows of one expert; zero if it has none."""
    tiles_c: tl.constexpr = (CHUNK + BLOCK_C - 1) // BLOCK_C
    tiles_r: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0)
    expert = program // (BLOCKS * tiles_c * tiles_r)
    i = program // (tiles_c * tiles_r) % BLOCKS
    c = program // tiles_r % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    n = program % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    s = start + tl.arange(0, BLOCK_S)
    p_x = x_ptr + s[None, :].to(tl.int64) * STRIDE_XS + i * CHUNK + c[:, None]
    p_h = h_ptr + s[:, None].to(tl.int64) * (BLOCKS * RANK) + i * RANK + n[None, :]
    b_out = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for s0 in range(start, end, BLOCK_S):
        is_own = s0 - start + s < end
        b_x = tl.load(p_x, mask=(c[:, None] < CHUNK) & is_own[None, :], other=0.0)
        b_h = tl.load(p_h, mask=is_own[:, None] & (n[None, :] < RANK), other=0.0)
        b_out = tl.dot(b_x, b_h, b_out)
        p_x += BLOCK_S * STRIDE_XS
        p_h += BLOCK_S * (BLOCKS * RANK)
    p_out = out_ptr + expert.to(tl.int64) * STRIDE_OE + i * STRIDE_OK + c[:, None] * STRIDE_OC + n[None, :] * STRIDE_OR
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=(c[:, None] < CHUNK) & (n[None, :] < RANK))


@triton.jit
def _weighted_gate_kernel(
    x_ptr,
    weights_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute part of one row of act(e) * u * weight."""
    s, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p_x = x_ptr + s * (2 * WIDTH) + c
    b_e = tl.load(p_x, mask=c < WIDTH, other=0.0).to(tl.float32)
    b_u = tl.load(p_x + WIDTH, mask=c < WIDTH, other=0.0).to(tl.float32)
    b_act, _ = _activation(b_e, ACTIVATION)
    b_out = b_act * b_u * tl.load(weights_ptr + s).to(tl.float32)
    tl.store(out_ptr + s * WIDTH + c, b_out.to(out_ptr.dtype.element_ty), mask=c < WIDTH)


@triton.jit
def _weighted_gate_backward_kernel(
    x_ptr,
    weights_ptr,
    d_out_ptr,
    dx_ptr,
    d_weights_ptr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one row of the gradients, and that of its weight."""
    s, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    p_x, p_d_out, p_dx = x_ptr + s * (2 * WIDTH) + c, d_out_ptr + s * WIDTH + c, dx_ptr + s * (2 * WIDTH) + c
    weight = tl.load(weights_ptr + s).to(tl.float32)
    b_sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for c0 in range(0, WIDTH, BLOCK):
        inside = c0 + c < WIDTH
        b_e = tl.load(p_x + c0, mask=inside, other=0.0).to(tl.float32)
        b_u = tl.load(p_x + c0 + WIDTH, mask=inside, other=0.0).to(tl.float32)
        b_d = tl.load(p_d_out + c0, mask=inside, other=0.0).to(tl.float32)
        b_act, b_slope = _activation(b_e, ACTIVATION)
        b_sums += b_act * b_u * b_d
        b_d *= weight
        tl.store(p_dx + c0, (b_d * b_u * b_slope).to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(p_dx + c0 + WIDTH, (b_d * b_act).to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(d_weights_ptr + s, tl.sum(b_sums, axis=0).to(d_weights_ptr.dtype.element_ty))


_down = Launcher(__name__, _down_kernel, num_warps=4, num_stages=3)
_up = Launcher(__name__, _up_kernel, num_warps=4)
_factor_gradient = Launcher(__name__, _factor_gradient_kernel, num_warps=4, num_stages=4)
_weighted_gate = Launcher(__name__, _weighted_gate_kernel, num_warps=4)
_weighted_gate_backward = Launcher(__name__, _weighted_gate_backward_kernel, num_warps=4)


def product(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    return torch.nn.functional.grouped_mm(x, weight.mT, offs=groups.ends)


def down(x: Tensor, A: Tensor, scaling: float, groups: Groups) -> Tensor:
    """Project down in one pass over x, summing in float32."""
    experts, k, chunk, r = A.shape
    g = x.new_empty(len(x), k, r)
    block_r = _size(r, 128)
    constants = (experts, k, chunk, r, x.stride(0), *A.stride(), _size(experts, 2**20), ROWS, 64, block_r)
    grid = (_most_tiles(len(x), experts) * k * -(-r // block_r), 1, 1)
    _down(constants, grid, (x, A, g, groups.ends), (float(scaling),), constants)
    return g


def up(g: Tensor, B: Tensor, y: Tensor, groups: Groups) -> None:
    """Add the up-projection to y, summing in float32 and rounding once."""
    experts, k, r, chunk = B.shape
    block_o = _size(chunk, 128)
    constants = (experts, k, chunk, r, *B.stride(), y.stride(0), _size(experts, 2**20), ROWS, block_o, _size(r, 64))
    grid = (_most_tiles(len(y), experts) * k * -(-chunk // block_o), 1, 1)
    _up(constants, grid, (g, B, y, groups.ends), (), constants)


def factor_gradient(x: Tensor, h: Tensor, out: Tensor, groups: Groups) -> None:
    """Sum in float32, and write every expert's gradient once, zeros too."""
    experts, k, chunk, r = out.shape
    block_c, block_r = _size(chunk, 64), _size(r, 64)
    constants = (k, chunk, r, x.stride(0), *out.stride(), ROWS, block_c, block_r)
    grid = (experts * k * -(-chunk // block_c) * -(-r // block_r), 1, 1)
    _factor_gradient(constants, grid, (x, h, out, groups.ends), (), constants)


def weighted_gate(x: Tensor, weights: Tensor, activation: str) -> Tensor:
    """See `weighted_gate`: x `[S, 2 F]`, weights `[S, 1]` -> `[S, F]`, in one pass."""
    out = x.new_empty(len(x), x.shape[1] // 2)
    block = _size(out.shape[1], 1024)
    constants = (out.shape[1], activation, block)
    _weighted_gate(constants, (len(x), -(-out.shape[1] // block), 1), (x, weights, out), (), constants)
    return out


def weighted_gate_backward(x: Tensor, weights: Tensor, d_out: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weights, from that of the result, `[S, F]`, in one pass."""
    dx, d_weights = torch.empty_like(x), torch.empty_like(weights)
    constants = (d_out.shape[1], activation, _size(d_out.shape[1], 1024))
    _weighted_gate_backward(constants, (len(x), 1, 1), (x, weights, d_out, dx, d_weights), (), constants)
    return dx, d_weights


def _most_tiles(rows: int, experts: int) -> int:
    """The most tiles that rows can have, if those of every expert begin one: known without asking the GPU."""
    return rows // ROWS + min(experts, rows)


def _size(n: int, most: int) -> int:
    """The power of two that holds n, at least tl.dot's 16, at most `most`."""
    return min(most, max(16, 1 << (n - 1).bit_length()))
