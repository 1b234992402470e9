"""What a LoRA layer of PEFT's does with the factors of a grid: `GraloraLayer`, the base class of all kinds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
from peft.tuners import lora
from torch import Tensor, nn

from . import blocks
from .blocks import GranularDown, GranularUp
from .factors import hybrid_to_lora
from .fast_path import FusedLayer
from .ops import Factors
from .promote import Promoted
from .seam import check_adapters_to_merge

ARROW = (
    "Arrow (arrow_config) routes between plain LoRA adapters by their factors, and cannot be combined with GraLoRA "
    "adapters; `gralora export` makes plain ones of them."
)


class GraloraLayer(FusedLayer):
    """Mixin in front of one of PEFT's LoRA layer classes; its adapters may be GraLoRA, plain LoRA, or some of each.

    This class is the mixin of linear layers, and the base class of all others: another kind of layer is a subclass,
    named in a row of `kinds.KINDS`. A subclass says what differs from a linear layer, and overrides no more than:

    `read_factors`      make a GraLoRA of the plain LoRA that PEFT has just added: the one method every kind has
    `draw_again`        repair what PEFT has drawn in a dtype that no factor can have
    `is_gralora`        whether an adapter is one, if `lora_B[adapter]` does not tell
    `factors`           an adapter as the factors of a linear map, A `[k, I/k, r_g]` and B `[k, r_g, O/k]`
    `as_weight`         lay a matrix `[O, I]` out as the base layer's weight
    `as_matrix`         the inverse of `as_weight`
    `base_weight`       the parameter that dW belongs to, if it is not `weight`
    `delta_weight`      dW, where it is not `as_weight` of the factors' product
    `plain_lora`        the plain LoRA that an adapter equals, in PEFT's layout
    `plain_weights`     where PEFT keeps A and B of a plain LoRA
    `names_saved`       which tensors of a saved adapter are those of such a layer
    `fused_call`        None in all classes but this one, whose base layer is a matrix product
    `forward`, `merge`, `unmerge` and what else PEFT's class does differently, by PEFT's names

    and the facts, which are attributes of the class:
    """

    peft_class: Any = lora.Linear
    """PEFT's class or classes (a tuple) for such layers: those that this one goes in front of."""

    linear_factors = True
    """Whether `lora_A` and `lora_B` hold a linear layer's factors, so that ranks can be padded (hotswapping) and
    gradients preconditioned (`gralora.create_lorafa_optimizer`)."""

    not_combinable = ""
    """Why PEFT's add_weighted_adapter is refused; empty if it is not."""

    merges_quantised = False
    """Whether `merge` reads and writes quantised weights by itself, whatever PEFT's class does."""

    drawn_by_fan_in = True
    """Whether PEFT draws A from a distribution that depends on the number of input features."""

    fuses_plain = False
    """Plain LoRA adapters are PEFT's, unless `gralora.accelerate` has set this in the layer."""

    changed_for: frozenset[str] = frozenset()
    """Names of the adapters whose initialisation has changed the base weight."""

    keeps_name = False
    __reduce_ex__ = Promoted.__reduce_ex__  # its adapters need gralora

    _safe_merge = False  # while `merge(safe_merge=True)` runs

    # The factors

    def is_gralora(self, adapter_name: str) -> bool:
        """Whether an adapter of this layer is GraLoRA; False for a plain LoRA, and for an adapter it lacks."""
        return adapter_name in self.lora_B and isinstance(self.lora_B[adapter_name], GranularUp)

    def has_fused(self) -> bool:
        return bool(self.fuses_plain and self.lora_A) or any(map(self.is_gralora, self.lora_B))

    def draw_again(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Draw the factors of a plain LoRA that PEFT has just added once more, if it gave them an unfit dtype."""

    def read_factors(self, adapter_name: str, k: int, hybrid_r: int) -> None:
        """Make a GraLoRA of the plain LoRA that PEFT has just added, with its numbers, dtype and device.

        Args:
            adapter_name: the adapter.
            k: blocks per side, a divisor of the layer's features and of the rank less hybrid_r.
            hybrid_r: ranks that stay a plain LoRA.
        """
        A, B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        down, up = GranularDown.from_linear(A, k, hybrid_r), GranularUp.from_linear(B, k, hybrid_r)
        self.lora_A[adapter_name] = down.requires_grad_(A.weight.requires_grad)
        self.lora_B[adapter_name] = up.requires_grad_(B.weight.requires_grad)

    def factors(self, adapter: str) -> Factors:
        """A GraLoRA adapter as the factors of a linear map, which share the memory of its parameters."""
        A, B = self.lora_A[adapter], self.lora_B[adapter]
        return Factors(A.weight, B.weight, A.hybrid_weight, B.hybrid_weight, self.scaling[adapter] * B.gain)

    def tie_factors(self, adapter: str, embedding: "GraloraLayer") -> None:
        """Share the memory of a GraLoRA of the embedding whose weight is this output layer's, as PEFT's LoRA does.

        The transposed grid is a grid: its A are the embedding's B transposed, and the other way round.
        """
        shared = blocks.transposed(embedding.factors(adapter))
        sources = (shared.A, shared.hybrid_A), (shared.B, shared.hybrid_B)
        for factor, (grid, hybrid) in zip((self.lora_A[adapter], self.lora_B[adapter]), sources, strict=True):
            factor.weight = nn.Parameter(grid.detach(), factor.weight.requires_grad)
            if hybrid is not None:
                factor.hybrid_weight = nn.Parameter(hybrid.detach(), factor.weight.requires_grad)

    def plain_lora(self, adapter: str, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """A and B, in PEFT's layout, of the plain LoRA that a GraLoRA adapter equals, without its scaling.

        Args:
            adapter: the adapter.
            rank: of the result, at least k * r_g + hybrid_r, which is the default.
        """
        A, B, hybrid_A, hybrid_B, _ = self.factors(adapter)
        return hybrid_to_lora(A, B, hybrid_A, hybrid_B, rank)

    @staticmethod
    def plain_weights(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of a plain LoRA adapter; the layer may be one of PEFT's own class."""
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight

    @classmethod
    def names_saved(cls, tensor: str, ndim: int) -> str:
        """What a tensor of a saved adapter is, in words, if no linear layer has such a one; else empty.

        The tools that read saved adapters know linear layers alone, and by this refuse others.

        Args:
            tensor: its name in the file.
            ndim: its number of dimensions.
        """
        return ""

    # The weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """A matrix `[O, I]` in the layout of the base layer's weight; a view."""
        return matrix.T if getattr(self, "fan_in_fan_out", False) else matrix  # not all of PEFT's classes have it

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A tensor in the layout of the base layer's weight as the matrix `[O, I]`; a view."""
        return weight.T if getattr(self, "fan_in_fan_out", False) else weight

    def base_weight(self) -> Tensor:
        """The base layer's parameter to which dW is added when the adapter is merged."""
        return self.get_base_layer().weight

    def base_matrix(self) -> Tensor:
        """The base weight as the matrix `[O, I]`, detached; writing to it changes the weight.

        Raises:
            TypeError: if the weight is quantised, so that it holds no such matrix.
        """
        weight = self.base_weight()
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise TypeError(
                f"the base weight is a {type(weight).__name__} of {weight.dtype}, which cannot be read as a matrix; "
                "load the model without quantisation."
            )
        return self.as_matrix(weight.detach())

    def set_base_matrix(self, matrix: Tensor) -> None:
        """Give the base weight new values, `[O, I]`, in memory of their own."""
        weight = self.base_weight()
        weight.data = self.as_weight(matrix).to(weight.dtype).contiguous()

    def delta_weight(self, adapter: str) -> Tensor:
        """dW of one GraLoRA adapter, scaling included, in the layout of the base weight.

        An adapter of half precision gives float32, so that adding it to a weight rounds once.
        """
        return self.as_weight(blocks.delta_weight(self.factors(adapter)))

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """dW of one adapter, scaling included, in the layout of the base weight; `delta_weight` if it is GraLoRA."""
        if not self.is_gralora(adapter):
            return super().get_delta_weight(adapter, *args, **kwargs)
        dW = self.delta_weight(adapter)
        if self._safe_merge and not dW.isfinite().all():  # not all of PEFT's classes look
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        return dW

    # What PEFT does with whole adapters

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, one adapter at a time: some of its classes fail on a second one, or on one that a layer lacks.

        Raises:
            ValueError: with safe_merge, if the result would not be finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        merged, self._safe_merge = self.merged_adapters, safe_merge
        try:
            for name in names:
                if name in self.scaling:
                    # PEFT would say of each further adapter that others were merged. Ignoring that by a filter would
                    # make Python forget which warnings it has shown, and show them again for every layer. DoRA has to
                    # know of the others: its norm is that of the weight without them.
                    before = merged if name in self.lora_variant else []
                    self.merged_adapters = list(before)
                    with keep_bias(self):
                        super().merge(safe_merge=safe_merge, adapter_names=[name])
                    merged += self.merged_adapters[len(before) :]
        finally:
            self.merged_adapters, self._safe_merge = merged, False

    def unmerge(self) -> None:
        with keep_bias(self):
            super().unmerge()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` may take dW for all that the adapter does.

        It would lose DoRA and aLoRA, and an initialisation's change of the base weight.
        """
        if self.is_gralora(adapter_name) and (adapter_name in self.lora_variant or adapter_name in self.changed_for):
            return False
        return super().supports_lora_conversion(adapter_name)

    def resolve_lora_variant(self, *, config: peft.LoraConfig, **kwargs: Any) -> Any:
        """PEFT's choice of a variant for an adapter that is added; Arrow's router reads other adapters' factors."""
        if getattr(config, "arrow_config", None) is not None:
            raise ValueError(ARROW)
        return super().resolve_lora_variant(config=config, **kwargs)


@contextmanager
def keep_bias(layer: Any) -> Iterator[None]:
    """Keep the base layer's bias where PEFT replaces the base layer by a new one: it forgets that of HQQ layers."""
    before = layer.base_layer
    yield
    if layer.base_layer is not before:
        layer.base_layer.bias = before.bias
