"""A gated MLP as one operation: y = down(act(gate(x)) * up(x)), with three adapted linear layers.

Letters beside those of `reference`: e and u are what the layers `gate` and `up` give of x, `[..., F]`, and
hidden = act(e) * u is what `down` sees. Some models compute e and u by one layer, whose output has them side by side.

The backward keeps x, e and u. It computes hidden again, and the gradients of e and u take the memory of hidden and of
its gradient. So half is kept of what torch would keep: e, act(e), u and hidden.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import plans, shared
from .activations import ACTIVATIONS
from .autograd import Grads, differentiable
from .fused import Needs, linear, linear_backward, output, pack
from .interface import Conversion, KernelUnavailable
from .layout import rows
from .plans import Plan, falls_back, plan
from .shared import AdaptedLinear, factor_tensors
from .torch_seam import is_batched
from .weights import dense


class GatedMlp(NamedTuple):
    """The layers of a gated MLP and its activation.

    Attributes:
        first: the layers gate and up, each I -> F; or one layer I -> 2 F, whose output is e and then u.
        down: the layer F -> O.
        activation: a name of `activations.ACTIVATIONS`.
    """

    first: tuple[AdaptedLinear, ...]
    down: AdaptedLinear
    activation: str


def gated_mlp(x: Tensor, mlp: GatedMlp) -> Tensor:
    """y `[..., O]` of x `[..., I]`, differentiable in x and the factors, not in weights and biases.

    x, weights and biases have one dtype, in which all is computed; gradients have the dtype of what they belong to.
    """
    mlp = GatedMlp(tuple(layer.seeded(x) for layer in mlp.first), mlp.down.seeded(x), mlp.activation)
    if not torch.is_grad_enabled():
        return _value(x, mlp)
    y, outputs = GatedMlpFunction.apply(x, *factor_tensors((*mlp.first, mlp.down)), mlp)
    _last(y, outputs, mlp)
    return y


@falls_back
def _value(x: Tensor, mlp: GatedMlp) -> Tensor:
    """y, with nothing kept for a backward."""
    outputs, _, hows = shared.forward(x, mlp.first)
    e, u = _halves(outputs)
    hidden = _like(e)
    hows[0].down.gated(e, u, mlp.activation, hidden)
    return linear(hidden, *mlp.down)[0]


def definition(x: Tensor, mlp: GatedMlp) -> Tensor:
    """`gated_mlp` by the definition of its layers."""
    e, u = _halves(shared.definition(x, mlp.first))
    [y] = shared.definition(ACTIVATIONS[mlp.activation].value(e) * u, [mlp.down])
    return y


class GatedMlpFunction(torch.autograd.Function):
    """Compute e and u, and return them with memory for y, which `_last` is to fill.

    That is done after the function has returned, for the reason that `autograd.GraloraLinearFunction` gives: gradient
    checkpointing never comes to it when it computes a block again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Any) -> Any:
        mlp: GatedMlp = inputs[-1]
        outputs, kept, hows = shared.forward(x, mlp.first)
        shared.keep(ctx, (*mlp.first, mlp.down), hows, x, *kept, *outputs)
        ctx.activation = mlp.activation
        return output(x, mlp.down.weight), outputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> Any:
        (*first, down), hows, (x, *tensors) = shared.restore(ctx)
        kept, outputs = tensors[: len(first)], tensors[len(first) :]
        mlp, needed = GatedMlp(tuple(first), down, ctx.activation), ctx.needs_input_grad[:-1]
        if torch.is_grad_enabled() or is_batched(dy):  # create_graph=True, is_grads_batched=True
            with torch.enable_grad():
                y = definition(x, mlp)
            return *differentiable([y], (x, *factor_tensors((*first, down))), needed, [dy]), None
        try:
            return *_backward(dy, x, mlp, outputs, kept, needed, hows), None
        except KernelUnavailable as error:
            plans.give_up(error)
        return *_backward(dy, x, mlp, outputs, kept, needed, None), None


@falls_back
def _last(y: Tensor, outputs: Sequence[Tensor], mlp: GatedMlp) -> None:
    """Write the layer `down` of what the first ones have given to y."""
    (e, u), (weight, bias, factors, p, seed) = _halves(outputs), mlp.down
    A, B, h, scaling = pack(factors)
    how, hidden = _hidden(e, u, mlp)
    seen = hidden if seed is None else how.down.dropout(rows(hidden), p, seed)
    convert = None if B.dtype == e.dtype else Conversion(B, torch.empty_like(B, dtype=e.dtype))
    g = how.down.down(seen, A, h, scaling, convert)
    B = B if convert is None else convert.target
    if how.forward is not None:
        how.forward.linear(y, hidden, how.operand(weight, e.dtype), bias, g, B)
        return
    with torch.no_grad():  # autograd knows y already
        x, w, out = rows(hidden), dense(weight, e.dtype).t(), rows(y)
        torch.mm(x, w, out=out) if bias is None else torch.addmm(bias, x, w, out=out)
        how.up.up(g, B, out)


def _hidden(e: Tensor, u: Tensor, mlp: GatedMlp) -> tuple[Plan, Tensor]:
    """The plan of `down`, and what it sees."""
    hidden, packed = _like(e), pack(mlp.down.factors)
    how = plan(hidden, mlp.down.weight, packed.A, packed.B, packed.h, mlp.down.p)
    how.down.gated(e, u, mlp.activation, hidden)
    return how, hidden


def _like(e: Tensor) -> Tensor:
    """Memory for hidden: contiguous, whatever the strides of e."""
    return torch.empty_like(e, memory_format=torch.contiguous_format)


def _halves(outputs: Any) -> Any:
    """e and u, of what the first layers have given or of gradients of that."""
    return outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)


@falls_back
def _backward(
    dy: Tensor,
    x: Tensor,
    mlp: GatedMlp,
    outputs: Sequence[Tensor],
    kept: Sequence[Tensor | None],
    needed: Sequence[bool],
    hows: list[Plan] | None,
) -> Grads:
    """Gradients of x and of the factors of the layers in their order; None for what is not needed.

    Args:
        dy: `[..., O]`, any strides.
        x, mlp: as in the forward.
        outputs, kept, hows: as `shared.forward` returned them; hows is None for new plans.
        needed: for x and each factor, whether its gradient is needed.
    """
    (e, u), (weight, _, factors, p, seed), needed_first = _halves(outputs), mlp.down, needed[:-4]
    how, hidden = _hidden(e, u, mlp)
    needs = Needs.of(any(needed_first), *needed[-4:])
    d_hidden, *d_factors = linear_backward(dy, hidden, weight, factors, None, p, seed, needs, how)
    if d_hidden is None:
        return [None] * len(needed_first) + d_factors
    d_outputs = [hidden, d_hidden] if len(outputs) == 2 else [torch.empty_like(outputs[0])]
    how.down.gated_backward(e, u, d_hidden, mlp.activation, *_halves(d_outputs))
    del hidden, d_hidden
    arguments = d_outputs, x, mlp.first, kept, needed_first
    if hows is None:
        return shared.planned_backward(*arguments) + d_factors
    return shared.backward(*arguments, hows) + d_factors
