"""The mixin over PEFT's LoRA layers: what a layer does with the factors of a grid."""

import warnings
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from . import blocks
from .blocks import GranularDown, GranularUp
from .factors import hybrid_to_lora
from .kinds import keep_bias
from .ops import add_update, dispatch, gralora_linear
from .ops.transforms import is_transformed
from .promote import Promoted

ARROW = (
    "Arrow (arrow_config) routes between plain LoRA adapters by their factors, and cannot be combined with GraLoRA "
    "adapters; `gralora export` makes plain ones of them."
)


class GraloraLayer(Promoted):
    """Mixin over one of PEFT's LoRA layer classes; its adapters may be GraLoRA, plain LoRA, or some of each.

    What it says of factors is about linear layers; kinds of layers that differ have a mixin of their own in front.
    """

    not_combinable = ""  # why PEFT's add_weighted_adapter is refused; empty if it is not

    def is_gralora(self, adapter_name: str) -> bool:
        return adapter_name in self.lora_B and isinstance(self.lora_B[adapter_name], GranularUp)

    def read_factors(self, adapter_name: str, k: int, hybrid_r: int, gain: float) -> None:
        """Make a GraLoRA of the plain LoRA that PEFT has just added; see `GranularDown.from_linear`."""
        A, B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        down, up = GranularDown.from_linear(A, k, hybrid_r, gain), GranularUp.from_linear(B, k, hybrid_r)
        self.lora_A[adapter_name] = down.requires_grad_(A.weight.requires_grad)
        self.lora_B[adapter_name] = up.requires_grad_(B.weight.requires_grad)

    def tie_factors(self, adapter: str, embedding: Any) -> None:
        """Share the memory of a GraLoRA of the embedding whose weight is this output layer's, as PEFT's LoRA does.

        The transposed grid is a grid: its A are the embedding's B transposed, and the other way round.
        """
        down, up = embedding.factors(adapter)
        for factor, source in ((self.lora_A[adapter], up), (self.lora_B[adapter], down)):
            factor.weight = nn.Parameter(source.weight.detach().mT, factor.weight.requires_grad)
            if source.hybrid_weight is not None:
                factor.hybrid_weight = nn.Parameter(source.hybrid_weight.detach().T, factor.weight.requires_grad)

    def plain_lora(self, adapter: str, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """A and B, in PEFT's layout, of the plain LoRA that it equals, of rank k * r_g + hybrid_r unless told more."""
        A, B = self.lora_A[adapter], self.lora_B[adapter]
        return hybrid_to_lora(A.weight, B.weight, A.hybrid_weight, B.hybrid_weight, rank)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, or fewer operations that compute the same."""
        y = self._fused_forward(*args) if len(args) == 1 and not kwargs else None
        return super().forward(*args, **kwargs) if y is None else y

    def _fused_forward(self, x: Tensor) -> Tensor | None:
        """With one active adapter: base and adapter in one operation, or the adapter added to the base's output.

        None where PEFT's forward is needed.
        """
        own = self.__dict__  # nn.Module's lookup of attributes would cost as much as the arithmetic of a small layer
        if self._disable_adapters or own["merged_adapters"] or dispatch.choice == "reference" or not x.numel():
            return None
        if _has_any_global_hook():  # they are to see the base layer and the adapter's modules called
            return None
        if is_transformed():  # by torch.func, forward-mode derivatives or a tracer
            return None
        modules = own["_modules"]
        downs = modules["lora_A"]._modules
        active = [name for name in self.active_adapters if name in downs]
        if len(active) != 1 or active[0] in own["lora_variant"]:
            return None
        name = active[0]
        A, B, dropout = downs[name], modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]
        if type(A) is not GranularDown or type(B) is not GranularUp:
            return None
        factors_A, factors_B = A._parameters, B._parameters
        if factors_B["bias"] is not None:
            return None
        if type(dropout) not in (nn.Identity, nn.Dropout) or _has_hooks(A) or _has_hooks(B) or _has_hooks(dropout):
            return None
        device = "cuda" if x.is_cuda else x.device.type  # making the string costs more than all the checks above
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        A_weight, B_weight = factors_A["weight"], factors_B["weight"]
        if x.dtype == torch.float64 if autocast else not A_weight.dtype == B_weight.dtype == dtype:
            return None
        A_hybrid, B_hybrid = factors_A["hybrid_weight"], factors_B["hybrid_weight"]
        scaling = own["scaling"][name]
        if B.gralora_scaling != "lora":
            scaling = scaling * B.gain
        if isinstance(scaling, Tensor):  # prepare_model_for_compiled_hotswap: a number would be compiled in
            B_weight, B_hybrid = B_weight * scaling, None if B_hybrid is None else B_hybrid * scaling
            scaling = 1.0
        p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
        adapter = A_weight, B_weight, A_hybrid, B_hybrid, scaling, p

        base = modules["base_layer"]
        plain = _plain_weights(base)
        if plain is not None and (autocast or plain[0].dtype == dtype):
            x, weight, bias = (t if t is None or t.dtype == dtype else t.to(dtype) for t in (x, *plain))
            if torch.compiler.is_compiling() and dispatch.compiled_as(x, weight, p) == "operations":
                return None
            return gralora_linear(x, weight, bias, *adapter)
        if torch.compiler.is_compiling():
            return None
        y = base(x)
        quantised = type(base._parameters.get("weight")) is not nn.Parameter
        if not quantised or y._is_view() or not y.is_contiguous() or _has_hooks(base):
            y = y.clone()  # what is changed below must be nobody else's, nor kept for the backward
        return add_update(y, x.to(dtype), *adapter)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW of one adapter, scaling included, in the layout of the base weight (`[out, in]`, Conv1D: `[in, out]`).

        A GraLoRA adapter of half precision gives float32, so that adding it to a weight rounds once.
        """
        if not self.is_gralora(adapter):
            return super().get_delta_weight(adapter)
        dW = blocks.delta_weight(self.lora_A[adapter], self.lora_B[adapter], self.scaling[adapter])
        return dW.T if getattr(self, "fan_in_fan_out", False) else dW  # not all of PEFT's classes have it

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, one adapter at a time: some of its classes fail on a second one, or on one that a layer lacks.

        Raises:
            ValueError: with safe_merge, if the result would not be finite; not all of PEFT's classes look.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.scaling:
                if safe_merge and self.is_gralora(name) and not self.get_delta_weight(name).isfinite().all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                with keep_bias(self), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Already following adapters were merged")  # said once, above
                    super().merge(safe_merge=safe_merge, adapter_names=[name])

    def unmerge(self) -> None:
        with keep_bias(self):
            super().unmerge()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` may take dW for all that the adapter does; it would lose DoRA and aLoRA."""
        if self.is_gralora(adapter_name) and adapter_name in self.lora_variant:
            return False
        return super().supports_lora_conversion(adapter_name)

    def resolve_lora_variant(self, *, config: peft.LoraConfig, **kwargs: Any) -> Any:
        """PEFT's choice of a variant for an adapter that is added; Arrow's router reads other adapters' factors."""
        if getattr(config, "arrow_config", None) is not None:
            raise ValueError(ARROW)
        return super().resolve_lora_variant(config=config, **kwargs)


def _plain_weights(base: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight `[O, I]` and bias of a frozen nn.Linear or Conv1D without hooks; None for any other base layer."""
    parameters = base._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if _has_hooks(base):
        return None
    if type(base).forward is nn.Linear.forward:
        return weight, bias
    return (weight.t(), bias) if type(base).forward is Conv1D.forward else None


def _has_hooks(module: nn.Module) -> bool:
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )
