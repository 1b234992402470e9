"""GraLoRA of parameters that PEFT adapts through `target_parameters`, with one grid per expert.

Mixture-of-experts models keep the weights of `E` experts as one parameter of three dimensions. PEFT reads it as
`[E, O, I]`, or as `[E, I, O]` if the module has `is_transposed=True`. It reads a parameter of two dimensions as one
expert, `[O, I]`. Every expert e has factors of its own, and dW[e] is the full grid.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from . import blocks
from .blocks import GranularDown, GranularUp
from .fast_path import FusedLayer
from .layers import GraloraLayer
from .ops import Factors
from .routed import routed_call


class TargetParameter(NamedTuple):
    """A parameter to adapt, and the module that owns it, without PEFT's wrappers."""

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
        """Say in words why the parameter cannot be adapted; empty if it can."""
        if self.name in getattr(self.module, "parametrizations", {}):
            return "which is parametrised already (or quantised in place)"
        if type(self.value) is not nn.Parameter or not self.value.is_floating_point():
            return "which is no plain floating-point nn.Parameter"
        if self.value.ndim not in (2, 3):
            return f"which has {self.value.ndim} dimensions, where PEFT takes 2, or 3 for experts"
        return ""


def targeted_parameters(model: nn.Module, targets: list[str] | None) -> Iterator[tuple[str, TargetParameter]]:
    """Yield full name and place of each parameter that PEFT's `_inject_parameters` adapts for these targets."""
    if not targets:
        return
    for module_name, module in model.named_modules():
        plain_name = module_name.replace(".base_layer", "")
        own = [name for name, _ in module.named_parameters(recurse=False)]
        for name in own + list(getattr(module, "parametrizations", ())):
            key = f"{plain_name}.{name}"
            if key in targets or key.endswith(tuple(f".{target}" for target in targets)):
                yield key, TargetParameter(module, name)


@contextmanager
def pefts_own_features() -> Iterator[None]:
    """Let PEFT alone tell input from output features of parameters that are adapted meanwhile.

    `load_adapter` of transformers older than 5.17 puts a function around PEFT's, for the rest of the process, that
    takes all experts for `[E, O, I]`. PEFT tells them apart itself since 0.19, also gpt-oss's, which are `[E, I, O]`.
    """
    before = inner = lora.ParamWrapper.update_layer
    while inner.__globals__["__name__"] == "transformers.integrations.peft":
        inner = inner.__wrapped__  # type: ignore[attr-defined]
    lora.ParamWrapper.update_layer = inner  # type: ignore[method-assign]
    try:
        yield
    finally:
        lora.ParamWrapper.update_layer = before  # type: ignore[method-assign]


def param_wrapper(layer: Any, name: str) -> Any:
    """Return the `lora.ParamWrapper`, of those nested around a module, that adapts its parameter `name`, or None."""
    while isinstance(layer, BaseTunerLayer):
        if isinstance(layer, lora.ParamWrapper) and layer.parameter_name == name:
            return layer
        layer = layer.base_layer  # type: ignore[attr-defined]
    return None


class ExpertsDown(GranularDown):
    """The A of all experts: `weight` `[E, k, I/k, r_g]`, `hybrid_weight` `[E, hybrid_r, I]`. Never called."""

    experts = 1


class ExpertsUp(GranularUp):
    """The B of all experts: `weight` `[E, k, r_g, O/k]`, `hybrid_weight` `[E, O, hybrid_r]`. Never called."""

    experts = 1


class FusedExperts(FusedLayer):
    """Mixin over PEFT's `lora.ParamWrapper`, whose adapters act on the rows of their expert where `routed_call` can.

    Elsewhere dW is added to the parameter during a forward pass, once.
    """

    # attributes of lora.ParamWrapper
    num_experts: int
    parameter_name: str
    get_param: Callable[[], Tensor]
    _did_swap_in_out_features: bool
    _remove_parametrizations: Callable[[], None]

    def fused_call(self, x: Tensor) -> None:
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output: by one operation for it and all wrappers around it, or PEFT's forward."""
        call = None if kwargs else routed_call(self, args)
        return super().forward(*args, **kwargs) if call is None else call()

    def is_routed(self) -> bool:
        """Whether the adapters of this wrapper, and of those inside, would act on rows, of the parameter's dtype."""
        param = self.get_param()
        chosen = torch.zeros(1, 1, dtype=torch.long, device=param.device)
        return routed_call(self, (param.new_empty(1, 1), chosen, param.new_empty(1, 1))) is not None

    def expert_factors(self) -> list[Factors] | None:
        """The factors of all adapters in effect: A `[E, k, I/k, r]` and B `[E, k, r, O/k]`, of all experts.

        Empty if none is in effect; None if one of them is PEFT's to compute.
        """
        if self.disable_adapters or self.merged:
            return None if self.disable_adapters and self.merged else []  # which PEFT's forward unmerges
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not all(map(self.fuses, names)):
            return None
        if names and self.stores_in_out() != getattr(self.get_base_layer(), "is_transposed", False):
            return None  # see `pefts_own_features`
        return [factors for name in names for factors in self.grids(name)]

    def grids(self, adapter: str) -> list[Factors]:
        """An adapter as one or more grids of all experts, which add up: a plain LoRA is a grid of one block."""
        A, B = self._plain_factors(adapter)
        return [plain_grid(A, B, float(self.scaling[adapter]))]

    def stores_in_out(self) -> bool:
        """Tell whether the parameter is stored as `[E, I, O]`."""
        return self.get_param().ndim == 3 and not self._did_swap_in_out_features

    def single_adapter(self, active_adapters: Sequence[str]) -> str | None:
        """The one of these adapters that a single product adds to the parameter; None if PEFT is to add them."""
        names = [name for name in active_adapters if name in self.lora_A]
        return names[0] if len(names) == 1 and self.fuses(names[0]) and not is_8_bit(self.get_param()) else None

    def fuses(self, adapter: str) -> bool:
        """Whether `rows` is to give this adapter's dW."""
        return self.fuses_plain

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Add dW to the parameter during a forward pass, by a single product if one adapter is active."""
        name = self.single_adapter(active_adapters)
        if name is None:
            with super()._activate_lora(active_adapters):  # type: ignore[misc]
                yield
            return
        param = self.get_param()
        sum_of_both = AddRows(*self.rows(name, param.dtype), float(self.scaling[name]))
        base = self.get_base_layer()
        # unsafe: skips computing the sum once more to check shape and dtype, which do not change
        nn.utils.parametrize.register_parametrization(base, self.parameter_name, sum_of_both, unsafe=True)
        try:
            with nn.utils.parametrize.cached():
                yield
        finally:
            self._remove_parametrizations()

    def rows(self, adapter: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """lhs and rhs, for which `lhs @ rhs` is dW in the stored orientation, without scaling.

        Of a plain LoRA `[E, O, r]` and `[E, r, I]`, or their transposes if the parameter is stored as `[E, I, O]`.
        """
        A, B = (factor.to(dtype) for factor in self._plain_factors(adapter))
        return (A.mT, B.mT) if self.stores_in_out() else (B, A)

    def _plain_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A `[E, r, I]` and B `[E, O, r]` of a plain LoRA, as views."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return A.unflatten(0, (self.num_experts, -1)), B.unflatten(1, (-1, self.num_experts)).movedim(-1, 0)


class GranularExperts(FusedExperts, GraloraLayer):
    """Mixin over PEFT's `lora.ParamWrapper` with the factors of one grid per expert."""

    peft_class = lora.ParamWrapper
    keeps_name = True  # PEFT 0.20 finds these wrappers by the name of their class
    linear_factors = False
    not_combinable = "PEFT's add_weighted_adapter does not support target_parameters"

    def read_factors(self, adapter_name: str, k: int, hybrid_r: int) -> None:
        """Read PEFT's `[E * r, I]` and `[O, r * E]`: the expert is outermost in lora_A and innermost in lora_B."""
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        if is_8_bit(A):  # PEFT gives factors the parameter's dtype, and torch does not compute in 8 bits
            A, B = A.float(), B.float()
        down = GranularDown.read(A.detach().unflatten(0, (self.num_experts, -1)), k, hybrid_r)
        up = GranularUp.read(B.detach().unflatten(1, (-1, self.num_experts)).movedim(-1, 0), k, hybrid_r)
        self.lora_A[adapter_name] = ExpertsDown(*down).requires_grad_(A.requires_grad)
        self.lora_B[adapter_name] = ExpertsUp(*up).requires_grad_(B.requires_grad)

    def base_weight(self) -> Tensor:
        return self.get_param()

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Convert `[E, O, I]` to the parameter's layout: the same, `[E, I, O]`, or `[O, I]` if it is one expert."""
        return (matrix.mT if self.stores_in_out() else matrix).view(self.get_param().shape)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The inverse of `as_weight`."""
        matrix = weight if weight.ndim == 3 else weight.unsqueeze(0)
        return matrix.mT if self.stores_in_out() else matrix

    def delta_weight(self, adapter: str) -> Tensor:
        """Compute dW of one adapter, scaling included, in the parameter's layout and, unless 8-bit, its dtype."""
        param = self.get_param()
        dtype = torch.promote_types(self.lora_B[adapter].weight.dtype, torch.float32)
        with torch.autocast(param.device.type, enabled=False):  # a forward pass with several adapters calls this
            dW = torch.bmm(*self.rows(adapter, dtype)).mul(float(self.scaling[adapter])).view(param.shape)
        return dW if is_8_bit(param) else dW.to(param.dtype)

    def fuses(self, adapter: str) -> bool:
        return self.fuses_plain or self.is_gralora(adapter)

    def grids(self, adapter: str) -> list[Factors]:
        if not self.is_gralora(adapter):
            return super().grids(adapter)
        A, B, hybrid_A, hybrid_B, scaling = self.factors(adapter)
        grid = Factors(A, B, scaling=float(scaling))
        if hybrid_A is None or hybrid_B is None:
            return [grid]
        return [grid, plain_grid(hybrid_A, hybrid_B, grid.scaling)]

    def rows(self, adapter: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute the `grid_rows` of dW in the stored orientation: of the transposed grid if it is `[E, I, O]`."""
        if not self.is_gralora(adapter):
            return super().rows(adapter, dtype)
        factors = self.factors(adapter)
        factors = blocks.transposed(factors) if self.stores_in_out() else factors
        hybrid_A, hybrid_B = (t if t is None else t.to(dtype) for t in (factors.hybrid_A, factors.hybrid_B))
        return grid_rows(factors.A.to(dtype), factors.B.to(dtype), hybrid_A, hybrid_B)


def plain_grid(A: Tensor, B: Tensor, scaling: float) -> Factors:
    """A plain LoRA of all experts, A `[E, r, I]` and B `[E, O, r]`, as a grid of one block."""
    return Factors(A.mT.unsqueeze(1), B.mT.unsqueeze(1), scaling=scaling)


def is_8_bit(t: Tensor) -> bool:
    return t.dtype.itemsize == 1


class AddRows(nn.Module):
    """Parametrization that adds `scaling * lhs @ rhs` of `grid_rows` to a weight `[E, O, I]` or `[O, I]`."""

    def __init__(self, lhs: Tensor, rhs: Tensor, scaling: float) -> None:
        super().__init__()
        self.lhs, self.rhs, self.scaling = lhs, rhs, scaling

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # a parametrization must not change the dtype
            rows = weight.reshape(self.lhs.shape[0], -1, weight.shape[-1])
            return torch.baddbmm(rows, self.lhs, self.rhs, alpha=self.scaling).view_as(weight)


def grid_rows(
    A: Tensor, B: Tensor, hybrid_A: Tensor | None = None, hybrid_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Factor each row of blocks of the grids, hybrid part included, at the cost of a plain LoRA of rank r.

    Row j of the blocks of dW[e] is `lhs[e * k + j] @ rhs[e * k + j]`: output block j receives r_g sub-ranks, each from
    one chunk of the input.

    Args:
        A, B: `[E, k, I/k, r_g]` and `[E, k, r_g, O/k]`.
        hybrid_A, hybrid_B: `[E, hybrid_r, I]` and `[E, O, hybrid_r]`, or None.

    Returns:
        lhs `[E * k, O/k, r]` and rhs `[E * k, r, I]`, for which `(lhs @ rhs).view(E, O, I)` is dW without scaling.
    """
    k, r_g = A.shape[1], A.shape[3]
    chunks = A.unflatten(-1, (k, r_g // k)).permute(0, 3, 4, 2, 1)  # [E, k_j, q, I/k, k_i]
    rhs = torch.diag_embed(chunks, dim1=2, dim2=4).flatten(4).flatten(2, 3)  # [E, k_j, k_i * q, k_i * I/k]
    lhs = B.mT
    if hybrid_A is not None and hybrid_B is not None:
        rhs = torch.cat([rhs, hybrid_A.unsqueeze(1).expand(-1, k, -1, -1)], dim=2)
        lhs = torch.cat([lhs, hybrid_B.unflatten(1, (k, -1))], dim=3)
    return lhs.flatten(0, 1), rhs.flatten(0, 1)
