"""The arithmetic of an adapted linear layer. `gralora_linear` is the entry; it knows tensors, no modules."""

import torch
from torch import Tensor

from . import autograd, compiled, fp8_compiled, fused, plans
from . import reference as _reference
from .dropout import draw_seed, dropout
from .gated import GatedMlp, gated_mlp
from .joined import joined
from .mixed import Rows, mixed_update
from .reference import Factors
from .shared import AdaptedLinear, shared_linear
from .torch_seam import is_transformed
from .weights import Float8Weight, PackedWeight, Weight

__all__ = [
    "AdaptedLinear",
    "Factors",
    "Float8Weight",
    "GatedMlp",
    "PackedWeight",
    "Rows",
    "add_update",
    "delta_weight",
    "dropout",
    "gated_mlp",
    "gralora_linear",
    "is_operator",
    "joined",
    "mixed_update",
    "shared_linear",
]


def gralora_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, factors: Factors, p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """x W^T + bias + scaling * (grid + B_s A_s x), differentiable in x and the factors, not in weight and bias.

    Args:
        x: `[..., I]`.
        weight: frozen base weight, `[O, I]`, dtype of x, or a quantised one; while torch.compile traces, what
            `is_operator` tells.
        bias: frozen base bias, `[O]`, dtype of x, or None.
        factors: of the adapter, any float dtype; computed with in the dtype of x.
        p: probability of dropout on what the adapter sees of x.
        seed: of dropout, int64 `[]` on the device of x; drawn from torch's generator if it is None and p > 0.

    Returns:
        y, `[..., O]`, dtype of x. Gradients have the dtype of what they belong to.
    """
    if p and seed is None:
        seed = draw_seed(x)
    if torch.compiler.is_compiling() and isinstance(weight, Float8Weight):
        return fp8_compiled.linear(x, weight.values, weight.scales, list(weight.block), bias, *factors, p, seed)[0]
    if torch.compiler.is_compiling() and isinstance(weight, Tensor):
        if compiled.form_of(x, weight, p) != "kernels":
            return compiled.linear(x, weight, bias, *factors, p, seed)[0]
        from .traced import linear  # imports Triton

        return linear(x, weight, bias, *factors, p, seed)[0]
    if not torch.is_grad_enabled():
        return fused.linear(x, weight, bias, factors, p, seed)[0]
    return autograd.linear(x, weight, bias, factors, p, seed)


def is_operator(x: Tensor, weight: Weight, p: float) -> bool:
    """Whether `gralora_linear` is to be one operator in the graph of torch.compile, which traces now."""
    if isinstance(weight, Tensor):
        return compiled.form_of(x, weight, p) != "operations"
    return isinstance(weight, Float8Weight) and fp8_compiled.is_operator(x, weight)


def add_update(y: Tensor, x: Tensor, factors: Factors, p: float = 0.0) -> Tensor:
    """y + scaling * (grid + B_s A_s x), in place: for base layers whose product with x is not ours to compute.

    Args:
        y: `[..., O]`, contiguous, any float dtype, no leaf that requires gradients; changed.
        x: `[..., I]`.
        factors, p: as of `gralora_linear`.

    Returns:
        y.
    """
    seed = draw_seed(x) if p else None
    if torch.is_grad_enabled():
        return autograd.add_update(y, x, factors, p, seed)
    fused.add_update(y, x, factors, p, seed)
    return y


def delta_weight(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """`reference.delta_weight`, by a kernel where there is one: A `[k, I/k, r]`, B `[k, r, O/k]` -> `[O, I]`."""
    if plans.has_delta_weight_kernel(A) and not is_transformed():
        return autograd.DeltaWeightFunction.apply(A, B, scaling)
    return _reference.delta_weight(A, B, scaling)
