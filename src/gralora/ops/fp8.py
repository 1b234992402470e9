"""Products with 8-bit floats: the input quantised row by row, the weight as it is stored, sums in float32.

Implements `interface.Product` for a `Float8Weight` in torch: `scaled_mm`, and the adapter added to its result. Hopper
GPUs have a product of their own, `fp8_hopper`, for all but few tokens.
The environment variable GRALORA_FP8 says where they are used:

    auto         (default) for layers that quantise their inputs themselves, on hardware that multiplies 8-bit floats
    products     for all layers with FP8 weights; an error where that cannot be
    dequantised  nowhere: weights are dequantised whenever a product needs them, as all other quantised weights are

One copy of the weight is kept. The gradient of x is dy W, a sum over rows of W: their scales go into dy before that is
quantised, and the values are transposed anew, since tensor cores read 8-bit floats along the sum only.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from . import batched
from .interface import FactorGradients
from .layout import Layout, rows
from .weights import Float8Weight

CHOICES = ("auto", "products", "dequantised")
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
SMALLEST = torch.finfo(torch.float32).tiny
MULTIPLE = 16  # of which features have to be a multiple
MAKES_GRADIENTS = False  # in the product's launch


def read_choice() -> str:
    """The value of GRALORA_FP8; ValueError if it is none of CHOICES."""
    value = os.environ.get("GRALORA_FP8", "auto")
    if value not in CHOICES:
        raise ValueError(f"GRALORA_FP8={value!r} is not known; use one of {', '.join(CHOICES)}.")
    return value


choice = read_choice()


@contextmanager
def dequantised() -> Iterator[None]:
    """Dequantise all weights inside, whatever GRALORA_FP8 says."""
    global choice
    before, choice = choice, "dequantised"
    try:
        yield
    finally:
        choice = before


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round x to E4M3 with one scale a row, the largest value of a row becoming the largest of E4M3.

    Args:
        x: `[T, n]`, any float dtype.

    Returns:
        Values `[T, n]`, float8_e4m3fn, and scales `[T, 1]`, float32. A row with a NaN or an infinity is NaN.
    """
    scales = (x.abs().amax(1, keepdim=True).float() / LARGEST).clamp(min=SMALLEST)
    return (x / scales).to(E4M3), scales


def obstacle(weight: Float8Weight) -> str:
    """Why a weight cannot be multiplied as it is stored, in words; empty if it can."""
    (n_out, n_in), scales = weight.shape, tuple(weight.scales.shape)
    if weight.values.dtype != E4M3:
        return f"the weight holds {weight.values.dtype}, and products are of {E4M3}"
    if scales not in ((n_out, 1), (1, 1)):
        return f"the weight has {scales[0]} x {scales[1]} scales, and products need one a row, or one for all"
    if n_out % MULTIPLE or n_in % MULTIPLE:
        return f"the weight is [{n_out}, {n_in}], and products need multiples of {MULTIPLE}"
    return ""


def multiplies(weight: Float8Weight, has_product: bool, card: str) -> bool:
    """Whether a weight is multiplied as it is stored, by GRALORA_FP8 and by what is possible.

    Args:
        weight: `[O, I]`.
        has_product: whether there is a product for the hardware.
        card: the hardware, for the message.

    Raises:
        RuntimeError: with GRALORA_FP8=products, if it cannot be.
    """
    if choice == "dequantised" or choice == "auto" and not weight.quantises_input:
        return False
    problem = obstacle(weight) if has_product else f"{card} multiplies no 8-bit floats"
    if problem and choice == "products":
        raise RuntimeError(
            f"GRALORA_FP8=products: {problem}. With GRALORA_FP8=dequantised any device computes; products are for "
            "GPUs of compute capability 8.9 and later (Ada, Hopper, Blackwell), and weights in E4M3 as "
            "gralora.quantize_fp8 makes them."
        )
    return not problem


def takes(x: Layout, weight: Layout, B: Layout, device: int, z: Layout | None = None) -> bool:
    return z is None and not any(n % MULTIPLE for n in weight.shape)  # gradients are products of their own


def reads(x: Tensor) -> bool:
    return True


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
    with torch.no_grad():  # y may be an output that autograd knows already
        x, y = rows(x), rows(y)
        product = _multiply(x, weight)
        if bias is not None:
            product += bias
        if adds:
            y += product
        else:
            y.copy_(product)
        batched.up(g, B, y)


def _multiply(x: Tensor, weight: Float8Weight) -> Tensor:
    """x W^T: x `[T, I]` -> `[T, O]`."""
    scales = weight.scales  # [O, 1], [1, I] or [1, 1]
    if scales.shape[1] > 1:  # inside of the sum
        x, scales = x * scales, scales.new_ones(1, 1)
    values, of_rows = quantize_rows(x)
    return scaled_mm(
        values,
        weight.values.contiguous().t(),
        of_rows,
        ScalingType.RowWise,
        scales.t().expand(1, weight.shape[0]).contiguous(),
        ScalingType.RowWise,
        output_dtype=torch.bfloat16 if x.is_cuda else torch.float32,  # GPUs write no other with scales per row
    )
