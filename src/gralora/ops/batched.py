"""The adapter's operations in torch's own kernels: strided batched matrix products, in place where that saves a pass.

Runs on any device and in any float dtype. Chunks of x and y are strided views, `[k, T, I/k]` and `[k, T, O/k]`, that
the batched products read and write where they lie. Implements `interface.Kernels` and `interface.Product`; see there
for arguments.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .activations import ACTIVATIONS
from .interface import Conversion, FactorGradients
from .layout import Layout, chunks, rows

# bmm(out_dtype=): a float32 result without a pass to convert it; ROCm has none
BMM_WIDENS = not torch.version.hip


def exchange(h: Tensor) -> Tensor:
    """`[k_i, T, r]` -> `[k_j, T, r]`: block i's j-th sub-rank becomes block j's i-th; h is contiguous."""
    k, T, r = h.shape
    q = r // k
    return h if k == 1 else h.as_strided((k, T, k, q), (q, r, T * r, 1)).contiguous().view(k, T, r)


def down_plain(x: Tensor, A: Tensor, scaling: float) -> Tensor:
    """The plain LoRA part of g: x `[T, I]`, A `[k, I/k, h]` -> `[T, h]`, the same for every output block."""
    return scaling * (x @ A.flatten(0, 1).to(x.dtype))


def down(x: Tensor, A: Tensor, h: int, scaling: float, convert: Conversion | None = None) -> Tensor:
    if convert is not None:
        convert.target.copy_(convert.source)
    x, A = rows(x), A.to(x.dtype)
    k, _, R = A.shape
    grid = A[..., : R - h] if h else A
    g = exchange(x.new_empty(k, x.shape[0], R - h).baddbmm_(chunks(x, k), grid, beta=0, alpha=scaling))
    return torch.cat([g, down_plain(x, A[..., R - h :], scaling).expand(k, -1, -1)], dim=2) if h else g


def downs(
    x: Tensor, As: Sequence[Tensor], h: int, scalings: Sequence[float], converts: Sequence[Conversion | None]
) -> list[Tensor]:
    return [down(x, A, h, scaling, convert) for A, scaling, convert in zip(As, scalings, converts, strict=True)]


def gated(e: Tensor, u: Tensor, activation: str, hidden: Tensor) -> None:
    with torch.no_grad():
        torch.mul(ACTIVATIONS[activation].value(e), u, out=hidden)


def gated_backward(e: Tensor, u: Tensor, d_hidden: Tensor, activation: str, de: Tensor, du: Tensor) -> None:
    act = ACTIVATIONS[activation]
    d_act = d_hidden * u
    torch.mul(d_hidden, act.value(e), out=du)
    de.copy_(act.gradient(d_act, e))


def up(g: Tensor, B: Tensor, y: Tensor) -> None:
    y_chunks, B = chunks(rows(y), B.shape[0]), B.to(g.dtype)
    if y.dtype == g.dtype:
        y_chunks.baddbmm_(g, B)
    else:
        y_chunks.add_(torch.bmm(g, B))


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
    if dx is not None and A is not None:
        up(dh, A.mT, dx)
    if dA is not None:
        _factor_gradient(x, dh, dA)
    if dB is not None:
        _factor_gradient(dy, g, dB.mT)


def product_gradients(x: Tensor, g: Tensor, gradients: FactorGradients) -> None:
    """Write the gradients that a product's launch would: x and g are the product's."""
    z, h, z_grad, x_grad = gradients
    _factor_gradient(z, g, z_grad)
    _factor_gradient(x, h, x_grad)


def _factor_gradient(x: Tensor, h: Tensor, out: Tensor) -> None:
    """Write x_i^T h_i: x `[T, n]`, h `[k, T, R]`, out `[k, n/k, R]`, contiguous or the transpose of contiguous."""
    a, b = chunks(rows(x), h.shape[0]).mT, h
    if not out.is_contiguous():
        a, b, out = b.mT, a.mT, out.mT
    if out.dtype == x.dtype:
        torch.bmm(a, b, out=out)
    elif x.is_cuda and out.dtype == torch.float32 and BMM_WIDENS:
        torch.bmm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.bmm(a, b))


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """See `interface.Kernels.dropout`; the seed is read on the host.

    An element is kept if its 32 random bits are not among the lowest: a third of the time of `bernoulli_` on a CPU.
    """
    generator = torch.Generator(x.device).manual_seed(int(seed))
    words = torch.empty(-(-x.numel() // 2), dtype=torch.int64, device=x.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int32)[: x.numel()].view(x.shape)
    kept = (bits >= min(round(p * 2**32), 2**32 - 1) - 2**31).to(x.dtype)
    return kept.mul_(x).mul_(dropout_scale(p))


def dropout_scale(p: float) -> float:
    """What elements that are kept are multiplied by."""
    return 1 / (1 - p) if p < 1 else 0.0


delta_weight = reference.delta_weight


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    w: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    if nested is not None:
        values, scales, offset = nested
        absmax = values[absmax.int()] * scales.repeat_interleave(256)[: absmax.numel()] + offset
    packed = packed.flatten().view(torch.uint8)  # FSDP has it stored as floats
    halves = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    w.copy_((code[halves.int()] * absmax.repeat_interleave(blocksize)[: w.numel()]).view(w.shape))


def takes(x: Layout, weight: Layout, B: Layout, device: int, z: Layout | None = None) -> bool:
    return z is None  # gradients are products of their own


def reads(x: Tensor) -> bool:
    return True


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
    with torch.no_grad():  # y may be an output that autograd knows already
        x, y = rows(x), rows(y)
        if bias is None:
            # the product with W reads the adapter's output while it multiplies: cheaper than a pass of its own
            chunks(y, B.shape[0]).baddbmm_(g, B, beta=int(adds))
            y.addmm_(x, weight.t())
        else:
            up(g, B, torch.addmm(bias, x, weight.t(), out=y))
