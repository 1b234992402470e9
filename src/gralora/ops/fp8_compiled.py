"""An adapted layer with an FP8 weight as torch.compile sees it: one operator, which the compiler calls.

It is there where 8-bit floats are multiplied, and for layers that quantise their inputs, whose own product passes no
gradient. Other weights are dequantised, which the compiler can do better. Operators take tensors and numbers only, so
a `Float8Weight` is passed as its values, scales and block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import compiled, fp8, fused, plans
from .fused import Needs
from .reference import Factors
from .weights import Float8Weight


def is_operator(x: Tensor, weight: Float8Weight) -> bool:
    """Whether a layer is one operator of the graph that the compiler traces now; x is its input."""
    if weight.quantises_input:
        return True
    return _multiplies(x.is_cuda, x.device.index, *weight.values.shape, *weight.scales.shape, weight.values.dtype)


@torch.compiler.assume_constant_result
def _multiplies(
    is_cuda: bool, device: int, n_out: int, n_in: int, rows: int, columns: int, dtype: torch.dtype
) -> bool:
    """`fp8.multiplies` of a weight `[n_out, n_in]` with `[rows, columns]` scales."""
    product, card = plans.fp8_module(device if is_cuda else None)
    values, scales = torch.empty(n_out, n_in, dtype=dtype, device="meta"), torch.empty(rows, columns, device="meta")
    return fp8.multiplies(Float8Weight(values, scales, (1, n_in)), bool(product), card)


def _weight(values: Tensor, scales: Tensor, block: list[int]) -> Any:
    return Float8Weight(values, scales, (block[0], block[1]), quantises_input=True)


def _linear(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    block: list[int],
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    hybrid_A: Tensor | None,
    hybrid_B: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`compiled.linear_op` of a `Float8Weight`."""
    return fused.linear(x, _weight(values, scales, block), bias, Factors(A, B, hybrid_A, hybrid_B, scaling), p, seed)


def _linear_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    block: list[int],
    A: Tensor,
    B: Tensor,
    hybrid_A: Tensor | None,
    hybrid_B: Tensor | None,
    scaling: float,
    g: Tensor,
    p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """`compiled.linear_backward_op` of a `Float8Weight`."""
    weight = _weight(values, scales, block)
    return compiled.linear_backward_op(dy, x, weight, A, B, hybrid_A, hybrid_B, scaling, g, p, seed, needs)


linear = custom_op("gralora::fp8_linear", mutates_args=())(_linear)
linear_backward = custom_op("gralora::fp8_linear_backward", mutates_args=())(_linear_backward)
linear.register_fake(lambda x, values, scales, block, *others: compiled.linear_fake(x, values, *others))
linear_backward.register_fake(
    lambda dy, x, values, scales, block, *others: compiled.linear_backward_fake(dy, x, values, *others)
)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, values, scales, block, _, *factors, scaling, p, seed = inputs
    ctx.save_for_backward(x, values, scales, *factors, output[1], seed)
    ctx.block, ctx.scaling, ctx.p = block, scaling, p


def _differentiated(ctx, dy, _):  # type: ignore[no-untyped-def]
    x, values, scales, A, B, hybrid_A, hybrid_B, g, seed = ctx.saved_tensors
    needs_x, _, _, _, _, *needs_factors = ctx.needs_input_grad[:9]
    needs = list(Needs.of(needs_x, *needs_factors))
    grads = iter(
        linear_backward(dy, x, values, scales, ctx.block, A, B, hybrid_A, hybrid_B, ctx.scaling, g, ctx.p, seed, needs)
    )
    wanted = compiled.needing(x, A, B, hybrid_A, hybrid_B, needs)
    dx, *d_factors = [None if t is None else next(grads) for t in wanted]
    return dx, None, None, None, None, *d_factors, None, None, None


linear.register_autograd(_differentiated, setup_context=_setup_context)
