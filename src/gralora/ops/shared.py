"""Several adapted linear layers of one x, as q, k and v of an attention, or gate and up of an MLP.

One launch projects x down for all of them, and the gradients of x are added up inside of the products.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import plans, reference
from .autograd import Grads, differentiable
from .dropout import draw_seed, dropout_mask
from .fused import Needs, Packed, linear_backward, linear_down, linear_up, pack
from .interface import Conversion, KernelUnavailable
from .layout import contiguous_or_rows
from .plans import Plan, falls_back, plan
from .reference import Factors
from .saved import save, saved
from .torch_seam import is_batched
from .weights import Weight, dense


class AdaptedLinear(NamedTuple):
    """The operands of an adapted linear layer besides x, as `gralora_linear` takes them.

    Attributes:
        weight, bias: frozen, `[O, I]`, and `[O]` or None.
        factors: of the adapter.
        p, seed: of dropout on what the adapter sees of x; seed is None without, or until it is drawn.
    """

    weight: Weight
    bias: Tensor | None
    factors: Factors
    p: float = 0.0
    seed: Tensor | None = None

    def seeded(self, x: Tensor) -> "AdaptedLinear":
        """The same with a seed, if x is to be dropped."""
        return self._replace(seed=draw_seed(x)) if self.p and self.seed is None else self


Layers = Sequence[AdaptedLinear]


def shared_linear(x: Tensor, layers: Layers) -> list[Tensor]:
    """What each of the layers gives of x `[..., I]`: `[..., O]`; differentiable in x and the factors.

    x, weights and biases have one dtype, in which all is computed; gradients have the dtype of what they belong to.
    """
    layers = [layer.seeded(x) for layer in layers]
    if torch.is_grad_enabled():
        return list(SharedLinearFunction.apply(x, *factor_tensors(layers), layers))
    return forward(x, layers)[0]


def factor_tensors(layers: Layers) -> list[Tensor | None]:
    """The factors of the layers, four of each: what autograd is to see beside x."""
    return [t for layer in layers for t in layer.factors[:4]]


def definition(x: Tensor, layers: Layers) -> list[Tensor]:
    """`shared_linear` by the definition of the layers."""
    masks = [None if layer.seed is None else dropout_mask(x, layer.p, layer.seed) for layer in layers]
    return [
        reference.linear(x, dense(layer.weight, x.dtype), layer.bias, layer.factors, kept)
        for layer, kept in zip(layers, masks, strict=True)
    ]


class SharedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Any) -> Any:
        layers: Layers = inputs[-1]
        outputs, kept, hows = forward(x, layers)
        keep(ctx, layers, hows, x, *kept)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        layers, hows, (x, *kept) = restore(ctx)
        needed = ctx.needs_input_grad[:-1]
        if torch.is_grad_enabled() or any(map(is_batched, dys)):  # create_graph=True, is_grads_batched=True
            with torch.enable_grad():
                ys = definition(x, layers)
            return *differentiable(ys, (x, *factor_tensors(layers)), needed, dys), None
        try:
            return *backward(dys, x, layers, kept, needed, hows), None
        except KernelUnavailable as error:
            plans.give_up(error)
        return *planned_backward(dys, x, layers, kept, needed), None


def keep(ctx: Any, layers: Layers, hows: list[Plan], *tensors: Tensor | None) -> None:
    """Keep layers, plans and tensors for the backward; tensors of the layers as `saved.save` does."""
    weights = [layer.weight if isinstance(layer.weight, Tensor) else None for layer in layers]
    save(ctx, *weights, *factor_tensors(layers), *[layer.seed for layer in layers], *tensors)
    ctx.layers = [
        (None if isinstance(layer.weight, Tensor) else layer.weight, layer.bias, layer.factors.scaling, layer.p)
        for layer in layers
    ]
    ctx.hows = hows


def restore(ctx: Any) -> tuple[list[AdaptedLinear], list[Plan], list[Any]]:
    """What was given to `keep`."""
    n, tensors = len(ctx.layers), saved(ctx)
    layers = []
    for m, (packed, bias, scaling, p) in enumerate(ctx.layers):
        A, B, hybrid_A, hybrid_B = tensors[n + 4 * m : n + 4 * m + 4]
        factors = Factors(A, B, hybrid_A, hybrid_B, scaling)
        layers.append(AdaptedLinear(tensors[m] if packed is None else packed, bias, factors, p, tensors[5 * n + m]))
    return layers, ctx.hows, tensors[6 * n :]


@falls_back
def forward(x: Tensor, layers: Layers) -> tuple[list[Tensor], list[Tensor | None], list[Plan]]:
    """Plan and compute the layers: their outputs, those g that the backward needs, and their plans."""
    seen, packed = contiguous_or_rows(x), [pack(layer.factors) for layer in layers]
    hows = _plans(seen, layers, packed)
    if any(layer.p for layer in layers):  # each projects down what is left of x in its own mask
        each = zip(packed, layers, hows, strict=True)
        downs = [linear_down(seen, own, layer.p, layer.seed, how) for own, layer, how in each]
    else:
        downs = _downs(seen, packed, hows, [how.converts_B for how in hows])
    outputs = [
        linear_up(x, seen, layer.weight, layer.bias, g, B, how)
        for layer, (g, B), how in zip(layers, downs, hows, strict=True)
    ]
    return outputs, [g if how.keeps_g else None for (g, _), how in zip(downs, hows, strict=True)], hows


def _plans(seen: Tensor, layers: Layers, packed: list[Packed]) -> list[Plan]:
    return [plan(seen, layer.weight, own.A, own.B, own.h, layer.p) for layer, own in zip(layers, packed, strict=True)]


def _downs(seen: Tensor, packed: list[Packed], hows: list[Plan], converted: list[bool]) -> list[tuple[Tensor, Tensor]]:
    """g of every layer, in one launch if that is possible, and B, converted to the dtype of x where it is to be."""
    converts = [
        Conversion(own.B, torch.empty_like(own.B, dtype=seen.dtype)) if convert else None
        for own, convert in zip(packed, converted, strict=True)
    ]
    h, down = packed[0].h, hows[0].down
    if len(packed) > 1 and all(own.h == h and how.down is down for own, how in zip(packed, hows, strict=True)):
        gs = down.downs(seen, [own.A for own in packed], h, [own.scaling for own in packed], converts)
    else:
        each = zip(packed, hows, converts, strict=True)
        gs = [how.down.down(seen, own.A, own.h, own.scaling, convert) for own, how, convert in each]
    Bs = [own.B if convert is None else convert.target for own, convert in zip(packed, converts, strict=True)]
    return list(zip(gs, Bs, strict=True))


def backward(
    dys: Sequence[Tensor],
    x: Tensor,
    layers: Layers,
    kept: Sequence[Tensor | None],
    needed: Sequence[bool],
    hows: list[Plan],
) -> Grads:
    """Gradients of x and of the factors of the layers in their order; None for what is not needed.

    Args:
        dys: for each layer `[..., O]`, any strides.
        x, layers: as in the forward.
        kept, hows: as `forward` returned them.
        needed: for x and each factor, whether its gradient is needed.
    """
    gs: list[Any] = list(kept)
    again = [n for n, g in enumerate(gs) if g is None]
    if again:
        seen = contiguous_or_rows(x)
        packed = [pack(layers[n].factors) for n in again]
        for n, (g, _) in zip(again, _downs(seen, packed, [hows[n] for n in again], [False] * len(again)), strict=True):
            gs[n] = g
    dx: Any = None
    grads: Grads = []
    for n, (layer, dy, g, how) in enumerate(zip(layers, dys, gs, hows, strict=True)):
        needs = Needs.of(needed[0], *needed[4 * n + 1 : 4 * n + 5])
        dx, *own = linear_backward(dy, x, layer.weight, layer.factors, g, layer.p, layer.seed, needs, how, dx)
        grads += own
    return [dx, *grads]


@falls_back
def planned_backward(
    dys: Sequence[Tensor], x: Tensor, layers: Layers, kept: Sequence[Tensor | None], needed: Sequence[bool]
) -> Grads:
    """`backward` with new plans."""
    packed = [pack(layer.factors) for layer in layers]
    return backward(dys, x, layers, kept, needed, _plans(contiguous_or_rows(x), layers, packed))
