"""When a linear layer computes base and adapter in one operation, and with which tensors.

`fused_call` answers without computing the layer, so that whoever computes several layers at once can ask each of them
first. It runs at every forward pass, where it must cost less than the arithmetic of a small layer: hence the reads of
modules' dictionaries instead of attributes.

`FusedLayer` puts it in front of PEFT's forward: of plain LoRA adapters where `gralora.accelerate` asks for it, and of
GraLoRA adapters by its subclass in layers.py.
"""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import Dropout, Identity, Linear, Parameter

from .blocks import GranularDown, GranularUp, scaling_gain
from .ops import AdaptedLinear, Factors, PackedWeight, add_update, compiled, gralora_linear, plans
from .ops.torch_seam import (
    children_of,
    has_global_hooks,
    has_hooks,
    is_transformed,
    is_view,
    parameters_of,
    unhooked_parameters,
)
from .promote import Transparent
from .quantized import packed_weight
from .seam import Conv1D

if TYPE_CHECKING:

    class Stock(lora.Linear):
        """PEFT's class behind ours, as a type checker is to see it: what its dictionaries hold is not typed."""

        lora_A: Any
        lora_B: Any
        lora_embedding_A: Any
        lora_embedding_B: Any
        lora_variant: Any

        def get_base_layer(self) -> Any: ...
else:
    Stock = object


class _Sharing(threading.local):
    group: Any = None


sharing = _Sharing()
"""`siblings.Siblings` of the module whose forward runs, in `group`; None outside of such modules."""

TENSORS = (Parameter, Tensor)  # the latter with torch.func.functional_call


class FusedCall(NamedTuple):
    """One operation that computes an adapted layer: `call(x)` is the layer's output.

    Attributes:
        base: the base layer.
        weight: its weight as a matrix, `[O, I]`, frozen, packed if it is quantised; None if the base layer is called,
            and the adapter's output added to what it returns.
        bias: its bias, `[O]`, or None; None also without a weight.
        factors: the active adapter's.
        p: probability of dropout on what the adapter sees of x.
        dtype: what is computed in. x is converted to it for the adapter, and with a weight all of x, weight and bias.
    """

    base: nn.Module
    weight: Tensor | PackedWeight | None
    bias: Tensor | None
    factors: Factors
    p: float
    dtype: torch.dtype

    def operands(self) -> AdaptedLinear:
        """The tensors of a call with a weight, in the dtype that is computed in."""
        _, weight, bias, factors, _, dtype = self
        assert weight is not None
        if isinstance(weight, Tensor) and weight.dtype != dtype:
            weight = weight.to(dtype)
        return AdaptedLinear(weight, bias if bias is None or bias.dtype == dtype else bias.to(dtype), factors)

    def __call__(self, x: Tensor) -> Tensor:
        base, weight, _, factors, p, dtype = self
        if weight is not None:
            y = gralora_linear(x if x.dtype == dtype else x.to(dtype), *self.operands(), p)
            if isinstance(weight, Tensor) or y.dtype == x.dtype:
                return y
            return y.to(x.dtype)  # as bitsandbytes' layers do, also under autocast
        y = base(x)
        quantised = type(parameters_of(base).get("weight")) is not Parameter
        if not quantised or is_view(y) or not y.is_contiguous() or has_hooks(base):
            y = y.clone()  # what is changed below must be nobody else's, nor kept for the backward
        return add_update(y, x.to(dtype), factors, p)


def fused_call(layer: Any, x: Tensor) -> FusedCall | None:
    """The operation that computes `layer(x)`, or None where PEFT's forward is needed.

    It is one if x is not empty, GRALORA_KERNELS does not ask for the definition, and

    - one adapter is active in this layer: not disabled, nothing merged;
    - it is a GraLoRA, whose modules are ours, or a plain LoRA of two nn.Linear in a layer that `fuses_plain`;
    - it has neither a bias nor a variant (DoRA, aLoRA), and torch's own dropout;
    - no hook would miss a call of A, B or dropout;
    - no transform of torch.func, no forward-mode derivative and no tracer is at work;
    - the factors have the dtype that is computed in; under autocast, x is not float64;
    - while torch.compile traces: the base layer is one whose weight can be read, and the operation is to be one
      operator of the graph.

    The base layer's weight is read if it is a frozen nn.Linear or Conv1D without hooks, of that dtype.

    Args:
        layer: a `FusedLayer` over PEFT's layer for a linear map.
        x: its input, `[..., I]`.
    """
    own = layer.__dict__
    if own["_disable_adapters"] or own["merged_adapters"] or plans.choice == "reference" or not x.numel():
        return None
    if has_global_hooks() or is_transformed():
        return None
    modules = own["_modules"]
    downs = children_of(modules["lora_A"])
    active = layer.active_adapters
    if len(active) != 1:
        active = [name for name in active if name in downs]
        if len(active) != 1:
            return None
    name = active[0]
    if name not in downs or name in own["lora_variant"]:
        return None
    A, B, dropout = downs[name], children_of(modules["lora_B"])[name], children_of(modules["lora_dropout"])[name]
    is_grid = type(A) is GranularDown and type(B) is GranularUp
    if not (is_grid or type(A) is type(B) is Linear and layer.fuses_plain) or type(dropout) not in (Identity, Dropout):
        return None
    factors_A, factors_B = unhooked_parameters(A), unhooked_parameters(B)
    if factors_A is None or factors_B is None or has_hooks(dropout) or factors_B.get("bias") is not None:
        return None

    device = "cuda" if x.is_cuda else x.device.type  # making the string costs more than all the checks above
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    A_weight: Any = factors_A.get("weight")
    B_weight: Any = factors_B.get("weight")
    if (
        type(A_weight) not in TENSORS or type(B_weight) not in TENSORS
    ):  # DTensors, or nothing: FSDP1 keeps it elsewhere
        return None
    if x.dtype == torch.float64 if autocast else not A_weight.dtype == B_weight.dtype == dtype:
        return None

    A_hybrid, B_hybrid = factors_A.get("hybrid_weight"), factors_B.get("hybrid_weight")
    scaling = own["scaling"][name]
    if is_grid and B.gralora_scaling != "lora":
        k, _, r_g = A_weight.shape
        scaling = scaling * scaling_gain(B.gralora_scaling, k, r_g, 0 if A_hybrid is None else A_hybrid.shape[0])
    if isinstance(scaling, Tensor):  # prepare_model_for_compiled_hotswap: a number would be compiled in
        B_weight, B_hybrid = B_weight * scaling, None if B_hybrid is None else B_hybrid * scaling
        scaling = 1.0
    p = dropout.p if dropout.training and type(dropout) is Dropout else 0.0

    base = modules["base_layer"]
    weight: Tensor | PackedWeight | None
    weight, bias = _weights(base)
    if weight is not None and not autocast and weight.dtype != dtype:
        weight = bias = None
    if torch.compiler.is_compiling() and (weight is None or compiled.form_of(x.to(dtype), weight, p) == "operations"):
        return None
    if weight is None and not has_hooks(base):
        weight = packed_weight(base, x, dtype)
        bias = None if weight is None else parameters_of(base)["bias"]
    return FusedCall(base, weight, bias, Factors(A_weight, B_weight, A_hybrid, B_hybrid, scaling), p, dtype)


def fused_calls(layers: Sequence[Any], x: Tensor) -> list[FusedCall] | None:
    """`fused_call` of several `FusedLayer`, if one operation can compute them all, else None.

    It can if no layer has hooks or dropout, and each has its base weight in the operation and the dtype of the others.
    A layer of 4 bits returns the dtype that it gets, so with one, x has to have the dtype that is computed in.
    """
    calls: list[FusedCall] = []
    for layer in layers:
        call = None if has_hooks(layer) else layer.fused_call(x)
        if call is None or call.weight is None or call.p or calls and call.dtype != calls[0].dtype:
            return None
        if call.dtype != x.dtype and not isinstance(call.weight, Tensor):
            return None
        calls.append(call)
    return calls


def _weights(base: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight `[O, I]` and bias of a frozen nn.Linear or Conv1D without hooks; None for any other base layer."""
    parameters = unhooked_parameters(base)
    if parameters is None:
        return None, None
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if type(weight) is not Parameter or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None, None
    if type(base).forward is Linear.forward:
        return weight, bias
    return (weight.t(), bias) if type(base).forward is Conv1D.forward else (None, None)


class FusedLayer(Transparent, Stock):
    """Mixin in front of one of PEFT's LoRA layer classes, which computes base and adapter in one operation.

    A layer of this very class is PEFT's in all else.
    """

    fuses_plain = True
    """Whether plain LoRA adapters are computed so; `accelerate` sets it in single layers of subclasses."""

    fused_call = fused_call
    """The operation that computes this layer's output for an input, or None where PEFT's forward is needed."""

    def has_fused(self) -> bool:
        """Whether any adapter that this layer has now may be computed so."""
        return bool(self.lora_A)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, or one operation that computes the same."""
        if len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)
        if not torch.compiler.is_compiling() and sharing.group is not None:
            y = sharing.group.output_of(self, *args)
            if y is not None:
                return y
        call = self.fused_call(*args)
        return super().forward(*args) if call is None else call(*args)
