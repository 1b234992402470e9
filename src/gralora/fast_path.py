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
from torch.compiler import is_compiling
from torch.nn import Dropout, Identity, Linear, Parameter

from .blocks import GranularDown, GranularUp, scaling_gain
from .dora import dora_linear, magnitude_of
from .ops import (
    AdaptedLinear,
    Factors,
    PackedWeight,
    Rows,
    add_update,
    gralora_linear,
    is_operator,
    joined,
    mixed_update,
    plans,
)
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
from .quantized import holds_float8, packed_weight
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

DROPOUTS = (Identity, Dropout)
TENSORS = (Parameter, Tensor)  # the latter with torch.func.functional_call


class FusedCall(NamedTuple):
    """One operation that computes an adapted layer: `call(x)` is the layer's output.

    Attributes:
        base: the base layer.
        weight: its weight as a matrix, `[O, I]`, frozen, packed if it is quantised; None if the base layer is called,
            and the adapter's output added to what it returns.
        bias: its bias, `[O]`, or None; None also without a weight.
        factors: the active adapter's, or those of several side by side.
        p: probability of dropout on what the adapter sees of x.
        dtype: what is computed in. x is converted to it for the adapter, and with a weight all of x, weight and bias.
        more: adapters that `factors` cannot hold, each with its p; their outputs are added one by one.
        magnitude: m of DoRA, `[O]`, or None without; with it there is a weight, not packed, and neither p nor more.
    """

    base: nn.Module
    weight: Tensor | PackedWeight | None
    bias: Tensor | None
    factors: Factors
    p: float
    dtype: torch.dtype
    more: "tuple[Adapter, ...]" = ()
    magnitude: Tensor | None = None

    def operands(self) -> AdaptedLinear:
        """The tensors of a call with a weight, in the dtype that is computed in."""
        weight, bias, dtype = self.weight, self.bias, self.dtype
        assert weight is not None
        if isinstance(weight, Tensor) and weight.dtype != dtype:
            weight = weight.to(dtype)
        bias = bias if bias is None or bias.dtype == dtype else bias.to(dtype)
        return AdaptedLinear(weight, bias, self.factors, self.p)

    def __call__(self, x: Tensor) -> Tensor:
        seen = x if x.dtype == self.dtype else x.to(self.dtype)
        if self.magnitude is not None:
            return dora_linear(seen, self.operands(), self.magnitude)
        if self.weight is not None:
            y = gralora_linear(seen, *self.operands())
        else:
            y = add_update(own_output(self.base, x), seen, self.factors, self.p)
        for factors, p, _ in self.more:
            y = add_update(y, seen, factors, p)
        if self.weight is None or isinstance(self.weight, Tensor) or y.dtype == x.dtype:
            return y
        return y.to(x.dtype)  # as bitsandbytes' layers do, also under autocast


class Adapter(NamedTuple):
    """The factors of one adapter of a layer, the probability of dropout on what it sees, and m of DoRA or None."""

    factors: Factors
    p: float
    magnitude: Tensor | None = None


def own_output(base: nn.Module, x: Tensor) -> Tensor:
    """What a base layer gives of x, contiguous, to be changed in place."""
    y = base(x)
    is_new = type(base).forward is Linear.forward or type(parameters_of(base).get("weight")) is not Parameter
    if not is_new or is_view(y) or not y.is_contiguous() or has_hooks(base):
        y = y.clone(memory_format=torch.contiguous_format)  # must be nobody else's, nor kept for the backward
    return y


def fused_call(layer: Any, x: Tensor) -> FusedCall | None:
    """The operation that computes `layer(x)`, or None where PEFT's forward is needed.

    It is one if x is not empty, GRALORA_KERNELS does not ask for the definition, and

    - adapters are active in this layer: not disabled, nothing merged;
    - each is a GraLoRA, whose modules are ours, or a plain LoRA of two nn.Linear, in a layer that `fuses_plain` or
      beside an active GraLoRA;
    - none has a bias or a variant (aLoRA), and each has torch's own dropout; or it is one alone with DoRA, without
      dropout, over a weight that can be read;
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
    setting = setting_of(layer, x)
    if setting is None:
        return None
    names, dtype, autocast = setting
    more: Sequence[Adapter] = ()
    if len(names) == 1:  # as nearly always, and so without the lists
        adapter = adapter_of(layer, names[0], None if autocast else dtype, layer.fuses_plain)
        if adapter is None:
            return None
    else:
        adapters = adapters_of(layer, names, None if autocast else dtype)
        if not adapters or any(adapter.magnitude is not None for adapter in adapters):
            return None
        adapter, *more = _together(adapters)
    factors, p, magnitude = adapter

    base = layer.__dict__["_modules"]["base_layer"]
    weight: Tensor | PackedWeight | None
    weight, bias = _weights(base)
    if weight is not None and not autocast and weight.dtype != dtype:
        weight = bias = None
    if magnitude is not None and (weight is None or p):
        return None
    if weight is None and not has_hooks(base) and (not is_compiling() or holds_float8(base)):
        weight = packed_weight(base, x, dtype)
        bias = None if weight is None else parameters_of(base).get("bias", getattr(base, "bias", None))
    if is_compiling() and (more or weight is None or not is_operator(x.to(dtype), weight, p)):
        return None
    return FusedCall(base, weight, bias, factors, p, dtype, tuple(more), magnitude)


def setting_of(layer: Any, x: Tensor) -> tuple[list[str], torch.dtype, bool] | None:
    """The active adapters, the dtype that is computed in, and whether autocast sets it; None if PEFT's forward is.

    What it asks of layer and call does not depend on the kind of layer; see `fused_call`.
    """
    own = layer.__dict__
    if own["_disable_adapters"] or own["merged_adapters"] or not is_ordinary(x):
        return None
    names = layer.active_adapter  # a string, or several
    if isinstance(names, str):
        names = [names]
    elif len(names) != 1:
        downs = children_of(own["_modules"]["lora_A"])
        names = [name for name in names if name in downs]
    dtype, autocast = _dtype_of(x)
    return None if dtype is None else (names, dtype, autocast)


def is_ordinary(x: Tensor) -> bool:
    """Whether x is not empty, and nothing at work has to see single operations."""
    return plans.choice != "reference" and x.numel() > 0 and not has_global_hooks() and not is_transformed()


def _dtype_of(x: Tensor) -> tuple[torch.dtype | None, bool]:
    """What is computed in, and whether autocast sets it; None for what autocast leaves as it is."""
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type  # which is slow to make
    if not torch.is_autocast_enabled(device):
        return x.dtype, False
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(device), True


def adapters_of(layer: Any, names: Sequence[str], dtype: torch.dtype | None) -> list[Adapter] | None:
    """`adapter_of` each of these names, or None if one is None. Beside a GraLoRA plain LoRAs are computed, too."""
    downs = children_of(layer.__dict__["_modules"]["lora_A"])
    down_class, _ = layer.factor_modules
    fuses_plain = layer.fuses_plain or len(names) > 1 and any(type(downs.get(name)) is down_class for name in names)
    adapters = []
    for name in names:
        adapter = adapter_of(layer, name, dtype, fuses_plain)
        if adapter is None:
            return None
        adapters.append(adapter)
    return adapters


def adapter_of(layer: Any, name: str, dtype: torch.dtype | None, fuses_plain: bool) -> Adapter | None:
    """An adapter of a layer, or None if `fused_call` is not to compute it.

    Args:
        layer: a `FusedLayer` over PEFT's layer for a linear map.
        name: of the adapter; the layer may lack it.
        dtype: that its factors must have; None for any, which is then converted.
        fuses_plain: whether a plain LoRA is computed.
    """
    own = layer.__dict__
    modules = own["_modules"]
    downs = children_of(modules["lora_A"])
    if name not in downs:
        return None
    magnitude = None
    if name in own["lora_variant"]:
        magnitude = magnitude_of(layer, name)
        if magnitude is None:
            return None
    A, B, dropout = downs[name], children_of(modules["lora_B"])[name], children_of(modules["lora_dropout"])[name]
    down_class, up_class = layer.factor_modules
    is_grid = type(A) is down_class and type(B) is up_class
    if not (is_grid or fuses_plain and type(A) is type(B) is Linear) or type(dropout) not in DROPOUTS:
        return None
    factors_A, factors_B = unhooked_parameters(A), unhooked_parameters(B)
    if factors_A is None or factors_B is None or unhooked_parameters(dropout) is None:
        return None
    if factors_B.get("bias") is not None:
        return None
    A_weight: Any = factors_A.get("weight")
    B_weight: Any = factors_B.get("weight")
    if type(A_weight) not in TENSORS or type(B_weight) not in TENSORS:
        return None  # DTensors, or nothing: FSDP1 keeps it elsewhere
    if dtype is not None and not A_weight.dtype == B_weight.dtype == dtype:
        return None
    A_hybrid, B_hybrid = factors_A.get("hybrid_weight"), factors_B.get("hybrid_weight")
    scaling = own["scaling"][name]
    if is_grid and B.gralora_scaling != "lora":
        k, *_, r_g = A_weight.shape
        scaling = scaling * scaling_gain(B.gralora_scaling, k, r_g, 0 if A_hybrid is None else A_hybrid.shape[0])
    if isinstance(scaling, Tensor):  # prepare_model_for_compiled_hotswap: a number would be compiled in
        B_weight, B_hybrid = B_weight * scaling, None if B_hybrid is None else B_hybrid * scaling
        scaling = 1.0
    p = dropout.p if type(dropout) is Dropout and dropout.training else 0.0
    return Adapter(Factors(A_weight, B_weight, A_hybrid, B_hybrid, scaling), p, magnitude)


def _together(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The same sum by fewer adapters: those without dropout side by side; the others draw masks of their own."""
    same = joined([adapter.factors for adapter in adapters if not adapter.p])
    return [Adapter(factors, 0.0) for factors in same] + [adapter for adapter in adapters if adapter.p]


def mixed_output(layer: Any, x: Tensor, adapter_names: Sequence[str]) -> Tensor | None:
    """What `layer` gives of a batch whose rows have adapters of their own, or None where PEFT's forward is needed.

    Args:
        layer: a `FusedLayer` over PEFT's layer for a linear map.
        x: its input, `[N, ..., I]`.
        adapter_names: of each row; a name that the layer has no adapter of, as "__base__", stands for none.
    """
    dtype, autocast = _dtype_of(x)
    if dtype is None or not is_ordinary(x) or is_compiling():
        return None
    names = [name for name in dict.fromkeys(adapter_names) if name in layer.lora_A]
    adapters = adapters_of(layer, names, None if autocast else dtype)
    if adapters is None or any(p or magnitude is not None for _, p, magnitude in adapters):
        return None
    y = own_output(layer.base_layer, x)
    rows = [[n for n, own in enumerate(adapter_names) if own == name] for name in names]
    order = [n for own in rows for n in own]
    first = order[0] if order else 0
    is_run = order == list(range(first, first + len(order)))
    groups, start = [], first if is_run else 0
    for own, (factors, _, _) in zip(rows, adapters, strict=True):
        groups.append(Rows(start, start + len(own), factors))
        start += len(own)
    where = None if is_run else torch.tensor(order, device=x.device)
    return mixed_update(y, x if x.dtype == dtype else x.to(dtype), groups, where)


def fused_calls(layers: Sequence[Any], x: Tensor) -> list[FusedCall] | None:
    """`fused_call` of several `FusedLayer`, if one operation can compute them all, else None.

    It can if no layer has hooks, DoRA, or adapters that are not side by side, and each has its base weight in
    the operation and the dtype of the others. A layer of 4 bits returns the dtype that it gets, so with one, x has to
    have the dtype that is computed in.
    """
    calls: list[FusedCall] = []
    for layer in layers:
        call = None if has_hooks(layer) else layer.fused_call(x)
        if (
            call is None
            or call.weight is None
            or call.more
            or call.magnitude is not None
            or calls
            and call.dtype != calls[0].dtype
        ):
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

    factor_modules: tuple[type[GranularDown], type[GranularUp]] = GranularDown, GranularUp
    """The classes of A and B of a GraLoRA adapter."""

    fused_call = fused_call
    """The operation that computes this layer's output for an input, or None where PEFT's forward is needed."""

    mixed_output = mixed_output
    """The output for a batch whose rows have adapters of their own, or None where PEFT's method is needed."""

    def has_fused(self) -> bool:
        """Whether any adapter that this layer has now may be computed so."""
        return bool(self.lora_A)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, or one operation that computes the same."""
        if len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)
        if not is_compiling() and sharing.group is not None:
            y = sharing.group.output_of(self, *args)
            if y is not None:
                return y
        call = self.fused_call(*args)
        return super().forward(*args) if call is None else call(*args)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """PEFT's method for a batch whose rows have adapters of their own, or the same with each computed at once."""
        if not args and all(value is None for value in kwargs.values()):
            y = self.mixed_output(x, adapter_names)
            if y is not None:
                return y
        return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
