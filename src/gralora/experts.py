"""GraLoRA of parameters that PEFT adapts through `target_parameters`: one grid an expert.

Mixture-of-experts models keep the weights of `E` experts as one parameter of three dimensions. PEFT takes it as
`[E, O, I]`, or as `[E, I, O]` where the module has `is_transposed=True`, and a parameter of two dimensions as one
expert, `[O, I]`. Every expert e has factors of its own, and dW[e] is the full grid.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import ALLOWED_COMPUTE_DTYPES
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from . import blocks
from .blocks import GranularDown, GranularUp, Weights
from .ops.factors import hybrid_to_lora


class TargetParameter(NamedTuple):
    """A parameter that is adapted, and the module that has it, without PEFT's wrappers."""

    module: nn.Module
    name: str

    @property
    def value(self) -> Tensor:
        return getattr(self.module, self.name)

    def features(self) -> tuple[int, int]:
        """Input and output features of one expert, as `lora.ParamWrapper` takes them."""
        *experts, rows, columns = self.value.shape
        return (rows, columns) if experts and getattr(self.module, "is_transposed", False) else (columns, rows)

    def obstacle(self) -> str:
        """What keeps it from being adapted, in words; empty if nothing does."""
        if self.name in getattr(self.module, "parametrizations", {}):
            return "which is parametrised already (or quantised in place)"
        if type(self.value) is not nn.Parameter or not self.value.is_floating_point():
            return "which is no plain floating-point nn.Parameter"
        if self.value.ndim not in (2, 3):
            return f"which has {self.value.ndim} dimensions, where PEFT takes 2, or 3 for experts"
        return ""


def targeted_parameters(model: nn.Module, targets: list[str] | None) -> Iterator[tuple[str, TargetParameter]]:
    """Full name and place of what PEFT adapts for `target_parameters=targets`: its rule is in `_inject_parameters`."""
    for module_name, module in model.named_modules() if targets else ():
        plain_name = module_name.replace(".base_layer", "")
        own = [name for name, _ in module.named_parameters(recurse=False)]
        for name in own + list(getattr(module, "parametrizations", ())):
            key = f"{plain_name}.{name}"
            if key in targets or key.endswith(tuple(f".{target}" for target in targets)):
                yield key, TargetParameter(module, name)


def param_wrapper(layer: nn.Module, name: str) -> Any:
    """The one of possibly nested `lora.ParamWrapper`s around a module that adapts its parameter `name`, or None."""
    while isinstance(layer, BaseTunerLayer):
        if isinstance(layer, lora.ParamWrapper) and layer.parameter_name == name:
            return layer
        layer = layer.base_layer
    return None


class ExpertsDown(GranularDown):
    """The A of all experts: `weight` `[E, k, I/k, r_g]`, `hybrid_weight` `[E, hybrid_r, I]`. Never called."""

    def extra_repr(self) -> str:
        experts, k, chunk, r_g = self.weight.shape
        hybrid_r = 0 if self.hybrid_weight is None else self.hybrid_weight.shape[1]
        return f"experts={experts}, in={k * chunk}, k={k}, r={r_g + hybrid_r}, hybrid_r={hybrid_r}"


class ExpertsUp(GranularUp):
    """The B of all experts: `weight` `[E, k, r_g, O/k]`, `hybrid_weight` `[E, O, hybrid_r]`. Never called."""

    def extra_repr(self) -> str:
        experts, k, r_g, chunk = self.weight.shape
        hybrid_r = 0 if self.hybrid_weight is None else self.hybrid_weight.shape[2]
        return f"experts={experts}, out={k * chunk}, k={k}, r={r_g + hybrid_r}, hybrid_r={hybrid_r}"


class GranularExperts:
    """Mixin in front of `GraloraLayer`, over PEFT's `lora.ParamWrapper`."""

    not_combinable = "PEFT's add_weighted_adapter does not support target_parameters"

    def read_factors(self, adapter_name: str, k: int, hybrid_r: int, gain: float) -> None:
        """PEFT's `[E * r, I]` and `[O, r * E]`, the expert outermost in the one and innermost in the other."""
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        down = GranularDown.read(A.detach().unflatten(0, (self.num_experts, -1)), k, hybrid_r, gain)
        up = GranularUp.read(B.detach().unflatten(1, (-1, self.num_experts)).movedim(-1, 0), k, hybrid_r)
        self.lora_A[adapter_name] = ExpertsDown(*down).requires_grad_(A.requires_grad)
        self.lora_B[adapter_name] = ExpertsUp(*up).requires_grad_(B.requires_grad)

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """dW of one adapter, scaling included, in the layout of the parameter, and its dtype unless that is 8-bit."""
        if not self.is_gralora(adapter):
            return super().get_delta_weight(adapter, *args, **kwargs)
        dW = torch.stack([blocks.delta_weight(*factors, self.scaling[adapter]) for factors in self._experts(adapter)])
        param = self.get_param()
        dW = (dW.mT if self._is_transposed else dW).reshape(param.shape)
        return dW.to(param.dtype) if param.dtype in ALLOWED_COMPUTE_DTYPES else dW

    def get_delta_factors(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        """`(lhs, rhs, scaling)` with dW = scaling * lhs @ rhs: the plain LoRAs of rank k * r_g + hybrid_r.

        `lora.ParamWrapper` adds them to the parameter in one operation, for the time of a forward pass.
        """
        if not self.is_gralora(adapter):
            return super().get_delta_factors(adapter)
        down, up = self.lora_A[adapter], self.lora_B[adapter]
        tensors = down.weight, up.weight, down.hybrid_weight, up.hybrid_weight
        each = tuple(None if t is None else 0 for t in tensors)
        A, B = torch.func.vmap(hybrid_to_lora, in_dims=each)(*tensors)  # [E, R, I], [E, O, R]
        lhs, rhs = (A.mT, B.mT) if self._is_transposed else (B, A)
        dtype = self.get_param().dtype
        return lhs.to(dtype), rhs.to(dtype), float(self.scaling[adapter])

    @property
    def _is_transposed(self) -> bool:
        """Whether the experts are stored `[E, I, O]`."""
        return self.get_param().ndim == 3 and not self._did_swap_in_out_features

    def _experts(self, adapter: str) -> Iterator[tuple[Weights, Weights]]:
        down, up = self.lora_A[adapter], self.lora_B[adapter]
        for e in range(self.num_experts):
            yield tuple(
                Weights(f.weight[e], None if f.hybrid_weight is None else f.hybrid_weight[e]) for f in (down, up)
            )
