"""Mixture-of-experts modules of transformers whose experts have adapters, computed by `ops.grouped`.

transformers computes experts by one of several functions, which read of a module what its class has told the decorator
`use_experts_implementation`. The function here is one more of them; it takes the adapters along, so that no dW has to
be added to the weights. A module that goes another way, or an experts implementation with a weight format of its own,
keeps PEFT's.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import Parameter

from .ops import Factors, plans
from .ops.activations import ACTIVATIONS
from .ops.grouped import GroupedLinear, grouped_linear, has_kernels
from .ops.routing import Routing, combine, gather
from .ops.torch_seam import has_global_hooks, has_hooks, is_transformed, parameters_of
from .ops.weighted_gate import weighted_gate
from .seam import experts_implementation, has_default_gate

Adapters = Mapping[str, Sequence[Factors]]


class RoutedCall(NamedTuple):
    """One call of a module of experts with adapters: `call()` is its output.

    Attributes:
        experts: the module, without PEFT's wrappers.
        adapters: name of a parameter -> the factors of all experts, of every active adapter.
        hidden: tokens, `[T, H]`.
        chosen: the experts of each, `[T, n]`.
        weights: how much each of them counts, `[T, n]`.
    """

    experts: Any
    adapters: Adapters
    hidden: Tensor
    chosen: Tensor
    weights: Tensor

    def __call__(self) -> Tensor:
        """What transformers' functions of experts compute.

        A row is multiplied by its expert's weight before the last product, not after it: there are fewer features
        there, and what the last product gives need not be kept.
        """
        experts, adapters, hidden, chosen, weights = self
        act = experts._apply_gate if experts.has_gate else experts.act_fn
        first, last = parameter_names(experts)
        has_norm = getattr(experts, "has_post_expert_norm", False)
        matrix = experts.down_proj
        routing = Routing.of(chosen, len(matrix))
        of_row = chosen.flatten()[routing.order] if experts.has_bias else None
        weights = weights.flatten()[routing.order].unsqueeze(1)

        def layer(name: str) -> GroupedLinear:
            factors = tuple(adapters.get(name, ()))
            return GroupedLinear(parameters_of(experts)[name], experts.is_transposed, factors)

        def gathered(x: Tensor) -> Tensor:
            return gather(x, routing).to(matrix.dtype)

        def activated(x: Tensor) -> Tensor:
            return act(x).to(matrix.dtype)

        activation = activation_of(experts)

        def weighted(x: Tensor, weights: Tensor) -> Tensor:
            if activation is not None:
                return weighted_gate(x, weights, activation)
            return (act(x) * weights).to(matrix.dtype)

        x = grouped_linear((hidden,), gathered, layer(first), routing.groups)
        if of_row is not None:
            x = x.add_(parameters_of(experts)[f"{first}_bias"][of_row])
        if has_norm:
            y = grouped_linear((x,), activated, layer(last), routing.groups)
            y = y if of_row is None else y.add_(parameters_of(experts)[f"{last}_bias"][of_row])
            y = experts.post_expert_norm(y) * weights
        else:
            y = grouped_linear((x, weights), weighted, layer(last), routing.groups)
            if of_row is not None:
                y = y.add_(parameters_of(experts)[f"{last}_bias"][of_row] * weights)
        return combine(y, routing).to(hidden.dtype)


def parameter_names(experts: Any) -> tuple[str, str]:
    """The names of the weights of the first and of the last product."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


# a module of experts -> its act_fn when it was asked, and what `activation_of` found
_activations: "weakref.WeakKeyDictionary[Any, tuple[Any, str | None]]" = weakref.WeakKeyDictionary()


def activation_of(experts: Any) -> str | None:
    """The activation of experts that compute act(e) * u; a name of ACTIVATIONS, or None if there is none of it."""
    if not has_default_gate(experts):
        return None
    known = _activations.get(experts)
    if known is None or known[0] is not experts.act_fn:
        known = _activations[experts] = experts.act_fn, _seen_activation(experts.act_fn)
    return known[1]


def _seen_activation(function: Any) -> str | None:
    numbers = torch.linspace(-30, 30, 512)
    try:
        with torch.no_grad():
            values = function(numbers)
    except Exception:  # whatever it needs
        return None
    return next((name for name, act in ACTIVATIONS.items() if torch.equal(act.value(numbers), values)), None)


def routed_call(wrapper: Any, args: tuple[Any, ...]) -> RoutedCall | None:
    """The operation that computes `wrapper(*args)`, or None where PEFT is to add dW to the weights.

    It is one if

    - the module under the wrappers is computed by one of transformers' own functions, eager, batched_mm or grouped_mm,
      by itself: without hooks, and not on several devices;
    - every active adapter, of any of the wrappers around it, is one that `fuses`, and belongs to a weight;
    - the weights are frozen, of one floating-point dtype of more than 8 bits, the dtype that is computed in, and on a
      GPU there are kernels for them;
    - no transform of torch.func, no forward-mode derivative, no tracer and no compiler is at work.

    Args:
        wrapper: the outermost `experts.FusedExperts` around a module.
        args: of its forward.
    """
    if plans.choice == "reference" or torch.compiler.is_compiling() or has_global_hooks() or is_transformed():
        return None
    if len(args) != 3 or not all(isinstance(t, Tensor) and t.dim() == 2 for t in args):
        return None
    hidden, chosen, weights = args
    layer, adapters = wrapper, {}
    while hasattr(layer, "expert_factors"):
        factors = layer.expert_factors()
        if factors is None or (layer is not wrapper and has_hooks(layer)):
            return None
        adapters[layer.parameter_name] = factors
        layer = layer.base_layer
    if isinstance(layer, BaseTunerLayer) or has_hooks(layer) or not any(adapters.values()):
        return None
    implementation = experts_implementation(layer)
    if implementation is None or chosen.shape != weights.shape or chosen.is_floating_point():
        return None
    if not _has_plain_weights(layer, adapters, hidden, implementation == "grouped_mm"):
        return None
    return RoutedCall(layer, adapters, hidden, chosen, weights)


def _has_plain_weights(experts: nn.Module, adapters: Adapters, hidden: Tensor, keeps_dtype: bool) -> bool:
    """Whether the weights of experts can be read; `keeps_dtype` if autocast does not change what is computed in."""
    names, own = parameter_names(experts), parameters_of(experts)
    if any(factors and name not in names for name, factors in adapters.items()):
        return False
    matrices = [matrix for name in names if type(matrix := own.get(name)) is Parameter and not matrix.requires_grad]
    if len(matrices) < 2 or any(matrix.dim() != 3 or matrix.device != hidden.device for matrix in matrices):
        return False
    dtype, device = matrices[0].dtype, hidden.device.type
    if not dtype.is_floating_point or dtype.itemsize == 1 or matrices[1].dtype != dtype:
        return False
    if torch.is_autocast_enabled(device):
        if dtype != torch.get_autocast_dtype(device) and not keeps_dtype:
            return False
    elif hidden.dtype != dtype:
        return False
    if hidden.is_cuda and not all(map(has_kernels, matrices)):  # one expert after another takes too many launches
        return False
    # what is trained must be seen by autograd, which the activation is not
    trained = {name.partition(".")[0] for name, p in experts.named_parameters() if p.requires_grad}
    return trained <= {f"{name}_bias" for name in names} | {"post_expert_norm"}
