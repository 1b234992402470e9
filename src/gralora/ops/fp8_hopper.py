"""The product of 8-bit floats for Hopper GPUs that includes the adapter: one launch, one accumulator, one store.

Implements `interface.Product` for a `Float8Weight`. x is rounded to E4M3 row by row (`fp8_kernels`), and multiplied
with the weight as it is stored; the sum in the accumulator is scaled, and there the adapter's half-precision product
is added to it. The device code is that of `hopper`.

Tensor cores read 8-bit floats along the sum only. So for the gradient of x a transposed copy of the values is made at
the first backward, and kept for as long as they are: with it the weight takes as much memory as in half precision.
The copy is of the very values: the scales of W's rows are columns' there, and go into dy before that is rounded.
"""

import functools
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from . import batched, fp8, hopper
from .fp8_hopper_kernel import scaled_linear_kernel
from .fp8_kernels import quantize_rows
from .interface import FactorGradients
from .launch import Launcher
from .layout import Layout, layout
from .torch_seam import current_raw_stream, is_capturing, version_of
from .weights import Float8Weight

MAKES_GRADIENTS = True
FULL = 0.7  # least share of the last round's places that tiles fill; else torch's product, which has smaller tiles

_scaled_linear = Launcher(__name__, scaled_linear_kernel, hopper.descriptor, num_warps=8, maxnreg=168)
takes, reads = fp8.takes, fp8.reads


def linear(
    y: Tensor,
    x: Tensor,
    weight: Float8Weight,
    bias: Tensor | None,
    g: Tensor,
    B: Tensor,
    gradients: FactorGradients | None = None,
    adds: bool = False,
) -> None:
    """See `interface.Product.linear`; weight is `[O, I]` with scales per row, or the transpose of such a one."""
    stored = weight.values if weight.transpose_of is None else weight.transpose_of
    is_fused = _fits(g.shape[1], weight.shape, layout(stored), x.dtype, layout(B), x.get_device())
    if gradients is not None and not (is_fused and hopper.reads(x) and hopper.reads(gradients.z)):
        batched.product_gradients(x, g, gradients)
        gradients = None
    if not is_fused:
        return fp8.linear(y, x, weight, bias, g, B, adds=adds)
    scales = weight.scales.float().contiguous()  # [O, 1], [1, I] or [1, 1]
    scales_columns = scales.shape[0] > 1
    factor, of_rows = _quantized(x) if scales_columns else quantize_rows(x, scales)
    values = stored if weight.transpose_of is None else _transposed(stored)
    pointers = of_rows, scales if scales_columns else of_rows
    hopper.launch(_scaled_linear, y, x, factor, values, bias, g, B, gradients, adds, pointers, (scales_columns,))


@functools.lru_cache(1024)
def _fits(T: int, shape: tuple[int, int], stored: Layout, dtype: torch.dtype, B: Layout, device: int) -> bool:
    """Tell whether TMA can read the operands, and the tiles of y fill the GPU's processors."""
    (_, r, chunk), (stride_k, stride_r, stride_c) = B.shape, B.strides
    return (
        dtype in hopper.GLUON_DTYPES
        and hopper.fills(T, shape[0], device, FULL)
        and 1 in (stride_r, stride_c)
        and not (r | chunk | stride_k | stride_r * stride_c) % 8
        and B.aligned
        and stored.strides == (stored.shape[1], 1)
        and stored.aligned
    )


class _Last(NamedTuple):
    """What was quantised last: x, its version, the stream that it was done on, and the result."""

    x: weakref.ref[Tensor]
    version: int
    stream: int
    result: tuple[Tensor, Tensor]


_last: dict[int, _Last] = {}  # by device


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `quantize_rows` of x, once for layers of one x, as q, k and v of an attention are."""
    if x.is_inference() or is_capturing():
        return quantize_rows(x)
    device, version = x.get_device(), version_of(x)
    stream, last = current_raw_stream(device), _last.get(device)
    if last is not None and last.x() is x and last.version == version and last.stream == stream:
        return last.result
    result = quantize_rows(x)
    _last[device] = _Last(weakref.ref(x, lambda ref: _forget(device, ref)), version, stream, result)
    return result


def _forget(device: int, ref: weakref.ref[Tensor]) -> None:
    """Free what was quantised last, once nobody has its x any more."""
    if device in _last and _last[device].x is ref:
        del _last[device]


# id of the storage that values [O, I] lie in -> it, and by where they lie in it: their version, and their transpose
# [I, O], contiguous. By the storage, since a compiled graph may keep values as another tensor at each call.
_copies: dict[int, tuple[weakref.ref[torch.UntypedStorage], dict[tuple[int, ...], tuple[int, Tensor]]]] = {}


def _transposed(values: Tensor) -> Tensor:
    """Return the transpose `[I, O]` of values `[O, I]`, contiguous, which is kept as long as they are, unchanged."""
    storage, version = values.untyped_storage(), version_of(values)
    place, key = (values.storage_offset(), *values.shape, *values.stride()), id(storage)
    kept = _copies.get(key)
    if kept is not None and kept[0]() is storage and place in kept[1] and kept[1][place][0] == version:
        return kept[1][place][1]
    copy = values.t().contiguous()
    if is_capturing():  # it is in the graph's memory
        return copy
    if kept is None or kept[0]() is not storage:
        kept = _copies[key] = weakref.ref(storage, lambda _: _copies.pop(key, None)), {}
    kept[1][place] = version, copy
    return copy


def copied() -> int:
    """Return how many bytes the transposed copies take."""
    return sum(copy.nbytes for _, places in _copies.values() for _, copy in places.values())
